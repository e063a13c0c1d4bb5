"""Disks with bad sectors under snapshots, backups, clones and forks: each fails with its reason, and nothing is lost.

QEMU and vmctl run with sick_disk.c before their libc: reads or writes of some of their files fail as a bad disk's do.
After each the guest runs on and reads what it wrote, the VM's files are whole, nothing is left over, and once the disk
is well the same command succeeds.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system import pattern
from tests.system.conftest import REPO, VMCTL, Shell, environment, volumes
from vmctl import disk_xml

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

POOL = Path("/var/lib/libvirt/vmctl/vmctl")
RULES, SHIM = Path("/run/sick-disk"), Path("/run/sick-disk.so")
SOURCE = Path(__file__).with_name("sick_disk.c")
DATA = pattern.blocks("base", 256)
LATER = pattern.blocks("later", 16)
TALLY: dict[str, list[int]] = {}


@dataclass(frozen=True)
class Sick:
    """A running VM whose QEMU, like the vmctl of ``env``, meets what RULES says. Its disk ``data`` is /dev/vdc."""

    shell: Shell
    name: str
    env: dict[str, str]

    def disk(self, serial: str = "data") -> str:
        """The file of a disk now."""
        devices = disk_xml.read(self.shell.virsh("dumpxml", self.name))
        return next(one.source for one in devices if one.serial == serial)

    def fails(self, *words: str) -> str:
        """Give a command that must fail; what it said, of which the first line is an error as they all are."""
        # A process of its own from the start: what is preloaded is preloaded then.
        argv = [*VMCTL, *words]
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=240, check=False, cwd=REPO)
        assert done.returncode not in {0, 2} and "Traceback" not in done.stderr, (words, done.stderr)
        assert "cannot " in done.stderr, done.stderr
        return done.stderr

    def well(self, device: str = "/dev/vdc") -> None:
        """The guest runs and reads what it wrote."""
        assert self.shell.virsh("domstate", self.name) == "running"
        assert pattern.holds(self.shell, self.name, device, DATA)

    def clean(self, store: Path | None = None) -> None:
        """Nothing is left of what failed."""
        doctor = self.shell.run("doctor", "--fix", check=None)
        assert "no VM knows of" not in doctor.stdout, doctor.stdout
        assert not list(POOL.glob(".vmctl-*"))
        assert not store or not [one for one in store.rglob("*") if one.name.startswith(".")]


@contextmanager
def bad(operation: str, *rules: str) -> Iterator[None]:
    """A disk is bad within the block, which is one fault tried, and survived when all after it goes well."""
    TALLY.setdefault(operation, [0, 0])[0] += 1
    RULES.write_text("".join(f"{rule}\n" for rule in rules))
    try:
        yield
    finally:
        RULES.unlink()


def survived(operation: str) -> None:
    TALLY[operation][1] += 1


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Prints what was tried when all is over."""
    yield
    print(f"\n{'I/O errors in':<28} tried  survived")
    for operation, (tried, well) in sorted(TALLY.items()):
        print(f"{operation:<28} {tried:>5} {well:>9}")


@pytest.fixture(scope="module")
def vm() -> Iterator[Sick]:
    """Booted once."""
    shell, name = Shell(), f"t-{secrets.token_hex(4)}"
    before = volumes(shell)
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(SHIM), str(SOURCE), "-ldl"], check=True, timeout=60)
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("disk", "attach", name, "16M", "--serial", "data")
    env = {"LD_PRELOAD": str(SHIM), "SICK_DISK": str(RULES)}
    told = "".join(f"<qemu:env name='{key}' value='{value}'/>" for key, value in env.items())
    text = shell.virsh("dumpxml", name, "--inactive")
    text = text.replace("<qemu:capabilities>", f"<qemu:commandline>{told}</qemu:commandline><qemu:capabilities>")
    assert "<qemu:env" in text
    changed = Path("/tmp/sick.xml")
    changed.write_text(text)
    shell.virsh("define", str(changed))
    shell.run("start", name)
    shell.run("wait", name, "--for", "agent", "--timeout", "200", timeout=240)
    pattern.write(name, "/dev/vdc", DATA)
    yield Sick(shell, name, environment(**env))
    shell.run("delete", name, "--yes")
    assert volumes(shell) == before


def test_backups(vm: Sick, tmp_path: Path) -> None:
    """The source cannot be read, the target not written, a backup not read back."""
    store, shell = tmp_path / "backups", vm.shell
    create = ("backup", "create", vm.name, "--folder", str(store))
    shell.run(*create)
    pattern.write(vm.name, "/dev/vdc", LATER, at=300)
    for rule in (f"read {Path(vm.disk()).name}", f"write {store}"):
        operation = "backup, reading" if rule.startswith("read") else "backup, writing"
        with bad(operation, rule):
            said = vm.fails(*create)
        assert "Input/output error" in said, said
        vm.clean(store)
        vm.well()
        survived(operation)
    assert "incremental" in shell.run(*create).stdout  # what changed is known still
    first, second = json.loads(shell.run("backup", "list", "--folder", str(store), "-o", "json").stdout)
    for operation, words in (
        ("verify, reading", ("backup", "verify", vm.name)),
        ("restore, reading", ("backup", "restore", vm.name, second["id"], "--as", f"{vm.name}-new")),
    ):
        names = volumes(shell)
        with bad(operation, f"read {store}/{vm.name}/{first['id']}"):
            vm.fails(*words, "--folder", str(store))
        assert volumes(shell) == names and f"{vm.name}-new" not in shell.virsh("list", "--all", "--name")
        shell.run(*words, "--folder", str(store))
        survived(operation)
    shell.run("delete", f"{vm.name}-new", "--yes")
    for one in shell.virsh("checkpoint-list", vm.name, "--name").split():
        shell.virsh("checkpoint-delete", vm.name, one)


