"""vmctl host drain, balance, consolidate: a plan of moves shown, and carried out."""

from __future__ import annotations

import fnmatch
from functools import partial
from typing import TYPE_CHECKING, Annotated, NamedTuple, Optional

import typer

from vmctl import ui
from vmctl.census import By, Limits
from vmctl.choices import StorageCopy
from vmctl.cli import host_moves
from vmctl.cli.many import each
from vmctl.cli.options import (
    DryRunOption,
    HostName,
    HostNames,
    OutputOption,
    YesOption,
    complete_host,
    fleet_of_config,
    note,
    refuse_unless_yes,
    reporter,
    tell_of_hosts,
    tell_where,
)
from vmctl.errors import NotFound, PartialFailure, PreflightFailed, VmctlError
from vmctl.ui import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from vmctl.census import Census
    from vmctl.config import HostEntry
    from vmctl.fleet import Fleet
    from vmctl.migrate import Moved
    from vmctl.migrate_wish import Wish
    from vmctl.rebalance import Plan

Avoid = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--avoid", metavar="HOST", help="Move nothing there. Repeatable.", autocompletion=complete_host),
]
ByOption = Annotated[
    Optional[list[By]],  # noqa: UP045
    typer.Option("--by", help="What counts as use; default: all, by what there is most of. Repeatable."),
]
Most = Annotated[int, typer.Option("--most", metavar="N", min=1, help="At most N moves.")]
AtOnce = Annotated[int, typer.Option("--at-once", metavar="N", min=1, max=16, help="At most N moves at a time.")]
CheckOption = Annotated[
    bool, typer.Option("--check", help="Only look whether each move could be made; exit 11 if not.")
]
CopyStorage = Annotated[
    Optional[StorageCopy],  # noqa: UP045
    typer.Option("--copy-storage", help="Take disks along that the target does not see: whole, or above their base."),
]
Direct = Annotated[
    bool, typer.Option("--direct", help="vmctl speaks with both hosts, which need not reach each other's libvirt.")
]
_LOOK_S = 20.0
HostTimeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Longest wait for what each host has.")
]


class _How(NamedTuple):
    """What is done with a plan."""

    copy_storage: StorageCopy | None
    direct: bool
    at_once: int
    check: bool
    dry_run: bool
    yes: bool

    def wish(self) -> Wish:
        """How each move is made."""
        from vmctl.hypervisor.migration import Copying, Way
        from vmctl.migrate_wish import Wish

        copying = Copying(self.copy_storage.value) if self.copy_storage else Copying.NONE
        return Wish(way=Way.DIRECT if self.direct else Way.PEER, copying=copying)


def drain(
    name: HostName,
    avoid: Avoid = None,
    at_once: AtOnce = 2,
    copy_storage: CopyStorage = None,
    direct: Direct = False,
    check: CheckOption = False,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    timeout: HostTimeout = _LOOK_S,
    output: OutputOption = Output.TABLE,
) -> None:
    """Move all VMs off a host: running ones live, to where there is room for them, those of high priority first.

    VMs that cannot leave are told with what keeps them, and the exit code is 14. Run again, it goes on with what is
    left.
    """
    from vmctl import rebalance
    from vmctl.fleet import called

    asked = fleet_of_config()
    asked.entries([name])
    others = [called(one) for one in asked.entries() if called(one) != name]
    how = _How(copy_storage, direct, at_once, check, dry_run, yes)
    if not (dry_run or check):
        from vmctl import migrate_left
        from vmctl.hypervisor.events import start_loop

        start_loop()
        migrate_left.settle(asked, name, others, how.wish(), reporter(), timeout)
    names = (name, *others)
    _planned(asked, names, avoid, timeout, lambda census: rebalance.drain(census, name), how, output, emptied=(name,))


