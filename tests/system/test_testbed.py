"""The testbed itself: hosts that are hosts, faults that are faults, and nothing left of it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts import Machine, Testbed, booted
from tests.hosts.machine import CommandFailed, sh
from tests.system.conftest import REPO

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def bed(make_testbed: Callable[..., Testbed]) -> Testbed:
    return make_testbed(3, shared=True, tls=True)


def virsh(uri: str, *words: str, check: bool = True) -> str:
    # After a start without a cache libvirt asks each emulator what it can, a minute and more on a busy machine.
    return sh("virsh", "-q", "-c", uri, *words, check=check, timeout=240).stdout.strip()


def milliseconds(address: str) -> float:
    """The best of some TCP handshakes with its sshd."""

    def once() -> float:
        began = time.monotonic()
        with socket.create_connection((address, 22), timeout=5):
            return 1000 * (time.monotonic() - began)

    return min(once() for _ in range(4))


def lets_through(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=1):
            return True
    except OSError:
        return False


def reaches(one: Machine, other: Machine) -> bool:
    argv = ("timeout", "1", "bash", "-c", f": </dev/tcp/{other.address}/22")
    return bool(one.run(*argv, check=False).returncode == 0)


def test_each_is_a_host_of_its_own(bed: Testbed) -> None:
    said = [one.run("sh", "-c", "hostname; cat /etc/machine-id").stdout for one in bed.machines]
    assert len(set(said)) == 3 and [words.split()[0] for words in said] == ["h1", "h2", "h3"]
    uuids = {virsh(one.tcp_uri, "capabilities").partition("<uuid>")[2].partition("<")[0] for one in bed.machines}
    assert len(uuids) == 3
    first, second = bed.machines[:2]
    first.run(
        "sh", "-c", "echo one >/var/lib/libvirt/vmctl/token; echo own >/var/lib/libvirt/own; touch /run/own /tmp/own"
    )
    assert second.run("cat", "/var/lib/libvirt/vmctl/token").stdout == "one\n"
    for path in ("/var/lib/libvirt/own", "/run/own", "/tmp/own"):
        assert second.run("test", "-e", path, check=False).returncode == 1
    assert not Path("/var/lib/libvirt/own").exists()


def test_every_way_to_it(bed: Testbed, tmp_path: Path) -> None:
    first, second = bed.machines[:2]
    assert virsh(first.tcp_uri, "hostname") == "h1"
    assert virsh(first.tls_uri, "hostname") == "h1"
    assert second.run("virsh", "-c", first.peer_uri, "hostname").stdout.strip() == "h1"
    assert second.run("virsh", "-c", "qemu+tls://h1/system", "hostname").stdout.strip() == "h1"
    ssh = ["ssh", "-i", str(bed.key), "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]
    pinned = sh(*ssh, "-o", f"UserKnownHostsFile={bed.known_hosts}", f"root@{first.address}", "virsh", "hostname")
    assert pinned.stdout.strip() == "h1"
    wrong = tmp_path / "known"
    wrong.write_text(f"{first.address} {second.host_key}\n")
    assert sh(*ssh, "-o", f"UserKnownHostsFile={wrong}", f"root@{first.address}", "true", check=False).returncode == 255


def test_the_cable(bed: Testbed) -> None:
    first, second = bed.machines[:2]
    assert milliseconds(first.address) < 20
    first.slow(delay_ms=40)
    try:
        assert 80 <= milliseconds(first.address) < 200
        assert virsh(first.tcp_uri, "hostname") == "h1"
        first.slow(loss_percent=100)
        assert not lets_through(first.address)
    finally:
        first.slow()
    assert milliseconds(first.address) < 20
    first.cut()
    assert not lets_through(first.address)
    first.mend()
    assert lets_through(first.address)
    first.cut_from(second)
    assert not reaches(first, second) and not reaches(second, first)
    assert lets_through(first.address) and lets_through(second.address)
    first.mend_from(second)
    assert reaches(first, second)


def test_bandwidth(bed: Testbed) -> None:
    first, second = bed.machines[:2]

    def seconds() -> float:
        began = time.monotonic()
        first.run("sh", "-c", "head -c 4000000 /dev/zero | ssh h2 'cat >/dev/null'")
        return time.monotonic() - began

    first.limit("20mbit")
    try:
        assert 1.2 < seconds() < 10
    finally:
        first.limit(None)
    assert "tbf" not in first.run("tc", "qdisc", "show").stdout


def test_daemons_power_and_disk(bed: Testbed) -> None:
    third = bed.machines[2]
    third.kill("libvirtd", signal.SIGSTOP)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            sh("virsh", "-c", third.tcp_uri, "list", timeout=3)
    finally:
        third.kill("libvirtd", signal.SIGCONT)
    assert virsh(third.tcp_uri, "hostname") == "h3"
    third.kill("libvirtd")
    assert sh("virsh", "-c", third.tcp_uri, "list", check=False).returncode
    third.start("libvirtd")
    assert virsh(third.tcp_uri, "hostname") == "h3"
    third.resize_disk("1M")
    with pytest.raises(CommandFailed, match="No space left"):
        third.run("dd", "if=/dev/zero", "of=/var/lib/libvirt/full", "bs=1M", "count=4")
    third.resize_disk("1G")
    third.run("rm", "/var/lib/libvirt/full")

    key, uuid = third.host_key, virsh(third.tcp_uri, "capabilities").partition("<uuid>")[2][:36]
    third.run("sh", "-c", "echo stays >/var/lib/libvirt/stays; touch /run/goes")
    third.lose_power()
    assert not third.up and not lets_through(third.address)
    third.boot()
    third.wait_until_up()
    assert third.run("cat", "/var/lib/libvirt/stays").stdout == "stays\n"
    assert third.run("test", "-e", "/run/goes", check=False).returncode == 1
    assert third.host_key == key and virsh(third.tcp_uri, "capabilities").partition("<uuid>")[2][:36] == uuid


def test_two_at_once_and_a_killed_one(bed: Testbed) -> None:
    script = (
        "import signal, sys, time\nfrom tests.hosts import booted\nwith booted(1) as bed:\n"
        "    print(bed.number, bed.machines[0].tcp_uri, flush=True)\n    signal.pause()\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=REPO)
    assert other.stdout is not None
    number, uri = other.stdout.readline().split()
    assert int(number) != bed.number
    assert virsh(uri, "hostname") == "h1" and virsh(bed.machines[0].tcp_uri, "hostname") == "h1"
    other.kill()
    other.wait()
    other.stdout.close()
    deadline = time.monotonic() + 10
    while sh("virsh", "-c", uri, "list", check=False).returncode == 0:
        assert time.monotonic() < deadline, "a host outlives its testbed"
    with booted(1) as again:
        assert again.number == int(number)
        bridge, folder = again.bridge, again.folder
    assert sh("ip", "link", "show", bridge, check=False).returncode
    assert not folder.exists() and f"{folder}/" not in Path("/proc/self/mounts").read_text()
    assert virsh(bed.machines[1].tcp_uri, "hostname") == "h2"


def test_by_hand_it_clears_up_when_it_is_ended_and_after_others_that_could_not() -> None:
    up = [sys.executable, "-m", "tests.hosts", "up", "1", "--", "sh", "-c", 'echo "$BED"; exec sleep 600']
    begun = [subprocess.Popen(up, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO) for _ in "ab"]
    folders = []
    for one in begun:
        assert one.stdout is not None
        folders.append(Path(one.stdout.readline().strip()))
    for one, number, code in zip(begun, (signal.SIGTERM, signal.SIGKILL), (143, -9), strict=True):
        one.send_signal(number)
        said = one.communicate(timeout=60)[1]
        assert one.returncode == code and "Traceback" not in said
    assert not folders[0].exists() and folders[1].exists()
    listed = sh(*up[:5], "--", "vmctl", "host", "list", "-o", "json", cwd=REPO)
    assert [(one["name"], one["state"]) for one in json.loads(listed.stdout)] == [("h1", "up")]
    none = sh(*up[:5], "--", "no-such-command", check=False, cwd=REPO)
    assert none.returncode == 127 and "cannot run no-such-command: No such file" in none.stderr
    assert not folders[1].exists(), "whichever number the last one had"
