"""Disks resized, moved, converted, flattened, rebased, compacted: the guest reads what it wrote, whatever is done."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import warm
from tests.system import pattern
from tests.system.conftest import REPO, VMCTL, Shell, volumes
from vmctl import disk_chain, disk_xml, layer_check, pull_settle
from vmctl.hosts import holding, open_host
from vmctl.hypervisor import domain
from vmctl.wait import wait_until

pytestmark = pytest.mark.system

DISKS = Path("/var/lib/libvirt/vmctl/vmctl")
ONE, TWO = pattern.blocks("one", 256), pattern.blocks("two", 256)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A second pool."""
    shell, folder = Shell(), Path("/var/lib/libvirt/second")
    shell.run("disk", "pool", "create", "second", "--path", str(folder))
    yield "second"
    shell.run("disk", "pool", "delete", "second", "--yes")


@pytest.fixture(scope="module")
def vm(pool: str) -> Iterator[str]:
    """A guest, running when a test begins."""
    shell, chosen = Shell(), f"content-{os.getpid()}"
    shell.guest(chosen)
    yield chosen
    shell.run("delete", chosen, "--yes")


@pytest.fixture
def disk(shell: Shell, vm: str) -> Iterator[str]:
    """The device of a fresh linked disk ``VM:data`` whose base holds ONE at block 0; the guest has it as this path."""
    ensure_running(shell, vm)
    base, top = f"base-{os.urandom(3).hex()}", f"top-{os.urandom(3).hex()}"
    shell.run("disk", "create", base, "32M")
    raw = DISKS / "filling.raw"
    raw.write_bytes(ONE + bytes((32 << 20) - len(ONE)))
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(DISKS / f"{base}.qcow2")], check=True
    )
    raw.unlink()
    shell.run("disk", "create", top, "--backing", base)
    done = shell.json("disk", "attach", vm, top, "--serial", "data")
    device = f"/dev/{done['guest']}"
    assert pattern.holds(shell, vm, device, ONE)
    pattern.write(vm, device, TWO, at=1024)
    yield device
    ensure_running(shell, vm)
    shell.run("disk", "detach", f"{vm}:data", "--delete", "--yes", check=None)
    for volume in volumes(shell) | volumes(shell, "second"):
        if volume.startswith((base, top)):
            for folder in (DISKS, Path("/var/lib/libvirt/second")):
                (folder / volume).unlink(missing_ok=True)


def ensure_running(shell: Shell, vm: str) -> None:
    if shell.virsh("domstate", vm) != "running":
        shell.run("start", vm)
        shell.run("wait", vm, "--for", "agent")


def stop(shell: Shell, vm: str) -> None:
    shell.run("exec", vm, "--", "sync")
    shell.run("stop", vm)


def file_of(shell: Shell, vm: str) -> Path:
    """The file of ``VM:data``, which the definition and the running machine agree on."""
    found = set()
    for flags in ((), ("--inactive",)):
        found |= {d.source for d in disk_xml.read(shell.virsh("dumpxml", vm, *flags)) if d.serial == "data"}
    (path,) = found
    return Path(path)


def intact(shell: Shell, vm: str) -> bool:
    """Whether the guest reads both patterns, zeros between, after a boot if it was stopped."""
    ensure_running(shell, vm)
    device = "/dev/" + shell.run("exec", vm, "--", "sh", "-c", FIND).stdout.strip()
    gap = bytes(pattern.BLOCK * 256)
    return (
        pattern.holds(shell, vm, device, ONE)
        and pattern.holds(shell, vm, device, gap, at=512)
        and pattern.holds(shell, vm, device, TWO, at=1024)
    )


FIND = 'for d in /sys/block/*; do [ "$(cat $d/serial 2>/dev/null)" != data ] || echo ${d##*/}; done'


