"""How a disk can be given to a guest: devices, what is behind them, and QEMU's arguments for each. Pure.

Not every combination exists; whether it does is QEMU's to say, for it knows its own version.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any


class Device(StrEnum):
    """What the guest sees. HOST: no guest at all, a process of the host on the same file."""

    VIRTIO_BLK = "virtio-blk"
    VIRTIO_SCSI = "virtio-scsi"
    NVME = "nvme"
    IDE = "ide"
    SATA = "sata"
    HOST = "host"


class Backend(StrEnum):
    """What is behind it: nothing (null-co, which answers at once), or a file; qcow2+5 has five files below its own."""

    NULL = "null"
    RAW = "raw"
    QCOW2 = "qcow2"
    CHAIN_1 = "qcow2+1"
    CHAIN_5 = "qcow2+5"
    CHAIN_20 = "qcow2+20"

    @property
    def depth(self) -> int:
        """How many files are below the one that is written to."""
        return int(self.partition("+")[2] or 0)


class Cache(StrEnum):
    """Whether the host's page cache is passed by."""

    NONE = "none"
    WRITEBACK = "writeback"


class Aio(StrEnum):
    """How QEMU hands a file's I/O to the kernel."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


# Modules that a guest's kernel needs beside those of the bus.
DRIVERS = {
    Device.VIRTIO_BLK: ("virtio_blk",),
    Device.VIRTIO_SCSI: ("virtio_scsi", "sd_mod"),
    Device.NVME: ("nvme",),
    Device.IDE: ("ata_piix", "sd_mod"),
    Device.SATA: ("ahci", "sd_mod"),
}
GUEST_DEVICES = tuple(DRIVERS)
_FIT = 22  # disks of one guest: slots of the PCI bus, less what every guest has
_IDE_FIT = 4


@dataclass(frozen=True, slots=True)
class Setup:
    """One row: a disk as a guest has it. With null there are no cache and aio, on the host no aio."""

    device: Device
    backend: Backend
    cache: Cache | None = None
    aio: Aio | None = None
    iothread: bool = False

    @property
    def name(self) -> str:
        """What the row is called."""
        words = [self.device, self.backend, self.cache, self.aio, "iothread" if self.iothread else ""]
        return " ".join(word for word in words if word)

    def to_json(self) -> dict[str, str]:
        """The documented JSON form."""
        return {
            "device": self.device,
            "backend": self.backend,
            "cache": self.cache or "",
            "aio": self.aio or "",
            "iothread": "yes" if self.iothread else "no",
        }


def _file(device: Device, backend: Backend, cache: Cache, aio: Aio, iothread: bool = False) -> Setup:
    if backend is Backend.NULL:
        return Setup(device, backend, iothread=iothread)
    return Setup(device, backend, cache, aio, iothread)


_BASE = Setup(Device.VIRTIO_BLK, Backend.RAW, Cache.NONE, Aio.NATIVE)
_NULLS = tuple(Setup(device, Backend.NULL) for device in GUEST_DEVICES)
# From the base, one thing changed at a time.
STAR = (
    *_NULLS,
    Setup(Device.VIRTIO_BLK, Backend.NULL, iothread=True),
    Setup(Device.VIRTIO_SCSI, Backend.NULL, iothread=True),
    _BASE,
    replace(_BASE, iothread=True),
    *(replace(_BASE, aio=aio) for aio in (Aio.THREADS, Aio.IO_URING)),
    *(replace(_BASE, cache=Cache.WRITEBACK, aio=aio) for aio in Aio),
    *(replace(_BASE, backend=backend) for backend in Backend if backend not in {Backend.NULL, Backend.RAW}),
)
QUICK = (*_NULLS, _BASE, replace(_BASE, backend=Backend.QCOW2))


def chosen(
    devices: Sequence[Device],
    backends: Sequence[Backend],
    caches: Sequence[Cache],
    aios: Sequence[Aio],
    iothreads: Sequence[bool],
    *,
    quick: bool,
    everything: bool,
) -> tuple[Setup, ...]:
    """The rows to measure: a star around the base; of what is named, every combination; ``everything``: of all.

    Of each cache that a file is used with, the host's own row is the last.
    """
    if everything:
        axes: tuple[Sequence[Any], ...] = (
            devices or GUEST_DEVICES, backends or tuple(Backend), caches or tuple(Cache), aios or tuple(Aio),
            iothreads or (False, True),
        )  # fmt: skip
    elif any((devices, backends, caches, aios, iothreads)):
        axes = (
            devices or (_BASE.device,), backends or (_BASE.backend,), caches or (Cache.NONE,), aios or (Aio.NATIVE,),
            iothreads or (False,),
        )  # fmt: skip
    else:
        return with_ceilings(QUICK if quick else STAR)
    return with_ceilings(tuple(dict.fromkeys(_file(*one) for one in product(*axes))))


def with_ceilings(setups: Sequence[Setup]) -> tuple[Setup, ...]:
    """The rows with the host's own behind them: what a process there gets from the same kind of file."""
    caches = dict.fromkeys(setup.cache for setup in setups if setup.cache)
    return (*setups, *(Setup(Device.HOST, Backend.RAW, cache) for cache in caches))


