"""Backups and restores cut off at every step: the VM runs on, earlier backups stay good, what is left is cleared."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import libvirtd, pattern
from tests.system.conftest import REPO, Shell, environment, volumes
from tests.system.test_backup import checkpoints, device, disk_of, holds, verified, write
from tests.system.test_interrupted import interrupted
from vmctl.wait import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(3000)]

FAULTS: Counter[str] = Counter()
BLOCKS = 256


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """The table of faults tried and survived, printed at the end."""
    yield
    print("\nfault                                         tried  survived")
    for name in sorted({key.partition("|")[0] for key in FAULTS}):
        print(f"{name:<44} {FAULTS[name + '|tried']:>6} {FAULTS[name + '|survived']:>9}")


def tried(name: str) -> None:
    FAULTS[f"{name}|tried"] += 1


def survived(name: str) -> None:
    FAULTS[f"{name}|survived"] += 1


@pytest.fixture(scope="module")
def guest() -> Iterator[str]:
    """One VM with a disk ``data`` for all faults: most of them must leave it running, and each must leave it good."""
    shell, name = Shell(), f"t-{secrets.token_hex(4)}"
    before = volumes(shell)
    shell.guest(name)
    shell.run("disk", "attach", name, "16M", "--serial", "data")
    yield name
    shell.run("delete", name, "--yes", "--missing-ok", check=None)
    assert volumes(shell) == before


@pytest.fixture
def vm(shell: Shell, guest: str) -> str:
    """The guest, running, with no checkpoint of another test's backups."""
    if shell.virsh("domstate", guest) != "running":
        started(shell, guest)
    shell.run("wait", guest, "--for", "agent")
    for one in checkpoints(shell, guest):
        shell.virsh("checkpoint-delete", guest, one)
    return guest


def started(shell: Shell, vm: str) -> None:
    shell.run("start", vm)
    shell.run("wait", vm, "--for", "agent", "--timeout", "120")


def clean(shell: Shell, vm: str, store: Path) -> None:
    """Nothing of a cut-off backup is left that `doctor --fix` does not take."""
    shell.run("doctor", "--fix", check=None)
    left = [one.name for one in (store / vm).iterdir() if one.name.startswith(".")] if (store / vm).exists() else []
    assert left == [], left
    assert "domainbackup" not in shell.virsh("backup-dumpxml", vm, check=False)


def copied(folder: Path, to: Path) -> None:
    """With what its backups share still shared."""
    subprocess.run(["cp", "-a", str(folder), str(to)], check=True, timeout=60)


