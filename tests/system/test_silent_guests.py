"""Guests that panic, are paused, or have not booted yet: whatever waits for them ends, with the reason."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import REPO, VMCTL, Shell
from vmctl.detail import details
from vmctl.hosts import open_host
from vmctl.hypervisor import agent
from vmctl.hypervisor.states import State
from vmctl.pytest_qemu import GuestVM
from vmctl.wait import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
PANIC = "(sleep 1; echo c >/proc/sysrq-trigger) </dev/null >/dev/null 2>&1 &"


def begin(*words: str, **options: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*VMCTL, *words], text=True, cwd=REPO, **pipes)  # type: ignore[call-overload,no-any-return]


def panic(shell: Shell, name: str) -> None:
    """Let the guest's kernel panic, and see it."""
    shell.run("exec", name, "--", "sh", "-c", PANIC)
    wait_until(lambda: shell.json("show", name)["state"] == "crashed", what="the panic", timeout_s=60)


def up(*words: str) -> subprocess.Popen[str]:
    """A command line that runs ``echo up; …`` in a guest, when that has been said."""
    running = begin(*words)
    assert running.stdout is not None and running.stdout.readline() == "up\n"
    return running


@dataclass(frozen=True)
class Waiting:
    """A VM, and commands in it that will end, or will not, when the tests of this module have gone on for minutes."""

    name: str
    commands: list[subprocess.Popen[str]]


@pytest.fixture(scope="module")
def old() -> Iterator[Waiting]:
    """A VM that is up for minutes, with a command that says nothing for longer than a sign of life is waited for."""
    shell, name = Shell(), f"old-{os.getpid()}"
    shell.guest(name)
    yield Waiting(name, [begin("exec", name, "--", "sh", "-c", "sleep 40; echo done")])
    shell.run("delete", name, "--yes")


@pytest.fixture(scope="module")
def untold() -> Iterator[Waiting]:
    """A VM whose kernel panics with no driver to tell of it, amid two commands."""
    shell, name = Shell(), f"untold-{os.getpid()}"
    shell.guest(name)
    shell.run("exec", name, "--", "rmmod", "pvpanic_mmio")
    stay = "echo up; sleep 1000"
    waiting = [up("exec", name, "--", "sh", "-c", stay), up("ssh", name, stay)]
    shell.run("exec", name, "--", "sh", "-c", PANIC)
    said = "end Kernel panic - not syncing"
    wait_until(lambda: said in shell.run("logs", name, "-n", "60").stdout, what="the panic", timeout_s=60)
    # From now on its kernel spins: with what nobody else wants.
    for task in Path(f"/proc/{Path(f'/run/libvirt/qemu/{name}.pid').read_text()}/task").iterdir():
        os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    yield Waiting(name, waiting)
    shell.run("delete", name, "--yes")


@pytest.fixture(scope="module", autouse=True)
def begun(old: Waiting, untold: Waiting) -> None:
    """What takes minutes begins before the first test, and is looked at in the last ones."""


@pytest.fixture
def panicked(shell: Shell, name: str) -> Iterator[str]:
    """A VM whose guest panicked."""
    shell.run("create", name, "--image", "micro", "--graphics", "vnc", "--wait", "agent")
    panic(shell, name)
    yield name


