"""Two files of which nobody can tell which a VM wrote to last (switch_over.py): named, and one chosen by the user.

Neither is deleted, whichever is chosen.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

from vmctl import disk_journal, durable, layer_check, snapshot_journal, snapshot_settle, switch_over
from vmctl.errors import Conflict, NotFound, SpecError, WrongState
from vmctl.events import Reporter, Step, bytes_in_words
from vmctl.hosts import Host, holding
from vmctl.hypervisor import domain
from vmctl.switch_over import Doubt


def find(host: Host, *, fix: bool = False) -> tuple[Doubt, ...]:
    """All such disks of this host's VMs. Only looks, but with ``fix``.

    Then definitions come to name what their VMs are known to have gone on in, and what is not in doubt any more is
    noted. A VM that another vmctl works on is left alone then, and nothing told of it: it may be about to be settled.
    """
    if not host.conn.local:
        return ()
    noted = snapshot_journal.vms(host) | {entry.vm for _, entry in disk_journal.entries(host)}
    look = _settled if fix else _seen
    return tuple(one for name in sorted(noted) for one in look(host, name))


def _seen(host: Host, name: str) -> tuple[Doubt, ...]:
    vm = domain.find_or_none(host.conn, name)
    return () if vm is None else tuple(layer_check.doubts(host, vm, noting=False))


def _settled(host: Host, name: str) -> tuple[Doubt, ...]:
    with ExitStack() as stack:
        try:
            stack.enter_context(holding(host, name))
        except Conflict:
            return ()
        return _followed(host, name)


def _followed(host: Host, name: str) -> tuple[Doubt, ...]:
    """Those of a VM whose name is held, after its definition names what it is known to have gone on in."""
    vm = domain.find_or_none(host.conn, name)
    if vm is None:
        return ()
    layer_check.follow_stopped(host, vm)
    return tuple(layer_check.doubts(host, vm, noting=True))


def told(one: Doubt) -> str:
    """Both files, with what tells them apart."""
    return f"VM {one.vm}: {one.meaning}; {_looks(one.told)}; {_looks(one.other)}"


def _looks(path: str) -> str:
    try:
        info = Path(path).stat()
    except OSError:
        return f"{path} is not there"
    changed = datetime.fromtimestamp(info.st_mtime).astimezone().isoformat(" ", "seconds")
    return f"{path} was changed {changed} and takes {bytes_in_words(info.st_blocks * 512)}"


def keep(host: Host, paths: Collection[str], report: Reporter) -> tuple[str, ...]:
    """Let VMs have these files, of which it is in doubt whether they are their disks; one line for each, for people.

    The other file of each stays where it is. Raises NotFound for a path that is none of those files, SpecError for
    both files of a disk, WrongState where the VM runs in the other one: nothing is changed then. Raises Conflict for a
    VM that another vmctl works on, or whose disk is in doubt no more when its name is held.
    """
    wanted = {os.path.realpath(path): path for path in paths}
    chosen: list[tuple[Doubt, str]] = []
    there = (*find(host), *_of_forks(host))
    for one in there:
        named = {path for path in (one.told, one.other) if os.path.realpath(path) in wanted}
        if len(named) > 1:
            raise SpecError(f"cannot keep both {one.told} and {one.other}: VM {one.vm} has one disk {one.target}")
        for path in named:
            if one.running and path == one.other:
                raise WrongState(
                    f"cannot let VM {one.vm} have {path}: it runs, in {one.told}", hint=f"vmctl stop {one.vm} first"
                )
            chosen.append((one, path))
    found = {os.path.realpath(path) for _, path in chosen}
    for real, path in wanted.items():
        if real not in found:
            known = ", ".join(path for one in there for path in (one.told, one.other))
            raise NotFound(
                f"cannot keep {path}: no disk is in doubt about it",
                hint=f"those that are: {known}" if known else "vmctl doctor",
            )
    return tuple(_chosen(host, one, path, report) for one, path in chosen)


def _of_forks(host: Host) -> Iterator[Doubt]:
    """The layers that forks made, of which there is no note: a VM may well be below them on purpose."""
    for path, (name, base) in layer_check.newer_than_stopped(host).items():
        yield from layer_check.unlayered(host, domain.find(host.conn, name), {path: base})


def _chosen(host: Host, one: Doubt, path: str, report: Reporter) -> str:
    with holding(host, one.vm):
        if one not in (*_followed(host, one.vm), *_of_forks(host)):
            raise Conflict(f"cannot keep {path}: what is known of VM {one.vm} has just changed", hint="vmctl doctor")
        _choose(host, one, path)
    left = one.other if path == one.told else one.told
    report(Step(f"disk {one.target} of {one.vm} is {path}; {left} stays"))
    based = os.path.realpath(left) in {os.path.realpath(below) for below in layer_check.below(path)}
    rest = "" if based else f"; {left} is left: when nobody needs it, delete it by hand: rm {shlex.quote(left)}"
    return f"disk {one.target} of {one.vm} is {path}, as chosen{rest}"


def _choose(host: Host, one: Doubt, path: str) -> None:
    vm = domain.find(host.conn, one.vm)
    for at, copy in disk_journal.entries(host):
        if copy.vm == one.vm and disk_journal.doubt(host, vm, copy, noting=False) == one:
            disk_journal.keep(host, at, copy, new=path == one.other)
            return
    merges = [at for at, merged in layer_check.half_merged(host, vm, noting=False) if merged == one]
    if path == one.other:
        switch_over.name_other(host, one)
    elif one in _of_forks(host):  # else it may be what the VM's own disk is based on
        layer_check.give_up(host, vm, one.other)
    for at in merges:
        snapshot_settle.keep_apart(host, one.vm, at)
    for at, entry in snapshot_journal.entries(host):
        if entry.vm == one.vm and one.other in entry.files:  # not to be removed any more, nor merged into the other
            left = tuple(path for path in entry.files if path != one.other)
            durable.write(at, asdict(replace(entry, files=left, layers=())))
            if not (left or entry.frozen or entry.nvram):
                at.unlink()
