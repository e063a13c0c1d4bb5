"""Moving a VM to another host: looked at first, watched on the way, and at its end asked of both where it is."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from vmctl import host_ssh, migrate_facts, migrate_storage, migrate_watch
from vmctl.choices import Accel
from vmctl.errors import Interrupted, MigrationFailed, PreflightFailed, SpecError, VmctlError, WrongState, quietly
from vmctl.events import Reporter, Step, Warned
from vmctl.guest import address, known_hosts
from vmctl.hosts import Host, holding
from vmctl.hypervisor import domain, migration
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.migration import Copying, Orders, Way
from vmctl.migrate_ends import Ends
from vmctl.migrate_facts import Found
from vmctl.migrate_files import File
from vmctl.migrate_outcome import CUT_OFF, Seen, Where, judge
from vmctl.migrate_policy import Policy
from vmctl.migrate_problems import Problem, fatal, problems
from vmctl.migrate_watch import Run
from vmctl.outage import Probe
from vmctl.wait import pause

_SETTLE_S, _STILL_S = 40.0, 4.0
_LOOK_S = 0.5


class Mode(StrEnum):
    """How a VM went: while it ran, held still while its memory was sent, or stopped as it was."""

    LIVE = "live"
    HELD = "held"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Wish:
    """How to migrate. ``live``: send it while it runs; None: where that is safe.

    ``persistent``: the target keeps a definition, None: as it was; ``keep``: the source does.
    """

    way: Way = Way.PEER
    live: bool | None = None
    copying: Copying = Copying.NONE
    policy: Policy = Policy()
    persistent: bool | None = None
    keep: bool = False
    auto_converge: bool = True
    compress: bool = False
    parallel: int = 0
    tls: bool = False
    bandwidth: int = 0


@dataclass(frozen=True, slots=True)
class Moved:
    """A migration that is done. ``outage_ms``: for how long the guest did not answer, seen from here, or None."""

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
    return problems(_look(ends, name, wish).facts)


def _look(ends: Ends, name: str, wish: Wish) -> Found:
    return migrate_facts.gather(
        ends.source,
        ends.target,
        name,
        ends.asking(),
        way=wish.way,
        copying=wish.copying,
        postcopy=wish.policy.postcopy,
    )


def _wish_problems(wish: Wish) -> list[str]:
    found = []
    if wish.way is Way.TUNNELLED and wish.parallel:
        found.append("a tunnelled migration has one connection: no --parallel")
    if wish.way is Way.TUNNELLED and wish.copying is not Copying.NONE:
        found.append("a tunnelled migration copies no storage")
    if wish.way is Way.TUNNELLED and (wish.tls or wish.policy.postcopy):
        found.append("a tunnelled migration goes by libvirt's own connection: no --tls, no --postcopy")
    if wish.compress and wish.parallel:
        found.append("--compress goes with one connection only: no --parallel")
    if wish.policy.postcopy and wish.compress:
        found.append("--postcopy goes with no --compress")
    if wish.policy.postcopy and wish.live is False:
        found.append("--postcopy goes with no --held")
    if wish.policy.downtime_ms > wish.policy.max_downtime_ms:
        found.append("--downtime is above --max-downtime")
    return found


def migrate(ends: Ends, name: str, wish: Wish, report: Reporter) -> Moved:
    """Move a VM, live when it runs.

    Raises PreflightFailed before anything is changed; MigrationFailed and Interrupted, which say where the VM is then.
    """
    if found := _wish_problems(wish):
        raise SpecError(f"cannot migrate VM {name}", problems=found)
    source, target = ends.source, ends.target
    with ExitStack() as locks:
        for host in {one.lock_scope: one for one in (source, target)}.values():
            locks.enter_context(holding(host, name))
        looked = _look(ends, name, wish)
        everything = problems(looked.facts)
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
        return _live(ends, looked, wish, report) if looked.vm.active else _offline(ends, looked, wish, report)


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


def _offline(ends: Ends, looked: Found, wish: Wish, report: Reporter) -> Moved:
    """Files, then the definition there, then none here: whatever ends this early, some host has it defined."""
    vm, began = looked.vm, time.monotonic()
    text = domain.xml(ends.source.conn, vm.name, inactive=True, secure=True)
    with migrate_storage.made(ends, looked.look.makes, report) as undo:
        domain.define(ends.target.conn, text, name=vm.name)
        undo.callback(lambda: quietly(lambda: domain.undefine(ends.target.conn, vm.name, keep_nvram=True)))
        domain.set_autostart(ends.target.conn, vm.name, on=vm.autostart)
        if not wish.keep:
            domain.undefine(ends.source.conn, vm.name, keep_nvram=_shares_nvram(looked))
        undo.pop_all()
    migrate_storage.unmark(ends.target, looked.look.makes)
    _clear_source(ends, looked, wish, report)
    here, there = ends.names
    return Moved(vm.name, vm.uuid, here, there, Mode.STOPPED, time.monotonic() - began, copied=_paths(looked))


def _shares_nvram(looked: Found) -> bool:
    """Whether the UEFI variables here are those there: they must not go with the definition."""
    return any(need.shared and need.path == looked.vm.facts.nvram for need in looked.facts.needs)


def _paths(looked: Found) -> tuple[str, ...]:
    return tuple(one.file.path for one in looked.look.makes)


def _clear_source(ends: Ends, looked: Found, wish: Wish, report: Reporter) -> None:
    """What was the VM's own here and lies on no shared storage goes, and so does what we know of its old place."""
    if wish.keep:
        return
    left = [*(need.path for need in looked.facts.needs if not need.shared), *looked.look.obsolete]
    try:
        if left:
            migrate_storage.clear_source(ends.source, looked.vm, looked.files, left, report)
        known_hosts(ends.source, looked.vm.name).unlink(missing_ok=True)
    except VmctlError as error:
        name = looked.vm.name
        report(Warned(f"{ends.names[0]} still has files of {name}: {error.message}", f"vmctl migrate {name} --recover"))


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


