"""The whole way as an ordinary user, without root: qemu:///session."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import REPO, Shell

pytestmark = pytest.mark.system

USER = "vmctl-user"


class Person:
    """Runs commands as that user, as after a login."""

    def __init__(self) -> None:
        self.entry = pwd.getpwnam(USER)

    def run(self, *argv: str, check: int | None = 0, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """Run a command; ``check`` is the exit code it must end with."""
        runtime = f"/run/user/{self.entry.pw_uid}"
        env = {"HOME": self.entry.pw_dir, "USER": USER, "XDG_RUNTIME_DIR": runtime, "PATH": os.environ["PATH"]}
        become = ["setpriv", f"--reuid={USER}", f"--regid={self.entry.pw_gid}", "--init-groups"]
        done = subprocess.run([*become, *argv], env=env, capture_output=True, text=True, timeout=timeout, cwd=REPO)
        assert check is None or done.returncode == check, done.stdout + done.stderr
        return done

    def vmctl(self, *words: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run vmctl."""
        return self.run(sys.executable, "-m", "vmctl", *words, check=check)

    def json(self, *words: str) -> Any:
        """Run vmctl with -o json and read its answer."""
        return json.loads(self.vmctl(*words, "-o", "json").stdout)


@pytest.fixture(scope="module")
def person() -> Iterator[Person]:
    """The user, with the micro image built by that user."""
    one = Person()
    # The test host has no network: the user starts with the packages that were fetched before it was entered.
    cache = Path(one.entry.pw_dir) / ".cache/vmctl"
    for part in ("apt", "debs"):
        shutil.copytree(Path.home() / ".cache/vmctl" / part, cache / part)
    for path in (cache.parent, cache, *cache.rglob("*")):
        os.chown(path, one.entry.pw_uid, one.entry.pw_gid)
    # Its libvirt leases disks by virtlockd, which it starts itself; the system's in here does not.
    config = Path(one.entry.pw_dir) / ".config/libvirt"
    one.run("mkdir", "-p", str(config))
    (config / "qemu.conf").write_text('lock_manager = "lockd"\n')
    one.vmctl("image", "build", "micro")
    yield one
    one.vmctl("delete", "*", "--yes", check=None)


def test_the_default_is_the_session_when_the_system_does_not_answer(person: Person) -> None:
    info = person.json("host", "info")
    assert (info["uri"], info["network"]) == ("qemu:///session", "")
    told = person.vmctl("list").stderr.splitlines()
    assert len(told) == 1 and told[0].startswith("note: using qemu:///session, for qemu:///system does not answer: ")
    for silent in (["-q", "list"], ["-c", "qemu:///session", "list"]):
        assert person.vmctl(*silent).stderr == ""


def test_a_guest_from_create_to_delete(person: Person) -> None:
    made = person.json("create", "mine", "--image", "micro", "--wait", "ssh")
    assert made["address"] == "127.0.0.1"
    assert person.vmctl("exec", "mine", "--", "hostname").stdout == "mine\n"
    (row,) = person.json("list")
    assert row["address"].startswith("127.0.0.1:") and row["state"] == "running"
    assert person.run("virsh", "-q", "-c", "qemu:///session", "domstate", "mine").stdout.strip() == "running"
    person.vmctl("save", "mine")
    assert "saved memory" in person.vmctl("start", "mine").stdout
    assert person.vmctl("exec", "mine", "--", "echo", "back").stdout == "back\n"
    assert "vmctl-micro" in person.vmctl("logs", "mine").stdout
    assert "(ACPI)" in person.vmctl("stop", "mine").stdout
    person.vmctl("delete", "mine", "--yes")
    assert person.json("list") == []
    pool = person.run("virsh", "-q", "-c", "qemu:///session", "vol-list", "vmctl").stdout
    assert "mine" not in pool


def test_a_wait_for_an_address_waits_for_the_guest_and_says_why_it_was_in_vain(person: Person) -> None:
    """QEMU's forward accepts whether or not a guest is behind it. This one has no driver for its card."""
    words = ["create", "deaf", "--image", "micro", "--nic-model", "rtl8139", "--wait", "ip", "--timeout", "15"]
    try:
        told = person.vmctl(*words, check=7).stderr
        assert "stage ip: not after" in told and "no guest answered behind it" in told
        assert "address: 127.0.0.1 port" in told and "console, last lines:" in told
    finally:
        person.vmctl("delete", "deaf", "--yes", check=None)
    xml = "<domain type='qemu'><name>foreign</name><memory>65536</memory><os><type arch='x86_64'>hvm</type></os>"
    xml += "<devices><interface type='user'/></devices></domain>"
    path = Path(person.entry.pw_dir) / "foreign.xml"
    path.write_text(xml)
    try:
        person.run("virsh", "-q", "-c", "qemu:///session", "create", str(path))
        told = person.vmctl("wait", "foreign", "--for", "ip", "--timeout", "1", check=7).stderr
        assert "address: none known; its network cards: user networking" in told
    finally:
        person.run("virsh", "-q", "-c", "qemu:///session", "destroy", "foreign", check=None)


