"""Whether a host has what a VM asks of it, told before anything is made."""

from __future__ import annotations

from pathlib import Path

from vmctl.hosts import Host
from vmctl.hypervisor import capabilities, network
from vmctl.manifest import Manifest
from vmctl.spec import VM

_MIB = 1 << 20


def problems(host: Host, vm: VM, manifest: Manifest) -> list[str]:
    """Everything the VM asks for that is not there. What cannot be seen from here is left to the start."""
    found = []
    if host.conn.qemu and vm.memory_mib > host.facts.memory_mib:
        found.append(f"{vm.memory_mib} MiB of memory are more than the {host.facts.memory_mib} MiB of the host")
    if vm.root_size_mib is not None and vm.root_size_mib * _MIB < manifest.virtual_size:
        size = -(-manifest.virtual_size // _MIB)
        found.append(f"a root disk of {vm.root_size_mib} MiB is smaller than the image's, {size} MiB")
    if vm.cpu not in {None, "host", "max"} and host.conn.qemu:
        known = capabilities.cpu_models(host.conn)
        if known and vm.cpu not in known:
            found.append(f"libvirt knows no CPU model {vm.cpu}, but {', '.join(sorted(known)[:4])} and others")
    named = sorted({nic.network for nic in vm.nics if nic.network} - {host.settings.network})
    found += [f"there is no network {name}" for name in named if network.find(host.conn, name) is None]
    if host.conn.local:
        found += [f"there is no file {disk.path}" for disk in vm.disks if disk.path and not Path(disk.path).exists()]
    return found
