"""What `list` costs, and that nothing can make it hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import REPO, Shell
from vmctl.hosts import open_host
from vmctl.hypervisor import node

pytestmark = pytest.mark.system

# Counts every call into libvirt's library but those that only read what the client already has.
COUNT = """
import collections, sys, libvirtmod, libvirtmod_qemu
calls = collections.Counter()
LOCAL = {"virDomainGetName", "virDomainGetUUIDString", "virDomainGetID", "virDomainGetUUID", "virNetworkGetName",
         "virNetworkGetUUIDString", "virDomainFree", "virNetworkFree", "virGetLastError", "virGetVersion",
         "virRegisterErrorHandler"}
for module in (libvirtmod, libvirtmod_qemu):
    for name in dir(module):
        original = getattr(module, name)
        if callable(original) and name.startswith("vir") and name not in LOCAL:
            def counted(*args, _name=name, _original=original):
                calls[_name] += 1
                return _original(*args)
            setattr(module, name, counted)
from vmctl.cli import run
code = run(sys.argv[1:])
print(sum(calls.values()), dict(calls), file=sys.stderr)
sys.exit(code)
"""


def calls(*words: str) -> tuple[int, str]:
    """How many libvirt calls a command makes, `vmctl list` for one, and which."""
    argv = [sys.executable, "-c", COUNT, *(words or ("list", "-o", "json"))]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=REPO, timeout=60)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[0]), done.stderr


@pytest.fixture
def many(shell: Shell, name: str, tmp_path: Path) -> Iterator[list[str]]:
    """Forty defined domains with a card each on vmctl's network."""
    shell.run("create", name, "--image", "micro", "--no-start")
    text = shell.virsh("dumpxml", name)
    ident, made = shell.virsh("domuuid", name), []
    for number in range(40):
        one = f"{name}-{number}"
        path = tmp_path / "d.xml"
        path.write_text(
            text.replace(f"<name>{name}</name>", f"<name>{one}</name>")
            .replace(ident, f"{ident[:-4]}{number:04x}")
            .replace("mac address='52:54:00:", f"mac address='52:54:{number:02x}:")
        )
        shell.virsh("define", str(path))
        made.append(one)
    yield made
    for one in made:
        shell.virsh("undefine", one)


def test_the_number_of_calls_does_not_grow(
    shell: Shell, names: Callable[[], str], request: pytest.FixtureRequest
) -> None:
    shell.run("create", names(), "--image", "micro", "--no-start")
    few, which_few = calls()
    made = request.getfixturevalue("many")
    lots, which_lots = calls()
    assert {row["name"] for row in shell.json("list")} >= set(made)
    assert lots == few, f"{which_few} became {which_lots}"
    assert lots < 20


def test_show_asks_each_thing_once(shell: Shell, names: Callable[[], str]) -> None:
    """Each call is a way there and back to a host that may be far away, and a connection some ten of them."""
    far = ("-c", "qemu+unix:///system")  # as a host of another machine: no files of its libvirt's are read
    first, second = names(), names()
    shell.guest(first)
    shell.run("create", second, "--image", "micro", "--no-start")
    shell.run(*far, "host", "info")  # what its KVM is worth is found out once a day
    one, which = calls(*far, "show", first)
    assert one <= 15, which  # 13, and the connection is opened and closed
    assert "'virConnectGetVersion': 1," in which, "what is known of KVM is of this QEMU"
    assert "'virConnectOpen': 1," in which
    assert "'virDomainLookupByName': 1," in which and "'virDomainQemuAgentCommand': 2," in which
    both, which_both = calls(*far, "show", first, second)
    assert both - one <= 6, f"{which} became {which_both}"
    shown = shell.json(*far, "show", first, second)
    assert [(vm["name"], vm["agent_state"], bool(vm["address"])) for vm in shown] == [
        (first, "answers", True),
        (second, "not connected", True),
    ]


def test_show_starts_no_guest_elsewhere(
    shell: Shell, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a VM is run by, its definition tells. What KVM is worth on its host, nobody asked."""
    far = ("-c", "qemu+unix:///system")
    shell.run("create", name, "--image", "micro", "--no-start")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, which = calls(*far, "show", name)
    assert "virDomainCreate" not in which and "virStorageVol" not in which, which
    shown = shell.json(*far, "show", name)["accel"]
    assert shown["chosen"] == shell.json("show", name)["accel"]["chosen"]
    if "kvm" in shell.virsh("capabilities"):
        assert shown["host"] is None
        shell.run(*far, "host", "info")
        shown = shell.json(*far, "show", name)["accel"]
    assert shown["host"]["kvm"]["evidence"]


def test_a_silent_agent_hides_nothing_of_other_vms(shell: Shell, names: Callable[[], str]) -> None:
    """Its question is given up, and goes on in libvirt: the next agent is asked by another connection."""
    first, second = names(), names()
    for one in (first, second):
        shell.guest(one)
    shell.run("exec", "--via", "agent", first, "--", "sh", "-c", "kill -STOP $(pidof qemu-ga)", check=None)
    assert [vm["agent_state"] for vm in shell.json("show", first, second)] == ["silent", "answers"]


def test_other_commands_ask_nothing_twice_in_a_row(shell: Shell, name: str) -> None:
    far = ("-c", "qemu+unix:///system")
    shell.guest(name)
    for verb in ("pause", "resume"):
        number, which = calls(*far, verb, name)
        assert number <= 9, f"{verb}: {which}"
    _, which = calls(*far, "exec", name, "--", "true")
    assert "'virNetworkLookupByName': 1," in which and "'virDomainIsPersistent': 1," in which, which
    _, which = calls(*far, "exec", "--via", "agent", name, "--", "true")
    assert "'virDomainLookupByName': 2," in which, which  # by either connection once


def test_a_hung_guest_hangs_nothing(shell: Shell, name: str) -> None:
    shell.guest(name)
    pid = int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        # Nobody else asks it anything: to ask it would be to wait for it.
        running = [row for row in _json_within(shell, 10) if row["state"] == "running"]
        assert name in {row["name"] for row in running}
        with open_host() as host:
            load = node.load(host.conn)  # what `host list` and `host top` show
        assert (load.running, load.vcpus) == (len(running), sum(row["vcpus"] for row in running))
        assert load.given_mib == sum(row["memory_mib"] for row in running)
        # Some other client is stuck on that guest's monitor meanwhile.
        stuck = subprocess.Popen(
            ["virsh", "-c", "qemu:///system", "domblkinfo", name, "vda"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            rows = {row["name"]: row for row in _json_within(shell, 10)}
            assert rows[name]["state"] == "running" and rows[name]["vcpus"] == 1 and rows[name]["memory_mib"] == 128
        finally:
            os.kill(pid, signal.SIGCONT)
            stuck.wait(30)
    finally:
        os.kill(pid, signal.SIGCONT)


def _json_within(shell: Shell, seconds: float) -> list[dict[str, Any]]:
    import json

    found: list[dict[str, Any]] = json.loads(shell.run("list", "-o", "json", timeout=seconds).stdout)
    return found
