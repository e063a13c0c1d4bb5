"""Disk images in and out: what is exported comes back equal, and no hostile file gets anything or leaves anything."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import warm
from tests.system.conftest import REPO, VMCTL, Shell, environment
from vmctl.wait import wait_until
from vmctl.workspace import is_leftover

pytestmark = pytest.mark.system

STORE = Path("/var/lib/libvirt/vmctl/vmctl-images")
CACHE = Path.home() / ".cache/vmctl"
SECRET = b"the content of a host file that no image may get"


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, timeout=60)


def in_store() -> set[str]:
    """All names in the store's folder and what lies beside the packages in the cache, which other runs share."""
    return {p.name for p in STORE.iterdir()} | {p.name for p in CACHE.glob(".making-*") if is_leftover(p)}


def disk(path: Path, mib: int = 2, size_mib: int = 16) -> Path:
    """A raw disk with a partition table's signature and some content."""
    data = bytearray(os.urandom(1 << 20) * mib)
    data[510:512] = b"\x55\xaa"
    path.write_bytes(data)
    os.truncate(path, size_mib << 20)
    return path


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A host file that images try to get at."""
    path = tmp_path / "secret"
    path.write_bytes(SECRET.ljust(1 << 20, b"."))
    return path


@pytest.fixture(autouse=True)
def emptied(shell: Shell) -> Iterator[None]:
    """What a test has put into the store goes again."""
    before = {m["name"] for m in shell.json("image", "list")}
    yield
    for manifest in shell.json("image", "list"):
        if manifest["name"] not in before:
            shell.run("image", "delete", f"{manifest['name']}-{manifest['digest'][:12]}", "--yes", check=None)


def refused(shell: Shell, file: Path, *words: str, because: str, code: int = 10) -> None:
    """Import it: one clear error, nothing left, the secret nowhere."""
    before, began = in_store(), time.time() - 2
    done = shell.run("image", "import", str(file), *words, check=code)
    first, *rest = done.stderr.splitlines()[-2 if "\nhint: " in done.stderr else -1 :]
    assert first.startswith("cannot import ") and because in first, done.stderr
    assert all(line.startswith("hint: ") for line in rest) and "Traceback" not in done.stderr and not done.stdout
    assert in_store() == before
    # Only where something was written since: packages and images lie there too.
    script = 'for folder; do find "$folder" -type f -newermt "@$0" -exec grep -laF "$SECRET" {} +; done'
    folders = map(str, (STORE, Path("/var/lib/libvirt/vmctl/vmctl"), CACHE))
    found = subprocess.run(["sh", "-c", script, f"{began:.0f}", *folders], env=environment(SECRET=SECRET.decode()),
                           capture_output=True, text=True, timeout=60)  # fmt: skip
    assert found.stdout == "" and not found.stderr, found
    assert SECRET.decode() not in done.stderr


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("qcow2", ()),
        ("qcow2", ("--compress",)),
        ("raw", ()),
        ("vmdk", ()),
        ("vmdk", ("--compress",)),
        ("vdi", ()),
        ("vhdx", ()),
        ("ova", ()),
        ("box", ()),
    ],
)
def test_there_and_back(shell: Shell, tmp_path: Path, form: str, words: tuple[str, ...]) -> None:
    raw, file = disk(tmp_path / "there.raw"), tmp_path / f"file.{form}"
    shell.run("image", "import", str(raw))
    shell.run("image", "export", "there", str(file), *words)
    assert file.stat().st_blocks * 512 < 12 << 20, "neither sparse nor packed"
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    made = shell.json("image", "import", str(file), "--name", "back", "--checksum", f"sha256:{sha}", "--os", "my-os")
    stem = f"back-{made['digest'][:12]}"
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, STORE / f"{stem}.qcow2")
    assert made["verified"] and made["checksum"] == f"sha256:{sha}" and made["source"].startswith(str(file))
    assert made["virtual_size"] == 16 << 20 and made["os"] == "my-os" and made["boots"] == ["bios"]
    assert made["default_user"] == ("vagrant" if form == "box" else "root")
    assert stem in shell.run("image", "verify", stem).stdout
    left = {"there.raw", file.name}
    assert {p.name for p in tmp_path.iterdir()} == left


@pytest.mark.parametrize("label", ["", "gpt"])
def test_whom_it_lets_in_is_read_from_its_own_files(shell: Shell, tmp_path: Path, label: str) -> None:
    root, file = tmp_path / "root", tmp_path / "fedora.qcow2"
    (root / "etc/cloud").mkdir(parents=True)
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text("Package: zstd\nStatus: install ok installed\nVersion: 1:1.5\n")
    (root / "etc/os-release").write_text('ID=ubuntu\nVERSION_ID="24.04"\n')
    (root / "etc/cloud/cloud.cfg").write_text("system_info:\n  default_user:\n    name: tester\n")
    words = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(root), str(tmp_path / "fs"), "16M"]
    subprocess.run(words, check=True, timeout=60)
    (tmp_path / "disk").write_bytes(bytes(1 << 20 if label else 0) + (tmp_path / "fs").read_bytes() + bytes(1 << 20))
    if label:
        table = "label: gpt\nstart=1MiB, size=16MiB\n"
        subprocess.run(["sfdisk", "-q", str(tmp_path / "disk")], input=table, text=True, check=True, timeout=60)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", tmp_path / "disk", file)
    done = shell.run("image", "import", str(file))
    assert "fedora.qcow2 lets in tester: its cloud-init says so" in done.stderr
    made = shell.json("image", "show", "fedora")
    assert (made["default_user"], made["default_user_by"]) == ("tester", "inside")
    assert (made["os"], made["os_version"]) == ("ubuntu", "24.04")
    made = shell.json("image", "import", str(file), "--user", "me", "--os", "debian", "--name", "told")
    assert (made["default_user"], made["default_user_by"], made["os"]) == ("me", "told", "debian")
    assert made["software"] == {"zstd": "1:1.5"}, "whatever else was told"
    # Stored by a vmctl that did not look for it: its manifest has no room for more, and is taken as it is.
    stored = STORE / f"told-{made['digest'][:12]}.json"
    stored.write_text(json.dumps(made | {"software": {}}).ljust(stored.stat().st_size))
    again = shell.json("image", "import", str(file), "--user", "you", "--os", "debian", "--name", "told")
    assert (again["default_user"], again["software"]) == ("you", {})


def test_what_is_in_a_box_and_an_ova(shell: Shell, tmp_path: Path) -> None:
    done = shell.run("image", "export", "micro", str(tmp_path / "m.box"))
    assert "direct kernel boot only" in done.stderr
    with tarfile.open(tmp_path / "m.box", "r:gz") as box:
        assert box.getnames() == ["metadata.json", "Vagrantfile", "box.img"]
        text = box.extractfile("metadata.json")
        assert text is not None
        assert json.load(text) == {"provider": "libvirt", "format": "qcow2", "virtual_size": 1}
    shell.run("image", "export", "micro", str(tmp_path / "m.ova"))
    with tarfile.open(tmp_path / "m.ova", "r:") as ova:
        names = ova.getnames()
        ova.extractall(tmp_path / "ova")
    assert [Path(name).suffix for name in names] == [".ovf", ".mf", ".vmdk"]
    sums = (tmp_path / "ova" / names[1]).read_text()
    for name in (names[0], names[2]):
        digits = hashlib.sha256((tmp_path / "ova" / name).read_bytes()).hexdigest()
        assert f"SHA256({name})= {digits}" in sums


def test_over_a_connection_that_is_not_local(tmp_path: Path) -> None:
    """Through libvirt's streams, as on a remote host: nothing of the store is touched as a file."""
    far = Shell("qemu+unix:///system")
    raw = disk(tmp_path / "far.raw")
    far.run("image", "import", str(raw))
    far.run("image", "export", "far", str(tmp_path / "far.qcow2"))
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, tmp_path / "far.qcow2")
    assert far.json("image", "verify", "far")[0]["name"] == "far"


