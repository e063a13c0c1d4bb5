"""Whether a host has what a VM asks of it, told before anything is made."""

from __future__ import annotations

from pathlib import Path

from vmctl import disk_chain
from vmctl.choices import DiskFormat
from vmctl.hosts import Host
from vmctl.hypervisor import capabilities, network, storage
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
        found += _foreign_disks(host, vm)
    if host.conn.qemu and vm.disks:
        buses = capabilities.disk_buses(host.conn, vm.machine)
        lacking = sorted({disk.bus for disk in vm.disks} - buses) if buses else []
        found += [f"libvirt there can put no disk on bus {bus}" for bus in lacking]
    return found


def _foreign_disks(host: Host, vm: VM) -> list[str]:
    """Existing disks whose headers would make the guest read other files of the host's."""
    found = []
    for disk in vm.disks:
        if disk.path and disk.format == DiskFormat.QCOW2 and Path(disk.path).is_file():
            problem = disk_chain.foreign_problem(disk.path, lambda: storage.folders(host.conn))
            found += [f"disk {disk.path}: {problem}"] if problem else []
    return found
