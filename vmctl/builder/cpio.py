"""An initramfs in the "newc" cpio format (Documentation/driver-api/early-userspace/buffer-format.rst in Linux)."""

from __future__ import annotations

import stat

from vmctl.builder.tree import Entry, Kind, Tree

_TYPE = {Kind.FOLDER: stat.S_IFDIR, Kind.FILE: stat.S_IFREG, Kind.LINK: stat.S_IFLNK, Kind.CONSOLE: stat.S_IFCHR}
_TRAILER = "TRAILER!!!"


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _member(name: str, entry: Entry | None, inode: int, epoch: int) -> bytes:
    data = entry.data if entry else b""
    device = (5, 1) if entry and entry.kind is Kind.CONSOLE else (0, 0)
    fields = (
        inode,
        _TYPE[entry.kind] | entry.mode if entry else 0,
        0,  # uid
        0,  # gid
        2 if entry and entry.kind is Kind.FOLDER else 1,
        epoch if entry else 0,
        len(data),
        0,  # the file system's device
        0,
        *device,
        len(name.encode()) + 1,
        0,  # checksum, of another format
    )
    head = b"070701" + b"".join(b"%08X" % value for value in fields)
    return _padded(head + name.encode() + b"\0") + _padded(data)


def archive(tree: Tree, epoch: int) -> bytes:
    """The tree as an uncompressed archive: unpacking costs an emulated CPU more than the host saves on copying."""
    members = [_member(path, entry, number, epoch) for number, (path, entry) in enumerate(tree.sorted(), start=1)]
    return b"".join([*members, _member(_TRAILER, None, 0, 0)])
