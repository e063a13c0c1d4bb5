"""A file tree in memory: what goes into an initramfs or a file system, independent of any folder on the host.

Owner, mode and time of files on the host depend on who builds where; here a path has a content and a mode, and
everything belongs to root.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath


class Kind(StrEnum):
    """What a path is."""

    FOLDER = "folder"
    FILE = "file"
    LINK = "link"
    CONSOLE = "console"


@dataclass(frozen=True, slots=True)
class Entry:
    """``mode`` is the permission bits; ``data`` a file's content or a link's target.

    A file's content may stay on disk (``source``), and a file may be another name (``same_as``, a path) of one that
    sorts before it. ``mtime`` None means the build's epoch. ``xattrs`` are (name, value).
    """

    kind: Kind
    mode: int
    data: bytes = b""
    source: Path | None = None
    same_as: str = ""
    uid: int = 0
    gid: int = 0
    mtime: int | None = None
    xattrs: tuple[tuple[str, bytes], ...] = ()


@dataclass(slots=True)
class Tree:
    """Entries by path, without a leading slash."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def __contains__(self, path: str) -> bool:
        return path in self.entries

    def __getitem__(self, path: str) -> Entry:
        return self.entries[path]

    def sorted(self) -> Iterator[tuple[str, Entry]]:
        """Every path after its parent, in an order that depends on the names only."""
        return iter(sorted(self.entries.items(), key=lambda item: item[0].split("/")))

    def folder(self, path: str, mode: int = 0o755) -> None:
        """Add a folder and its parents; one that is there keeps its mode unless another is asked for."""
        for parent in [*reversed(PurePosixPath(path).parents), PurePosixPath(path)]:
            if str(parent) != "." and str(parent) not in self.entries:
                self.entries[str(parent)] = Entry(Kind.FOLDER, 0o755)
        if mode != 0o755:
            self.entries[path] = Entry(Kind.FOLDER, mode)

    def add(self, path: str, entry: Entry) -> None:
        """Add an entry and its parents, or replace one."""
        parent = str(PurePosixPath(path).parent)
        if parent != ".":
            self.folder(parent)
        self.entries[path] = entry

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file, or replace one."""
        self.add(path, Entry(Kind.FILE, mode, data))

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self.add(path, Entry(Kind.LINK, 0o777, target.encode()))

    def console(self, path: str) -> None:
        """Add the console device (5, 1), which the kernel opens for init before any /dev is mounted."""
        self.add(path, Entry(Kind.CONSOLE, 0o600))
