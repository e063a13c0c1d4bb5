"""A guest's screen: as a picture, and in a browser."""

from __future__ import annotations

import errno
import mimetypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmctl.errors import Conflict, SpecError, Unsupported, VmctlError, reason
from vmctl.hosts import Host
from vmctl.hypervisor import domain, screen
from vmctl.hypervisor.domain import State
from vmctl.hypervisor.screen import Screen
from vmctl.picture import png

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def _screen(host: Host, name: str, doing: str) -> Screen:
    vm = domain.find(host.conn, name)
    if not vm.panicked:  # its last words are on it
        domain.require(vm, frozenset({State.RUNNING, State.PAUSED}), doing, f"vmctl start {name}")
    found = screen.screen(host.conn, name)
    if not found.video:
        raise Unsupported(
            f"cannot {doing} VM {name}: it has no screen",
            hint=f"one created with --graphics vnc has; or: vmctl console {name}",
        )
    return found


def screenshot(host: Host, name: str, path: Path) -> int:
    """Write what is on the screen to ``path`` as PNG; returns its size in bytes. It appears there only when whole.

    Raises SpecError for a name that says another kind of picture.
    """
    kind = mimetypes.guess_type(path.name)[0] or ""
    if kind.startswith("image/") and kind != "image/png":
        raise SpecError(f"cannot write {path}: a screenshot is PNG, not {kind}", hint=f"{path.with_suffix('.png')}")
    _screen(host, name, "take a picture of")
    data = png(*screen.picture(host.conn, name))
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
        try:
            temporary.write_bytes(data)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise VmctlError(f"cannot write {path}: {error.strerror}") from error
    return len(data)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def served(host: Host, name: str, *, port: int) -> Iterator[str]:
    """Serve a page with the guest's screen on loopback inside the block, and give its address. ``port`` 0: a free one.

    Raises Unsupported where there is no screen to serve, Conflict for a port that is taken.
    """
    from vmctl import novnc  # late: it brings http.server with it

    found = _screen(host, name, "view")
    if found.websocket is None:
        raise Unsupported(
            f"cannot view VM {name}: its VNC server has no WebSocket",
            hint="VMs that vmctl creates with --graphics vnc have one; `vmctl screenshot` works without",
        )
    if not host.conn.local or found.listen not in _LOOPBACK:
        raise Unsupported(
            f"cannot view VM {name}: its screen is not on this machine's loopback",
            hint="run vmctl there, with ssh -L for the page",
        )
    try:
        server = novnc.Server(port, (found.listen, found.websocket))
    except OSError as error:
        if error.errno in {errno.EADDRINUSE, errno.EACCES}:
            raise Conflict(f"cannot view VM {name}: port {port} is taken or not allowed", hint="--port 0") from error
        raise VmctlError(f"cannot view VM {name}: {reason(error)}") from error
    with server:
        yield server.url
