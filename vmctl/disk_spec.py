"""What a user asks of a disk: where it is, how it is attached, how large it becomes. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import unquote, urlsplit

from vmctl.choices import Aio, Bus, Cache, Discard, DiskFormat
from vmctl.errors import SpecError

SERIAL = r"[A-Za-z0-9_.+-]{1,20}"  # virtio-blk has room for 20 bytes
SECTOR = 512
MOST = 1 << 51  # bytes in a disk: what a qcow2 of clusters of 64 KiB can hold, and more than any device
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}"
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = r"(?i)([+-]?)([0-9]{1,15})([BKMGT]?)(?:iB|B)?"
_UNSAFE = "[\x00-\x1f\x7f-\x9f\u2028\u2029]"
_PORTS = {"nbd": 10809, "iscsi": 3260, "rbd": 6789}


class SourceKind(StrEnum):
    """What a disk's content comes from."""

    FILE = "file"
    BLOCK = "block"
    NBD = "nbd"
    ISCSI = "iscsi"
    RBD = "rbd"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the content of a disk is: a path, or ``name`` on a server, by ``socket`` or by ``host`` and ``port``."""

    kind: SourceKind
    path: str = ""
    name: str = ""
    host: str = ""
    port: int = 0
    socket: str = ""

    def __str__(self) -> str:
        if self.kind in {SourceKind.FILE, SourceKind.BLOCK}:
            return self.path
        if self.socket:
            return f"nbd+unix:///{self.name}?socket={self.socket}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind}://{host}:{self.port}/{self.name}"


def parse_source(text: str) -> Source:
    """A path, ``nbd://HOST[:PORT]/EXPORT``, ``nbd+unix:///EXPORT?socket=PATH``, ``iscsi://HOST[:PORT]/IQN/LUN``
    or ``rbd://HOST[:PORT]/POOL/IMAGE``. Raises SpecError.
    """
    if re.search(_UNSAFE, text):
        raise SpecError(f"cannot use disk source {text!r}: it has control characters")
    if text.startswith("/"):
        if ".." in text.split("/"):
            raise SpecError(f"cannot use disk source {text}: it climbs with '..'")
        return Source(SourceKind.BLOCK if text.startswith("/dev/") else SourceKind.FILE, path=text)
    parts = urlsplit(text)
    if parts.scheme == "nbd+unix":
        socket = parts.query.removeprefix("socket=")
        if not socket.startswith("/"):
            raise SpecError(f"cannot use disk source {text}: it names no socket, as in nbd+unix:///NAME?socket=/PATH")
        return Source(SourceKind.NBD, name=unquote(parts.path.lstrip("/")), socket=socket)
    if parts.scheme not in _PORTS:
        raise SpecError(
            f"cannot use disk source {text}: it is no absolute path and no nbd, nbd+unix, iscsi or rbd address"
        )
    return _on_server(text, SourceKind(parts.scheme))


def _on_server(text: str, kind: SourceKind) -> Source:
    parts = urlsplit(text)
    name = unquote(parts.path.lstrip("/"))
    try:
        port = parts.port
    except ValueError:
        port = 0
    if not parts.hostname or port == 0 or parts.username or parts.query or parts.fragment:
        raise SpecError(f"cannot use disk source {text}: it is not {kind}://HOST[:PORT]/NAME")
    if kind is SourceKind.ISCSI and re.fullmatch(r"(?:iqn|eui|naa)\.[^/\s]+/[0-9]{1,5}", name) is None:
        raise SpecError(f"cannot use disk source {text}: it is not iscsi://HOST/iqn.…/LUN")
    if kind is SourceKind.RBD and re.fullmatch(r"[^/\s]+/[^/\s]+", name) is None:
        raise SpecError(f"cannot use disk source {text}: it is not rbd://HOST/POOL/IMAGE")
    return Source(kind, name=name, host=parts.hostname, port=port or _PORTS[kind])


@dataclass(frozen=True, slots=True)
class Ref:
    """A disk as a user names it: of a VM (by target, serial or path), a volume of a pool, or a file. One is set."""

    vm: str = ""
    disk: str = ""
    pool: str = ""
    volume: str = ""
    path: str = ""

    def __str__(self) -> str:
        return self.path or (f"{self.vm}:{self.disk}" if self.vm else f"{self.pool}/{self.volume}")


def parse_ref(text: str, default_pool: str) -> Ref:
    """``VM:DISK``, ``POOL/VOLUME``, ``VOLUME`` of the default pool, or an absolute path. Raises SpecError."""
    if re.search(_UNSAFE, text) or not text:
        raise SpecError(f"cannot read disk {text!r}: it is empty or has control characters")
    if text.startswith("/"):
        return Ref(path=text)
    vm, colon, disk = text.partition(":")
    if disk.startswith("//"):
        raise SpecError(
            f"cannot use {text!r}: it is no disk of a pool, but on a network", hint="VM:TARGET names that of a VM"
        )
    if colon:
        if not vm or not disk:
            raise SpecError(f"cannot read disk {text!r}: it is not VM:DISK", hint="as in web1:vdc, or web1:disk1")
        return Ref(vm=vm, disk=disk)
    pool, slash, volume = text.rpartition("/")
    if "/" in pool or (slash and (not pool or not volume)) or volume in {".", ".."}:
        raise SpecError(f"cannot read disk {text!r}: it is not VM:DISK, POOL/VOLUME or an absolute path")
    return Ref(pool=pool or default_pool, volume=volume)


def name_problem(name: str) -> str:
    """Why a volume or pool cannot have this name; "" when it can."""
    if re.fullmatch(_NAME, name) is None:
        return f"the name {name!r} is not 1 to 128 of letters, digits and inner _ . + -"
    return ""


def parse_bytes(text: str) -> int:
    """``10G``, ``512M``, ``64K`` (powers of 1024) or plain bytes, in bytes, above 0. Raises SpecError."""
    match = re.fullmatch(_SIZE, text.strip())
    if match is None or match[1] or int(match[2]) == 0:
        raise SpecError(f"cannot read size {text!r}: not a whole number of B, K, M, G or T above 0", hint="as in 10G")
    found = int(match[2]) * _UNITS[match[3].upper()]
    if found > MOST:
        raise SpecError(f"cannot use size {text!r}: no disk is larger than {MOST >> 40}T")
    return found


def parse_size(text: str) -> int:
    """The size of a disk in bytes, with its unit. Raises SpecError.

    Without one it is MiB to who knows `create --disk`, and bytes to who knows qemu-img: a disk of the wrong size.
    """
    number = text.strip()
    if re.fullmatch("[0-9]+", number) and int(number):
        raise SpecError(
            f"cannot read size {text!r}: it has no unit", hint=f"{number}G, {number}M or {number}K; {number}B for bytes"
        )
    return parse_bytes(text)


def exact(size: int) -> str:
    """A size as parse_size reads it, in the largest unit of which it is a whole number."""
    for unit in "TGMK":
        if size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return f"{size}B"


def new_size(text: str, now: int) -> int:
    """The size a disk of ``now`` bytes gets by ``+10G``, ``-1G`` or ``20G``, in whole sectors. Raises SpecError."""
    sign, number = (text[:1], text[1:]) if text[:1] in {"+", "-"} else ("", text)
    by = parse_size(number)
    found = now + by if sign == "+" else now - by if sign == "-" else by
    if found <= 0:
        raise SpecError(f"cannot resize by {text}: the disk has only {now} bytes")
    if found > MOST:
        raise SpecError(f"cannot resize to {text}: no disk is larger than {MOST >> 40}T")
    return -(-found // SECTOR) * SECTOR


@dataclass(frozen=True, slots=True)
class IoLimits:
    """Most operations and bytes a second; None leaves a limit as it is, 0 takes it away.

    QEMU cannot have a total beside a limit of reads or writes of the same kind.
    """

    iops: int | None = None
    read_iops: int | None = None
    write_iops: int | None = None
    bps: int | None = None
    read_bps: int | None = None
    write_bps: int | None = None

    def given(self) -> dict[str, int]:
        """Those that are set, by libvirt's names."""
        names = {
            "total_iops_sec": self.iops,
            "read_iops_sec": self.read_iops,
            "write_iops_sec": self.write_iops,
            "total_bytes_sec": self.bps,
            "read_bytes_sec": self.read_bps,
            "write_bytes_sec": self.write_bps,
        }
        return {name: value for name, value in names.items() if value is not None}


