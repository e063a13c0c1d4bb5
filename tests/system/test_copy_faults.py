"""Clone and fork stopped by SIGKILL and SIGINT after every step, and their QEMU and libvirtd killed under them.

After each the source runs or starts and holds what it held, and nothing is left that `doctor --fix` does not mend.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system import libvirtd, pattern
from tests.system.conftest import REPO, VMCTL, Shell, volumes
from tests.system.test_clone import checked
from tests.system.test_interrupted import interrupted
from vmctl import disk_xml, domain_job, hosts
from vmctl.errors import VmctlError
from vmctl.wait import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]

POOL = Path("/var/lib/libvirt/vmctl/vmctl")
DATA = pattern.blocks("base", 64)
TALLY: dict[str, list[int]] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Prints what was tried when all is over."""
    yield
    print(f"\n{'fault':<28} tried  survived")
    for fault, (tries, survived) in sorted(TALLY.items()):
        print(f"{fault:<28} {tries:>5} {survived:>9}")


@pytest.fixture(scope="module")
def guest() -> Iterator[str]:
    """One VM that holds a pattern, for all faults; all that comes of it is gone afterwards, and nothing left behind."""
    shell, name = Shell(), f"t-{secrets.token_hex(4)}"
    before = volumes(shell)
    shell.guest(name)
    pattern.write(name, "/root/data", DATA)
    yield name
    shell.run("doctor", "--fix", check=None)
    for one in shell.virsh("list", "--all", "--name").split():
        if one.startswith(name):
            shell.run("delete", one, "--yes")
    assert volumes(shell) == before
    assert not list(POOL.glob(".vmctl-*"))


@pytest.fixture
def vm(shell: Shell, guest: str) -> str:
    """The VM, running."""
    if shell.virsh("domstate", guest) != "running":
        shell.run("start", guest)
    shell.run("wait", guest, "--for", "agent", "--timeout", "200", timeout=240)
    return guest


@pytest.fixture
def off(shell: Shell, guest: str) -> str:
    """The VM, stopped."""
    if shell.virsh("domstate", guest) != "shut off":
        shell.run("stop", guest, "--force")
    return guest


def copied(shell: Shell, vm: str, raw: Path) -> Path:
    """What a stopped VM would read from its first disk, in a file."""
    disk = disk_xml.read(shell.virsh("dumpxml", vm, "--inactive"))[0]
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk.source, str(raw)], check=True, timeout=60)
    return raw


def same(shell: Shell, vm: str, raw: Path) -> bool:
    """Whether it still would read that."""
    disk = disk_xml.read(shell.virsh("dumpxml", vm, "--inactive"))[0]
    words = ["compare", "-q", "-f", "raw", "-F", "qcow2", str(raw), disk.source]
    return subprocess.run(["qemu-img", *words], check=False, timeout=60).returncode == 0


def nothing_left(shell: Shell, new: str) -> str:
    """After a fault: no new VM that is not whole, and nothing unowned. New VMs that are whole are deleted.

    What doctor said.
    """
    doctor = shell.run("doctor", "--fix", check=None)
    assert "no VM knows of" not in doctor.stdout, doctor.stdout
    for one in shell.virsh("list", "--all", "--name").split():
        if one.startswith(new):
            assert shell.json("show", one)["state"] != "creating", one
            shell.run("delete", one, "--yes")
    assert not list(POOL.glob(".vmctl-*"))
    return doctor.stdout


def runs_on(shell: Shell, vm: str, *, begun: bool = False) -> None:
    """The source is up, or will be when it was begun just now, and reads what it had written."""
    if begun:
        shell.run("wait", vm, "--for", "ssh", "--timeout", "200", timeout=240)
    assert pattern.holds(shell, vm, "/root/data", DATA)


@contextmanager
def tried(fault: str) -> Iterator[None]:
    """One fault, which is survived when the block ends well."""
    TALLY.setdefault(fault, [0, 0])[0] += 1
    yield
    TALLY[fault][1] += 1


def after_every_step(tmp_path: Path, which: str, *words: str) -> Iterator[None]:
    """Give a command line again and again, each time with a fault one step later, until there is no such step."""
    codes = {"SIGKILL": {-signal.SIGKILL}, "SIGINT": {130, 0}}.get(which, set(range(20)))
    for at in range(1, 60):
        code, steps = interrupted(tmp_path, which, at, *words)
        if (code == 0 and len(steps) < at) if which in {"SIGKILL", "SIGINT"} else not steps:
            assert at >= 8
            return
        assert code in codes, (code, steps)
        with tried(f"{words[0]}, {which}"):
            yield


@pytest.mark.parametrize("which", ["SIGKILL", "SIGINT", "LIBVIRTD"])
def test_clone_stopped_after_every_step(shell: Shell, off: str, tmp_path: Path, which: str) -> None:
    new, before = f"{off}-new", copied(shell, off, tmp_path / "before")
    for _ in after_every_step(tmp_path, which, "clone", off, new):
        libvirtd.awake()
        nothing_left(shell, new)
        assert same(shell, off, before)
        checked()
    nothing_left(shell, new)
    shell.run("start", off)
    runs_on(shell, off, begun=True)


