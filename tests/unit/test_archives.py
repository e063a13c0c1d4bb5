"""Archives of unknown origin: what is taken from them, and what ends the reading of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmctl import archives, ovf
from vmctl.archives import Enclosed
from vmctl.errors import ImageError

MOST = 1 << 30
DISK = bytes(range(256)) * 2048
METADATA = json.dumps({"provider": "libvirt", "format": "qcow2", "virtual_size": 1}).encode()


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    one = tarfile.TarInfo(name)
    one.size, one.type, one.linkname = len(data), kind, link
    return one, data


def tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w", form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, mode, format=form) as archive:  # type: ignore[call-overload]
        for one, data in members:
            archive.addfile(one, io.BytesIO(data))
    return path


def box(path: Path, *more: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    return tar(path, member("./metadata.json", METADATA), *more, member("./box.img", DISK), mode=mode)


def ova(
    path: Path, *more: tuple[tarfile.TarInfo, bytes], disk: bytes = DISK, sums: dict[str, str] | None = None
) -> Path:
    text = ovf.write("m", "d.vmdk", virtual_size=1 << 20, file_size=len(DISK))
    told = {"m.ovf": hashlib.sha256(text).hexdigest(), "d.vmdk": hashlib.sha256(DISK).hexdigest()} | (sums or {})
    return tar(path, member("m.ovf", text), member("m.mf", ovf.write_checksums(told)), *more, member("d.vmdk", disk))


def taken(path: Path, folder: Path, most_bytes: int = MOST) -> Enclosed:
    folder.mkdir(exist_ok=True)
    with path.open("rb") as file:
        assert archives.is_archive(file)
        return archives.open_disk(file, path, folder, what="import it", most_bytes=most_bytes)


def content(disk: Enclosed) -> bytes:
    with disk.path.open("rb") as file:
        file.seek(disk.start)
        return file.read(disk.size)


def test_a_packed_disk_is_told_from_a_broken_archive(tmp_path: Path) -> None:
    packed, broken = tmp_path / "a.img.gz", tmp_path / "a.ova"
    packed.write_bytes(gzip.compress(DISK))
    with pytest.raises(ImageError, match="no tar archive") as refused:
        taken(packed, tmp_path / "out")
    assert "gzip -d" in refused.value.hint
    broken.write_bytes(b"x" * 257 + b"ustar" + b"x" * 250)
    with pytest.raises(ImageError, match="no tar archive") as refused:
        taken(broken, tmp_path / "out")
    assert refused.value.hint == ""


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_box(tmp_path: Path, mode: str) -> None:
    disk = taken(box(tmp_path / "a.box", member("Vagrantfile", b"x"), mode=mode), tmp_path / "out")
    assert content(disk) == DISK and (disk.kind, disk.format) == ("box", "qcow2")
    assert [p.name for p in (tmp_path / "out").iterdir()] == (["enclosed"] if mode == "w:gz" else [])


def test_a_box_of_the_second_layout(tmp_path: Path) -> None:
    data = json.dumps({"provider": "libvirt", "disks": [{"path": "box_0.img", "format": "qcow2"}]}).encode()
    made = tar(tmp_path / "a.box", member("box_0.img", DISK), member("metadata.json", data), mode="w:gz")
    assert content(taken(made, tmp_path / "out")) == DISK


def test_a_sparse_box_as_vagrant_libvirts_own_script_packs_it(tmp_path: Path) -> None:
    with (tmp_path / "box.img").open("wb") as file:
        for at in range(40):
            file.seek(at << 20)
            file.write(b"piece %d" % at)
        file.truncate(64 << 20)
    (tmp_path / "metadata.json").write_bytes(METADATA)
    command = ["tar", "-C", tmp_path, "-cSzf", tmp_path / "a.box", "./metadata.json", "./box.img"]
    subprocess.run(command, check=True, timeout=60)
    assert (tmp_path / "a.box").stat().st_size < 1 << 20
    disk = taken(tmp_path / "a.box", tmp_path / "out")
    assert content(disk) == (tmp_path / "box.img").read_bytes()
    assert disk.path.stat().st_blocks * 512 < 2 << 20


def test_an_ova(tmp_path: Path) -> None:
    disk = taken(ova(tmp_path / "a.ova"), tmp_path / "out")
    assert content(disk) == DISK and disk.checked and disk.start > 0 and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_dialect_of_tar(tmp_path: Path, form: int) -> None:
    long = "d/" * 60 + "Vagrantfile"
    made = tar(
        tmp_path / "a.box", member("metadata.json", METADATA), member(long, b"x"), member("box.img", DISK), form=form
    )
    assert content(taken(made, tmp_path / "out")) == DISK


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (member("../escape", b"x"), "outside its folder"),
        (member("/etc/escape", b"x"), "outside its folder"),
        (member("a/../../escape", b"x"), "outside its folder"),
        (member("a\\..\\escape", b"x"), "outside its folder"),
        (member("link", b"", tarfile.SYMTYPE, "/etc/shadow"), "symbolic link"),
        (member("link", b"", tarfile.LNKTYPE, "/etc/shadow"), "hard link"),
        (member("node", b"", tarfile.CHRTYPE), "device"),
        (member("node", b"", tarfile.BLKTYPE), "device"),
        (member("pipe", b"", tarfile.FIFOTYPE), "named pipe"),
        (member("box.img", b"other"), "two members called box.img"),
        (member("./d.vmdk", b"other"), "two members called d.vmdk"),
        (member("x" * 300 + "/../../escape", b"x"), "outside its folder"),
    ],
)
@pytest.mark.parametrize("kind", ["box", "ova"])
def test_bad_members_end_it(tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes], reason: str, kind: str) -> None:
    wrong = {"box": "d.vmdk", "ova": "box.img"}[kind]
    made = box(tmp_path / "a", bad) if kind == "box" else ova(tmp_path / "a", bad)
    if bad[0].name.removeprefix("./") == wrong:
        assert content(taken(made, tmp_path / "out")) == DISK  # a name that means nothing here
        return
    with pytest.raises(ImageError, match=reason):
        taken(made, tmp_path / "out")


def test_a_symbolic_link_in_the_disks_place(tmp_path: Path) -> None:
    made = tar(
        tmp_path / "a", member("metadata.json", METADATA), member("box.img", b"", tarfile.SYMTYPE, "/etc/shadow")
    )
    with pytest.raises(ImageError, match="symbolic link"):
        taken(made, tmp_path / "out")


def test_too_many_members_end_it(tmp_path: Path) -> None:
    made = box(tmp_path / "a", *(member(f"m{n}", b"") for n in range(100)))
    with pytest.raises(ImageError, match="more than 64 members"):
        taken(made, tmp_path / "out")


def test_a_bomb_ends_early(tmp_path: Path) -> None:
    """Four gigabytes of zeros in 4 MB: it ends by its ratio, and by what may be unpacked at all."""
    one, _ = member("box.img")
    one.size = 4 << 30
    with gzip.open(tmp_path / "a", "wb", compresslevel=1) as file:
        first, data = member("metadata.json", METADATA)
        file.write(first.tobuf() + data + bytes(-len(data) % 512) + one.tobuf())
        for _ in range(512):
            file.write(bytes(1 << 20))
    with pytest.raises(ImageError, match="more than 100 times its size"):
        taken(tmp_path / "a", tmp_path / "out", most_bytes=8 << 30)
    assert (tmp_path / "out/enclosed").stat().st_size <= 260 << 20
    (tmp_path / "out/enclosed").unlink()
    with pytest.raises(ImageError, match="holds more than 100 MiB"):
        taken(tmp_path / "a", tmp_path / "out", most_bytes=100 << 20)
    assert not list((tmp_path / "out").iterdir())


def test_a_long_name_record_is_not_read_into_memory(tmp_path: Path) -> None:
    one, _ = member("long", kind=tarfile.GNUTYPE_LONGNAME)
    one.size = 3 << 30
    (tmp_path / "a").write_bytes(one.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
    with pytest.raises(ImageError, match="absurdly long name"):
        taken(tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"provider": "virtualbox"}, "for virtualbox, not for libvirt"),
        ({"provider": "libvirt", "disks": [{"path": "a"}, {"path": "b"}]}, "2 disks"),
        ({"provider": "libvirt", "disks": [{"path": "../../etc/shadow"}]}, "is not in it"),
        ({"provider": "libvirt", "disks": 7}, "not a Vagrant box's"),
        ([1], "not a Vagrant box's"),
        ({"provider": []}, "for \\[\\], not for libvirt"),
        ({"provider": "libvirt", "format": "nbd"}, "unknown format 'nbd'"),
    ],
)
def test_what_a_box_says_of_itself(tmp_path: Path, data: object, reason: str) -> None:
    made = tar(tmp_path / "a", member("metadata.json", json.dumps(data).encode()), member("box.img", DISK))
    with pytest.raises(ImageError, match=reason):
        taken(made, tmp_path / "out")


def test_an_ova_that_is_not_what_its_sums_say(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"checksum of d.vmdk is not"):
        taken(ova(tmp_path / "a", disk=DISK[:-1] + b"!"), tmp_path / "out")
    with pytest.raises(ImageError, match=r"checksum of m.ovf is not"):
        taken(ova(tmp_path / "b", sums={"m.ovf": "0" * 64}), tmp_path / "out")


BOMB = b"""<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><x>&b;</x>"""


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        BOMB.replace(b"<!DOCTYPE x [", b'<!DOCTYPE x SYSTEM "file:///etc/passwd" ['),
        BOMB.decode().encode("utf-16"),
        BOMB.replace(b'"1.0"', b'"1.0" encoding="cp037"'),
        b"<x>" * 50000,
        b"\xff\xfe\x00",
        b"",
    ],
)
def test_a_descriptor_declares_no_entities(text: bytes) -> None:
    with pytest.raises(ovf.BadDescriptor):
        ovf.read(text)


def test_a_descriptor_of_ours_is_read_back() -> None:
    text = ovf.write('a "name" <&>', "disk & co.vmdk", virtual_size=1, file_size=2)
    assert ovf.read(text) == ovf.Descriptor("disk & co.vmdk", 'a "name" <&>')


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_does_more_than_an_image_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damage")
    kind = data.draw(st.sampled_from(["ova", "box", "gz"]))
    made = ova(folder / "a") if kind == "ova" else box(folder / "a", mode="w:gz" if kind == "gz" else "w")
    damaged = bytearray(made.read_bytes())
    for at, bit in data.draw(st.lists(st.tuples(st.integers(2, 4000), st.integers(0, 7)), max_size=5)):
        damaged[at % len(damaged)] ^= 1 << bit
    cut = data.draw(st.one_of(st.just(len(damaged)), st.integers(600, len(damaged))))
    made.write_bytes(damaged[:cut])
    with made.open("rb") as file:
        try:
            archives.open_disk(file, made, folder, what="import it", most_bytes=MOST)
        except ImageError:
            return
