"""Snapshots of real guests: what was written before is there after a revert, whatever kind, chain and branch."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import warm
from tests.system import pattern
from tests.system.conftest import Shell, environment
from tests.system.test_interrupted import interrupted
from vmctl import disk_xml

pytestmark = pytest.mark.system

POOL = Path("/var/lib/libvirt/vmctl/vmctl")
BLOCKS = 64


@contextmanager
def made(name: str, *options: str) -> Iterator[str]:
    """A VM with a second disk of 16 MiB, all files of which are gone with it."""
    shell, before = Shell(), set(POOL.iterdir())
    shell.run("create", name, "--image", "micro", "--disk", "16M", *options, timeout=300)
    yield name
    shell.run("delete", name, "--yes")
    assert set(POOL.iterdir()) == before
    assert not journal()


@contextmanager
def running(name: str) -> Iterator[str]:
    """Such a VM, booted."""
    with made(name, "--wait", "ssh"):
        Shell().run("wait", name, "--for", "agent")
        Shell().run("exec", name, "--", "sync")  # its host key too, which it would not get from a used seed again
        yield name


@pytest.fixture
def vm(name: str) -> Iterator[str]:
    """A guest of the test's own, with which it may do anything."""
    with running(name):
        yield name


@pytest.fixture
def off(name: str) -> Iterator[str]:
    """A VM of the test's own that was never started."""
    with made(name, "--no-start"):
        yield name


@pytest.fixture(scope="module")
def lasting() -> Iterator[str]:
    """A guest for the tests that leave theirs able to go on."""
    with running(f"t-{secrets.token_hex(4)}") as name:
        yield name


@pytest.fixture
def guest(shell: Shell, lasting: str) -> Iterator[str]:
    """The guest that lasts, running; all files of its snapshots are gone with them."""
    if shell.virsh("domstate", lasting) != "running":
        up(shell, lasting)
    files = len(set(POOL.iterdir()))
    yield lasting
    if left := names(shell, lasting):
        shell.run("snapshot", "delete", *(f"{lasting}.{one}" for one in left), "--yes")
    assert len(set(POOL.iterdir())) == files
    assert not journal()


def journal() -> list[Path]:
    return list((Path.home() / ".local/share/vmctl/snapshot-journal").glob("*"))


# The guest's name of its second disk, which changes when the seed is taken away: it is the one of 16 MiB.
DEVICE = "$(cd /sys/block; for d in vd*; do [ $(cat $d/size) = 32768 ] && echo /dev/$d; done)"


def put(vm: str, seed: str, *, at: int = 0) -> None:
    pattern.write(vm, DEVICE, pattern.blocks(seed, BLOCKS), at=at)


def holds(shell: Shell, vm: str, seed: str, *, at: int = 0) -> bool:
    return pattern.holds(shell, vm, DEVICE, pattern.blocks(seed, BLOCKS), at=at)


def holds_off(shell: Shell, vm: str, seed: str, *, at: int = 0) -> bool:
    """The same of a stopped VM, by what QEMU's own tool reads."""
    raw = Path("/tmp/holds-off.raw")
    words = ["convert", "-f", "qcow2", "-O", "raw", sources(shell, vm, "--inactive")[target(shell, vm)], str(raw)]
    subprocess.run(["qemu-img", *words], check=True)
    with raw.open("rb") as file:
        file.seek(at * pattern.BLOCK)
        return file.read(BLOCKS * pattern.BLOCK) == pattern.blocks(seed, BLOCKS)


def up(shell: Shell, vm: str) -> None:
    """Started and reachable."""
    shell.run("start", vm)
    shell.run("wait", vm, "--for", "ssh", "--timeout", "240", timeout=300)


def sources(shell: Shell, vm: str, *flags: str) -> dict[str, str]:
    return {one.target: one.source for one in disk_xml.read(shell.virsh("dumpxml", vm, *flags)) if not one.readonly}


def clean(shell: Shell, vm: str) -> None:
    """Of a stopped VM: every file of its chains is whole."""
    for path in sources(shell, vm, "--inactive").values():
        chain = json.loads(
            subprocess.run(
                ["qemu-img", "info", "--backing-chain", "--output=json", path], check=True, capture_output=True
            ).stdout
        )
        for layer in chain:
            subprocess.run(["qemu-img", "check", "-q", layer["filename"]], check=True)


