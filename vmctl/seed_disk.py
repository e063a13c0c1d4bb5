"""Taking the seed away from a VM whose first boot is over: it holds the private host key, and password hashes."""

from __future__ import annotations

import re
from dataclasses import replace

from vmctl import identity, render
from vmctl.errors import VmctlError
from vmctl.events import Reporter, Step
from vmctl.guest import console_text
from vmctl.hosts import Host
from vmctl.hypervisor import domain, snapshots, storage
from vmctl.hypervisor.domain import Domain

# What is printed on the console when a first boot is over and all of it is on the disk. A boot cut off before that goes
# on from the seed at the next one; without one cloud-init would not even begin, and the host key would be lost. The
# micro image's init says so itself. cloud-init has only written, which a power cut may still undo half a minute later:
# there the kernel's last words must follow, which it prints after all file systems are closed.
_KEPT = re.compile(r"vmctl-micro: seed done")
_FINISHED = re.compile(r"Cloud-init v\. \S+ finished at")
# What vmctl writes at the head of the console log of a VM that goes on from another's memory, and what a boot prints.
WENT_ON = "vmctl: goes on from the memory of a VM whose first boot was over\r\n"
_BOOTING = re.compile(r"vmctl-micro: init|Cloud-init v\. \S+ running")
_CLOSED = re.compile(r"reboot: (?:Power down|Restarting system|System halted)")


def detach_used(host: Host, vm: Domain, report: Reporter) -> None:
    """Detach and delete the seed of a stopped VM, when its console log shows that its first boot went to the end."""
    record = vm.facts.record
    seed = next((one for one in record.owned if one.volume.endswith("-seed.iso")), None) if record else None
    if record is None or seed is None or not first_boot_is_kept(_log(host, vm)):
        return
    if identity.needed_elsewhere(host, [f"{storage.pool_path(host.conn, seed.pool)}/{seed.volume}"], report):
        return  # it runs there, and was kept here
    disk = next((disk for disk in vm.facts.disks if disk.source.endswith(f"/{seed.volume}")), None)
    if disk is not None:
        domain.detach_disk(host.conn, vm.name, disk.target)
    if any(f"/{seed.volume}" in one.xml for one in snapshots.snapshots(host.conn, vm.name)):
        return  # who goes back to one of these needs it; it goes with the VM, or at a start after them
    storage.delete_volume(host.conn, seed.pool, seed.volume)
    kept = tuple(one for one in record.owned if one != seed)
    domain.set_record(host.conn, vm.name, render.metadata(replace(record, owned=kept)))
    report(Step(f"{vm.name} no longer needs its seed"))


def first_boot_is_over(host: Host, vm: Domain) -> bool:
    """Whether the console log shows that the first boot went to its end, which a power cut may undo yet."""
    return tells_that_first_boot_is_over(_log(host, vm))


def tells_that_first_boot_is_over(log: str) -> bool:
    """Whether a console log shows it. A VM that came from a memory has had its first boot until it boots itself."""
    came = log.rfind(WENT_ON.strip())
    if came >= 0 and not _BOOTING.search(log, came):
        return True
    return bool(_KEPT.search(log) or _FINISHED.search(log))


def _log(host: Host, vm: Domain) -> str:
    try:
        return console_text(host, vm)
    except VmctlError:
        return ""  # nothing to tell by: the seed stays


def first_boot_is_kept(log: str) -> bool:
    """Whether a console log shows a first boot that went to its end, and that nothing of it can be lost any more."""
    finished = _FINISHED.search(log)
    closed = finished is not None and _CLOSED.search(log, finished.end()) is not None
    return closed or _KEPT.search(log) is not None
