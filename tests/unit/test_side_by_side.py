"""Test hosts side by side."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, str(Path(__file__).parents[1] / "testhost/side_by_side.py")]


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