def clean(path: Path) -> None:
    done = subprocess.run(["qemu-img", "check", "-q", "-U", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def leftovers() -> list[str]:
    """What a change that ended may not leave."""
    found = [*DISKS.glob(".vmctl-*"), *Path("/var/lib/libvirt/second").glob(".vmctl-*")]
    begun = [one for kind in ("disk", "pull") for one in Path.home().glob(f".local/share/vmctl/{kind}-journal/*")]
    return [str(one) for one in (*found, *begun)]


def test_a_disk_grows_under_a_running_guest_and_the_file_system_with_it(shell: Shell, vm: str) -> None:
    ensure_running(shell, vm)
    done = shell.json("disk", "attach", vm, "16M", "--serial", "grow")
    device = f"/dev/{done['guest']}"
    shell.run("exec", vm, "--", "sh", "-c", f"mkfs.ext4 -q {device} && mkdir -p /mnt/g && mount {device} /mnt/g")
    pattern.write(vm, "/mnt/g/data", ONE)
    was = shell.json("disk", "resize", f"{vm}:grow", "+32M", "--dry-run")
    assert was["touches"] and shell.json("disk", "show", f"{vm}:grow")["chain"]["layers"][0]["virtual_size"] == 16 << 20
    grown = shell.json("disk", "resize", f"{vm}:grow", "+32M", "--grow-fs")
    assert (grown["before"], grown["after"], grown["grown"]) == (16 << 20, 48 << 20, f"ext4 on {device}")
    kib = int(shell.run("exec", vm, "--", "sh", "-c", "df -k /mnt/g | tail -n 1 | awk '{print $2}'").stdout)
    assert kib > 40 * 1024
    assert pattern.holds(shell, vm, "/mnt/g/data", ONE)
    assert "would be lost" in shell.run("disk", "resize", f"{vm}:grow", "16M", check=2).stderr
    assert "is running" in shell.run("disk", "resize", f"{vm}:grow", "16M", "--shrink", check=6).stderr
    shell.run("exec", vm, "--", "umount", "/mnt/g")
    shell.run("disk", "detach", f"{vm}:grow")
    # Nobody has it now: it can shrink, to what its file system can be made.
    told = shell.run("disk", "resize", done["made"], "1M", "--shrink", check=10).stderr
    assert "resize2fs" in told and "make room on it" in told
    small = shell.json("disk", "resize", done["made"], "20M", "--shrink")
    assert small["after"] == 20 << 20
    again = shell.json("disk", "attach", vm, done["made"])
    shell.run("exec", vm, "--", "sh", "-c", f"e2fsck -fn /dev/{again['guest']} && mount /dev/{again['guest']} /mnt/g")
    assert pattern.holds(shell, vm, "/mnt/g/data", ONE)
    shell.run("exec", vm, "--", "umount", "/mnt/g")
    shell.run("disk", "detach", f"{vm}:{again['target']}", "--delete", "--yes")
    assert leftovers() == []


def test_a_disk_without_a_file_system_does_not_grow_for_one(shell: Shell, vm: str) -> None:
    """It grew, and at each repetition once more."""
    ensure_running(shell, vm)
    shell.run("disk", "attach", vm, "16M", "--serial", "bare")
    for dry in (["--dry-run"], []):
        told = shell.run("disk", "resize", f"{vm}:bare", "+16M", "--grow-fs", *dry, check=9).stderr
        assert "no file system is known on" in told and "the disk is as it was" in told and "blkid" not in told
    assert shell.json("disk", "show", f"{vm}:bare")["chain"]["layers"][0]["virtual_size"] == 16 << 20
    shell.run("disk", "detach", f"{vm}:bare", "--delete", "--yes")


def test_what_fails_once_the_disk_has_grown_is_repeated_by_its_whole_size(shell: Shell, vm: str) -> None:
    ensure_running(shell, vm)
    done = shell.json("disk", "attach", vm, "16M", "--serial", "half")
    device = f"/dev/{done['guest']}"
    shell.run("exec", vm, "--", "sh", "-c", f"mkfs.ext4 -q {device} && mkdir /mnt/h && mount -o ro {device} /mnt/h")
    told = shell.run("disk", "resize", f"{vm}:half", "+16M", "--grow-fs", check=9).stderr
    again = f"disk resize {vm}:half 32M --grow-fs"
    assert f"the disk itself has grown; mend this in the guest, then go on: vmctl {again}" in told
    shell.run("exec", vm, "--", "umount", "/mnt/h")
    mended = shell.json(*again.split())
    assert (mended["before"], mended["after"], mended["grown"]) == (32 << 20, 32 << 20, f"ext4 on {device}")
    shell.run("disk", "detach", f"{vm}:half", "--delete", "--yes")


def test_what_cannot_be_checked_is_not_shrunk(shell: Shell, vm: str, disk: str) -> None:
    stop(shell, vm)
    before = file_of(shell, vm).read_bytes()
    dry = shell.run("disk", "resize", f"{vm}:data", "16M", "--shrink", "--dry-run").stdout
    assert f"would rewrite {file_of(shell, vm)}, " in dry and "once a copy has shown that what is on it fits" in dry
    told = shell.run("disk", "resize", f"{vm}:data", "16M", "--shrink", check=10)
    assert "neither ext2, 3 or 4 nor a partition table" in told.stderr
    assert file_of(shell, vm).read_bytes() == before and leftovers() == []
    shell.run("disk", "resize", f"{vm}:data", "+8M")
    assert intact(shell, vm)


def test_a_disk_moves_under_a_guest_that_writes_to_it(shell: Shell, vm: str, disk: str) -> None:
    old = file_of(shell, vm)
    told = shell.run("disk", "move", f"{vm}:data", "--pool", "second", "--dry-run").stdout
    assert f"make /var/lib/libvirt/second/{old.name}" in told and f"delete {old}" in told
    script = (
        f"i=0; while [ -e /tmp/go ]; do echo $i | dd of={disk} bs=4096 seek=4096 conv=notrunc,fsync; i=$((i+1)); done"
    )
    shell.run("exec", vm, "--", "sh", "-c", f"touch /tmp/go; ({script}; echo $i >/tmp/i) >/dev/null 2>&1 &")
    done = shell.json("disk", "move", f"{vm}:data", "--pool", "second")
    assert done["how"] == "live" and not old.exists()
    assert file_of(shell, vm) == Path("/var/lib/libvirt/second") / old.name
    shell.run("exec", vm, "--", "sh", "-c", "rm /tmp/go; while [ ! -s /tmp/i ]; do usleep 20000; done")
    last = shell.run("exec", vm, "--", "sh", "-c", f"dd if={disk} bs=4096 skip=4096 count=1 2>/dev/null | head -n 1")
    count = shell.run("exec", vm, "--", "cat", "/tmp/i").stdout
    assert int(last.stdout) == int(count) - 1
    assert intact(shell, vm)
    stop(shell, vm)
    done = shell.json("disk", "move", f"{vm}:data", "--pool", "vmctl")
    assert done["how"] == "stopped" and file_of(shell, vm) == old
    clean(old)
    assert intact(shell, vm) and leftovers() == []


def test_what_a_move_keeps_is_not_the_vms_any_more(shell: Shell, vm: str, name: str) -> None:
    """Deleted, the VM takes the disk with it that it had, and not the one that was kept."""
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("disk", "attach", name, "4M", "--serial", "data")
    old = file_of(shell, name)
    shell.run("disk", "move", f"{name}:data", "--pool", "second", "--keep")
    new = file_of(shell, name)
    assert new.parent != old.parent and old.exists()
    shell.run("delete", name, "--yes")
    assert old.exists() and not new.exists()
    shell.run("disk", "delete", f"vmctl/{old.name}", "--yes")


def test_a_disk_is_converted_running_and_stopped(shell: Shell, vm: str, disk: str) -> None:
    before = volumes(shell)
    done = shell.json("disk", "convert", f"{vm}:data", "--format", "raw")
    assert (done["how"], done["format"]) == ("live", "raw") and file_of(shell, vm).suffix == ".raw"
    assert pattern.holds(shell, vm, disk, ONE) and pattern.holds(shell, vm, disk, TWO, at=1024)
    stop(shell, vm)
    done = shell.json("disk", "convert", f"{vm}:data", "--format", "qcow2")
    assert done["how"] == "stopped" and file_of(shell, vm).suffix == ".qcow2"
    clean(file_of(shell, vm))
    assert intact(shell, vm) and volumes(shell) == before and leftovers() == []


def test_a_disk_is_flattened_running_and_stopped(shell: Shell, vm: str, disk: str) -> None:
    _, base = shell.json("disk", "show", f"{vm}:data")["chain"]["layers"]
    assert f"VM {vm} reads it" in shell.run("disk", "delete", Path(base["path"]).name, "--yes", check=5).stderr
    shell.run("disk", "flatten", f"{vm}:data")
    assert len(shell.json("disk", "show", f"{vm}:data")["chain"]["layers"]) == 1
    assert shell.run("disk", "flatten", f"{vm}:data").stdout.strip() == f"{vm}:data is flat already"
    stop(shell, vm)
    shell.run("disk", "rebase", f"{vm}:data", "--onto", Path(base["path"]).name)
    assert len(shell.json("disk", "show", f"{vm}:data")["chain"]["layers"]) == 2
    shell.run("disk", "flatten", f"{vm}:data")
    assert len(shell.json("disk", "show", f"{vm}:data")["chain"]["layers"]) == 1
    Path(base["path"]).unlink()
    clean(file_of(shell, vm))
    assert intact(shell, vm) and leftovers() == []


def test_a_deep_chain_is_rebased_onto_its_lowest_file_while_the_guest_runs(shell: Shell, vm: str, name: str) -> None:
    ensure_running(shell, vm)
    for at, words in enumerate((["16M"], ["--backing", "deep-0"], ["--backing", "deep-1"])):
        shell.run("disk", "create", f"deep-{at}", *words)
    deep = {f"deep-{at}.qcow2" for at in range(3)}
    assert deep <= {one["disk"] for one in shell.json("disk", "list")}, "nobody's, be it that another is based on it"
    done = shell.json("disk", "attach", vm, "deep-2", "--serial", "deep", "--next-start")
    assert not deep & {one["disk"] for one in shell.json("disk", "list")}, "a stopped VM's, with all it is based on"
    shell.run("disk", "detach", f"{vm}:deep")
    done = shell.json("disk", "attach", vm, "deep-2", "--serial", "deep")
    pattern.write(vm, f"/dev/{done['guest']}", ONE)
    shell.run("disk", "rebase", f"{vm}:deep", "--onto", "deep-0")
    layers = [Path(one["path"]).name for one in shell.json("disk", "show", f"{vm}:deep")["chain"]["layers"]]
    assert layers == ["deep-2.qcow2", "deep-0.qcow2"]
    assert pattern.holds(shell, vm, f"/dev/{done['guest']}", ONE)
    shell.run("disk", "detach", f"{vm}:deep", "--delete", "--yes")
    for name in ("deep-1", "deep-0"):
        shell.run("disk", "delete", name, "--yes")


def test_compact_gives_back_what_the_guest_freed(shell: Shell, vm: str, disk: str) -> None:
    zeros = bytes(2 << 20)
    pattern.write(vm, disk, pattern.blocks("waste", 512), at=4096)
    pattern.write(vm, disk, zeros, at=4096)
    assert "is running" in shell.run("disk", "compact", f"{vm}:data", check=6).stderr
    stop(shell, vm)
    done = shell.json("disk", "compact", f"{vm}:data")
    assert done["size_before"] - done["size_after"] > 3 << 19
    assert len(shell.json("disk", "show", f"{vm}:data")["chain"]["layers"]) == 2  # still based on what it was
    done = shell.json("disk", "compact", f"{vm}:data", "--compress")
    clean(file_of(shell, vm))
    assert intact(shell, vm) and leftovers() == []


def test_the_map_says_where_each_block_is(shell: Shell, vm: str, disk: str) -> None:
    stop(shell, vm)
    found = shell.json("disk", "map", f"{vm}:data")
    at = {piece["offset"]: piece for piece in found["pieces"]}
    layers = [layer["path"] for layer in found["chain"]["layers"]]
    assert at[0]["layer"] == layers[1] and at[0]["length"] == len(ONE)
    two = at[1024 * pattern.BLOCK]
    assert (two["layer"], two["length"], two["depth"]) == (layers[0], len(TWO), 0)
    for piece, data in ((at[0], ONE), (two, TWO)):
        with Path(piece["layer"]).open("rb") as file:
            file.seek(piece["file_offset"])
            assert file.read(len(data)) == data
    end = 0
    for piece in found["pieces"]:
        assert piece["offset"] == end
        end += piece["length"]
        assert piece["zero"] != (piece["offset"] in {0, 1024 * pattern.BLOCK})
    assert end == 32 << 20
    drawn = shell.run("disk", "map", f"{vm}:data").stdout.splitlines()
    assert drawn[0].endswith(f"{Path(layers[0]).name} (qcow2)") and drawn[1].endswith(
        f"└ {Path(layers[1]).name} (qcow2)"
    )
    assert drawn[0].index("█") > drawn[1].index("█") == 1


def test_damage_is_found_and_mended_in_a_copy(shell: Shell, vm: str, disk: str) -> None:
    stop(shell, vm)
    shell.run("disk", "flatten", f"{vm}:data")
    shell.run("disk", "check", f"{vm}:data")
    path = file_of(shell, vm)
    good = path.read_bytes()
    refcounts = int.from_bytes(good[48:56], "big")
    block = int.from_bytes(good[refcounts : refcounts + 8], "big")
    last = max(n for n in range(0, 32768) if good[block + 2 * n : block + 2 * n + 2] == b"\0\1")
    damaged = bytearray(good)
    damaged[block + 2 * last : block + 2 * last + 2] = b"\0\0"  # a cluster in use that counts as free
    path.write_bytes(damaged)
    assert "damaged" in shell.run("disk", "check", f"{vm}:data", check=10).stdout
    told = shell.run("disk", "check", f"{vm}:data", "--repair", "--dry-run", check=10)
    assert "a copy that is mended would take its place" in told.stdout and "--repair mends" in told.stderr
    assert path.read_bytes() == bytes(damaged)
    shell.run("disk", "check", f"{vm}:data", "--repair")
    clean(path)
    assert intact(shell, vm) and leftovers() == []
    # Without its header nothing tells that one is qcow2 but its name: it is no raw disk in good order.
    shell.run("disk", "create", "smashed", "1M")
    smashed = path.with_name("smashed.qcow2")
    smashed.write_bytes(b"XXXX" + smashed.read_bytes()[4:])
    for words in (("check", "smashed"), ("attach", vm, "smashed", "--dry-run")):
        assert "is called qcow2 and has no header of one" in shell.run("disk", *words, check=10).stderr
    shell.run("disk", "delete", "smashed", "--yes")


def test_without_room_nothing_changes(shell: Shell, vm: str, disk: str, tmp_path: Path) -> None:
    small = Path("/var/lib/libvirt/small")
    small.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(small)], check=True)
    shell.run("disk", "pool", "create", "small", "--path", str(small))
    try:
        old = file_of(shell, vm)
        shell.run("disk", "move", f"{vm}:data", "--pool", "small", check=13)
        assert file_of(shell, vm) == old and list(small.iterdir()) == []
        pattern.write(vm, disk, TWO, at=2048)
        stop(shell, vm)
        told = shell.run("disk", "move", f"{vm}:data", "--pool", "small", check=10)
        assert "No space left on device" in told.stderr
        assert file_of(shell, vm) == old and list(small.iterdir()) == []
        assert intact(shell, vm) and leftovers() == []
    finally:
        shell.run("disk", "pool", "delete", "small", "--yes")
        subprocess.run(["umount", str(small)], check=True)


