"""Disks on a network, served on loopback in user space: NBD by qemu-nbd and nbdkit, iSCSI by tgt, RBD by Ceph."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system import ceph, pattern
from tests.system.conftest import Shell
from vmctl.hosts import open_host
from vmctl.hypervisor import disks
from vmctl.wait import wait_until

pytestmark = pytest.mark.system

IQN = "iqn.2024-01.test.vmctl:disks"


@pytest.fixture(scope="module")
def vm() -> Iterator[str]:
    """A running guest."""
    shell, chosen = Shell(), f"remote-{os.getpid()}"
    shell.guest(chosen)
    yield chosen
    shell.run("delete", chosen, "--yes")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def serving(server: subprocess.Popen[bytes], port: int) -> None:
    def ready() -> bool:
        assert server.poll() is None, "the server ended"
        return answers(port)

    wait_until(ready, what="the server", timeout_s=20)


@pytest.fixture(params=["nbdkit", "qemu-nbd"])
def nbd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and file of an NBD export of 16 MiB."""
    file, port = tmp_path / "export.raw", free_port()
    file.write_bytes(bytes(16 << 20))
    argv = {
        "nbdkit": ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "-e", "data", "file", str(file)],
        "qemu-nbd": ["qemu-nbd", "-t", "-b", "127.0.0.1", "-p", str(port), "-x", "data", "-f", "raw", str(file)],
    }[request.param]
    server = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        serving(server, port)
        yield f"nbd://127.0.0.1:{port}/data", file
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def iscsi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Portal and file of an iSCSI target whose LUN 1 has 16 MiB."""
    tgtd = shutil.which("tgtd") or "/usr/sbin/tgtd"
    file, port = tmp_path_factory.mktemp("iscsi") / "lun.raw", free_port()
    file.write_bytes(bytes(16 << 20))
    server = subprocess.Popen(
        [tgtd, "-f", "--iscsi", f"portal=127.0.0.1:{port}"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def admin(*words: str) -> None:
        base = ["tgtadm", "--lld", "iscsi"]
        subprocess.run([*base, *words], check=True, timeout=20, capture_output=True)

    try:
        serving(server, port)
        admin("--mode", "target", "--op", "new", "--tid", "1", "--targetname", IQN)
        admin("--mode", "logicalunit", "--op", "new", "--tid", "1", "--lun", "1", "--backing-store", str(file))
        admin("--mode", "target", "--op", "bind", "--tid", "1", "--initiator-address", "127.0.0.1")
        yield f"127.0.0.1:{port}", file
    finally:
        server.kill()  # asked politely it goes on while it has a target
        server.wait(20)


@pytest.fixture(params=["none", "cephx"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ceph.Cluster]:
    """A Ceph cluster with an image of 16 MiB."""
    with ceph.cluster(tmp_path, free_port(), request.param) as found:
        found.run("rbd", "create", "rbd/one", "--size", "16M")
        yield found


def written_through(shell: Shell, vm: str, address: str, file: Path | Callable[[], Path]) -> None:
    """Plug it in, write, unplug: the server's file has it; plug it in again: the guest reads it."""
    data = pattern.blocks(address, 256)
    done = shell.json("disk", "attach", vm, address, "--serial", "net")
    assert done["guest"] and done["source"] == address
    pattern.write(vm, f"/dev/{done['guest']}", data, at=16)
    listed = [one for one in shell.json("disk", "list", vm) if one["serial"] == "net"]
    assert [(one["source"], one["capacity"]) for one in listed] == [(address, 16 << 20)]
    shell.run("disk", "detach", f"{vm}:net")
    stored = file() if callable(file) else file
    with stored.open("rb") as reading:
        reading.seek(16 * pattern.BLOCK)
        assert reading.read(len(data)) == data
    again = shell.json("disk", "attach", vm, address)
    assert pattern.holds(shell, vm, f"/dev/{again['guest']}", data, at=16)
    assert "no file" in shell.run("disk", "map", f"{vm}:{again['target']}", check=8).stderr
    shell.run("disk", "detach", f"{vm}:{again['target']}")


