"""Backups of running and stopped VMs: chains that restore to what the guest wrote, and what needs a full one."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system import pattern
from tests.system.conftest import REPO, Shell, volumes
from vmctl import backup_verify, disk_xml
from vmctl.wait import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

COUNT = 2 << 20 >> 12  # blocks of 4 KiB that each test writes


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder for backups."""
    return tmp_path / "backups"


def created(shell: Shell, vm: str) -> str:
    """A running VM with a disk of 64 MiB that its guest has as vdb or vdc."""
    shell.guest(vm)
    shell.run("wait", vm, "--for", "agent")
    shell.run("disk", "attach", vm, "64M", "--serial", "data")
    return vm


@contextmanager
def gone_afterwards(name: str) -> Iterator[None]:
    """All of that VM is."""
    shell = Shell()
    before = volumes(shell)
    yield
    shell.run("delete", name, "--yes", "--missing-ok", check=None)
    assert volumes(shell) == before
    assert name not in shell.virsh("list", "--all", "--name").split()


@pytest.fixture
def vm(shell: Shell, name: str) -> Iterator[str]:
    """A VM of the test's own, with which it may do anything."""
    with gone_afterwards(name):
        yield created(shell, name)


@pytest.fixture
def off(shell: Shell, name: str) -> Iterator[str]:
    """One that was never started."""
    with gone_afterwards(name):
        shell.run("create", name, "--image", "micro", "--no-start")
        shell.run("disk", "attach", name, "64M", "--serial", "data")
        yield name


@pytest.fixture(scope="module")
def lasting() -> Iterator[str]:
    """A VM for the tests that leave theirs able to go on."""
    name = f"t-{secrets.token_hex(4)}"
    with gone_afterwards(name):
        yield created(Shell(), name)


@pytest.fixture
def guest(shell: Shell, lasting: str) -> str:
    """The VM that lasts, running, its disk empty, with no checkpoint of another test's backups."""
    if shell.virsh("domstate", lasting) != "running":
        shell.run("start", lasting)
        shell.run("wait", lasting, "--for", "agent", "--timeout", "120")
    for one in checkpoints(shell, lasting):
        shell.virsh("checkpoint-delete", lasting, one)
    zeros = f"dd if=/dev/zero of={device()} bs=1M count=8 conv=notrunc,fsync"  # no test writes further
    shell.run("exec", lasting, "--", "sh", "-c", zeros)
    return lasting


def device(serial: str = "data") -> str:
    """The guest's name of a disk, as a word for its shell."""
    return f'$(cd /sys/block; for d in *; do [ "$(cat $d/serial 2>/dev/null)" = {serial} ] && echo /dev/$d; done)'


def write(shell: Shell, vm: str, seed: str, count: int = COUNT, *, at: int = 0) -> bytes:
    data = pattern.blocks(seed, count)
    pattern.write(vm, device(), data, at=at)
    return data


def backup(shell: Shell, vm: str, store: Path, *words: str) -> Any:
    """Make a backup; the result."""
    return shell.json("backup", "create", vm, "--folder", str(store), *words)


def disk_of(shell: Shell, vm: str, serial: str = "data") -> disk_xml.DiskDevice:
    (found,) = [d for d in disk_xml.read(shell.virsh("dumpxml", vm, "--inactive")) if d.serial == serial]
    return found


def holds(shell: Shell, vm: str, data: bytes, *, at: int = 0) -> None:
    """Assert that the data disk of a stopped VM is a whole one that names no other file, and holds ``data``."""
    disk = disk_of(shell, vm)
    if disk.format == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", disk.source], check=True, timeout=60)
        info = json.loads(
            subprocess.run(["qemu-img", "info", "--output=json", disk.source], check=True, capture_output=True).stdout
        )
        assert "backing-filename" not in info
    raw = Path(f"/tmp/raw-{secrets.token_hex(4)}")
    subprocess.run(
        ["qemu-img", "convert", "-f", disk.format, "-O", "raw", disk.source, str(raw)], check=True, timeout=60
    )
    with raw.open("rb") as file:
        file.seek(at * pattern.BLOCK)
        assert hashlib.sha256(file.read(len(data))).digest() == hashlib.sha256(data).digest()
    raw.unlink()


