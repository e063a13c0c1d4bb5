"""From what was asked (spec.VM) and what is known (host, image, identity) to what is rendered. Pure.

Every default that depends on the host or the image is decided here, so that templates decide nothing.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace

from vmctl.record import Record
from vmctl.spec import (
    VM,
    Accel,
    Bus,
    Disk,
    DiskFormat,
    Firmware,
    Graphics,
    Machine,
    NicModel,
    OnCrash,
    Share,
    ShareDriver,
)

_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://vmctl.dev/vm")
_TARGETS = {Bus.VIRTIO: "vd", Bus.SCSI: "sd", Bus.SATA: "sd", Bus.IDE: "hd", Bus.NVME: "nvme"}
_PORTS_FOR_HOTPLUG = 4


@dataclass(frozen=True, slots=True)
class DiskView:
    """A disk as rendered. ``serial`` names it to the guest."""

    source: str
    format: str
    target: str
    bus: str
    serial: str = ""
    readonly: bool = False
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class NicView:
    """A network card on a libvirt network."""

    mac: str
    network: str
    model: str
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class UserNet:
    """User networking with an SSH forward from ``port`` of the host's loopback."""

    mac: str
    port: int
    device: str
    slot: int


@dataclass(frozen=True, slots=True)
class ShareWay:
    """How a folder is shared. ``guard`` is a program in virtiofsd's place that keeps it read-only."""

    driver: ShareDriver
    guard: str = ""


@dataclass(frozen=True, slots=True)
class ShareView:
    """A shared folder; the guest mounts it by its ``tag``."""

    folder: str
    tag: str
    driver: ShareDriver
    readonly: bool
    guard: str = ""


@dataclass(frozen=True, slots=True)
class DomainView:
    """Everything domain.xml.j2 prints."""

    name: str
    uuid: str
    description: str
    record: Record
    type: str
    memory_mib: int
    vcpus: int
    machine: str
    firmware: str
    nvram: str
    kernel: str
    initrd: str
    cmdline: str
    cpu_mode: str
    cpu_model: str
    cpu_without: tuple[str, ...]  # features
    disks: tuple[DiskView, ...]
    nics: tuple[NicView, ...]
    user_net: UserNet | None
    scsi: bool
    console: bool
    console_log: str
    rng: bool
    balloon: bool
    agent: bool
    graphics: str
    slots: Mapping[str, int] = field(default_factory=dict)
    hotplug_ports: int = 0
    secure_boot: bool = False
    tpm: bool = False
    ignition: str = ""
    shares: tuple[ShareView, ...] = ()
    shared_memory: bool = False
    on_crash: OnCrash = OnCrash.PRESERVE


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the parts of a VM are on its host: paths of its volumes, and its networks."""

    root: str
    seed: str
    new_disks: tuple[str, ...]
    console_log: str
    nvram: str
    kernel: str
    initrd: str
    cmdline: str
    network: str
    forward_port: int | None
    ignition: str = ""
    share_ways: tuple[ShareWay, ...] = ()


def share_tag(mount: str) -> str:
    """What a shared folder is called between host and guest, by its place in the guest; 9p allows 31 letters."""
    return "share-" + hashlib.sha256(mount.encode()).hexdigest()[:12]


def share_view(share: Share, way: ShareWay) -> ShareView:
    """A shared folder as rendered."""
    return ShareView(share.folder, share_tag(share.mount), way.driver, share.readonly, way.guard)


def identity(host: str, name: str, taken: Collection[str]) -> str:
    """The UUID of VM ``name`` on ``host``: the same each time, unless a VM in ``taken`` (UUIDs) has it already."""
    for attempt in range(1 + len(taken)):
        found = str(uuid.uuid5(_SPACE, f"{host}/{name}" + (f"/{attempt}" if attempt else "")))
        if found not in taken:
            return found
    raise AssertionError("more names for a VM than VMs")


def mac_address(vm_uuid: str, position: int) -> str:
    """A MAC in QEMU's range for NIC ``position`` (from 0) of a VM."""
    digest = hashlib.sha256(f"{vm_uuid}/{position}".encode()).digest()
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in digest[:3])


def volume_prefix(name: str, vm_uuid: str) -> str:
    """What the names of a VM's volumes begin with. The UUID keeps them apart from a later VM of the same name."""
    return f"{name}-{vm_uuid[:8]}"


def spec_digest(vm: VM) -> str:
    """A digest of the spec, to tell later whether a VM still is what was asked for."""
    plain = asdict(replace(vm, labels={})) | {"labels": dict(vm.labels)}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


# What TCG has and a guest is better off without. ERMS promises that `rep movsb` is the quickest copy, so kernel and C
# library take it; TCG does it byte by byte: copies cost 2.5 to 3 times as much, new processes and writes to files a
# fifth more.
_SLOW_UNDER_TCG = ("erms",)


