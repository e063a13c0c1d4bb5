"""qemu-nbd: a disk served on a unix socket, read-only, for vmctl's own eyes (nbd.py)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vmctl.errors import ImageError
from vmctl.qemu_img_run import Limits, said_last
from vmctl.wait import wait_until

_START_TIMEOUT_S = 60.0


@contextmanager
def served(
    tree: str, *, what: str, handles: Sequence[int] = (), bitmap: str = "", depth: bool = False
) -> Iterator[tuple[Path, str]]:
    """A disk, read-only, as an NBD export: the socket's path and the export's name. Within the block only.

    ``tree`` leaves nothing to guess (Source.options, or known). ``bitmap``, ``depth``: what can be asked of its blocks
    beside what is zero. The server has limits and dies with us.
    """
    with tempfile.TemporaryDirectory(prefix="vmctl-nbd-") as folder:
        socket_path = Path(folder) / "socket"
        words = ["qemu-nbd", "-r", "-t", "-e", "16", "-k", str(socket_path), "-x", "disk"]
        words += ["-B", bitmap] if bitmap else []
        words += ["-A"] if depth else []
        limits = Limits(memory=4 << 30, cpu_s=86400, file_size=0)
        try:
            process = subprocess.Popen(
                [*limits.words(), *words, tree],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=tuple(handles),
                env=os.environ | {"MALLOC_ARENA_MAX": "1", "LC_ALL": "C"},
            )
        except FileNotFoundError as error:
            raise ImageError(
                f"cannot {what}: {error.filename} is missing", hint="apt-get install qemu-utils"
            ) from error
        with process:
            try:
                wait_until(
                    lambda: _listens(process, socket_path, what), what=what, timeout_s=_START_TIMEOUT_S, interval_s=0.01
                )
                yield socket_path, "disk"
            finally:
                process.kill()


def _listens(process: subprocess.Popen[bytes], path: Path, what: str) -> bool:
    if process.poll() is not None:
        assert process.stderr is not None
        tail = said_last(process.stderr.read())
        raise ImageError(f"cannot {what}: {tail or f'qemu-nbd exit status {process.returncode}'}")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def plain_tree(path: str, format: str) -> str:
    """The tree of a disk whose whole chain is known to be good, for ``served``."""
    return "json:" + json.dumps({"driver": format, "file": {"driver": "file", "filename": path}})
