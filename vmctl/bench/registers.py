"""How often a guest touches a device's registers for one I/O: counted by QEMU's own trace events, under TCG.

With KVM each such access is an exit to user space; what is counted here holds for both, for the driver is the same. The
doorbells of virtio are made registers for it (no ioeventfd): with one they are an exit to the kernel all the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmctl.bench.machine import Guest
from vmctl.bench.setups import Device
from vmctl.bench.wire import Declined

EVENTS = "memory_region_ops_*"
_LINE = re.compile(r"memory_region_ops_(read|write) cpu -?\d+ mr \S+ addr \S+ value \S+ size \d+ name '([^']*)'")
# Regions by device, as QEMU's models name them. Interrupt controllers and timers are nobody's here.
_REGIONS = {
    Device.VIRTIO_BLK: r"virtio-pci-.*-virtio-blk|virtio-pci-notify-pio.*",
    Device.VIRTIO_SCSI: r"virtio-pci-.*-virtio-scsi",
    Device.NVME: r"nvme.*",
    Device.IDE: r"ide|ide\d|bmdma.*|piix-bmdma.*",
    Device.SATA: r"ahci.*",
}


@dataclass(frozen=True, slots=True)
class Counted:
    """Accesses for one I/O, by what they are; and to which regions."""

    ios: int
    reads: float
    writes: float
    regions: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {"ios": self.ios, "reads": self.reads, "writes": self.writes, "regions": dict(self.regions)}


def count(lines: Iterable[str], device: Device, ios: int) -> Counted:
    """What a log of trace events says of a device. Pure. Raises Declined for one without any, be it of a timer.

    QEMU takes the order to log events that it does not have, and says nothing.
    """
    kinds: Counter[str] = Counter()
    regions: Counter[str] = Counter()
    matches = [match for line in lines if (match := _LINE.search(line))]
    if not matches:
        raise Declined("this QEMU was built without the log of its trace events")
    for match in matches:
        if re.fullmatch(_REGIONS[device], match[2]):
            kinds[match[1]] += 1
            regions[match[2]] += 1
    each = {name: round(number / ios, 2) for name, number in sorted(regions.items())}
    return Counted(ios, round(kinds["read"] / ios, 2), round(kinds["write"] / ios, 2), each)


def arguments(log: Path) -> list[str]:
    """QEMU's arguments for a guest whose registers will be watched; nothing is, at first but one event of no matter."""
    return ["-d", "trace:vm_state_notify", "-D", str(log)]


def watch(guest: Guest, *, on: bool) -> None:
    """Have every access logged from now on, or no longer. Raises Declined, Gone."""
    guest.monitor.ask("trace-event-set-state", {"name": EVENTS, "enable": on})
