"""Disk image headers: what real qemu-img makes is read as it is; what is hostile is refused, and quickly."""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmctl import disk_header
from vmctl.disk_header import DiskHeader, Window
from vmctl.disk_header.vhdx import crc32c
from vmctl.errors import ImageError

SIZE = 8 << 20
REAL = {
    "qcow2": ("qcow2", ""),
    "qcow2-v2": ("qcow2", "compat=0.10"),
    "qcow2-wide": ("qcow2", "extended_l2=on"),
    "qcow2-zstd": ("qcow2", "compression_type=zstd"),
    "qcow2-small-clusters": ("qcow2", "cluster_size=512"),
    "vmdk": ("vmdk", ""),
    "vmdk-streamed": ("vmdk", "subformat=streamOptimized"),
    "vdi": ("vdi", ""),
    "vdi-static": ("vdi", "static=on"),
    "vhdx": ("vhdx", ""),
    "vhdx-fixed": ("vhdx", "subformat=fixed"),
    "raw": ("raw", ""),
}


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def corpus() -> Iterator[dict[str, Path]]:
    """A disk with a partition table and some content, in every form."""
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk"
        data = bytearray(os.urandom(1 << 20))
        data[510:512] = b"\x55\xaa"
        disk.write_bytes(data)
        os.truncate(disk, SIZE)
        made = {}
        for name, (form, options) in REAL.items():
            made[name] = Path(folder) / f"{name}.img"
            qemu_img("convert", "-f", "raw", "-O", form, *(["-o", options] if options else []), disk, made[name])
        yield made


def check(path: Path, asked: str = "", **limits: int) -> DiskHeader:
    handle = os.open(path, os.O_RDONLY)
    try:
        return disk_header.check(Window(handle, os.fstat(handle).st_size), what="try it", asked=asked, **limits)
    finally:
        os.close(handle)


def changed(path: Path, tmp_path: Path, *changes: tuple[int, bytes]) -> Path:
    """A copy with some bytes put in."""
    data = bytearray(path.read_bytes())
    for at, new in changes:
        data[at : at + len(new)] = new
    copy = tmp_path / f"changed-{path.name}"
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize("name", REAL)
def test_what_qemu_img_makes_is_taken(corpus: dict[str, Path], name: str) -> None:
    found = check(corpus[name])
    assert (found.format, found.virtual_size) == (REAL[name][0], SIZE)
    assert check(corpus[name], REAL[name][0]) == found


