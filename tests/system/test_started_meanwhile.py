"""A stopped VM is started, by virsh or autostart, while vmctl works on its files: they stay those that it writes to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.conftest import REPO, VMCTL, Shell
from vmctl import disk_xml, hosts
from vmctl.wait import wait_until

pytestmark = pytest.mark.system

STARTING = (
    "import subprocess, sys; from vmctl import {module}; from vmctl.cli import run; work = {module}.{function}\n"
    "def working(*words, **more):\n"
    "    work(*words, **more); {module}.{function} = work\n"
    "    subprocess.run(['virsh', 'start', '{name}', '--paused'], check=True, capture_output=True)\n"
    "{module}.{function} = working\n"
    "sys.exit(run(sys.argv[1:]))"
)


def sources(shell: Shell, vm: str, *words: str) -> set[str]:
    return {disk.source for disk in disk_xml.read(shell.virsh("dumpxml", vm, *words))}


@pytest.mark.parametrize(
    ("step", "line"),
    [
        ("qemu_img.require_equal", "disk compact VM:one"),
        ("qemu_img.require_equal", "disk convert VM:one --format raw"),
        ("qemu_img.commit", "snapshot delete VM.one --yes"),
        ("qcow2_overlay.make", "snapshot revert VM.one --yes"),
        ("backup_volumes.disk", "backup restore VM --yes"),
    ],
)
def test_what_a_vm_that_was_started_meanwhile_writes_to_stays(
    shell: Shell, name: str, tmp_path: Path, step: str, line: str
) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("disk", "attach", name, "4M", "--serial", "one")
    words = [word.replace("VM", name) for word in line.split()]
    if words[0] == "snapshot":
        shell.run("snapshot", "create", f"{name}.one")
    if words[0] == "backup":
        words += ["--folder", str(tmp_path / "backups")]
        shell.run("backup", "create", name, *words[-2:])
    before = sources(shell, name, "--inactive")
    module, _, function = step.partition(".")
    code = STARTING.format(module=module, function=function, name=name)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=REPO, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 5, (done.stdout, done.stderr)
    assert sources(shell, name) == sources(shell, name, "--inactive") == before
    pid = Path(f"/run/libvirt/qemu/{name}.pid").read_text()
    opened = [str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir()]
    assert not [one for one in opened if one.endswith("(deleted)") and "qcow2" in one], done.stderr
    shell.virsh("destroy", name)
    if words[:2] == ["snapshot", "delete"]:
        words = ["doctor", "--fix"]
    shell.run(*words, check=None if words[0] == "doctor" else 0)
    assert sources(shell, name, "--inactive") != before or words[1] == "compact"
    shell.run("start", name)
    shell.run("delete", name, "--yes")


def test_vmctl_starts_no_vm_whose_files_somebody_works_on(shell: Shell, name: str) -> None:
    """It waits until they are done."""
    shell.run("create", name, "--image", "micro", "--no-start")
    with hosts.open_host() as host, hosts.holding(host, name):
        starting = subprocess.Popen([*VMCTL, "start", name], stdout=subprocess.DEVNULL, cwd=REPO)
        lock = Path(f"/proc/{starting.pid}/fd")
        wait_until(
            lambda: any(str(one.readlink()).endswith(".lock") for one in lock.iterdir()), what="start", timeout_s=60
        )
        assert shell.virsh("domstate", name) == "shut off"
    assert starting.wait(60) == 0
    assert shell.virsh("domstate", name) == "running"
    shell.run("delete", name, "--yes")