def test_ctrl_c_while_a_running_disk_moves_leaves_it_where_it_was(shell: Shell, vm: str, disk: str) -> None:
    old = file_of(shell, vm)
    words = [*VMCTL, "-v", "disk", "move", f"{vm}:data", "--pool", "second", "--bandwidth", "1K"]
    moving = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=REPO)
    new = Path("/var/lib/libvirt/second") / old.name
    while not (new.exists() and "<mirror" in shell.virsh("dumpxml", vm)):
        assert moving.poll() is None, moving.communicate()
    moving.send_signal(2)
    assert moving.wait(30) == 130
    moving.communicate()
    assert file_of(shell, vm) == old and not new.exists() and "<mirror" not in shell.virsh("dumpxml", vm)
    assert intact(shell, vm) and leftovers() == []


@pytest.mark.parametrize("mender", ["the same command", "doctor"])
def test_a_killed_move_is_settled(shell: Shell, vm: str, disk: str, mender: str) -> None:
    old = file_of(shell, vm)
    words = ["disk", "move", f"{vm}:data", "--pool", "second"]
    moving = subprocess.Popen([*VMCTL, *words, "--bandwidth", "1K"], stderr=subprocess.DEVNULL, cwd=REPO)
    new = Path("/var/lib/libvirt/second") / old.name
    while not (new.exists() and "<mirror" in shell.virsh("dumpxml", vm)):
        assert moving.poll() is None
    moving.kill()
    moving.wait()
    assert new.exists() and "<mirror" in shell.virsh("dumpxml", vm)
    if mender == "doctor":
        assert "a change of a disk was cut off" in shell.run("doctor", check=None).stdout
        shell.run("doctor", "--fix", check=None)
        assert file_of(shell, vm) == old and not new.exists() and "<mirror" not in shell.virsh("dumpxml", vm)
    else:
        shell.run(*words)
        assert not old.exists() and file_of(shell, vm) == new
    assert intact(shell, vm) and leftovers() == []


