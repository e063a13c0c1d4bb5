"""Snapshots taken, gone back to and deleted while something dies at every step: it happened, or all is as it was.

After each fault: what the disk reads is what was written, by digest; every file is whole; the VM starts; `doctor --fix`
leaves no file that nobody needs. The table of faults tried and survived is printed at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import warm
from tests.system import libvirtd, pattern
from tests.system.conftest import Shell
from tests.system.test_interrupted import interrupted
from vmctl import disk_xml, snapshot_xml

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]

POOL = Path("/var/lib/libvirt/vmctl/vmctl")
JOURNAL = Path.home() / ".local/share/vmctl/snapshot-journal"
BLOCKS = 256
PATTERN = 16
END = "</domainsnapshot>"
DEADLY = {"SIGKILL": -signal.SIGKILL, "SIGINT": 130}
COUNTS: dict[tuple[str, str], list[int]] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Prints what was tried, and what of it went well, when all is over."""
    yield
    lines = [f"{'operation':<24} {'fault':<10} {'tried':>5} {'survived':>8}"]
    lines += [f"{op:<24} {fault:<10} {n[0]:>5} {n[1]:>8}" for (op, fault), n in sorted(COUNTS.items())]
    print("\n" + "\n".join(lines))
    if where := os.environ.get("FAULT_TABLE"):
        Path(where).write_text("\n".join(lines) + "\n")


@dataclass
class Machine:
    """A VM whose second disk is written to from the host while it is stopped."""

    shell: Shell
    name: str
    states: dict[str, str] = field(default_factory=dict)

    def disk(self) -> str:
        text = self.shell.virsh("dumpxml", self.name, "--inactive")
        return [one.source for one in disk_xml.read(text) if not one.readonly][-1]

    def write(self, seed: str) -> None:
        """Fill the disk with blocks of that seed."""
        filling = Path("/tmp/filling.raw")
        filling.write_bytes(pattern.blocks(seed, BLOCKS))
        words = ["-f", "qcow2", "-c", f"write -q -s {filling} 0 {BLOCKS * pattern.BLOCK}", self.disk()]
        subprocess.run(["qemu-io", *words], check=True, capture_output=True, timeout=60)

    def snapshots(self) -> dict[str, snapshot_xml.Snapshot]:
        """All of them, by two virshs for however many."""
        names = self.shell.virsh("snapshot-list", self.name, "--name").split()
        text = self.shell.virsh("; ".join(f"snapshot-dumpxml {self.name} {one}" for one in names)) if names else ""
        each = [snapshot_xml.read(part + END) for part in text.split(END)[:-1]]
        assert [one.name for one in each] == names
        return {one.name: one for one in each}

    def settled(self) -> dict[str, snapshot_xml.Snapshot]:
        """What `doctor --fix` leaves is in order; the snapshots there are."""
        if self.shell.virsh("domstate", self.name) != "shut off":
            self.shell.virsh("destroy", self.name)
        self.shell.run("doctor", "--fix", check=None)
        return self.in_order()

    def in_order(self) -> dict[str, snapshot_xml.Snapshot]:
        """Of the stopped VM: nothing is left over, and every file is whole. The snapshots there are."""
        assert not list(JOURNAL.glob("*")), [one.read_text() for one in JOURNAL.glob("*")]
        text = self.shell.virsh("dumpxml", self.name, "--inactive")
        there = {one.source for one in disk_xml.read(text) if not one.readonly}
        aside: set[str] = set()
        found = self.snapshots()
        for one in found.values():
            there |= one.files
            aside |= set(one.aside)
        needed = {path for top in there for path in chain(top)}
        files = {str(one) for one in POOL.iterdir() if ".snap-" in one.name and one.name.startswith(f"{self.name}-")}
        assert files <= needed | aside, f"orphans: {files - needed - aside}"
        assert {path for path in needed | aside if not Path(path).exists()} == set()
        for path in needed:
            _checked(state(path))
        return found

    def startable(self) -> None:
        self.shell.virsh("start", self.name, "--paused")
        self.shell.virsh("destroy", self.name)