def _cpu(cpu: str | None, accel: Accel) -> tuple[str, str, tuple[str, ...]]:
    """Mode, model and what it is to be without. Who asks for ``max`` gets all of it."""
    if cpu == "max":
        return "maximum", "", ()
    if cpu is None or cpu == "host":
        return ("host-passthrough", "", ()) if accel is Accel.KVM else ("maximum", "", _SLOW_UNDER_TCG)
    return "custom", cpu, ()


def _letters(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else chr(ord("a") + index // 26 - 1) + chr(ord("a") + index % 26)


def disk_views(disks: tuple[Disk, ...], placement: Placement) -> tuple[DiskView, ...]:
    """Root, seed, then the further disks, each with its target name on its bus."""
    views = [
        DiskView(placement.root, DiskFormat.QCOW2, "vda", Bus.VIRTIO, "root"),
        DiskView(placement.seed, DiskFormat.RAW, "vdb", Bus.VIRTIO, "seed", readonly=True),
    ]
    used = {"vd": 2, "sd": 0, "hd": 0, "nvme": 0}
    made = iter(placement.new_disks)
    for number, disk in enumerate(disks, 1):
        prefix = _TARGETS[disk.bus]
        target = prefix + (f"{used[prefix]}n1" if disk.bus is Bus.NVME else _letters(used[prefix]))
        used[prefix] += 1
        source = disk.path if disk.path is not None else next(made)
        views.append(DiskView(source, disk.format, target, disk.bus, f"disk{number}"))
    return tuple(views)


def _slotted(vm: VM, view: DomainView) -> DomainView:
    """Give the devices a VM always has slots on q35's root bus.

    libvirt would put each behind a PCIe root port of its own, and the guest pays for each port at boot. Further
    disks and cards go behind ports, which libvirt adds, so that they can be unplugged.
    """
    if vm.machine is not Machine.Q35:
        return view
    slots = iter(range(2, 0x1F))
    disks = tuple(replace(d, slot=next(slots)) if d.target in {"vda", "vdb"} else d for d in view.disks)
    nics = tuple(replace(n, slot=next(slots)) if i == 0 else n for i, n in enumerate(view.nics))
    user_net = replace(view.user_net, slot=next(slots)) if view.user_net else None
    names = [n for n, wanted in (("agent", vm.agent), ("rng", vm.rng), ("balloon", vm.balloon)) if wanted]
    if vm.graphics is not Graphics.NONE:
        names.append("video")
    return replace(
        view,
        disks=disks,
        nics=nics,
        user_net=user_net,
        slots={name: next(slots) for name in names},
        hotplug_ports=_PORTS_FOR_HOTPLUG,
    )


def _cmdline(vm: VM, placement: Placement) -> str:
    """The kernel's words, for a screen with a console there; first, since the last one named becomes /dev/console."""
    screen = "console=tty0 " if placement.kernel and vm.graphics is not Graphics.NONE else ""
    return screen + placement.cmdline


def resolve(vm: VM, *, vm_uuid: str, accel: Accel, placement: Placement, record: Record) -> DomainView:
    """The view of ``vm`` for domain.xml.j2."""
    macs = [nic.mac or mac_address(vm_uuid, position) for position, nic in enumerate(vm.nics)]
    mode, model, without = _cpu(vm.cpu, accel)
    user_net, nics = None, []
    for position, (mac, nic) in enumerate(zip(macs, vm.nics, strict=True)):
        if placement.forward_port is not None and position == 0 and nic.network is None:
            device = "virtio-net-pci" if nic.model is NicModel.VIRTIO else nic.model.value
            user_net = UserNet(mac, placement.forward_port, device, slot=0x1D)
        else:
            nics.append(NicView(mac, nic.network or placement.network, nic.model))
    view = DomainView(
        name=vm.name,
        uuid=vm_uuid,
        description=vm.description,
        record=record,
        type="kvm" if accel is Accel.KVM else "qemu",
        memory_mib=vm.memory_mib,
        vcpus=vm.vcpus,
        machine=vm.machine,
        firmware="" if vm.firmware is Firmware.BIOS else "efi",
        nvram="" if vm.firmware is Firmware.BIOS else placement.nvram,
        kernel=placement.kernel,
        initrd=placement.initrd,
        cmdline=_cmdline(vm, placement),
        cpu_mode=mode,
        cpu_model=model,
        cpu_without=without,
        disks=disk_views(vm.disks, placement),
        nics=tuple(nics),
        user_net=user_net,
        scsi=any(disk.bus is Bus.SCSI for disk in vm.disks),
        console=vm.console,
        console_log=placement.console_log,
        rng=vm.rng,
        balloon=vm.balloon,
        agent=vm.agent,
        graphics=vm.graphics,
        secure_boot=vm.firmware is Firmware.UEFI_SECURE,
        tpm=vm.tpm,
        ignition=placement.ignition if vm.ignition else "",
        shares=tuple(share_view(s, d) for s, d in zip(vm.shares, placement.share_ways, strict=True)),
        shared_memory=any(way.driver is ShareDriver.VIRTIOFS for way in placement.share_ways),
        on_crash=vm.on_crash,
    )
    return _slotted(vm, view)