def test_nbd(shell: Shell, vm: str, nbd: tuple[str, Path]) -> None:
    written_through(shell, vm, *nbd)


def test_iscsi_by_qemus_own_initiator(shell: Shell, vm: str, iscsi: tuple[str, Path]) -> None:
    written_through(shell, vm, f"iscsi://{iscsi[0]}/{IQN}/1", iscsi[1])


@pytest.mark.parametrize("cluster", ["none"], indirect=True)
def test_rbd_by_qemus_own_client(shell: Shell, vm: str, cluster: ceph.Cluster, tmp_path: Path) -> None:
    def exported() -> Path:
        cluster.run("rbd", "export", "rbd/one", str(tmp_path / "one.raw"))
        return tmp_path / "one.raw"

    written_through(shell, vm, f"rbd://127.0.0.1:{cluster.port}/rbd/one", exported)


@pytest.fixture
def secret(shell: Shell, cluster: ceph.Cluster, tmp_path: Path) -> Iterator[str]:
    """libvirt's secret with the key of the user admin."""
    found = f"{uuid.uuid4()}"
    kind = '<usage type="ceph"><name>admin</name></usage>'
    (tmp_path / "secret.xml").write_text(f'<secret private="yes"><uuid>{found}</uuid>{kind}</secret>')
    (tmp_path / "key").write_text(cluster.run("ceph", "auth", "get-key", "client.admin"))
    shell.virsh("secret-define", str(tmp_path / "secret.xml"))
    shell.virsh("secret-set-value", found, "--file", str(tmp_path / "key"))
    yield found
    shell.virsh("secret-undefine", found)


@pytest.mark.parametrize("cluster", ["cephx"], indirect=True)
def test_a_pool_of_rbd_images(shell: Shell, vm: str, cluster: ceph.Cluster, secret: str, tmp_path: Path) -> None:
    """A disk out of it shows Ceph the key that the pool does: without one this cluster answers nobody."""
    words = ["--type", "rbd", "--host", "127.0.0.1", "--port", str(cluster.port), "--source-name", "rbd"]
    shell.run("disk", "pool", "create", "images", *words, "--user", "admin", "--secret", secret)
    try:
        told = shell.run("disk", "create", "images/two", "8M", "--format", "qcow2", check=2)
        assert "a pool of type rbd is raw" in told.stderr
        shell.run("disk", "create", "images/two", "8M")
        address = f"rbd://127.0.0.1:{cluster.port}/rbd/two"
        volumes = shell.json("disk", "pool", "show", "images")["volumes"]
        assert [(one["name"], one["capacity"]) for one in volumes] == [("one", 16 << 20), ("two", 8 << 20)]
        done = shell.json("disk", "attach", vm, "images/two", "--serial", "two")
        assert done["source"] == address and done["guest"]
        data = pattern.blocks("rbd", 64)
        pattern.write(vm, f"/dev/{done['guest']}", data, at=16)
        shell.run("disk", "delete", "images/two", "--yes", check=5)
        shell.run("disk", "detach", f"{vm}:two")
        cluster.run("rbd", "export", "rbd/two", str(tmp_path / "two.raw"))
        assert (tmp_path / "two.raw").read_bytes()[16 * pattern.BLOCK :].startswith(data)
        shell.run("disk", "resize", "images/two", "+8M")
        assert json.loads(cluster.run("rbd", "info", "rbd/two", "--format", "json"))["size"] == 16 << 20
        shell.run("disk", "delete", "images/two", "--yes")
        assert cluster.run("rbd", "ls", "rbd").split() == ["one"]
    finally:
        shell.run("disk", "pool", "delete", "images", "--yes")