def test_a_vm_starts_from_an_imported_disk(shell: Shell, name: str, tmp_path: Path) -> None:
    """A boot sector that writes a word to the serial port."""
    code = b"".join(b"\xba\xf8\x03\xb0" + bytes([c]) + b"\xee" for c in b"booted from the import\r\n") + b"\xf4\xeb\xfd"
    raw = tmp_path / "boots.raw"
    raw.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa")
    os.truncate(raw, 1 << 20)
    shell.run("image", "import", str(raw))
    shell.run("create", name, "--image", "boots", "--memory", "64M")
    wait_until(lambda: "booted from the import" in shell.run("logs", name).stdout, what="boot sector", timeout_s=60)


def test_a_wrong_checksum(shell: Shell, tmp_path: Path) -> None:
    raw = disk(tmp_path / "d.raw")
    refused(shell, raw, "--checksum", "sha256:" + "0" * 64, because="not the one given")
    refused(shell, raw, "--checksum", "sha512:" + "0" * 128, because="its sha512 is")
    refused(shell, raw, "--checksum", "md5:1", "--boots", "floppy", because="--boots takes", code=2)


def test_a_dry_run_reads_and_leaves_nothing(shell: Shell, secret: Path, tmp_path: Path) -> None:
    raw, box, hostile = disk(tmp_path / "d.raw"), tmp_path / "d.box", tmp_path / "h.qcow2"
    before = in_store()
    told = shell.run("image", "import", str(raw), "--dry-run").stdout
    assert told == "would copy d.raw, raw of 16.0 MiB\nwould put image d-… into pool vmctl-images\n"
    assert in_store() == before
    qemu_img("create", "-f", "qcow2", "-b", secret, "-F", "raw", hostile)
    refused(shell, hostile, "--dry-run", because="it has a backing file")
    refused(shell, raw, "--dry-run", "--checksum", "sha256:" + "0" * 64, because="not the one given")
    refused(shell, tmp_path / "none.raw", "--dry-run", because="No such file")
    shell.run("image", "import", str(raw))
    shell.run("image", "export", "d", str(box))
    assert "would unpack d.box" in shell.run("image", "import", str(box), "--name", "boxed", "--dry-run").stdout
    assert "boxed" not in {m["name"] for m in shell.json("image", "list")}


