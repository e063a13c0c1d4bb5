"""Runs a vmctl command line and sends a signal right after the N-th change it made to the host.

Usage: python interrupting.py SIGNAL[@PIDFILE] N WORD…   To itself, or to the process whose id the file holds.
For N the name of a change does, as it is printed: right after the first of these.
Prints the changes it made, one a line, to the file in $CHANGES.
With LIBVIRTD or QEMU for a signal it is that process that is killed, a moment after the N-th change has begun; libvirtd
comes back at once.
The production code knows nothing of this: the functions that change a host are wrapped from outside.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.system import libvirtd
from vmctl import (
    agent,
    backup_copy,
    backup_store,
    disk_journal,
    disk_replace,
    pull_journal,
    qcow2_overlay,
    qcow2_stream,
    qcow2_writer,
    qemu_img,
    snapshot_journal,
    snapshot_layers,
    snapshot_settle,
)
from vmctl.cli import run
from vmctl.hypervisor import backup, devices, disks, domain, migration, network, saved, snapshots, storage

CHANGES: dict[Any, tuple[str, ...]] = {
    Path: ("rename",),  # how a finished file gets its name in the store
    storage: ("ensure_pool", "create_volume", "upload", "delete_volume"),
    network: ("define", "start"),
    domain: (
        "define",
        "start",
        "set_record",
        "set_autostart",
        "power_off",
        "shutdown_acpi",
        "resume",
        "undefine",
        "detach_disk",
        "note_pulled",
    ),
    devices: ("attach", "detach"),
    migration: ("set_downtime",),
    saved: ("save_and_go_on", "restore_paused", "set_links"),
    disks: ("resize", "unplug", "copy_and_switch", "pull", "commit"),
    qemu_img: (
        "copy_known",
        "create",
        "resize",
        "require_equal",
        "commit",
        "repoint",
        "add_bitmap",
        "remove_bitmap",
        "merge_bitmap",
    ),
    qcow2_overlay: ("make",),
    disk_replace: ("copy_bytes", "sync_folder"),
    disk_journal: ("begin", "remove_file"),
    pull_journal: ("begin", "end"),
    snapshots: ("_set_aside", "take", "redefine", "forget", "revert", "restore"),
    snapshot_journal: ("begin",),
    snapshot_layers: ("write_aside", "remove_file"),
    snapshot_settle: ("put_nvram", "remove_file"),
    backup: ("begin", "end", "delete_checkpoint", "redefine_checkpoint"),
    backup_copy: ("run",),
    backup_store: ("write", "publish", "remove"),
    agent: ("freeze", "thaw"),
    qcow2_writer.Qcow2Writer: ("finish",),
    qcow2_stream: ("write",),
}


VICTIMS = {"LIBVIRTD": "/run/libvirtd.pid", "QEMU": "/run/libvirt/qemu/fault-*.pid"}


def kill(which: str) -> None:
    """End the processes, as a crash would."""
    for path in Path("/").glob(VICTIMS[which].lstrip("/")):
        with suppress(OSError, ValueError):
            os.kill(int(path.read_text()), signal.SIGKILL)
    if which == "LIBVIRTD":
        libvirtd.begin()


def main() -> int:
    """Wrap, then run."""
    name, _, pid_file = sys.argv[1].partition("@")
    which = name if name in VICTIMS else signal.Signals[name]
    at = int(sys.argv[2]) if sys.argv[2].isdigit() else 0
    first = "" if at else sys.argv[2]
    log = Path(os.environ["CHANGES"]).open("a")  # noqa: SIM115  it must outlive a SIGKILL, line by line
    count = 0

    def wrapped(label: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal at, count, first
            if which in VICTIMS:
                count += 1
                if count == at:
                    log.write(label + "\n")
                    log.flush()
                    killing = threading.Timer(0.03, kill, (which,))
                    killing.daemon = False  # it would be as the thread that makes it: this process waits for it
                    killing.start()
                return original(*args, **kwargs)
            result = original(*args, **kwargs)
            count += 1  # now: one change may be made within another
            log.write(label + "\n")
            log.flush()
            if label == first:
                at, first = count, ""
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