def test_a_panic_ends_all_that_waits_at_once_and_says_so(shell: Shell, name: str, tmp_path: Path) -> None:
    shell.guest(name)
    with (tmp_path / "endless").open("wb") as file:
        file.truncate(8 << 30)
    events = begin("events", name, "-o", "json")
    assert events.stderr is not None and "watching" in events.stderr.readline()
    waiting = [
        begin("exec", name, "--", "sh", "-c", "echo up; sleep 1000"),
        begin("ssh", name, "echo up; sleep 1000"),
        begin("exec", "-t", name, "--", "sh", "-c", "echo up; sleep 1000"),
    ]
    for one in waiting:
        assert one.stdout is not None and one.stdout.readline().strip() == "up"
    waiting.append(begin("cp", str(tmp_path / "endless"), f"{name}:/root/endless"))
    waiting.append(begin("wait", name, "--for", "stopped"))
    waiting.append(begin("forward", name, "0:22"))
    assert waiting[-1].stdout is not None and " -> 22" in waiting[-1].stdout.readline()
    arriving = ["exec", name, "--", "sh", "-c", "ls -d /root/.vmctl-*"]
    wait_until(lambda: shell.run(*arriving, check=None).stdout, what="the copy", timeout_s=60)
    shell.run("exec", name, "--", "sh", "-c", PANIC)
    for one in waiting:
        _, err = one.communicate(timeout=30)
        words = " ".join(map(str, one.args[3:5]))  # type: ignore[index]
        assert one.returncode == 6 and "it is crashed (guest panicked)" in err, f"{words}: {one.returncode} {err}"
        assert "Traceback" not in err
    assert events.stdout is not None
    while '"event": "crashed"' not in (line := events.stdout.readline()):
        assert line
    assert "guest panicked" in line
    events.send_signal(signal.SIGINT)
    assert events.wait(20) == 0