# A file that nothing has been written to since it was looked at is what it was: most are, from one fault to the next.
class FileState(NamedTuple):
    """A file, and what changes with whatever is written to it."""

    path: str
    number: int
    changed_ns: int
    size: int


def state(path: str) -> FileState:
    found = Path(path).stat()
    return FileState(path, found.st_ino, found.st_mtime_ns, found.st_size)


@cache
def _checked(file: FileState) -> None:
    assert pattern.whole(file.path), file.path


@cache
def _below(file: FileState) -> str:
    """The file that one is based on, "" for none."""
    words = ["qemu-img", "info", "--output=json", file.path]
    told = json.loads(subprocess.run(words, check=True, capture_output=True, timeout=60).stdout)
    return str(told.get("full-backing-filename", ""))


@cache
def _content(files: tuple[FileState, ...]) -> str:
    raw = Path("/tmp/content.raw")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", files[0].path, str(raw)], check=True, timeout=60)
    return hashlib.sha256(raw.read_bytes()[: BLOCKS * pattern.BLOCK]).hexdigest()


def chain(path: str) -> list[str]:
    """The file, and those it is based on, one on the other."""
    below = _below(state(path))
    return [path, *(chain(below) if below else [])]


def content(path: str) -> str:
    """Digest of what a guest would read."""
    return _content(tuple(state(one) for one in chain(path)))


