"""Disks copied into a qcow2 by vmctl itself: what QEMU reads in it, and its digest, whatever form they come in."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmctl import digest, image_import, qcow2_stream, qemu_img
from vmctl.disk_header import DiskHeader
from vmctl.errors import ImageError
from vmctl.events import silent
from vmctl.plain_disk import Piece, PlainDisk, TooMuch, raw_pieces
from vmctl.qcow2_writer import CLUSTER
from vmctl.qemu_img_run import Limits, Source

_MOST = 1 << 40
# What qemu-img makes of a raw disk, and how.
FORMS = [
    ("raw", ""),
    ("qcow2", ""),
    ("qcow2", "compat=0.10"),
    ("qcow2", "cluster_size=4k"),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "cluster_size=64k,extended_l2=on"),
    ("vmdk", ""),
    ("vdi", ""),
]


def filled(path: Path, size: int) -> None:
    """A raw disk with content here and there, zeros that are written, and holes, none at a cluster's begin."""
    rng = random.Random(size)
    with path.open("wb") as file:
        file.truncate(size)
        for at in range(0, size, max(CLUSTER, size // 40)):
            file.seek(at + rng.randrange(CLUSTER))
            file.write(rng.choice([rng.randbytes(5000), bytes(200_000), bytes(100_000) + b"x", rng.randbytes(300_000)]))
        file.truncate(size)


def copied(disk: PlainDisk, target: Path) -> str:
    """Copied, and seen by QEMU as sound."""
    told: list[int] = []
    runs = disk.runs(_MOST)
    found = qcow2_stream.write(disk, runs, target, told.append)
    size = target.stat().st_size
    assert size == qcow2_stream.file_size(disk.size, runs) and told == sorted(told)
    assert found == digest.of_file(target)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", target], check=True)
    return found


@pytest.mark.parametrize("size", [CLUSTER // 2, 3 * CLUSTER + 512, (600 << 20) + 1024])
@pytest.mark.parametrize(("form", "options"), FORMS)
def test_a_copy_is_what_qemu_reads(tmp_path: Path, form: str, options: str, size: int) -> None:
    raw, source, target = tmp_path / "raw", tmp_path / "source", tmp_path / "target"
    filled(raw, size)
    more = ["-o", options] if options else []
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, *more, raw, source], check=True)
    handle = os.open(source, os.O_RDONLY)
    try:
        pieces: Sequence[Piece] = raw_pieces(handle, source.stat().st_size)
        if form != "raw":
            extents = qemu_img.plain_extents(Source(handle, form), what="map")
            assert extents is not None
            pieces = [Piece(e.start, e.length, e.offset or 0) for e in extents]
            assert all(e.offset for e in extents)
        copied(PlainDisk(handle, qemu_img.info(source, form).virtual_size, pieces), target)
    finally:
        os.close(handle)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", form, target, source], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, source], check=True)
    # Not more than qemu-img itself would write.
    assert target.stat().st_size <= source.stat().st_size + CLUSTER


def damaged(form: str, data: bytes, rng: random.Random) -> bytes:
    """The image with some entries of its first table of data put out of order, or to places where no data is."""
    made = bytearray(data)
    if form == "qcow2":
        width, order = 8, "big"
        table = int.from_bytes(made[int.from_bytes(made[40:48], "big") :][1:8], "big")  # without the flags
    elif form == "vdi":
        width, order, table = 4, "little", int.from_bytes(made[0x154:0x158], "little")
    else:
        width, order, table = 4, "little", int.from_bytes(made[56:64], "little") * 512
        table = int.from_bytes(made[table : table + 4], "little") * 512
    for _ in range(3):
        at, other = (table + width * rng.randrange(8 if form == "vdi" else 128) for _ in range(2))
        anywhere = rng.randrange(len(made) >> 16) << 16
        values = [made[other : other + width], b"\xff" * width, bytes(width), rng.randbytes(width)]
        values.append((anywhere | 1 << 63 if form == "qcow2" else anywhere >> 9).to_bytes(width, order))  # type: ignore[arg-type]
        made[at : at + width] = rng.choice(values)
    return bytes(made)


@pytest.mark.parametrize("form", ["qcow2", "vmdk", "vdi"])
def test_of_a_damaged_one_no_more_and_nothing_else_than_qemu_reads(tmp_path: Path, form: str) -> None:
    raw, source, copy, target = (tmp_path / name for name in ("raw", "source", "copy", "target"))
    filled(raw, 8 << 20)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, raw, source], check=True)
    sound, rng, compared = source.read_bytes(), random.Random(form), 0
    while compared < 10:
        source.write_bytes(damaged(form, sound, rng))
        with source.open("rb") as file:
            seen = Source(file.fileno(), form)
            if (extents := qemu_img.plain_extents(seen, what="map")) is None:
                continue
            copied(
                PlainDisk(file.fileno(), 8 << 20, [Piece(e.start, e.length, e.offset or 0) for e in extents]), target
            )
            qemu_img.copy(seen, copy, "qcow2", what="copy")
        subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", copy, target], check=True)
        copy.unlink()
        target.unlink()
        compared += 1


def test_what_does_not_lie_plain(tmp_path: Path) -> None:
    raw, source = tmp_path / "raw", tmp_path / "source"
    filled(raw, 1 << 20)
    # QEMU does not say where a VHDX has anything.
    for words in (["-c", "-O", "qcow2"], ["-O", "vmdk", "-o", "subformat=streamOptimized"], ["-O", "vhdx"]):
        subprocess.run(["qemu-img", "convert", "-f", "raw", *words, raw, source], check=True)
        with source.open("rb") as file:
            assert qemu_img.plain_extents(Source(file.fileno(), words[words.index("-O") + 1]), what="x") is None
    with raw.open("rb") as file:  # a part of a file, and no qcow2 at all
        assert qemu_img.plain_extents(Source(file.fileno(), "raw", 512, 512), what="x") is None
        assert qemu_img.plain_extents(Source(file.fileno(), "qcow2"), what="x") is None


