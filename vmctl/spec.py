"""What a user asks for: plain values, careful defaults, and every problem of a spec reported at once. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from vmctl.choices import Accel, AccelChoice, Boot, Bus, DiskFormat, Firmware, Graphics, Machine, NicModel
from vmctl.errors import SpecError

__all__ = ["Accel", "AccelChoice", "Boot", "Bus", "DiskFormat", "Firmware", "Graphics", "Machine", "NicModel"]

NAME_MAX = 63  # a VM's name is also its host name: one DNS label, RFC 1123
TEXT_MAX = 4096
LABEL_VALUE_MAX = 255
MEMORY_MIN_MIB = 32
VCPUS_MAX = 512
_MIB_PER = {"": 1, "M": 1, "G": 1024, "T": 1024 * 1024}


@dataclass(frozen=True, slots=True)
class Disk:
    """A further disk: a new one of ``size_mib``, or the existing file at ``path``, which vmctl never deletes."""

    size_mib: int | None = None
    path: str | None = None
    bus: Bus = Bus.VIRTIO
    format: DiskFormat = DiskFormat.QCOW2


@dataclass(frozen=True, slots=True)
class Nic:
    """A network card. ``network`` None is vmctl's own network (user networking where that cannot be)."""

    network: str | None = None
    model: NicModel = NicModel.VIRTIO
    mac: str | None = None


@dataclass(frozen=True, slots=True)
class VM:
    """One virtual machine as asked for. What is None is decided when host and image are known."""

    name: str
    image: str
    vcpus: int = 1
    memory_mib: int = 512
    root_size_mib: int | None = None
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = (Nic(),)
    firmware: Firmware = Firmware.BIOS
    boot: Boot = Boot.AUTO
    machine: Machine = Machine.Q35
    cpu: str | None = None
    accel: AccelChoice = AccelChoice.AUTO
    console: bool = True
    rng: bool = True
    balloon: bool = True
    agent: bool = True
    graphics: Graphics = Graphics.NONE
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    description: str = ""
    autostart: bool = False
    ssh_keys: tuple[str, ...] = ()
    runcmd: tuple[str, ...] = ()


# Patterns are kept as text: re compiles each on its first use, which most commands never make.
# Letters XML 1.0 cannot carry at all, not even escaped (section 2.2 of the recommendation), and lone surrogates.
_NOT_XML = "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
_CONTROL = "[\x00-\x1f\x7f-\x9f\u2028\u2029]"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_LABEL_KEY = r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?"
_MAC = r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}"
_CPU = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,62}"
_NET = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}"
_SIZE = r"(?i)([0-9]{1,9})(?:([MGT])(?:iB|B)?)?"
_SSH_KEY = r"(?:ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/=]+(?: [^\n\r]*)?"


def parse_size_mib(text: str) -> int:
    """``512``, ``512M``, ``2G``, ``1T`` (powers of 1024) in MiB. Raises SpecError."""
    match = re.fullmatch(_SIZE, text.strip())
    if match is None or int(match[1]) == 0:
        raise SpecError(
            f"cannot read size {text!r}: not a whole number of M, G or T above 0", hint="for example 512M or 2G"
        )
    return int(match[1]) * _MIB_PER[(match[2] or "").upper()]


def parse_label(text: str) -> tuple[str, str]:
    """``KEY=VALUE`` or ``KEY`` (empty value). Raises SpecError."""
    key, _, value = text.partition("=")
    if found := label_problems({key: value}):
        raise SpecError(f"cannot read label {text!r}", problems=found, hint="write it as KEY=VALUE")
    return key, value


def parse_disk(text: str) -> Disk:
    """``10G`` or ``/path/file.qcow2``, each with ``,bus=…`` and ``,format=…``. Raises SpecError."""
    head, *options = text.split(",")
    values: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        values[key] = value
    unknown = sorted(values.keys() - {"bus", "format"})
    if unknown:
        raise SpecError(f"cannot read disk {text!r}: unknown option {unknown[0]!r}", hint="known are bus and format")
    try:
        bus = Bus(values.get("bus", Bus.VIRTIO))
        form = DiskFormat(values.get("format", DiskFormat.RAW if head.endswith((".raw", ".img")) else "qcow2"))
    except ValueError as error:
        raise SpecError(f"cannot read disk {text!r}: {error}", hint="bus=virtio|scsi|sata, format=qcow2|raw") from error
    if head.startswith("/"):
        return Disk(path=head, bus=bus, format=form)
    return Disk(size_mib=parse_size_mib(head), bus=bus, format=form)


