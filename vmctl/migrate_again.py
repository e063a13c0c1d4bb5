"""A move that is asked for once more: of a VM that has moved already, or of one whose move was cut off.

Who runs the same command again wants it to end. So it is ended as --recover does, where the target shows that the move
went there: by a definition of the VM, or by a mark beside a file that was being made. Where neither is, the VM may be
anywhere, and --recover stays a word that somebody has to say.

It is looked for only where a move cannot be: one that can costs no more questions for it.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from vmctl import folder_pools, homes, identity, image_users, migrate_files, migrate_recover, migrate_storage, record
from vmctl import migrate as first
from vmctl.errors import NotFound, PreflightFailed, VmctlError
from vmctl.events import Reporter, Step
from vmctl.hypervisor import domain, migration
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.states import MOVING, State, told
from vmctl.migrate import Mode, Moved
from vmctl.migrate_ends import Ends
from vmctl.migrate_files import Role
from vmctl.migrate_problems import Problem, fatal
from vmctl.migrate_wish import Wish


class Before(Enum):
    """What a move before has come to: none, one that has not come to its end, or one that is done."""

    NOTHING = auto()
    BEGUN = auto()
    DONE = auto()


class _Seen(NamedTuple):
    """What it has come to, and of one that is done the VM on the target. ``kept``: the source has what was to stay."""

    before: Before
    there: Domain | None = None
    kept: bool = False


def migrate(ends: Ends, name: str, wish: Wish, report: Reporter) -> Moved:
    """Move a VM, as migrate.migrate() does, and raising what that raises; or end its move before, or say it is done."""
    try:
        return first.migrate(ends, name, wish, report)
    except (NotFound, PreflightFailed):
        found = _look(ends, name, wish)
        if found.before is Before.NOTHING:
            raise
    here, there = ends.names
    if found.there is not None:
        report(Step(_done(ends, found.there, kept=found.kept)))
        return Moved(name, found.there.uuid, here, there, Mode.ALREADY, 0.0)
    report(Step(f"{name}: a move from {here} to {there} was begun before: seeing to its end"))
    return migrate_recover.recover(ends, name, wish, report)


def recover(ends: Ends, name: str, wish: Wish, report: Reporter) -> Moved:
    """Settle what a migration left, as migrate_recover.recover() does; or say that there is nothing to settle.

    Of one that is off on the target that is not said: it may have been without power, and lost its memory.
    """
    try:
        found = _look(ends, name, wish)
    except VmctlError:
        found = _Seen(Before.NOTHING)  # a host that is down, of which a recovery knows more
    if found.there is None or not found.there.active:
        return migrate_recover.recover(ends, name, wish, report)
    report(Step(f"nothing to recover: {_done(ends, found.there, kept=found.kept)}"))
    return Moved(name, found.there.uuid, *ends.names, Mode.ALREADY, 0.0)


def check(ends: Ends, name: str, wish: Wish) -> tuple[Problem, ...]:
    """All that stands against it, and notes; that it is done is one. Changes nothing."""
    try:
        against = first.check(ends, name, wish)
        if not fatal(against):
            return against
        found = _look(ends, name, wish)
        if found.before is Before.NOTHING:
            return against
    except NotFound:
        found = _look(ends, name, wish)
        if found.before is Before.NOTHING:
            raise
    if found.there is not None:
        return (Problem(_done(ends, found.there, kept=found.kept), note=True),)
    return (Problem(f"a move of {name} to {ends.names[1]} was begun before: its end is seen to first", note=True),)


def _done(ends: Ends, there: Domain, *, kept: bool) -> str:
    here, target = ends.names
    rest = f"what was to stay of it is on {here}" if kept else f"{here} has nothing of it"
    return f"{there.name} is on {target} already, {told(there.state, there.why)}, and {rest}"


def _look(ends: Ends, name: str, wish: Wish) -> _Seen:
    source, target = ends.source, ends.target
    if source.facts.uuid == target.facts.uuid:  # what is on both is there once
        return _Seen(Before.NOTHING)
    vm = domain.find_or_none(source.conn, name)
    if vm is None:
        there = domain.find_or_none(target.conn, name)
        return _Seen(Before.NOTHING) if there is None else _of_gone(ends, there)
    there = domain.find_or_none(target.conn, vm.uuid)
    if there is None and not (vm.state is State.PAUSED and vm.why in MOVING):
        return _Seen(Before.NOTHING)
    return _of_both(ends, vm, there, wish)


def _of_gone(ends: Ends, there: Domain) -> _Seen:
    """The source has no VM of that name, and the target has.

    One that is paused may be on its way there, and from elsewhere. What lies on the source of files that it has, while
    no mark tells that they came from there, may be anybody's.
    """
    if domain.find_or_none(ends.source.conn, there.uuid) is not None:
        return _Seen(Before.NOTHING)
    files = migrate_files.files(ends.target, there)
    marked = _marked(ends, files)
    if there.state is State.PAUSED and (marked or there.why != "asked"):
        return _Seen(Before.NOTHING)
    if marked or record.moving(there.xml):
        return _Seen(Before.BEGUN)
    return _Seen(Before.NOTHING) if _left(ends, there, files) else _Seen(Before.DONE, there)


def _left(ends: Ends, there: Domain, files: tuple[migrate_files.File, ...]) -> bool:
    """Whether files of a VM that is on the target lie on the source too, where nobody else's are."""
    own = {one.volume for one in there.facts.record.owned} if there.facts.record else set()
    files = (*migrate_files.left_below(ends.source, there, files), *files)
    mine = [one for one in files if one.leaf in own or one.role in {Role.DISK, Role.NVRAM, Role.LOG}]
    lying = migrate_storage.lying(ends.source, mine)
    if not lying:
        return False
    both = folder_pools.shared_folders(ends.source, ends.target, {one.folder for one in mine if one.path in lying})
    needed = image_users.needed(ends.source)
    return any(one.path in lying and one.folder not in both and not needed.by(one.path, but=lying) for one in mine)


def _of_both(ends: Ends, vm: Domain, there: Domain | None, wish: Wish) -> _Seen:
    """The source has it, and the target too, or a migration has paused it on the source."""
    marked = bool(_marked(ends, migrate_files.files(ends.source, vm)))
    begun = _Seen(Before.BEGUN)
    if vm.state is State.PAUSED and vm.why in MOVING:
        return begun if there is not None or marked else _Seen(Before.NOTHING)
    assert there is not None  # _look() has seen to it
    if vm.active and there.active:
        return begun if _leaves(ends, vm) else _Seen(Before.NOTHING)
    if noted := homes.others(ends.source, vm):  # it stays on purpose
        kept = wish.keep and any(one.uuid == homes.known_by(ends.target) for one in noted)
        if not kept or vm.active or vm.state is State.SAVED or not there.active:
            return _Seen(Before.NOTHING)
        return begun if marked or record.moving(there.xml) else _Seen(Before.DONE, there, kept=True)
    went = there.active and not vm.active and identity.went(ends.source, vm)
    return begun if marked or went else _Seen(Before.NOTHING)


def _leaves(ends: Ends, vm: Domain) -> bool:
    try:
        return migration.leaving(ends.source.conn, vm.uuid)
    except VmctlError:
        return False  # it has come to its end since


def _marked(ends: Ends, files: tuple[migrate_files.File, ...]) -> frozenset[str]:
    """Files that bear a mark on the target; not those in a folder that both see, where it tells nothing of the two."""
    found = migrate_storage.marked(ends.target, files)
    return found - migrate_storage.marked(ends.source, files) if found else found
