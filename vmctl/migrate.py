"""Moving a VM to another host: looked at first, watched on the way, and at its end asked of both where it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from vmctl import (
    elsewhere,
    homes,
    host_ssh,
    identity,
    layer_check,
    migrate_cards,
    migrate_facts,
    migrate_settle,
    migrate_storage,
    migrate_watch,
    migrate_wish,
    networks,
)
from vmctl.at_once import beside
from vmctl.choices import Accel
from vmctl.errors import Interrupted, MigrationFailed, PreflightFailed, VmctlError, WrongState, quietly
from vmctl.events import Reporter, Step, Warned
from vmctl.guest import address, known_hosts
from vmctl.hosts import Host, holding
from vmctl.hypervisor import domain, migration
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.migration import Copying, Orders
from vmctl.hypervisor.states import MOVING, State, recovery
from vmctl.migrate_ends import Ends
from vmctl.migrate_facts import Found
from vmctl.migrate_files import File, nvram
from vmctl.migrate_outcome import Where
from vmctl.migrate_problems import Problem, fatal, problems
from vmctl.migrate_wish import Wish
from vmctl.outage import Probe


class Mode(StrEnum):
    """How a VM went: while it ran, held still while its memory was sent, or stopped as it was; or it was there."""

    LIVE = "live"
    HELD = "held"
    STOPPED = "stopped"
    ALREADY = "already"


@dataclass(frozen=True, slots=True)
class Moved:
    """A migration that is done. ``time_s``: all of it, from the look at both hosts to the clearing up.

    ``outage_ms``: for how long the guest did not answer, seen from here, or None.
    """

    vm: str
    uuid: str
    source: str
    target: str
    mode: Mode
    time_s: float
    downtime_ms: int | None = None
    outage_ms: int | None = None
    data: int = 0
    passes: int = 0
    postcopy: bool = False
    copied: tuple[str, ...] = ()


def check(ends: Ends, name: str, wish: Wish) -> tuple[Problem, ...]:
    """All that stands against it, and notes. Changes nothing."""
    ends.asking().back()
    looked = _look(ends, name, wish)
    return _problems(looked, wish)


def _problems(looked: Found, wish: Wish) -> tuple[Problem, ...]:
    found = problems(looked.facts)
    return found if looked.vm.active else (*migrate_wish.of_stopped(looked.vm.name, wish), *found)


def _look(ends: Ends, name: str, wish: Wish, *, held: bool = False) -> Found:
    return migrate_facts.gather(
        ends.source,
        ends.target,
        name,
        ends.asking(),
        way=wish.way,
        copying=wish.copying,
        postcopy=wish.policy.postcopy,
        tls=wish.tls,
        held=held,
    )


@contextmanager
def staying(name: str, vm: Domain | None, here: str) -> Iterator[None]:
    """A block in which a VM is where it was, and that takes back what it made: Interrupted says so.

    What came with a word on where the VM is goes through as it is.
    """
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as early:
        cannot = f"cannot migrate VM {name}: "
        if f"{early}".startswith(cannot):
            raise
        how = "" if vm is None else "runs" if vm.state is State.RUNNING else f"is {vm.state}"
        where = f"{name} {how} on {here} as before" if how else "nothing was begun"
        raise Interrupted(f"{cannot}{f'{early}' or 'interrupted'}; {where}") from early


def _begun(name: str, vm: Domain | None, here: str) -> ExitStack:
    """That block, as a stack that is emptied once it may be elsewhere."""
    with ExitStack() as stack:
        stack.enter_context(staying(name, vm, here))
        return stack.pop_all()


def migrate(ends: Ends, name: str, wish: Wish, report: Reporter) -> Moved:
    """Move a VM, live when it runs.

    Raises PreflightFailed before anything is changed; MigrationFailed and Interrupted, which say where the VM is then.
    """
    began = time.monotonic()
    source, target = ends.source, ends.target
    with ExitStack() as locks:
        for host in {one.lock_scope: one for one in (source, target)}.values():
            locks.enter_context(holding(host, name))
        vm = domain.find_or_none(source.conn, name)
        begin = locks.enter_context(_begun(name, vm, ends.names[0]))
        if vm is not None:
            layer_check.follow(source, vm)  # the definition goes along
        at = locks.enter_context(beside(partial(_address, source, vm)))  # it takes as long as the look
        looked = _look(ends, name, wish, held=True)
        everything = _problems(looked, wish)
        if worst := fatal(everything):
            raise PreflightFailed(
                f"cannot migrate VM {name} from {source.name} to {target.name}: nothing was changed",
                problems=[(one.what, one.mend) for one in worst],
            )
        for one in everything:
            report(Warned(one.what, one.mend))
        if looked.vm.active and emulated(looked.vm):
            what, otherwise = _EMULATED[_sends_live(looked.vm, wish)]
            report(Warned(what.format(name), otherwise))
        if wish.policy.postcopy and looked.vm.active:
            text = (
                f"--postcopy: if a host, its libvirt or the way between is lost in its second half, "
                f"{name} is lost with what it did"
            )
            report(Warned(text))
        if target.settings.network in looked.facts.vm.nics and not target.conn.session:
            networks.ensure(target, report)
        identity.note_moving(source, looked.vm.uuid)
        migrate_storage.mark_shared(source, target, looked.vm, looked.facts.needs)
        knock = at()
        begin.pop_all()  # both say themselves where it is
        if looked.vm.active:
            return _live(ends, looked, wish, knock, report, began)
        return _offline(ends, looked, wish, report, began)


def adjust(source: Host, name: str, *, bandwidth: int, downtime_ms: int | None) -> None:
    """Give a migration under way other limits. Raises WrongState where there is none."""
    if not migration.busy(source.conn, name):
        raise WrongState(f"cannot adjust the migration of VM {name}: none is under way")
    if bandwidth:
        migration.set_bandwidth(source.conn, name, bandwidth)
    if downtime_ms is not None:
        migration.set_downtime(source.conn, name, downtime_ms)


# Measured with QEMU 7.2: of eight live migrations of a busy emulated guest, by virsh, one left it with a kernel whose
# lists were broken. A page is marked as changed before it is written to, and the mark may be taken in between.
_EMULATED = {
    False: (
        "{} runs emulated: it is held while its memory is sent, for QEMU loses writes otherwise",
        "--live sends it while it runs",
    ),
    True: (
        "{} runs emulated: QEMU may lose writes of its while it is sent live",
        "without --live it is held meanwhile",
    ),
}


def emulated(vm: Domain) -> bool:
    """Whether TCG runs it."""
    return vm.facts.accel is Accel.TCG


def _sends_live(vm: Domain, wish: Wish) -> bool:
    if wish.live is None:
        return wish.policy.postcopy or not emulated(vm)
    return wish.live


# --- stopped -------------------------------------------------------------------------------------------------


def _offline(ends: Ends, looked: Found, wish: Wish, report: Reporter, began: float) -> Moved:
    """Files, then the definition there, then none here: whatever ends this early, some host has it defined."""
    vm = looked.vm
    making = migrate_storage.made(ends, looked.look.makes, report, bandwidth=wish.bandwidth)
    with _begun(vm.name, vm, ends.names[0]) as stays, making as undo:
        _note_both(ends, vm, wish, undo)
        text = domain.xml(ends.source.conn, vm.name, inactive=True, secure=True)
        domain.define(ends.target.conn, text, name=vm.name)
        undo.callback(lambda: quietly(lambda: domain.undefine(ends.target.conn, vm.name, keep_nvram=True)))
        domain.set_autostart(ends.target.conn, vm.name, on=vm.autostart)
        stays.pop_all()
        whole = undo.pop_all()  # what is there goes again only as long as the VM is here
    try:
        if not wish.keep:
            domain.undefine(ends.source.conn, vm.name, keep_nvram=_shares_nvram(looked))
        elif vm.autostart:
            _let_lie(ends, vm.name, report)
    except (VmctlError, KeyboardInterrupt, Interrupted):
        if domain.find_or_none(ends.source.conn, vm.uuid) is not None:
            whole.close()
            with staying(vm.name, vm, ends.names[0]):
                raise
        raise
    _clear_source(ends, looked, wish, report)
    _note_move(ends, vm, wish, report)
    migrate_storage.unmark(ends.target, looked.look.makes)
    here, there = ends.names
    return Moved(vm.name, vm.uuid, here, there, Mode.STOPPED, time.monotonic() - began, copied=_paths(looked))


def _note_both(ends: Ends, vm: Domain, wish: Wish, undo: ExitStack) -> None:
    """Note, before the definition goes along, that both hosts have it then: each asks the other before it starts it."""
    if wish.keep and vm.persistent:
        before = homes.note(ends.source, vm, ends.target)
        undo.callback(quietly, lambda: homes.write(ends.source, vm, before))


def _note_move(ends: Ends, vm: Domain, wish: Wish, report: Reporter) -> None:
    """Where it is by now, for its own note, and those of definitions that were kept on third hosts before."""

    def write() -> None:
        gone = [] if wish.keep else [homes.known_by(ends.source)]
        known = homes.learn(ends.target, domain.find(ends.target.conn, vm.uuid), gone)
        two = {homes.known_by(one) for one in (ends.source, ends.target)}
        third = [one for one in known if one.uuid not in two]
        if third:
            elsewhere.tell(ends.target, vm, third, known, gone, report)

    quietly(write)


def _let_lie(ends: Ends, name: str, report: Reporter) -> None:
    """What stays of it here does not start by itself at the next boot, beside the one on the target."""
    domain.set_autostart(ends.source.conn, name, on=False)
    report(Step(f"{name} does not start by itself any more on {ends.names[0]}"))


def _shares_nvram(looked: Found) -> bool:
    """Whether the UEFI variables here are those there: they must not go with the definition."""
    return any(need.shared and need.path == nvram(looked.vm) for need in looked.facts.needs)


def _paths(looked: Found) -> tuple[str, ...]:
    return tuple(one.file.path for one in looked.look.makes)


def _clear_source(ends: Ends, looked: Found, wish: Wish, report: Reporter) -> None:
    """What was the VM's own here and lies on no shared storage goes, and so does what we know of its old place."""
    if wish.keep:
        return
    left = [*(need.path for need in looked.facts.needs if not need.shared), *looked.look.obsolete]
    try:
        if left:
            migrate_storage.clear_source(ends, looked.vm, looked.files, left, report)
            migrate_storage.unmark_shared(ends.source, looked.vm, looked.facts.needs)
        known_hosts(ends.source, looked.vm.name).unlink(missing_ok=True)
    except VmctlError as error:
        name, again = looked.vm.name, recovery(looked.vm.name, *ends.names)
        report(Warned(f"{ends.names[0]} still has files of {name}: {error.message}", again))


