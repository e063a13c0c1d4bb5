"""The guest agent's verbs on a real guest, and that a hung or absent agent holds nothing up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests import warm
from tests.system.conftest import REPO, VMCTL, Shell
from vmctl.wait import wait_until

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def vm() -> Iterator[str]:
    shell = Shell()
    chosen = f"agent-{os.getpid()}"
    shell.guest(chosen)
    shell.run("wait", chosen, "--for", "agent")
    yield chosen
    shell.run("delete", chosen, "--yes")


def by_agent(vm: str, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return warm.run_bytes(["-m", "vmctl", "exec", "--via", "agent", vm, "--", *words], input=stdin, timeout=120)


def test_exec_by_agent_passes_everything_through(vm: str) -> None:
    data = bytes(range(256)) * 3000
    done = by_agent(vm, "sh", "-c", "cat; echo to-stderr >&2; exit 37", stdin=data)
    assert (done.returncode, done.stderr) == (37, b"to-stderr\n")
    assert done.stdout == data


def test_exec_by_agent_keeps_words_apart_and_needs_no_network(vm: str) -> None:
    words = ["printf", "[%s]", "a b", "$HOME", "'", "*", "-n", ""]
    assert by_agent(vm, *words).stdout == b"[a b][$HOME]['][*][-n][]"
    script = "ip link set eth0 down; cat /sys/class/net/eth0/operstate; ip link set eth0 up"
    assert by_agent(vm, "sh", "-c", script).stdout == b"down\n"
    assert by_agent(vm, "sh", "-c", "ls -d /tmp/tmp.*").stdout.count(b"\n") == 1, "folders of former commands are left"


def test_exec_by_agent_tells_signals_and_absent_commands(vm: str) -> None:
    assert by_agent(vm, "sh", "-c", "kill -9 $$").returncode == 137
    absent = by_agent(vm, "no-such-command")
    assert absent.returncode == 127 and b"no-such-command" in absent.stderr


def test_output_larger_than_libvirt_can_carry_comes_through_and_the_agent_lives(shell: Shell, vm: str) -> None:
    """In one piece it would be lost, and with it the agent until the guest restarts."""
    done = by_agent(vm, "sh", "-c", "head -c 12000000 /dev/zero | tr '\\0' x")
    assert done.returncode == 0 and done.stdout == b"x" * 12_000_000
    assert shell.json("show", vm)["agent_state"] == "answers"


def test_a_command_that_runs_too_long_is_left_and_named(shell: Shell, vm: str) -> None:
    done = shell.run(
        "exec", "--via", "agent", "--timeout", "0.5", vm, "--", "sh", "-c", "echo begun; sleep 60", check=7
    )
    assert done.stdout == "begun\n"
    assert "process" in done.stderr and "--timeout" in done.stderr
    shell.run("exec", vm, "--", "sh", "-c", "kill $(pidof sleep)")
    shell.run("exec", "--via", "agent", "-t", vm, "--", "true", check=2)
    shell.run("exec", "--timeout", "3", vm, "--", "true", check=2)


def test_a_command_that_prints_faster_than_it_is_read_runs_too_long_as_well(shell: Shell, vm: str) -> None:
    told = timed(shell, "exec", "--via", "agent", "--timeout", "2", vm, "--", "yes", check=7, within_s=60)
    assert "yes" in told and "it goes on as process" in told
    shell.run("exec", vm, "--", "killall", "yes")


# Answers to everything with what stands in /tmp/answer; libvirt wants to know its own number again first.
_FALSE_AGENT = """#!/bin/sh
exec 3<>/dev/virtio-ports/org.qemu.guest_agent.0
while read -r line <&3; do
    case $line in
    *guest-sync*) echo "{\\"return\\": $(echo "$line" | sed 's/.*"id": *\\([0-9]*\\).*/\\1/')}" >&3 ;;
    *) echo "{\\"return\\": $(cat /tmp/answer)}" >&3 ;;
    esac
