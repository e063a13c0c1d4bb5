"""Changes of disks stopped by SIGKILL and SIGINT after every step: the disk is there once and holds what it held."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import libvirtd, pattern
from tests.system.conftest import Shell, volumes
from tests.system.test_interrupted import interrupted
from vmctl import disk_xml

pytestmark = pytest.mark.system

DISKS, SECOND = Path("/var/lib/libvirt/vmctl/vmctl"), Path("/var/lib/libvirt/faults")
SIZE = 8 << 20
COUNTS: dict[tuple[str, str], int] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Prints how many faults of each kind a change of a disk survived, when all is over."""
    yield
    print("\n" + "\n".join(f"{change:<18} {fault:<10} {count:>3}" for (change, fault), count in sorted(COUNTS.items())))


@pytest.fixture(scope="module")
def vm() -> Iterator[str]:
    """A VM that is not started, with a linked disk ``data`` of a known content."""
    shell, chosen = Shell(), f"fault-{os.getpid()}"
    before = volumes(shell)
    shell.run("disk", "pool", "create", "faults", "--path", str(SECOND))
    shell.run("create", chosen, "--image", "micro", "--no-start")
    raw = DISKS / "filling.raw"
    raw.write_bytes(pattern.blocks("base", SIZE // pattern.BLOCK))
    words = ["convert", "-f", "raw", "-O", "qcow2", str(raw), str(DISKS / "fault-base.qcow2")]
    subprocess.run(["qemu-img", *words], check=True, timeout=60)
    shell.run("disk", "create", "fault-top", "--backing", "fault-base")
    top = DISKS / "fault-top.qcow2"
    for number, at in ((1, 64 << 10), (2, 5 << 20)):
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", f"write -P {number} {at} 128k", str(top)], check=True, capture_output=True
        )
    raw.unlink()
    shell.run("disk", "attach", chosen, "fault-top", "--serial", "data")
    yield chosen
    shell.run("disk", "detach", f"{chosen}:data", "--delete", "--yes")
    shell.run("disk", "delete", "fault-base", "--yes")
    shell.run("delete", chosen, "--yes")
    shell.run("disk", "pool", "delete", "faults", "--yes")
    assert volumes(shell) == before


def disk_of(shell: Shell, vm: str) -> disk_xml.DiskDevice:
    (found,) = [d for d in disk_xml.read(shell.virsh("dumpxml", vm, "--inactive")) if d.serial == "data"]
    return found


def content(disk: disk_xml.DiskDevice) -> str:
    """Digest of what a guest would read in the first ``SIZE`` bytes."""
    raw = Path("/tmp/content.raw")
    words = ["convert", "-f", disk.format, "-O", "raw", disk.source, str(raw)]
    subprocess.run(["qemu-img", *words], check=True, timeout=60)
    if disk.format == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", disk.source], check=True, timeout=60)
    return hashlib.sha256(raw.read_bytes()[:SIZE]).hexdigest()


def files() -> set[str]:
    """All there is of the disk, and of work on it."""
    data = Path.home() / ".local/share/vmctl"
    folders = (DISKS, SECOND, data / "disk-journal", data / "pull-journal")
    names = {str(one) for folder in folders if folder.exists() for one in folder.iterdir()}
    return {one for one in names if "fault-top" in one or ".vmctl-" in one or "journal" in one}


DATA = "VM:data"
CHANGES = {
    "move": (["move", DATA, "--pool", "faults"], ["move", DATA, "--pool", "vmctl"]),
    "convert": (["convert", DATA, "--format", "raw"], ["convert", DATA, "--format", "qcow2"]),
    "compact": (["compact", DATA], []),
    "grow": (["resize", DATA, "+1M"], []),
    "rebase": (["rebase", DATA, "--onto", "fault-base"], ["flatten", DATA]),
}


@pytest.mark.parametrize("which", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_stopped_after_every_step_the_disk_is_there_once_and_holds_what_it_held(
    shell: Shell, vm: str, tmp_path: Path, change: str, which: str
) -> None:
    do, undo = ([word.replace("VM", vm) for word in words] for words in CHANGES[change])
    want = content(disk_of(shell, vm))
    at = 0
    while True:
        at += 1
        before = disk_of(shell, vm)
        code, steps = interrupted(tmp_path, which, at, "disk", *do)
        if code == 0 and len(steps) < at:
            break
        assert code in {-signal.SIGKILL, 130}, (code, steps)
        if which == "SIGKILL":
            shell.run("doctor", "--fix", check=None)
        now = disk_of(shell, vm)
        assert files() == {now.source}, f"after {steps}"
        assert content(now) == want, f"after {steps}"
        if undo and (now.source, now.format) != (before.source, before.format):
            shell.run("disk", *undo)
        COUNTS[f"{change}, stopped", which] = at
    assert at >= 2 and content(disk_of(shell, vm)) == want
    if undo:
        shell.run("disk", *undo)


LIVE = {
    "flatten": (["flatten", DATA], ["rebase", DATA, "--onto", "fault-base"]),
    "grow": CHANGES["grow"],
    "move": CHANGES["move"],
}


@pytest.mark.parametrize("which", ["SIGKILL", "LIBVIRTD", "QEMU"])
@pytest.mark.parametrize("change", sorted(LIVE))
def test_while_its_vm_runs_whatever_dies_at_whatever_step(
    shell: Shell, vm: str, tmp_path: Path, change: str, which: str
) -> None:
    """The VM is held at its first instruction: QEMU has the disk, and nobody else writes to it."""
    do, undo = ([word.replace("VM", vm) for word in words] for words in LIVE[change])
    want, at, over = content(disk_of(shell, vm)), 0, False
    if change == "flatten":
        shell.run("disk", *undo)
    while not over:
        at += 1
        before = disk_of(shell, vm)
        shell.virsh("start", vm, "--paused")
        code, steps = interrupted(tmp_path, which, at, "disk", *do)
        over = len(steps) < at if which == "SIGKILL" else not steps
        assert code == 0 or not over, (code, steps)
        libvirtd.awake()
        said = shell.run("doctor", "--fix", check=None).stdout
        if which == "LIBVIRTD" and libvirtd.revived():
            said = shell.run("doctor", "--fix", check=None).stdout
        state = shell.virsh("domstate", vm)
        if which == "LIBVIRTD" and libvirtd.lost(shell, vm):
            shell.run("doctor", "--fix", check=None)
        else:
            assert state == ("shut off" if which == "QEMU" and not over else "paused"), steps
        for one in libvirtd.choose(shell):
            Path(one.other).unlink()
        if state == "paused":
            running = {d.serial: d.source for d in disk_xml.read(shell.virsh("dumpxml", vm))}
            assert running["data"] == disk_of(shell, vm).source, steps
            shell.virsh("destroy", vm)
        if which == "LIBVIRTD" and "then vmctl doctor --fix" in said:  # QEMU had a file open that libvirt lost sight of
            shell.run("doctor", "--fix", check=None)
        now = disk_of(shell, vm)
        assert files() == {now.source}, f"after {steps}"
        assert content(now) == want, f"after {steps}"
        if undo and (change == "flatten" or now.source != before.source):
            shell.run("disk", *undo)
        COUNTS[f"{change}, running", which] = at - 1
    assert at >= 2


def test_a_plug_killed_after_every_step_leaves_nothing_that_does_not_go_with_the_vm(
    shell: Shell, name: str, tmp_path: Path
) -> None:
    before = volumes(shell)
    at = 0
    while True:
        at += 1
        shell.run("create", name, "--image", "micro", "--no-start")
        code, steps = interrupted(tmp_path, "SIGKILL", at, "disk", "attach", name, "4M")
        if code == -signal.SIGKILL:
            shell.run("disk", "attach", name, "4M")
        shell.run("delete", name, "--yes")
        assert volumes(shell) == before, f"after {steps}"
        if code == 0:
            break
    assert at >= 3
    COUNTS["attach, stopped", "SIGKILL"] = at - 1


def test_a_plug_into_a_running_vm_killed_after_every_step_is_whole_or_was_not(
    shell: Shell, name: str, tmp_path: Path
) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.virsh("start", name, "--paused")
    before, seen, at = volumes(shell), set(), 0
    while True:
        at += 1
        code, steps = interrupted(tmp_path, "SIGKILL", at, "disk", "attach", name, "4M", "--serial", "new")
        if code == 0:
            break
        shell.run("doctor", "--fix", check=None)
        now, later = (
            {disk.serial for disk in disk_xml.read(shell.virsh("dumpxml", name, *flags))}
            for flags in ((), ("--inactive",))
        )
        assert now == later, f"after {steps}"
        seen.add("new" in now)
        if "new" in now:
            shell.virsh("destroy", name)
            shell.run("disk", "detach", f"{name}:new", "--delete", "--yes")
            shell.virsh("start", name, "--paused")
        assert volumes(shell) == before, f"after {steps}"
    assert seen == {True, False}
    COUNTS["attach, running", "SIGKILL"] = at - 1


def test_what_a_killed_plug_has_made_stays_where_something_was_written_to_it(
    shell: Shell, name: str, tmp_path: Path
) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    before = volumes(shell)
    interrupted(tmp_path, "SIGKILL", 3, "disk", "attach", name, "4M", "--serial", "new")
    (made,) = volumes(shell) - before
    path = str(DISKS / made)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", path], check=True, capture_output=True)
    shell.run("doctor", "--fix", check=None)
    assert made in volumes(shell)
    shell.run("delete", name, "--yes")
    assert made not in volumes(shell)


def test_a_vm_deleted_after_a_killed_move_leaves_no_copy_behind(
    shell: Shell, vm: str, name: str, tmp_path: Path
) -> None:
    before, second, at = volumes(shell), volumes(shell, "faults"), 0
    while True:
        at += 1
        shell.run("create", name, "--image", "micro", "--no-start")
        shell.run("disk", "attach", name, "4M", "--serial", "new")
        code, steps = interrupted(tmp_path, "SIGKILL", at, "disk", "move", f"{name}:new", "--pool", "faults")
        shell.run("delete", name, "--yes")
        unfinished = {one for one in volumes(shell, "faults") if one.startswith(".vmctl-disk-")}
        assert (volumes(shell), volumes(shell, "faults") - unfinished) == (before, second), f"after {steps}"
        if code == 0:
            break
    assert at >= 3
    shell.run("doctor", "--fix", check=None)
    assert volumes(shell, "faults") == second


def test_a_plug_interrupted_after_every_step_is_undone(shell: Shell, name: str, tmp_path: Path) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    before, xml = volumes(shell), shell.virsh("dumpxml", name)
    at = 0
    while True:
        at += 1
        code, steps = interrupted(tmp_path, "SIGINT", at, "disk", "attach", name, "4M")
        if code == 0:
            break
        assert code == 130
        assert (volumes(shell), shell.virsh("dumpxml", name)) == (before, xml), f"after {steps}"
    assert at >= 3
    COUNTS["attach, stopped", "SIGINT"] = at - 1


def test_the_old_file_of_a_killed_move_stays_while_a_disk_is_based_on_it(
    shell: Shell, vm: str, name: str, tmp_path: Path
) -> None:
    """Somebody bases a disk on it before it is removed, as it may be done beside vmctl, too."""
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("disk", "attach", name, "4M", "--serial", "data")
    old = disk_of(shell, name).source
    shell.virsh("start", name, "--paused")
    _, steps = interrupted(tmp_path, "SIGKILL", 3, "disk", "move", f"{name}:data", "--pool", "faults")
    assert steps[-1] == "disks.copy_and_switch", steps
    shell.run("disk", "create", f"{name}-top", "--backing", old)
    told = shell.run("doctor", "--fix", check=None).stderr
    assert f"{old} stays: {name}-top.qcow2 needs it" in told, told
    assert Path(old).exists() and disk_of(shell, name).source != old
    shell.run("disk", "delete", f"{name}-top", "--yes")
    shell.run("delete", name, "--yes")
    assert not Path(old).exists()


def test_two_changes_of_one_disk_at_once_are_done_one_after_the_other(shell: Shell, vm: str) -> None:
    from tests.system.conftest import REPO, VMCTL

    want = content(disk_of(shell, vm))
    for _ in range(3):
        both = [
            subprocess.Popen([*VMCTL, "disk", *words], stderr=subprocess.PIPE, text=True, cwd=REPO)
            for words in (["move", f"{vm}:data", "--pool", "faults"], ["compact", f"{vm}:data"])
        ]
        errors = [process.communicate(timeout=120)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], errors
        now = disk_of(shell, vm)
        assert files() == {now.source} and content(now) == want
        shell.run("disk", "move", f"{vm}:data", "--pool", "vmctl")