# --- running -------------------------------------------------------------------------------------------------


def orders(ends: Ends, vm: Domain, wish: Wish, disks: tuple[str, ...] = ()) -> Orders:
    """What libvirt is told, for a running VM."""
    entry = ends.target.entry
    return Orders(
        way=wish.way,
        peer=host_ssh.elsewhere(entry) if entry else "",
        data_address=host_ssh.address(entry) if entry else "",
        live=_sends_live(vm, wish),
        persist=vm.persistent if wish.persistent is None else wish.persistent,
        undefine=vm.persistent and not wish.keep,
        # Every file that is not copied is proved to be the same one: libvirt knows that of network file systems only.
        unsafe=True,
        copying=wish.copying if disks else Copying.NONE,
        disks=disks,
        auto_converge=wish.auto_converge,
        postcopy=wish.policy.postcopy,
        compress=wish.compress,
        parallel=wish.parallel,
        tls=wish.tls,
        bandwidth=wish.bandwidth,
    )


def _address(host: Host, vm: Domain | None) -> str:
    """Where to knock at the guest, or "" where that is not known."""
    try:
        where = None if vm is None or not vm.active else address(host, vm)
    except VmctlError:
        where = None
    return "" if where is None or where.forwarded else where.host


def _probe(at: str) -> AbstractContextManager[Probe | None]:
    return Probe(at) if at else nullcontext(None)