def test_an_interrupted_clone_takes_its_layers_back(shell: Shell, off: str, tmp_path: Path) -> None:
    """Each try left a volume for each disk, and a record that knew of it, for as long as the VM is there."""

    def defined() -> list[str]:  # without its indentation: libvirt sets metadata in as it got it when it was defined
        return [line.strip() for line in shell.virsh("dumpxml", off).splitlines()]

    before = volumes(shell), defined()
    for step in ("domain.set_record", "storage.create_volume"):
        code, steps = interrupted(tmp_path, "SIGINT", step, "clone", off, f"{off}-new")
        assert code == 130 and step in steps
        assert (volumes(shell), defined()) == before, step


@pytest.mark.parametrize("which", ["SIGKILL", "SIGINT", "LIBVIRTD"])
def test_fork_stopped_at_every_step(shell: Shell, vm: str, tmp_path: Path, which: str) -> None:
    new = f"{vm}-new"
    for _ in after_every_step(tmp_path, which, "fork", vm, new):
        libvirtd.awake()
        said = nothing_left(shell, new)
        # libvirt may have died when QEMU had gone on in the new layers and it had not noted it: then doctor says this.
        if astray := f"vmctl stop {vm}, and start it" in said:
            shell.run("stop", vm)
            shell.run("start", vm)
        runs_on(shell, vm, begun=astray)
    nothing_left(shell, new)


def test_a_vm_that_libvirtd_died_upon_runs_on(shell: Shell, vm: str) -> None:
    """Held, with a libvirtd that knows of no reason: what one leaves that dies between holding it and noting why."""
    with pytest.raises(VmctlError, match="gone"), hosts.open_host() as host, domain_job.running_on(host, vm):
        shell.virsh("suspend", vm)
        os.kill(int(Path("/run/libvirtd.pid").read_text()), signal.SIGKILL)
        threading.Timer(0.5, libvirtd.begin).start()
        raise VmctlError("gone")
    assert shell.virsh("domstate", vm) == "running"


def qemu_of(name: str) -> int | None:
    """The process of a domain."""
    try:
        return int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
    except (OSError, ValueError):
        return None


def test_the_new_vms_qemu_killed(shell: Shell, vm: str, tmp_path: Path) -> None:
    """As soon as it is there, and after every step from the one on that brought it to the memory."""
    new = f"{vm}-new"
    fork = subprocess.Popen([*VMCTL, "fork", vm, new], stderr=subprocess.PIPE, text=True, cwd=REPO)
    pid = wait_until(lambda: qemu_of(new), what="QEMU", timeout_s=60, interval_s=0.005)
    with tried("fork, the new QEMU killed"):
        os.kill(pid, signal.SIGKILL)
        _, errors = fork.communicate(timeout=300)
        assert "Traceback" not in errors, errors
        nothing_left(shell, new)
        runs_on(shell, vm)
    code, steps = interrupted(tmp_path, "SIGINT", 60, "fork", vm, new)
    assert code == 0
    nothing_left(shell, new)
    for at in range(steps.index("saved.restore_paused") + 1, len(steps) + 1):
        with tried("fork, the new QEMU killed"):
            interrupted(tmp_path, f"SIGKILL@/run/libvirt/qemu/{new}.pid", at, "fork", vm, new)
            nothing_left(shell, new)
            runs_on(shell, vm)


@pytest.mark.parametrize("step", ["the state of", "is taken"])
def test_the_sources_qemu_killed(shell: Shell, vm: str, step: str) -> None:
    """Killed while its memory is written, and after: it starts again, by itself or in the layer it had got."""
    new = f"{vm}-new"
    fork = subprocess.Popen([*VMCTL, "fork", vm, new], stderr=subprocess.PIPE, text=True, cwd=REPO)
    assert fork.stderr is not None
    if step == "is taken":
        while step not in (line := fork.stderr.readline()):
            assert line
    else:
        wait_until(lambda: list(POOL.glob(".vmctl-*/memory")), what="memory", timeout_s=60, interval_s=0.005)
    pid = qemu_of(vm)
    assert pid is not None
    with tried("fork, the first QEMU killed"):
        os.kill(pid, signal.SIGKILL)
        _, errors = fork.communicate(timeout=300)
        assert "Traceback" not in errors, errors
        wait_until(
            lambda: shell.virsh("domstate", vm) == "shut off", what="end of the source", timeout_s=60, interval_s=0.2
        )
        nothing_left(shell, new)
        checked()
        shell.run("start", vm)
        runs_on(shell, vm, begun=True)


@contextmanager
def room(size: int) -> Iterator[None]:
    """Only so many more bytes than there are now fit into the pool."""
    found = os.statvfs(POOL)
    _resize((found.f_blocks - found.f_bfree) * found.f_frsize + size)
    try:
        yield
    finally:
        _resize(found.f_blocks * found.f_frsize)


def _resize(size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", "/var/lib/libvirt"], check=True)


def test_a_full_pool(shell: Shell, vm: str) -> None:
    """No room for the memory: the fork fails, says why, and the source runs on as it was."""
    new = f"{vm}-new"
    with tried("fork, no room"):
        with room(20 << 20):
            done = shell.run("fork", vm, new, check=None, timeout=240)
        assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
        nothing_left(shell, new)
        runs_on(shell, vm)


@pytest.mark.parametrize("options", [("--full",), ("--count", "3")])
def test_a_full_pool_for_clones(shell: Shell, off: str, tmp_path: Path, options: tuple[str, ...]) -> None:
    new, before = f"{off}-new", copied(shell, off, tmp_path / "before")
    with tried("clone, no room"):
        with room(300 << 10):
            done = shell.run("clone", off, new, *options, check=None, timeout=240)
        assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
        nothing_left(shell, new)
        assert same(shell, off, before)
        checked()
