"""What a Debian disk is put together from: partition table, GRUB's first sectors, the tree of a system."""

from __future__ import annotations

import io
import lzma
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from vmctl.builder import bootstrap, debian, disk, ext4, kernel, rootfs
from vmctl.builder.recipe import kind
from vmctl.builder.tools import running
from vmctl.errors import ImageError
from vmctl.resources import image_recipes_dir

RECIPES = image_recipes_dir()


def test_every_recipe_names_its_builder_and_the_debian_one_is_whole() -> None:
    assert {kind(RECIPES / name / "recipe.toml") for name in ("micro", "debian-12")} == {"micro", "debian"}
    recipe = debian.load(RECIPES / "debian-12" / "recipe.toml")
    assert "root=/dev/vda1" in recipe.cmdline.split()
    assert {"cloud-init", "openssh-server", "qemu-guest-agent"} <= set(recipe.packages)


def test_a_recipe_with_a_gap_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('kind = "debian"\n[image]\nos_name = "x"\n')
    with pytest.raises(ImageError, match="cannot read recipe"):
        debian.load(tmp_path / "recipe.toml")


def test_partitions_follow_each_other_and_leave_room_for_the_second_table() -> None:
    layout = disk.Layout(4096)
    ends = [part.start_mib + part.size_mib for part in (layout.bios, layout.esp, layout.root)]
    assert [layout.bios.start_mib, *ends] == [1, layout.esp.start_mib, layout.root.start_mib, 4095]
    assert layout.table("a") == layout.table("a") != layout.table("b")


def test_grub_is_told_where_its_core_is() -> None:
    boot = bytes(510) + b"\x55\xaa"
    first, core = disk.grub_sectors(boot, b"c" * 1300, start=2048)
    assert struct.unpack_from("<Q", first, 0x5C) == (2048,)
    assert len(core) == 1536
    assert struct.unpack_from("<QHH", core, 500) == (2049, 2, 0x820)


def test_what_is_no_grub_is_refused() -> None:
    with pytest.raises(ImageError, match="cannot install GRUB"):
        disk.grub_sectors(bytes(512), b"c" * 1300, start=2048)


def test_a_kernel_packed_with_xz_is_unpacked() -> None:
    elf = b"\x7fELF" + bytes(5000)
    payload = lzma.compress(elf) + struct.pack("<I", len(elf))
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 0, len(payload))
    assert kernel.unpack(bytes(head) + payload) == elf


def test_modules_are_loaded_after_what_they_need() -> None:
    listed = "k/ext4.ko: k/jbd2.ko k/crc16.ko\nk/jbd2.ko: k/crc16.ko\nk/crc16.ko:\nk/virtio-blk.ko:\n"
    assert kernel.load_order(listed, ["virtio_blk", "ext4"]) == [
        "k/virtio-blk.ko", "k/crc16.ko", "k/jbd2.ko", "k/ext4.ko",
    ]  # fmt: skip
    with pytest.raises(ImageError, match="no module floppy"):
        kernel.load_order(listed, ["floppy"])


def _archive(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, data: bytes = b"", **fields: object) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in fields.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))

        add("./etc", type=tarfile.DIRTYPE, mode=0o755, mtime=5)
        add("./etc/machine-id", b"secret")
        add("./etc/.resolv.conf.systemd-resolved.bak", b"nameserver 10.0.0.1")
        add("./etc/ssh/ssh_host_rsa_key", b"secret")
        add("./dev/null", type=tarfile.CHRTYPE)
        add("./var/log/apt/term.log", b"today")
        add("./var/log/wtmp", b"today")
        add("./usr/bin/z", b"twice", mode=0o4755, uid=0, gid=8, mtime=7)
        add("./usr/bin/a", type=tarfile.LNKTYPE, linkname="./usr/bin/z", mode=0o4755)
        add("./usr/bin/ping", b"p", mode=0o755, pax_headers={"SCHILY.xattr.security.capability": "\x01\x02"})


def test_a_system_loses_what_belongs_to_one_machine(tmp_path: Path) -> None:
    _archive(tmp_path / "a.tar")
    tree = rootfs.read(tmp_path / "a.tar", tmp_path)
    assert set(tree.entries) >= {"etc", "usr/bin/a", "usr/bin/z", "var/log/wtmp"}
    assert not {"etc/machine-id", "etc/ssh/ssh_host_rsa_key", "dev/null", "var/log/apt/term.log"} & set(tree.entries)
    assert not any("resolv.conf" in path for path in tree.entries), "the name servers of who built it"
    assert tree["var/log/wtmp"].source is None
    assert tree["usr/bin/z"].same_as == "usr/bin/a"


def test_owners_links_times_and_attributes_arrive_in_the_file_system(tmp_path: Path) -> None:
    _archive(tmp_path / "a.tar")
    tree = rootfs.read(tmp_path / "a.tar", tmp_path)
    made = []
    for name in ("one", "two"):
        image = tmp_path / name
        ext4.make(tree, image, ext4.Shape("t", 16, journal_mib=4, lazy=False), epoch=1000)
        made.append(image.read_bytes())
    assert made[0] == made[1]
    asked = "stat /usr/bin/a\nstat /usr/bin/z\nea_get /usr/bin/ping security.capability\n"
    command = ["/sbin/debugfs", "-f", "-", str(tmp_path / "one")]
    said = subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout
    assert said.count("Mode:  04755") == 2
    assert said.count("Links: 2") == 2
    assert "Group:     8" in said
    assert "mtime: 0x00000007" in said
    assert "01 02" in said or "\\001\\002" in said


def test_the_newest_package_dates_the_image(tmp_path: Path) -> None:
    for name, built in (("a", 100), ("b", 300), ("c", 200)):
        (tmp_path / name).write_bytes(b"!<arch>\n" + b"debian-binary   " + f"{built:<12}".encode() + b"0     0     ")
    assert bootstrap.built_at([tmp_path / name for name in "abc"]) == 300
    (tmp_path / "d").write_bytes(b"no archive at all, but long enough to hold a header")
    with pytest.raises(ImageError, match="no Debian package"):
        bootstrap.built_at([tmp_path / "d"])


def test_a_program_that_is_left_early_is_ended(tmp_path: Path) -> None:
    mark = tmp_path / "ended"
    lines = running(["sh", "-c", f"trap 'touch {mark}; exit' INT; echo up; sleep 60 & wait"], what="try", timeout_s=60)
    assert next(lines) == "up\n"
    lines.close()  # type: ignore[attr-defined]
    assert mark.exists()


def test_a_program_that_fails_tells_its_last_words() -> None:
    with pytest.raises(ImageError, match="cannot try: sh: no luck"):
        list(running(["sh", "-c", "echo no luck; exit 3"], what="try", timeout_s=60))