def restores_to(shell: Shell, vm: str, store: Path, data: bytes) -> None:
    copy = f"{vm}-copy"
    shell.run("backup", "restore", vm, "--as", copy, "--folder", str(store))
    try:
        holds(shell, copy, data)
    finally:
        shell.run("delete", copy, "--yes")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of backups that the config file names, so that doctor knows it."""
    folder, config = tmp_path / "backups", tmp_path / "config"
    (config / "vmctl").mkdir(parents=True)
    (config / "vmctl" / "config.toml").write_text(f'backups = "{folder}"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(config))
    return folder


@pytest.mark.parametrize("which", ["SIGKILL", "SIGINT"])
def test_backups_of_a_running_vm_cut_off_after_every_step(
    shell: Shell, vm: str, store: Path, tmp_path: Path, which: str
) -> None:
    fault = f"backup, vmctl {which}"
    want = write(shell, vm, "first", BLOCKS)
    shell.run("backup", "create", vm)
    path, at = device(), 0
    while True:
        at += 1
        new = pattern.blocks(f"{which}{at}", 1)
        assert pattern.turned(vm, path, want, new, at=BLOCKS - 1)
        want = want[:-4096] + new
        good = sorted(one.name for one in (store / vm).iterdir())
        code, steps = interrupted(tmp_path, which, at, "backup", "create", vm, "--freeze", "--keep", "3")
        if code == 0 and len(steps) < at:
            break
        tried(fault)
        assert code in {-signal.SIGKILL, 130}, (code, steps)
        assert shell.virsh("domstate", vm) == "running"
        if at % 2 == 0 or which == "SIGINT":
            clean(shell, vm, store)
        now = verified(vm, store)
        assert set(good[-2:]) <= set(now), (good, now, steps)
        done = shell.run("backup", "create", vm, "--keep", "3")
        assert "incremental" in done.stdout, (steps, done.stdout, done.stderr)
        assert len(checkpoints(shell, vm)) == 1, steps
        if at % 3 == 0:
            restores_to(shell, vm, store, want)
        survived(fault)
    assert at >= 8 and pattern.holds(shell, vm, path, want)
    restores_to(shell, vm, store, want)
    shell.run("stop", vm)
    subprocess.run(["qemu-img", "check", "-q", disk_of(shell, vm).source], check=True, timeout=60)


def test_backups_of_a_stopped_vm_killed_after_every_step(shell: Shell, vm: str, store: Path, tmp_path: Path) -> None:
    fault = "backup of a stopped VM, vmctl SIGKILL"
    want = write(shell, vm, "first", BLOCKS)
    shell.run("stop", vm)
    shell.run("backup", "create", vm)
    at = 0
    while True:
        at += 1
        code, steps = interrupted(tmp_path, "SIGKILL", at, "backup", "create", vm)
        if code == 0 and len(steps) < at:
            break
        tried(fault)
        clean(shell, vm, store)
        verified(vm, store)
        shell.run("backup", "create", vm)
        assert len(checkpoints(shell, vm)) == 1, steps
        known = subprocess.run(
            ["qemu-img", "info", "--output=json", disk_of(shell, vm).source], capture_output=True, check=True
        )
        assert len(json.loads(known.stdout)["format-specific"]["data"]["bitmaps"]) == 1, steps
        subprocess.run(["qemu-img", "check", "-q", disk_of(shell, vm).source], check=True, timeout=60)
        survived(fault)
    restores_to(shell, vm, store, want)
    started(shell, vm)
    assert pattern.holds(shell, vm, device(), want)


def ended(shell: Shell, vm: str) -> None:
    """Wait until libvirt has seen the end of a killed QEMU."""
    wait_until(lambda: shell.virsh("domstate", vm) == "shut off", what="its end", timeout_s=60)


def test_qemu_killed_at_every_step_of_its_backup(shell: Shell, vm: str, store: Path, tmp_path: Path) -> None:
    fault = "backup, QEMU SIGKILL"
    want = write(shell, vm, "first", BLOCKS)
    shell.run("backup", "create", vm)
    at = 0
    while True:
        at += 1
        pid = f"/run/libvirt/qemu/{vm}.pid"
        code, steps = interrupted(tmp_path, f"SIGKILL@{pid}", at, "backup", "create", vm)
        if len(steps) < at:
            break
        tried(fault)
        assert code in {0, 6}, (code, steps)
        ended(shell, vm)
        verified(vm, store)
        holds(shell, vm, want)
        # It starts each time; that its guest boots too is seen at the end.
        shell.virsh("start", vm, "--paused")
        done = shell.run("backup", "create", vm)
        assert "full" in done.stdout and "whole" in done.stderr, (steps, done.stdout, done.stderr)
        assert len(checkpoints(shell, vm)) == 1
        survived(fault)
    assert at >= 5
    shell.virsh("resume", vm)
    shell.run("wait", vm, "--for", "agent", "--timeout", "120")
    assert pattern.holds(shell, vm, device(), want)
    verified(vm, store)
    restores_to(shell, vm, store, want)


def test_libvirtd_killed_at_every_step_of_a_backup(shell: Shell, vm: str, store: Path, tmp_path: Path) -> None:
    fault = "backup, libvirtd SIGKILL"
    want = write(shell, vm, "first", BLOCKS)
    shell.run("backup", "create", vm)
    path, at = device(), 0
    while True:
        at += 1
        code, steps = interrupted(tmp_path, "SIGKILL@/run/libvirtd.pid", at, "backup", "create", vm)
        if len(steps) < at:
            break
        tried(fault)
        libvirtd.begin()
        assert shell.virsh("domstate", vm) == "running"
        verified(vm, store)
        new = pattern.blocks(f"libvirtd{at}", 1)
        assert pattern.turned(vm, path, want, new, at=BLOCKS - 1)
        want = want[:-4096] + new
        done = shell.run("backup", "create", vm)
        assert len(checkpoints(shell, vm)) == 1, (steps, done.stderr)
        verified(vm, store)
        restores_to(shell, vm, store, want)
        survived(fault)


@pytest.mark.parametrize("which", ["SIGKILL", "SIGINT", "LIBVIRTD"])
def test_restores_over_the_old_vm_cut_off_after_every_step(
    shell: Shell, vm: str, store: Path, tmp_path: Path, which: str
) -> None:
    fault = f"restore, {'libvirtd' if which == 'LIBVIRTD' else 'vmctl'} {which}"
    then = write(shell, vm, "then", BLOCKS)
    shell.run("backup", "create", vm, "--freeze")
    now = write(shell, vm, "now", BLOCKS)
    shell.run("stop", vm)
    old = {disk_of(shell, vm, serial).source for serial in ("data", "root")}
    at = 0
    while True:
        at += 1
        code, steps = interrupted(tmp_path, which, at, "backup", "restore", vm, "--yes")
        if not steps if which == "LIBVIRTD" else code == 0 and len(steps) < at:
            break
        tried(fault)
        assert which == "LIBVIRTD" or code in {-signal.SIGKILL, 130}, (code, steps)
        libvirtd.awake()
        shell.run("doctor", "--fix", check=None)
        # All of it happened, or nothing.
        sources = {disk_of(shell, vm, serial).source for serial in ("data", "root")}
        restored = {one not in old for one in sources}
        assert len(restored) == 1, (steps, sources)
        holds(shell, vm, then if restored == {True} else now)
        mine = {v for v in volumes(shell) if v.startswith(f"{vm}-") and v.endswith(".qcow2")}
        assert mine == {Path(one).name for one in sources}, (steps, mine)
        if restored == {True} and which == "LIBVIRTD":
            old, now = sources, then
        elif restored == {True}:
            break
        survived(fault)
    assert at >= 6
    survived(fault) if FAULTS[f"{fault}|survived"] < FAULTS[f"{fault}|tried"] else None
    shell.run("backup", "restore", vm, "--yes")
    holds(shell, vm, then)
    started(shell, vm)
    assert pattern.holds(shell, vm, device(), then)


@pytest.mark.parametrize("which", ["SIGKILL", "LIBVIRTD"])
def test_restores_to_a_new_name_killed_after_every_step(
    shell: Shell, vm: str, store: Path, tmp_path: Path, which: str
) -> None:
    fault = f"restore as another, {'libvirtd' if which == 'LIBVIRTD' else 'vmctl'} {which}"
    data = write(shell, vm, "data", BLOCKS)
    shell.run("backup", "create", vm)
    copy, before = f"{vm}-new", volumes(shell)
    at = 0
    while True:
        at += 1
        code, steps = interrupted(tmp_path, which, at, "backup", "restore", vm, "--as", copy, "--new-identity")
        if not steps if which == "LIBVIRTD" else code == 0:
            break
        tried(fault)
        libvirtd.awake()
        if at % 2:
            shell.run("backup", "restore", vm, "--as", copy, "--new-identity", check=None)
            holds(shell, copy, data)
        shell.run("doctor", "--fix", check=None)
        shell.run("delete", copy, "--yes", "--missing-ok")
        assert volumes(shell) == before, steps
        survived(fault)
    shell.run("delete", copy, "--yes")
    assert at >= 5
    assert volumes(shell) == before


def test_a_prune_killed_after_every_step_leaves_all_that_is_kept(
    shell: Shell, vm: str, store: Path, tmp_path: Path
) -> None:
    fault = "prune with a merge, vmctl SIGKILL"
    want = write(shell, vm, "first", BLOCKS)
    for number in range(3):
        write(shell, vm, f"{number}", 16, at=number * 16)
        shell.run("backup", "create", vm)
    for number in range(3):
        want = want[: number * 65536] + pattern.blocks(f"{number}", 16) + want[(number + 1) * 65536 :]
    saved = tmp_path / "saved"
    copied(store, saved)
    at = 0
    while True:
        at += 1
        code, steps = interrupted(tmp_path, "SIGKILL", at, "backup", "prune", vm, "--keep", "1", "--yes")
        if code == 0:
            break
        tried(fault)
        last = verified(vm, store)[-1]
        assert last == sorted(one.name for one in (saved / vm).iterdir())[-1]
        if at % 4 == 0:
            restores_to(shell, vm, store, want)
        shell.run("backup", "prune", vm, "--keep", "1", "--yes")
        assert verified(vm, store) == [last], steps
        assert not [one for one in (store / vm).iterdir() if one.name.startswith(".")]
        shutil.rmtree(store)
        copied(saved, store)
        survived(fault)
    assert at >= 6
    restores_to(shell, vm, store, want)


def test_no_room_and_no_way_to_write(shell: Shell, vm: str, store: Path, tmp_path: Path) -> None:
    want = write(shell, vm, "first", BLOCKS)
    image, small = tmp_path / "small.img", tmp_path / "small"
    small.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    loop = subprocess.run(["mount", "-o", "loop", str(image), str(small)], check=False).returncode == 0
    if not loop:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(small)], check=True)
    try:
        tried("backup, no room in the target")
        done = shell.run("backup", "create", vm, "--folder", str(small), check=10)
        assert "No space left" in done.stderr and "make room" in done.stderr
        assert checkpoints(shell, vm) == [] and not any((small / vm).iterdir())
        assert pattern.holds(shell, vm, device(), want)
        survived("backup, no room in the target")
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        tried("backup, the target is read-only")
        done = shell.run("backup", "create", vm, "--folder", str(small), check=10)
        assert "Read-only" in done.stderr and checkpoints(shell, vm) == []
        survived("backup, the target is read-only")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    # No room for a restore: nothing is left of it, and the VM is as before.
    shell.run("backup", "create", vm)
    pool = tmp_path / "pool"
    pool.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=711", "none", str(pool)], check=True)
    try:
        shell.run("disk", "pool", "create", "narrow", "--path", str(pool))
        tried("restore, no room in the pool")
        done = shell.run("backup", "restore", vm, "--as", f"{vm}-new", "--pool", "narrow", check=10)
        assert "No space left" in done.stderr and not any(pool.iterdir())
        assert f"{vm}-new" not in shell.virsh("list", "--all", "--name")
        survived("restore, no room in the pool")
    finally:
        shell.run("disk", "pool", "delete", "narrow", "--yes", check=None)
        subprocess.run(["umount", str(pool)], check=True)
    restores_to(shell, vm, store, want)


def test_a_tampered_or_foreign_backup_is_refused_by_name(shell: Shell, vm: str, store: Path, tmp_path: Path) -> None:
    write(shell, vm, "first", BLOCKS)
    shell.run("backup", "create", vm)
    write(shell, vm, "second", 32)
    shell.run("backup", "create", vm)
    first, second = verified(vm, store)
    saved = tmp_path / "saved"
    copied(store, saved)
    whole, increment = store / vm / first, store / vm / second
    (data,) = [d for d in json.loads((whole / "manifest.json").read_text())["disks"] if d["serial"] == "data"]
    file, listing = data["file"], data["index"]

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        at = content.rindex(pattern.blocks("first", BLOCKS)[-4096:]) if path.suffix == ".qcow2" else len(content) // 2
        content[at] ^= 1
        path.write_bytes(content)

    def foreign(path: Path) -> None:
        path.unlink()
        words = ["create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", str(path), str(data["size"])]
        subprocess.run(["qemu-img", *words], check=True)

    def linked(path: Path) -> None:
        path.unlink()
        path.symlink_to("/etc/passwd")

    def climbing(path: Path) -> None:
        path.write_text(path.read_text().replace(f'"{file}"', '"../../../etc/passwd"'))

    cases = {
        "a flipped bit in a disk": (whole / file, flip),
        "a flipped bit in a list of digests": (whole / listing, flip),
        "a disk cut short": (whole / file, lambda path: os.truncate(path, path.stat().st_size - 65536)),
        "a missing disk": (whole / file, Path.unlink),
        "a missing backup in the chain": (whole, shutil.rmtree),
        "a disk based on /etc/passwd": (whole / file, foreign),
        "a disk that is a link to /etc/passwd": (whole / file, linked),
        "a manifest that names ../../../etc/passwd": (whole / "manifest.json", climbing),
        "a manifest that is no JSON": (whole / "manifest.json", lambda path: path.write_text("{")),
        "an increment's disk of another backup": (increment / file, lambda path: shutil.copy(whole / file, path)),
    }
    for what, (path, spoil) in cases.items():
        tried(f"tampered: {what}")
        spoil(path)
        verify = shell.run("backup", "verify", vm, check=10)
        assert path.name in verify.stderr or first in verify.stderr, (what, verify.stderr)
        restore = shell.run("backup", "restore", vm, second, "--as", f"{vm}-new", check=10)
        assert path.name in restore.stderr or first in restore.stderr, (what, restore.stderr)
        assert "root:" not in verify.stdout + verify.stderr + restore.stdout + restore.stderr
        assert f"{vm}-new" not in shell.virsh("list", "--all", "--name")
        assert not [one for one in volumes(shell) if one.startswith(f"{vm}-new")]
        shutil.rmtree(store)
        copied(saved, store)
        survived(f"tampered: {what}")
    # A definition that would reach other files of the host.
    manifest = json.loads((increment / "manifest.json").read_text())
    text = (increment / "domain.xml").read_text()
    text = text.replace(
        "</disk>", "</disk><disk type='file' device='disk'><source file='/etc/shadow'/><target dev='vdz'/></disk>", 1
    )
    import hashlib

    for one in manifest["files"]:
        if one["role"] == "domain":
            one |= {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (increment / "domain.xml").write_text(text)
    (increment / "manifest.json").write_text(json.dumps(manifest))
    tried("tampered: a definition with /etc/shadow as a disk")
    done = shell.run("backup", "restore", vm, second, "--as", f"{vm}-new", check=2)
    assert "/etc/shadow" in done.stderr and "--trust-definition" in done.stderr
    survived("tampered: a definition with /etc/shadow as a disk")


def test_two_backups_at_once(shell: Shell, vm: str, store: Path, tmp_path: Path) -> None:
    """The first is held after its first, second, third step."""
    want = write(shell, vm, "first", BLOCKS)
    for at in range(1, 4):
        tried("two backups of one VM at once")
        log = tmp_path / f"changes-{at}"
        first = subprocess.Popen(
            [sys.executable, "-m", "tests.system.interrupting", "SIGSTOP", str(at), "backup", "create", vm],
            env=environment(CHANGES=str(log)), stderr=subprocess.PIPE, text=True, cwd=REPO,
        )  # fmt: skip
        state = Path(f"/proc/{first.pid}/stat")
        wait_until(lambda state=state: ") T " in state.read_text(), what="its stop", timeout_s=60)  # type: ignore[misc]
        shell.run("backup", "create", vm, check=5)
        first.send_signal(signal.SIGCONT)
        errors = first.communicate(timeout=120)[1]
        assert first.returncode == 0, errors
        survived("two backups of one VM at once")
    assert len(verified(vm, store)) == 3
    restores_to(shell, vm, store, want)
