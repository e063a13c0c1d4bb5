"""Reads libvirt's XML of a snapshot into values, and writes what vmctl changes in it. Pure.

What vmctl keeps of a snapshot (when it expires, where its NVRAM is) is an element of a namespace of its own inside the
<metadata> of the <domain> that libvirt keeps with it.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from vmctl import disk_xml, record

NAMESPACE = "https://vmctl.dev/xmlns/snapshot/1"
PREFIX = "vmctlsnap"
_TAG = f"{{{NAMESPACE}}}snapshot"
_ELEMENT = re.compile(r"\s*<vmctlsnap:snapshot\b[^>]*/>")
_RECORD = re.compile(r"<vmctl:vm\b.*?</vmctl:vm>", re.DOTALL)
_PARTS = ("domain", "inactiveDomain")


@dataclass(frozen=True, slots=True)
class SnapshotDisk:
    """A disk in a snapshot: ``file`` holds its state, and ``overlay`` was made on top of it ("": internal, or none).

    ``kind`` is external, internal or no.
    """

    target: str
    kind: str
    file: str
    format: str
    overlay: str


@dataclass(frozen=True, slots=True)
class Kept:
    """What vmctl keeps of a snapshot it made. ``nvram`` is a file with the UEFI variables, "" for none."""

    nvram: str = ""
    expires: datetime | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One snapshot. ``memory`` is no, internal or external; ``kept`` None for one that vmctl did not make."""

    name: str
    parent: str
    description: str
    created: datetime
    state: str
    memory: str
    memory_file: str
    disks: tuple[SnapshotDisk, ...]
    kept: Kept | None
    current: bool
    xml: str

    @property
    def kind(self) -> str:
        """Internal, external, or both for one of virsh's that mixes them."""
        kinds = {disk.kind for disk in self.disks} | {self.memory}
        found = sorted(kinds & {"internal", "external"})
        return "+".join(found) or "none"

    @property
    def external(self) -> tuple[SnapshotDisk, ...]:
        """Disks of which a file of its own holds the state."""
        return tuple(disk for disk in self.disks if disk.kind == "external")

    @property
    def files(self) -> frozenset[str]:
        """The files that hold the state of its disks, and must stay as they are."""
        return frozenset(disk.file for disk in self.disks if disk.kind != "no" and disk.file)

    @property
    def aside(self) -> tuple[str, ...]:
        """The files beside those of its disks."""
        nvram = self.kept.nvram if self.kept else ""
        return tuple(one for one in (self.memory_file, nvram) if one)


def _escaped(text: str) -> str:
    """As xml.sax.saxutils does, which brings half the standard library with it."""
    for char, word in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(char, word)
    return text


def _kept(root: ET.Element) -> Kept | None:
    found = root.find(f"domain/metadata/{_TAG}")
    # That of another one is in the VM it was put back to by virsh, and so in what virsh takes of it then.
    if found is None or found.get("of", root.findtext("name")) != root.findtext("name"):
        return None
    expires = found.get("expires", "")
    return Kept(found.get("nvram", ""), datetime.fromisoformat(expires) if expires else None)


def _disks(root: ET.Element) -> tuple[SnapshotDisk, ...]:
    domain = root.find("domain")
    devices = {} if domain is None else {one.target: one for one in disk_xml.read_element(domain)}
    found = []
    for disk in root.iterfind("disks/disk"):
        target = disk.get("name", "")
        there = devices.get(target)
        file, form = (there.source, there.format) if there else ("", "")
        kind = disk.get("snapshot", "no")
        overlay = disk_xml.source_text(disk.find("source")) if kind == "external" else ""
        found.append(SnapshotDisk(target, kind, file, form, overlay))
    return tuple(found)


