"""The closed sets of words a user may choose from. Apart from spec.py, for most commands need no more of it."""

from __future__ import annotations

from enum import StrEnum


class Accel(StrEnum):
    """What runs a guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


class AccelChoice(StrEnum):
    """What a user may ask for with --accel."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"
    REQUIRE_KVM = "require-kvm"


class Firmware(StrEnum):
    """What initialises the machine. An image with a kernel of its own is started directly from either."""

    BIOS = "bios"
    UEFI = "uefi"
    UEFI_SECURE = "uefi-secure"


class Boot(StrEnum):
    """What a VM starts from: the image's kernel where it has one and the firmware is BIOS, or its disk."""

    AUTO = "auto"
    DISK = "disk"


class OnCrash(StrEnum):
    """What becomes of a VM whose guest's kernel panics: it is kept as it is then, restarted, or powered off."""

    PRESERVE = "preserve"
    RESTART = "restart"
    DESTROY = "destroy"


class Machine(StrEnum):
    """QEMU machine families vmctl offers."""

    Q35 = "q35"
    PC = "pc"


class Bus(StrEnum):
    """How a disk is attached."""

    VIRTIO = "virtio"
    SCSI = "scsi"
    SATA = "sata"
    IDE = "ide"
    NVME = "nvme"


class NicModel(StrEnum):
    """Network card models with a driver in common guests."""

    VIRTIO = "virtio"
    E1000E = "e1000e"
    E1000 = "e1000"
    RTL8139 = "rtl8139"


class Graphics(StrEnum):
    """Graphical console. None unless asked: a server needs none and each is an open port."""

    NONE = "none"
    VNC = "vnc"


class ShareDriver(StrEnum):
    """How a folder of the host gets into a guest."""

    VIRTIOFS = "virtiofs"
    P9 = "9p"


class DiskFormat(StrEnum):
    """Formats a disk may be attached in; never guessed, a guess can be steered by the guest."""

    QCOW2 = "qcow2"
    RAW = "raw"


class Cache(StrEnum):
    """What the host's page cache does for a disk; qemu(1), -blockdev cache."""

    DEFAULT = "default"
    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    DIRECTSYNC = "directsync"
    UNSAFE = "unsafe"


class Aio(StrEnum):
    """How QEMU has its reads and writes done by the host."""

    DEFAULT = "default"
    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class Discard(StrEnum):
    """Whether blocks a guest frees are given back to the host."""

    UNMAP = "unmap"
    IGNORE = "ignore"


class PoolType(StrEnum):
    """Kinds of storage pools, by libvirt's names but for nfs, which is its netfs."""

    DIR = "dir"
    FS = "fs"
    NFS = "nfs"
    LOGICAL = "logical"
    ISCSI = "iscsi"
    ISCSI_DIRECT = "iscsi-direct"
    RBD = "rbd"


class Compression(StrEnum):
    """How the clusters of a backup's files are compressed."""

    NONE = "none"
    ZLIB = "zlib"
    ZSTD = "zstd"


class StorageCopy(StrEnum):
    """Which part of disks a migration takes along: all of it, or what lies above base images."""

    OVERLAY = "overlay"
    FULL = "full"
