"""What is done about a migration, on series as libvirt reports them, and where a VM is afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmctl.hypervisor import migration
from vmctl.hypervisor.migration import Orders, Way
from vmctl.hypervisor.states import State
from vmctl.migrate_outcome import Seen, Where, judge
from vmctl.migrate_policy import Abort, Done, GoPostcopy, Pause, Policy, Raise, Sample, converges, decide, eta_s

MB = 1_000_000
QUIET = Policy()


def sample(at_s: float, passes: int, remaining: int, *, done: int, dirty: int = 0, sent: int = 100) -> Sample:
    return Sample(at_s, done * MB, 1000 * MB, remaining * MB, remaining * MB, dirty * MB, sent * MB, passes, 0)


# An idle guest: the second pass has little left, the third nearly nothing.
IDLE = [sample(t, 1, 1000 - 100 * t, done=100 * t) for t in range(10)] + [
    sample(10, 2, 30, done=1000, dirty=5),
    sample(10.4, 3, 2, done=1030, dirty=5),
]
# One that changes 95 MB/s over a link of 100: no pass leaves less than the one before.
BUSY = [sample(t, 1, 1000 - 100 * t, done=100 * t) for t in range(10)] + [
    sample(10 + t, 2 + t // 3, 400 - 30 * (t % 3), done=1000 + 95 * t, dirty=95) for t in range(30)
]
# Throttled, it changes less and less.
THROTTLED = BUSY[:20] + [sample(20 + t, 5 + t, 400 - 60 * t, done=2000 + 100 * t, dirty=60 - 5 * t) for t in range(6)]
CUT = [*IDLE[:5], *(sample(4 + t, 1, 600, done=400, sent=0) for t in range(1, 60))]


def played(history: list[Sample], policy: Policy) -> list[Done]:
    done: list[Done] = []
    for end in range(1, len(history) + 1):
        action = decide(history[:end], done, policy)
        if action is not None:
            done.append(Done(history[end - 1].at_s, action))
            if isinstance(action, Abort):
                break
    return done


def test_an_idle_guest_is_left_alone() -> None:
    assert played(IDLE, QUIET) == [] and converges(IDLE)
    assert eta_s(IDLE[:5]) == pytest.approx(6.0)
    assert decide([], [], QUIET) is None and eta_s([]) is None


def test_a_busy_one_gets_more_downtime_step_by_step_up_to_the_limit() -> None:
    raised = [one.action.downtime_ms for one in played(BUSY, QUIET) if isinstance(one.action, Raise)]
    assert raised == sorted(set(raised)) and raised[0] > 300 and raised[-1] == 1000 and len(raised) >= 4
    assert not converges(BUSY)
    gaps = [one.at_s for one in played(BUSY, QUIET)]
    assert all(later - earlier >= 4 for earlier, later in zip(gaps, gaps[1:], strict=False))
    assert converges(THROTTLED)


def test_post_copy_only_when_asked_for_and_then_nothing_more() -> None:
    wanted = Policy(300, 400, postcopy=True)
    done = played(BUSY, wanted)
    assert [type(one.action) for one in done] == [Raise, Raise, GoPostcopy]
    cut = Pause("nothing was sent for 59 s")  # to abort it now would lose the VM
    assert decide(CUT, done, wanted) == cut and decide(CUT, [*done, Done(1, cut)], wanted) is None
    assert not any(isinstance(one.action, GoPostcopy) for one in played(BUSY, QUIET))


def test_what_takes_too_long() -> None:
    (given_up,) = (one for one in played(BUSY, Policy(1000, 1000, give_up_s=20)) if isinstance(one.action, Abort))
    assert given_up.at_s == 20 and "did not come to its end in 20 s" in given_up.action.why
    (over,) = played(BUSY, Policy(1000, 1000, give_up_s=12, postcopy=True))
    assert isinstance(over.action, GoPostcopy) and over.at_s == 12


def test_a_stall() -> None:
    *_, last = played(CUT, QUIET)
    assert isinstance(last.action, Abort) and last.action.why == "nothing was sent for 45 s"
    assert played(CUT[:40], QUIET) == []


RUNS, OFF, NONE, DARK = Seen(True, State.RUNNING), Seen(True, State.STOPPED), Seen(True), Seen(False)
HELD = Seen(True, State.PAUSED, "migration")
ENDED, SAVED = Seen(True, State.STOPPED, ended=True), Seen(True, State.SAVED)
ASKED = Seen(True, State.PAUSED, "asked")
BROKEN, LACKING = (Seen(True, state, "post-copy failed") for state in (State.PAUSED, State.RUNNING))


@pytest.mark.parametrize(
    ("source", "target", "where"),
    [
        (NONE, RUNS, Where.MOVED),
        (OFF, RUNS, Where.MOVED),
        (HELD, RUNS, Where.MOVED),
        (DARK, RUNS, Where.MOVED),
        (NONE, ASKED, Where.MOVED),
        (RUNS, NONE, Where.STAYED),
        (RUNS, OFF, Where.STAYED),
        (RUNS, HELD, Where.STAYED),
        (RUNS, DARK, Where.STAYED),
        (ASKED, NONE, Where.STAYED),
        (HELD, NONE, Where.HALF),
        (HELD, OFF, Where.HALF),
        (HELD, ENDED, Where.LOST),
        (HELD, SAVED, Where.LOST),
        (HELD, DARK, Where.UNKNOWN),
        (HELD, HELD, Where.UNKNOWN),
        (DARK, NONE, Where.UNKNOWN),
        (DARK, DARK, Where.UNKNOWN),
        (RUNS, RUNS, Where.TWICE),
        (BROKEN, BROKEN, Where.POSTCOPY),
        (DARK, BROKEN, Where.POSTCOPY),
        (BROKEN, LACKING, Where.POSTCOPY),
        (DARK, LACKING, Where.POSTCOPY),
        (OFF, LACKING, Where.LOST),
        (NONE, BROKEN, Where.LOST),
        (BROKEN, NONE, Where.LOST),
        (OFF, NONE, Where.LOST),
        (NONE, NONE, Where.LOST),
    ],
)
def test_where_it_is(source: Seen, target: Seen, where: Where) -> None:
    assert judge(source, target) is where


def test_a_vm_is_slowed_down_in_bigger_steps_than_qemus_own() -> None:
    """And only where it may be slowed down at all: libvirt refuses steps without the flag."""
    orders = Orders(Way.PEER, "qemu:///there", "", live=True, persist=True, undefine=True, unsafe=False)
    step = "auto_converge.increment"
    assert migration.parameters(orders)[step] == 20 and migration.flags(orders) & (1 << 13)
    for other in (replace(orders, live=False), replace(orders, auto_converge=False)):
        assert step not in migration.parameters(other) and not migration.flags(other) & (1 << 13)