def test_pieces_anywhere_in_the_file(tmp_path: Path) -> None:
    """Of any length, in any order, several in a cluster, and beyond the file's end, where QEMU reads zeros."""
    rng = random.Random(5)
    data = rng.randbytes(1 << 20)
    (tmp_path / "file").write_bytes(data)
    pieces, content, at = [], bytearray(), 0
    while at < 4 << 20:
        gap, length = rng.choice([0, 0, 512, 70_000]), rng.choice([512, 4096, 100_000])
        offset = rng.randrange(1 << 20)
        pieces.append(Piece(at + gap, length, offset))
        content += bytes(gap) + data[offset : offset + length].ljust(length, b"\0")
        at += gap + length
    content += bytes(-len(content) % 512)
    (tmp_path / "raw").write_bytes(content)
    with (tmp_path / "file").open("rb") as file:
        disk = PlainDisk(file.fileno(), len(content), pieces)
        copied(disk, tmp_path / "target")
        assert disk.read(12345, 500_000) == content[12345:512345]
    words = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", tmp_path / "target", tmp_path / "raw"]
    assert subprocess.run(words, check=False).returncode == 0


def test_a_sparse_disk_of_terabytes(tmp_path: Path) -> None:
    raw, size = tmp_path / "raw", 3 << 40
    with raw.open("wb") as file:
        file.truncate(size)
        for at in (510, (1 << 40) + 7, size - 3):
            file.seek(at)
            file.write(b"abc")
    with raw.open("rb") as file:
        copied(PlainDisk(file.fileno(), size, raw_pieces(file.fileno(), size)), tmp_path / "target")
    assert (tmp_path / "target").stat().st_size < 2 << 20
    words = ["qemu-io", "-f", "qcow2", "-r", "-c", f"read -P 0x63 {size - 1} 1", tmp_path / "target"]
    assert b"failed" not in subprocess.run(words, check=True, capture_output=True).stdout


def test_more_than_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * CLUSTER)
    with (tmp_path / "file").open("rb") as file:
        pieces = [Piece(n * CLUSTER, CLUSTER, 0) for n in range(99)]
        disk = PlainDisk(file.fileno(), 99 * CLUSTER, pieces)
        assert disk.runs(99 * CLUSTER) == [(0, 99)]
        with pytest.raises(TooMuch):
            disk.runs(98 * CLUSTER)
        # Beyond the file's end nothing is held.
        assert PlainDisk(file.fileno(), 9 * CLUSTER, [Piece(CLUSTER, CLUSTER, CLUSTER)]).runs(CLUSTER) == []
        # One that has grown since its size was seen.
        assert PlainDisk(file.fileno(), CLUSTER + 512, pieces).runs(99 * CLUSTER) == [(0, 2)]


class Failing:
    """Content that cannot be read to its end, or whose reading makes the disk refuse the rest."""

    size = 400 * CLUSTER

    def __init__(self, *, writing: bool) -> None:
        self._writing = writing

    def read_into(self, view: memoryview, at: int) -> None:
        """Fill with something."""
        view[:] = b"x" * len(view)
        if at >= 100 * CLUSTER and self._writing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50 * CLUSTER, resource.RLIM_INFINITY))
        elif at >= 100 * CLUSTER:
            raise OSError(5, "Input/output error")


@pytest.mark.parametrize("writing", [True, False])
def test_what_fails_ends_it(tmp_path: Path, writing: bool) -> None:
    before, limit = threading.active_count(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large" if writing else "Input/output"):
            qcow2_stream.write(Failing(writing=writing), [(0, 400)], tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert threading.active_count() == before
    with (tmp_path / "target").open("rb") as file:
        assert file.read(4) == bytes(4), "it looks whole"


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(wall_s=0.0), "did not end in 0 s"),
        (Limits(cpu_s=1), "more than 1 s of CPU time"),
        (Limits(file_size=1 << 20, allowed="allowed"), "more than the 1 MiB allowed"),
    ],
)
def test_qemu_img_is_held_to_its_limits(tmp_path: Path, limits: Limits, said: str) -> None:
    """Whatever it is given to read: a file of unknown origin may be made so that a copy of it has no end."""
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(96 << 20))
    handle = os.open(source, os.O_RDONLY)
    try:
        with pytest.raises(ImageError, match=f"cannot import it: .*{said}"):
            qemu_img.copy(
                Source(handle, "raw"),
                tmp_path / "target",
                "qcow2",
                what="import it",
                compress=True,
                limits=limits,
            )
    finally:
        os.close(handle)
    assert subprocess.run(["pgrep", "-f", str(tmp_path)]).returncode == 1, "it goes on"


def test_the_copy_of_our_own_ends_in_time_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    filled(source, 40 << 20)
    wish, handle = image_import.Wish(source), os.open(source, os.O_RDONLY)
    header, late = DiskHeader("raw", 40 << 20), Limits(wall_s=-1.0, file_size=1 << 40)
    try:
        with pytest.raises(ImageError, match="the copy did not end in"):
            image_import._copied(Source(handle, "raw"), header, tmp_path, wish, late, silent)
    finally:
        os.close(handle)
