"""VMs that libvirtd died upon as it began to start them.

It has noted such a one before there was a QEMU, and passes over it when it is back (seen with libvirt 9.0): it calls it
paused for ever, its job has no end, and not even a destroy gets through. Without the note it knows the VM as stopped.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from vmctl import reaper
from vmctl.errors import VmctlError, WaitTimeout, reason
from vmctl.hosts import Host
from vmctl.wait import wait_until

_NOTE = re.compile(r"<domstatus state='paused' reason='starting up' pid='0'>")
_HEAD = 2048
_DAEMONS = ("libvirtd", "virtqemud")
_END_S = 60.0  # calls that wait for a job's end are let go after 30 s


def find(host: Host) -> tuple[str, ...]:
    """Their names, as far as this user may see the notes. One that is being started now is not among them."""
    if not (host.conn.local and host.conn.qemu) or (daemon := _daemon(host)) is None:
        return ()
    found = []
    for note in _notes(host).glob("*.xml"):
        with suppress(OSError):
            if note.stat().st_mtime < daemon.stat().st_mtime and _NOTE.search(note.read_text(errors="replace")[:_HEAD]):
                found.append(note.stem)
    return tuple(sorted(found))


def forget(host: Host, names: tuple[str, ...]) -> None:
    """Take the notes away and have libvirt's daemon begin anew; running VMs go on. Connections to it end.

    Raises VmctlError.
    """
    daemon = _daemon(host)
    if daemon is None:
        raise VmctlError("cannot restart libvirt: its daemon has no process id")
    try:
        for name in names:
            (_notes(host) / f"{name}.xml").unlink(missing_ok=True)
        _restart(daemon, session=host.conn.session)
    except (OSError, ValueError, subprocess.SubprocessError, WaitTimeout) as error:
        raise VmctlError(
            f"cannot restart libvirt: {reason(error)}",
            hint=f"as root: systemctl restart {daemon.stem}, or {daemon.stem} -d where there is no systemd",
        ) from error


def _base(host: Host) -> Path:
    if not host.conn.session:
        return Path("/run")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or Path.home() / ".cache") / "libvirt"


def _notes(host: Host) -> Path:
    return _base(host) / ("qemu/run" if host.conn.session else "libvirt/qemu")


def _daemon(host: Host) -> Path | None:
    """The file with the daemon's process id, written when it began."""
    return next((path for name in _DAEMONS if (path := _base(host) / f"{name}.pid").exists()), None)


def _restart(daemon: Path, *, session: bool) -> None:
    if not session and Path("/run/systemd/system").is_dir():
        subprocess.run(["systemctl", "restart", daemon.stem], check=True, capture_output=True, timeout=_END_S)
        return
    pid = int(daemon.read_text())
    words = [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if word]
    _end(pid)
    if {"-d", "--daemon"} & {*words}:  # else by who watches over it; a session's is begun by whoever connects
        subprocess.run([sys.executable, str(reaper.__file__), *words], check=True, capture_output=True, timeout=_END_S)


def _end(pid: int) -> None:
    """End a process, and wait for the last of its threads: the pid file is locked for as long as one is left."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        wait_until(
            lambda: select.select([process], [], [], 0)[0] or None,
            what=f"process {pid} does not end",
            timeout_s=_END_S,
            interval_s=0.02,
        )
    finally:
        os.close(process)
