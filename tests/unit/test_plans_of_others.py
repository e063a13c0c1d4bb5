"""Plans made beside those of other vmctl processes: what they have planned counts, as long as they live."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vmctl import plans_of_others, rebalance
from vmctl.census import Census, HostSeen, VmSeen
from vmctl.errors import Conflict, PreflightFailed
from vmctl.plans_of_others import Coming, Others, Told, counted, others
from vmctl.rebalance import Move


def host(name: str, gib: int = 8) -> HostSeen:
    return HostSeen(name, 8, gib * 1024, gib * 1024)


def vm(name: str, at: str, mib: int = 4096, **more: object) -> VmSeen:
    return VmSeen(name, at, memory_mib=mib, **more)  # type: ignore[arg-type]


FOUR = (host("h1"), host("h2"), host("h3"), host("h4", 6))


def test_memory_that_another_one_has_planned_is_not_given_twice() -> None:
    census = Census(FOUR, (vm("a", "h1"), vm("b", "h2")))
    alone = rebalance.drain(census, "h2")
    assert [move.target for move in alone.moves] == ["h3"]
    beside = counted(census, Others(frozenset({"h1"}), (Coming(vm("a", "h1"), "h3"),)), ["h2"])
    assert [move.target for move in rebalance.drain(beside, "h2").moves] == ["h4"]
    full = counted(census, Others(frozenset({"h1"}), (Coming(vm("a", "h1"), "h3"), Coming(vm("c", "x"), "h4"))))
    (left,) = rebalance.drain(full, "h2").left
    assert "h1 is to get no VMs" in left.why and "h3 has 3584 MiB left" in left.why and "h4 has " in left.why


def test_one_that_has_arrived_counts_once() -> None:
    census = Census(FOUR, (vm("a", "h1"), vm("a", "h3"), vm("b", "h2")))
    beside = counted(census, Others(moves=(Coming(vm("a", "h1"), "h3", begun=True),)))
    assert [(one.name, one.host) for one in beside.vms] == [("a", "h1"), ("a", "h3"), ("b", "h2")]


def test_what_another_one_moves_is_left_to_it() -> None:
    census = Census(FOUR, (vm("a", "h1"), vm("b", "h1", 512)))
    plan = rebalance.drain(counted(census, Others(moves=(Coming(vm("a", "h1"), "h3"),)), ["h1"]), "h1")
    assert [move.vm for move in plan.moves] == ["b"]
    assert [(one.vm, one.why) for one in plan.left] == [("a", "another vmctl moves it to h3")]


def test_one_on_its_way_to_a_host_that_is_emptied_is_told_and_one_that_is_not_will_not_go() -> None:
    census = Census(FOUR, (vm("a", "h1", 512), vm("b", "h1", 512)))
    moves = Coming(vm("a", "h1", 512), "h2", begun=True), Coming(vm("b", "h1", 512), "h2")
    plan = rebalance.drain(counted(census, Others(moves=moves), ["h2"]), "h2")
    assert [(one.vm, one.host, one.why) for one in plan.left] == [("a", "h2", "it is on its way there from h1")]


def test_two_that_meet_see_each_other(tmp_path: Path) -> None:
    census = Census(FOUR, (vm("a", "h1", apart="g"),))
    move = Move("a", "h1", "h2", "")
    with Told(tmp_path, ["h1"]) as first:
        with first.planning() as seen:
            assert seen == Others(), "not what it tells itself"
            first.plans(census, [move])
        planned = Coming(VmSeen("a", "h1", memory_mib=4096, apart="g"), "h2")
        assert others(tmp_path) == Others(frozenset({"h1"}), (planned,))
        with first.making(move):
            assert others(tmp_path).moves == (planned._replace(begun=True),)
        assert others(tmp_path).moves == ()
        with (
            Told(tmp_path, ["h2"]),
            pytest.raises(PreflightFailed, match="nothing was changed") as refused,
            first.making(move),
        ):
            raise AssertionError("it went to a host that is being emptied")
        assert refused.value.problems == (("another vmctl is emptying h2", ""),)
        with first.making(move):
            pass
    assert others(tmp_path) == Others() and not list(tmp_path.glob("*.plan"))


def test_nobody_plans_while_another_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans_of_others, "_WAIT_S", 0.0)
    with (
        Told(tmp_path) as first,
        Told(tmp_path) as second,
        first.planning(),
        pytest.raises(Conflict),
        second.planning(),
    ):
        raise AssertionError("two at once")


def test_what_a_dead_one_has_planned_does_not_count(tmp_path: Path) -> None:
    script = f"""if True:
        from pathlib import Path
        from vmctl.plans_of_others import Told
        with Told(Path({str(tmp_path)!r}), ["h1"]):
            print("told", flush=True)
            input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline() == "told\n"
        assert others(tmp_path).emptied == {"h1"}
        other.kill()
        other.wait()
        assert len(list(tmp_path.glob("*.plan"))) == 1
        assert others(tmp_path) == Others()
        assert not list(tmp_path.glob("*.plan"))