done
"""


def test_an_agent_that_lies_is_one_clear_error_and_rules_no_terminal(shell: Shell, vm: str) -> None:
    """Whoever is root in a guest answers in the agent's place, and one guest must not end a command about many."""
    answer = """{"paths": [{"path": "\\u001b[31m/", "error": "\\u0007"}]}"""
    script = f"""set -e
cat >/tmp/false <<'END'
{_FALSE_AGENT}END
chmod 755 /tmp/false
echo '{answer}' >/tmp/answer
mv /usr/sbin/qemu-ga /root/qemu-ga.true
mv /tmp/false /usr/sbin/qemu-ga
kill $(pidof qemu-ga)"""
    shell.run("exec", vm, "--", "sh", "-c", script)
    try:
        shell.run("wait", vm, "--for", "agent")
        assert shell.run("trim", vm).stdout == f"{vm}: \\x1b[31m/ \\x07\n"
        for verb, asked in (("freeze", "guest-fsfreeze-status"), ("time-sync", "guest-get-time")):
            said = shell.run(verb, vm, check=9).stderr
            assert f"VM {vm}: its guest agent's answer to {asked} makes no sense" in said
        assert "guest-exec makes no sense" in shell.run("exec", "--via", "agent", vm, "--", "true", check=9).stderr
        shown = shell.json("show", vm)
        assert shown["agent_state"] == "answers" and shown["addresses"] == []
    finally:
        back = "mv /root/qemu-ga.true /usr/sbin/qemu-ga; kill $(pidof qemu-ga)"
        shell.run("exec", vm, "--", "sh", "-c", back)
    shell.run("wait", vm, "--for", "agent")


def test_freeze_holds_writers_and_thaw_lets_them_go(shell: Shell, vm: str) -> None:
    assert shell.run("freeze", vm).stdout == f"{vm}: 1 file system frozen\n"
    try:
        assert shell.run("freeze", vm).stdout == f"{vm}: frozen already\n"
        assert shell.json("show", vm)["agent_state"] == "frozen"
        assert "vmctl thaw" in shell.run("show", vm).stdout
        refused = by_agent(vm, "true")
        assert refused.returncode == 9 and b"frozen" in refused.stderr and b"hint: vmctl thaw" in refused.stderr
        held = subprocess.Popen(
            [*VMCTL, "exec", vm, "--", "touch", "/root/written"], stdin=subprocess.DEVNULL, cwd=REPO
        )
        with pytest.raises(subprocess.TimeoutExpired):
            held.wait(3)
    finally:
        thawed = shell.run("thaw", vm)
    assert thawed.stdout == f"{vm}: 1 file system thawed\n"
    assert held.wait(30) == 0
    assert shell.run("thaw", vm).stdout == f"{vm}: nothing was frozen\n"


def test_a_thaw_works_although_the_agent_was_restarted_while_frozen(shell: Shell, vm: str) -> None:
    shell.run("freeze", vm)
    shell.run("exec", vm, "--", "sh", "-c", "kill $(pidof qemu-ga)")
    shell.run("wait", vm, "--for", "agent")
    assert "thawed" in shell.run("thaw", vm).stdout
    shell.run("exec", vm, "--", "touch", "/root/again")


def test_an_agent_that_is_back_in_a_moment_is_waited_for(shell: Shell, vm: str) -> None:
    """QEMU tells of a channel once a second at most; of a VM resumed from memory it is known a moment late as well."""
    shell.run("exec", vm, "--", "sh", "-c", "kill $(pidof qemu-ga)")
    wait_until(
        lambda: "org.qemu.guest_agent.0' state='disconnected'" in shell.virsh("dumpxml", vm),
        what="the agent's end is not noted",
        timeout_s=10,
        interval_s=0.01,
    )
    assert shell.run("exec", "--via", "agent", vm, "--", "echo", "back").stdout == "back\n"


