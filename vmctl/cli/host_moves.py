"""The moves of a plan made, for host drain, balance, consolidate and migrate --to auto; other vmctls told of them."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

from vmctl import ui
from vmctl.cli.many import each
from vmctl.cli.options import note, reporter
from vmctl.errors import Interrupted, PartialFailure, PreflightFailed, VmctlError
from vmctl.ui import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmctl.census import Census
    from vmctl.fleet import Fleet
    from vmctl.migrate import Moved
    from vmctl.migrate_ends import Ends
    from vmctl.migrate_wish import Wish
    from vmctl.plans_of_others import Told
    from vmctl.rebalance import Move, Plan

    _Barred: TypeAlias = dict[tuple[str, str], tuple[tuple[str, str], ...]]  # a VM on a host: who refused it, and why

_UNDO_S = 120.0  # a move that is cut off asks both hosts where its VM is, however slow the way between is
_WAITS = "taking back what was begun; one more Ctrl-C does not wait for it"
_AGAIN = "the same again goes on with the rest; vmctl -c FROM migrate NAME --to TO --recover ends what was cut off"


def called(move: Move) -> str:
    """A move in a word."""
    return f"{move.vm} ({move.source} -> {move.target})"


def ends_of(asked: Fleet, move: Move) -> Ends:
    """Both hosts of a move, not asked yet."""
    from vmctl import config
    from vmctl.migrate_ends import Ends

    return Ends(asked, config.entry(move.source, asked.settings), config.entry(move.target, asked.settings))


def carry_out(
    asked: Fleet,
    look: Callable[[], Census],
    plan: Callable[[Census], Plan],
    begin: Callable[[Plan, int], None],
    wish: Wish,
    at_once: int,
    output: Output,
    *,
    emptied: Sequence[str] = (),
) -> Plan:
    """Make the moves of a plan, and where a host refuses a VM, those of another plan without that; the last plan.

    ``begin`` is shown each plan, with how many moves were made before it. What other vmctl processes of this user are
    at counts, and they are told of this, and that hosts are ``emptied``.
    """
    from vmctl.plans_of_others import Told

    with Told(asked.folders.runtime, emptied) as ours:
        return _carried_out(asked, partial(_plan, ours, look, plan, emptied), begin, wish, at_once, output, ours)


def _plan(
    ours: Told, look: Callable[[], Census], plan: Callable[[Census], Plan], emptied: Sequence[str], barred: _Barred
) -> Plan:
    """Look at the hosts, and plan, while nobody else does."""
    from vmctl.plans_of_others import counted

    with ours.planning() as others:
        census = counted(look(), others, emptied)
        vms = tuple(vm._replace(barred=barred.get((vm.name, vm.host), ())) for vm in census.vms)
        census = census._replace(vms=vms)
        found = plan(census)
        ours.plans(census, found.moves, found.freed)
    for host in sorted(others.emptied):
        note(f"{host}: another vmctl is emptying it")
    return found


def _carried_out(
    asked: Fleet,
    plan: Callable[[_Barred], Plan],
    begin: Callable[[Plan, int], None],
    wish: Wish,
    at_once: int,
    output: Output,
    ours: Told,
) -> Plan:
    moved: list[Moved] = []
    barred: _Barred = {}
    try:
        while True:
            found = plan(barred)
            begin(found, len(moved))
            failures = _make(asked, found, wish, at_once, output, moved, ours)
            refused = {move: error for move, error in failures.items() if isinstance(error, PreflightFailed)}
            for move, error in refused.items():
                why = "; ".join(what + (f" (mend: {mend})" if mend else "") for what, mend in error.problems)
                barred[move.vm, move.source] = (*barred.get((move.vm, move.source), ()), (move.target, why))
            if not refused or len(refused) < len(failures):
                break
    finally:  # also of one that is interrupted: those have moved
        _tell_passed_over(moved, barred)
        if moved and output is not Output.TABLE:
            ui.emit(moved, output, str, lambda: [one.vm for one in moved])
    if failures:
        raise PartialFailure(
            f"cannot make {len(failures)} of {len(found.moves)} moves",
            failures={called(move): error for move, error in failures.items()} | left_of(found),
        )
    return found


def left_of(plan: Plan) -> dict[str, VmctlError]:
    """What a plan leaves where it is, as failures; what hosts said against it is in the reason."""
    return {f"{one.vm or 'VMs'} on {one.host}": VmctlError(one.why) for one in plan.left}


def _tell_passed_over(moved: Sequence[Moved], barred: _Barred) -> None:
    """Which hosts did not take a VM that another one took; of one that stays, the failure at the end tells it."""
    for one in moved:
        for host, why in barred.get((one.vm, one.source), ()):
            note(f"{one.vm}: {host} cannot take it: {why}")


def _make(
    asked: Fleet, plan: Plan, wish: Wish, at_once: int, output: Output, moved: list[Moved], ours: Told
) -> dict[Move, VmctlError]:
    """Wave by wave. One that fails keeps the next from beginning, which may need the room it did not free."""
    from vmctl import migrate_again
    from vmctl.cli.migrate import told

    report = reporter()
    failures: dict[Move, VmctlError] = {}
    left = len(plan.moves)

    def work(name: str) -> Moved:
        with ours.making(by[name]), ends_of(asked, by[name]) as ends:
            ends.open()
            return migrate_again.migrate(ends, by[name].vm, wish, report)

    def done(_name: str, one: Moved) -> None:
        moved.append(one)
        if output is Output.TABLE:
            ui.say(told(one))

    for _, wave in groupby(plan.moves, lambda move: move.wave):
        by = {called(move): move for move in wave}
        left -= len(by)
        try:
            each([*by], work, done, "move", most=at_once, undo_s=_UNDO_S, waits=lambda: note(_WAITS))
        except PartialFailure as error:
            failures = {by[name]: cause for name, cause in error.failures.items()}
        except Interrupted as early:
            raise Interrupted(early.message, hint=early.hint or _AGAIN) from early
        except VmctlError as error:  # the only one of its wave
            failures = dict.fromkeys(by.values(), error)
        if failures:
            if left:
                note(f"{left} moves of later waves were not begun")
            break
    return failures
