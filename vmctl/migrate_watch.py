"""A migration under way: libvirt's blocking call in a thread, watched and steered from this one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from vmctl.errors import Interrupted, VmctlError
from vmctl.events import Reporter, Status, Step, Warned
from vmctl.hypervisor import connection, migration
from vmctl.hypervisor.migration import Orders, Way
from vmctl.migrate_ends import Ends
from vmctl.migrate_policy import Abort, Done, GoPostcopy, Pause, Policy, Raise, Sample, converges, decide, eta_s, rates
from vmctl.wait import Worker

_LOOK_S = 0.2
_ABORT_S = 20.0
_TRICKLE = 1 << 20  # bytes a second, the least that libvirt knows
_SOCKET = 4 << 20  # bytes that Linux lets a TCP connection hold back (tcp_wmem)
_DRAIN_S = 2.0
_SILENT_S = 50.0  # without a word of libvirt's: longer than the connection between two libvirts takes to be given up


@dataclass(slots=True)
class Run:
    """How it went: ``failure`` "" when libvirt says that it is done; ``hung`` when its call never came back.

    ``keep``: the source was to keep a definition.
    """

    failure: str = ""
    interrupted: str = ""
    hung: bool = False
    keep: bool = False
    history: list[Sample] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)

    @property
    def postcopy(self) -> bool:
        """Whether post-copy was begun: from then on it cannot be taken back."""
        return any(isinstance(one.action, GoPostcopy) for one in self.done)


def run(ends: Ends, name: str, orders: Orders, policy: Policy, report: Reporter) -> Run:
    """Migrate, and come back when it is over, or can no longer be expected to be."""
    source, target = ends.source, ends.target
    outcome = Run()

    def work() -> None:
        try:
            migration.migrate(ends.caller.conn, target.conn, name, orders)
        except VmctlError as error:
            outcome.failure = outcome.failure or error.message.removeprefix(f"cannot migrate VM {name}: ")

    def lost() -> bool:
        """Whether vmctl, through which a direct one goes, has lost the target: QEMU would send on, to no end."""
        return orders.way is Way.DIRECT and not connection.is_alive(target.conn)

    worker = Worker(work, f"migrate {name}")
    began = time.monotonic()
    while True:
        try:  # from its first moment on: what is not cancelled goes on without vmctl
            if worker.ident is None:
                worker.start()
                # As long as it sends the first time, nothing is known yet of how much downtime it needs.
                _try(lambda: migration.set_downtime(source.conn, name, policy.downtime_ms))
            _steer(worker, began, ends, name, policy, outcome, report, lost=lost)
            return outcome
        except (KeyboardInterrupt, Interrupted) as early:
            why = f"{early}" or "interrupted"
            if outcome.postcopy and not outcome.interrupted:
                outcome.interrupted = why
                report(Warned(f"{name} runs on {ends.names[1]} already: post-copy cannot be taken back, and goes on"))
                continue
            outcome.interrupted = why
            outcome.failure = outcome.failure or why
            with suppress(KeyboardInterrupt, Interrupted):  # where the VM is must be asked all the same
                abort = partial(migration.abort, source.conn, name)
                end(worker, (lambda: None) if outcome.postcopy else abort, timeout_s=_ABORT_S, again_s=_LOOK_S)
            outcome.hung = worker.is_alive()
            return outcome


def end(worker: Worker, abort: Callable[[], object], *, timeout_s: float, again_s: float) -> None:
    """Wait for a migration that is cancelled, said again and again: its job may not have begun yet."""
    deadline = time.monotonic() + timeout_s
    while worker.is_alive() and time.monotonic() < deadline:
        abort()
        worker.join(again_s)


def _try(act: Callable[[], object]) -> None:
    """Steer, if it can still be: it may have come to its end just now."""
    try:
        act()
    except VmctlError:
        return


def _steer(
    worker: Worker,
    began: float,
    ends: Ends,
    name: str,
    policy: Policy,
    outcome: Run,
    report: Reporter,
    *,
    lost: Callable[[], bool],
) -> None:
    source, heard, aborted = ends.source, time.monotonic(), 0.0
    downtime_set = False
    while worker.is_alive():
        worker.join(_LOOK_S)
        now = time.monotonic()
        if aborted and now - aborted > _ABORT_S:
            outcome.hung = True
            return
        if not aborted and lost():
            outcome.failure = f"the connection to {ends.names[1]} is lost"
            migration.abort(source.conn, name)
            aborted = now
        try:
            sample = migration.sample(source.conn, name, now - began)
        except VmctlError:
            sample = None  # it is over just now, or the connection is, which the other thread hears too
        if sample is None:
            if not aborted and now - heard > _SILENT_S:
                outcome.failure = f"nothing was heard of it for {_SILENT_S:.0f} s"
                migration.abort(source.conn, name)
                aborted = now
            continue
        heard = now
        if not downtime_set:
            downtime_set = True
            _try(lambda: migration.set_downtime(source.conn, name, policy.downtime_ms))
        outcome.history.append(sample)
        report(Status(name, told(outcome.history)))
        action = None if aborted else decide(outcome.history, outcome.done, policy)
        if isinstance(action, GoPostcopy):
            _empty_socket(worker, ends, name, sample)
            try:
                migration.start_postcopy(source.conn, name)
            except VmctlError:
                continue  # it does not send yet, or no more: said again to the next sample
        if action is not None:
            outcome.done.append(Done(sample.at_s, action))
            report(Step(f"{name}: {action.why}"))
        if isinstance(action, Raise):
            _try(partial(migration.raise_downtime, source.conn, name, action.downtime_ms))
        elif isinstance(action, Abort):
            outcome.failure = action.why
            migration.abort(source.conn, name)
            aborted = now
        elif isinstance(action, Pause):
            # QEMU itself would wait for TCP to give up, and a guest that nobody tells of its pages with it.
            outcome.failure = action.why
            migration.pause_postcopy(source.conn, name)
            aborted = now


def _empty_socket(worker: Worker, ends: Ends, name: str, now: Sample) -> None:
    """Before post-copy: the state of the devices follows what waits in the socket, megabytes on a slow link.

    Until that is through the guest runs nowhere, and with the link it would be lost: QEMU does not take it back.
    """
    if now.throughput:
        _try(partial(migration.set_bandwidth, ends.source.conn, name, _TRICKLE))
        worker.join(min(_DRAIN_S, _SOCKET / now.throughput))


def told(history: list[Sample]) -> str:
    """How it stands, for people."""
    now, left = history[-1], eta_s(history)
    if not now.total:
        return "beginning"
    end = (
        "no end in sight at this rate" if not converges(history) else f"{left:.0f} s to go" if left is not None else "…"
    )
    throttle = f", slowed down by {now.throttle_percent} %" if now.throttle_percent else ""
    sent, dirtied = rates(history)
    return (
        f"pass {now.passes or 1}, {now.remaining / 1e6:.0f} of {now.total / 1e6:.0f} MB left, "
        f"{sent / 1e6:.0f} MB/s, changes {dirtied / 1e6:.0f} MB/s{throttle}; {end}"
    )