def verified(vm: str, store: Path) -> list[str]:
    """The ids of all backups, each of which is good."""
    found = backup_verify.verify(store / vm, (), lambda _event: None)  # in this process: it is asked after each fault
    assert all(not one.problems for one in found), found
    return [one.id for one in found]


def checkpoints(shell: Shell, vm: str) -> list[str]:
    return shell.virsh("checkpoint-list", vm, "--name").split()


def restored(shell: Shell, vm: str, store: Path, point: str, name: str) -> str:
    shell.run("backup", "restore", vm, point, "--as", name, "--folder", str(store))
    return name


def test_each_point_of_a_chain_restores_to_what_the_guest_had_then(
    shell: Shell, guest: str, store: Path, names: Any
) -> None:
    shell.run("disk", "attach", guest, "8M", "--serial", "plain")
    points = []
    for number, words in enumerate(([], ["--freeze"], ["--compress", "zstd"], ["--compress", "zlib"])):
        write(shell, guest, f"{number}", COUNT // 2, at=number * COUNT // 4)
        # What the guest discards or zeroes is a change too.
        if number == 2:
            zeros = f"dd if=/dev/zero of={device()} bs=64k count=4 conv=fsync,notrunc"
            shell.run("exec", guest, "--", "sh", "-c", zeros)
        made = backup(shell, guest, store, *words)
        points.append(made["id"])
        assert made["kind"] == ("full" if number == 0 else "incremental"), made
        assert made["consistency"] == ("frozen" if words == ["--freeze"] else "crash")
        assert checkpoints(shell, guest) == [one for one in checkpoints(shell, guest) if made["id"] in one]
    proved = shell.json("backup", "verify", guest, "--folder", str(store))
    assert [one["id"] for one in proved] == points and not any(one["problems"] for one in proved)
    assert "nothing was frozen" in shell.run("thaw", guest).stdout
    rows = shell.json("backup", "list", "--folder", str(store))
    assert [row["id"] for row in rows] == points and rows[3]["needs"] == points[:3]
    want = bytearray(64 << 20)
    for number, point in enumerate(points):
        block = pattern.blocks(f"{number}", COUNT // 2)
        want[number * COUNT // 4 * 4096 : number * COUNT // 4 * 4096 + len(block)] = block
        if number == 2:
            want[: 4 << 16] = bytes(4 << 16)
        copy = restored(shell, guest, store, point, names())
        holds(shell, copy, bytes(want))
    shell.run("disk", "detach", f"{guest}:plain", "--delete", "--yes")


def test_a_restore_over_the_old_vm_names_what_is_lost_and_brings_all_back(
    shell: Shell, guest: str, store: Path
) -> None:
    data = write(shell, guest, "kept")
    shell.run("exec", guest, "--", "sh", "-c", "echo kept >/root/file; sync")
    point = backup(shell, guest, store, "--freeze")["id"]
    write(shell, guest, "lost")
    shell.run("exec", guest, "--", "sh", "-c", "rm /root/file; sync")
    xml = shell.virsh("dumpxml", guest, "--inactive")
    refused = shell.run("backup", "restore", guest, "--folder", str(store), check=6)
    assert "it is running" in refused.stderr
    shell.run("stop", guest)
    old = {disk_of(shell, guest).source, disk_of(shell, guest, "root").source}
    asked = shell.run("backup", "restore", guest, "--folder", str(store), check=2, stdin=subprocess.DEVNULL)
    assert all(path in asked.stderr for path in old) and "--yes" in asked.stderr
    dry = shell.run("backup", "restore", guest, point, "--folder", str(store), "--dry-run").stdout
    assert "would start" not in dry
    words = ("backup", "restore", guest, point, "--folder", str(store), "--as", "other", "--start", "--dry-run")
    assert shell.run(*words).stdout.endswith("would start VM other\n")
    assert "would lose what VM" in dry and shell.virsh("dumpxml", guest, "--inactive") == xml
    shell.run("backup", "restore", guest, point, "--folder", str(store), "--yes")
    holds(shell, guest, data)
    assert not any(Path(path).exists() for path in old) and checkpoints(shell, guest) == []
    shell.run("start", guest)
    shell.run("wait", guest, "--for", "agent", "--timeout", "120")
    assert shell.run("exec", guest, "--", "cat", "/root/file").stdout == "kept\n"
    assert pattern.holds(shell, guest, device(), data)
    after = backup(shell, guest, store)
    assert after["kind"] == "full" and "checkpoint" in after["disks"][0]["why"]


def test_a_vm_deleted_by_mistake_comes_back_as_itself(shell: Shell, guest: str, store: Path) -> None:
    data = write(shell, guest, "back")
    was = shell.json("show", guest)
    backup(shell, guest, store)
    shell.run("delete", guest, "--yes")
    shell.run("backup", "restore", guest, "--folder", str(store), "--start")
    shell.run("wait", guest, "--for", "agent", "--timeout", "120")
    now = shell.json("show", guest)
    assert (now["uuid"], now["nics"][0]["mac"], now["address"]) == (was["uuid"], was["nics"][0]["mac"], was["address"])
    assert pattern.holds(shell, guest, device(), data)


def test_a_new_identity_is_another_machine(shell: Shell, guest: str, store: Path, names: Any) -> None:
    backup(shell, guest, store)
    copy = names()
    shell.run("backup", "restore", guest, "--as", copy, "--new-identity", "--start", "--folder", str(store))
    shell.run("wait", copy, "--for", "agent", "--timeout", "120")
    ask = "hostname; cat /etc/machine-id"
    one, two = (shell.run("exec", which, "--", "sh", "-c", ask).stdout.split() for which in (guest, copy))
    assert two[0] == copy and one[1] != two[1]
    old, new = shell.json("show", guest), shell.json("show", copy)
    assert old["ssh_host_key"] != new["ssh_host_key"] and old["nics"][0]["mac"] != new["nics"][0]["mac"]
    assert old["address"] != new["address"]


def test_a_restore_through_libvirt_alone(shell: Shell, guest: str, store: Path, names: Any) -> None:
    data = write(shell, guest, "far")
    backup(shell, guest, store)
    far, copy = Shell("qemu+unix:///system?socket=/run/libvirt/libvirt-sock"), names()
    far.run("backup", "restore", guest, "--as", copy, "--folder", str(store))
    holds(shell, copy, data)


def test_a_stopped_vm_is_backed_up_whole_and_then_by_what_changed(
    shell: Shell, guest: str, store: Path, names: Any
) -> None:
    first = write(shell, guest, "one")
    shell.run("stop", guest)
    assert backup(shell, guest, store)["kind"] == "full"
    again = backup(shell, guest, store)
    assert (again["kind"], again["consistency"]) == ("incremental", "stopped")
    shell.run("start", guest)
    shell.run("wait", guest, "--for", "agent", "--timeout", "120")
    second = write(shell, guest, "two", at=COUNT)
    live = backup(shell, guest, store)
    assert live["kind"] == "incremental", live
    third = write(shell, guest, "three", at=2 * COUNT)
    shell.run("stop", guest)
    assert backup(shell, guest, store)["kind"] == "incremental"
    verified(guest, store)
    holds(shell, restored(shell, guest, store, "latest", names()), first + second + third)
    holds(shell, restored(shell, guest, store, live["id"], names()), first + second + bytes(len(third)))


def kill_qemu(shell: Shell, guest: str) -> None:
    os.kill(int(Path(f"/run/libvirt/qemu/{guest}.pid").read_text()), signal.SIGKILL)
    while shell.virsh("domstate", guest) == "running":
        pass


def test_lost_marks_are_found_and_a_full_backup_is_taken(shell: Shell, guest: str, store: Path, names: Any) -> None:
    backup(shell, guest, store)
    # By a crash: what QEMU marked is not in the file.
    write(shell, guest, "one")
    kill_qemu(shell, guest)
    shell.run("start", guest)
    shell.run("wait", guest, "--for", "agent", "--timeout", "120")
    dry = shell.run("backup", "create", guest, "--folder", str(store), "--dry-run").stdout
    refused = shell.run("backup", "create", guest, "--incremental", "--folder", str(store), check=6)
    assert "lost or broken" in refused.stderr and "lost or broken" in dry
    done = shell.run("backup", "create", guest, "--folder", str(store))
    assert "whole: its bitmap" in done.stderr and "full" in done.stdout
    assert backup(shell, guest, store)["kind"] == "incremental"
    # By a resize.
    shell.run("disk", "resize", f"{guest}:data", "+1M")
    made = backup(shell, guest, store)
    assert made["kind"] == "mixed" and [d["why"] for d in made["disks"] if d["why"]] == [made["disks"][-1]["why"]]
    # By somebody's qemu-img.
    two = write(shell, guest, "two")
    shell.run("stop", guest)
    path = disk_of(shell, guest).source
    (mark,) = checkpoints(shell, guest)
    subprocess.run(["qemu-img", "bitmap", "--remove", "-f", "qcow2", path, mark], check=True)
    assert backup(shell, guest, store)["kind"] == "mixed"
    shell.run("start", guest)
    shell.run("wait", guest, "--for", "agent", "--timeout", "120")
    # By a checkpoint taken away.
    for one in checkpoints(shell, guest):
        shell.virsh("checkpoint-delete", guest, one)
    assert backup(shell, guest, store)["kind"] == "full"
    verified(guest, store)
    holds(shell, restored(shell, guest, store, "latest", names()), two)


def test_a_raw_disk_is_taken_whole_each_time(shell: Shell, vm: str, store: Path, names: Any) -> None:
    shell.run("stop", vm)
    shell.run("disk", "convert", f"{vm}:data", "--format", "raw")
    shell.run("start", vm)
    shell.run("wait", vm, "--for", "agent", "--timeout", "120")
    data = write(shell, vm, "raw")
    backup(shell, vm, store)
    made = backup(shell, vm, store)
    assert made["kind"] == "mixed" and "raw disk keeps no bitmap" in made["disks"][-1]["why"]
    copy = restored(shell, vm, store, "latest", names())
    assert disk_of(shell, copy).format == "raw"
    holds(shell, copy, data)


def test_what_is_kept_takes_over_what_it_needs(shell: Shell, guest: str, store: Path, names: Any) -> None:
    want = b""
    for number in range(4):
        want += write(shell, guest, f"{number}", 64, at=number * 64)
        backup(shell, guest, store)
    points = verified(guest, store)
    shell.virsh("pool-define-as", "asleep", "dir", "--target", "/tmp/asleep")
    for dry_run in (["--dry-run"], []):
        words = ("--as", f"{guest}-2", "--pool", "asleep", "--folder", str(store), *dry_run)
        assert "is not active" in shell.run("backup", "restore", guest, *words, check=6).stderr
    shell.virsh("pool-undefine", "asleep")
    dry = shell.json("backup", "prune", guest, "--keep", "2", "--folder", str(store), "--dry-run")
    assert dry == {"delete": points[:2], "merge": [points[2]], "keep": points[2:], "broken": {}}
    assert verified(guest, store) == points
    shell.run("backup", "prune", guest, "--keep", "2", "--folder", str(store), check=2, stdin=subprocess.DEVNULL)
    shell.run("backup", "prune", guest, "--keep", "2", "--folder", str(store), "--yes")
    assert verified(guest, store) == points[2:]
    assert {row["kind"] for row in shell.json("backup", "list", "--folder", str(store))} == {"full", "incremental"}
    holds(shell, restored(shell, guest, store, points[2], names()), want[: 3 * 64 * 4096] + bytes(64 * 4096))
    # The next is an increment all the same, and --keep prunes after it, as its dry run tells.
    told = {}
    for keep in ("1", "2"):
        words = ("backup", "create", guest, "--folder", str(store), "--keep", keep, "--dry-run")
        told[keep] = [one for one in shell.json(*words)["touches"] if one.startswith(("delete", "merge"))]
    assert [Path(one.split()[1]).name for one in told["1"][:2]] == points[2:] and len(told["1"]) == 3
    assert told["1"][2].startswith(f"merge into {store}/{guest}/") and points[3] not in told["1"][2]
    assert told["2"] == [
        f"delete {store}/{guest}/{points[2]}",
        f"merge into {store}/{guest}/{points[3]} what it needs of them",
    ]
    made = backup(shell, guest, store, "--keep", "2")
    assert made["kind"] == "incremental" and made["pruned"] == [points[2]]
    verified(guest, store)
    holds(shell, restored(shell, guest, store, "latest", names()), want)
    assert (
        "nothing to delete" in shell.run("backup", "prune", guest, "--older-than", "1d", "--folder", str(store)).stdout
    )


def test_a_vm_with_marks_is_renamed_and_deleted_as_any(shell: Shell, vm: str, store: Path, names: Any) -> None:
    backup(shell, vm, store)
    other = names()
    shell.run("stop", vm)
    marks = checkpoints(shell, vm)
    shell.run("rename", vm, other)
    files = Path(f"/var/lib/libvirt/qemu/checkpoint/{other}").iterdir()
    assert [one.stem for one in files] == marks == checkpoints(shell, other)  # libvirt knows them after a restart too
    assert backup(shell, other, store)["kind"] == "full"  # under another name there is none before it
    assert len(checkpoints(shell, other)) == 2
    shell.run("rename", other, vm)
    assert backup(shell, vm, store)["kind"] in {"incremental", "full"}


def test_dry_runs_touch_nothing(shell: Shell, guest: str, store: Path) -> None:
    dry = shell.run("backup", "create", guest, "--folder", str(store), "--freeze", "--keep", "1", "--dry-run").stdout
    assert f"would make {store}/{guest}/" in dry and "would freeze" in dry and disk_of(shell, guest).source in dry
    assert not store.exists() and checkpoints(shell, guest) == []


def test_a_vm_of_others_with_uefi_variables(shell: Shell, names: Any, store: Path, tmp_path: Path) -> None:
    one, two, pool = names(), names(), tmp_path / "pool"
    shell.run("disk", "pool", "create", "uefi", "--path", str(pool))
    try:
        for path in (tmp_path, *tmp_path.parents):
            path.chmod(path.stat().st_mode | 0o711)
        variables = Path(f"/var/lib/libvirt/qemu/nvram/{one}.fd")
        variables.parent.mkdir(parents=True, exist_ok=True)
        variables.write_bytes(b"variables" * 1000)
        shell.run("disk", "create", "uefi/root", "8M")
        data = pattern.blocks("uefi", 64)
        (tmp_path / "data").write_bytes(data)
        disk = pool / "root.qcow2"
        words = ["qemu-io", "-f", "qcow2", "-c", f"write -s {tmp_path / 'data'} 0 {len(data)}", str(disk)]
        subprocess.run(words, check=True, capture_output=True)
        xml = tmp_path / "xml"
        xml.write_text(
            f"<domain type='qemu'><name>{one}</name><memory unit='MiB'>64</memory><os firmware='efi'>"
            f"<type arch='x86_64' machine='q35'>hvm</type><nvram>{variables}</nvram><boot dev='hd'/></os>"
            "<features><acpi/></features><devices>"
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>"
            "<target dev='vda' bus='virtio'/><serial>data</serial></disk></devices></domain>"
        )
        shell.virsh("define", str(xml))
        assert backup(shell, one, store)["kind"] == "full"
        assert verified(one, store)
        shell.run("backup", "restore", one, "--as", two, "--pool", "uefi", "--folder", str(store))
        holds(shell, two, data)
        (kept,) = [line for line in shell.virsh("dumpxml", two, "--inactive").splitlines() if "<nvram" in line]
        path = Path(kept.partition(">")[2].partition("<")[0])
        assert path != variables and path.read_bytes() == variables.read_bytes()
    finally:
        for vm in (one, two):
            shell.run("delete", vm, "--yes", "--missing-ok", check=None)
        for left in pool.iterdir():
            left.unlink()
        shell.run("disk", "pool", "delete", "uefi", "--yes", check=None)


def sha(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def root_of(shell: Shell, vm: str) -> tuple[str, str]:
    """The file of a VM's first disk and the one it is based on."""
    found = next(d for d in disk_xml.read(shell.virsh("dumpxml", vm, "--inactive")) if d.target == "vda")
    told = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", found.source], check=True, capture_output=True, timeout=60
    ).stdout
    return found.source, json.loads(told).get("full-backing-filename", "")


def test_what_clones_are_based_on_stays_whoever_is_restored(shell: Shell, off: str, store: Path) -> None:
    """Over the VM that was cloned, and again under the name of one that was cloned and deleted."""
    clone, beside = f"{off}-clone", f"{off}-beside"
    backup(shell, off, store)
    over = ("backup", "restore", off, "--folder", str(store), "--yes")
    try:
        shell.run(*over)
        shell.run("clone", off, clone)
        base = root_of(shell, clone)[1]
        was = sha(base)
        for _ in range(2):
            shell.run(*over)
            assert sha(base) == was
        seeds = [d.source for d in disk_xml.read(shell.virsh("dumpxml", clone, "--inactive")) if d.readonly]
        assert all(clone in seed for seed in seeds), seeds  # its own, not that of the restored one
        subprocess.run(["qemu-img", "check", "-q", root_of(shell, clone)[0]], check=True, timeout=60)
        shell.run("delete", clone, "--yes")

        shell.run(*over, "--as", beside)
        shell.run("clone", beside, clone)
        base = root_of(shell, clone)[1]
        with Path(base).open("ab") as file:
            file.write(b"mark")  # what it holds besides what was backed up
        shell.run("delete", beside, "--yes")
        shell.run(*over, "--as", beside)
        assert Path(base).read_bytes().endswith(b"mark")
        assert root_of(shell, beside)[0] != base
    finally:
        for name in (clone, beside):
            shell.run("delete", name, "--yes", "--missing-ok", check=None)


def test_what_changed_before_a_snapshot_of_a_running_vm_is_in_the_backup_of_the_stopped_one(
    shell: Shell, vm: str, store: Path
) -> None:
    """libvirt lets the new layer mark what changes from then on; what changed before, the one below it tells alone."""
    backup(shell, vm, store)
    data = write(shell, vm, "before")
    shell.run("snapshot", "create", f"{vm}.one", "--no-memory")
    data += write(shell, vm, "after", at=COUNT)
    shell.run("stop", vm)
    told = shell.run("backup", "create", vm, "--folder", str(store)).stderr
    assert "is backed up whole" in told, told
    with gone_afterwards(f"{vm}-back"):
        shell.run("backup", "restore", vm, "--as", f"{vm}-back", "--folder", str(store))
        assert pattern_of(shell, f"{vm}-back", store, len(data)) == data
    shell.run("snapshot", "delete", f"{vm}.one", "--yes")


def pattern_of(shell: Shell, vm: str, folder: Path, size: int) -> bytes:
    """The beginning of what is on a stopped VM's disk."""
    raw = folder.with_name("content.raw")
    words = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk_of(shell, vm).source, str(raw)]
    subprocess.run(words, check=True, timeout=60)
    return raw.read_bytes()[:size]


def test_a_vm_with_snapshots_is_backed_up_without_what_its_disks_are_based_on(
    shell: Shell, guest: str, store: Path
) -> None:
    shell.run("snapshot", "create", f"{guest}.one", "--no-memory")
    made = backup(shell, guest, store)
    folder = next((store / guest).glob("*/manifest.json")).parent
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert not [one["source"] for one in files if one["source"].endswith(".qcow2")], made
    shell.run("snapshot", "delete", f"{guest}.one", "--yes")


def test_a_vm_that_ends_as_its_backup_begins_is_told_of(shell: Shell, name: str, tmp_path: Path) -> None:
    """In one way, whatever libvirt says of it; and the mark that a killed QEMU leaves keeps its disk from nothing."""
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.virsh("start", name, "--paused")
    ending = (
        "import subprocess, sys; from vmctl.hypervisor import backup; from vmctl.cli import run; begin = backup.begin\n"
        "def ended(conn, name, *words):\n"
        "    subprocess.run(['virsh', 'destroy', name], check=True, capture_output=True); begin(conn, name, *words)\n"
        "backup.begin = ended\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    words = ("backup", "create", name, "--folder", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", ending, *words], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 6
    assert done.stderr == (
        f"cannot back up VM {name}: VM {name} ended meanwhile; it is stopped\n"
        "hint: the backups before it are as they were\n"
    )
    assert not shell.virsh("checkpoint-list", name, "--name") and not list((tmp_path / name).glob("*Z"))
    shell.virsh("start", name, "--paused")
    shell.run(*words)
    shell.virsh("destroy", name)
    shell.virsh("start", name, "--paused")  # from now on QEMU has the mark in its memory alone
    pid = int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: shell.virsh("domstate", name) == "shut off", what="its end", timeout_s=30)
    assert "is broken, and removed" in shell.run("disk", "resize", f"{name}:vda", "+1M").stderr
    assert "is backed up whole" in shell.run(*words).stderr