def state(shell: Shell, vm: str) -> list[object]:
    """All that a disk verb could change: files, definitions, pools."""
    files = [
        (str(path), path.stat().st_mtime_ns, path.stat().st_size, path.stat().st_ino)
        for folder in (DISKS, Path("/var/lib/libvirt/second"))
        for path in sorted(folder.rglob("*"))
    ]
    return [*files, shell.virsh("dumpxml", "--inactive", vm), shell.virsh("pool-list", "--all"), *leftovers()]


def test_every_dry_run_tells_what_it_would_touch_and_touches_nothing(shell: Shell, vm: str, disk: str) -> None:
    stop(shell, vm)
    path, name = str(file_of(shell, vm)), f"{vm}:data"
    onto = f"onto-{os.urandom(3).hex()}"
    shell.run("disk", "create", onto, "32M")
    try:
        before = state(shell, vm)
        for words in (
            ("resize", name, "+1M"),
            ("resize", name, "16M", "--shrink"),
            ("move", name, "--pool", "second"),
            ("convert", name, "--format", "raw"),
            ("compact", name),
            ("flatten", name),
            ("rebase", name, "--onto", onto),
            ("check", name, "--repair"),
        ):
            told = shell.run("disk", *words, "--dry-run").stdout
            assert path in told, words
        told = shell.run("disk", "pool", "create", "third", "--path", "/var/lib/libvirt/third", "--dry-run").stdout
        assert "<path>/var/lib/libvirt/third</path>" in told
        assert "would delete pool second" in shell.run("disk", "pool", "delete", "second", "--dry-run").stdout
        for dry in (["--dry-run"], []):
            shell.run("disk", "pool", "create", "second", "--path", "/var/lib/libvirt/third", *dry, check=5)
            assert "vmctl's own" in shell.run("disk", "pool", "delete", "vmctl", *dry, check=5).stderr
        broken = ("--type", "fs", "--device", "/dev/nope", "--path", "/var/lib/libvirt/third/deeper")
        assert "/dev/nope" in shell.run("disk", "pool", "create", "third", *broken, check=13).stderr
        assert not Path("/var/lib/libvirt/third").exists()
        assert state(shell, vm) == before
    finally:
        shell.run("disk", "delete", onto, "--yes", check=None)


