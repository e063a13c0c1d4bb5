"""The end of a migration: both hosts are asked where the VM is, and are let come to an end with it first."""

from __future__ import annotations

import time

from vmctl.errors import Interrupted, MigrationFailed, VmctlError
from vmctl.events import Reporter, Warned
from vmctl.hypervisor import migration
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.states import recovery
from vmctl.migrate_ends import Ends
from vmctl.migrate_outcome import CUT_OFF, Seen, Where, judge
from vmctl.migrate_watch import Run
from vmctl.outage import Probe
from vmctl.wait import pause

_SETTLE_S, _STILL_S = 40.0, 4.0
_LOOK_S = 0.5
_LINGER_S = 0.2


def settled(ends: Ends, vm: Domain, run: Run, report: Reporter) -> tuple[Where, tuple[Seen, Seen]]:
    """Where it is. An interrupt does not keep it from being asked; one more does, and Interrupted says so."""
    here, there = ends.names
    while True:
        try:
            return settle(ends, vm.uuid)
        except (KeyboardInterrupt, Interrupted) as early:
            why = f"{early}" or "interrupted"
            if run.interrupted:
                raise Interrupted(
                    f"cannot migrate VM {vm.name}: {why} before {here} and {there} had said where it is; no file of it "
                    "was deleted",
                    hint=recovery(vm.name, here, there, keep=run.keep),
                ) from early
            run.interrupted = why
            report(Warned(f"{vm.name}: {why}; {here} and {there} are still asked where it is"))


def hear(probe: Probe, run: Run) -> None:
    """Wait for the guest's first answer from its new host, which says for how long there was none."""
    try:
        probe.answers_again(_LINGER_S)
    except (KeyboardInterrupt, Interrupted) as early:
        run.interrupted = run.interrupted or f"{early}" or "interrupted"


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
        if where is Where.STAYED and ended:
            ended = not _busy(ends, uuid)  # what is being cancelled may not have come to the target yet
        ended = ended or where is Where.LOST or (where is Where.POSTCOPY and CUT_OFF in {seen[0].why, seen[1].why})
        if ended:
            return where, seen
        if now - began >= _SETTLE_S:  # that it has stayed cannot be said while the source may yet send it
            return Where.UNKNOWN if where is Where.STAYED else where, seen
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


def failed(ends: Ends, name: str, run: Run, where: Where, seen: tuple[Seen, Seen]) -> MigrationFailed | Interrupted:
    """The error for a VM that did not move, which says where it is."""
    here, there = ends.names
    states = f"on {here} it is {seen[0].told}, on {there} {seen[1].told}"
    anew = recovery(name, here, there, keep=run.keep)
    why = run.failure or "libvirt gave no reason"
    if where in {Where.STAYED, Where.HALF}:
        text = (
            f"{name} runs on {here} as before"
            if where is Where.HALF or seen[0].runs
            else f"{name} is on {here} as before"
        )
        if not seen[1].known or seen[1].there:
            rest = f"on {there} it is still {seen[1].told}" if seen[1].known else f"{there} cannot be asked"
            kind = Interrupted if run.interrupted and seen[1].known else MigrationFailed
            return kind(f"cannot migrate VM {name}: {why}; {text}, {rest}", hint=f"{anew} clears up there, later")
        if run.interrupted:
            return Interrupted(f"cannot migrate VM {name}: {run.interrupted}; {text}")
        return MigrationFailed(f"cannot migrate VM {name}: {why}; {text}")
    hints = {
        Where.POSTCOPY: f"{anew} goes on with it, once both reach each other; neither host must be restarted before",
        Where.TWICE: "stop one of them at once: two guests on one disk destroy it",
        Where.LOST: f"its memory is gone, its disks are not: vmctl stop {name} --force where it still is, and start it "
        "where it is defined",
    }
    hint = hints.get(where, f"{anew}, once both answer")
    if where is Where.UNKNOWN and not seen[0].known and not seen[1].there:
        hint += f"; if {here} has lost power, its memory is gone with that"
    return MigrationFailed(f"cannot migrate VM {name}: {why}; it is {where}: {states}", hint=hint)
