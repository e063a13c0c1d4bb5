"""The digest of each cluster that a backup's file holds, BLAKE3; over them, that of the whole disk. Pure but for files.

An increment's list laid over those of the backups below it is the list of the whole disk at that point: so a whole
disk's digest costs an increment no more than the hashing of what changed, and each file can be proved alone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from vmctl.digest import Digest
from vmctl.errors import ImageError

CLUSTER = 1 << 16
_MAGIC = b"VMCTLIDX"
_ENTRY = struct.Struct(">Q32s")
_HEAD = struct.Struct(">8sIIQ")
ZEROS = bytes(32)  # stands for a cluster of zeros

Index = dict[int, bytes]


def clusters(size: int) -> int:
    """How many clusters a disk of ``size`` bytes has."""
    return -(-size // CLUSTER)


def pack(index: Mapping[int, bytes]) -> bytes:
    """The list as a file has it."""
    head = _HEAD.pack(_MAGIC, 1, CLUSTER, len(index))
    return head + b"".join(_ENTRY.pack(number, index[number]) for number in sorted(index))


def packed_size(entries: int) -> int:
    """The length of such a file."""
    return _HEAD.size + entries * _ENTRY.size


def unpack(data: bytes, size: int, *, what: str) -> Index:
    """The list from a file's bytes, for a disk of ``size`` bytes. Raises ImageError."""
    if len(data) < _HEAD.size or _HEAD.unpack_from(data)[:3] != (_MAGIC, 1, CLUSTER):
        raise ImageError(f"cannot read {what}: it is no list of digests")
    if len(data) != packed_size(_HEAD.unpack_from(data)[3]):
        raise ImageError(f"cannot read {what}: it is cut short")
    found = dict(_ENTRY.iter_unpack(data[_HEAD.size :]))
    if found and max(found) >= clusters(size):
        raise ImageError(f"cannot read {what}: it names what lies beyond the disk's end")
    return found


def laid_over(lists: Iterable[Mapping[int, bytes]]) -> Index:
    """One list from several, the newest first: what a newer one has hides the older."""
    found: Index = {}
    for one in lists:
        found = dict(one) | found
    return found


def digest(index: Mapping[int, bytes], size: int) -> str:
    """The digest of a whole disk of ``size`` bytes: BLAKE3 over its size and the digests of all its clusters."""
    whole = bytearray(32 * clusters(size))
    for number, one in index.items():
        whole[32 * number : 32 * number + 32] = one
    found = Digest()
    found.update(struct.pack(">Q", size))
    found.update(bytes(whole))
    return str(found)