def limit_problems(limits: IoLimits) -> list[str]:
    """Why these limits cannot be; empty when they can."""
    found = []
    for kind in ("iops", "bps"):
        parts = [getattr(limits, f"read_{kind}"), getattr(limits, f"write_{kind}")]
        if getattr(limits, kind) and any(parts):
            found.append(f"a total of {kind} and one of reads or writes exclude each other")
    if any(value < 0 or value > 1_000_000_000_000 for value in limits.given().values()):
        found.append("a limit is below 0 or above 10^12")
    return found


@dataclass(frozen=True, slots=True)
class Attachment:
    """How a disk is attached. ``iothread`` is its number, ``serial`` and ``target`` "" for the next free ones."""

    bus: Bus = Bus.VIRTIO
    format: DiskFormat | None = None
    target: str = ""
    serial: str = ""
    readonly: bool = False
    cache: Cache = Cache.DEFAULT
    aio: Aio = Aio.DEFAULT
    discard: Discard = Discard.UNMAP
    iothread: int | None = None
    limits: IoLimits = field(default_factory=IoLimits)


def attachment_problems(wanted: Attachment) -> list[str]:
    """Why a disk cannot be attached so to any machine; empty when it can."""
    found = limit_problems(wanted.limits)
    if wanted.serial and re.fullmatch(SERIAL, wanted.serial) is None:
        found.append(f"the serial {wanted.serial!r} is not 1 to 20 of letters, digits and _ . + -")
    if wanted.target and re.fullmatch(r"(?:vd|sd|hd)[a-z]{1,2}|nvme[0-9]+n[0-9]+", wanted.target) is None:
        found.append(f"the target {wanted.target!r} is not like vdc, sda or hdb")
    elif wanted.target and not wanted.target.startswith(PREFIX[wanted.bus]):
        found.append(f"the target {wanted.target} is not one of bus {wanted.bus}, as {PREFIX[wanted.bus]}… would be")
    if wanted.aio is Aio.NATIVE and wanted.cache not in {Cache.NONE, Cache.DIRECTSYNC}:
        found.append("aio native needs cache none or directsync")
    if wanted.iothread is not None and wanted.bus is not Bus.VIRTIO:
        found.append("only bus virtio takes an iothread for a single disk")
    if wanted.iothread is not None and not 1 <= wanted.iothread <= 64:
        found.append("an iothread's number is between 1 and 64")
    if wanted.readonly and wanted.bus in {Bus.SATA, Bus.IDE}:
        found.append(f"a disk on bus {wanted.bus} cannot be read-only")
    return found


PREFIX = {Bus.VIRTIO: "vd", Bus.SCSI: "sd", Bus.SATA: "sd", Bus.IDE: "hd", Bus.NVME: "nvme"}
HOT = frozenset({Bus.VIRTIO, Bus.SCSI})  # QEMU can plug no disk into a running machine's AHCI, IDE or NVMe controller


def next_target(bus: Bus, used: frozenset[str]) -> str:
    """The first free target name on a bus. Raises SpecError when all are taken."""
    if bus is Bus.NVME:
        names = [f"nvme{n}n1" for n in range(64)]
    else:
        letters = [chr(ord("a") + n) for n in range(26)]
        names = [PREFIX[bus] + one for one in (*letters, *(a + b for a in letters for b in letters))]
    for name in names[: 4 if bus is Bus.IDE else None]:
        if name not in used:
            return name
    raise SpecError(f"cannot attach one more disk: bus {bus} is full")


def next_serial(used: frozenset[str]) -> str:
    """The first free one of disk1, disk2 …"""
    return next(name for n in range(1, 10_000) if (name := f"disk{n}") not in used)
