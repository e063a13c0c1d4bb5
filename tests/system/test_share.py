"""Folders of the host in a guest."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import Shell, volumes

pytestmark = pytest.mark.system

HOSTILE = """it's "a" <folder> & $(more):\t"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shared") / HOSTILE.strip()
    made.mkdir()
    (made / "from host").write_text("by the host\n")
    return made


@pytest.fixture(scope="module")
def vm(folder: Path) -> Iterator[str]:
    shell = Shell()
    chosen = f"share-{os.getpid()}"
    shell.run("create", chosen, "--image", "micro", "--share", f"{folder}:/srv/it's here", "--wait", "ssh")
    yield chosen
    shell.run("delete", chosen, "--yes")


def in_guest(shell: Shell, vm: str, path: str) -> str:
    """What a file in a share says, once it is there: a first boot mounts after sshd answers."""
    script = 'for i in $(seq 300); do cat "$0" 2>/dev/null && exit; usleep 100000; done; cat /proc/mounts; exit 1'
    return shell.run("exec", vm, "--", "sh", "-c", script, path).stdout


def test_a_folder_named_at_create_is_there_both_ways_and_after_a_reboot(shell: Shell, vm: str, folder: Path) -> None:
    assert in_guest(shell, vm, "/srv/it's here/from host") == "by the host\n"
    shell.run("exec", vm, "--", "sh", "-c", 'echo by the guest >"/srv/it\'s here/from guest"')
    assert (folder / "from guest").read_text() == "by the guest\n"
    shell.run("stop", vm)
    shell.run("start", vm)
    shell.run("wait", vm, "--for", "ssh")
    assert in_guest(shell, vm, "/srv/it's here/from guest") == "by the guest\n"


def test_a_further_folder_is_plugged_into_a_running_guest_that_has_cgroups(
    shell: Shell, vm: str, tmp_path: Path
) -> None:
    """Without cgroups, as in the test host, it would be the end of libvirtd 9.0: there it waits for the next start."""
    (tmp_path / "a").write_text("hot\n")
    pluggable = "posix" in shell.virsh("schedinfo", vm, check=False)
    daemon = Path("/run/libvirtd.pid").read_text()
    done = shell.json("share", vm, f"{tmp_path}:/mnt/hot")
    assert (done["driver"], done["done"]) == ("virtiofs", True)
    assert done["there"] == ("now" if pluggable else "its next stop and start")
    assert Path("/run/libvirtd.pid").read_text() == daemon
    if not pluggable:
        shell.run("stop", vm)
        shell.run("start", vm)
        shell.run("wait", vm, "--for", "ssh")
        assert in_guest(shell, vm, "/mnt/hot/a") == "hot\n"
    assert shell.run("exec", vm, "--", "cat", "/mnt/hot/a").stdout == "hot\n"
    refused = shell.run("share", vm, f"{tmp_path}:/mnt/hot", check=5)
    assert "has a share at /mnt/hot already" in refused.stderr
    definition = ET.fromstring(shell.virsh("dumpxml", "--inactive", vm))
    assert len(definition.findall("devices/filesystem")) == 2


def test_a_share_that_is_in_use_stays_and_one_that_is_not_goes_at_once(shell: Shell, vm: str, folder: Path) -> None:
    refused = shell.run("unshare", vm, "/mnt/never", check=4)
    assert "no share there" in refused.stderr and f"/srv/it's here ({folder} here)" in refused.stderr
    use = 'cd "/srv/it\'s here" && (sleep 600 </dev/null >/dev/null 2>&1 & echo $!)'
    user = shell.run("exec", vm, "--", "sh", "-c", use).stdout.strip()
    refused = shell.run("unshare", vm, "/srv/it's here", check=9)
    assert "does not let go of it" in refused.stderr and "busy" in refused.stderr
    assert in_guest(shell, vm, "/srv/it's here/from host") == "by the host\n"
    shell.run("exec", vm, "--", "kill", user)
    daemons = len(shell.virsh("dumpxml", vm).split("<filesystem")) - 1
    done = shell.json("unshare", vm, "/srv/it's here")
    assert (done["folder"], done["gone"], done["done"]) == (str(folder), "now", True)
    for state in ((), ("--inactive",)):
        shares = ET.fromstring(shell.virsh("dumpxml", *state, vm)).findall("devices/filesystem")
        assert len(shares) == daemons - 1 and str(folder) not in {s.find("source").get("dir") for s in shares}  # type: ignore[union-attr]
    assert shell.run("exec", vm, "--", "cat", "/proc/mounts", "/etc/fstab").stdout.count("it\\040s") == 0
    assert shell.run("exec", vm, "--", "sh", "-c", 'ls -A "/srv/it\'s here"').stdout == ""
    shell.run("unshare", vm, "/srv/it's here", check=4)


