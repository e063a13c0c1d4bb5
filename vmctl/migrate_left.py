"""What moves that were cut off left on other hosts: known by the marks of files that were being made, and ended.

A second move of a VM to the same host ends what the first one left. A plan that is made anew may choose another host,
or find that the VM has gone meanwhile, for a migration goes on without its vmctl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from vmctl import config, fleet, migrate_files, migrate_recover, migrate_storage
from vmctl.errors import Conflict, NotFound, VmctlError
from vmctl.events import Reporter, Step, Warned
from vmctl.fleet import Fleet
from vmctl.hosts import holding
from vmctl.hypervisor import domain, migration, storage
from vmctl.hypervisor.states import State
from vmctl.migrate_ends import Ends
from vmctl.migrate_files import MARK
from vmctl.migrate_wish import Wish


class Seen(NamedTuple):
    """A host: the paths of its volumes, of those of them that bear a mark, and of its VMs' disks."""

    volumes: frozenset[str]
    marked: frozenset[str]
    disks: Mapping[str, frozenset[str]]

    def of(self, path: str) -> list[str]:
        """The VMs that have that disk."""
        return sorted(name for name, paths in self.disks.items() if path in paths)


class Left(NamedTuple):
    """What a move of a VM left on ``host``. ``at``: where the VM is; ``host``, for one that ``moved`` there."""

    vm: str
    host: str
    at: str

    @property
    def moved(self) -> bool:
        """Whether the VM is there with it, and its old files may be on the source."""
        return self.at == self.host


def left(seen: Mapping[str, Seen], source: str) -> Iterator[Left]:
    """What moves from ``source`` to other hosts left, each VM once a host. Pure."""
    for host, there in seen.items():
        found = set()
        for path in there.marked if host != source else ():
            if vms := there.of(path):
                # It is there, and its file here too: it went, and was not cleared up after.
                came = path in seen[source].volumes - seen[source].marked and not seen[source].of(path)
                found |= {Left(vm, host, host) for vm in vms if came}
            else:
                found |= {Left(vm, host, at) for at, one in seen.items() for vm in one.of(path)}
        yield from sorted(found)


def settle(asked: Fleet, source: str, others: Sequence[str], wish: Wish, report: Reporter, timeout_s: float) -> None:
    """End what moves from a host to others left. What somebody is at, and hosts that do not answer, are passed over."""
    answers = fleet.each(asked.entries([source, *others]), partial(_look, asked), timeout_s)
    seen = {name: one for name, one in answers if not isinstance(one, VmctlError)}
    for one in left(seen, source) if source in seen else ():
        end: Callable[[], None] = partial(_end, asked, one, source, wish, report)
        try:
            end() if one.moved else _clear(asked, one, report)
        except (Conflict, NotFound):
            continue  # another vmctl is at it, or it has ended since
        except VmctlError as error:
            report(Warned(f"{one.host} may have files of a move of {one.vm} that was cut off: {error.message}"))


def _look(asked: Fleet, entry: config.HostEntry) -> Seen:
    with asked.open(entry) as host:
        volumes = frozenset(one.path for one in storage.all_volumes(host.conn))
        marked = frozenset(path.removesuffix(MARK) for path in volumes if path.endswith(MARK))
        disks = {one.name: frozenset(disk.source for disk in one.disks) for one in domain.all_facts(host.conn)}
        return Seen(volumes, marked, disks)


def _end(asked: Fleet, one: Left, source: str, wish: Wish, report: Reporter) -> None:
    """It has moved: what is left of it where it was goes."""
    with Ends(asked, *asked.entries([source, one.host])) as ends:
        if domain.find(ends.target.conn, one.vm).state is State.PAUSED:
            return  # it may be on its way there
        report(
            Step(f"{one.vm} has moved from {source} to {one.host}, by a move that was cut off: clearing up after it")
        )
        migrate_recover.recover(ends, one.vm, wish, report)


def _clear(asked: Fleet, one: Left, report: Reporter) -> None:
    """It is elsewhere: what was made of it goes, unless it is on its way."""
    with Ends(asked, *asked.entries([one.at, one.host])) as ends, holding(ends.source, one.vm):
        vm = domain.find(ends.source.conn, one.vm)
        if vm.active and migration.busy(ends.source.conn, one.vm):
            return
        for path in migrate_storage.clear_marked(ends.source, ends.target, migrate_files.files(ends.source, vm)):
            report(Step(f"deleted {path} on {one.host}, which a move of {one.vm} that was cut off left"))