def test_snapshots(vm: Sick) -> None:
    """The new file cannot be written; a merge cannot be written, nor read; what is gone back to cannot be read."""
    shell, one = vm.shell, f"{vm.name}.one"
    before = vm.disk()
    with bad("snapshot create, writing", "write .snap-"):
        vm.fails("snapshot", "create", one, "--no-memory")
    assert vm.disk() == before and shell.virsh("snapshot-list", vm.name, "--name") == ""
    vm.clean()
    vm.well()
    survived("snapshot create, writing")
    shell.run("snapshot", "create", one)
    pattern.write(vm.name, "/dev/vdc", LATER, at=300)
    for operation, how in (("snapshot delete, writing", "write"), ("snapshot delete, reading", "read")):
        overlay = vm.disk()
        spoilt = before if how == "write" else overlay
        with bad(operation, f"{how} {Path(spoilt).name} guest={vm.name},"):
            vm.fails("snapshot", "delete", one, "--yes")
            assert vm.disk() == overlay
        vm.well()
        vm.clean()
        vm.well()
        assert pattern.holds(shell, vm.name, "/dev/vdc", LATER, at=300)
        survived(operation)
        if "one" not in shell.virsh("snapshot-list", vm.name, "--name").split():
            before = vm.disk()
            shell.run("snapshot", "create", one)
            pattern.write(vm.name, "/dev/vdc", LATER, at=300)
    held = disk_xml.read(shell.virsh("dumpxml", vm.name))[-1].backing[0]
    with bad("snapshot revert, reading", f"read {Path(held).name}"):
        vm.fails("snapshot", "revert", one, "--yes")
    vm.clean()
    shell.run("snapshot", "revert", one, "--yes")
    vm.well()
    survived("snapshot revert, reading")
    shell.run("snapshot", "delete", one, "--yes")
    vm.well()


def test_copies(vm: Sick) -> None:
    """The new VM cannot read what it is based on; what is copied cannot be read."""
    shell, new = vm.shell, f"{vm.name}-new"
    names = volumes(shell)
    with bad("fork, reading", f"read {Path(vm.disk('root')).name} guest={new},"):
        vm.fails("fork", vm.name, new)
    vm.clean()
    vm.well()
    assert new not in shell.virsh("list", "--all", "--name")
    assert {one for one in volumes(shell) if "-layer" not in one} == {one for one in names if "-layer" not in one}
    shell.run("fork", vm.name, new)
    assert pattern.holds(shell, new, "/dev/vdc", DATA)
    survived("fork, reading")
    shell.run("delete", new, "--yes")
    shell.run("stop", vm.name, "--force")
    names = volumes(shell)
    with bad("clone, reading", f"read {Path(vm.disk()).name}"):
        vm.fails("clone", vm.name, new, "--full")
    vm.clean()
    assert volumes(shell) == names
    shell.run("clone", vm.name, new, "--full")
    shell.run("delete", new, "--yes")
    shell.run("start", vm.name)
    shell.run("wait", vm.name, "--for", "agent", "--timeout", "200", timeout=240)
    vm.well("/dev/vdb")  # its seed, used, is no longer there
    survived("clone, reading")


def test_a_vm_is_off_when_its_disks_are(vm: Sick) -> None:
    """Off for its guest, it is on its way there for as long as QEMU waits for a disk: no stop is done then, no start.

    Its power button is pressed again after 5 s, which libvirt refuses one that is on its way.
    """
    shell, name = vm.shell, vm.name
    with bad("stop, closing", f"close {Path(vm.disk()).name} guest={name},"):
        assert f"stop {name} --force" in shell.run("stop", name, "--timeout", "16", check=7).stderr
        assert shell.virsh("domstate", name) == "in shutdown"
        words = [*VMCTL, "start", name]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as starting:
            assert starting.stderr and starting.stderr.readline() == f"waiting for {name} to be off\n"
            RULES.rename(RULES.with_suffix(".off"))
            said, _ = starting.communicate(timeout=120)
        RULES.with_suffix(".off").rename(RULES)
    assert said == f"{name}: booted\n"
    shell.run("wait", name, "--for", "agent", "--timeout", "200", timeout=240)
    vm.well("/dev/vdb")  # booted again it has no seed between its disks
    survived("stop, closing")