def test_it_stops_while_show_looks_at_it(shell: Shell, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its state and its agent's: what it is now is shown, and no error."""
    shell.guest(name)
    asked = agent.Line.ask

    def plug_pulled(*words: Any, **options: Any) -> Any:
        shell.virsh("destroy", name)
        return asked(*words, **options)

    monkeypatch.setattr(agent.Line, "ask", plug_pulled)
    with open_host() as host:
        (found,) = details(host, [name])
    assert (found.state, found.agent_state) == (State.STOPPED, "not connected")


def test_what_can_be_done_with_a_panicked_guest(shell: Shell, panicked: str, tmp_path: Path) -> None:
    name = panicked
    assert shell.virsh("domstate", "--reason", name) == "crashed (panicked)"
    (row,) = [row for row in shell.json("list") if row["name"] == name]
    assert row["state"] == "crashed" and name in shell.run("list", "-s", "crashed", "-o", "name").stdout.split()
    assert shell.json("show", name)["why"] == "guest panicked"
    assert re.search(r"^state +crashed \(guest panicked\)", shell.run("show", name).stdout, re.MULTILINE)
    assert "Kernel panic - not syncing" in shell.run("logs", name, "-n", "60").stdout
    shell.run("screenshot", name, str(tmp_path / "last.png"))
    for goal in ("ssh", "agent", "running", "stopped"):
        told = shell.run("wait", name, "--for", goal, check=6, timeout=20).stderr
        assert "it is crashed (guest panicked)" in told and "last on its console" in told and "Kernel panic" in told
    for words in (["exec", name, "--", "true"], ["ssh", name, "true"], ["cp", f"{name}:/etc/passwd", str(tmp_path)]):
        told = shell.run(*words, check=6, timeout=20).stderr
        assert "it is crashed (guest panicked)" in told and f"vmctl reset {name}" in told
    for verb in ("start", "resume", "pause", "save", "reboot", "freeze"):
        told = shell.run(verb, name, check=6, timeout=20).stderr
        assert "crashed (guest panicked)" in told and f"vmctl reset {name}" in told, f"{verb}: {told}"
    assert "pulls its plug" in shell.run("stop", name, check=6, timeout=20).stderr
    shell.run("rename", name, f"{name}x", check=6)

    shell.run("reset", name)
    assert shell.json("show", name)["state"] == "running"
    shell.run("wait", name, "--for", "agent")
    assert shell.run("exec", name, "--", "hostname").stdout == f"{name}\n"
    panic(shell, name)
    began = time.monotonic()
    assert "by force" in shell.run("stop", name, "--force").stdout
    assert time.monotonic() - began < 15, "it was asked to power off by itself"
    assert shell.json("show", name)["state"] == "stopped"
    assert "booted" in shell.run("start", name).stdout


def test_a_panic_while_it_is_being_stopped(shell: Shell, name: str) -> None:
    shell.guest(name)
    # Without its power button, so that the stop waits.
    deaf = "cd /sys/bus/acpi/drivers/button && for one in *:*; do echo $one >unbind; done"
    shell.run("exec", name, "--", "sh", "-c", f"{deaf}; {PANIC.replace('sleep 1', 'sleep 8')}")
    told = shell.run("stop", name, "--timeout", "100", check=6, timeout=90).stderr
    assert "its guest panicked" in told
    shell.run("delete", name, "--yes")


@pytest.mark.parametrize(("choice", "state"), [("restart", "running"), ("destroy", "crashed")])
def test_another_end_of_a_panic_can_be_chosen(shell: Shell, name: str, choice: str, state: str) -> None:
    shell.run("create", name, "--image", "micro", "--on-crash", choice, "--wait", "agent")
    boot = shell.run("exec", name, "--", "cat", "/proc/sys/kernel/random/boot_id").stdout
    shell.run("exec", name, "--", "sh", "-c", PANIC)
    if choice == "destroy":
        wait_until(lambda: shell.json("show", name)["state"] == state, what="its end", timeout_s=60)
        shell.run("wait", name, "--for", "stopped", timeout=20)
        assert "booted" in shell.run("start", name).stdout
        return
    # One whose connection the panic cuts off before the log-in hears nothing for two minutes, and then says so.
    again = ["exec", name, "--", "cat", "/proc/sys/kernel/random/boot_id"]
    wait_until(
        lambda: shell.run(*again, check=None, timeout=180).stdout not in {boot, ""},
        what="the next boot",
        timeout_s=270,
    )


def test_a_quiet_command_runs_on(old: Waiting) -> None:
    (quiet,) = old.commands
    assert quiet.communicate(timeout=120)[0] == "done\n" and quiet.returncode == 0


def test_a_paused_guest_holds_nobody_for_ever(shell: Shell, old: Waiting, shared_vm: GuestVM) -> None:
    name = old.name
    lasting = up("exec", shared_vm.name, "--", "sh", "-c", "echo up; sleep 20; echo done")
    shell.run("pause", shared_vm.name)
    shell.run("resume", shared_vm.name)  # a short pause ends nothing
    stuck = [up("exec", name, "--", "sh", "-c", "echo up; sleep 1000"), up("ssh", name, "echo up; sleep 1000")]
    shell.run("pause", name)
    for one in stuck:
        _, err = one.communicate(timeout=90)
        assert one.returncode == 6 and "it is paused now" in err and f"hint: vmctl resume {name}" in err
    shell.run("resume", name)
    assert lasting.communicate(timeout=120)[0] == "done\n" and lasting.returncode == 0


@pytest.mark.parametrize("verb", ["exec", "ssh", "cp"])
def test_right_after_create(shell: Shell, name: str, tmp_path: Path, verb: str) -> None:
    """A guest still booting is waited for, and the wait is told."""
    words = {
        "exec": ["exec", name, "--", "hostname"],
        "ssh": ["ssh", name, "hostname"],
        "cp": ["cp", f"{name}:/etc/hostname", str(tmp_path / "got")],
    }
    for _ in range(3):  # a machine that is busy may begin the second command when the guest has booted
        shell.run("create", name, "--image", "micro")
        done = shell.run(*words[verb], timeout=200, stdin=subprocess.DEVNULL)
        if "does not answer yet" in done.stderr:
            break
        shell.run("delete", name, "--yes")
    assert f"{name} does not answer yet" in done.stderr and "waiting for it to boot" in done.stderr
    assert "Errno" not in done.stderr
    assert (tmp_path / "got").read_text() if verb == "cp" else done.stdout == f"{name}\n"


@pytest.mark.parametrize("options", [[], ["-t"], ["--via", "agent"]])
@pytest.mark.parametrize("command", ["exec sleep 4000", "sleep 4000 & sleep 4001", "trap '' INT TERM HUP; sleep 4000"])
def test_ctrl_c_ends_the_command_in_the_guest(
    shell: Shell, shared_vm: GuestVM, options: list[str], command: str
) -> None:
    shell.run("wait", shared_vm.name, "--for", "agent")
    running = begin("exec", *options, shared_vm.name, "--", "sh", "-c", f"echo up; {command}")
    assert running.stdout is not None and running.stdout.readline().strip() == "up"

    def look() -> str:
        return shell.run("exec", shared_vm.name, "--", "sh", "-c", "pgrep -f '[s]leep 400'", check=None).stdout

    wait_until(look, what="the command in the guest", timeout_s=30)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130 and "interrupted" in err and "Traceback" not in err
    wait_until(lambda: not look(), what="its end", timeout_s=10 if options[:1] == ["--via"] else 0)


def test_a_panic_that_no_driver_tells_of(shell: Shell, untold: Waiting) -> None:
    """libvirt goes on calling it running; that it gives no sign of life for two minutes, and its console, tell."""
    for one in untold.commands:
        _, err = one.communicate(timeout=240)
        assert one.returncode == 6 and "its console ends in" in err and "Kernel panic - not syncing" in err, err
    assert shell.virsh("domstate", untold.name) == "running"
    shell.virsh("destroy", untold.name)  # or it would spin on


def test_one_that_is_long_up_and_does_not_answer_until_it_is_reset(shell: Shell, old: Waiting) -> None:
    """Last, for by then it is no longer one that may be booting. After a reset it is one again."""
    name = old.name
    wait_until(
        lambda: shell.json("show", name)["uptime_s"] > 182, what="its boot to be over", timeout_s=200, interval_s=1.0
    )
    # The one that waits for the first one's end takes its place, once: until there is none.
    end = "mv /usr/sbin/dropbear /root/; sync; while killall dropbear; do sleep 0.3; done 2>/dev/null; true"
    shell.run("exec", "--via", "agent", name, "--", "sh", "-c", end)
    for words in (["exec", name, "--", "true"], ["ssh", name, "true"], ["cp", f"{name}:/etc/passwd", "/dev/null"]):
        told = shell.run(*words, check=3, timeout=60).stderr
        assert f"cannot reach VM {name} by SSH: Connection refused" in told and f"`vmctl wait {name}`" in told
    shell.run("reset", name)
    waiting = begin("exec", name, "--", "hostname")
    assert waiting.stderr is not None and "waiting for it to boot, at most" in waiting.stderr.readline()
    shell.run("wait", name, "--for", "agent")
    shell.run("exec", "--via", "agent", name, "--", "mv", "/root/dropbear", "/usr/sbin/")
    assert waiting.communicate(timeout=120)[0] == f"{name}\n"
    assert "restarted=" in shell.virsh("dumpxml", name)
    assert "restarted=" not in shell.virsh("dumpxml", name, "--inactive")


def test_a_qemu_that_hangs_can_be_ended(shell: Shell, name: str) -> None:
    shell.guest(name)
    pid = int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        for verb in ("stop", "reboot"):
            told = shell.run(verb, name, "--timeout", "2", check=7).stderr
            assert told.startswith(f"cannot {verb} VM {name}: its QEMU does not answer: not after ")
            assert f"hint: vmctl stop {name} --force" in told
        ended = shell.run("stop", name, "--force", "--timeout", "2")
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGCONT)
    assert ended.stdout == f"{name}: powered off by force\n"
    assert f"the QEMU of {name} does not answer" in ended.stderr
    assert shell.json("show", name)["state"] == "stopped"
    assert "booted" in shell.run("start", name).stdout
