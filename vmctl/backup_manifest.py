"""What stands beside a backup's files: manifest.json, which says what they are. Pure.

A backup folder may come from anywhere, so nothing in a manifest is believed: names are plain names in the backup's own
folder, numbers are bounded, and digests prove the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vmctl.errors import ImageError

SCHEMA = 1
KIND = "vmctl-backup"
NAME = "manifest.json"
_FILE = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}"
_ID = r"[0-9]{8}T[0-9]{6}Z(?:-[0-9]{1,4})?"
_SHA256 = r"[0-9a-f]{64}"
_DIGEST = r"blake3:[0-9a-f]{64}"
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_VM = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?"
_TARGET = r"[a-z0-9]{2,16}"
_MOST_BYTES = 1 << 50
_FORMATS = {"qcow2", "raw"}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A small file of a backup, whole in each: ``role`` says what it is, ``source`` where it was on its host.

    ``changed_ns``: when it was written there last, in nanoseconds since 1970.
    """

    role: str
    file: str
    size: int
    sha256: str
    source: str = ""
    changed_ns: int = 0


@dataclass(frozen=True, slots=True)
class StoredDisk:
    """A disk in a backup. ``parent``: the backup its file is laid over, "" for a full one. Sizes in bytes.

    ``digest`` is of all the guest could read at that point; ``index`` the file with the digest of each cluster.
    ``format`` is what the disk was on its host: in the backup each is qcow2. ``why``: why it is full where it had a
    parent to be laid over.
    """

    target: str
    serial: str
    format: str
    size: int
    digest: str
    file: str
    file_size: int
    index: str
    index_sha256: str
    clusters: int
    parent: str = ""
    why: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """One backup of a VM at one moment. ``checkpoint`` is what the next increment counts from, "" for nothing.

    ``consistency``: frozen (by the agent), stopped, or crash (as after a power cut).
    """

    id: str
    vm: str
    uuid: str
    host: str
    created: str
    consistency: str
    compression: str
    checkpoint: str
    disks: tuple[StoredDisk, ...]
    files: tuple[StoredFile, ...]
    vmctl: str = ""
    left_out: tuple[str, ...] = ()
    took_s: float = 0.0
    schema: int = SCHEMA

    @property
    def parents(self) -> frozenset[str]:
        """The backups that this one cannot be restored without."""
        return frozenset(disk.parent for disk in self.disks if disk.parent)

    @property
    def kind(self) -> str:
        """How much of it is whole."""
        if not self.parents:
            return "full"
        return "incremental" if all(disk.parent for disk in self.disks) else "mixed"

    def disk(self, target: str) -> StoredDisk | None:
        """A disk by its target."""
        return next((one for one in self.disks if one.target == target), None)

    def file(self, role: str) -> StoredFile | None:
        """A file by its role."""
        return next((one for one in self.files if one.role == role), None)


def dump(manifest: Manifest) -> str:
    """A manifest as text."""
    return json.dumps({"kind": KIND} | asdict(manifest), indent=2, ensure_ascii=False) + "\n"