def of(seed: str) -> str:
    return hashlib.sha256(pattern.blocks(seed, BLOCKS)).hexdigest()


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A stopped VM with a history: snapshots one and two, and something later."""
    shell, name = Shell(), f"fault-{os.getpid()}"
    before = set(POOL.iterdir())
    shell.run("create", name, "--image", "micro", "--disk", "8M", "--no-start")
    found = Machine(shell, name)
    for seed in ("one", "two"):
        found.write(seed)
        shell.run("snapshot", "create", f"{name}.{seed}")
    found.write("now")
    yield found
    shell.run("delete", name, "--yes")
    assert set(POOL.iterdir()) == before and not list(JOURNAL.glob("*"))


def held(machine: Machine, one: snapshot_xml.Snapshot) -> str:
    return content(one.disks[-1].file)


def counted(op: str, fault: str) -> list[int]:
    return COUNTS.setdefault((op, fault), [0, 0])


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGINT", "LIBVIRTD"])
def test_create_of_a_stopped_vm(machine: Machine, tmp_path: Path, fault: str) -> None:
    shell, at = machine.shell, 0
    while True:
        at += 1
        code, steps = interrupted(tmp_path, fault, at, "snapshot", "create", f"{machine.name}.new")
        if finished(fault, steps, at):
            break
        count = counted("create, stopped", fault)
        count[0] += 1
        libvirtd.awake()
        found = machine.settled()
        assert content(machine.disk()) == of("now"), steps
        assert {"one", "two"} <= set(found) and held(machine, found["one"]) == of("one"), steps
        if "new" in found:
            assert held(machine, found["new"]) == of("now")
            shell.run("snapshot", "delete", f"{machine.name}.new", "--yes")
        elif fault in DEADLY:
            assert code == DEADLY[fault]
        machine.startable()
        count[1] += 1
    assert at > 2
    if "new" in machine.snapshots():
        shell.run("snapshot", "delete", f"{machine.name}.new", "--yes")


def finished(fault: str, steps: list[str], at: int) -> bool:
    """Whether there was no such step any more. A signal logs all steps before it, a killed daemon the one it met."""
    return len(steps) < at if fault in DEADLY else not steps


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGINT", "LIBVIRTD"])
def test_revert_of_a_stopped_vm(machine: Machine, tmp_path: Path, fault: str) -> None:
    shell, at = machine.shell, 0
    while True:
        at += 1
        code, steps = interrupted(tmp_path, fault, at, "snapshot", "revert", f"{machine.name}.one", "--yes")
        over = finished(fault, steps, at)
        libvirtd.awake()
        found = machine.settled()
        now = content(machine.disk())
        assert now in {of("now"), of("one")}, steps
        if over:
            assert code == 0 and now == of("one")
        assert (held(machine, found["one"]), held(machine, found["two"])) == (of("one"), of("two")), steps
        machine.startable()
        shell.run("snapshot", "revert", f"{machine.name}.two", "--yes")
        assert content(machine.disk()) == of("two"), steps
        machine.write("now")
        if over:
            break
        count = counted("revert, stopped", fault)
        count[0] += 1
        count[1] += 1
    assert at > 3


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGINT", "LIBVIRTD"])
def test_delete_of_the_middle(machine: Machine, tmp_path: Path, fault: str) -> None:
    """The one between has a branch: what it holds is needed by both, or by one alone."""
    shell, at, whole = machine.shell, 0, False
    while True:
        at += 1
        if not whole:
            shell.run("snapshot", "create", f"{machine.name}.middle")
            machine.write("after middle")
            shell.run("snapshot", "create", f"{machine.name}.upper")
            machine.write("beyond")
        code, steps = interrupted(tmp_path, fault, at, "snapshot", "delete", f"{machine.name}.middle", "--yes")
        over = finished(fault, steps, at)
        libvirtd.awake()
        found = machine.settled()
        assert content(machine.disk()) == of("beyond"), steps
        assert held(machine, found["upper"]) == of("after middle"), steps
        assert held(machine, found["two"]) == of("two"), steps
        machine.startable()
        if "middle" in found:
            assert not over and held(machine, found["middle"]) == of("now"), steps
        # Where it has not happened, the next fault meets what has just been seen to be as it was.
        whole = "middle" in found
        if not whole:
            shell.run("snapshot", "delete", f"{machine.name}.upper", "--yes")
            assert content(machine.disk()) == of("beyond"), steps
            machine.write("now")
        if over:
            break
        count = counted("delete, stopped", fault)
        count[0] += 1
        count[1] += 1
    assert at > 4


def test_killed_while_checkpoints_are_set_aside(machine: Machine, tmp_path: Path) -> None:
    """libvirt knows them again, and the next backup is an increment."""
    shell, store = machine.shell, ("--folder", str(tmp_path / "backups"))
    shell.run("backup", "create", machine.name, *store)
    marks = shell.virsh("checkpoint-list", machine.name, "--name").split()
    count, at, steps = counted("checkpoints aside", "SIGKILL"), 0, [""]
    count[0] += 1
    while steps[-1] != "snapshots._set_aside":
        at += 1
        code, steps = interrupted(tmp_path, "SIGKILL", at, "snapshot", "create", f"{machine.name}.new")
        assert code == -signal.SIGKILL
    assert shell.virsh("checkpoint-list", machine.name, "--name").split() == []
    assert f"checkpoints of {machine.name} are set aside" in shell.run("doctor", check=None).stdout
    machine.settled()
    assert shell.virsh("checkpoint-list", machine.name, "--name").split() == marks
    machine.write("marked")
    assert "incremental" in shell.run("backup", "create", machine.name, *store).stdout
    machine.write("now")
    for one in reversed(shell.virsh("checkpoint-list", machine.name, "--name").split()):
        shell.virsh("checkpoint-delete", machine.name, one, "--metadata")
    count[1] += 1


@dataclass
class Guest(Machine):
    """A running VM with a snapshot ``held`` of its memory and of its disk of 16 MiB, gone back to before each fault."""

    SCRIPT = "for d in /sys/block/vd*; do [ $(cat $d/size) = 32768 ] && d=/dev/${d##*/} && break; done"

    def put(self, seed: str, at: int) -> None:
        """Have the guest write a pattern at that block, down to its disk."""
        words = f"{self.SCRIPT}; dd of=$d bs={pattern.BLOCK} seek={at} conv=notrunc,fsync 2>/dev/null"
        data = pattern.blocks(seed, PATTERN)
        argv = ["-m", "vmctl", "exec", "--via", "agent", self.name, "--", "sh", "-c", words]
        done = warm.run_bytes(argv, input=data, timeout=120)
        assert done.returncode == 0, done.stderr.decode()

    def reads(self) -> list[str]:
        """Which patterns the guest reads from its disk, "" for none of them, in the order in which they lie there."""
        each = f"dd if=$d bs={pattern.BLOCK} skip=$n count={PATTERN} 2>/dev/null | sha256sum"
        words = f"{self.SCRIPT}; echo 3 >/proc/sys/vm/drop_caches; for n in 0 {PATTERN} {2 * PATTERN}; do {each}; done"
        done = self.shell.run("exec", "--via", "agent", self.name, "--", "sh", "-c", words)
        assert len(done.stdout.splitlines()) == 3, done.stdout
        known = {hashlib.sha256(pattern.blocks(one, PATTERN)).hexdigest(): one for one in ("held", "middle", "after")}
        return [known.get(line.split()[0], "") for line in done.stdout.splitlines()]

    def reads_off(self) -> list[str]:
        """The same while it is stopped, by what QEMU's own tool reads."""
        raw = Path("/tmp/content.raw")
        subprocess.run(
            ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.disk(), str(raw)], check=True, timeout=60
        )
        size = PATTERN * pattern.BLOCK
        known = {pattern.blocks(one, PATTERN): one for one in ("held", "middle", "after")}
        data = raw.read_bytes()
        return [known.get(data[at * size : (at + 1) * size], "") for at in range(3)]

    def up(self) -> None:
        """Running and reachable; what died boots."""
        if self.shell.virsh("domstate", self.name) != "running":
            self.shell.run("start", self.name)
            self.shell.run("wait", self.name, "--for", "agent", "--timeout", "240", timeout=300)

    def fs(self) -> str:
        """Whether its file systems are frozen or thawed."""
        told = self.shell.virsh("qemu-agent-command", self.name, '{"execute": "guest-fsfreeze-status"}')
        return str(json.loads(told)["return"])


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    """Booted once for all faults that do not end it."""
    shell, name = Shell(), f"fault-{os.getpid()}-live"
    before = set(POOL.iterdir())
    shell.run("create", name, "--image", "micro", "--disk", "16M", "--wait", "agent", timeout=300)
    shell.run("exec", name, "--", "sync")
    found = Guest(shell, name)
    found.put("held", 0)
    shell.run("snapshot", "create", f"{name}.held")
    yield found
    shell.run("delete", name, "--yes")
    assert set(POOL.iterdir()) == before and not list(JOURNAL.glob("*"))