def names(shell: Shell, vm: str) -> list[str]:
    return [one["name"] for one in shell.json("snapshot", "list", vm)]


def test_memory_and_disks_come_back_as_often_as_one_likes(shell: Shell, guest: str) -> None:
    put(guest, "one")
    shell.run("exec", guest, "--", "sh", "-c", "echo in-memory >/run/mark; (sleep 100000 & echo $! >/run/pid)")
    done = shell.run("snapshot", "create", f"{guest}.one", "--description", "with a process")
    assert "external, memory and disks vda, vdc" in done.stderr
    for turn in range(3):
        put(guest, f"later {turn}")
        shell.run("exec", guest, "--", "sh", "-c", "rm /run/mark; kill $(cat /run/pid)")
        files = set(POOL.iterdir())
        shell.run("snapshot", "revert", f"{guest}.one", "--yes")
        assert shell.virsh("domstate", guest) == "running"
        assert (
            shell.run("exec", guest, "--", "sh", "-c", "cat /run/mark; kill -0 $(cat /run/pid)").stdout == "in-memory\n"
        )
        assert holds(shell, guest, "one")
        assert len(set(POOL.iterdir())) == len(files), "a revert leaves files"
    (one,) = shell.json("snapshot", "list", guest)
    assert one["memory"] and one["current"] and one["ours"] and one["kind"] == "external"
    shell.run("snapshot", "delete", f"{guest}.one", "--yes")
    assert holds(shell, guest, "one")
    assert all(".snap-" not in path for path in sources(shell, guest).values())
    shell.run("save", guest)
    clean(shell, guest)


def test_disks_alone_stopped_and_running_oldest_middle_newest(shell: Shell, vm: str) -> None:
    for turn in range(4):
        put(vm, f"state {turn}", at=BLOCKS * turn)
        put(vm, f"front {turn}", at=BLOCKS * 10)
        shell.run("snapshot", "create", f"{vm}.s{turn}", "--no-memory", "--freeze")
    put(vm, "now", at=BLOCKS * 10)
    shell.run("snapshot", "delete", f"{vm}.s1", "--yes")
    shell.run("snapshot", "delete", f"{vm}.s0", "--yes")
    shell.run("snapshot", "delete", f"{vm}.s3", "--yes")
    assert names(shell, vm) == ["s2"]
    assert all(holds(shell, vm, f"state {turn}", at=BLOCKS * turn) for turn in range(4))
    assert holds(shell, vm, "now", at=BLOCKS * 10)
    shell.virsh("destroy", vm)
    clean(shell, vm)
    shell.run("snapshot", "revert", f"{vm}.s2", "--yes")
    assert shell.virsh("domstate", vm) == "shut off"
    assert all(holds_off(shell, vm, f"state {turn}", at=BLOCKS * turn) for turn in range(3))
    assert holds_off(shell, vm, "front 2", at=BLOCKS * 10) and not holds_off(shell, vm, "state 3", at=BLOCKS * 3)
    shell.run("snapshot", "delete", f"{vm}.s2", "--yes")
    assert all(".snap-" not in path for path in sources(shell, vm, "--inactive").values())
    clean(shell, vm)
    up(shell, vm)
    assert holds(shell, vm, "front 2", at=BLOCKS * 10)