def test_a_pool_of_iscsi_luns_without_the_kernels_help(shell: Shell, iscsi: tuple[str, Path]) -> None:
    host, port = iscsi[0].split(":")
    words = ["--type", "iscsi-direct", "--host", host, "--port", port, "--iqn", IQN]
    shell.run("disk", "pool", "create", "luns", *words, "--initiator", "iqn.2024-01.test.vmctl:me")
    try:
        shown = shell.json("disk", "pool", "show", "luns")
        # libvirt 9.0 takes the number of the last sector for their count.
        assert any((16 << 20) - 512 <= one["capacity"] <= 16 << 20 for one in shown["volumes"])
    finally:
        shell.run("disk", "pool", "delete", "luns", "--yes")


def test_a_disk_of_a_network_is_written_by_one_running_vm_only(
    shell: Shell, vm: str, name: str, nbd: tuple[str, Path]
) -> None:
    """No lock of QEMU's or of virtlockd's knows of this: only our own check does."""
    address = nbd[0]
    done = shell.json("disk", "attach", vm, address)
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("disk", "attach", name, address, "--next-start", check=5)
    shell.run("disk", "detach", f"{vm}:{done['target']}")
    shell.run("disk", "attach", name, address)
    shell.run("disk", "attach", vm, address)
    told = shell.run("start", name, check=5)
    assert f"running VM {vm} writes it" in told.stderr
    shell.run("disk", "detach", f"{vm}:{address}")


def test_what_is_on_a_network_is_not_rewritten_nor_what_is_based_on_it(
    shell: Shell, vm: str, nbd: tuple[str, Path], tmp_path: Path
) -> None:
    """Refused with what is true of it, also while the guest runs, and nothing is left of it; others' jobs go on."""
    address, data = nbd[0], pattern.blocks("below", 64)
    target = shell.json("disk", "attach", vm, address)["target"]
    for where in (f"{vm}:{target}", f"{vm}:{address}"):
        for verb in (["flatten"], ["rebase", "--onto", f"{vm}:vda"], ["move", "--pool", "vmctl"], ["map"]):
            assert "but on a network" in shell.run("disk", verb[0], where, *verb[1:], check=8).stderr
    for words in (["flatten", address], ["create", "over", "--backing", address], ["delete", address, "--yes"]):
        told = shell.run("disk", *words, check=2).stderr
        assert "but on a network" in told and "VM:TARGET" in told
    pattern.write(vm, f"/dev/{target}", data, at=16)
    shell.run("disk", "detach", f"{vm}:{target}")
    over = Path("/var/lib/libvirt/vmctl/vmctl/over-network.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", address, "-F", "raw", str(over)], check=True)
    (tmp_path / "disk.xml").write_text(
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{over}'/>"
        "<target dev='vdf' bus='virtio'/><serial>over</serial></disk>"
    )
    try:
        shell.virsh("attach-device", vm, str(tmp_path / "disk.xml"))
        device = wait_until(lambda: found(shell, vm, "over") or None, what="the disk in the guest", timeout_s=30)
        for words in (["flatten"], ["flatten", "--dry-run"], ["move", "--pool", "vmctl"]):
            told = shell.run("disk", words[0], f"{vm}:over", *words[1:], check=10).stderr
            assert f"its backing file {address} is in no storage pool" in told and "hint" not in told
        with open_host() as host:  # what the verb would do, were it one that vmctl made
            disks.pull(host.conn, vm, "vdf", "", lambda _job: None)
        assert pattern.holds(shell, vm, f"/dev/{device}", data, at=16)
        shell.run("disk", "flatten", f"{vm}:over")  # is flat already
        shell.run("disk", "detach", f"{vm}:over")
        subprocess.run(["qemu-img", "check", "-q", str(over)], check=True)
    finally:
        over.unlink()


def found(shell: Shell, vm: str, serial: str) -> str:
    """The guest's name of a disk, "" while it has none."""
    look = f'cd /sys/block; for d in vd*; do [ "$(cat $d/serial)" = {serial} ] && echo $d; done; true'
    return shell.run("exec", vm, "--", "sh", "-c", look).stdout.strip()
