"""The test host's libvirtd, begun again after a test has killed it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from tests.system.conftest import LIBVIRT_LOG, Shell
from vmctl.wait import wait_until


def begin() -> None:
    """Start it and see it answer. Its predecessor holds the pid file for as long as the kernel takes to end it."""

    def started() -> bool:
        return not subprocess.run(
            ["libvirtd", "-d"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        ).returncode

    def answers() -> bool:
        return not _status("virsh", "-q", "uri")

    wait_until(started, what="start of libvirtd", timeout_s=60, interval_s=0.02)
    wait_until(answers, what="answer of libvirtd", timeout_s=60, interval_s=0.02)


def lost(shell: Shell, vm: str) -> bool:
    """Whether libvirt came back without knowing that a VM runs; then its process is ended, as doctor says.

    libvirt 9.0 notes a running VM in a file that it cannot read itself, "unknown mirror job type ''", in the moment in
    which a job is switched over.
    """
    if shell.virsh("domstate", vm) != "shut off":
        return False
    said = re.search(rf"{vm} runs in process (\d+)", shell.run("doctor", check=None).stdout)
    if said is None:
        return False
    assert "unknown mirror job type" in LIBVIRT_LOG.read_text()
    print(f"libvirt does not know of {vm}, which runs")
    os.kill(int(said[1]), signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{said[1]}").exists(), what="end of QEMU", timeout_s=30)
    return True


def _status(*words: str) -> int:
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False).returncode
