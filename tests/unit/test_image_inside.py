"""Whom an image lets in: by its own files, read off file systems that mke2fs made, and by what it is called."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmctl import catalog, default_users, image_inside
from vmctl.default_users import Inside
from vmctl.ext_files import Ext, Unreadable

RELEASE = 'NAME="Debian GNU/Linux"\nID=debian\nVERSION_ID="12"\n'
CLOUD = """# The top level settings are used as module
users:
   - default
system_info:
   distro: debian
   # Default user name
   default_user:
     lock_passwd: True
     gecos: Debian

     name: tester   # and no other
     shell: /bin/bash
   package_mirrors: []
"""


def tree(folder: Path, *, cloud: str = CLOUD, release: str = RELEASE) -> Path:
    """A guest's root folder, with the link that Debian has and many names beside it."""
    for sub in ("etc/cloud", "usr/lib", "var"):
        (folder / sub).mkdir(parents=True)
    (folder / "etc/os-release").symlink_to("../usr/lib/os-release")
    (folder / "usr/lib/os-release").write_text(release)
    for i in range(400):
        (folder / f"etc/a-name-that-takes-some-room-{i:04}").write_bytes(b"")
    if cloud:
        (folder / "etc/cloud/cloud.cfg").write_text("#" * 70_000 + "\n" + cloud)
    return folder


def made(path: Path, folder: Path, *words: str, size: str = "32M", offset: int = 0) -> bytes:
    """An ext file system with the folder in it."""
    path.unlink(missing_ok=True)
    subprocess.run(
        ["mke2fs", "-q", "-F", *words, "-d", str(folder), "-E", f"offset={offset}", str(path), size],
        check=True,
        timeout=60,
    )
    return path.read_bytes()


def reading(data: bytes) -> image_inside.Read:
    """What reads the bytes."""

    def read(offset: int, count: int) -> bytes:
        if offset < 0 or offset + count > len(data):
            raise Unreadable("it ends before that")
        return data[offset : offset + count]

    return read


@pytest.mark.parametrize(
    "words",
    [
        ("-t", "ext4"),
        ("-t", "ext4", "-b", "1024"),
        ("-t", "ext4", "-O", "64bit,metadata_csum", "-I", "512"),
        ("-t", "ext3"),
        ("-t", "ext2", "-b", "1024"),
        ("-t", "ext2", "-b", "4096"),
    ],
    ids=" ".join,
)
def test_files_are_read_off_each_kind_of_ext(tmp_path: Path, words: tuple[str, ...]) -> None:
    folder = tree(tmp_path / "root")
    (folder / "etc/round").symlink_to("/etc/again")
    (folder / "etc/again").symlink_to("round")
    (folder / "etc/long").symlink_to("/./" + "usr/../" * 20 + "usr/lib/os-release")
    files = Ext(reading(made(tmp_path / "disk", folder, *words)))
    assert files.content("etc/os-release") == RELEASE.encode()
    assert files.content("/etc/long") == RELEASE.encode()
    assert files.content("etc/cloud/cloud.cfg") == (folder / "etc/cloud/cloud.cfg").read_bytes()
    assert files.content("etc/none") is None and files.content("etc") is None
    assert files.content("../../etc/os-release") == RELEASE.encode()
    with pytest.raises(Unreadable, match="circle"):
        files.content("etc/round")
    with pytest.raises(Unreadable, match="absurdly long"):
        files.content("etc/cloud/cloud.cfg", most_bytes=1000)


@pytest.mark.parametrize("label", ["", "dos", "gpt"])
def test_the_partition_with_the_system_is_found(tmp_path: Path, label: str) -> None:
    disk, start = tmp_path / "disk", 0
    if label:
        start = 12 << 20
        disk.touch()
        os.truncate(disk, 64 << 20)
        table = f"label: {label}\nstart=1MiB, size=8MiB\nstart=12MiB, size=40MiB\n"
        subprocess.run(["sfdisk", "-q", str(disk)], input=table, text=True, check=True, timeout=60)
        head = disk.read_bytes()
        data = made(tmp_path / "fs", tree(tmp_path / "root"))
        data = head[:start] + data + head[start + len(data) :]
    else:
        data = made(disk, tree(tmp_path / "root"))
    found = image_inside.look_by(reading(data))
    assert found is not None and (found.system, found.version, found.seeded) == ("debian", "12", True)
    assert default_users.of_cloud_cfg(found.cloud_cfg) == "tester"


STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u14
Description: of no
 Version: 0

Package: gone
Status: deinstall ok config-files
Version: 1