def in_guests(setups: Sequence[tuple[int, Setup]]) -> list[list[tuple[int, Setup]]]:
    """Numbered rows, by the guests that have room for them."""
    guests: list[list[tuple[int, Setup]]] = []
    for one in setups:
        for guest in guests:
            ide = sum(setup.device is Device.IDE for _, setup in guest)
            if len(guest) < _FIT and (one[1].device is not Device.IDE or ide < _IDE_FIT):
                guest.append(one)
                break
        else:
            guests.append([one])
    return guests


def serial(number: int) -> str:
    """By which the guest knows the disk of a row."""
    return f"row{number}"


def node(setup: Setup, name: str, files: Sequence[Path], size: int) -> dict[str, Any]:
    """The block node of a row, for -blockdev; ``files`` from the one written to down to the last below it."""
    if setup.backend is Backend.NULL:
        return {"driver": "null-co", "node-name": name, "size": size}
    cache = {"direct": setup.cache is Cache.NONE, "no-flush": False}
    form = "raw" if setup.backend is Backend.RAW else "qcow2"
    # Spelled out to the last file: what QEMU finds in headers it would open with other settings.
    below: dict[str, Any] | None = None
    for path in reversed(files):
        top = path == files[0]
        file: dict[str, Any] = {"driver": "file", "filename": str(path), "aio": setup.aio, "cache": cache}
        one: dict[str, Any] = {"driver": form, "file": file, "cache": cache}
        if not top:
            one["read-only"] = file["read-only"] = True
        if form == "qcow2":
            one["backing"] = below
        below = one
    return {**(below or {}), "node-name": name}


def arguments(
    number: int, setup: Setup, files: Sequence[Path], size: int, *, ide: int, doorbells: bool = True
) -> list[str]:
    """QEMU's arguments for a row; ``ide`` counts IDE disks before it; without ``doorbells`` virtio's are registers."""
    name = serial(number)
    words = ["-blockdev", json.dumps(node(setup, name, files, size))]
    thread = ""
    if setup.iothread:
        words += ["-object", f"iothread,id=io{number}"]
        thread = f",iothread=io{number}"
    disk = f"drive={name},serial={name},id=dev{number}"
    virtio = "disable-legacy=on" + thread + ("" if doorbells else ",ioeventfd=off")
    match setup.device:
        case Device.VIRTIO_BLK:
            words += ["-device", f"virtio-blk-pci,{disk},{virtio}"]
        case Device.VIRTIO_SCSI:
            words += ["-device", f"virtio-scsi-pci,id=bus{number},{virtio}"]
            words += ["-device", f"scsi-hd,bus=bus{number}.0,{disk}"]
        case Device.NVME:
            words += ["-device", f"nvme,{disk}{thread}"]
        case Device.IDE:
            words += ["-device", f"ide-hd,bus=ide.{ide // 2},unit={ide % 2},{disk}{thread}"]
        case Device.SATA:
            words += ["-device", f"ich9-ahci,id=bus{number}", "-device", f"ide-hd,bus=bus{number}.0,{disk}{thread}"]
        case Device.HOST:
            raise ValueError("no guest has it")
    return words
