"""Runs a vmctl command line and sends a signal right after the N-th change it made to the host.

Usage: python interrupting.py SIGNAL[@PIDFILE] N WORD…   To itself, or to the process whose id the file holds.
Prints the changes it made, one a line, to the file in $CHANGES.
The production code knows nothing of this: the functions that change a host are wrapped from outside.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmctl import agent, backup_copy, backup_store, disk_journal, disk_replace, qcow2_writer, qemu_img
from vmctl.cli import run
from vmctl.hypervisor import backup, devices, disks, domain, network, storage

CHANGES: dict[Any, tuple[str, ...]] = {
    Path: ("rename",),  # how a finished file gets its name in the store
    storage: ("ensure_pool", "create_volume", "upload", "delete_volume"),
    network: ("define", "start"),
    domain: ("define", "start", "set_record", "set_autostart", "power_off", "undefine", "detach_disk"),
    devices: ("attach", "detach"),
    disks: ("resize", "unplug", "copy_and_switch", "pull"),
    qemu_img: ("copy_known", "create", "resize", "require_equal", "add_bitmap", "remove_bitmap", "merge_bitmap"),
    disk_replace: ("copy_bytes", "sync_folder"),
    disk_journal: ("begin", "remove_file"),
    backup: ("begin", "end", "delete_checkpoint", "redefine_checkpoint"),
    backup_copy: ("run",),
    backup_store: ("write", "publish", "remove"),
    agent: ("freeze", "thaw"),
    qcow2_writer.Qcow2Writer: ("finish",),
}


def main() -> int:
    """Wrap, then run."""
    name, _, pid_file = sys.argv[1].partition("@")
    which, at = signal.Signals[name], int(sys.argv[2])
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
                os.kill(int(Path(pid_file).read_text()) if pid_file else os.getpid(), which)
            return result

        return call

    for module, functions in CHANGES.items():
        for function in functions:
            label = f"{module.__name__.rpartition('.')[2]}.{function}"
            setattr(module, function, wrapped(label, getattr(module, function)))
    return run(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