def _live(ends: Ends, looked: Found, wish: Wish, at: str, report: Reporter, began: float) -> Moved:
    """``at``: the guest's address, or ""."""
    vm, (here, there) = looked.vm, ends.names
    mode = Mode.LIVE if _sends_live(vm, wish) else Mode.HELD
    making = migrate_storage.made(ends, looked.look.makes, report, bandwidth=wish.bandwidth)
    with _begun(vm.name, vm, ends.names[0]) as stays, making as undo:
        for file in looked.look.leavings:
            undo.callback(quietly, partial(_take_away, ends, file))
        _note_both(ends, vm, wish, undo)
        report(Step(f"{vm.name}: {here} -> {there}, {mode}, {wish.way}"))
        with _probe(at) as probe:
            answering = probe is not None and probe.answers()
            ends.asking().back()  # it has no say in this, and is told of at the end
            ordered = orders(ends, vm, wish, looked.look.disks)
            undo.callback(migrate_cards.forget, ends.source, vm.name)
            migrate_cards.note(ends.source, vm)
            stays.pop_all()
            made = undo.pop_all()  # from here on it goes only once it is known that the VM does not need it there
            run = migrate_watch.run(ends, vm.name, ordered, wish.policy, report)
            run.keep = wish.keep
            where, seen = migrate_settle.settled(ends, vm, run, report)
            if probe is not None and answering and where is Where.MOVED:
                migrate_settle.hear(probe, run)
    stayed = where in {Where.STAYED, Where.HALF}
    if where is Where.HALF:
        quietly(lambda: domain.resume(ends.source.conn, vm.name))
    if stayed and seen[1].known and not seen[1].there:  # else its marks stay, for --recover
        made.close()
    if where is Where.HALF:
        where, seen = migrate_settle.settled(ends, vm, run, report)
    if where is not Where.MOVED:
        if where is Where.STAYED:
            migrate_cards.forget(ends.source, vm.name)
        raise migrate_settle.failed(ends, vm.name, run, where, seen)
    try:
        migrate_cards.plug_anew(ends, vm.name, report)
        end_on_target(ends, looked, wish, report)
    except (KeyboardInterrupt, Interrupted) as early:
        text = f"{f'{early}' or 'interrupted'}; it runs on {there}, and {here} may still have files of it"
        again = recovery(vm.name, here, there, keep=wish.keep)
        raise Interrupted(f"cannot migrate VM {vm.name}: {text}", hint=again) from early
    for late in migrate_facts.notes_of(ends.asking().answer(wish.way), looked.facts):
        report(Warned(late.what, late.mend))
    if run.interrupted and not run.postcopy:
        report(Warned(f"{vm.name} had moved before it could be stopped"))
    totals = _totals(ends, vm.name)
    return Moved(
        vm=vm.name,
        uuid=vm.uuid,
        source=here,
        target=there,
        mode=mode,
        time_s=time.monotonic() - began,
        downtime_ms=totals.downtime_ms if totals else None,
        outage_ms=probe.longest_ms() if probe is not None and answering else None,
        data=totals.data if totals else 0,
        passes=totals.passes if totals else 0,
        postcopy=run.postcopy,
        copied=_paths(looked),
    )