def balance(
    names: HostNames = None,
    most: Most = 20,
    within: Annotated[
        int, typer.Option("--within", metavar="PERCENT", min=1, max=99, help="Hosts that close together are balanced.")
    ] = 10,
    by: ByOption = None,
    avoid: Avoid = None,
    at_once: AtOnce = 2,
    copy_storage: CopyStorage = None,
    direct: Direct = False,
    check: CheckOption = False,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    timeout: HostTimeout = _LOOK_S,
    output: OutputOption = Output.TABLE,
) -> None:
    """Even out how much of hosts, all or those named, is in use: memory, vCPUs, busy processors, whichever is scarcest.

    VMs that share a label anti-affinity=GROUP are parted first, and hosts relieved that gave away more than they have.
    A VM with label pinned stays where it is; one of a higher priority=NUMBER moves last.
    """
    from vmctl import rebalance

    def plan(census: Census) -> Plan:
        return rebalance.balance(census, Limits(even=within / 100, by=frozenset(by or By)), most=most)

    how = _How(copy_storage, direct, at_once, check, dry_run, yes)
    _planned(fleet_of_config(), names or (), avoid, timeout, plan, how, output)


def consolidate(
    names: HostNames = None,
    most: Most = 20,
    fill: Annotated[
        int, typer.Option("--fill", metavar="PERCENT", min=1, max=100, help="Fill no host beyond that.")
    ] = 80,
    by: ByOption = None,
    avoid: Avoid = None,
    at_once: AtOnce = 2,
    copy_storage: CopyStorage = None,
    direct: Direct = False,
    check: CheckOption = False,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    timeout: HostTimeout = _LOOK_S,
    output: OutputOption = Output.TABLE,
) -> None:
    """Empty hosts, the least used first and each wholly or not at all, by filling up others."""
    from vmctl import rebalance

    def plan(census: Census) -> Plan:
        return rebalance.consolidate(census, Limits(packed=fill / 100, by=frozenset(by or By)), most=most)

    how = _How(copy_storage, direct, at_once, check, dry_run, yes)
    _planned(fleet_of_config(), names or (), avoid, timeout, plan, how, output)


def send(connect: str | None, names: Sequence[str], wish: Wish, *, check: bool, output: Output) -> None:
    """Move VMs to the best hosts there are for them, or only look whether that could be.

    Raises PreflightFailed for all that have none, before anything is changed.
    """
    from vmctl import config, plans_of_others, rebalance
    from vmctl.fleet import called
    from vmctl.hypervisor.events import start_loop

    start_loop()
    asked = fleet_of_config()
    source = config.chosen_entry(connect, asked.settings)
    wanted, moved = _there(asked, source, names)
    done = _again(asked, source, moved, wish, check=check, output=output)
    if not wanted:
        if output is not Output.TABLE and not check:
            ui.emit(done, output, str, lambda: [one.vm for one in done])
        return
    others = [called(one) for one in asked.entries() if one != source]

    def begin(plan: Plan, moved: int) -> None:
        if plan.left:
            problems = [(f"{one.vm}: {one.why}", "") for one in plan.left]
            text = f"cannot place {len(plan.left)} of {len(wanted)} VMs"
            raise PreflightFailed(text + ("" if moved else ": nothing was changed"), problems=problems)

    def plan(census: Census) -> Plan:
        return rebalance.drain(census, called(source), only=wanted)

    look = partial(_look, asked, [called(source), *others], (), _LOOK_S, set())
    if check:
        found = plan(plans_of_others.counted(look(), plans_of_others.others(asked.folders.runtime)))
        begin(found, 0)
        ui.emit(found, output, lambda: _table(found), lambda: [move.vm for move in found.moves])
        _check(asked, found, wish)
    else:
        host_moves.carry_out(asked, look, plan, begin, wish, 1, output)


