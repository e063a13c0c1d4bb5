"""Two files of which nobody can tell which a VM wrote to last (switch_over.py): named, and one chosen by the user.

Neither is deleted, whichever is chosen.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

from vmctl import disk_journal, layer_check, snapshot_journal, snapshot_settle, switch_over
from vmctl.errors import NotFound, SpecError, WrongState
from vmctl.events import Reporter, Step, bytes_in_words
from vmctl.hosts import Host, holding
from vmctl.hypervisor import domain
from vmctl.switch_over import Doubt


def find(host: Host) -> tuple[Doubt, ...]:
    """All such disks of this host's VMs."""
    if not host.conn.local:
        return ()
    noted = snapshot_journal.vms(host) | {entry.vm for _, entry in disk_journal.entries(host)}
    return tuple(one for name in sorted(noted) for one in _of(host, name))


def _of(host: Host, name: str) -> Iterator[Doubt]:
    vm = domain.find_or_none(host.conn, name)
    if vm is not None:
        layer_check.follow_stopped(host, vm)
        yield from layer_check.doubts(host, vm)


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
    both files of a disk, WrongState where the VM runs in the other one; nothing is changed then.
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
        _choose(host, one, path)
    left = one.other if path == one.told else one.told
    report(Step(f"disk {one.target} of {one.vm} is {path}; {left} stays"))
    based = os.path.realpath(left) in {os.path.realpath(below) for below in layer_check.below(path)}
    rest = "" if based else f"; {left} is left: when nobody needs it, delete it by hand: rm {shlex.quote(left)}"
    return f"disk {one.target} of {one.vm} is {path}, as chosen{rest}"


def _choose(host: Host, one: Doubt, path: str) -> None:
    vm = domain.find(host.conn, one.vm)
    for at, copy in disk_journal.entries(host):
        if copy.vm == one.vm and disk_journal.doubt(host, vm, copy) == one:
            disk_journal.keep(host, at, copy, new=path == one.other)
            return
    merges = [at for at, merged in layer_check.half_merged(host, vm) if merged == one]
    if path == one.other:
        switch_over.name_other(host, one)
    for at in merges:
        snapshot_settle.keep_apart(host, one.vm, at)
    for at, entry in snapshot_journal.entries(host):
        if entry.vm == one.vm and one.other in entry.files:  # not to be removed any more, nor merged into the other
            left = tuple(path for path in entry.files if path != one.other)
            disk_journal.write(at, asdict(replace(entry, files=left, layers=())))
            if not (left or entry.frozen or entry.nvram):
                at.unlink()