Package: zstd
Status: install ok installed
Version: 1:1.5~rc2
"""


@pytest.mark.parametrize(
    ("path", "text", "software"),
    [
        ("var/lib/dpkg/status", STATUS, {"libc6": "2.36-9+deb12u14", "zstd": "1:1.5~rc2"}),
        ("usr/lib/apk/db/installed", "C:Q1\nP:musl\nV:1.2-r9\n\nP:zlib\nV:1.3\n", {"musl": "1.2-r9", "zlib": "1.3"}),
        ("var/lib/dpkg/status", "Package: a\x1b[31m\nVersion: 1\n\nPackage: b\n\nVersion: 3\n", {}),
        ("var/lib/dpkg/status", STATUS + "\n" * (9 << 20), {}),
        ("var/lib/dpkg/status", "".join(f"Package: p{i}\nVersion: 1\n\n" for i in range(10_001)), {}),
        ("var/lib/rpm/rpmdb.sqlite", "SQLite", {}),
    ],
    ids=["dpkg", "apk", "nonsense", "long", "many", "rpm"],
)  # fmt: skip
def test_its_packages_are_read_from_its_own_list(
    tmp_path: Path, path: str, text: str, software: dict[str, str]
) -> None:
    folder = tree(tmp_path / "root")
    (folder / "lib").symlink_to("usr/lib")
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(text)
    found = image_inside.look_by(reading(made(tmp_path / "disk", folder, "-t", "ext4", size="64M")))
    assert found is not None and found.system == "debian" and found.software == software


def test_a_hostile_file_system_costs_little_and_says_nothing(tmp_path: Path) -> None:
    good = bytearray(made(tmp_path / "disk", tree(tmp_path / "root"), "-t", "ext4", size="16M"))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 200_000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=20))
    def wrong(changes: list[tuple[int, bytes]]) -> None:
        data = bytearray(good)
        for at, what in changes:
            data[at : at + len(what)] = what
        found = image_inside.look_by(reading(bytes(data)))
        assert found is None or isinstance(found, Inside)

    wrong()
    for at in range(1024, 1024 + 128, 2):
        data = bytearray(good)
        data[at : at + 2] = b"\xff\xff"
        image_inside.look_by(reading(bytes(data)))


def test_a_table_that_leads_round_and_round_ends() -> None:
    data = bytearray(1 << 16)
    data[512:520] = b"EFI PART"
    struct.pack_into("<QII", data, 512 + 72, 2, 0xFFFFFFFF, 128)
    for i in range(200):
        data[1024 + i * 128] = 1
    assert len(list(image_inside.starts(reading(bytes(data))))) == 33


@pytest.mark.parametrize(
    ("name", "user"),
    [
        ("debian-12-generic-amd64.qcow2", "debian"),
        ("noble-server-cloudimg-amd64.img", "ubuntu"),
        ("Fedora-Cloud-Base-Generic-43-1.6.x86_64.qcow2", "fedora"),
        ("fedora-coreos-42.20250803.3.0-qemu.x86_64.qcow2", "core"),
        ("AlmaLinux-9-GenericCloud-latest.x86_64.qcow2", "almalinux"),
        ("Rocky-9-GenericCloud-Base.latest.x86_64.qcow2", "rocky"),
        ("CentOS-Stream-GenericCloud-10-latest.x86_64.qcow2", "cloud-user"),
        ("openSUSE-Leap-15.6-Minimal-VM.x86_64-Cloud.qcow2", "opensuse"),
        ("Arch-Linux-x86_64-cloudimg.qcow2", "arch"),
        ("nocloud_alpine-3.24.0-x86_64-bios-cloudinit-r0.qcow2", "alpine"),
        ("monarch.qcow2", ""),
        ("disk1.img", ""),
        ("research-data", ""),
    ],
)
def test_a_name_tells_the_distribution(name: str, user: str) -> None:
    assert default_users.of_name(name) == user


def test_the_guesses_agree_with_the_catalogue(tmp_path: Path) -> None:
    for entry in catalog.load(tmp_path).entries:
        file = entry.url.rpartition("/")[2]
        by_os = default_users.guess(None, system=entry.os, osinfo="", file="")
        by_osinfo = default_users.guess(None, system="", osinfo=entry.osinfo, file="")
        by_file = default_users.guess(None, system="unknown", osinfo="", file=file)
        assert {by_os.user, by_osinfo.user, by_file.user} == {entry.default_user}, entry


def test_what_is_inside_goes_before_what_it_is_called() -> None:
    def user(inside: Inside | None, system: str = "unknown", file: str = "fedora.qcow2") -> tuple[str, str]:
        found = default_users.guess(inside, system=system, osinfo="", file=file)
        return found.user, found.by

    assert user(Inside("debian", "12", CLOUD, True), "ubuntu") == ("tester", "inside")
    assert user(Inside("debian", "12", "default_user: {name: x}", True)) == ("debian", "inside")
    assert user(Inside("debian", "12", "", False)) == ("root", "inside")
    assert user(Inside("flatcar", "", "", False)) == ("core", "inside")
    assert user(None, "ubuntu") == ("ubuntu", "os")
    assert user(None) == ("fedora", "name")
    assert user(None, file="disk.raw") == ("root", "nothing")
    named = default_users.guess(None, system="unknown", osinfo="", file="disk.raw", name="my-debian")
    assert (named.user, named.by) == ("debian", "name")


@pytest.mark.parametrize("name", ["root; rm -rf /", "-x", "a b", "$(id)", "A" * 40, "../x"])
def test_a_hostile_name_is_no_user(name: str) -> None:
    assert default_users.of_cloud_cfg(f"  default_user:\n    name: {name}\n") in {"", "root"}
