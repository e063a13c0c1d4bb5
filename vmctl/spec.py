"""What a user asks for: plain values, careful defaults, and every problem of a spec reported at once. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from vmctl.choices import (
    Accel,
    AccelChoice,
    Boot,
    Bus,
    DiskFormat,
    Firmware,
    Graphics,
    Machine,
    NicModel,
    OnCrash,
    ShareDriver,
)
from vmctl.errors import SpecError

__all__ = [
    "Accel",
    "AccelChoice",
    "Boot",
    "Bus",
    "DiskFormat",
    "Firmware",
    "Graphics",
    "Machine",
    "NicModel",
    "OnCrash",
    "ShareDriver",
]

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
    """A network card. ``network`` None is vmctl's own network (user networking where that cannot be).

    ``addresses`` are static ones with their prefix, "10.0.0.5/24"; none means DHCP.
    """

    network: str | None = None
    model: NicModel = NicModel.VIRTIO
    mac: str | None = None
    addresses: tuple[str, ...] = ()
    gateway: str | None = None
    nameservers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Share:
    """A folder of the host, mounted in the guest at ``mount``."""

    folder: str
    mount: str
    readonly: bool = False


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
    shares: tuple[Share, ...] = ()
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    description: str = ""
    autostart: bool = False
    on_crash: OnCrash = OnCrash.PRESERVE
    ssh_keys: tuple[str, ...] = ()
    runcmd: tuple[str, ...] = ()
    user: str | None = None
    password_hash: str = field(default="", repr=False)
    user_data: tuple[str, ...] = field(default=(), repr=False)
    vendor_data: str = ""
    network_config: str = ""
    ignition: str = field(default="", repr=False)
    tpm: bool = False


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
_USER = r"[a-z_][a-z0-9_-]{0,31}"
_HASH = r"\$[0-9a-z]{1,8}\$[!-9;-~]{4,250}"  # crypt(5)
_SSH_KEY = r"(?:ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/=]+(?: [^\n\r]*)?"


def is_public_key(line: str) -> bool:
    """Whether it is one line of an authorized_keys file, without options."""
    return re.fullmatch(_SSH_KEY, line) is not None


def is_private_key(text: str) -> bool:
    """Whether it is a private key, or has one in it: of OpenSSH, PEM or PuTTY."""
    return re.search(r"PRIVATE KEY ?----|PuTTY-User-Key-File", text) is not None


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


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """Labels by key. Raises SpecError, also for a key given twice."""
    pairs = [parse_label(text) for text in texts]
    if twice := sorted({key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1}):
        raise SpecError(f"cannot read labels: {twice[0]!r} is given twice")
    return dict(pairs)


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
        raise SpecError(
            f"cannot read disk {text!r}: it can have bus {', '.join(Bus)} and format {', '.join(DiskFormat)}"
        ) from error
    if head.startswith("/"):
        return Disk(path=head, bus=bus, format=form)
    return Disk(size_mib=parse_size_mib(head), bus=bus, format=form)


_NIC_OPTIONS = ("mac", "address", "gateway", "dns")


def parse_nic(text: str, model: NicModel = NicModel.VIRTIO) -> Nic:
    """``NETWORK`` (empty: vmctl's own), with ``,mac=… ,address=IP/PREFIX ,gateway=IP ,dns=IP``. Raises SpecError."""
    network, *options = text.split(",")
    values: dict[str, list[str]] = {}
    for option in options:
        key, sep, value = option.partition("=")
        if key not in _NIC_OPTIONS or not sep:
            raise SpecError(
                f"cannot read network {text!r}: unknown option {option!r}", hint="known are mac, address, gateway, dns"
            )
        values.setdefault(key, []).append(value)
    if twice := [key for key in ("mac", "gateway") if len(values.get(key, ())) > 1]:
        raise SpecError(f"cannot read network {text!r}: {twice[0]} is given twice")
    return Nic(
        network=network or None,
        model=model,
        mac=values["mac"][0].lower() if "mac" in values else None,
        addresses=tuple(values.get("address", ())),
        gateway=values["gateway"][0] if "gateway" in values else None,
        nameservers=tuple(values.get("dns", ())),
    )


def parse_share(text: str) -> Share:
    """``HOST:GUEST`` or ``HOST:GUEST:ro``, both paths of folders; only HOST may have colons. Raises SpecError."""
    head, readonly = (text[:-3], True) if text.endswith(":ro") else (text, False)
    folder, colon, mount = head.rpartition(":")
    if not colon:
        raise SpecError(f"cannot read share {text!r}: it is not HOST:GUEST[:ro]", hint="for example /srv/data:/mnt:ro")
    share = Share(folder, mount, readonly)
    if found := share_problems(share):
        raise SpecError(f"cannot share {folder}", problems=found)
    return share


def share_problems(share: Share) -> list[str]:
    """Why this folder cannot be shared under any host; empty when it can."""
    found = []
    for what, path in (("host", share.folder), ("guest", share.mount)):
        if not path.startswith("/") or ".." in path.split("/"):
            found.append(f"the {what} folder {path!r} is not absolute, or climbs with '..'")
        elif re.search(_CONTROL, path) or re.search(_NOT_XML, path):
            found.append(f"the {what} folder {path!r} has control characters")
    if re.search(r"[,\\]", share.folder):
        found.append(f"the host folder {share.folder!r} has a comma or backslash, which virtiofsd misreads")
    if share.mount.strip("/") == "":
        found.append("the guest's root cannot be mounted over")
    return found


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
    return found + _address_problems(f"NIC {position}", nic)


def _address_problems(what: str, nic: Nic) -> list[str]:
    if not (nic.addresses or nic.gateway or nic.nameservers):
        return []
    import ipaddress  # late: most cards take what DHCP gives

    found, networks = [], []
    for text in nic.addresses:
        try:
            address = ipaddress.ip_interface(text)
        except ValueError:
            found.append(f"{what}: {text!r} is not an address like 10.0.0.5/24")
            continue
        networks.append(address.network)
        if "/" not in text:
            found.append(f"{what}: {text!r} has no prefix length, as in {text}/24")
        elif address.network.num_addresses > 2 and address.ip == address.network.network_address:
            found.append(f"{what}: {text!r} is the address of its network")
    for text in (*((nic.gateway,) if nic.gateway else ()), *nic.nameservers):
        try:
            one = ipaddress.ip_address(text)
        except ValueError:
            found.append(f"{what}: {text!r} is not an IP address")
            continue
        if text == nic.gateway and networks and not any(one in network for network in networks):
            found.append(f"{what}: the gateway {text} is in none of its networks")
    if nic.gateway and not nic.addresses:
        found.append(f"{what}: a gateway needs an address beside it")
    return found


def _first_boot_problems(vm: VM) -> list[str]:
    found = []
    if vm.user is not None and re.fullmatch(_USER, vm.user) is None:
        found.append(f"{vm.user!r} is not a user name of lower-case letters, digits, _ and -")
    if vm.password_hash and re.fullmatch(_HASH, vm.password_hash) is None:
        found.append("the password hash is not one of crypt(5), such as $6$…")
    if vm.network_config and any(nic.addresses for nic in vm.nics):
        found.append("a network-config and addresses of cards exclude each other")
    if not (vm.user_data or vm.vendor_data or vm.network_config or vm.ignition):
        return found
    from vmctl import user_data  # late: most VMs are made without

    for number, part in enumerate(vm.user_data, 1):
        found += user_data.user_data_problems(f"user-data {number}", part)
    if vm.vendor_data:
        found += user_data.user_data_problems("the vendor-data", vm.vendor_data)
    if vm.network_config:
        found += user_data.network_config_problems(vm.network_config)
    if vm.ignition:
        found += user_data.ignition_problems(vm.ignition)
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
    for share in vm.shares:
        found += share_problems(share)
    if len({share.mount for share in vm.shares}) < len(vm.shares):
        found.append("two shares have the same folder in the guest")
    if vm.firmware is not Firmware.BIOS and vm.machine is Machine.PC:
        found.append("UEFI firmware needs machine q35, not pc")
    if vm.machine is Machine.PC and any(disk.bus is Bus.SATA for disk in vm.disks):
        found.append("bus sata needs machine q35, not pc")
    if vm.machine is Machine.Q35 and any(disk.bus is Bus.IDE for disk in vm.disks):
        found.append("bus ide needs machine pc, not q35")
    if vm.cpu is not None and re.fullmatch(_CPU, vm.cpu) is None:
        found.append(f"{vm.cpu!r} is not a CPU model name")
    found += label_problems(vm.labels)
    if len(vm.description) > TEXT_MAX:
        found.append(f"the description has {len(vm.description)} characters, at most {TEXT_MAX}")
    if re.search(_NOT_XML, vm.description) or "\r" in vm.description:
        found.append("the description has control characters")
    for number, key in enumerate(vm.ssh_keys, 1):
        if not is_public_key(key):  # never quoted: it may be a private one
            found.append(f"SSH key {number} is {'a private key' if is_private_key(key) else 'not a public key line'}")
    for command in vm.runcmd:
        if re.search(_NOT_XML, command) or not command.strip():
            found.append(f"the first-boot command {command[:40]!r} is empty or has control characters")
    return (*found, *_first_boot_problems(vm))


def validate(vm: VM) -> None:
    """Raise one SpecError that names every problem of ``vm``."""
    if found := problems(vm):
        raise SpecError("cannot create VM", problems=found)
