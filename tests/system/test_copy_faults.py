"""Clone and fork stopped by SIGKILL and SIGINT after every step, and their QEMU and libvirtd killed under them.

After each the source runs or starts and holds what it held, and nothing is left that `doctor --fix` does not mend.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import pattern
from tests.system.conftest import REPO, VMCTL, Shell, volumes
from tests.system.test_clone import checked
from tests.system.test_interrupted import interrupted
from vmctl.wait import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]

POOL = Path("/var/lib/libvirt/vmctl/vmctl")
DATA = pattern.blocks("base", 64)
TALLY = {"tried": 0, "survived": 0}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Prints what was tried when all is over."""
    yield
    print(f"\nfaults in clone and fork: {TALLY['tried']} tried, {TALLY['survived']} survived")


@pytest.fixture
def vm(shell: Shell, name: str) -> Iterator[str]:
    """A running VM that holds a pattern; all that comes of it is gone afterwards, and nothing left in the pool."""
    before = volumes(shell)
    shell.run("create", name, "--image", "micro", "--wait", "agent", timeout=240)
    pattern.write(name, "/root/data", DATA)
    yield name
    shell.run("doctor", "--fix", check=None)
    for one in shell.virsh("list", "--all", "--name").split():
        if one.startswith(name):
            shell.run("delete", one, "--yes")
    assert volumes(shell) == before
    assert not list(POOL.glob(".vmctl-*"))


def whole(shell: Shell, vm: str, new: str, *, running: bool) -> None:
    """What must hold after a fault: no new VM that is not whole, nothing unowned, and the source's data in it."""
    TALLY["tried"] += 1
    doctor = shell.run("doctor", "--fix", check=None)
    assert "no VM knows of" not in doctor.stdout, doctor.stdout
    left = [one for one in shell.virsh("list", "--all", "--name").split() if one.startswith(new)]
    for one in left:
        shown = shell.json("show", one)
        assert shown["state"] != "creating", one
        shell.run("delete", one, "--yes")
    if not running:
        shell.run("start", vm)
    shell.run("wait", vm, "--for", "ssh", "--timeout", "200", timeout=240)
    assert pattern.holds(shell, vm, "/root/data", DATA)
    assert not list(POOL.glob(".vmctl-*"))
    if not running:
        shell.run("stop", vm, "--force")
        checked()
    TALLY["survived"] += 1


@pytest.mark.parametrize("which", ["SIGKILL", "SIGINT"])
def test_clone_stopped_after_every_step(shell: Shell, vm: str, tmp_path: Path, which: str) -> None:
    shell.run("stop", vm, "--force")
    new, at = f"{vm}c", 0
    while True:
        at += 1
        code, steps = interrupted(tmp_path, which, at, "clone", vm, new)
        if code == 0 and len(steps) < at:
            break
        assert code in {-signal.SIGKILL, 130, 0}, (code, steps)
        whole(shell, vm, new, running=False)
    assert at >= 8


@pytest.mark.parametrize("which", ["SIGKILL", "SIGINT"])
def test_fork_stopped_after_every_step(shell: Shell, vm: str, tmp_path: Path, which: str) -> None:
    new, at = f"{vm}f", 0
    while True:
        at += 1
        code, steps = interrupted(tmp_path, which, at, "fork", vm, new)
        if code == 0 and len(steps) < at:
            break
        assert code in {-signal.SIGKILL, 130, 0}, (code, steps)
        whole(shell, vm, new, running=True)
    assert at >= 8


def qemu_of(name: str) -> int | None:
    """The process of a domain."""
    try:
        return int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
    except (OSError, ValueError):
        return None


@pytest.mark.parametrize("after_s", [0.0, 0.15, 0.4, 0.8])
def test_the_new_vms_qemu_killed_in_its_beginning(shell: Shell, vm: str, after_s: float) -> None:
    new = f"{vm}f"
    fork = subprocess.Popen([*VMCTL, "fork", vm, new], stderr=subprocess.PIPE, text=True, cwd=REPO)
    pid = wait_until(lambda: qemu_of(new), what="QEMU", timeout_s=60, interval_s=0.005)
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    _, errors = fork.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    whole(shell, vm, new, running=True)


@pytest.mark.parametrize("step", ["the state of", "is taken"])
def test_the_sources_qemu_killed(shell: Shell, vm: str, step: str) -> None:
    """Killed while its memory is written, and after: it starts again, by itself or in the layer it had got."""
    new = f"{vm}f"
    fork = subprocess.Popen([*VMCTL, "fork", vm, new], stderr=subprocess.PIPE, text=True, cwd=REPO)
    assert fork.stderr is not None
    if step == "is taken":
        while step not in (line := fork.stderr.readline()):
            assert line
    else:
        wait_until(lambda: list(POOL.glob(".vmctl-*/memory")), what="memory", timeout_s=60, interval_s=0.005)
    pid = qemu_of(vm)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    _, errors = fork.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    wait_until(
        lambda: shell.virsh("domstate", vm) == "shut off", what="end of the source", timeout_s=60, interval_s=0.2
    )
    whole(shell, vm, new, running=False)


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.3, 0.7, 1.2, 1.8])
def test_libvirtd_killed_in_a_fork(shell: Shell, vm: str, after_s: float) -> None:
    new = f"{vm}f"
    fork = subprocess.Popen([*VMCTL, "fork", vm, new], stderr=subprocess.PIPE, text=True, cwd=REPO)
    wait_until(lambda: list(POOL.glob(".vmctl-*")), what="its folder", timeout_s=60, interval_s=0.005)
    time.sleep(after_s)
    os.kill(int(Path("/run/libvirtd.pid").read_text()), signal.SIGKILL)
    _, errors = fork.communicate(timeout=300)
    assert "Traceback" not in errors, errors
    subprocess.run(["libvirtd", "-d"], check=True, timeout=30)
    wait_until(
        lambda: subprocess.run(["virsh", "-q", "uri"], capture_output=True, timeout=60).returncode == 0,
        what="libvirtd",
        timeout_s=60,
    )
    whole(shell, vm, new, running=True)


def test_a_full_pool(shell: Shell, vm: str) -> None:
    """No room for the memory: the fork fails, says why, and the source runs on as it was."""
    new = f"{vm}f"
    whole_size = os.statvfs(POOL).f_blocks * os.statvfs(POOL).f_frsize
    _resize(_used(POOL) + (20 << 20))
    try:
        done = shell.run("fork", vm, new, check=None, timeout=240)
        assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    finally:
        _resize(whole_size)
    whole(shell, vm, new, running=True)


@pytest.mark.parametrize("options", [("--full",), ("--count", "3")])
def test_a_full_pool_for_clones(shell: Shell, vm: str, options: tuple[str, ...]) -> None:
    shell.run("stop", vm, "--force")
    whole_size = os.statvfs(POOL).f_blocks * os.statvfs(POOL).f_frsize
    _resize(_used(POOL) + (300 << 10))
    try:
        done = shell.run("clone", vm, f"{vm}c", *options, check=None, timeout=240)
        assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    finally:
        _resize(whole_size)
    whole(shell, vm, f"{vm}c", running=False)


def _resize(size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", "/var/lib/libvirt"], check=True)


def _used(folder: Path) -> int:
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize
