"""qcow2, versions 2 and 3. Source: QEMU's docs/interop/qcow2.txt."""

from __future__ import annotations

from vmctl.disk_header.window import DiskHeader, Unreadable, Window

MAGIC = b"QFI\xfb"
_V2_LENGTH = 72
_V3_LENGTH = 104
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _WIDE_L2 = (1 << bit for bit in range(5))
_UNDERSTOOD = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _WIDE_L2
_EXTENSION_END = 0
_EXTENSION_BACKING_FORMAT = 0xE2792ACA
_EXTENSION_DATA_FILE = 0x44415441
_EXTENSION_ENCRYPTION = 0x0537BE77
# QEMU's own limits.
_MOST_L1_BYTES = 32 << 20
_MOST_REFCOUNT_TABLE_BYTES = 8 << 20
_MOST_SNAPSHOTS = 65536
_LONGEST_BACKING_NAME = 1023
_MOST_EXTENSIONS = 64
_LONGEST_FORMAT = 15


def read(window: Window) -> DiskHeader:
    """Read a qcow2 header. Raises Unreadable."""
    magic, version, backing_at, backing_length, cluster_bits, size, encryption, l1_size, l1_at, *rest = window.unpack(
        ">4sIQIIQIIQQIIQ", 0
    )
    refcounts_at, refcount_clusters, snapshots, snapshots_at = rest
    if version not in {2, 3}:
        raise Unreadable(f"it is qcow2 of version {version}, which vmctl does not know")
    if not 9 <= cluster_bits <= 21:
        raise Unreadable(f"its cluster size is 2^{cluster_bits} bytes")
    cluster = 1 << cluster_bits
    problems = []
    features, length = 0, _V2_LENGTH
    if version == 3:
        features, _compatible, _clear, refcount_order, length = window.unpack(">QQQII", _V2_LENGTH)
        if refcount_order > 6:
            problems.append(f"its refcounts are 2^{refcount_order} bits wide")
        if not _V3_LENGTH <= length <= cluster:
            raise Unreadable(f"its header is {length} bytes long")
        problems += _feature_problems(features)
    backing = ""
    if backing_at or backing_length:
        backing = _backing(window, backing_at, backing_length)
        problems.append(f"it has a backing file ({backing or 'of a name that cannot be read'})")
    if encryption:
        problems.append("it is encrypted")
    found, backing_format = _extensions(window, length, backing_at or cluster, min(cluster, window.size))
    problems += found
    entries = cluster // (16 if features & _WIDE_L2 else 8)
    problems += _l1_problems(window, size, cluster, entries, l1_size, l1_at)
    if refcount_clusters * cluster > _MOST_REFCOUNT_TABLE_BYTES or not _inside(
        window, refcounts_at, refcount_clusters * cluster, cluster
    ):
        problems.append("its refcount table lies beyond the file, or is absurdly long")
    if snapshots and (snapshots > _MOST_SNAPSHOTS or not _inside(window, snapshots_at, 40 * snapshots, cluster)):
        problems.append("its snapshot table lies beyond the file, or is absurdly long")
    return DiskHeader("qcow2", size, tuple(problems), f"v{version}", backing, backing_format, bool(snapshots))


def _feature_problems(features: int) -> list[str]:
    problems = []
    if features & _DATA_FILE:
        problems.append("it keeps its data in an external data file")
    if features & _CORRUPT:
        problems.append("it is marked corrupt")
    if features & _DIRTY:
        problems.append("it is marked dirty: it was not closed, and needs `qemu-img check -r all`")
    if unknown := features & ~_UNDERSTOOD:
        problems.append(f"it needs features that vmctl does not know (bits {unknown:#x})")
    return problems


def _backing(window: Window, offset: int, length: int) -> str:
    if length > _LONGEST_BACKING_NAME:
        return ""
    try:
        return window.read(offset, length).decode(errors="replace")
    except Unreadable:
        return ""


def _extensions(window: Window, offset: int, end: int, limit: int) -> tuple[list[str], str]:
    """What the header extensions between ``offset`` and ``end`` say: problems, and the backing file's format."""
    problems: list[str] = []
    form = ""
    for _ in range(_MOST_EXTENSIONS):
        if offset + 8 > min(end, limit):
            return problems, form
        kind, length = window.unpack(">II", offset)
        if kind == _EXTENSION_END:
            return problems, form
        if offset + 8 + length > limit:
            return [*problems, "a header extension runs beyond the header"], form
        if kind == _EXTENSION_BACKING_FORMAT:
            form = window.read(offset + 8, min(length, _LONGEST_FORMAT)).decode(errors="replace")
        if kind == _EXTENSION_DATA_FILE:
            problems.append("it names an external data file")
        if kind == _EXTENSION_ENCRYPTION:
            problems.append("it is encrypted")
        offset += 8 + (length + 7) // 8 * 8
    return [*problems, "it has an absurd number of header extensions"], form


def _l1_problems(window: Window, size: int, cluster: int, entries: int, l1_size: int, l1_at: int) -> list[str]:
    needed = -(-size // (cluster * entries))
    if l1_size * 8 > _MOST_L1_BYTES or needed * 8 > _MOST_L1_BYTES:
        return ["its L1 table is absurdly long"]
    if l1_size < needed:
        return ["its L1 table is too short for its size"]
    if l1_size and not _inside(window, l1_at, l1_size * 8, cluster):
        return ["its L1 table lies beyond the file"]
    return []


def _inside(window: Window, offset: int, length: int, alignment: int) -> bool:
    return offset % alignment == 0 and offset > 0 and offset + length <= -(-window.size // alignment) * alignment
