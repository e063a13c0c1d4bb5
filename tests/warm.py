"""Runs Python command lines in processes forked off one that has imported vmctl already.

A tenth of a second instead of half of one for each of the thousands of commands that the tests give, and more on a
busy machine. A command is a process of its own as ever: own arguments, environment, folder, streams, exit code, own
signals. What differs is that its modules were imported before; that they can be is seen by every other test which
starts `python -m vmctl` itself.
"""

from __future__ import annotations

import array
import atexit
import importlib
import json
import os
import pkgutil
import runpy
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

REPO = Path(__file__).parents[1]


def run(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    stdin: int | None = None,
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([sys.executable, *arguments], capture_output=True, text=True)``; in the checkout's folder.

    ``arguments`` are those of Python: ``-m MODULE …`` or a script and its own. ``stdin`` may be DEVNULL or PIPE.
    """
    given = None if input is None else input.encode()
    done = run_bytes(arguments, env=env, input=given, stdin=stdin, timeout=timeout)
    return subprocess.CompletedProcess(done.args, done.returncode, _text(done.stdout), _text(done.stderr))


def _text(data: bytes) -> str:
    """Line ends as text mode reads them."""
    return data.decode().replace("\r\n", "\n").replace("\r", "\n")


def run_bytes(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,
    stdin: int | None = None,
    timeout: float,
) -> subprocess.CompletedProcess[bytes]:
    """The same with bytes."""
    with ExitStack() as open_:
        out, err, given = (open_.enter_context(TemporaryFile()) for _ in range(3))
        given.write(input or b"")
        given.seek(0)
        link = open_.enter_context(_connected())
        first = 0 if stdin is None and input is None else given.fileno()
        if stdin == subprocess.PIPE:
            first, writing = os.pipe()
            open_.callback(os.close, first)
            open_.callback(os.close, writing)
        fds = array.array("i", [first, out.fileno(), err.fileno()])
        request = {"arguments": list(arguments), "env": dict(os.environ if env is None else env)}
        link.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        pid = int(link.recv(100))
        link.settimeout(timeout)
        words = [sys.executable, *arguments]
        try:
            code = int(link.recv(100))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            link.settimeout(None)
            link.recv(100)
            raise subprocess.TimeoutExpired(words, timeout, _whole(out), _whole(err)) from None
        return subprocess.CompletedProcess(words, code, _whole(out), _whole(err))


def _whole(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


def _connected() -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    link.connect(_server())
    return link


@cache
def _server() -> str:
    """Address of the process that forks, which lives as long as this one."""
    address = f"\0vmctl-warm-{os.getpid()}-{secrets.token_hex(4)}"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen(64)
    alive, ours = os.pipe()
    words = [sys.executable, "-m", "tests.warm", str(listening.fileno()), str(alive), str(os.getpid())]
    server = subprocess.Popen(words, pass_fds=[listening.fileno(), alive], cwd=REPO)
    listening.close()
    os.close(alive)

    def end() -> None:
        os.close(ours)
        server.wait()

    atexit.register(end)
    return address


def main() -> None:
    """The process that forks: until the pipe from the tests is closed."""
    listening, alive = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    _import_all()
    watch = selectors.DefaultSelector()
    watch.register(listening, selectors.EVENT_READ)
    watch.register(alive, selectors.EVENT_READ)
    while True:
        for key, _ in watch.select():
            if key.fd == alive:
                return
            if key.data is not None:
                pid, link = key.data
                watch.unregister(key.fd)
                os.close(key.fd)
                _, status = os.waitpid(pid, 0)
                with suppress(OSError):  # who asked is gone
                    link.send(str(os.waitstatus_to_exitcode(status)).encode())
                link.close()
                continue
            link, _ = listening.accept()
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            said, fds, _, _ = socket.recv_fds(link, 1 << 20, 3)
            if not said:
                link.close()
                continue
            pid = os.fork()
            if not pid:
                for number, fd in enumerate(fds):
                    os.dup2(fd, number)
                os.closerange(3, 4096)
                _become(json.loads(said))
            for fd in fds:
                os.close(fd)
            link.send(str(pid).encode())
            watch.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, link))


def _import_all() -> None:
    """All of vmctl but the pytest plugin, and what it imports late."""
    import vmctl

    for module in pkgutil.walk_packages(vmctl.__path__, "vmctl."):
        if module.name not in {"vmctl.pytest_qemu", "vmctl.__main__"}:
            importlib.import_module(module.name)
    for name in ("paramiko", "jinja2", "typer", "libvirt_qemu", "yaml", "concurrent.futures", "difflib"):
        with suppress(ImportError):
            importlib.import_module(name)


def _become(request: dict[str, Any]) -> None:
    """Run the command line in this process, which ends with it."""
    os.environ.clear()
    os.environ.update(request["env"])
    first, *rest = request["arguments"]
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001  as the interpreter would
        sys.excepthook(*sys.exc_info())
        code = 1
    else:
        code = 0
    for one in threading.enumerate():
        if one is not threading.current_thread() and not one.daemon:
            one.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