def test_branches_keep_what_they_need(shell: Shell, guest: str) -> None:
    """root - a - b, back to a, then c: each of the two branches can go while the other stays whole."""
    put(guest, "a")
    shell.run("snapshot", "create", f"{guest}.a")
    put(guest, "b")
    shell.run("snapshot", "create", f"{guest}.b")
    put(guest, "beyond b")
    shell.run("snapshot", "revert", f"{guest}.a", "--yes")
    put(guest, "c")
    shell.run("snapshot", "create", f"{guest}.c", "--no-memory")
    put(guest, "beyond c")
    drawn = shell.run("snapshot", "tree", guest).stdout
    drawn_names = [line.strip(" │├└─").split("  ")[0] for line in drawn.splitlines()[1:]]
    assert drawn_names == ["a", "b", "c", "* you are here"]
    shell.run("snapshot", "delete", f"{guest}.a", "--yes")
    assert holds(shell, guest, "beyond c")
    shell.run("snapshot", "revert", f"{guest}.b", "--yes")
    assert holds(shell, guest, "b")
    shell.run("snapshot", "revert", f"{guest}.c", "--yes", "--start")
    shell.run("wait", guest, "--for", "ssh", "--timeout", "240", timeout=300)
    assert holds(shell, guest, "c")
    put(guest, "beyond c")
    shell.run("snapshot", "delete", f"{guest}.b", "--yes")
    assert holds(shell, guest, "beyond c")
    shell.run("snapshot", "delete", f"{guest}.c", "--yes")
    assert holds(shell, guest, "beyond c")
    assert not [path for path in POOL.iterdir() if ".snap-" in path.name], "the two branches are one again"
    shell.run("save", guest)
    clean(shell, guest)


def test_a_clone_on_a_snapshots_file_keeps_it(shell: Shell, vm: str) -> None:
    put(vm, "base")
    held = sources(shell, vm)["vdc"]
    shell.run("snapshot", "create", f"{vm}.base", "--no-memory")
    put(vm, "later")
    shell.run("disk", "create", "clone-top", "--backing", held)
    want = subprocess.run(
        ["qemu-img", "convert", "-O", "raw", str(POOL / "clone-top.qcow2"), "/tmp/want.raw"], check=True
    )
    assert want.returncode == 0
    shell.run("snapshot", "delete", f"{vm}.base", "--yes")
    assert holds(shell, vm, "later") and Path(held).exists()
    subprocess.run(["qemu-img", "compare", "-F", "raw", str(POOL / "clone-top.qcow2"), "/tmp/want.raw"], check=True)
    shell.run("disk", "delete", "clone-top", "--yes")


def test_safety_and_reuse_and_max_and_expiry(shell: Shell, guest: str) -> None:
    put(guest, "one")
    shell.run("snapshot", "create", f"{guest}.one", "--expiry", "7d")
    put(guest, "two")
    refused = shell.run("snapshot", "revert", f"{guest}.one", check=2)
    assert "what was written to disk vdc since" in refused.stderr and "--safety" in refused.stderr
    done = shell.json("snapshot", "revert", f"{guest}.one", "--safety")
    assert holds(shell, guest, "one") and done["lost"] == []
    shell.run("snapshot", "revert", f"{guest}.{done['safety']}", "--yes")
    assert holds(shell, guest, "two")
    shell.run("snapshot", "create", f"{guest}.one", check=5)
    shell.run("snapshot", "create", f"{guest}.one", "--reuse", "--no-memory")
    rows = {one["name"]: one for one in shell.json("snapshot", "list", guest)}
    assert (
        set(rows) == {"one", done["safety"]} and not rows["one"]["memory"] and rows["one"]["parent"] == done["safety"]
    )
    assert holds(shell, guest, "two")
    shell.run("snapshot", "create", guest, "--max", "2", "--no-memory")
    assert len(names(shell, guest)) == 2 and done["safety"] not in names(shell, guest)
    shell.run("snapshot", "create", f"{guest}.short", "--expiry", "1m", "--no-memory")
    assert shell.json("snapshot", "delete", "--expired", guest, "--yes") == []
    assert holds(shell, guest, "two")


