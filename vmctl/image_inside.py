"""What an image's own files say of it, where they lie on an ext file system: os-release, cloud.cfg, list of packages.

Of packages, dpkg's list and apk's are read; rpm keeps a database that is none of a few lines' business.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from vmctl.default_users import Inside, os_release
from vmctl.errors import VmctlError
from vmctl.ext_files import Ext, Unreadable

_SECTOR = 512
_MOST_PARTITIONS = 32
_RELEASES = ("etc/os-release", "usr/lib/os-release")
# What reads a seed: cloud-init, Alpine's tiny-cloud, Ignition.
_SEEDED = ("etc/cloud/cloud.cfg", "etc/tiny-cloud.conf", "usr/bin/ignition", "usr/lib/dracut/modules.d/30ignition")
# dpkg's list and apk's, and what their lines of package and version begin with.
_PACKAGES = (
    ("var/lib/dpkg/status", "Package: ", "Version: "),
    ("lib/apk/db/installed", "P:", "V:"),
)
_LIST_MOST = 8 << 20
_MOST_PACKAGES = 10_000  # each command that looks for an image reads them, too
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.:~_-]{0,99}")

Read = Callable[[int, int], bytes]


def look(disk: Path) -> Inside | None:
    """What a qcow2 without a backing file, whose header is known to be good, says of itself; None: nothing readable."""
    from vmctl import qemu_nbd  # late: most disks are read where they came from
    from vmctl.nbd import Export

    try:
        tree = qemu_nbd.plain_tree(str(disk), "qcow2")
        with qemu_nbd.served(tree, what=f"look into {disk.name}") as (path, name), Export(path, name) as export:

            def read(offset: int, count: int) -> bytes:
                if offset < 0 or offset + count > export.size:
                    raise Unreadable("it ends before that")
                data = bytearray(count)
                export.read(offset, memoryview(data))
                return bytes(data)

            return look_by(read)
    except VmctlError:
        return None  # it is a look that may fail: who logs in can be told


def look_by(read: Read) -> Inside | None:
    """The same, through a function that reads (offset, count) or raises Unreadable."""
    for start in starts(read):
        try:
            found = _of(Ext(read, start))
        except (Unreadable, struct.error, OverflowError, MemoryError):
            continue
        if found.system:
            return found
    return None


def starts(read: Read) -> Iterator[int]:
    """Where file systems may begin: at the disk's beginning, and in its partitions (GPT, MBR), in bytes."""
    yield 0
    try:
        head = read(_SECTOR, 92)
        if head[:8] == b"EFI PART":
            (table,) = struct.unpack_from("<Q", head, 72)
            count, size = struct.unpack_from("<II", head, 80)
            if not 128 <= size <= 4096:
                return
            for index in range(min(count, _MOST_PARTITIONS)):
                entry = read(table * _SECTOR + index * size, 128)
                if any(entry[:16]):
                    yield struct.unpack_from("<Q", entry, 32)[0] * _SECTOR
            return
        table = read(446, 66)
        if table[64:] == b"\x55\xaa":
            for at in range(0, 64, 16):
                if table[at + 4]:
                    yield struct.unpack_from("<I", table, at + 8)[0] * _SECTOR
    except Unreadable:
        return


def _of(files: Ext) -> Inside:
    text = next((found for path in _RELEASES if (found := files.content(path)) is not None), b"")
    values = os_release(text.decode(errors="replace"))
    cloud = files.content(_SEEDED[0]) or b""
    seeded = bool(cloud) or any(files.content(path) is not None for path in _SEEDED[1:])
    system, version = values.get("ID", ""), values.get("VERSION_ID", "")
    return Inside(system, version, cloud.decode(errors="replace"), seeded, _software(files))


def _software(files: Ext) -> dict[str, str]:
    for path, package, version in _PACKAGES:
        try:
            text = files.content(path, _LIST_MOST)
        except (Unreadable, struct.error):
            return {}  # too long or scattered for a look; the rest is known
        if text is not None:
            return installed(text.decode(errors="replace"), package, version)
    return {}


def installed(text: str, package: str, version: str) -> dict[str, str]:
    """Versions by package, from a list of paragraphs with lines that begin so; of dpkg's, those that are installed."""
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n\n+", text):
        lines = paragraph.split("\n")
        names, versions = (
            [one.removeprefix(key) for one in lines if one.startswith(key)] for key in (package, version)
        )
        status = next((one for one in lines if one.startswith("Status: ")), "ok installed")
        if status.endswith("ok installed") and all(_WORD.fullmatch(one) for one in (*names[:1], *versions[:1])):
            found.update(zip(names[:1], versions[:1], strict=False))
    return dict(sorted(found.items())) if len(found) <= _MOST_PACKAGES else {}
