"""What to do about a migration under way, from how it went so far. Pure: recorded series are its tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

_LOOK_BACK_S = 5.0
_PASSES_BEFORE_RAMP = 2  # the first sends all memory, and says nothing of whether the rest gets less
_RAMP_EVERY_S = 4.0
_RAMP_STEPS = 6
_SLOWER, _LESS = 0.8, 0.7


@dataclass(frozen=True, slots=True)
class Sample:
    """How far a migration is. Bytes, seconds, bytes a second; disks' and memory's together but for what says memory."""

    at_s: float
    done: int
    total: int
    remaining: int
    memory_remaining: int
    dirty_rate: int
    throughput: int
    passes: int
    expected_downtime_ms: int
    throttle_percent: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """What a migration may cost. The downtime begins at the first and grows to the last while it does not converge.

    ``stall_s``: without a byte sent it is given up, or rests. ``give_up_s``: at most that long, None: for ever;
    with ``postcopy`` it goes over to post-copy then, and when it does not converge at the last downtime.
    """

    downtime_ms: int = 300
    max_downtime_ms: int = 1000
    stall_s: float = 45.0
    give_up_s: float | None = None
    postcopy: bool = False


class Raise(NamedTuple):
    """Let the VM stand still for that long at the end."""

    downtime_ms: int
    why: str


class GoPostcopy(NamedTuple):
    """Let the target run it now."""

    why: str


class Abort(NamedTuple):
    """Give it up."""

    why: str


class Pause(NamedTuple):
    """Let the second half of a post-copy, which nobody can take back, rest until it is gone on with."""

    why: str


Action: TypeAlias = Raise | GoPostcopy | Abort | Pause


class Done(NamedTuple):
    """An action and when it was taken."""

    at_s: float
    action: Action


def decide(history: Sequence[Sample], done: Sequence[Done], policy: Policy) -> Action | None:
    """What to do now; None: go on. ``history`` is in order of time, ``done`` what was decided before."""
    if not history:
        return None
    now = history[-1]
    quiet_s = now.at_s - _last_moved(history)
    stalled = f"nothing was sent for {quiet_s:.0f} s" if quiet_s >= policy.stall_s else ""
    if any(isinstance(one.action, GoPostcopy) for one in done):
        # Once the target runs it, to abort would lose what it did there.
        return Pause(stalled) if stalled and not any(isinstance(one.action, Pause) for one in done) else None
    if stalled:
        return Abort(stalled)
    late = policy.give_up_s is not None and now.at_s >= policy.give_up_s
    if late and not policy.postcopy:
        return Abort(f"it did not come to its end in {now.at_s:.0f} s")
    if late:
        return GoPostcopy(f"it did not come to its end in {now.at_s:.0f} s")
    if converges(history):
        return None
    return _towards_the_end(now, done, policy)


def _last_moved(history: Sequence[Sample]) -> float:
    """When something was sent last."""
    last = history[-1]
    moved = [one.at_s for one in history if (one.done, one.remaining) == (last.done, last.remaining)]
    return moved[0]


def _towards_the_end(now: Sample, done: Sequence[Done], policy: Policy) -> Action | None:
    raises = [one for one in done if isinstance(one.action, Raise)]
    downtime = raises[-1].action.downtime_ms if raises and isinstance(raises[-1].action, Raise) else policy.downtime_ms
    since_s = now.at_s - (raises[-1].at_s if raises else 0.0)
    if since_s < _RAMP_EVERY_S and raises:
        return None
    if downtime < policy.max_downtime_ms:
        step = max(50, (policy.max_downtime_ms - policy.downtime_ms) // _RAMP_STEPS)
        higher = min(policy.max_downtime_ms, downtime + step)
        return Raise(higher, f"the VM changes memory as fast as it is sent: downtime up to {higher} ms")
    if policy.postcopy:
        return GoPostcopy(f"it does not converge at a downtime of {downtime} ms")
    return None


def converges(history: Sequence[Sample]) -> bool:
    """Whether what remains gets less from pass to pass, or it is too early to tell.

    It does not when, for some passes already, memory is changed about as fast as it is sent, and no pass left less to
    the next than the best one before did.
    """
    now = history[-1]
    if now.passes <= _PASSES_BEFORE_RAMP:
        return True
    sent, dirtied = rates(history)
    if dirtied < _SLOWER * sent or not dirtied:
        return True
    lowest: dict[int, int] = {}
    for one in history:
        lowest[one.passes] = min(lowest.get(one.passes, one.memory_remaining), one.memory_remaining)
    before = [left for number, left in lowest.items() if number < now.passes]
    return bool(before) and lowest[now.passes] < _LESS * min(before)


def rates(history: Sequence[Sample]) -> tuple[float, float]:
    """Bytes sent and bytes changed a second, lately."""
    now = history[-1]
    recent = [one for one in history if one.at_s >= now.at_s - _LOOK_BACK_S]
    sent = _mean(one.throughput for one in recent if one.throughput)
    if not sent and recent[-1].at_s > recent[0].at_s:
        sent = (recent[-1].done - recent[0].done) / (recent[-1].at_s - recent[0].at_s)
    return sent, _mean(one.dirty_rate for one in recent)


def _mean(values: Iterable[int]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def eta_s(history: Sequence[Sample]) -> float | None:
    """Seconds until it is done at this rate; None when it will not be, or nothing can be told yet."""
    if not history:
        return None
    sent, dirtied = rates(history)
    now = history[-1]
    net = sent - (dirtied if now.passes > 1 else 0)
    return now.remaining / net if net > 0 else None
