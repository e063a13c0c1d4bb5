"""Snapshots of real guests: what was written before is there after a revert, whatever kind, chain and branch."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import pattern
from tests.system.conftest import Shell
from vmctl import disk_xml

pytestmark = pytest.mark.system

POOL = Path("/var/lib/libvirt/vmctl/vmctl")
BLOCKS = 64


@pytest.fixture
def vm(shell: Shell, name: str) -> Iterator[str]:
    """A running guest with a second disk of 16 MiB, /dev/vdc; all files are gone with it."""
    before = set(POOL.iterdir())
    shell.run("create", name, "--image", "micro", "--disk", "16M", "--wait", "ssh")
    yield name
    shell.run("delete", name, "--yes")
    assert set(POOL.iterdir()) == before
    assert not journal()


def journal() -> list[Path]:
    return list((Path.home() / ".local/share/vmctl/snapshot-journal").glob("*"))


def put(vm: str, seed: str, *, at: int = 0) -> None:
    pattern.write(vm, "/dev/vdc", pattern.blocks(seed, BLOCKS), at=at)


def holds(shell: Shell, vm: str, seed: str, *, at: int = 0) -> bool:
    return pattern.holds(shell, vm, "/dev/vdc", pattern.blocks(seed, BLOCKS), at=at)


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


def test_memory_and_disks_come_back_as_often_as_one_likes(shell: Shell, vm: str) -> None:
    put(vm, "one")
    shell.run("exec", vm, "--", "sh", "-c", "echo in-memory >/run/mark; (sleep 100000 & echo $! >/run/pid)")
    done = shell.run("snapshot", "create", f"{vm}.one", "--description", "with a process")
    assert "external, memory and disks vda, vdc" in done.stderr
    for turn in range(3):
        put(vm, f"later {turn}")
        shell.run("exec", vm, "--", "sh", "-c", "rm /run/mark; kill $(cat /run/pid)")
        files = set(POOL.iterdir())
        shell.run("snapshot", "revert", f"{vm}.one", "--yes")
        assert shell.virsh("domstate", vm) == "running"
        assert shell.run("exec", vm, "--", "sh", "-c", "cat /run/mark; kill -0 $(cat /run/pid)").stdout == "in-memory\n"
        assert holds(shell, vm, "one")
        assert len(set(POOL.iterdir())) == len(files), "a revert leaves files"
    (one,) = shell.json("snapshot", "list", vm)
    assert one["memory"] and one["current"] and one["ours"] and one["kind"] == "external"
    shell.run("snapshot", "delete", f"{vm}.one", "--yes")
    assert holds(shell, vm, "one")
    assert all(".snap-" not in path for path in sources(shell, vm).values())
    shell.virsh("destroy", vm)
    clean(shell, vm)


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
    up(shell, vm)
    assert all(holds(shell, vm, f"state {turn}", at=BLOCKS * turn) for turn in range(3))
    assert holds(shell, vm, "front 2", at=BLOCKS * 10) and not holds(shell, vm, "state 3", at=BLOCKS * 3)
    shell.virsh("destroy", vm)
    shell.run("snapshot", "delete", f"{vm}.s2", "--yes")
    assert all(".snap-" not in path for path in sources(shell, vm, "--inactive").values())
    clean(shell, vm)
    up(shell, vm)
    assert holds(shell, vm, "front 2", at=BLOCKS * 10)