def test_a_share_of_a_stopped_vm_goes_and_may_come_back_another_way(shell: Shell, name: str, tmp_path: Path) -> None:
    """What the guest's fstab still says of it does no harm, and is replaced."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a").write_text("again\n")
    shell.run("create", name, "--image", "micro", "--share", f"{tmp_path}:/mnt", "--wait", "ssh")
    in_guest(shell, name, "/mnt/new/a")
    shell.run("stop", name)
    told = shell.run("unshare", name, "/mnt").stdout
    assert "gone from /mnt, from now on" in told and "umount /mnt" in told
    assert not ET.fromstring(shell.virsh("dumpxml", "--inactive", name)).findall("devices/filesystem")
    shell.run("start", name)
    shell.run("wait", name, "--for", "ssh")
    shell.run("share", name, f"{tmp_path}/new:/mnt")
    assert shell.run("exec", name, "--", "grep", "-c", "/mnt", "/etc/fstab").stdout == "1\n"
    told = shell.run("unshare", name, "/mnt").stdout  # before it was ever there
    assert "from now on" in told and "/mnt" not in shell.run("exec", name, "--", "cat", "/etc/fstab").stdout


def test_debians_cloud_kernel_has_no_9p() -> None:
    """So no image with it can take a 9p share; debian-12, which can, is tried in test_debian.py."""
    (package,) = (Path.home() / ".cache/vmctl/debs").glob("linux-image-[0-9]*-cloud-*.deb")
    unpack = 'dpkg-deb --fsys-tarfile "$0" | tar -xO --wildcards "./boot/config-*"'
    config = subprocess.run(
        ["sh", "-c", unpack, package], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert "# CONFIG_NET_9P is not set" in config.splitlines() and "CONFIG_VIRTIO_FS=m" in config.splitlines()


def test_a_guest_whose_memory_is_its_own_gets_the_folder_at_its_next_start(
    shell: Shell, name: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text("cold\n")
    shell.guest(name)
    assert "from its next stop and start on" in shell.run("share", name, f"{tmp_path}:/mnt/cold").stdout
    assert [vm["image"] for vm in shell.json("list") if vm["name"] == name] == ["micro"], "its record is gone"
    shell.run("exec", name, "--", "sh", "-c", "! test -e /mnt/cold/a && sync")
    shell.run("stop", name)
    shell.run("start", name)
    shell.run("wait", name, "--for", "ssh")
    assert in_guest(shell, name, "/mnt/cold/a") == "cold\n"


def test_read_only_is_kept_by_the_host_not_left_to_the_guest(shell: Shell, name: str, tmp_path: Path) -> None:
    """And so is a file system mounted below the folder; what else is shared stays writable."""
    for folder in ("kept for all/sub", "open", "later"):
        (tmp_path / folder).mkdir(parents=True)
    kept, sub = tmp_path / "kept for all", tmp_path / "kept for all/sub"
    (kept / "a").write_text("as it was\n")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(sub)], check=True)
    try:
        (sub / "b").write_text("below\n")
        shares = ["--share", f"{kept}:/mnt/kept:ro", "--share", f"{tmp_path}/open:/mnt/open"]
        shell.run("create", name, "--image", "micro", *shares, "--wait", "ssh")
        assert in_guest(shell, name, "/mnt/kept/a") == "as it was\n"
        assert in_guest(shell, name, "/mnt/kept/sub/b") == "below\n"
        assert " virtiofs ro," in shell.run("exec", name, "--", "grep", " /mnt/kept ", "/proc/mounts").stdout
        # Root in the guest decides for the guest, not for the host.
        shell.run("exec", name, "--", "mount", "-o", "remount,rw", "/mnt/kept")
        assert " virtiofs rw," in shell.run("exec", name, "--", "grep", " /mnt/kept ", "/proc/mounts").stdout
        for act in ("echo x >a", "echo x >new", "rm a", "mkdir d", "chmod 777 a", "echo x >sub/b", "rm sub/b"):
            told = shell.run("exec", name, "--", "sh", "-c", f"cd /mnt/kept && {act}", check=None)
            assert told.returncode and "Read-only file system" in told.stderr, act
        shell.run("exec", name, "--", "sh", "-c", "echo written >/mnt/open/file")
        assert (tmp_path / "open/file").read_text() == "written\n"
        assert sorted(one.name for one in kept.iterdir()) == ["a", "sub"] and (kept / "a").read_text() == "as it was\n"

        shell.run("share", name, f"{tmp_path}/later:/mnt/later:ro")
        listed = {one.pop("mount"): one for one in shell.json("show", name)["shares"]}
        live = listed["/mnt/later"].pop("live")  # where it can be plugged in
        assert listed == {
            "/mnt/kept": {"folder": str(kept), "readonly": True, "driver": "virtiofs", "live": True},
            "/mnt/open": {"folder": f"{tmp_path}/open", "readonly": False, "driver": "virtiofs", "live": True},
            "/mnt/later": {"folder": f"{tmp_path}/later", "readonly": True, "driver": "virtiofs"},
        }
        told = shell.run("show", name).stdout
        assert f"{kept} -> /mnt/kept  virtiofs  read-only\n" in told and ("from its next start on" in told) != live
        shell.run("stop", name)
        shell.run("start", name)
        shell.run("wait", name, "--for", "ssh")
        shell.run("exec", name, "--", "cat", "/mnt/kept/a")  # mounted before sshd answers
        told = shell.run(
            "exec", name, "--", "sh", "-c", "mount -o remount,rw /mnt/later; echo x >/mnt/later/x", check=1
        )
        assert "Read-only file system" in told.stderr
        shell.run("unshare", name, "/mnt/later")
        assert {one["mount"] for one in shell.json("show", name)["shares"]} == {"/mnt/kept", "/mnt/open"}
    finally:
        shell.run("delete", name, "--yes", "--missing-ok", check=None)
        subprocess.run(["umount", "-l", str(sub)], check=True)


def tmp_path_open(path: Path) -> Path:
    """The folder, with the way to it open to all."""
    for one in (path, *path.parents):
        if one.stat().st_uid == os.getuid() and one != Path("/"):
            one.chmod(one.stat().st_mode | 0o055)
    return path


def test_what_cannot_be_shared_is_one_clear_error_and_leaves_nothing(shell: Shell, name: str, tmp_path: Path) -> None:
    before = volumes(shell)
    (tmp_path / "file").touch()
    for text, code, words in (
        ("relative:/mnt", 2, "not absolute"),
        ("/srv/../etc:/mnt", 2, "climbs"),
        (f"{tmp_path}:mnt", 2, "not absolute"),
        (f"{tmp_path}:/", 2, "root cannot be mounted over"),
        ("/srv", 2, "HOST:GUEST[:ro]"),
        ("/a,sandbox=none:/mnt", 2, "comma"),
        ("/no/such/folder:/mnt", 4, "no such folder"),
        (f"{tmp_path}/file:/mnt", 4, "no such folder"),
    ):
        told = shell.run("create", name, "--image", "micro", "--share", text, check=code)
        assert words in told.stderr, told.stderr
    closed = tmp_path / "closed"
    (closed / "in").mkdir(parents=True)
    closed.chmod(0o700)
    tmp_path_open(tmp_path)
    assert shell.run("show", name, check=4) and volumes(shell) == before
