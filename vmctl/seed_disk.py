"""Taking the seed away from a VM whose first boot is over: it holds the private host key, and password hashes."""

from __future__ import annotations

import re
from dataclasses import replace

from vmctl import render
from vmctl.errors import VmctlError
from vmctl.events import Reporter, Step
from vmctl.guest import console_text
from vmctl.hosts import Host
from vmctl.hypervisor import domain, storage
from vmctl.hypervisor.domain import Domain

# What cloud-init and the micro image's init print last on the console at a first boot. A boot cut off before that
# goes on from the seed at the next one; without one cloud-init would not even begin.
_OVER = re.compile(r"Cloud-init v\. \S+ finished at|vmctl-micro: seed done")


def detach_used(host: Host, vm: Domain, report: Reporter) -> None:
    """Detach and delete the seed of a stopped VM, when its console log shows that its first boot went to the end."""
    record = vm.facts.record
    seed = next((one for one in record.owned if one.volume.endswith("-seed.iso")), None) if record else None
    if record is None or seed is None or not first_boot_is_over(host, vm):
        return
    disk = next((disk for disk in vm.facts.disks if disk.source.endswith(f"/{seed.volume}")), None)
    if disk is not None:
        domain.detach_disk(host.conn, vm.name, disk.target)
    storage.delete_volume(host.conn, seed.pool, seed.volume)
    kept = tuple(one for one in record.owned if one != seed)
    domain.set_record(host.conn, vm.name, render.metadata(replace(record, owned=kept)))
    report(Step(f"{vm.name} no longer needs its seed"))


def first_boot_is_over(host: Host, vm: Domain) -> bool:
    """Whether the console log shows that the first boot went to its end."""
    try:
        return _OVER.search(console_text(host, vm)) is not None
    except VmctlError:
        return False  # no log to tell: the seed stays
