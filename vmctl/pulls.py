"""Where downloads of images are kept until they are whole, and which of them nobody will go on with."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from vmctl import download
from vmctl.errors import Conflict
from vmctl.hosts import Host
from vmctl.locks import held
from vmctl.manifest import NAME

_FILE = re.compile(rf"(?P<name>{NAME})\.partial(?:\.json(?:\.new)?)?")


def folder(host: Host) -> Path:
    """The folder of all downloads; it may not be there yet."""
    return host.folders.cache / "pulls"


def partial(host: Host, name: str) -> Path:
    """The file that image ``name`` is downloaded to."""
    return folder(host) / f"{name}.partial"


def alone(host: Host, name: str, *, timeout_s: float = 0.0) -> AbstractContextManager[None]:
    """Hold the right to download ``name``. Raises Conflict when another process still has it after that time."""
    return held(host.folders.runtime, f"pull {name}", timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class Stale:
    """A download nobody works on, by the image's name. ``size`` in bytes on the disk."""

    name: str
    size: int


def stale(host: Host, older_than_s: float) -> tuple[Stale, ...]:
    """Downloads that no pull works on and to which nothing has come for that long."""
    try:
        names = {match["name"] for path in folder(host).iterdir() if (match := _FILE.fullmatch(path.name))}
    except OSError:
        return ()  # there are none, or they are not ours
    found = []
    for name in sorted(names):
        with suppress(Conflict), alone(host, name):
            if _idle(host, name, older_than_s):
                found.append(Stale(name, sum(one.stat().st_blocks * 512 for one in _files(host, name))))
    return tuple(found)


def discard(host: Host, name: str, older_than_s: float) -> bool:
    """Remove a download; False when somebody has gone on with it meanwhile. Raises Conflict, OSError."""
    with alone(host, name):
        if not _idle(host, name, older_than_s):
            return False
        download.discard(partial(host, name))
    return True


def _files(host: Host, name: str) -> Iterator[Path]:
    path = partial(host, name)
    return (one for one in (path, *(path.with_name(path.name + end) for end in (".json", ".json.new"))) if one.exists())


def _idle(host: Host, name: str, older_than_s: float) -> bool:
    """Whether nothing has come for that long. Under its lock."""
    changed = [one.stat().st_mtime for one in _files(host, name)]
    return bool(changed) and time.time() - max(changed) >= older_than_s
