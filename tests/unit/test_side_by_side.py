"""Test hosts side by side."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmctl.wait import wait_until

TESTHOST = Path(__file__).parents[1] / "testhost"
PROGRAM = [sys.executable, str(TESTHOST / "side_by_side.py")]
AFTER = ["sh", str(TESTHOST / "after.sh")]
of_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces are for root to make")


def test_the_first_one_speaks_first_and_any_failure_counts() -> None:
    done = subprocess.run(
        [*PROGRAM, "sh", "-c", "sleep 0.2; echo one", "--", "sh", "-c", "echo two; exit 3"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert [line for line in done.stdout.splitlines() if not line.startswith("---")] == ["one", "two"]
    assert done.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end_it_ends_all(number: signal.Signals) -> None:
    with subprocess.Popen(
        [*PROGRAM, "sh", "-c", "echo $$; exec sleep 600", "--", "sleep", "600"], stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        first = int(running.stdout.readline())
        running.send_signal(number)
        assert running.wait(20) == 128 + number
    assert not Path(f"/proc/{first}").exists()


def running(mark: str) -> list[str]:
    """The processes with that word in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:  # it has ended
            continue
    return found


@of_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_prepares_a_command_ends_with_it(number: signal.Signals) -> None:
    mark = f"t-{secrets.token_hex(8)}"
    deep = f"sh -c 'sleep 600; exit 1' {mark} & wait"
    with subprocess.Popen([*PROGRAM, "true", "--", *AFTER, deep, "true"], stdout=subprocess.DEVNULL) as both:
        wait_until(lambda: running(mark), what="preparation", timeout_s=30)
        both.send_signal(number)
        both.wait(20)
        wait_until(lambda: not running(mark), what="end of the preparation", timeout_s=30)


@of_root
def test_a_command_waits_for_what_prepares_it(tmp_path: Path) -> None:
    file = tmp_path / "made"
    done = subprocess.run([*AFTER, f"sleep 0.2; echo so >{file}", "cat", str(file)], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"so\n")
    done = subprocess.run([*AFTER, "exit 3", "echo", "run"], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, b"")