def read(text: str, *, current: bool = False) -> Snapshot:
    """One snapshot from its XML."""
    root = ET.fromstring(text)
    memory = root.find("memory")
    return Snapshot(
        name=root.findtext("name") or "",
        parent=root.findtext("parent/name") or "",
        description=root.findtext("description") or "",
        created=datetime.fromtimestamp(int(root.findtext("creationTime") or 0), UTC),
        state=root.findtext("state") or "",
        memory="no" if memory is None else memory.get("snapshot", "no"),
        memory_file="" if memory is None else memory.get("file", ""),
        disks=_disks(root),
        kept=_kept(root),
        current=current,
        xml=text,
    )


def _span(text: str, part: str) -> tuple[int, int] | None:
    begin = re.search(rf"<{part}[\s>]", text)
    if begin is None:
        return None
    return begin.start(), text.index(f"</{part}>", begin.start()) + len(f"</{part}>")


def definition(snapshot: Snapshot) -> str:
    """The domain's definition as it was, "" where libvirt kept none."""
    for part in reversed(_PARTS):
        if span := _span(snapshot.xml, part):
            text = snapshot.xml[span[0] : span[1]]
            text = re.sub(rf"^<{part}\b", "<domain", text).removesuffix(f"</{part}>") + "</domain>"
            return _ELEMENT.sub("", text)
    return ""


def with_kept(text: str, kept: Kept) -> str:
    """A snapshot's XML that keeps this."""
    text = _ELEMENT.sub("", text)
    expires = f' expires="{kept.expires.isoformat()}"' if kept.expires else ""
    nvram = f' nvram="{_escaped(kept.nvram)}"' if kept.nvram else ""
    of = f' of="{_escaped(ET.fromstring(text).findtext("name") or "")}"'
    element = f'<{PREFIX}:snapshot xmlns:{PREFIX}="{NAMESPACE}"{of}{expires}{nvram}/>'
    span = _span(text, "domain")
    if span is None:
        raise ValueError("no <domain> in the snapshot")
    return text[: span[0]] + record.with_note(text[slice(*span)], element) + text[span[1] :]


def name(text: str) -> str:
    """The name in a domain's XML."""
    return ET.fromstring(text).findtext("name") or ""


def with_name(text: str, name: str) -> str:
    """A snapshot's XML under another name."""
    kept = read(text).kept
    text = re.sub(r"<name>.*?</name>", lambda _: f"<name>{_escaped(name)}</name>", text, count=1)
    return with_kept(text, kept) if kept else text


def without_overlays(text: str) -> str:
    """A snapshot's XML in which the files made on top of it have names that no file has.

    libvirt 9.0, told to forget a snapshot and nothing more, makes its children hold what it held, wherever they held a
    file that was made on top of it.
    """
    span = re.search(r"<disks>.*?</disks>", text, re.DOTALL)
    if span is None:
        return text
    return text[: span.start()] + re.sub(r"(file='[^']+)'", r"\1.gone'", span[0]) + text[span.end() :]


def with_files(text: str, moved: Mapping[str, tuple[str, str]]) -> str:
    """A snapshot's XML in which disks whose file is a key of ``moved`` have that file and format instead."""
    for part in _PARTS:
        if span := _span(text, part):
            text = text[: span[0]] + domain_with_files(text[span[0] : span[1]], moved) + text[span[1] :]
    return text


def domain_with_files(text: str, moved: Mapping[str, tuple[str, str]]) -> str:
    """The same for a domain's XML."""
    for disk in disk_xml.read(text):
        if disk.source in moved:
            text = disk_xml.with_source(text, disk.target, *moved[disk.source])
    return text


def with_record_of(text: str, other: str) -> str:
    """A domain's XML with the record of vmctl's from ``other``: what it owns now, not what it owned then."""
    found = _RECORD.search(other)
    return text if found is None else _RECORD.sub(lambda _: found[0], text, count=1)


def with_homes_of(text: str, other: str) -> str:
    """A snapshot's XML with the note of the domain's hosts from the domain's XML ``other``, as it is now."""
    for part in _PARTS:
        if span := _span(text, part):
            text = text[: span[0]] + record.with_homes_of(text[span[0] : span[1]], other) + text[span[1] :]
    return text
