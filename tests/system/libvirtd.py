"""The test host's libvirtd, begun again after a test has killed it."""

from __future__ import annotations

import subprocess

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


def _status(*words: str) -> int:
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False).returncode