def test_a_backing_file(shell: Shell, secret: Path, tmp_path: Path) -> None:
    file = tmp_path / "o.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", secret, "-F", "raw", file)
    refused(shell, file, because=f"it has a backing file ({secret})")
    refused(shell, file, "--format", "qcow2", because="backing file")


def test_a_data_file(shell: Shell, secret: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "d.qcow2", tmp_path / "data"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={other},data_file_raw=on", file, "1M")
    data = file.read_bytes().replace(str(other).encode().ljust(len(str(secret)), b"\0"), str(secret).encode())
    file.write_bytes(data)
    refused(shell, file, because="external data file")
    # Without the feature bit, and with nothing but the bit.
    refused(shell, _with(file, 72, struct.pack(">Q", 0)), because="names an external data file")


def _with(file: Path, at: int, new: bytes) -> Path:
    data = bytearray(file.read_bytes())
    data[at : at + len(new)] = new
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("kind", ["FLAT", "VMFS"])
def test_a_vmdk_extent_that_is_a_host_file(shell: Shell, secret: Path, tmp_path: Path, kind: str) -> None:
    text = (
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 2048 {kind} "{secret}" 0\nddb.adapterType = "ide"\n'
    )
    (tmp_path / "a.vmdk").write_text(text)
    refused(shell, tmp_path / "a.vmdk", because=f"in other files ({secret})")
    # The same text inside a sparse header that gives no size: qemu-img then goes by the text.
    qemu_img("create", "-f", "vmdk", tmp_path / "b.vmdk", "1M")
    hidden = _with(_with(tmp_path / "b.vmdk", 12, bytes(8)), 512, text.encode().ljust(1024, b"\0"))
    refused(shell, hidden, because="in other files")
    if kind == "FLAT":  # what is refused is no fancy: qemu-img itself hands out the file
        qemu_img("convert", "-f", "vmdk", "-O", "raw", tmp_path / "a.vmdk", tmp_path / "stolen")
        assert SECRET in (tmp_path / "stolen").read_bytes()


def test_a_vmdk_parent(shell: Shell, secret: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "vmdk", secret, tmp_path / "base.vmdk")
    qemu_img("create", "-f", "vmdk", "-b", tmp_path / "base.vmdk", "-F", "vmdk", tmp_path / "child.vmdk")
    refused(shell, tmp_path / "child.vmdk", because="parent")


def _packed(path: Path, *members: tuple[str, bytes, bytes, str], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data, kind, link in members:
            one = tarfile.TarInfo(name)
            one.size, one.type, one.linkname = len(data), kind, link
            archive.addfile(one, io.BytesIO(data))
    return path


METADATA = ("metadata.json", b'{"provider": "libvirt", "format": "qcow2"}', tarfile.REGTYPE, "")


def test_archives_that_reach_out(shell: Shell, secret: Path, tmp_path: Path) -> None:
    escape = tmp_path / "escaped"
    out = ("../" * 12 + str(escape)[1:], b"x", tarfile.REGTYPE, "")
    refused(shell, _packed(tmp_path / "a.ova", out), because="outside its folder")
    absolute = (str(escape), b"x", tarfile.REGTYPE, "")
    refused(shell, _packed(tmp_path / "b.ova", absolute), because="outside its folder")
    symlink = ("box.img", b"", tarfile.SYMTYPE, str(secret))
    refused(shell, _packed(tmp_path / "c.ova", symlink), because="symbolic link")
    refused(shell, _packed(tmp_path / "c.box", METADATA, symlink, mode="w:gz"), because="symbolic link")
    hardlink = ("box.img", b"", tarfile.LNKTYPE, str(secret))
    refused(shell, _packed(tmp_path / "d.box", METADATA, hardlink, mode="w:gz"), because="hard link")
    folder = ("sub", b"", tarfile.SYMTYPE, str(tmp_path))
    through = ("sub/escaped", b"x", tarfile.REGTYPE, "")
    refused(shell, _packed(tmp_path / "e.box", METADATA, folder, through, mode="w:gz"), because="symbolic link")
    qemu_img("create", "-f", "qcow2", "-b", secret, "-F", "raw", tmp_path / "o.qcow2")
    inside = ("box.img", (tmp_path / "o.qcow2").read_bytes(), tarfile.REGTYPE, "")
    refused(shell, _packed(tmp_path / "f.box", METADATA, inside, mode="w:gz"), because="backing file")
    refused(shell, _packed(tmp_path / "g.box", METADATA, inside), because="backing file")
    assert not escape.exists()


def _bomb(path: Path, head: bytes, mib: int) -> None:
    """A gzip file of ``head`` and so many MiB of zeros; its end, which nobody may come to read, has no checksum."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    begin = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)  # depends on nothing before it
    path.write_bytes(begin + zeros * mib)


def test_a_gzip_bomb(shell: Shell, tmp_path: Path) -> None:
    one = tarfile.TarInfo("box.img")
    one.size = 1 << 42
    text = tarfile.TarInfo("metadata.json")
    text.size = len(METADATA[1])
    head = text.tobuf() + METADATA[1].ljust(512, b"\0")
    _bomb(tmp_path / "bomb.box", head + one.tobuf(tarfile.GNU_FORMAT), mib=400)
    refused(shell, tmp_path / "bomb.box", because="it holds more than")
    one.size = 1 << 30
    _bomb(tmp_path / "bomb.box", head + one.tobuf(tarfile.GNU_FORMAT), mib=1024)
    refused(shell, tmp_path / "bomb.box", because="it unpacks to more than 100 times its size")


def test_a_bomb_of_compressed_clusters(shell: Shell, tmp_path: Path) -> None:
    """A table that names one compressed cluster over and over: 100 KiB become any number of gigabytes."""
    one, bomb = tmp_path / "one.raw", tmp_path / "bomb.qcow2"
    one.write_bytes(b"A" * 65536)
    os.truncate(one, 512 << 20)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", one, bomb)
    data = bytearray(bomb.read_bytes())
    (l1_at,) = struct.unpack_from(">Q", data, 40)
    l2_at = struct.unpack_from(">Q", data, l1_at)[0] & 0x00FFFFFFFFFFFE00
    data[l2_at : l2_at + 65536] = data[l2_at : l2_at + 8] * 8192
    bomb.write_bytes(data)
    refused(shell, bomb, because="the result takes more than the 256 MiB allowed to a file of")


def test_what_is_said_of_small_mistakes(shell: Shell, tmp_path: Path) -> None:
    empty, packed, small = tmp_path / "empty", tmp_path / "x.qcow2.xz", tmp_path / "s.qcow2"
    empty.touch()
    refused(shell, empty, because="it is empty")
    packed.write_bytes(b"\xfd7zXZ\0" + bytes(600))
    refused(shell, packed, because="it is compressed with xz")
    assert "hint: unpack it first: xz -d" in shell.run("image", "import", str(packed), check=10).stderr
    qemu_img("create", "-f", "qcow2", small, "8M")
    refused(shell, small, "--max-size", "1M", because="its disk is 8 MiB large, above the limit of 1 MiB")
    said = shell.run("image", "pull", str(small), check=4).stderr
    assert f"hint: it is a file here: vmctl image import {small}" in said
    assert "did you mean micro?" in shell.run("image", "show", "mirco", check=4).stderr


def test_sizes_and_cut_files(shell: Shell, tmp_path: Path) -> None:
    huge = tmp_path / "huge.qcow2"
    qemu_img("create", "-f", "qcow2", huge, "4T")
    refused(shell, huge, because="above the limit of 2048 GiB")
    shell.run("image", "import", str(huge), "--max-size", "5T")
    refused(shell, huge, "--max-size", "1G", because="above the limit of 1 GiB")
    whole = tmp_path / "whole"
    for form, reason in (("qcow2", "L1 table lies"), ("vmdk", "cut"), ("vdi", "cut"), ("vhdx", "cut")):
        qemu_img("convert", "-O", form, disk(tmp_path / "d.raw"), whole)
        cut = tmp_path / f"cut.{form}"
        cut.write_bytes(whole.read_bytes()[: 300 if form != "vhdx" else 100_000])
        refused(shell, cut, because=reason)
    os.mkfifo(tmp_path / "pipe")
    refused(shell, tmp_path / "pipe", because="not a regular file")
    refused(shell, tmp_path, "--name", "folder", because="")
    refused(shell, tmp_path / "none", because="No such file")
    said = shell.run("image", "import", "debian-13", check=10).stderr
    assert "hint: an image to be had by that name? vmctl image search debian-13" in said, said


@pytest.mark.parametrize(
    ("form", "options"),
    [("qcow2", []), ("qcow2", ["-c"]), ("vmdk", []), ("vmdk", ["-o", "subformat=streamOptimized"]), ("vhdx", [])],
)
def test_content_cut_off_behind_a_sound_header(shell: Shell, tmp_path: Path, form: str, options: list[str]) -> None:
    """The header is whole and the tables point beyond the end, where QEMU may read zeros without a word."""
    file = tmp_path / f"cut.{form}"
    qemu_img("convert", "-f", "raw", "-O", form, *options, disk(tmp_path / "d.raw"), file)
    os.truncate(file, file.stat().st_size // 2)
    refused(shell, file, because="" if form == "vhdx" else "it is cut short")


def test_a_full_disk(shell: Shell, tmp_path: Path) -> None:
    """On a disk with little room: the copy is stopped at what is free, and nothing of it stays."""
    raw = disk(tmp_path / "large.raw", mib=60, size_mib=60)
    before = in_store()
    script = f'mount -t tmpfs -o size=100m tmpfs {STORE} && {{ "$@"; code=$?; ls -A {STORE}; exit $code; }}'
    command = ["unshare", "-m", "sh", "-c", script, "sh", *VMCTL, "image", "import", str(raw)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.returncode == 10 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    assert "MiB that are free" in done.stderr
    assert in_store() == before
    script = f'mkdir {tmp_path}/out && mount -t tmpfs -o size=10m tmpfs {tmp_path}/out && {{ "$@"; code=$?; ls -A {tmp_path}/out; exit $code; }}'  # noqa: E501
    shell.run("image", "import", str(raw))
    for form in ("raw", "qcow2", "ova", "box"):
        command = ["unshare", "-m", "sh", "-c", script, "sh", *VMCTL, "image", "export", "large"]
        command.append(str(tmp_path / f"out/file.{form}"))
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=120)
        assert done.returncode == 10 and done.stdout == "", done.stderr
        assert "MiB that are free" in done.stderr or "No space left" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        (tmp_path / "out").rmdir()


def test_export_names_the_file_itself(shell: Shell, tmp_path: Path) -> None:
    shell.run("image", "import", str(disk(tmp_path / "there.raw")))
    command = [*VMCTL, "image", "export", "there", "--format", "box"]
    here = {"cwd": tmp_path, "env": environment(PYTHONPATH=str(REPO))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, **here)
    assert done.stdout == f"{tmp_path}/there.box\n" and (tmp_path / "there.box").stat().st_size > 1 << 20
    told = shell.run("image", "export", "there", check=2).stderr
    assert "neither FILE nor --format" in told and "hint: for example --format qcow2" in told
    assert "'x' is no format" in shell.run("image", "export", "there", "--format", "x", check=2).stderr


def test_export_writes_over_nothing(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "there.qcow2"
    file.write_text("mine")
    assert "it exists" in shell.run("image", "export", "micro", str(file), check=5).stderr
    assert file.read_text() == "mine"
    shell.run("image", "export", "micro", str(file), "--force")
    qemu_img("check", "-f", "qcow2", file)
    assert "no format" in shell.run("image", "export", "micro", str(tmp_path / "x.y"), check=2).stderr
    assert (
        "no compression" in shell.run("image", "export", "micro", str(tmp_path / "x.vdi"), "--compress", check=2).stderr
    )
    assert shell.run("image", "export", "none", str(tmp_path / "x.raw"), check=4)
    nowhere = tmp_path / "nowhere"
    done = shell.run("image", "export", "micro", str(nowhere / "x.raw"), check=4)
    assert done.stderr == (
        f"cannot export to {nowhere}/x.raw: there is no folder {nowhere}\nhint: mkdir -p {nowhere}\n"
    )
    os.mkfifo(tmp_path / "pipe.raw")  # as a device would: --force is for files
    done = shell.run("image", "export", "micro", str(tmp_path / "pipe.raw"), "--force", check=5)
    assert "no regular file" in done.stderr and (tmp_path / "pipe.raw").is_fifo()
    (tmp_path / "pipe.raw").unlink()
    assert {p.name for p in tmp_path.iterdir()} == {"there.qcow2"}


def making() -> bool:
    return any(STORE.glob(".making-*/disk.qcow2"))


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle(shell: Shell, tmp_path: Path, which: signal.Signals) -> None:
    before = in_store()
    raw = disk(tmp_path / "large.raw", mib=700, size_mib=700)
    running = subprocess.Popen([*VMCTL, "image", "import", str(raw)], stderr=subprocess.PIPE, cwd=REPO)
    wait_until(making, what="the copy", timeout_s=30, interval_s=0.01)
    running.send_signal(which)
    _, errors = running.communicate(timeout=30)
    assert b"Traceback" not in errors
    if which is signal.SIGKILL:
        assert running.returncode == -signal.SIGKILL and making()
        none = lambda: not subprocess.run(["pgrep", "-x", "qemu-img"], capture_output=True).stdout  # noqa: E731
        wait_until(none, what="qemu-img's end", timeout_s=10)
        shell.run("image", "import", str(disk(tmp_path / "small.raw")))
        shell.run("image", "delete", "small", "--yes")
    else:
        assert running.returncode == 130
    assert in_store() == before


@pytest.mark.parametrize("change", ["grows", "shrinks", "is written to"])
def test_a_file_that_changes_while_it_is_read(shell: Shell, tmp_path: Path, change: str) -> None:
    before = in_store()
    raw = disk(tmp_path / "large.raw", mib=700, size_mib=700)
    running = subprocess.Popen([*VMCTL, "image", "import", str(raw)], stderr=subprocess.PIPE, cwd=REPO)
    wait_until(making, what="the copy", timeout_s=30, interval_s=0.001)
    if change == "is written to":
        with raw.open("r+b") as file:
            file.seek(600 << 20)
            file.write(b"x")
    else:
        os.truncate(raw, (900 if change == "grows" else 1) << 20)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 10 and b"it was changed while it was read" in errors, errors
    assert in_store() == before


@pytest.mark.parametrize("which", ["SIGKILL", "SIGINT"])
def test_stopped_after_every_change(shell: Shell, tmp_path: Path, which: str) -> None:
    raw = disk(tmp_path / "often.raw")
    before = in_store()
    code, at = -1, 0
    while code:
        at += 1
        done = warm.run(
            ["-m", "tests.system.interrupting", which, str(at), "image", "import", str(raw)],
            env=environment(CHANGES=str(tmp_path / "changes")),
            timeout=120,
        )
        code = done.returncode
        assert "Traceback" not in done.stderr
        shell.run("image", "import", str(raw))
        assert {n.partition("-")[0] for n in in_store() - before} == {"often"} and len(in_store() - before) == 2
        assert shell.run("image", "verify", "often")
        shell.run("image", "delete", "often", "--yes")
        assert in_store() == before
    assert at >= 4
