"""Runs a vmctl command line that pulls, its QEMU not told to flush, and ends one of them at the worst moment.

Usage: python -m tests.system.unflushed VICTIM FILE PIDFILE WORD…   FILE is what is pulled into, PIDFILE has its QEMU's.
VICTIM is QEMU or VMCTL, killed when FILE has just come to name another base, or none; or CTRL-C, at the first look.
What the production code would flush meanwhile stays in QEMU's memory: so the moment is there each time, and all is lost
that can be.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmctl import qemu_img
from vmctl.cli import run
from vmctl.hypervisor import disks


def main() -> int:
    """Wrap, then run."""
    victim, file, pid_file, *words = sys.argv[1:]
    original = disks._flushing
    before = _base(file)

    def flushing(*given: Any) -> Callable[[], None]:
        really = original(*given)

        def flush() -> None:
            if disks._flushing is original:
                really()
            elif victim == "CTRL-C":
                disks._flushing = original
                signal.raise_signal(signal.SIGINT)
            elif _base(file) != before:
                disks._flushing = original
                qemu = int(Path(pid_file).read_text())
                os.kill(qemu if victim == "QEMU" else os.getpid(), signal.SIGKILL)
                really()

        return flush

    disks._flushing = flushing
    return run(words)


def _base(file: str) -> str:
    return qemu_img.info(Path(file), "qcow2", in_use=True).backing_file


if __name__ == "__main__":
    sys.exit(main())