def test_a_dry_run_is_refused_for_what_the_run_is_refused_for(shell: Shell, vm: str, disk: str) -> None:
    ensure_running(shell, vm)
    name = f"{vm}:data"
    for dry in (["--dry-run"], []):
        assert "is running" in shell.run("disk", "resize", name, "16M", "--shrink", *dry, check=6).stderr
    stop(shell, vm)
    told = shell.run("disk", "resize", name, "+1M", "--dry-run").stdout
    assert told == f"would grow {file_of(shell, vm)} (32.0 MiB -> 33.0 MiB)\n"
    shell.run("snapshot", "create", f"{vm}.inside", "--internal")
    try:
        for dry in (["--dry-run"], []):
            for words in (
                ["resize", name, "+1M"],
                ["resize", name, "16M", "--shrink"],
                ["convert", name, "--format", "raw"],
            ):
                assert "has snapshots" in shell.run("disk", *words, *dry, check=5).stderr
    finally:
        shell.run("snapshot", "delete", f"{vm}.inside", "--yes")


def test_what_was_flattened_outlives_its_qemu(shell: Shell, name: str) -> None:
    """QEMU names no base any more when it alone knows where what it pulled is; a killed one took it all along."""
    shell.guest(name)
    pattern.write(name, "/root/data", pattern.blocks("below", 16))
    shell.run("exec", name, "--", "sync")
    shell.run("disk", "flatten", f"{name}:vda")
    os.kill(int(Path(f"/run/libvirt/qemu/{name}.pid").read_text()), signal.SIGKILL)
    wait_until(lambda: shell.virsh("domstate", name) == "shut off", what="its end", timeout_s=60)
    (disk,) = [one.source for one in disk_xml.read(shell.virsh("dumpxml", name)) if one.target == "vda"]
    assert pattern.whole(disk)
    shell.run("start", name)
    shell.run("wait", name, "--for", "agent", "--timeout", "60", timeout=100)
    assert pattern.holds(shell, name, "/root/data", pattern.blocks("below", 16))