class _Reader:
    """Picks values from an object, and notes each that cannot be."""

    def __init__(self, values: Mapping[str, Any], where: str, problems: list[str]) -> None:
        self.values, self.where, self.problems = values, where, problems

    def text(self, key: str, pattern: str = r"[^\x00-\x1f\x7f]{0,1000}", *, default: str | None = None) -> str:
        """Text that ``pattern`` matches whole."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
            self.problems.append(f"{self.where}{key} is {value!r}"[:200])
            return ""
        return value

    def number(self, key: str, most: int = _MOST_BYTES) -> int:
        """A whole number from 0 to ``most``."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            self.problems.append(f"{self.where}{key} is {value!r}"[:200])
            return 0
        return value

    def objects(self, key: str) -> list[tuple[int, Mapping[str, Any]]]:
        """A list of objects."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) > 1000 or not all(isinstance(one, dict) for one in value):
            self.problems.append(f"{self.where}{key} is no list of objects")
            return []
        return list(enumerate(value))


def _disk(read: _Reader) -> StoredDisk:
    form = read.text("format", "[a-z0-9]{1,16}")
    if form not in _FORMATS:
        read.problems.append(f"{read.where}format is {form!r}")
    return StoredDisk(
        target=read.text("target", _TARGET),
        serial=read.text("serial", r"[A-Za-z0-9_.+ -]{0,64}"),
        format=form,
        size=read.number("size"),
        digest=read.text("digest", _DIGEST),
        file=read.text("file", _FILE),
        file_size=read.number("file_size"),
        index=read.text("index", _FILE),
        index_sha256=read.text("index_sha256", _SHA256),
        clusters=read.number("clusters"),
        parent=read.text("parent", f"(?:{_ID})?"),
        why=read.text("why", default=""),
        source=read.text("source", default=""),
    )


def _file(read: _Reader) -> StoredFile:
    return StoredFile(
        role=read.text("role", r"[a-z-]{1,32}"),
        file=read.text("file", _FILE),
        size=read.number("size", 1 << 34),
        sha256=read.text("sha256", _SHA256),
        source=read.text("source", default=""),
        changed_ns=read.number("changed_ns", 1 << 63),
    )


def parse(text: str, *, what: str) -> Manifest:
    """A manifest from its text. Raises ImageError with every problem found."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"cannot read {what}: it is no JSON: {error}") from error
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise ImageError(f"cannot read {what}: it is no manifest of a backup")
    if values.get("schema") != SCHEMA:
        raise ImageError(f"cannot read {what}: it is of schema {values.get('schema')!r}, and this vmctl knows {SCHEMA}")
    problems: list[str] = []
    read = _Reader(values, "", problems)
    took, left_out = values.get("took_s", 0.0), values.get("left_out", [])
    found = Manifest(
        id=read.text("id", _ID),
        vm=read.text("vm", _VM),
        uuid=read.text("uuid", _UUID),
        host=read.text("host"),
        created=read.text("created", r"[0-9T:+.Z-]{1,40}"),
        consistency=read.text("consistency", "frozen|stopped|crash"),
        compression=read.text("compression", "none|zlib|zstd"),
        checkpoint=read.text("checkpoint", r"[A-Za-z0-9._-]{0,128}"),
        disks=tuple(_disk(_Reader(one, f"disks[{n}].", problems)) for n, one in read.objects("disks")),
        files=tuple(_file(_Reader(one, f"files[{n}].", problems)) for n, one in read.objects("files")),
        vmctl=read.text("vmctl", default=""),
        left_out=tuple(str(one)[:200] for one in left_out) if isinstance(left_out, list) else (),
        took_s=float(took) if isinstance(took, int | float) else 0.0,
    )
    problems += _twice(found)
    if problems:
        raise ImageError(f"cannot trust {what}: {'; '.join(problems[:10])}")
    return found


def _twice(found: Manifest) -> list[str]:
    names = [d.target for d in found.disks]
    files = [name for d in found.disks for name in (d.file, d.index)] + [f.file for f in found.files]
    return [f"{one} is named twice" for group in (names, files) for one in sorted(set(group)) if group.count(one) > 1]


def is_id(text: str) -> bool:
    """Whether a folder of this name may be a backup."""
    return re.fullmatch(_ID, text) is not None


def chain(known: Mapping[str, Manifest], last: str, target: str) -> Sequence[tuple[Manifest, StoredDisk]]:
    """The files that hold a disk at the point ``last``, the newest first. Raises ImageError for a broken chain."""
    found: list[tuple[Manifest, StoredDisk]] = []
    at = last
    while at:
        manifest = known.get(at)
        disk = manifest.disk(target) if manifest else None
        if manifest is None or disk is None:
            raise ImageError(
                f"cannot use backup {last}: its disk {target} needs backup {at}, which is missing or damaged",
                hint="an older backup may be whole: vmctl backup verify",
            )
        if any(one.id == at for one, _ in found):
            raise ImageError(f"cannot use backup {last}: the chain of its disk {target} does not end")
        if found and disk.size != found[0][1].size:
            raise ImageError(f"cannot use backup {last}: its disk {target} has another size in backup {at}")
        found.append((manifest, disk))
        at = disk.parent
    return found