def test_trim_gives_blocks_back(shell: Shell, vm: str) -> None:
    assert shell.run("trim", vm).stdout.startswith(f"{vm}: / ")
    assert "iB" in shell.run("trim", vm).stdout or " B" in shell.run("trim", vm).stdout


def test_a_password_is_set_and_told_to_nobody(shell: Shell, vm: str) -> None:
    secret = "pa:ss $(w) 'ö:"
    done = shell.run("passwd", vm, input=secret + "\nsecond line\n")
    assert secret not in done.stdout + done.stderr
    line = shell.run("exec", vm, "--", "grep", "^root:", "/etc/passwd").stdout
    planted = line.split(":")[1]
    salt = planted.split("$")[2]
    again = shell.run("exec", vm, "--", "mkpasswd", "-m", "sha512", "-P", "0", "-S", salt, input=secret)
    assert again.stdout.strip() == planted
    unknown = shell.run("passwd", vm, "--user", "nobody-here", input="x\n", check=9).stderr
    assert f"hint: does the guest have that user? vmctl exec --via agent {vm} -- id nobody-here" in unknown
    shell.run("passwd", vm, "--user", "a:b", input="x\n", check=2)
    shell.run("passwd", vm, input="\n", check=2)


def test_a_clock_is_set(shell: Shell, vm: str) -> None:
    shell.run("exec", vm, "--", "date", "-s", "2001-02-03 04:05:06")
    assert "behind" in shell.run("time-sync", vm).stdout
    assert abs(int(shell.run("exec", vm, "--", "date", "+%s").stdout) - time.time()) < 5


def test_show_tells_addresses_by_interface(shell: Shell, vm: str) -> None:
    shown = shell.json("show", vm)
    (found,) = [a for a in shown["addresses"] if a["address"].split("/")[0] == shown["address"]]
    assert found["interface"] == "eth0" and found["mac"] == shown["nics"][0]["mac"]
    assert "eth0" in shell.run("show", vm).stdout


def test_a_hung_agent_costs_seconds_and_holds_up_nobody(shell: Shell, vm: str) -> None:
    shell.run("exec", vm, "--", "sh", "-c", "kill -STOP $(pidof qemu-ga)")
    try:
        began = time.monotonic()
        assert shell.json("show", vm)["agent_state"] == "silent"
        assert time.monotonic() - began < 15
        # The daemon still waits for the agent on behalf of that `show`, five seconds in all.
        began = time.monotonic()
        shell.run("pause", vm)
        shell.run("resume", vm)
        shell.run("list")
        assert shell.run("exec", vm, "--", "echo", "ok").stdout == "ok\n"
        assert time.monotonic() - began < 20, "the other commands waited for the agent"
        assert "does not answer" in shell.run("freeze", vm, check=7).stderr
    finally:
        shell.run("exec", vm, "--", "sh", "-c", "kill -CONT $(pidof qemu-ga)")
    shell.run("wait", vm, "--for", "agent")
    assert shell.json("show", vm)["agent_state"] == "answers"


def timed(shell: Shell, *words: str, check: int, within_s: float) -> str:
    """What a command said on stderr that had to end with that code and in that time."""
    began = time.monotonic()
    said = shell.run(*words, check=check, timeout=60).stderr
    took = time.monotonic() - began
    assert took < within_s, f"vmctl {' '.join(words)} took {took:.1f} s"
    return said


