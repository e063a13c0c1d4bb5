"""Who needs a file of the store: by naming it, or through overlays on overlays, in a pool or outside of any."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vmctl import disk_header, domain_files, pull_journal
from vmctl.disk_header import Window
from vmctl.disk_header.window import Unreadable
from vmctl.hosts import Host
from vmctl.hypervisor import domain, storage
from vmctl.hypervisor.connection import Connection


@dataclass(frozen=True, slots=True)
class Needed:
    """Which files are needed: ``users`` of each by path, and ``unknown``, disks whose chain could not be followed.

    Users are VMs, by name, and volumes, by path: one in another folder may have the name of what it is based on.
    ``local``: the paths are of this machine, and followed through links, by which a pool may name them.
    """

    users: Mapping[str, frozenset[str]]
    unknown: tuple[str, ...] = ()
    local: bool = True

    def by(self, *paths: str, but: Collection[str] = ()) -> tuple[str, ...]:
        """Names of who needs any of the files, ``but`` these VMs, by name, and volumes, by path."""
        users = {user for path in paths if path for user in self.users.get(self._real(path), ())}
        return tuple(sorted({leaf(user) for user in users - {self._real(one) for one in but}}))

    def _real(self, path: str) -> str:
        return os.path.realpath(path) if self.local and path.startswith("/") else path


def leaf(user: str) -> str:
    """What people call a VM or a volume. No name of a VM has a slash."""
    return user.rpartition("/")[2]


def chains(named: Mapping[str, Iterable[str]], bases: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """The users of every file: those that name it, and those of the files that are based on it. Pure."""
    found: dict[str, set[str]] = {}
    for path, users in named.items():
        at, seen = path, set[str]()
        while at and at not in seen:
            seen.add(at)
            found.setdefault(at, set()).update(users)
            at = bases.get(at, "")
    return {path: frozenset(users) for path, users in found.items()}


@dataclass(frozen=True, slots=True)
class Seen:
    """Files of a host as they hang together: what each is based on, which VMs name it, and the ends left unknown.

    ``volumes``: the paths of what is based on a file, for those in pools.
    """

    bases: Mapping[str, str]
    named: Mapping[str, frozenset[str]]
    volumes: Mapping[str, frozenset[str]]
    unknown: tuple[str, ...]


def look(host: Host) -> Seen:
    """What is there on the host.

    A disk of which a pull was begun, and not seen to its end, is based on what it was based on before: it may need it.
    """
    conn = host.conn
    volumes = storage.all_volumes(conn)
    bases = {_real(conn, v.path): _real(conn, v.backing) for v in volumes if v.backing}
    in_pools = {_real(conn, v.path) for v in volumes}
    paths = {f"{v.pool}/{v.name}": v.path for v in volumes}
    based: dict[str, set[str]] = {}
    for volume in volumes:
        if volume.backing:
            based.setdefault(_real(conn, volume.backing), set()).add(_real(conn, volume.path))
    named: dict[str, set[str]] = {}
    unknown, raw = set(), set[str]()
    for name, text in domain.all_texts(conn):
        raw |= domain_files.raw(text)
        for source in domain_files.named(text):
            named.setdefault(_real(conn, paths.get(source, source)), set()).add(name)
    open_ends = [path for path in {*based, *named} if path.startswith("/") and path not in in_pools | raw]
    for folder in storage.sleeping_folders(conn):
        found = _files(folder) if conn.local else None
        if found is None:
            unknown.add(folder)
        for path in map(os.path.realpath, found or ()):
            based.setdefault(path, set()).add(path)
            open_ends.append(path)
    for pulled, old, *below in pull_journal.held(host):
        bases[pulled] = old
        based.setdefault(old, set()).add(pulled)
        for upper, lower in pairwise((old, *below)):
            bases.setdefault(upper, lower)
    _follow(conn, open_ends, bases, unknown)
    return Seen(bases, _frozen(named), _frozen(based), tuple(sorted(unknown)))


def _frozen(sets: Mapping[str, set[str]]) -> dict[str, frozenset[str]]:
    return {path: frozenset(names) for path, names in sets.items()}


def needed(host: Host) -> Needed:
    """Who needs which file on the host."""
    seen = look(host)
    both = {
        path: seen.named.get(path, frozenset()) | seen.volumes.get(path, frozenset())
        for path in {*seen.named, *seen.volumes}
    }
    return Needed(chains(both, seen.bases), seen.unknown, host.conn.local)


def _real(conn: Connection, path: str) -> str:
    return os.path.realpath(path) if conn.local and path.startswith("/") else path


def _files(folder: str) -> list[str] | None:
    try:
        return [str(path) for path in Path(folder).iterdir() if path.is_file()]
    except FileNotFoundError:
        return []
    except OSError:
        return None


def _follow(conn: Connection, ends: list[str], bases: dict[str, str], unknown: set[str]) -> None:
    """Add what the files that libvirt does not look into are based on, as far as it can be read here."""
    seen: set[str] = set()
    while ends:
        path = ends.pop()
        if path in seen or path in bases:
            continue
        seen.add(path)
        try:
            base = _base(path) if conn.local else None
        except OSError:
            base = None
        if base is None:
            unknown.add(path)
        elif base:
            bases[path] = os.path.realpath(Path(path).parent / base)
            ends.append(bases[path])


def _base(path: str) -> str | None:
    """The file that a disk is based on, "" for none, None when its name cannot be told. Raises OSError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        name = disk_header.examine(Window(handle, os.lseek(handle, 0, os.SEEK_END))).backing
    except Unreadable:
        return ""
    finally:
        os.close(handle)
    if name.startswith("json:"):
        return _filename(name.removeprefix("json:"))
    return name.removeprefix("file:")


def _filename(text: str) -> str | None:
    try:
        tree = json.loads(text)
        while isinstance(tree.get("file"), dict):
            tree = tree["file"]
        return str(tree.get("filename") or tree["file.filename"])
    except (ValueError, AttributeError, KeyError, RecursionError):
        return None