def _there(asked: Fleet, source: HostEntry, names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The VMs that are meant; and by their names where those are that the source has not: a run before moved them.

    Raises NotFound where nobody has one; HostUnreachable in bounded time.
    """
    from vmctl import fleet
    from vmctl.hypervisor import domain
    from vmctl.listing import matching

    def ask(entry: HostEntry) -> dict[str, str | NotFound]:
        found: dict[str, str | NotFound] = {}
        with asked.open(entry) as host:
            for name in names:
                try:
                    these = matching(host, [name])
                except NotFound as error:
                    found[name] = error
                    continue
                for one in these:
                    try:
                        found[one] = domain.find(host.conn, one).name
                    except NotFound as error:
                        found[one] = error
        return found

    ((_, told),) = fleet.each([source], ask, _LOOK_S)
    if isinstance(told, VmctlError):
        raise told
    there = [one for one in told.values() if isinstance(one, str)]
    absent = {name: error for name, error in told.items() if isinstance(error, NotFound)}
    moved = _elsewhere(asked, source, absent) if absent else {}
    for name, error in absent.items():
        if not fnmatch.filter(moved, name):
            tell_of_hosts(error, (source,), [one.name for one in asked.settings.hosts.values() if one != source])
            tell_where(error, fleet.called(source))
            raise error
    return tuple(dict.fromkeys(there)), moved


def _again(
    asked: Fleet,
    source: HostEntry,
    moved: Mapping[str, str],
    wish: Wish,
    *,
    check: bool,
    output: Output,
) -> list[Moved]:
    """See to the end of moves of VMs that are elsewhere already, as the same again to those hosts does."""
    from vmctl import config, migrate_again
    from vmctl.cli.migrate import told
    from vmctl.migrate_ends import Ends

    done = []
    for name, there in moved.items():
        with Ends(asked, source, config.entry(there, asked.settings)) as ends:
            ends.open()
            if check:
                for one in migrate_again.check(ends, name, wish):
                    note(f"{name}: {one.what}")
                continue
            done.append(migrate_again.migrate(ends, name, wish, reporter()))
        if output is Output.TABLE:
            ui.say(told(done[-1]))
    return done


def _elsewhere(asked: Fleet, source: HostEntry, names: Collection[str]) -> dict[str, str]:
    """Which other host has a VM of each of the names, or globs, as far as they answer."""
    from vmctl import fleet
    from vmctl.hypervisor import inventory

    def ask(entry: HostEntry) -> list[str]:
        with asked.open(entry) as host:
            there = inventory.names(host.conn)
            return sorted({one for name in names for one in fnmatch.filter(there, name)})

    others = [one for one in asked.settings.hosts.values() if one != source]
    answers = fleet.each(others, ask, _LOOK_S)
    return {name: host for host, found in answers if not isinstance(found, VmctlError) for name in found}


def _look(asked: Fleet, names: Sequence[str], avoid: Sequence[str], timeout: float, told: set[str]) -> Census:
    """The hosts as they are now; ``told`` is what a look before has said of them."""
    from vmctl import survey

    seen = survey.survey(asked, names, avoid=avoid, timeout_s=timeout)
    for text in seen.notes:
        if text not in told:
            note(text)
    told.update(seen.notes)
    return seen.census


def _planned(
    asked: Fleet,
    names: Sequence[str],
    avoid: Sequence[str] | None,
    timeout: float,
    plan: Callable[[Census], Plan],
    how: _How,
    output: Output,
    *,
    emptied: Sequence[str] = (),
) -> None:
    """Look at the hosts, plan, and do with the plan what was asked for."""
    from vmctl import plans_of_others
    from vmctl.hypervisor.events import start_loop

    start_loop()  # migrations need it, and it must come before any connection
    look = partial(_look, asked, names, avoid or (), timeout, set())

    def begin(found: Plan, moved: int) -> None:
        if not found.moves and not moved:
            ui.emit(found, output, lambda: _table(found), lambda: ())
        _tell(found)
        if found.moves:
            what = [f"{move.vm}: {move.source} -> {move.target} ({move.why})" for move in found.moves]
            if stay := [f"{one.vm or 'VMs'} on {one.host}" for one in found.left]:
                what.append(f"not {', '.join(stay)} (--dry-run says why)")
            refuse_unless_yes(what, yes=how.yes, question="Move these VMs?", hint="add --yes, or see --dry-run")

    if how.dry_run or how.check:
        told = plans_of_others.others(asked.folders.runtime)
        found = plan(plans_of_others.counted(look(), told, emptied))
        ui.emit(found, output, lambda: _table(found), lambda: [move.vm for move in found.moves])
        _tell(found)
        if how.check:
            _check(asked, found, how.wish())
        else:
            for name, error in host_moves.left_of(found).items():
                note(f"{name}: {error.message}")
    else:
        found = host_moves.carry_out(asked, look, plan, begin, how.wish(), how.at_once, output, emptied=emptied)
    failures = host_moves.left_of(found)
    if found.moves and not (how.dry_run or how.check):
        failures |= _came(asked, emptied, found)
    if failures and not how.dry_run:
        raise PartialFailure(f"cannot move {len(failures)} that should", failures=failures)


def _came(asked: Fleet, hosts: Sequence[str], plan: Plan) -> dict[str, VmctlError]:
    """What is on hosts that were to be emptied and no plan knew of: somebody else made it, or moved it there."""
    from vmctl import fleet
    from vmctl.hypervisor import domain

    def ask(entry: HostEntry) -> tuple[str, ...]:
        with asked.open(entry) as host:
            return tuple(name for name, _ in domain.identities(host.conn))

    known = {(one.vm, one.host) for one in plan.left} | {(move.vm, move.source) for move in plan.moves}
    found: dict[str, VmctlError] = {}
    for host, names in fleet.each(asked.entries(hosts) if hosts else (), ask, _LOOK_S):
        if isinstance(names, VmctlError):
            found[f"VMs on {host}"] = names
            continue
        why = "it came there after the look; the same again moves it"
        found |= {f"{name} on {host}": VmctlError(why) for name in names if (name, host) not in known}
    return found


def _table(plan: Plan) -> str:
    if not plan.moves:
        return "nothing to move"
    rows = [(move.vm, move.source, move.target, str(move.wave + 1), move.why) for move in plan.moves]
    return ui.columns(("NAME", "FROM", "TO", "WAVE", "WHY"), rows)


def _tell(plan: Plan) -> None:
    """What a plan comes to, for people. What it leaves is told once, where it ends."""
    if plan.freed:
        note(f"empty then: {', '.join(plan.freed)}")
    elif plan.moves and (plan.spread_before or plan.spread_after):  # else there is but one to move to
        note(f"hosts are {plan.spread_before:.0%} apart in use, and {plan.spread_after:.0%} then")


def _check(asked: Fleet, plan: Plan, wish: Wish) -> None:
    """Both hosts of each move are asked what stands against it. Raises PreflightFailed."""
    from vmctl import migrate
    from vmctl.migrate_problems import Problem, fatal

    by = {host_moves.called(move): move for move in plan.moves}
    bad: list[tuple[str, str]] = []

    def work(name: str) -> tuple[Problem, ...]:
        with host_moves.ends_of(asked, by[name]) as ends:
            ends.open()
            return migrate.check(ends, by[name].vm, wish)

    def told(name: str, found: tuple[Problem, ...]) -> None:
        bad.extend((f"{name}: {one.what}", one.mend) for one in fatal(found))
        for one in found:
            if one.note:
                note(f"{name}: {one.what}")

    each([*by], work, told, "look at")
    if bad:
        count = "1 problem" if len(bad) == 1 else f"{len(bad)} problems"
        bad += [(f"{name}: {error.message}", "") for name, error in host_moves.left_of(plan).items()]
        raise PreflightFailed(f"cannot make all of these {len(by)} moves: {count}", problems=bad)