LIVE = {
    "create, running": ["create", "VM.new"],
    "revert, running": ["revert", "VM.held", "--yes"],
    "delete, running": ["delete", "VM.middle", "--yes"],
}


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGINT", "LIBVIRTD", "QEMU"])
@pytest.mark.parametrize("op", sorted(LIVE))
def test_of_a_running_vm(guest: Guest, tmp_path: Path, op: str, fault: str) -> None:
    """The guest has written patterns before, and reads them after, in the VM as it is and from the snapshots.

    Of one that died the disk is read, and it is started each time; that it boots, and reads the same, is seen once.
    """
    shell, at, over, booted = guest.shell, 0, False, False
    words = [word.replace("VM", guest.name) for word in LIVE[op]]
    while not over:
        at += 1
        shell.run("snapshot", "revert", f"{guest.name}.held", "--yes")
        shell.run("wait", guest.name, "--for", "agent", "--timeout", "60", timeout=120)
        guest.put("middle", PATTERN)
        if op.startswith("delete"):
            shell.run("snapshot", "create", f"{guest.name}.middle", "--no-memory")
            guest.put("after", 2 * PATTERN)
        code, steps = interrupted(tmp_path, fault, at, "snapshot", *words)
        over = finished(fault, steps, at)
        count = counted(op, fault)
        count[0] += not over
        libvirtd.awake()
        lost = libvirtd.lost(shell, guest.name)
        steps += shell.run("doctor", "--fix", check=None).stdout.splitlines()
        if fault == "LIBVIRTD" and libvirtd.revived():
            steps += shell.run("doctor", "--fix", check=None).stdout.splitlines()
        if fault == "LIBVIRTD" and any("lost sight of a job" in one for one in steps):
            # libvirt 9.0 again: of a commit that is switched over it may drop the job or its mark, and keep the other.
            stopped = shell.run("stop", guest.name, "--force", check=None)
            if stopped.returncode and libvirtd.revived():
                shell.run("stop", guest.name, "--force")
            libvirtd.choose(shell)
            shell.run("start", guest.name)
            steps = shell.run("doctor", "--fix", check=None).stdout.splitlines()
        if libvirtd.choose(shell):
            steps += shell.run("doctor", "--fix", check=None).stdout.splitlines()
        died = shell.virsh("domstate", guest.name) != "running"
        assert not died or lost or fault == "QEMU" or op.startswith("revert"), steps
        stopped = shell.virsh("domstate", guest.name) == "shut off"
        if stopped and booted:
            told = guest.reads_off()
            guest.startable()
        else:
            off = guest.reads_off() if stopped else None
            booted |= stopped
            guest.up()
            told = guest.reads()
            assert off in (None, told), (steps, off, told)
        wanted = {
            "create, running": [["held", "middle", ""]],
            "delete, running": [["held", "middle", "after"]],
            "revert, running": [["held", "", ""]] if over else [["held", "", ""], ["held", "middle", ""]],
        }
        assert told in wanted[op], (steps, told)
        assert code == 0 or not over, (code, steps)
        assert not list(JOURNAL.glob("*")), "\n".join(one for one in steps if not one.startswith("ok "))
        if shell.virsh("domstate", guest.name) != "shut off":
            shell.virsh("destroy", guest.name)
        extra = set(guest.in_order()) - {"held"}
        assert extra <= {"new", "middle"}, extra
        if "new" in extra:
            shell.run("snapshot", "revert", f"{guest.name}.new", "--yes")
            assert shell.virsh("domstate", guest.name) == "running" and guest.reads() == ["held", "middle", ""], steps
        if extra:
            shell.run("snapshot", "delete", *(f"{guest.name}.{one}" for one in extra), "--yes")
        count[1] += not over
    assert at > 3


