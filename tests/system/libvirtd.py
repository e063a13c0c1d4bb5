"""The test host's libvirtd, begun again after a test has killed it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from tests.system.conftest import LIBVIRT_LOG, Shell
from vmctl import unclear
from vmctl.hosts import open_host
from vmctl.switch_over import Doubt
from vmctl.wait import wait_until


def begin() -> None:
    """Start it and see it answer. Its predecessor holds the pid file for as long as the kernel takes to end it."""

    def started() -> bool:
        return not subprocess.run(
            ["libvirtd", "-d"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        ).returncode

    wait_until(started, what="start of libvirtd", timeout_s=60, interval_s=0.02)
    awake()


def awake() -> None:
    """See it answer."""
    wait_until(lambda: not _status("virsh", "-q", "uri"), what="answer of libvirtd", timeout_s=60, interval_s=0.02)


def revived() -> bool:
    """Whether it had died by itself, and was started again, as systemd does where it watches over it.

    libvirt 9.0 that was killed while a job is switched over may come back with the job and without its mark; when that
    job ends, a null pointer in qemuBlockJobUpdate ends the daemon.
    """
    if not _status("virsh", "-q", "uri"):
        return False
    begin()
    return True


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


def choose(shell: Shell) -> list[Doubt]:
    """Let every VM of which nobody can tell which of two files it was in last have the one that its definition names.

    As a user would who has looked at both, and found in it all that there has to be.
    """
    with open_host() as host:
        found = unclear.find(host, fix=True)
    for one in found:
        shell.run("doctor", "--fix", "--keep", one.told, check=None)
        assert Path(one.told).exists() and Path(one.other).exists(), one
    return list(found)


def _status(*words: str) -> int:
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False).returncode