def test_a_taken_port_is_replaced_at_start(person: Person) -> None:
    import socket

    person.vmctl("create", "ported", "--image", "micro", "--no-start")
    (row,) = [r for r in person.json("list") if r["name"] == "ported"]
    port = int(row["address"].partition(":")[2])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert "is taken" in person.vmctl("start", "ported").stderr
    person.vmctl("wait", "ported", "--for", "ssh")
    (row,) = [r for r in person.json("list") if r["name"] == "ported"]
    assert int(row["address"].partition(":")[2]) != port
    person.vmctl("delete", "ported", "--yes")


def test_virtlockd_refuses_a_second_writer_that_our_own_check_did_not_see(person: Person) -> None:
    """Past vmctl, by virsh; and what vmctl does with disks it does under leases as well."""
    for name in ("lease-1", "lease-2"):
        person.vmctl("create", name, "--image", "micro", "--no-start", "--memory", "64M")
    made = person.json("disk", "create", "leased", "4M", "--format", "raw")
    assert person.json("disk", "show", "leased")["leases"] == "virtlockd"
    person.vmctl("disk", "attach", "lease-1", "leased")
    words = ["attach-disk", "lease-2", made["path"], "vdz", "--config", "--driver", "qemu", "--subdriver", "raw"]
    person.run("virsh", "-q", "-c", "qemu:///session", *words)
    person.vmctl("start", "lease-1")
    assert "running VM lease-1 writes it" in person.vmctl("start", "lease-2", check=5).stderr
    told = person.run("virsh", "-q", "-c", "qemu:///session", "start", "lease-2", check=1).stderr
    assert "lock" in told.lower() and made["path"] in told, told
    person.vmctl("disk", "resize", "lease-1:leased", "8M", check=4)
    person.vmctl("disk", "resize", f"lease-1:{made['path']}", "8M")
    person.vmctl("delete", "lease-1", "lease-2", "--yes")
    person.vmctl("disk", "delete", "leased", "--yes")


@pytest.mark.timeout(600)
def test_clones_and_forks_without_root(person: Person) -> None:
    person.vmctl("create", "first", "--image", "micro", "--wait", "agent")
    made = person.json("fork", "first", "second")
    assert made[0]["address"] == "127.0.0.1"
    for name in ("first", "second"):
        assert person.vmctl("exec", name, "--", "hostname").stdout == f"{name}\n"
    ports = {row["name"]: row["address"] for row in person.json("list")}
    assert len(set(ports.values())) == 2
    person.vmctl("stop", "second", "--force")
    person.vmctl("clone", "second", "third", "--start")
    person.vmctl("wait", "third", "--for", "ssh", "--timeout", "200")
    assert person.vmctl("exec", "third", "--", "hostname").stdout == "third\n"
    person.vmctl("delete", "first", "second", "third", "--yes")
    assert person.run("virsh", "-q", "-c", "qemu:///session", "vol-list", "vmctl").stdout.strip() == ""


def test_disks_and_cards_are_measured(person: Person) -> None:
    """With the image for it, and namespaces: nothing of it needs root."""
    person.vmctl("image", "build", "bench")
    words = ["--rounds", "1", "--length", "50", "--size", "8", "--device", "virtio-blk", "--backend", "null"]
    found = person.json("bench", "io", *words)
    rows = {row["name"]: row for row in found["rows"]}
    assert found["complete"] and rows["virtio-blk null"]["measures"] and rows["virtio-blk null"]["counted"], rows
    words = ["--rounds", "1", "--card", "virtio-net", "--path", "tap", "--path", "user"]
    rows = {row["name"]: row for row in person.json("bench", "net", *words)["rows"]}
    assert rows["virtio-net user"]["measures"], rows
    shut = Path("/dev/net/tun").stat().st_mode & 0o006 != 0o006
    assert rows["virtio-net tap"]["skipped"] == ("this user may not open /dev/net/tun" if shut else ""), rows
    person.vmctl("image", "delete", "bench", "--yes")


def test_kvm_is_judged_for_this_user(person: Person) -> None:
    evidence = {c["name"]: c for c in person.json("host", "info")["accel"]["kvm"]["evidence"]}
    if "open-qemu-user" not in evidence:
        pytest.skip("this machine has no /dev/kvm")
    assert evidence["open-qemu-user"]["result"] == "skipped"


def test_any_user_builds_the_same_bytes_as_root(person: Person) -> None:
    """Another user, another folder, another time: the same digests."""
    (theirs,) = person.json("image", "list")
    (roots,) = [image for image in Shell().json("image", "list") if image["name"] == "micro"]
    same = ("digest", "disk_digest", "kernel_sha256", "initrd_sha256", "cmdline", "software", "size")
    assert {key: theirs[key] for key in same} == {key: roots[key] for key in same}


def test_an_image_nobody_needs_is_deleted_whole(person: Person) -> None:
    person.vmctl("delete", "*", "--yes", check=None)
    person.vmctl("image", "delete", "micro", check=2)
    person.vmctl("image", "delete", "micro", "--yes")
    assert person.json("image", "list") == []
    assert person.run("virsh", "-q", "-c", "qemu:///session", "vol-list", "vmctl-images").stdout.strip() == ""
    person.vmctl("image", "delete", "micro", "--yes", check=4)
    assert "vmctl image build micro" in person.vmctl("create", "x", "--image", "micro", check=4).stderr