@pytest.fixture
def held(shell: Shell, name: str) -> Iterator[tuple[Path, Path]]:
    """The file of a disk ``NAME:data`` and the one of 64 MiB that it is based on; nobody but QEMU writes to it."""
    base = f"base-{name}"
    below = DISKS / f"{base}.qcow2"
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("disk", "create", base, "64M")
    raw = DISKS / "filling.raw"
    raw.write_bytes(os.urandom(1 << 20) * 64)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(below)], check=True)
    raw.unlink()
    shell.run("disk", "create", f"top-{name}", "--backing", base)
    shell.run("disk", "attach", name, f"top-{name}", "--serial", "data")
    yield DISKS / f"top-{name}.qcow2", below
    shell.virsh("destroy", name, check=False)
    shell.run("delete", name, "--yes", "--missing-ok")
    for path in DISKS.glob(f"*-{name}.qcow2"):
        path.unlink()


def test_a_qemu_killed_when_its_pull_ends_loses_next_to_nothing(
    shell: Shell, name: str, held: tuple[Path, Path]
) -> None:
    """QEMU names no base from then on, and it alone knows where what it has not flushed is."""
    top, below = held
    lost = []
    for _ in range(3):  # a machine that is busy in that moment may be late once
        make(top, below)
        shell.virsh("start", name, "--paused")
        pid = int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
        watch = ["virsh", "qemu-monitor-event", name, "--event", "JOB_STATUS_CHANGE", "--loop"]
        with (
            subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as watching,
            subprocess.Popen([*VMCTL, "disk", "flatten", f"{name}:data"], cwd=REPO) as flattening,
        ):
            assert watching.stdout is not None
            for line in watching.stdout:
                if "concluded" in line:
                    os.kill(pid, signal.SIGKILL)
                    break
            flattening.wait(60)
            watching.kill()
        wait_until(lambda: shell.virsh("domstate", name) == "shut off", what="its end", timeout_s=60)
        told = subprocess.run(["qemu-img", "map", "--output=json", str(top)], check=True, capture_output=True)
        own = [one["length"] for one in json.loads(told.stdout) if one["data"] and one["depth"] == 0]
        lost.append((64 << 20) - sum(own))
        shell.run("start", name)
        shell.virsh("destroy", name)
        assert leftovers() == [] and pattern.whole(top) and qemu_img_compares(top, below)  # nothing at all in the end
    assert sorted(lost)[1] <= 4 << 20, lost