def test_a_commit_that_a_killed_vmctl_left_ready(guest: Guest) -> None:
    """It waits in QEMU for somebody to switch over; who merges next does not stumble over it."""
    shell = guest.shell
    shell.run("snapshot", "revert", f"{guest.name}.held", "--yes")
    guest.put("middle", PATTERN)
    shell.run("snapshot", "create", f"{guest.name}.middle", "--no-memory")
    guest.put("after", 2 * PATTERN)
    for disk in disk_xml.read(shell.virsh("dumpxml", guest.name)):
        if not disk.readonly:
            words = ["blockcommit", guest.name, disk.target, "--active", "--shallow"]
            shell.virsh(*words, "--wait")
    count = counted("delete, running", "left ready")
    count[0] += 1
    shell.run("snapshot", "delete", f"{guest.name}.middle", "--yes")
    assert guest.reads() == ["held", "middle", "after"]
    shell.virsh("destroy", guest.name)
    guest.in_order()
    count[1] += 1


def thawed(guest: Guest, steps: list[str]) -> None:
    """It is frozen no more, writes and reads. Off then, with the snapshots it had before."""
    assert guest.fs() == "thawed", steps
    guest.put("middle", PATTERN)
    assert guest.reads() == ["held", "middle", ""]
    guest.shell.virsh("destroy", guest.name)
    if extra := sorted(set(guest.in_order()) - {"held"}):
        guest.shell.run("snapshot", "delete", *(f"{guest.name}.{one}" for one in extra), "--yes")


@pytest.mark.parametrize("healed", ["doctor", "next"])
def test_a_guest_that_was_left_frozen(guest: Guest, tmp_path: Path, healed: str) -> None:
    """vmctl is killed when it has frozen the guest, and when it has taken the disks: the next thaws it, and doctor."""
    shell, seen = guest.shell, []
    for at in range(2, 4):
        shell.run("snapshot", "revert", f"{guest.name}.held", "--yes")
        words = ["snapshot", "create", f"{guest.name}.new", "--no-memory", "--freeze"]
        count = counted("create, frozen", "SIGKILL")
        count[0] += 1
        _code, steps = interrupted(tmp_path, "SIGKILL", at, *words)
        seen.append(steps[-1])
        assert guest.fs() == "frozen", steps
        if healed == "doctor":
            shell.run("doctor", "--fix", check=None)
        else:
            shell.run("snapshot", "create", f"{guest.name}.next", "--no-memory", "--freeze")
        thawed(guest, steps)
        count[1] += 1
    assert seen == ["agent.freeze", "snapshots.take"]