@pytest.mark.parametrize("ends", ["by itself", "by Ctrl-C"])
def test_an_agent_that_stops_while_a_command_of_its_runs(shell: Shell, vm: str, ends: str) -> None:
    words = ["exec", "--via", "agent", vm, "--", "sh", "-c", "echo up; sleep 1000"]
    running = subprocess.Popen(
        [*VMCTL, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO
    )
    assert running.stdout is not None and running.stdout.readline() == "up\n"
    shell.run("exec", vm, "--", "sh", "-c", "kill -STOP $(pidof qemu-ga)")
    try:
        began = time.monotonic()
        if ends == "by Ctrl-C":
            running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=60)[1]
        took = time.monotonic() - began
        if ends == "by Ctrl-C":
            assert running.returncode == 130 and took < 15, (took, said)
        else:
            assert running.returncode == 7 and took < 25, (took, said)
            assert "its guest agent does not answer" in said and "sh goes on as process " in said, said
        assert "Traceback" not in said
        assert "does not answer" in timed(shell, *words, check=7, within_s=40)
        assert "does not answer" in timed(shell, "trim", vm, check=7, within_s=40)
    finally:
        shell.run("exec", vm, "--", "sh", "-c", "kill -CONT $(pidof qemu-ga); kill $(pidof sleep)")
    shell.run("wait", vm, "--for", "agent")


def test_an_agent_that_hangs_inside_a_freeze_holds_up_nobody(shell: Shell, name: str) -> None:
    """Another client waits for its end without a limit, and has the agent's one turn; its hook never ends."""
    shell.guest(name)
    hook = (
        "cd /root; printf '#!/bin/sh\\n[ $1 = thaw ] || sleep 1000\\n' >hook; mv /usr/sbin/qemu-ga ga;"
        " printf '#!/bin/sh\\nexec /root/ga -F/root/hook \"$@\"\\n' >/usr/sbin/qemu-ga;"
        " chmod +x hook /usr/sbin/qemu-ga;"
        # Without its power button, so that a stop comes to ask the agent.
        " (cd /sys/bus/acpi/drivers/button && for one in *:*; do echo $one >unbind; done); kill $(pidof qemu-ga)"
    )
    shell.run("exec", name, "--", "sh", "-c", hook)
    shell.run("exec", name, "--", "sh", "-c", "until pidof ga; do sleep 0.1; done")
    shell.run("wait", name, "--for", "agent")
    words = ["virsh", "-c", "qemu:///system", "qemu-agent-command", name, "--block"]
    words += ['{"execute":"guest-fsfreeze-freeze"}']
    other = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        shell.run("exec", name, "--", "sh", "-c", "until pidof sleep; do sleep 0.1; done")
        assert shell.json("show", name)["agent_state"] == "silent"
        # In this time more is asked than may be on its way on one connection.
        asked = [["wait", name, "--for", "agent", "--timeout", "12"], ["exec", "--via", "agent", name, "--", "true"]]
        asked += [[verb, name] for verb in ("freeze", "thaw", "time-sync")]
        asked += [["snapshot", "create", f"{name}.s", "--freeze"]]
        began = time.monotonic()
        waiting = [
            subprocess.Popen([*VMCTL, *words], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=REPO)
            for words in asked
        ]
        timed(shell, "show", name, check=0, within_s=40)
        timed(shell, "exec", name, "--", "true", check=0, within_s=40)
        for one, words in zip(waiting, asked, strict=True):
            said = one.communicate(timeout=100)[1]
            assert one.returncode == 7 and time.monotonic() - began < 90, f"{words}: {one.returncode} {said}"
            assert ("stage agent" if words[0] == "wait" else "its guest agent does not answer") in said
        assert shell.json("snapshot", "list", name) == []
        assert "cannot stop VM" in timed(shell, "stop", name, "--timeout", "6", check=7, within_s=40)
        timed(shell, "stop", name, "--timeout", "2", "--force", check=0, within_s=40)
    finally:
        other.kill()
        other.wait()


def test_without_an_agent_each_verb_says_so_at_once(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--no-agent", "--no-start")
    assert "vmctl start" in shell.run("trim", name, check=6).stderr
    shell.run("start", name)
    assert "no guest agent channel" in shell.run("freeze", name, check=8).stderr
    assert shell.json("show", name)["agent_state"] == "no channel"