def test_internal_ones_and_virshs(shell: Shell, vm: str) -> None:
    put(vm, "inside")
    done = shell.run("snapshot", "create", f"{vm}.inside", "--internal")
    assert "internal, memory and disks" in done.stderr
    put(vm, "later")
    refused = shell.run("snapshot", "create", f"{vm}.out", "--external", check=8)
    assert "--internal can be taken here" in refused.stderr
    shell.virsh("snapshot-create-as", vm, "by-virsh")
    put(vm, "latest")
    rows = {one["name"]: one for one in shell.json("snapshot", "list", vm)}
    assert rows["inside"]["ours"] and not rows["by-virsh"]["ours"]
    shell.run("snapshot", "revert", f"{vm}.inside", "--yes")
    assert holds(shell, vm, "inside")
    shell.run("snapshot", "revert", f"{vm}.by-virsh", "--yes")
    assert holds(shell, vm, "later")
    shell.run("snapshot", "revert", f"{vm}.inside", "--yes", "--no-start")
    assert shell.json("show", vm)["state"] == "stopped"  # not crashed: it was meant to end
    shell.run("snapshot", "revert", f"{vm}.by-virsh", "--yes")
    shell.run("snapshot", "delete", f"{vm}.inside", f"{vm}.by-virsh", "--yes")
    assert names(shell, vm) == [] and holds(shell, vm, "later")
    # Now external ones that virsh makes, with files where it likes.
    shell.virsh("snapshot-create-as", vm, "ext", "--disk-only", "--atomic")
    put(vm, "upon ext")
    shell.virsh("snapshot-create-as", vm, "mem", "--memspec", f"file={POOL}/{vm}.mem,snapshot=external")
    put(vm, "upon mem")
    shell.run("snapshot", "revert", f"{vm}.mem", "--yes")
    assert holds(shell, vm, "upon ext")
    shell.run("snapshot", "delete", f"{vm}.ext", "--yes")
    assert holds(shell, vm, "upon ext")
    shell.run("snapshot", "revert", f"{vm}.mem", "--yes")
    assert holds(shell, vm, "upon ext")


def test_every_dry_run_touches_nothing_and_tells_all(shell: Shell, guest: str) -> None:
    put(guest, "one")

    def state() -> tuple[object, ...]:
        files = {path: path.stat().st_mtime_ns for path in POOL.iterdir() if "console" not in path.name}
        xml = [shell.virsh("dumpxml", guest, *flags) for flags in ((), ("--inactive",))]
        return set(files), xml, shell.virsh("snapshot-list", guest, "--tree"), journal()

    before = state()
    told = shell.run("snapshot", "create", f"{guest}.one", "--dry-run").stdout
    assert state() == before and told.count("would make") == 3 and f"would change VM {guest}" in told
    shell.run("snapshot", "create", f"{guest}.one")
    put(guest, "two")
    before = state()
    told = shell.run("snapshot", "revert", f"{guest}.one", "--dry-run").stdout
    assert state() == before and told.count("would lose") == 3 and told.count("would delete") == 2
    assert told.count("would make") == 2 and f"would stop VM {guest}" in told and "would read" in told
    made, gone = told_files(told, "make"), told_files(told, "delete")
    assert len(made) == 2 and all(Path(one).exists() for one in gone)
    told = shell.run("snapshot", "delete", f"{guest}.one", "--dry-run").stdout
    assert state() == before and told.count("would merge") == 2 and told.count("would delete /") == 1
    assert f"would delete snapshot {guest}.one" in told
    there = set(map(str, POOL.iterdir()))
    shell.run("snapshot", "delete", f"{guest}.one", "--yes")
    now = set(map(str, POOL.iterdir()))
    assert there - now == told_files(told, "delete") | told_files(told, "merge")
    assert holds(shell, guest, "two")


def told_files(text: str, verb: str) -> set[str]:
    return {line.split()[2] for line in text.splitlines() if line.startswith(f"would {verb} /")}


def test_several_go_one_after_the_other_as_the_dry_run_told(shell: Shell, guest: str) -> None:
    """Each is looked at as it is when the one before it is gone: its parent and its files are others then."""

    def goes_as_told(*words: str) -> None:
        told = shell.run("snapshot", *words, "--dry-run").stdout
        there = set(map(str, POOL.iterdir()))
        shell.run("snapshot", *words)
        assert there - set(map(str, POOL.iterdir())) == told_files(told, "delete") | told_files(told, "merge"), told

    put(guest, "one")
    for number in range(4):
        shell.run("snapshot", "create", f"{guest}.s{number}", *(["--no-memory"] if number else []))
    told = shell.run("snapshot", "delete", f"{guest}.s0", f"{guest}.s9", "--yes", check=4).stderr
    assert f"cannot find snapshot {guest}.s9" in told and names(shell, guest) == ["s0", "s1", "s2", "s3"]
    goes_as_told("create", f"{guest}.s4", "--no-memory", "--max", "3")
    assert names(shell, guest) == ["s2", "s3", "s4"]
    told = shell.run("snapshot", "delete", f"{guest}.s3", f"{guest}.s3", "--dry-run").stdout
    assert told.count("would delete snapshot") == 1
    goes_as_told("delete", f"{guest}.s2", f"{guest}.s4", f"{guest}.s3", "--yes")
    assert names(shell, guest) == [] and holds(shell, guest, "one")
    for last in ("--dry-run", "--yes"):
        assert shell.run("snapshot", "delete", "--expired", guest, last).stdout == "nothing to delete\n"


