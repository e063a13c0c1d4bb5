"""What is pulled into disks of running VMs now: each with the file it was based on before, which it may need again.

QEMU 7.2 ends a pull by naming the lower base in the file, or none, before it has written down where what it pulled is.
Killed then it leaves a file that names too little and lacks what had been there for years; the old base has all of it.
An entry is written before the pull begins and taken away when QEMU has flushed after its end. pull_settle.py tells what
becomes of one that was left, and till then what it names is needed (image_users.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from uuid import uuid4

from vmctl import durable
from vmctl.hosts import Host


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as it was: another one has another inode, and what was written to has another time."""

    path: str
    inode: int
    size: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A pull into ``path``, which is disk ``target`` of a VM and has this ``inode``.

    ``backing`` and ``backing_format`` are what its header named before; ``below`` are all files under it then, from the
    top down. ``process``: the mark of the QEMU that pulls.
    """

    uri: str
    vm: str
    target: str
    path: str
    inode: int
    format: str
    backing: str
    backing_format: str
    below: tuple[Stamp, ...]
    process: str = ""

    @property
    def base(self) -> str:
        """The file that it was based on."""
        return self.below[0].path

    @property
    def told(self) -> str:
        """For people."""
        return f"disk {self.target} of {self.vm}, which was based on {self.base}"


class End(StrEnum):
    """What becomes of an entry that was left."""

    FORGET = "it needs nothing"
    FLUSH = "its QEMU has still to write down where what it pulled is"
    PUT_BACK = "it is based on what it was based on"
    STARTED = "it was started since without what it may lack"
    CHANGED = "what it may lack is not there as it was"


@dataclass(frozen=True, slots=True)
class Found:
    """What is so when an entry is met.

    ``there``: the file is the one that was pulled into; ``based``: it names its old base; ``running``: a QEMU has it
    open, ``since``: but another one than pulled; ``saved``: its VM is, whose QEMU has ended well; ``changed``: one of
    the files that were below it is not as it was.
    """

    there: bool
    based: bool = False
    running: bool = False
    since: bool = False
    saved: bool = False
    changed: bool = False


def decide(found: Found) -> End:
    """What becomes of an entry, once no job works on its disk. Pure."""
    if not found.there or found.based or found.saved:
        return End.FORGET
    if found.running:
        return End.STARTED if found.since else End.FLUSH
    return End.CHANGED if found.changed else End.PUT_BACK


def stamp(path: str) -> Stamp:
    """A file as it is now. Raises OSError."""
    info = Path(path).stat()
    return Stamp(path, info.st_ino, info.st_size, info.st_mtime_ns)


def changed(stamps: Sequence[Stamp]) -> tuple[str, ...]:
    """Those of the files that are not as they were; one that is gone is not, either."""
    return tuple(was.path for was in stamps if not _is(was))


def _is(was: Stamp) -> bool:
    try:
        return stamp(was.path) == was
    except OSError:
        return False


def there(entry: Entry) -> bool:
    """Whether the file is the one that was pulled into."""
    try:
        return Path(entry.path).stat().st_ino == entry.inode
    except OSError:
        return False


def _folder(host: Host) -> Path:
    return host.folders.data / "pull-journal"


def begin(host: Host, entry: Entry) -> Path:
    """Write an entry, on the disk for good before this returns, and say where it is."""
    path = _folder(host) / f"{uuid4()}.json"
    durable.write(path, asdict(entry))
    return path


def end(path: Path) -> None:
    """Take an entry away, for good: one that came back would be of a disk that has been written to since."""
    path.unlink(missing_ok=True)
    durable.sync_folder(path.parent)


def entries(host: Host) -> Iterator[tuple[Path, Entry]]:
    """What was begun on this host and not seen to its end."""
    for path in sorted(_folder(host).glob("*.json")):
        try:
            values = json.loads(path.read_text())
            values["below"] = tuple(Stamp(**one) for one in values["below"])
            entry = Entry(**values)
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if entry.uri == host.conn.uri and entry.below:
            yield path, entry


def held(host: Host) -> Iterator[tuple[str, ...]]:
    """The files that are being pulled into, each with all that was below it, by the paths they really have.

    Of one whose old base is gone the header alone tells what it is based on.
    """
    for _, entry in entries(host):
        if there(entry) and Path(entry.base).exists():
            yield tuple(os.path.realpath(path) for path in (entry.path, *(one.path for one in entry.below)))
