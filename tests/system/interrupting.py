"""Runs a vmctl command line and sends itself a signal right after the N-th change it made to the host.

Usage: python interrupting.py SIGNAL N WORD…   Prints the changes it made, one a line, to the file in $CHANGES.
The production code knows nothing of this: the functions that change a host are wrapped from outside.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmctl import disk_journal, disk_replace, qemu_img
from vmctl.cli import run
from vmctl.hypervisor import devices, disks, domain, network, saved, storage

CHANGES: dict[Any, tuple[str, ...]] = {
    Path: ("rename",),  # how a finished file gets its name in the store
    storage: ("ensure_pool", "create_volume", "upload", "delete_volume"),
    network: ("define", "start"),
    domain: ("define", "start", "set_record", "set_autostart", "power_off", "resume", "undefine", "detach_disk"),
    devices: ("attach", "detach"),
    saved: ("save_and_go_on", "restore_paused", "set_links"),
    disks: ("resize", "unplug", "copy_and_switch", "pull"),
    qemu_img: ("copy_known", "create", "resize", "require_equal"),
    disk_replace: ("copy_bytes", "sync_folder"),
    disk_journal: ("begin", "remove_file"),
}


def main() -> int:
    """Wrap, then run."""
    which, at = signal.Signals[sys.argv[1]], int(sys.argv[2])
    log = Path(os.environ["CHANGES"]).open("a")  # noqa: SIM115  it must outlive a SIGKILL, line by line
    count = 0

    def wrapped(label: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            result = original(*args, **kwargs)
            count += 1
            log.write(label + "\n")
            log.flush()
            if count == at:
                os.kill(os.getpid(), which)
            return result

        return call

    for module, functions in CHANGES.items():
        for function in functions:
            label = f"{module.__name__.rpartition('.')[2]}.{function}"
            setattr(module, function, wrapped(label, getattr(module, function)))
    return run(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