def test_the_dry_run_of_a_revert_knows_of_safety_and_start(shell: Shell, guest: str) -> None:
    shell.run("snapshot", "create", f"{guest}.one")
    told = shell.run("snapshot", "revert", f"{guest}.one", "--safety", "--dry-run")
    assert "would lose" not in told.stdout and "snapshot " + f"{guest}.before-revert-" in told.stderr
    assert len(told_files(told.stdout, "make")) == 5  # two layers and the memory of safety's, and two fresh layers
    assert f"would start VM {guest}" in told.stdout and "would read /" in told.stdout
    there = set(map(str, POOL.iterdir()))
    shell.run("snapshot", "revert", f"{guest}.one", "--safety")
    new = set(map(str, POOL.iterdir())) - there
    assert len(new) == 5 - len(told_files(told.stdout, "delete")) and there <= set(map(str, POOL.iterdir()))
    told = shell.run("snapshot", "revert", f"{guest}.one", "--no-start", "--dry-run")
    assert "would start" not in told.stdout and "would read" not in told.stdout


def test_a_revert_that_fails_says_that_the_vm_is_stopped(shell: Shell, guest: str) -> None:
    put(guest, "one")
    shell.run("snapshot", "create", f"{guest}.one")
    put(guest, "two")
    shell.run("exec", guest, "--", "sync")
    memory = Path(shell.json("snapshot", "show", f"{guest}.one")["memory_file"])
    assert memory.name not in shell.run("disk", "list").stdout, "it is no disk"
    whole, there = memory.read_bytes(), set(POOL.iterdir())
    memory.write_bytes(whole[: len(whole) // 2])
    told = shell.run("snapshot", "revert", f"{guest}.one", "--yes", check=13).stderr
    assert f"VM {guest} is stopped, what was in its memory lost; its disks are as they were" in told
    assert shell.virsh("domstate", guest) == "shut off" and set(POOL.iterdir()) == there and not journal()
    assert holds_off(shell, guest, "two")
    memory.write_bytes(whole)
    shell.run("snapshot", "revert", f"{guest}.one", "--yes")
    assert shell.virsh("domstate", guest) == "running" and holds(shell, guest, "one")


def test_diff_tells_how_much(shell: Shell, vm: str) -> None:
    shell.run("snapshot", "create", f"{vm}.one", "--no-memory", "--freeze")
    put(vm, "two", at=256)
    shell.run("exec", vm, "--", "sync")
    shell.run("disk", "attach", vm, "4M")
    found = shell.json("snapshot", "diff", f"{vm}.one")
    changed = {one["target"]: one["changed"] for one in found["disks"]}
    assert 64 * 4096 <= changed["vdc"] < 1 << 20
    assert any("vdd" in line and line.startswith("+") for line in found["config"])
    assert not any("<name>" in line for line in found["config"]), "what is the same is no difference"
    shell.run("snapshot", "create", f"{vm}.two", "--no-memory")
    between = shell.json("snapshot", "diff", f"{vm}.one", f"{vm}.two")
    assert {one["target"]: one["changed"] for one in between["disks"]}["vdc"] == changed["vdc"]


def test_a_renamed_vm_gets_its_disks_back_and_under_its_old_name_its_memory(shell: Shell, vm: str) -> None:
    put(vm, "one")
    shell.run("snapshot", "create", f"{vm}.one")
    put(vm, "two")
    shell.virsh("destroy", vm)
    shell.run("rename", vm, f"{vm}-b")
    try:
        before = sources(shell, f"{vm}-b", "--inactive")
        refused = shell.run("snapshot", "revert", f"{vm}-b.one", "--yes", check=8)
        assert f"vmctl rename {vm}-b {vm}" in refused.stderr and sources(shell, f"{vm}-b", "--inactive") == before
        assert shell.run("snapshot", "revert", f"{vm}-b.one", "--dry-run", check=8).stderr == refused.stderr
        shell.run("start", f"{vm}-b")
        shell.run("snapshot", "revert", f"{vm}-b.one", "--yes", "--no-start")
        assert shell.json("show", f"{vm}-b")["state"] == "stopped"
        assert holds_off(shell, f"{vm}-b", "one")
        shell.virsh("start", f"{vm}-b", "--paused")
        shell.virsh("destroy", f"{vm}-b")
    finally:
        shell.run("rename", f"{vm}-b", vm)
    shell.run("snapshot", "revert", f"{vm}.one", "--yes")
    assert shell.virsh("domstate", vm) == "running" and holds(shell, vm, "one")
    refused = shell.run("disk", "convert", f"{vm}:{target(shell, vm)}", "--format", "raw", check=5)
    assert "has snapshots" in refused.stderr


def test_a_vm_with_backups_is_put_back_and_snapshotted_like_any_other(shell: Shell, vm: str, tmp_path: Path) -> None:
    """libvirt describes no snapshot of a stopped VM with checkpoints, and QEMU puts back no file with dirty bitmaps."""
    folder = ("--folder", str(tmp_path / "backups"))
    for kind in ("external", "internal"):
        put(vm, kind)
        shell.run("snapshot", "create", f"{vm}.{kind}", *(["--internal"] if kind == "internal" else []))
        shell.run("backup", "create", vm, *folder)
        put(vm, "later")
        shell.run("backup", "create", vm, *folder)
        done = shell.run("snapshot", "revert", f"{vm}.{kind}", "--yes")
        assert done.stdout.strip().endswith("running")
        assert holds(shell, vm, kind)
        told = shell.json("backup", "create", vm, *folder)
        assert "full" in str(told), told  # what changed since the one before, no bitmap knows any more
        shell.run("stop", vm, "--force")
        shell.run("snapshot", "delete", f"{vm}.{kind}", "--yes")
        if kind == "external":
            up(shell, vm)
    shell.run("snapshot", "create", f"{vm}.stopped")
    assert names(shell, vm) == ["stopped"]
    assert all(not one["problems"] for one in shell.json("backup", "verify", vm, *folder))


@pytest.mark.timeout(1500)
def test_fifty_deep_and_flatten_mends_it(shell: Shell, off: str) -> None:
    for number in range(50):
        shell.run("snapshot", "create", f"{off}.d{number}")
    up(shell, off)
    shell.run("exec", off, "--", "sync")
    put(off, "now")
    assert len(names(shell, off)) == 50
    shell.run("disk", "flatten", f"{off}:{target(shell, off)}", timeout=400)
    assert holds(shell, off, "now")
    assert len(backing(sources(shell, off)[target(shell, off)])) == 1
    shell.run("snapshot", "delete", f"{off}.d25", f"{off}.d0", f"{off}.d49", "--yes", timeout=400)
    assert holds(shell, off, "now") and len(names(shell, off)) == 47
    shell.run("snapshot", "create", f"{off}.top", "--no-memory")
    shell.run("snapshot", "revert", f"{off}.d30", "--yes", timeout=400)
    assert not holds_off(shell, off, "now")
    shell.run("snapshot", "revert", f"{off}.top", "--yes", timeout=400)
    clean(shell, off)
    assert holds_off(shell, off, "now")
    up(shell, off)


def target(shell: Shell, vm: str) -> str:
    """The target of the second disk."""
    return sorted(sources(shell, vm))[-1]


def backing(path: str) -> list[str]:
    words = ["qemu-img", "info", "-U", "--backing-chain", "--output=json", path]
    return [one["filename"] for one in json.loads(subprocess.run(words, check=True, capture_output=True).stdout)]


def test_the_variables_of_uefi_are_kept_and_put_back(shell: Shell, off: str, tmp_path: Path) -> None:
    text = shell.virsh("dumpxml", off, "--inactive")
    begin, end = text.index("<os>"), text.index("</os>")
    xml = tmp_path / "uefi.xml"
    boot = "<os firmware='efi'><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/>"
    xml.write_text(text[:begin] + boot + text[end:])
    shell.virsh("define", str(xml))
    shell.virsh("start", off)
    nvram = Path(shell.virsh("dumpxml", off).partition("<nvram")[2].partition(">")[2].partition("<")[0])
    refused = shell.run("snapshot", "create", f"{off}.in", "--internal", check=8)
    assert "UEFI" in refused.stderr
    shell.run("snapshot", "create", f"{off}.live")
    shell.virsh("destroy", off)
    nvram.write_bytes(b"one" + nvram.read_bytes()[3:])
    one = nvram.read_bytes()
    shell.run("snapshot", "create", f"{off}.one")
    nvram.write_bytes(b"two" + one[3:])
    owner = nvram.stat().st_uid
    shell.run("snapshot", "revert", f"{off}.one", "--yes")
    assert nvram.read_bytes() == one and nvram.stat().st_uid == owner
    told = shell.run("snapshot", "revert", f"{off}.live", "--dry-run").stdout
    assert f"would write {nvram}" in told
    shell.run("snapshot", "revert", f"{off}.live", "--yes")
    assert nvram.read_bytes()[:3] != b"one" and shell.virsh("domstate", off) == "running"
    assert shell.json("snapshot", "show", f"{off}.one")["nvram"].endswith(".nvram")
    told = shell.run("delete", off, "--dry-run").stdout.splitlines()
    assert {f"snapshot {off}.one", f"snapshot {off}.live", f"file {nvram}"} <= set(told)


def test_files_that_new_writes_go_to_are_read_by_nobody_else(shell: Shell, off: str) -> None:
    before = set(POOL.iterdir())
    shell.run("snapshot", "create", f"{off}.one")
    shell.run("snapshot", "revert", f"{off}.one", "--yes")
    made = set(POOL.iterdir()) - before
    assert made and {path.stat().st_mode & 0o777 for path in made} == {0o600}


def test_a_snapshot_whose_files_cannot_be_merged_is_not_deleted(shell: Shell, off: str) -> None:
    shell.run("snapshot", "create", f"{off}.one")
    shell.run("snapshot", "create", f"{off}.two")
    base = Path(next(one["file"] for one in shell.json("snapshot", "show", f"{off}.one")["disks"]))
    aside = base.rename(base.with_suffix(".aside"))
    try:
        for dry in (["--dry-run"], ["--yes"]):
            told = shell.run("snapshot", "delete", f"{off}.two", f"{off}.one", *dry, check=4).stderr
            assert f"{base}, which is to be merged, is not there" in told and f"{off}.one" in told
        assert "hint: are all files" in shell.run("snapshot", "create", f"{off}.three", check=13).stderr
        assert names(shell, off) == ["one", "two"] and not journal()
    finally:
        aside.rename(base)
    shell.run("snapshot", "delete", f"{off}.two", f"{off}.one", "--yes")


def test_what_snapshots_hold_is_no_disk_that_anybody_could_use(shell: Shell, name: str) -> None:
    """`disk list` says whose it is, of a file that no VM has attached."""
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("snapshot", "create", f"{name}.one")
    (layer,) = (d.source for d in disk_xml.read(shell.virsh("dumpxml", name)) if d.target == "vda")
    shell.run("snapshot", "create", f"{name}.two")
    shell.run("snapshot", "revert", f"{name}.one", "--yes")
    shell.run("disk", "create", f"{name}-spare", "1M")
    loose = {row["source"]: row["needed_by"] for row in shell.json("disk", "list") if not row["vm"]}
    assert loose[layer] == [f"snapshots of {name}"]
    (spare,) = (path for path in loose if path.endswith(f"{name}-spare.qcow2"))
    assert loose[spare] == []
    assert f"snapshots of {name}" in shell.run("disk", "list").stdout
    gone = shell.json("disk", "delete", f"{name}-spare", "--yes")
    assert gone == {"pool": "vmctl", "volume": f"{name}-spare.qcow2", "path": spare}


def test_beside_a_job_none_is_taken_and_none_noted(shell: Shell, vm: str, tmp_path: Path) -> None:
    """Nor does a file that virsh left, which could be merged but for that job, keep a note alive."""
    shell.run("snapshot", "create", f"{vm}.virshs", "--no-memory")
    shell.virsh("snapshot-delete", vm, "virshs", "--metadata")
    before = set(POOL.iterdir())

    def pulling() -> None:
        shell.virsh("blockpull", vm, "vda", "1", "--bytes")

    pulling()
    for words in (["snapshot", "create", f"{vm}.no"], ["fork", vm, f"{vm}-no"]):
        for dry in ([], ["--dry-run"]):
            assert "a job works on disk vda" in shell.run(*words, *dry, check=6).stderr
            assert journal() == [] and set(POOL.iterdir()) == before
    shell.virsh("blockjob", vm, "vda", "--abort")
    code, steps = interrupted(tmp_path, "SIGKILL", 1, "snapshot", "create", f"{vm}.no")  # noted, and not asked for
    assert code == -signal.SIGKILL and len(journal()) == 1, steps
    pulling()
    assert "end it: virsh blockjob" in shell.run("snapshot", "create", f"{vm}.no", check=6).stderr
    assert journal() == [] and set(POOL.iterdir()) == before
    shell.virsh("blockjob", vm, "vda", "--abort")
    shell.run("snapshot", "create", f"{vm}.yes")
    shell.run("snapshot", "delete", f"{vm}.yes", "--yes")
    assert journal() == []


def test_what_is_kept_of_a_snapshot_is_that_ones_alone(shell: Shell, off: str) -> None:
    """libvirt puts it back into the VM, and one that virsh took then was to expire, and was deleted as vmctl's own."""
    shell.run("snapshot", "create", f"{off}.one", "--internal", "--expiry", "7d")
    shell.run("snapshot", "revert", f"{off}.one", "--yes")
    assert "vmctlsnap" not in shell.virsh("dumpxml", off)
    assert "the definition is the same" in shell.run("snapshot", "diff", f"{off}.one").stdout
    shell.virsh("snapshot-create-as", off, "after")
    shell.virsh("snapshot-revert", off, "one")
    shell.virsh("snapshot-create-as", off, "virshs")
    shell.run("snapshot", "create", f"{off}.one", "--reuse", "--expiry", "6d")
    listed = {one["name"]: one for one in shell.json("snapshot", "list", off)}
    assert {name: (one["ours"], bool(one["expires"])) for name, one in listed.items()} == {
        "one": (True, True),
        "after": (False, False),
        "virshs": (False, False),
    }


@pytest.mark.parametrize("first", ["clone", "model"])
def test_what_a_snapshot_made_below_a_clones_layer_goes_with_the_last(shell: Shell, name: str, first: str) -> None:
    """It stayed for ever: a layer was on it that is the VM's own, and goes with it by itself."""
    before = set(POOL.iterdir())
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("snapshot", "create", f"{name}.one")
    shell.run("disk", "flatten", f"{name}:vda")
    shell.run("snapshot", "delete", f"{name}.one", "--yes")
    shell.run("clone", name, f"{name}-new")
    made = {path for path in POOL.iterdir() if ".snap-" in path.name} - before
    assert len(made) == 1
    if first == "clone":
        told = shell.run("delete", name, "--dry-run").stdout
        assert not any(path.name in told for path in made)  # the clone is on it
    going = [f"{name}-new", name] if first == "clone" else [name, f"{name}-new"]
    shell.run("delete", going[0], "--yes")
    assert made <= set(POOL.iterdir())
    told = shell.run("delete", going[1], "--dry-run").stdout
    assert all(path.name in told for path in made)
    shell.run("delete", going[1], "--yes")
    assert set(POOL.iterdir()) == before


def test_a_snapshot_that_is_there_when_its_create_is_interrupted_is_told_of(
    shell: Shell, name: str, tmp_path: Path
) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    words = ["-m", "tests.system.interrupting", "SIGINT", "snapshots.take", "snapshot", "create", f"{name}.new"]
    done = warm.run(words, env=environment(CHANGES=str(tmp_path / "changes")), timeout=120)
    there = [one["name"] for one in shell.json("snapshot", "list", name)]
    assert done.returncode == 130 and there == ["new"], done.stderr
    assert f"snapshot {name}.new is there, whole" in done.stderr and f"snapshot delete {name}.new" in done.stderr