def _totals(ends: Ends, name: str) -> migration.Totals | None:
    try:
        return migration.totals(ends.target.conn, name)
    except VmctlError:
        return None  # it has moved, and has ended there since, or the host has


def _take_away(ends: Ends, file: File) -> None:
    migrate_storage.remove(ends.target, file)


def _require_rest(ends: Ends, left: Domain) -> None:
    """Raise MigrationFailed unless what runs of a VM on the source is what its migration left there, paused."""
    if left.state is State.PAUSED and left.why in MOVING:
        return
    here, there = ends.names
    how = f"{left.state} ({left.why})" if left.why else f"{left.state}"
    raise MigrationFailed(
        f"cannot end VM {left.name} on {here}, as one that has moved to {there}: it is {how}, as no move leaves it",
        hint=f"look at both; vmctl -c {here} stop {left.name} --force ends it there, with what it has in memory",
    )


def end_on_target(ends: Ends, looked: Found, wish: Wish, report: Reporter) -> None:
    """It runs there: what is left of it here goes, but for what was asked to stay.

    Its files there are unmarked last, for a drain that is made again finds by their marks what a kill left here. With a
    definition here they are at once: from both that are off, a recovery would take the marked ones for half made.

    Raises MigrationFailed, and has ended nothing, where it runs here too by now, or is paused as no move leaves it.
    """
    vm = looked.vm
    if vm.autostart:
        quietly(lambda: domain.set_autostart(ends.target.conn, vm.name, on=True))
    try:
        left = domain.find_or_none(ends.source.conn, vm.uuid)
        if left is not None and left.active:  # it ended between two steps of libvirt's; the target has the VM
            _require_rest(ends, left)
            quietly(lambda: domain.power_off(ends.source.conn, vm.name))  # which may have just come to its end
            left = domain.find_or_none(ends.source.conn, vm.uuid)
        if left is not None and not wish.keep:
            domain.undefine(ends.source.conn, vm.name, keep_nvram=_shares_nvram(looked))
        elif left is not None and left.autostart:
            _let_lie(ends, vm.name, report)
    except MigrationFailed:
        raise
    except VmctlError as error:
        text = f"{ends.names[0]} still has a definition of {vm.name}: {error.message}"
        report(Warned(text, recovery(vm.name, *ends.names, keep=wish.keep)))
    else:
        _clear_source(ends, looked, wish, report)
        _note_move(ends, vm, wish, report)
    migrate_storage.unmark(ends.target, looked.look.makes)
