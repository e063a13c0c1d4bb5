"""A VM's definition from a backup, made into that of the VM that is restored. Pure; the rest of the text stays.

A backup folder may come from anywhere, so what its definition would reach of this host, beside the restored disks, is
named first.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from vmctl import disk_xml
from vmctl.errors import ImageError

_RECORD = re.compile(r"(?s)<vmctl:vm\b[^>]*(?:/>|[^/]>.*?</vmctl:vm>)")
_QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_HARMLESS = re.compile(
    r"-netdev|-device|user,id=vmctl0,hostfwd=tcp:127\.0\.0\.1:\d+-:22|[a-z0-9-]+,netdev=vmctl0,[a-z0-9=:.,x]*"
)


@dataclass(frozen=True, slots=True)
class Changes:
    """What becomes of a definition. ``paths``: files by other names; ``disks``: path and format of each by target.

    ``record``: vmctl's record as an element, "" to leave it. ``seed``: path of a new seed to attach, "" for none.
    """

    name: str
    uuid: str
    disks: Mapping[str, tuple[str, str]]
    paths: Mapping[str, str] = field(default_factory=dict)
    macs: Mapping[str, str] = field(default_factory=dict)
    record: str = ""
    seed: str = ""


def changed(text: str, changes: Changes) -> str:
    """The definition with these changes. Raises ImageError for text that is no definition of libvirt's."""
    end = text.rfind("</metadata>")
    if end < 0:  # of a VM that vmctl did not make
        end = text.index("</uuid>") + len("</uuid>")
    head, tail = text[:end], text[end:]
    head = re.sub(r"<name>[^<]*</name>", f"<name>{escape(changes.name)}</name>", head, count=1)
    head = re.sub(r"<uuid>[^<]*</uuid>", f"<uuid>{changes.uuid}</uuid>", head, count=1)
    if changes.record:
        head = _RECORD.sub(lambda _: changes.record, head, count=1)
    for old, new in changes.paths.items():
        for form in ("'{}'", ">{}<"):
            tail = tail.replace(form.format(escape(old)), form.format(escape(new)))
    for old, new in changes.macs.items():
        tail = re.sub(re.escape(old), new, tail, flags=re.IGNORECASE)
    text = head + tail
    for target, (path, form) in changes.disks.items():
        text = disk_xml.with_source(text, target, path, form)
    return _with_seed(text, changes.seed) if changes.seed else text


def _with_seed(text: str, path: str) -> str:
    used = {disk.target for disk in disk_xml.read(text)}
    target = next(name for n in range(26) if (name := f"vd{chr(ord('a') + n)}") not in used)
    disk = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{escape(path)}'/>"
        f"<target dev='{target}' bus='virtio'/><readonly/><serial>seed</serial></disk>"
    )
    at = text.index("</disk>", text.rfind("</metadata>") + 1) + len("</disk>")
    return text[:at] + disk + text[at:]


def require_same(text: str, vm: str, uuid: str) -> None:
    """Raise ImageError unless the definition is of the VM that the backup says it is of."""
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise ImageError(f"cannot read the definition in the backup: {error}") from error
    if root.tag != "domain" or root.findtext("name") != vm or root.findtext("uuid") != uuid or "<devices>" not in text:
        raise ImageError("cannot use the definition in the backup: it is of another VM")


def reaches(text: str, restored: Collection[str], folders: Collection[str], emulator: str) -> frozenset[str]:
    """What the VM could get at on its host, beside files in ``restored``, in its pools' ``folders``, and networks."""
    root = ET.fromstring(text)
    found = {f"the program {text}" for one in root.iter("emulator") if (text := one.text or "") != emulator}
    for tag in ("hostdev", "filesystem", "smartcard", "redirdev"):
        for one in root.iterfind(f"devices/{tag}"):
            source = one.find("source")
            found.add(f"{tag} {' '.join((source.attrib if source is not None else one.attrib).values())}")
    found |= {
        f"QEMU's argument {one.get('value')}"
        for one in root.iter(f"{_QEMU}arg")
        if _HARMLESS.fullmatch(one.get("value", "")) is None
    }
    found |= {f"QEMU's variable {one.get('name')}" for one in root.iter(f"{_QEMU}env")}
    paths = {element.text or "" for tag in ("kernel", "initrd", "nvram", "loader") for element in root.iter(tag)}
    paths |= {element.get("template", "") for element in root.iter("nvram")}
    for device in root.iterfind("devices/*"):
        for one in device.iter():
            if one.tag in {"source", "log", "master"}:
                paths |= (
                    {one.get(key, "") for key in ("file", "dev", "dir", "path")} if device.tag != "channel" else set()
                )
    for entry in root.iterfind("sysinfo/entry"):
        paths.add(entry.get("file", ""))
    allowed = [folder.rstrip("/") + "/" for folder in (*folders, "/usr/share/OVMF", "/usr/share/qemu")]
    for path in paths - {""} - set(restored):
        if path.startswith("/") and (".." in path or not any(path.startswith(one) for one in allowed)):
            found.add(f"file {path}")
    return frozenset(found)