def test_a_pull_that_fails_is_told_and_leaves_the_disk_as_it_was(
    shell: Shell, name: str, held: tuple[Path, Path]
) -> None:
    top, below = held
    small = Path(f"/var/lib/libvirt/small-{name}")
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M,mode=0711", "small", str(small)], check=True)
    try:
        shell.run("disk", "pool", "create", small.name, "--path", str(small))
        shell.run("disk", "move", f"{name}:data", "--pool", small.name)
        shell.virsh("start", name, "--paused")
        assert "the job failed" in shell.run("disk", "flatten", f"{name}:data", check=13).stderr
        layers = shell.json("disk", "show", f"{name}:data")["chain"]["layers"]
        assert [Path(one["path"]).name for one in layers] == [top.name, below.name]
        assert leftovers() == []
        shell.virsh("destroy", name)
        shell.run("disk", "move", f"{name}:data", "--pool", "vmctl")
        assert qemu_img_compares(top, below)
    finally:
        shell.virsh("destroy", name, check=False)
        shell.run("delete", name, "--yes")
        shell.run("disk", "pool", "delete", small.name, "--yes")
        subprocess.run(["umount", str(small)], check=True)


def unflushed(name: str, top: Path | str, victim: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Pull with ``vmctl disk WORD…`` into ``top``, and end QEMU or vmctl when that is over and nothing is flushed."""
    at = ["-m", "tests.system.unflushed", victim, str(top), f"/run/libvirt/qemu/{name}.pid", "disk", *words]
    return warm.run(at, timeout=120)


def kill_qemu(shell: Shell, name: str) -> None:
    pid = Path(f"/run/libvirt/qemu/{name}.pid")
    if pid.exists():
        os.kill(int(pid.read_text()), signal.SIGKILL)
    wait_until(lambda: shell.virsh("domstate", name) == "shut off", what="its end", timeout_s=60)


def base_of(top: Path | str) -> str:
    told = subprocess.run(["qemu-img", "info", "-U", "--output=json", str(top)], check=True, capture_output=True)
    return str(json.loads(told.stdout).get("backing-filename", ""))


@pytest.mark.parametrize("victim", ["QEMU", "VMCTL"])
def test_a_qemu_killed_before_the_flush_takes_nothing_along_of_what_a_guest_had_synced(
    shell: Shell, name: str, victim: str, tmp_path: Path
) -> None:
    shell.guest(name)
    pattern.write(name, "/root/data", ONE)
    shell.run("exec", name, "--", "sync")
    (disk,) = [one.source for one in disk_xml.read(shell.virsh("dumpxml", name)) if one.target == "vda"]
    done = unflushed(name, disk, victim, "flatten", f"{name}:vda")
    assert done.returncode == (-signal.SIGKILL if victim == "VMCTL" else 6), done.stderr
    kill_qemu(shell, name)
    shell.run("start", name)
    shell.run("wait", name, "--for", "agent", "--timeout", "60", timeout=100)
    assert leftovers() == []
    assert pattern.holds(shell, name, "/root/data", ONE)
    stop(shell, name)
    assert pattern.whole(disk)
    raw = tmp_path / "root.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, str(raw)], check=True, timeout=120)
    subprocess.run(["e2fsck", "-fn", str(raw)], check=True, timeout=120, capture_output=True)


@pytest.mark.parametrize("way", ["flatten", "rebase"])
@pytest.mark.parametrize("victim", ["QEMU", "VMCTL"])
def test_after_a_kill_before_the_flush_the_disk_is_on_its_old_base_again(
    shell: Shell, name: str, held: tuple[Path, Path], victim: str, way: str
) -> None:
    top, below = held
    old, words = below, ("flatten", f"{name}:data")
    if way == "rebase":
        old = DISKS / f"mid-{name}.qcow2"
        words = ("rebase", f"{name}:data", "--onto", str(below))
        make(old, below)
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 8M", str(old)], check=True)
        make(top, old)
    want = content(top)
    shell.virsh("start", name, "--paused")
    done = unflushed(name, top, victim, *words)
    assert done.returncode == (-signal.SIGKILL if victim == "VMCTL" else 6), done.stderr
    kill_qemu(shell, name)
    assert f"{top.name} needs it" in shell.run("disk", "delete", f"vmctl/{old.name}", "--yes", check=5).stderr
    if victim == "VMCTL":
        refused = shell.run("clone", name, f"{name}-2", check=5).stderr
        assert "may lack what its QEMU" in refused and "vmctl doctor --fix" in refused, refused
    said = done.stderr + shell.run("start", name).stderr
    assert f"is based on {old} again" in said, said
    shell.virsh("destroy", name)
    assert leftovers() == [] and base_of(top) == str(old) and pattern.whole(top)
    assert content(top) == want
    shell.run("disk", *words)  # and it can be done anew
    assert content(top) == want


def make(top: Path, on: Path) -> None:
    words = ["create", "-q", "-f", "qcow2", "-b", str(on), "-F", "qcow2", str(top)]
    subprocess.run(["qemu-img", *words], check=True)


def content(disk: Path) -> str:
    raw = DISKS / "content.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(raw)], check=True, timeout=60)
    try:
        return hashlib.sha256(raw.read_bytes()).hexdigest()
    finally:
        raw.unlink()


@pytest.mark.parametrize("ending", ["doctor", "disk", "snapshot", "to go elsewhere"])
def test_a_pull_whose_vmctl_was_killed_is_flushed_by_who_comes_next(
    shell: Shell, name: str, held: tuple[Path, Path], ending: str
) -> None:
    top, below = held
    shell.virsh("start", name, "--paused")
    assert unflushed(name, top, "VMCTL", "flatten", f"{name}:data").returncode == -signal.SIGKILL
    assert f"{top.name} needs it" in shell.run("disk", "delete", f"vmctl/{below.name}", "--yes", check=5).stderr
    if ending == "doctor":
        assert f"which was based on {below}" in shell.run("doctor", check=None).stdout
        shell.run("doctor", "--fix", check=None)
    elif ending == "disk":
        shell.run("disk", "resize", f"{name}:data", "+1M")
    elif ending == "snapshot":
        assert shell.run("snapshot", "delete", f"{name}.none", "--yes", check=None).returncode
    else:
        with open_host() as host, holding(host, name):
            layer_check.require_known(host, domain.find(host.conn, name), "migrate it")
    assert leftovers() == []
    kill_qemu(shell, name)
    assert base_of(top) == "" and pattern.whole(top) and qemu_img_compares(top, below)
    shell.run("disk", "delete", f"vmctl/{below.name}", "--yes")


def test_a_pull_that_goes_on_without_its_vmctl_is_ended_by_who_holds_the_vm(
    shell: Shell, name: str, held: tuple[Path, Path]
) -> None:
    top, below = held
    shell.virsh("start", name, "--paused")
    (target,) = [one.target for one in disk_xml.read(shell.virsh("dumpxml", name)) if one.serial == "data"]
    with open_host() as host:
        layers = disk_chain.read(str(top), "qcow2", lambda: [str(DISKS)], doing="pull")
        pull_settle.begin(host, domain.find(host.conn, name), target, layers, "pull")
    shell.virsh("blockpull", name, target, "--bandwidth", "1")
    refused = shell.run("disk", "detach", f"{name}:data", "--dry-run", check=6).stderr  # who only looks ends no pull
    assert "a job works on it" in refused
    assert "Block Pull" in shell.virsh("blockjob", name, target, "--raw") and leftovers() != []
    shell.run("disk", "flatten", f"{name}:data")
    assert base_of(top) == "" and leftovers() == []
    kill_qemu(shell, name)
    assert pattern.whole(top) and qemu_img_compares(top, below)


def test_a_vm_does_not_start_while_the_base_that_it_needs_is_not_as_it_was(
    shell: Shell, name: str, held: tuple[Path, Path]
) -> None:
    top, below = held
    shell.virsh("start", name, "--paused")
    assert unflushed(name, top, "VMCTL", "flatten", f"{name}:data").returncode == -signal.SIGKILL
    kill_qemu(shell, name)
    was, aside = below.stat(), below.with_suffix(".aside")
    os.utime(below, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    assert f"{below} was changed since" in shell.run("start", name, check=5).stderr
    below.rename(aside)
    assert f"{below} is not there any more" in shell.run("start", name, check=5).stderr
    assert base_of(top) == "" and shell.virsh("domstate", name) == "shut off"
    assert "is not there any more" in shell.run("doctor", "--fix", check=None).stdout
    aside.rename(below)
    os.utime(below, ns=(was.st_atime_ns, was.st_mtime_ns))
    shell.run("start", name)
    shell.virsh("destroy", name)
    assert leftovers() == [] and qemu_img_compares(top, below)


def test_ctrl_c_in_a_pull_leaves_nothing_to_be_settled(shell: Shell, name: str, held: tuple[Path, Path]) -> None:
    top, below = held
    shell.virsh("start", name, "--paused")
    assert unflushed(name, top, "CTRL-C", "flatten", f"{name}:data").returncode == 130
    assert leftovers() == []
    kill_qemu(shell, name)
    assert pattern.whole(top) and qemu_img_compares(top, below)


def qemu_img_compares(one: Path, other: Path) -> bool:
    return subprocess.run(["qemu-img", "compare", "-q", str(one), str(other)], check=False).returncode == 0