def _probe(host: Host, looked: Found) -> AbstractContextManager[Probe | None]:
    """Someone who knocks at the guest, where it is known where that is."""
    try:
        where = address(host, looked.vm)
    except VmctlError:
        where = None
    return nullcontext(None) if where is None or where.forwarded else Probe(where.host)


def _live(ends: Ends, looked: Found, wish: Wish, report: Reporter) -> Moved:
    vm, (here, there) = looked.vm, ends.names
    mode = Mode.LIVE if _sends_live(vm, wish) else Mode.HELD
    with migrate_storage.made(ends, looked.look.makes, report) as undo:
        for file in looked.look.leavings:
            undo.callback(quietly, partial(_take_away, ends, file))
        report(Step(f"{vm.name}: {here} -> {there}, {mode}, {wish.way}"))
        with _probe(ends.source, looked) as probe:
            answering = probe is not None and probe.answers()
            ends.asking().back()  # it has no say in this, and is told of at the end
            began = time.monotonic()
            run = migrate_watch.run(ends, vm.name, orders(ends, vm, wish, looked.look.disks), wish.policy, report)
            took = time.monotonic() - began
            where, seen = settle(ends, vm.uuid)
            if probe is not None and answering and where is Where.MOVED:
                pause(0.2)  # for the first answer from there
        if where is not Where.MOVED:
            if where not in {Where.STAYED, Where.HALF}:
                undo.pop_all()  # the VM may need those files there
            elif where is Where.HALF:
                quietly(lambda: domain.resume(ends.source.conn, vm.name))
                where, seen = settle(ends, vm.uuid)
        else:
            undo.pop_all()
    if where is not Where.MOVED:
        raise _failed(ends, vm.name, run, where, seen)
    end_on_target(ends, looked, wish, report)
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
        time_s=took,
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


