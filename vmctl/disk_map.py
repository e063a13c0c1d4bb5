"""Where the blocks of a disk are: in which file of its chain, and where in it; the chain as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmctl import qemu_img
from vmctl.disk_chain import Chain
from vmctl.disk_find import chain, locate, require_file
from vmctl.hosts import Host
from vmctl.qemu_img import Extent

_SHADES = " ░▒▓█"


@dataclass(frozen=True, slots=True)
class Piece:
    """``length`` bytes of what the guest sees from ``offset`` on. ``layer``: path of the file, "" for none.

    ``allocated``: a layer says what is there; else it reads as zeros because none does. ``file_offset`` None: the data
    does not lie in the file as it is (zeros, or compressed).
    """

    offset: int
    length: int
    layer: str
    depth: int
    zero: bool
    allocated: bool
    file_offset: int | None


@dataclass(frozen=True, slots=True)
class DiskMap:
    """A disk's chain, and every piece of it in the order of the guest's blocks."""

    disk: str
    chain: Chain
    pieces: tuple[Piece, ...]


def pieces(extents: Sequence[Extent], layers: Chain) -> tuple[Piece, ...]:
    """qemu-img's extents as pieces, neighbours joined that go on in the same file. Pure."""
    found: list[Piece] = []
    for one in extents:
        allocated = one.present and (one.data or one.zero)
        known = allocated and one.depth < len(layers.layers)
        piece = Piece(
            one.start,
            one.length,
            layers.layers[one.depth].path if known else "",
            one.depth if known else -1,
            one.zero,
            allocated,
            one.offset if one.data else None,
        )
        if found and _continues(found[-1], piece):
            last = found.pop()
            piece = Piece(
                last.offset,
                last.length + piece.length,
                last.layer,
                last.depth,
                last.zero,
                last.allocated,
                last.file_offset,
            )
        found.append(piece)
    return tuple(found)


def _continues(one: Piece, other: Piece) -> bool:
    if (one.layer, one.zero, one.allocated) != (other.layer, other.zero, other.allocated):
        return False
    if one.file_offset is None or other.file_offset is None:
        return one.file_offset is other.file_offset
    return one.file_offset + one.length == other.file_offset


def picture(found: DiskMap, *, width: int = 64) -> str:
    """The chain drawn: a line for each file, the newest first, dark where the guest's blocks come from it. Pure."""
    size = max((one.offset + one.length for one in found.pieces), default=0)
    lines = []
    for depth, layer in enumerate(found.chain.layers):
        cells = [0.0] * width
        for one in found.pieces:
            if one.depth == depth and not one.zero:
                _fill(cells, one, size)
        drawn = "".join(_SHADES[0 if cell <= 0 else max(1, min(4, round(cell * 4)))] for cell in cells)
        arrow = "" if depth == 0 else "└ "
        lines.append(f"|{drawn}|  {arrow}{Path(layer.path).name} ({layer.format})")
    return "\n".join(lines)


def _fill(cells: list[float], one: Piece, size: int) -> None:
    """Add the share of each cell that a piece covers."""
    per = size / len(cells)
    first, last = int(one.offset / per), min(len(cells) - 1, int((one.offset + one.length - 1) / per))
    for n in range(first, last + 1):
        covered = min((n + 1) * per, one.offset + one.length) - max(n * per, one.offset)
        cells[n] += covered / per


def disk_map(host: Host, text: str) -> DiskMap:
    """Where the blocks of a disk are now; while its VM runs, a moment ago."""
    disk = locate(host, text)
    require_file(host, disk, "map")
    layers = chain(host, disk, "map")
    return DiskMap(disk.ref, layers, pieces(qemu_img.extents(Path(disk.path), disk.format), layers))