def name_problems(name: str) -> list[str]:
    """Why ``name`` cannot name a new VM; empty when it can."""
    if not name:
        return ["the name is empty"]
    if len(name) > NAME_MAX:
        return [f"the name has {len(name)} characters, at most {NAME_MAX} fit a host name"]
    if re.fullmatch(_NAME, name) is None:
        return [f"the name {name!r} is not made of letters, digits and inner hyphens (it becomes the host name)"]
    return []


def label_problems(labels: Mapping[str, str]) -> list[str]:
    """Why these labels cannot be kept; empty when they can."""
    found = []
    for key, value in labels.items():
        if re.fullmatch(_LABEL_KEY, key) is None:
            found.append(f"the label key {key!r} is not 1 to 63 of letters, digits and inner . _ / -")
        if len(value) > LABEL_VALUE_MAX:
            found.append(f"the value of label {key!r} has {len(value)} characters, at most {LABEL_VALUE_MAX}")
        if re.search(_CONTROL, value) or re.search(_NOT_XML, value):
            found.append(f"the value of label {key!r} has control characters")
    return found


def _disk_problems(position: int, disk: Disk) -> list[str]:
    what = f"disk {position}"
    if (disk.size_mib is None) == (disk.path is None):
        return [f"{what} needs either a size or a path"]
    if disk.path is None:
        return []
    found = []
    if not disk.path.startswith("/"):
        found.append(f"{what}: the path {disk.path!r} is not absolute")
    if ".." in disk.path.split("/"):
        found.append(f"{what}: the path {disk.path!r} climbs with '..'")
    if re.search(_CONTROL, disk.path) or re.search(_NOT_XML, disk.path):
        found.append(f"{what}: the path {disk.path!r} has control characters")
    return found


def _nic_problems(position: int, nic: Nic) -> list[str]:
    found = []
    if nic.network is not None and re.fullmatch(_NET, nic.network) is None:
        found.append(f"NIC {position}: {nic.network!r} is not a network name")
    if nic.mac is not None:
        if re.fullmatch(_MAC, nic.mac) is None:
            found.append(f"NIC {position}: {nic.mac!r} is not a MAC address like 52:54:00:12:34:56")
        elif int(nic.mac[:2], 16) & 1:
            found.append(f"NIC {position}: {nic.mac!r} is a multicast address")
    return found


def problems(vm: VM) -> tuple[str, ...]:
    """Everything wrong with ``vm``, in the order of its fields."""
    found = name_problems(vm.name)
    if not vm.image:
        found.append("no image is named")
    if not 1 <= vm.vcpus <= VCPUS_MAX:
        found.append(f"{vm.vcpus} vCPUs are not between 1 and {VCPUS_MAX}")
    if vm.memory_mib < MEMORY_MIN_MIB:
        found.append(f"{vm.memory_mib} MiB of memory are less than {MEMORY_MIN_MIB}")
    for position, disk in enumerate(vm.disks, 1):
        found += _disk_problems(position, disk)
    for position, nic in enumerate(vm.nics, 1):
        found += _nic_problems(position, nic)
    if vm.firmware is Firmware.UEFI and vm.machine is Machine.PC:
        found.append("UEFI firmware needs machine q35, not pc")
    if vm.machine is Machine.PC and any(disk.bus is Bus.SATA for disk in vm.disks):
        found.append("bus sata needs machine q35, not pc")
    if vm.cpu is not None and re.fullmatch(_CPU, vm.cpu) is None:
        found.append(f"{vm.cpu!r} is not a CPU model name")
    found += label_problems(vm.labels)
    if len(vm.description) > TEXT_MAX:
        found.append(f"the description has {len(vm.description)} characters, at most {TEXT_MAX}")
    if re.search(_NOT_XML, vm.description) or "\r" in vm.description:
        found.append("the description has control characters")
    for key in vm.ssh_keys:
        if re.fullmatch(_SSH_KEY, key) is None:
            found.append(f"{key[:40]!r} is not an SSH public key line")
    for command in vm.runcmd:
        if re.search(_NOT_XML, command) or not command.strip():
            found.append(f"the first-boot command {command[:40]!r} is empty or has control characters")
    return tuple(found)


def validate(vm: VM) -> None:
    """Raise one SpecError that names every problem of ``vm``."""
    if found := problems(vm):
        raise SpecError("cannot create VM", problems=found)