def settle(ends: Ends, uuid: str) -> tuple[Where, tuple[Seen, Seen]]:
    """Where it is, from both hosts, once they have come to an end with it, as far as they do in time."""
    began = changed = time.monotonic()
    before: tuple[Seen, Seen] | None = None
    while True:
        seen, now = ends.seen(uuid), time.monotonic()
        where = judge(*seen)
        if seen != before:
            before, changed = seen, now
        ended = where in {Where.MOVED, Where.STAYED} and not (seen[0].there and seen[1].there)
        ended = ended or where is Where.LOST or (where is Where.POSTCOPY and CUT_OFF in {seen[0].why, seen[1].why})
        if ended or now - began >= _SETTLE_S:
            return where, seen
        # A libvirtd that died leaves its VM paused, for it cannot know; nobody else is going to settle that.
        if where in {Where.MOVED, Where.HALF} and now - changed >= _STILL_S and not _busy(ends, uuid):
            return where, seen
        pause(_LOOK_S)


def _busy(ends: Ends, uuid: str) -> bool:
    """Whether the source still works at it, or does not say."""
    try:
        return migration.busy(ends.source.conn, uuid)
    except VmctlError:
        return True


def _failed(ends: Ends, name: str, run: Run, where: Where, seen: tuple[Seen, Seen]) -> MigrationFailed | Interrupted:
    """The error for a VM that did not move, which says where it is."""
    here, there = ends.names
    states = f"on {here} it is {seen[0].told}, on {there} {seen[1].told}"
    again = f"vmctl migrate {name} --to {there} --recover"
    why = run.failure or "libvirt gave no reason"
    if where in {Where.STAYED, Where.HALF}:
        text = (
            f"{name} runs on {here} as before"
            if where is Where.HALF or seen[0].runs
            else f"{name} is on {here} as before"
        )
        if not seen[1].known:
            return MigrationFailed(
                f"cannot migrate VM {name}: {why}; {text}, {there} cannot be asked",
                hint=f"{again} clears up there, later",
            )
        if run.interrupted:
            return Interrupted(f"cannot migrate VM {name}: {run.interrupted}; {text}")
        return MigrationFailed(f"cannot migrate VM {name}: {why}; {text}")
    hints = {
        Where.POSTCOPY: f"{again} goes on with it, once both reach each other; neither host must be restarted before",
        Where.TWICE: "stop one of them at once: two guests on one disk destroy it",
        Where.LOST: f"its memory is gone, its disks are not: vmctl stop {name} --force where it still is, and start it "
        "where it is defined",
    }
    hint = hints.get(where, f"{again}, once both answer")
    if where is Where.UNKNOWN and not seen[0].known and not seen[1].there:
        hint += f"; if {here} has lost power, its memory is gone with that"
    return MigrationFailed(f"cannot migrate VM {name}: {why}; it is {where}: {states}", hint=hint)


def end_on_target(ends: Ends, looked: Found, wish: Wish, report: Reporter) -> None:
    """It runs there: what is left of it here goes, but for what was asked to stay."""
    vm = looked.vm
    migrate_storage.unmark(ends.target, looked.look.makes)
    if vm.autostart:
        quietly(lambda: domain.set_autostart(ends.target.conn, vm.name, on=True))
    try:
        left = domain.find_or_none(ends.source.conn, vm.uuid)
        if left is not None and left.active:  # it ended between two steps of libvirt's; the target has the VM
            quietly(lambda: domain.power_off(ends.source.conn, vm.name))  # which may have just come to its end
            left = domain.find_or_none(ends.source.conn, vm.uuid)
        if left is not None and not wish.keep:
            domain.undefine(ends.source.conn, vm.name, keep_nvram=_shares_nvram(looked))
    except VmctlError as error:
        text = f"{ends.names[0]} still has a definition of {vm.name}: {error.message}"
        report(Warned(text, f"vmctl migrate {vm.name} --to {ends.names[1]} --recover"))
        return
    _clear_source(ends, looked, wish, report)
