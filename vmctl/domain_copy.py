"""A domain's XML made that of another domain: name, UUID, cards, disks, and what else is its alone. Pure."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field

_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
_METADATA = re.compile(r"\s*<metadata\b[^>]*>(?P<within>.*?)</metadata>|\s*<metadata\b[^>]*/>", re.DOTALL)
_OWN_RECORD = re.compile(
    r"<vmctl:vm\b(?:[^>]*/>|.*?</vmctl:vm>)|<vmctl-homes:homes\b(?:[^>]*/>|.*?</vmctl-homes:homes>)", re.DOTALL
)
_UNIX_PATH_OF_LIBVIRT = "/channel/target/"


@dataclass(frozen=True, slots=True)
class File:
    """A file and its format."""

    path: str
    format: str


@dataclass(frozen=True, slots=True)
class Identity:
    """What the copy has for its own. ``record`` is vmctl's element, namespace and all; "" for none.

    ``disks`` by target, the others stay; ``gone`` are targets it does not get. ``macs`` from the old ones, in small
    letters. ``seed``: XML of a disk that is added.
    """

    name: str
    uuid: str
    record: str
    macs: Mapping[str, str] = field(default_factory=dict)
    disks: Mapping[str, File] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    log: str = ""
    nvram: str = ""
    forward: tuple[int, int] | None = None
    seed: str = ""


def copied(text: str, new: Identity) -> str:
    """The XML of a domain, as libvirt writes it, as that of the copy.

    <metadata> stays to the letter but for vmctl's record and its note of hosts: ElementTree would move namespaces to
    the top, from where libvirt loses them.
    """
    # A saved domain is wrapped in what libvirt remembers of it; here it is the plain <domain>.
    found = _METADATA.search(text)
    within = (found["within"] or "") if found else ""
    bare = text if found is None else text[: found.start()] + text[found.end() :]
    ET.register_namespace("qemu", _QEMU)
    root = ET.fromstring(bare)
    root.attrib.pop("id", None)
    _set(root, "name", new.name)
    _set(root, "uuid", new.uuid)
    _own_rest(root, new)
    devices = root.find("devices")
    if devices is not None:
        _own_disks(devices, new)
        _own_cards(devices, new.macs)
        _own_streams(devices, new.log)
    made = ET.tostring(root, encoding="unicode")
    within = _OWN_RECORD.sub("", within).strip() + new.record
    metadata = f"\n  <metadata>{within}</metadata>" if within else ""
    return made.replace("</uuid>", "</uuid>" + metadata, 1)


def _set(root: ET.Element, tag: str, text: str) -> None:
    element = root.find(tag)
    if element is None:
        element = ET.Element(tag)
        root.insert(0, element)
    element.text = text


def _own_rest(root: ET.Element, new: Identity) -> None:
    for label in root.findall("seclabel"):
        if label.get("type") == "dynamic":
            root.remove(label)
    if (genid := root.find("genid")) is not None:
        genid.text = None  # libvirt makes a new one
    if (nvram := root.find("os/nvram")) is not None and new.nvram:
        nvram.text = new.nvram
    for argument in root.iterfind(f"{{{_QEMU}}}commandline/{{{_QEMU}}}arg"):
        value = argument.get("value", "")
        if new.forward is not None:
            old, port = new.forward
            value = value.replace(f"hostfwd=tcp:127.0.0.1:{old}-:22", f"hostfwd=tcp:127.0.0.1:{port}-:22")
        for mac, own in new.macs.items():
            value = value.replace(f"mac={mac}", f"mac={own}")
        argument.set("value", value)
    # Told to the first boot only, by a file that goes with the VM it was made for.
    for info in root.findall("sysinfo[@type='fwcfg']"):
        for entry in [one for one in info if one.get("name") == "opt/com.coreos/config"]:
            info.remove(entry)
        if not len(info):
            root.remove(info)


def _own_disks(devices: ET.Element, new: Identity) -> None:
    last = -1
    for disk in devices.findall("disk"):
        target = disk.find("target")
        name = "" if target is None else target.get("dev", "")
        if name in new.gone:
            devices.remove(disk)
            continue
        last = list(devices).index(disk)
        if name in new.disks:
            _with_file(disk, new.disks[name])
        for child in disk.findall("mirror"):
            disk.remove(child)
    if new.seed:
        devices.insert(last + 1, ET.fromstring(new.seed))


def _with_file(disk: ET.Element, file: File) -> None:
    for child in [one for one in disk if one.tag in {"source", "backingStore", "alias"}]:
        disk.remove(child)
    disk.set("type", "file")
    driver = disk.find("driver")
    if driver is None:
        driver = ET.Element("driver", {"name": "qemu"})
        disk.insert(0, driver)
    driver.set("type", file.format)
    disk.insert(1, ET.Element("source", {"file": file.path}))


def _own_cards(devices: ET.Element, macs: Mapping[str, str]) -> None:
    for card in devices.iterfind("interface"):
        mac, source, target = card.find("mac"), card.find("source"), card.find("target")
        if mac is not None:
            mac.set("address", macs.get(mac.get("address", "").lower(), mac.get("address", "")))
        if source is not None and source.get("network"):
            source.attrib.pop("portid", None)  # the other's port on the network
            source.attrib.pop("bridge", None)
        if target is not None and target.get("dev", "").startswith("vnet"):
            card.remove(target)


def _own_streams(devices: ET.Element, log: str) -> None:
    for tag in ("serial", "console"):
        for stream in devices.iterfind(tag):
            stream.attrib.pop("tty", None)
            if stream.get("type") == "pty" and (source := stream.find("source")) is not None:
                stream.remove(source)
            if (logged := stream.find("log")) is not None:
                if log:
                    logged.set("file", log)
                else:
                    stream.remove(logged)
    for channel in devices.iterfind("channel"):
        source = channel.find("source")
        if source is not None and _UNIX_PATH_OF_LIBVIRT in source.get("path", ""):
            channel.remove(source)


def user_card(text: str) -> str | None:
    """The MAC of the card on user networking that vmctl gives a VM without root; None for a domain without one."""
    found = re.search(r"netdev=vmctl0,mac=([0-9a-f:]{17})", text)
    return found[1] if found else None


def obstacles(text: str) -> list[str]:
    """What of a running domain's XML forbids that two go on from its memory."""
    root = ET.fromstring(text)
    found = []
    if root.find("devices/tpm") is not None:
        found.append("it has a TPM, whose secrets would be in both")
    if root.find("devices/filesystem") is not None:
        found.append("it has shared folders, whose state is in another process")
    if root.find("devices/hostdev") is not None or root.find("devices/interface[@type='hostdev']") is not None:
        found.append("it has devices of its host")
    if root.find("sysinfo[@type='fwcfg']") is not None:
        found.append("it was told its first boot by fw_cfg")
    return found
