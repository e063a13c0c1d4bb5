"""Python's compiled modules in a system that was built with SOURCE_DATE_EPOCH set.

Compiled under it, each holds a hash of its source, and every import reads the source, too, and hashes it. With the
source's time and size instead, as Debian's own installation has them, a look at the file's entry is enough: under
emulation cloud-init's modules load from a cold disk in 3.7 s of a processor, not in 4.4. Both are the package's, so
that equal builds stay equal. The head's form: PEP 552.
"""

from __future__ import annotations

import struct
from pathlib import PurePosixPath

from vmctl.builder.tree import Entry, Kind, Tree

_HASHED, _CACHE = 1, "__pycache__"
_HEAD = struct.Struct("<4sI8s")  # which Python, how it is checked, by what
_DATED = struct.Struct("<4sIII")


def date(tree: Tree) -> None:
    """Check each module that was compiled from a plain file by that file's time and size."""
    for path, entry in tree.entries.items():
        where = PurePosixPath(path)
        if where.suffix != ".pyc" or where.parent.name != _CACHE or not entry.source:
            continue
        source = tree.entries.get(str(where.parent.parent / f"{where.name.partition('.')[0]}.py"))
        if source and source.kind is Kind.FILE and not source.same_as and source.mtime is not None:
            entry.source.write_bytes(dated(entry.source.read_bytes(), source.mtime, _size(source)))


def _size(entry: Entry) -> int:
    return entry.source.stat().st_size if entry.source else len(entry.data)


def dated(compiled: bytes, mtime: int, size: int) -> bytes:
    """The same code, checked by its source's time (seconds) and size (bytes); as it is where no hash is in it."""
    if len(compiled) < _HEAD.size:
        return compiled
    magic, flags, _ = _HEAD.unpack_from(compiled)
    if not flags & _HASHED:
        return compiled
    return _DATED.pack(magic, 0, mtime & 0xFFFFFFFF, size & 0xFFFFFFFF) + compiled[_HEAD.size :]