@pytest.mark.parametrize("fault", ["SIGINT", "LIBVIRTD", "QEMU"])
def test_a_frozen_guest_is_thawed_whatever_dies(guest: Guest, tmp_path: Path, fault: str) -> None:
    shell, at, over = guest.shell, 0, False
    while not over:
        at += 1
        shell.run("snapshot", "revert", f"{guest.name}.held", "--yes")
        shell.run("wait", guest.name, "--for", "agent", "--timeout", "60", timeout=120)
        words = ["snapshot", "create", f"{guest.name}.new", "--no-memory", "--freeze"]
        _code, steps = interrupted(tmp_path, fault, at, *words)
        over = finished(fault, steps, at)
        count = counted("create, frozen", fault)
        count[0] += not over
        libvirtd.awake()
        if fault != "SIGINT":
            shell.run("doctor", "--fix", check=None)
            libvirtd.choose(shell)
        assert shell.virsh("domstate", guest.name) == ("shut off" if fault == "QEMU" and not over else "running"), steps
        guest.up()
        thawed(guest, steps)
        count[1] += not over
    assert at > 3


def test_no_room_in_the_pool(tmp_path: Path) -> None:
    """Full when one is taken, and full in the middle of a merge: nothing is lost, and with room it goes on."""
    shell, name, small = Shell(), f"fault-{os.getpid()}-small", Path("/var/lib/libvirt/snapshots-small")
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=11M,mode=0711", "small", str(small)], check=True)
    machine = Machine(shell, name)
    try:
        shell.run("disk", "pool", "create", "small", "--path", str(small))
        shell.run("create", name, "--image", "micro", "--no-start")
        shell.run("disk", "create", "small/full", "8M")
        shell.run("disk", "attach", name, "small/full")
        top = machine.disk()
        words = ["-f", "qcow2", "-c", "write -q -P 1 0 4M", top]
        subprocess.run(["qemu-io", *words], check=True, capture_output=True)
        count = counted("create, no room", "ENOSPC")
        count[0] += 1
        filler = small / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], check=False, capture_output=True)
        done = shell.run("snapshot", "create", f"{name}.one", check=None)
        assert done.returncode and done.stderr.startswith(("cannot", "snapshot")), done.stderr
        assert machine.disk() == top and not list(JOURNAL.glob("*")) and not machine.snapshots()
        assert sorted(small.iterdir()) == [filler, small / "full.qcow2"]
        filler.unlink()
        count[1] += 1
        count = counted("delete, no room", "ENOSPC")
        count[0] += 1
        shell.run("snapshot", "create", f"{name}.one")
        words = ["-f", "qcow2", "-c", "write -q -P 2 4M 4M", machine.disk()]
        subprocess.run(["qemu-io", *words], check=True, capture_output=True)
        want = whole(machine.disk())
        done = shell.run("snapshot", "delete", f"{name}.one", "--yes", check=None)
        assert done.returncode == 10 and "doctor --fix" in done.stderr, done.stderr
        assert whole(machine.disk()) == want
        machine.startable()
        subprocess.run(["mount", "-o", "remount,size=64M", str(small)], check=True)
        machine.settled()
        assert machine.disk() == top and whole(top) == want
        count[1] += 1
    finally:
        shell.run("delete", name, "--yes", check=None)
        shell.run("disk", "pool", "delete", "small", "--yes", check=None)
        subprocess.run(["umount", "-l", str(small)], check=False)
        small.rmdir()


def whole(path: str) -> str:
    """Digest of all a guest would read."""
    raw = Path("/tmp/whole.raw")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, str(raw)], check=True, timeout=60)
    return hashlib.sha256(raw.read_bytes()).hexdigest()
