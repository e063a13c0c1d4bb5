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


class Machine(StrEnum):
    """QEMU machine families vmctl offers."""

    Q35 = "q35"
    PC = "pc"


class Bus(StrEnum):
    """How a disk is attached."""

    VIRTIO = "virtio"
    SCSI = "scsi"
    SATA = "sata"


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
