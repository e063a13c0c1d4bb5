"""VMDK: one sparse extent with its descriptor embedded. Source: VMware's Virtual Disk Format 5.0."""

from __future__ import annotations

import re
import struct

from vmctl.disk_header.window import SECTOR, DiskHeader, Unreadable, Window

MAGIC = b"KDMV"
OLD_MAGIC = b"COWD"
_HEADER = "<4sIIQQQQIQQQB4sH"
_AT_END = 0xFFFFFFFFFFFFFFFF
_DESCRIPTOR_SECTORS = 20
_LONGEST_DESCRIPTOR = 1 << 20
_SPARSE_TYPES = {"monolithicsparse", "streamoptimized"}
_NO_PARENT = "ffffffff"
_DEFLATE = 1
_EXTENT = re.compile(r'^\s*(?:RW|RDONLY|NOACCESS)\s+\d+\s+(\S+)(?:\s+"([^"]*)")?', re.MULTILINE)
_LINE = re.compile(r'^\s*(\w+)\s*=\s*"?([^"\n]*?)"?\s*$', re.MULTILINE)
# QEMU takes a text for a descriptor that has a version line after nothing but comments and blank lines.
_TEXT = re.compile(rb"(?:[ \t]*(?:#[^\n]*)?\r?\n)*version=\d", re.IGNORECASE)


def is_text(head: bytes) -> bool:
    """Whether a file that begins so is a VMDK descriptor by itself."""
    return head.lstrip().lower().startswith(b"# disk descriptorfile") or _TEXT.match(head) is not None


def read_text(window: Window) -> DiskHeader:
    """A descriptor by itself: its data is always in other files."""
    text = window.up_to(0, _DESCRIPTOR_SECTORS * SECTOR).decode("latin-1")
    extents = [name or kind for kind, name in _EXTENT.findall(text)]
    problem = f"it keeps its data in other files ({', '.join(extents[:4]) or 'none named'})"
    return DiskHeader("vmdk", 0, (problem, *_descriptor_problems(text)[1]), "descriptor")


def read(window: Window) -> DiskHeader:
    """Read a sparse extent's header. Raises Unreadable."""
    fields = struct.unpack(_HEADER, window.read(0, struct.calcsize(_HEADER)))
    _magic, version, _flags, capacity, grain, descriptor_at, descriptor_size, _gtes, _rgd, directory, *_rest = fields
    compression = fields[-1]
    if version not in {1, 2, 3}:
        raise Unreadable(f"it is VMDK of version {version}, which vmctl does not know")
    if not capacity:
        # QEMU then takes the embedded descriptor's extents, which may be any file of the host's.
        raise Unreadable("its header gives no size, which makes its data lie in other files")
    if grain & (grain - 1) or not 1 <= grain <= 128:
        raise Unreadable(f"its grains are {grain} sectors long")
    problems = []
    if compression > _DEFLATE:
        problems.append("it is compressed in a way vmctl does not know")
    if directory == _AT_END:
        problems += _footer_problems(window, capacity, grain, compression)
    elif directory * SECTOR >= window.size:
        problems.append("its grain directory lies beyond the file")
    if not descriptor_at or not 0 < descriptor_size * SECTOR <= _LONGEST_DESCRIPTOR:
        raise Unreadable("it has no descriptor of its own, so it is a part of another VMDK")
    text = window.up_to(descriptor_at * SECTOR, descriptor_size * SECTOR).partition(b"\0")[0].decode("latin-1")
    variant, found = _descriptor_problems(text)
    problems += found
    # Wherever the header says the descriptor is, QEMU looks for the parent's name behind the first sector.
    if b"parentfilenamehint" in window.up_to(SECTOR, (_DESCRIPTOR_SECTORS + 1) * SECTOR).lower():
        problems.append("it names a parent disk")
    return DiskHeader("vmdk", capacity * SECTOR, tuple(dict.fromkeys(problems)), variant)


def _footer_problems(window: Window, capacity: int, grain: int, compression: int) -> list[str]:
    """A streamed disk repeats its header at the end, with the directory's place, and that copy is what counts."""
    footer = struct.unpack(_HEADER, window.read(window.size - 2 * SECTOR, struct.calcsize(_HEADER)))
    if footer[0] != MAGIC:
        return ["its footer is missing: it is cut short"]
    if (footer[3], footer[4], footer[-1]) != (capacity, grain, compression):
        return ["its header and its footer do not agree"]
    return ["its grain directory lies beyond the file"] if footer[9] * SECTOR >= window.size else []


def _descriptor_problems(text: str) -> tuple[str, list[str]]:
    """The kind of disk that a descriptor describes, and what is wrong with it."""
    values: dict[str, list[str]] = {}
    for key, value in _LINE.findall(text):
        values.setdefault(key.lower(), []).append(value)
    problems = []
    kinds = values.get("createtype", [])
    variant = kinds[0] if kinds else ""
    if len(kinds) != 1 or variant.lower() not in _SPARSE_TYPES:
        problems.append(f"it is of type {variant or 'unknown'}, not monolithicSparse or streamOptimized")
    if any(parent.lower() != _NO_PARENT for parent in values.get("parentcid", [])):
        problems.append("it is a differencing disk: it has a parentCID")
    if "parentfilenamehint" in text.lower():
        problems.append("it names a parent disk")
    if values.get("encoding", ["utf-8"])[0].lower() in {"encrypted"} or "encryption.keysafe" in text.lower():
        problems.append("it is encrypted")
    extents = _EXTENT.findall(text)
    if len(extents) != 1 or extents[0][0] != "SPARSE":
        shown = ", ".join(f"{kind} {name}".strip() for kind, name in extents[:4]) or "none"
        problems.append(f"its extents are not one sparse extent of its own: {shown}")
    elif "/" in extents[0][1] or "\\" in extents[0][1]:
        problems.append(f"its extent is a path: {extents[0][1]}")
    return variant, problems
