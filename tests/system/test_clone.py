"""Clones of real VMs: who they are, what they share, what a delete of one leaves to the others."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system import pattern
from tests.system.conftest import REPO, VMCTL, Shell, volumes

pytestmark = pytest.mark.system

DISKS = Path("/var/lib/libvirt/vmctl/vmctl")
WHO = (
    "hostname; cat /etc/hostname /etc/machine-id /sys/class/net/eth0/address; "
    "sha256sum </etc/dropbear/dropbear_ed25519_host_key"
)


def stopped(shell: Shell, name: str, *options: str) -> None:
    """A VM that has booted once and written a pattern."""
    shell.run("create", name, "--image", "micro", "--wait", "ssh", *options)
    pattern.write(name, "/root/data", pattern.blocks("base", 64))
    shell.run("stop", name, "--force")


def who(shell: Shell, vm: str) -> list[str]:
    """What a guest says of itself."""
    return shell.run("exec", vm, "--", "sh", "-c", WHO).stdout.split()


def checked() -> None:
    """Every disk in the pool is whole. None may be in use."""
    for disk in DISKS.glob("*.qcow2"):
        subprocess.run(["qemu-img", "check", "-q", str(disk)], check=True, timeout=60)


def test_clones_have_the_disk_and_an_identity_of_their_own(shell: Shell, name: str, several: str) -> None:
    before = volumes(shell)
    stopped(shell, name)
    done = shell.run("clone", name, several, "--count", "2", "--start")
    assert done.stdout.split() == [f"{several}-1", f"{several}-2"]
    everyone = [name, f"{several}-1", f"{several}-2"]
    shell.run("start", name)
    for one in everyone:
        shell.run("wait", one, "--for", "ssh", timeout=240)
    told = [who(shell, one) for one in everyone]
    for one, (kernel, file, *_) in zip(everyone, told, strict=True):
        assert (kernel, file) == (one, one)
    for which in range(2, 5):  # machine-id, MAC, host key
        assert len({each[which] for each in told}) == 3, told
    shown = [shell.json("show", one) for one in everyone]
    for what in ("uuid", "ssh_host_key"):
        assert len({each[what] for each in shown}) == 3
    assert len({each["addresses"][0]["address"] for each in shown}) == 3
    for one in everyone:
        assert pattern.holds(shell, one, "/root/data", pattern.blocks("base", 64))
        pattern.write(one, "/root/data", pattern.blocks(one, 8), at=8)
    for one in everyone:
        assert pattern.holds(shell, one, "/root/data", pattern.blocks(one, 8), at=8)
        shell.run("stop", one, "--force")
    checked()
    # The source first: what the clones need of it stays, and goes with the last of them.
    shell.run("delete", name, "--yes")
    shell.run("start", f"{several}-1")
    shell.run("wait", f"{several}-1", "--for", "ssh", timeout=240)
    assert pattern.holds(shell, f"{several}-1", "/root/data", pattern.blocks(f"{several}-1", 8), at=8)
    # A new VM of the old name does not take the place of what the clones are based on.
    shell.run("create", name, "--image", "micro", "--no-start")
    checked_two = shell.run("delete", name, f"{several}-1", f"{several}-2", "--yes")
    assert "kept" not in checked_two.stderr
    assert volumes(shell) == before


def test_a_full_clone_needs_nothing_of_its_source(shell: Shell, name: str, several: str) -> None:
    before = volumes(shell)
    stopped(shell, name, "--disk", "16M")
    xml = shell.virsh("dumpxml", name, "--inactive")
    shell.run("clone", name, several, "--full")
    assert shell.virsh("dumpxml", name, "--inactive") == xml
    shell.run("delete", name, "--yes")
    for path in re.findall(r"file='([^']*\.qcow2)'", shell.virsh("dumpxml", several)):
        told = subprocess.run(["qemu-img", "info", path], capture_output=True, text=True, check=True).stdout
        assert "backing file" not in told
    shell.run("start", several)
    shell.run("wait", several, "--for", "ssh", timeout=240)
    assert pattern.holds(shell, several, "/root/data", pattern.blocks("base", 64))
    shell.run("delete", several, "--yes")
    assert volumes(shell) == before


def test_a_second_clone_adds_no_layer_when_nothing_was_written(shell: Shell, name: str, several: str) -> None:
    stopped(shell, name)
    shell.run("clone", name, f"{several}-1")
    xml = shell.virsh("dumpxml", name, "--inactive")
    shell.run("clone", name, f"{several}-2")
    shell.run("clone", f"{several}-2", f"{several}-3")
    assert shell.virsh("dumpxml", name, "--inactive") == xml
    for one in (f"{several}-2", name, f"{several}-3"):
        shell.run("start", one)
        shell.run("wait", one, "--for", "ssh", timeout=240)
        assert pattern.holds(shell, one, "/root/data", pattern.blocks("base", 64))


def test_a_disk_that_clones_are_based_on_is_left_alone(shell: Shell, name: str, several: str) -> None:
    stopped(shell, name)
    base = re.findall(r"file='([^']*\.qcow2)'", shell.virsh("dumpxml", name, "--inactive"))[0]
    shell.run("clone", name, several)
    assert shell.run("disk", "resize", base, "+1M", check=None).returncode != 0
    assert shell.run("disk", "delete", base, "--yes", check=None).returncode != 0
    shell.run("disk", "compact", base)  # its content stays the same
    shell.run("disk", "flatten", f"{several}:vda")
    shell.run("delete", name, "--yes")
    shell.run("start", several)
    shell.run("wait", several, "--for", "ssh", timeout=240)
    assert pattern.holds(shell, several, "/root/data", pattern.blocks("base", 64))


def test_what_cannot_be_cloned_is_refused_before_anything_changes(
    shell: Shell, name: str, several: str, names: Callable[[], str]
) -> None:
    shell.run("create", name, "--image", "micro")
    before, xml = volumes(shell), shell.virsh("dumpxml", name, "--inactive")
    running = shell.run("clone", name, several, check=6)
    assert "is running" in running.stderr and "vmctl fork" in running.stderr
    shell.run("stop", name, "--force")
    assert "exists already" in shell.run("clone", name, name, check=5).stderr
    assert "between 1 and" in shell.run("clone", name, several, "--count", "0", check=2).stderr
    assert shell.run("clone", name, "no_name", check=2).returncode == 2
    said = shell.run("clone", name, several, "--count", "2", "--dry-run").stdout
    assert f"new VM {several}-2" in said and "is written to no more" in said and "goes on in new volume" in said
    assert "is started" not in said
    told = shell.json("clone", name, several, "--count", "2", "--start", "--dry-run")["touches"]
    assert told[-2:] == [f"VM {several}-1 is started", f"VM {several}-2 is started"]
    assert (volumes(shell), shell.virsh("dumpxml", name, "--inactive")) == (before, xml)


def test_two_clones_of_one_vm_at_once(shell: Shell, name: str, several: str) -> None:
    stopped(shell, name)
    both = [
        subprocess.Popen([*VMCTL, "clone", name, f"{several}-{n}"], stderr=subprocess.PIPE, text=True, cwd=REPO)
        for n in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 5], [0, 0]), errors
    assert len([one for one in shell.virsh("list", "--all", "--name").split() if one.startswith(several)]) == (
        codes.count(0)
    )
    checked()
