"""Ending a migration that was cut off: where the VM is, both hosts tell; what is left elsewhere goes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from vmctl import (
    elsewhere,
    folder_pools,
    homes,
    migrate,
    migrate_cards,
    migrate_facts,
    migrate_files,
    migrate_settle,
    migrate_storage,
)
from vmctl.errors import Interrupted, MigrationFailed, VmctlError
from vmctl.events import Reporter, Status, Step, Warned
from vmctl.hosts import Host, holding
from vmctl.hypervisor import domain, migration
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.states import MOVED, State, recovery
from vmctl.migrate import Mode, Moved
from vmctl.migrate_ends import Ends
from vmctl.migrate_files import Look
from vmctl.migrate_outcome import CUT_OFF, Seen, Where
from vmctl.migrate_policy import Abort, decide
from vmctl.migrate_problems import DiskNeed
from vmctl.migrate_watch import told
from vmctl.migrate_wish import Wish
from vmctl.wait import pause

if TYPE_CHECKING:
    from vmctl.migrate_policy import Sample

_LOOK_S = 0.5


def recover(ends: Ends, name: str, wish: Wish, report: Reporter) -> Moved:
    """Settle what a migration left, and when the VM is still on the source, migrate it.

    Raises MigrationFailed where physics leaves nothing to settle, or a host cannot be asked.
    """
    with holding(ends.source, name):
        ends.require_two(f"recover VM {name}")
        vm = domain.find_or_none(ends.source.conn, name) or domain.find(ends.target.conn, name)
        began = time.monotonic()
        _require_not_coming(ends, vm)
        _await_job(ends, vm, wish, report)
        where, seen = migrate_settle.settle(ends, vm.uuid)
        ends.require_two(f"recover VM {name}")  # one may have come back only now
        if where is Where.POSTCOPY:
            report(Step(f"{name}: going on with its post-copy"))
            _resume_postcopy(ends, vm, wish)
            where, seen = migrate_settle.settle(ends, vm.uuid)
        here, there = ends.names
        if where is Where.MOVED or _off_there(seen):
            _require_left(ends.source, here, vm, seen[0], ends.target, went=True)
            looked = _looked(ends, vm, wish)
            if migrate_cards.noted(ends.target, vm.name):
                migrate_cards.plug_anew(ends, vm.name, report)
            migrate.end_on_target(ends, looked, wish, report)
            _clear_marks(ends, looked)
            if not (seen[1].there or seen[1].ended):  # the host has been without power, or it went as one that was off
                report(_gone(name, f"is off on {there}", f"vmctl -c {there} start {name}"))
            return Moved(vm.name, vm.uuid, here, there, _mode(looked.vm), time.monotonic() - began)
        if where in {Where.HALF, Where.LOST}:
            _require_nowhere_else(ends, vm, report)
        if where is Where.HALF:
            report(Step(f"{name}: {there} has nothing of it; it goes on on {here}"))
            domain.resume(ends.source.conn, vm.name)
        elif where is not Where.STAYED and not (where is Where.LOST and _only_off(seen)):
            states = f"on {here} it is {seen[0].told}, on {there} {seen[1].told}"
            raise MigrationFailed(f"cannot recover VM {name}: it is {where}: {states}", hint=_HINTS.get(where, _ASK))
        elif where is Where.LOST:
            report(_gone(name, "runs on neither host", f"vmctl start {name}, once it is where it shall be"))
        _require_left(ends.target, there, vm, seen[1], ends.source, went=False)
        _clear_target(ends, vm, seen[1], report)
    report(Step(f"{name} is on {here}, and {there} is clean: migrating it"))
    return migrate.migrate(ends, name, wish, report)


def _gone(name: str, how: str, hint: str) -> Warned:
    return Warned(f"{name} {how}: if it ran before, its memory is gone, and its disks are not", hint)


def _require_nowhere_else(ends: Ends, vm: Domain, report: Reporter) -> None:
    """Raise MigrationFailed for one that is in use on a third host: the move that was cut off went there.

    On the source it is paused, or off, and the target that was named has none of it; resumed, there would be two.
    """
    noted = homes.others(ends.source, vm) if domain.find_or_none(ends.source.conn, vm.uuid) else ()
    seen = elsewhere.look_for(ends.source, vm.uuid, ends.target, noted=noted)
    for name, found in seen.in_use.items():
        raise MigrationFailed(
            f"cannot recover VM {vm.name}: it is {found.state} on {name}, and not to come to {ends.names[1]}",
            hint=recovery(vm.name, ends.names[0], name),
        )
    if seen.unasked:
        why = next(iter(seen.unasked.values()))
        text = f"not asked whether {vm.name} is there: {', '.join(seen.unasked)} ({why})"
        report(Warned(text, "make sure that it does not run there: two that run on one disk destroy it"))


def _mode(vm: Domain) -> Mode:
    return Mode.STOPPED if not vm.active else Mode.HELD if migrate.emulated(vm) else Mode.LIVE


_ASK = "again, once both hosts answer"
_HINTS = {
    Where.TWICE: "stop one of them at once: two guests on one disk destroy it",
    Where.LOST: "its memory is gone, its disks are not: stop --force it where it still is, start it where defined",
    Where.POSTCOPY: "again, once both hosts reach each other; neither must be restarted before",
}


def _only_off(seen: tuple[Seen, Seen]) -> bool:
    """Whether it simply is off, on the source: nothing was lost."""
    return seen[0].state is not None and not seen[0].there and seen[1].known and not seen[1].there


def _require_left(host: Host, called: str, vm: Domain, seen: Seen, stays: Host, *, went: bool) -> None:
    """Raise MigrationFailed where a host has more of a VM that is elsewhere than moves leave: it was used there.

    A definition that was kept there, and started: its saved memory and its snapshots would go with it. Or one that
    somebody copied, and gave disks of its own: it is another VM, whatever its UUID.
    """
    if seen.state is None or seen.there:
        return
    left = domain.find(host.conn, vm.uuid)
    lives = ["its saved memory"] if left.state is State.SAVED else []
    if migration.standing(left).snapshots:
        lives.append("its snapshots")
    if lives:
        raise MigrationFailed(
            f"cannot recover VM {vm.name}: on {called} it is {left.state}, with {' and '.join(lives)}, which no move "
            "leaves: it was used there",
            hint=f"look at it there; vmctl -c {called} delete {left.name} gives up what it has there",
        )
    own = _own_disks(host, left, stays, went=went, used=seen.ended)
    if own and seen.ended and not went:
        raise MigrationFailed(
            f"cannot recover VM {vm.name}: on {called} it is {left.state}, and has run there, with a disk that "
            f"{stays.name} has not: {', '.join(own)}",
            hint=f"vmctl -c {called} start {left.name} goes on with it there; "
            f"vmctl -c {called} delete {left.name} gives up what it did there",
        )
    if own:
        raise MigrationFailed(
            f"cannot recover VM {vm.name}: on {called} it is {left.state}, with a disk that is not the one on "
            f"{stays.name}, and that no move which was cut off left there: {', '.join(own)}",
            hint=f"is it another VM? on {called} itself, vmctl clone {left.name} NEW makes one with a UUID of its own; "
            f"vmctl -c {called} delete {left.name} gives up what it has there",
        )


def _own_disks(host: Host, left: Domain, stays: Host, *, went: bool, used: bool) -> tuple[str, ...]:
    """The disks of a definition of a VM that stays elsewhere which are neither the VM's nor what a move left.

    ``went``: the VM has gone from there, so that what is called as its disks are is what they were copied from.
    ``used``: it has run there, and written to what a move left.
    """
    files = migrate_files.files(host, left)
    kept = {one.path for one in migrate_files.files(stays, domain.find(stays.conn, left.uuid))}
    marked = migrate_storage.marked(host, files) | migrate_storage.marked(stays, files)
    ours = frozenset() if used and not went else marked
    folders = {one.folder for one in files if not one.network and one.path in kept}
    same = folders if went else folder_pools.shared_folders(stays, host, folders)
    return migrate_files.own_disks(files, kept, ours, same)


def _off_there(seen: tuple[Seen, Seen]) -> bool:
    """Whether it is off, and on the target: it went as one that was off, or has ended there since.

    The source has none of it, or a definition that has not been used since libvirt sent it away.
    """
    gone = seen[0].known and (seen[0].state is None or seen[0].why == MOVED)
    return gone and seen[1].state is not None and not seen[1].there


def _require_not_coming(ends: Ends, vm: Domain) -> None:
    """Raise MigrationFailed for one that is on its way from the target: what is here of it is no rest of it."""
    try:
        coming = migration.leaving(ends.target.conn, vm.uuid)
    except VmctlError:
        return  # it has none of it; or cannot be asked, which is seen later
    if coming and domain.find_or_none(ends.source.conn, vm.uuid) is not None:
        here, there = ends.names
        raise MigrationFailed(
            f"cannot recover VM {vm.name}: it is on its way from {there} to {here}",
            hint=f"{recovery(vm.name, there, here)} sees the end of that",
        )


def _await_job(ends: Ends, vm: Domain, wish: Wish, report: Reporter) -> None:
    """A peer-to-peer migration goes on without the vmctl that began it: see it end, or end it when it stands still.

    One that is cut off in post-copy stays a job for ever. Raises Interrupted, which says that it goes on.
    """
    try:
        _see_it_end(ends, vm, wish, report)
    except (KeyboardInterrupt, Interrupted) as early:
        here, there = ends.names
        text = f"{f'{early}' or 'interrupted'}; its move from {here} to {there}, begun before, goes on without vmctl"
        again = f"{recovery(vm.name, here, there, keep=wish.keep)} sees the end of that"
        raise Interrupted(f"cannot migrate VM {vm.name}: {text}", hint=again) from early


def _see_it_end(ends: Ends, vm: Domain, wish: Wish, report: Reporter) -> None:
    history: list[Sample] = []
    began = time.monotonic()
    while True:
        try:
            now = migration.sample(ends.source.conn, vm.name, time.monotonic() - began)
            if now is None or domain.state(ends.source.conn, vm.name)[1] == CUT_OFF:
                return
        except VmctlError:
            return
        history.append(now)
        report(Status(vm.name, f"under way already: {told(history)}"))
        if isinstance(decide(history, (), replace(wish.policy, give_up_s=None, postcopy=False)), Abort):
            migration.abort(ends.source.conn, vm.name)
            return
        pause(_LOOK_S)


def _looked(ends: Ends, vm: Domain, wish: Wish) -> migrate_facts.Found:
    """The files of a VM that has moved, as the target has them, and which of them lie on the source too."""
    now = domain.find(ends.target.conn, vm.uuid)
    files = migrate_files.files(ends.target, now)
    files = (*migrate_files.left_below(ends.source, now, files), *files)
    both = folder_pools.shared_folders(ends.source, ends.target, (one.folder for one in files if not one.network))
    needs = tuple(DiskNeed(one.told, one.path, one.network or one.folder in both) for one in files)
    return migrate_facts.found_after(now, needs, files, Look(needs, (), True, {}))


def _clear_marks(ends: Ends, looked: migrate_facts.Found) -> None:
    for one in looked.files:
        if not one.network:
            migrate_storage.unmark(ends.target, [migrate_files.Make(one, empty=False)])


def _clear_target(ends: Ends, vm: Domain, there: Seen, report: Reporter) -> None:
    """The VM is on the source: a definition of it on the target, and half made files there, go."""
    if there.state is not None and not there.there:
        domain.undefine(ends.target.conn, vm.uuid, keep_nvram=True)  # what was made there has a mark
        homes.learn(ends.source, domain.find(ends.source.conn, vm.uuid), [homes.known_by(ends.target)])
    for path in migrate_storage.clear_marked(ends.source, ends.target, migrate_files.files(ends.source, vm)):
        report(Step(f"deleted {path} on {ends.names[1]}, which was not whole"))


def _resume_postcopy(ends: Ends, vm: Domain, wish: Wish) -> None:
    """Raises MigrationFailed when it cannot go on."""
    try:
        migration.resume_postcopy(ends.source.conn, ends.target.conn, vm.name, migrate.orders(ends, vm, wish))
    except VmctlError as error:
        raise MigrationFailed(
            f"cannot go on with the post-copy of VM {vm.name}: {error.message}", hint=_HINTS[Where.POSTCOPY]
        ) from error