@pytest.mark.parametrize("name", [name for name in REAL if REAL[name][0] in {"qcow2", "vmdk"}])
def test_content_beyond_the_end_of_the_file_is_missed(tmp_path: Path, name: str) -> None:
    """QEMU reads it as zeros and says nothing, wherever the file was cut."""
    form, options = REAL[name]
    disk, whole, cut = tmp_path / "disk", tmp_path / "whole", tmp_path / "cut"
    disk.write_bytes(b"".join(os.urandom(60_000) + bytes(71_072) for _ in range(8)))  # some fits packed, some not
    for packed in ([], ["-c"]) if form == "qcow2" else ([],):
        words = [*(["-o", options] if options else []), *packed]
        qemu_img("convert", "-f", "raw", "-O", form, *words, disk, whole)
        data = whole.read_bytes()
        check_whole(whole)
        # A packed grain that lacks its end QEMU itself refuses.
        for length in ([] if name == "vmdk-streamed" else [len(data) - 1537]) + [len(data) * 3 // 4, len(data) // 2]:
            cut.write_bytes(data[:length])
            with pytest.raises(ImageError, match="cut short"):
                check_whole(cut)


def check_whole(path: Path) -> None:
    """Both checks, as an import does them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        window = Window(handle, os.fstat(handle).st_size)
        disk_header.check_whole(window, disk_header.check(window, what="try it"), what="try it")
    finally:
        os.close(handle)


def test_a_backing_file_is_refused_and_named(corpus: dict[str, Path], tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-b", corpus["raw"], "-F", "raw", tmp_path / "o.qcow2")
    with pytest.raises(ImageError, match=f"has a backing file .{corpus['raw']}"):
        check(tmp_path / "o.qcow2")


@pytest.mark.parametrize("raw", ["on", "off"])
def test_a_data_file_is_refused(tmp_path: Path, raw: str) -> None:
    options = f"data_file={tmp_path / 'data'},data_file_raw={raw}"
    qemu_img("create", "-f", "qcow2", "-o", options, tmp_path / "d.qcow2", "1M")
    with pytest.raises(ImageError, match=r"in an external data file; it names an external data file"):
        check(tmp_path / "d.qcow2")


def test_encryption_is_refused(tmp_path: Path) -> None:
    # The older of qcow2's two ciphers: it derives no key by the clock, which qemu-img refuses on a busy machine.
    words = ["--object", "secret,id=s,data=x", "-o", "encrypt.format=aes,encrypt.key-secret=s"]
    qemu_img("create", "-f", "qcow2", *words, tmp_path / "e.qcow2", "1M")
    with pytest.raises(ImageError, match="encrypted"):
        check(tmp_path / "e.qcow2")


def test_encryption_that_is_told_twice_is_said_once(tmp_path: Path) -> None:
    """LUKS: the header has a number for it, and an extension."""
    disk = tmp_path / "e.qcow2"
    qemu_img("create", "-f", "qcow2", disk, "1M")
    with disk.open("r+b") as file:
        for at, words in ((32, struct.pack(">I", 2)), (112, struct.pack(">IIQQQ", 0x0537BE77, 16, 0, 0, 0))):
            file.seek(at)
            file.write(words)
    with pytest.raises(ImageError, match=": it is encrypted$"):
        check(disk)


@pytest.mark.parametrize(
    ("at", "new", "reason"),
    [
        (72, struct.pack(">Q", 1), "marked dirty"),
        (72, struct.pack(">Q", 2), "marked corrupt"),
        (72, struct.pack(">Q", 4), "external data file"),
        (72, struct.pack(">Q", 1 << 40), "features that vmctl does not know"),
        (4, struct.pack(">I", 4), "version 4"),
        (20, struct.pack(">I", 63), "cluster size"),
        (24, struct.pack(">Q", 1 << 60), "L1 table is absurdly long"),
        (24, struct.pack(">Q", 3 << 40), "above the limit"),
        (32, struct.pack(">I", 1), "encrypted"),
        (36, struct.pack(">I", 0), "L1 table is too short"),
        (36, struct.pack(">I", 1 << 30), "L1 table is absurdly long"),
        (40, struct.pack(">Q", 1 << 40), "L1 table lies beyond"),
        (48, struct.pack(">Q", 1 << 40), "refcount table lies beyond"),
        (60, struct.pack(">I", 1 << 31), "snapshot table"),
        (100, struct.pack(">I", 1 << 20), "header is"),
        (112, struct.pack(">II", 0x44415441, 4), "names an external data file"),
        (112, struct.pack(">II", 0x12345678, 1 << 31), "runs beyond"),
        (24, struct.pack(">Q", 0), "it is empty"),
    ],
)
def test_a_changed_qcow2_header_is_refused(
    corpus: dict[str, Path], tmp_path: Path, at: int, new: bytes, reason: str
) -> None:
    with pytest.raises(ImageError, match=reason):
        check(changed(corpus["qcow2"], tmp_path, (at, new)), most_bytes=2 << 40)


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
def test_a_vmdk_of_several_files_is_refused(tmp_path: Path, subformat: str) -> None:
    qemu_img("create", "-f", "vmdk", "-o", f"subformat={subformat}", tmp_path / "v.vmdk", "1M")
    with pytest.raises(ImageError, match="data in other files .v-"):
        check(tmp_path / "v.vmdk")


@pytest.mark.parametrize(
    ("line", "other", "reason"),
    [
        (b'SPARSE "vmdk.img"', b'FLAT "/etc/s" 0\n#', "not one sparse extent"),
        (b'createType="monolithicSparse"', b'createType="vmfs"'.ljust(29), "of type vmfs"),
        (b"parentCID=ffffffff", b"parentCID=12345678", "differencing"),
        (b"# Extent description", b'parentFileNameHint="', "parent"),
        (b'"vmdk.img"', b'"/dev/sda"', "a path"),
    ],
)
def test_a_changed_vmdk_descriptor_is_refused(
    corpus: dict[str, Path], tmp_path: Path, line: bytes, other: bytes, reason: str
) -> None:
    at = corpus["vmdk"].read_bytes().index(line)
    with pytest.raises(ImageError, match=reason):
        check(changed(corpus["vmdk"], tmp_path, (at, other)))


def test_a_vmdk_header_that_hands_over_to_its_descriptor_is_refused(corpus: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="other files"):
        check(changed(corpus["vmdk"], tmp_path, (12, bytes(8))))


def test_a_parent_named_where_qemu_looks_and_the_header_does_not_point(corpus: dict[str, Path], tmp_path: Path) -> None:
    data = corpus["vmdk"].read_bytes()
    text = data[512 : 512 + 20 * 512]
    moved = changed(corpus["vmdk"], tmp_path, (28, struct.pack("<Q", len(data) // 512)), (600, b"parentFileNameHint"))
    with moved.open("ab") as file:
        file.write(text)
    with pytest.raises(ImageError, match="names a parent disk"):
        check(moved)


def test_a_streamed_vmdk_repeats_its_header_at_its_end(corpus: dict[str, Path], tmp_path: Path) -> None:
    """As VMware writes them: the directory's place stands in the footer alone. qemu-img reads it too."""
    header = corpus["vmdk-streamed"].read_bytes()[:512]
    marker = struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
    streamed = changed(corpus["vmdk-streamed"], tmp_path, (56, b"\xff" * 8))
    whole = streamed.read_bytes() + marker + header + bytes(512)
    streamed.write_bytes(whole)
    assert check(streamed).virtual_size == SIZE
    qemu_img("compare", "-f", "vmdk", "-F", "raw", streamed, corpus["raw"])
    lies = changed(streamed, tmp_path, (len(whole) - 1024 + 12, bytes(8)))
    with pytest.raises(ImageError, match="do not agree"):
        check(lies)
    lies.write_bytes(whole[:-512])
    with pytest.raises(ImageError, match="cut short"):
        check(lies)


@pytest.mark.parametrize(
    ("at", "new", "reason"),
    [
        (0x4C, struct.pack("<I", 4), "differencing"),
        (0x4C, struct.pack("<I", 3), "undo"),
        (0x1A8, b"x" * 16, "parent"),
        (0x170, struct.pack("<Q", 1 << 50), "does not fit its size"),
        (0x154, struct.pack("<I", 0xFFFFFE00), "beyond the file"),
    ],
)
def test_a_changed_vdi_header_is_refused(
    corpus: dict[str, Path], tmp_path: Path, at: int, new: bytes, reason: str
) -> None:
    with pytest.raises(ImageError, match=reason):
        check(changed(corpus["vdi"], tmp_path, (at, new)))


def test_a_vhdx_with_a_log_to_replay_or_a_parent_is_refused(corpus: dict[str, Path], tmp_path: Path) -> None:
    data = corpus["vhdx"].read_bytes()
    changes = []
    for at in (64 << 10, 128 << 10):
        header = bytearray(data[at : at + 4096])
        header[48:64] = b"l" * 16
        header[4:8] = bytes(4)
        header[4:8] = struct.pack("<I", crc32c(bytes(header)))
        changes.append((at, bytes(header)))
    with pytest.raises(ImageError, match="its log has writes"):
        check(changed(corpus["vhdx"], tmp_path, *changes))
    parameters = data.index(struct.pack("<II", 8 << 20, 0), 1 << 20)
    with pytest.raises(ImageError, match="differencing"):
        check(changed(corpus["vhdx"], tmp_path, (parameters + 4, struct.pack("<I", 2))))
    with pytest.raises(ImageError, match="neither of its headers"):
        check(changed(corpus["vhdx"], tmp_path, (64 << 10, bytes(4096)), (128 << 10, bytes(4096))))


def test_raw_is_raw_when_it_looks_so_or_is_asked_for(corpus: dict[str, Path], tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.write_bytes(b"hello" * 1000)
    with pytest.raises(ImageError, match="no disk image that vmctl knows"):
        check(nothing)
    assert check(nothing, "raw").virtual_size == 5120
    with pytest.raises(ImageError, match="it is qcow2, not vmdk"):
        check(corpus["qcow2"], "vmdk")
    with pytest.raises(ImageError, match="empty"):
        (tmp_path / "none").touch()
        check(tmp_path / "none", "raw")


@pytest.mark.parametrize(
    ("head", "reason"), [(b"QED\0", "QED"), (b"conectix", "VHD"), (b"\xfd7zXZ\0", "xz"), (b"COWD", "VMFS")]
)
def test_other_formats_are_named_even_with_a_partition_table(tmp_path: Path, head: bytes, reason: str) -> None:
    file = tmp_path / "other"
    file.write_bytes(head.ljust(510, b"\0") + b"\x55\xaa" + bytes(4096))
    with pytest.raises(ImageError, match=reason):
        check(file)


@settings(
    max_examples=400,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_no_damage_does_more_than_an_image_error(corpus: dict[str, Path], data: st.DataObject) -> None:
    """Cut short or with bits turned where headers are, an image is refused or read, within the deadline."""
    name = data.draw(st.sampled_from([name for name in REAL if name != "raw"]))
    whole = corpus[name].read_bytes()
    bits = data.draw(st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 7)), max_size=6))
    far = [] if not name.startswith("vhdx") else [64 << 10, 128 << 10, 192 << 10, 256 << 10, 2 << 20]
    base = data.draw(st.sampled_from([0, *far]))
    damaged = bytearray(whole)
    for at, bit in bits:
        damaged[base + at] ^= 1 << bit
    cut = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole)), st.integers(0, 2048)))
    with tempfile.TemporaryFile() as file:
        file.write(damaged[:cut])
        file.flush()
        try:
            window = Window(file.fileno(), cut)
            found = disk_header.check(window, what="try it")
            disk_header.check_whole(window, found, what="try it")
        except ImageError:
            return
        assert 0 < found.virtual_size <= 2 << 40
