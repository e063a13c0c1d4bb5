"""Placing VMs on hosts, and plans of moves: what must hold of every fleet, and what is chosen in plain ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl import placement, rebalance
from vmctl.capacity import Ledger
from vmctl.census import Accel, By, Census, Cpu, HostSeen, Limits, VmSeen
from vmctl.errors import HostUnreachable, NotFound
from vmctl.rebalance import Move, Plan

LIMITS = Limits()
BOTH = frozenset({Accel.KVM, Accel.TCG})


def host(name: str, gib: int = 16, cpus: int = 8, **more: object) -> HostSeen:
    given_ = {"available_mib": gib * 1024, "arch": "x86_64", "accels": BOTH, **more}
    return HostSeen(name, cpus, gib * 1024, **given_)  # type: ignore[arg-type]


def vm(name: str, at: str = "", mib: int = 1024, **more: object) -> VmSeen:
    return VmSeen(name, at, memory_mib=mib, **more)  # type: ignore[arg-type]


# --- every fleet -----------------------------------------------------------------------------------------------


@st.composite
def fleets(draw: st.DrawFn, *, sound: bool = False) -> Census:
    """A few hosts, unlike each other, and VMs on them; ``sound``: nothing overcommitted, groups apart."""
    hosts = []
    for number in range(draw(st.integers(1, 5))):
        memory = draw(st.sampled_from([2048, 4096, 8192, 9000]))
        hosts.append(
            HostSeen(
                f"h{number}",
                draw(st.integers(1, 4)),
                memory,
                draw(st.integers(0, memory)) if draw(st.booleans()) else memory,
                draw(st.floats(0, 4)),
                draw(st.sampled_from(["x86_64"] * 4 + ["aarch64"])),
                draw(st.sampled_from([BOTH, BOTH, BOTH, frozenset({Accel.TCG})])),
                machines=draw(st.sampled_from([frozenset(), frozenset({"old", "new"}), frozenset({"old"})])),
                draining=draw(st.sampled_from([False] * 4 + [True])),
                problem=draw(st.sampled_from([""] * 5 + ["no route"])),
            )
        )
    census = Census(tuple(hosts), ())
    for _ in range(draw(st.integers(0, 12))):
        at = draw(st.sampled_from(hosts))
        on = draw(st.sampled_from([True] * 4 + [False]))
        one = VmSeen(
            f"vm{draw(st.integers(0, 7))}",  # two hosts may have VMs of one name
            at.name,
            draw(st.integers(1, 3)),
            draw(st.sampled_from([128, 512, 1024, 2048])),
            draw(st.integers(0, 128)) if on else 0,
            draw(st.floats(0, 2)) if on else 0.0,
            on,
            draw(st.integers(-1, 2)),
            draw(st.sampled_from([""] * 3 + ["a", "b"])),
            draw(st.sampled_from([""] * 6 + ["it has a host device"])),
            at.arch,
            draw(st.sampled_from(sorted(at.accels))),
            draw(st.sampled_from(sorted(at.machines) or [""])),
        )
        if all((one.name, one.host) != (other.name, other.host) for other in census.vms):
            more = census._replace(vms=(*census.vms, one))
            census = census if sound and not Books(more).sound(at.name) else more
    return census


@dataclass
class Books:
    """A census gone through move by move, added up anew at each look: nothing of the program's own accounts."""

    census: Census

    def __post_init__(self) -> None:
        self.hosts = {one.name: one for one in self.census.hosts}
        self.at = {(one.host, one.name): one.host for one in self.census.vms}

    def here(self, name: str) -> list[VmSeen]:
        return [one for one in self.census.vms if self.at[one.host, one.name] == name]

    def capacity(self, name: str) -> int:
        one = self.hosts[name]
        beside = one.memory_mib - one.available_mib - sum(v.resident_mib for v in self.census.vms if v.host == name)
        return max(0, one.memory_mib - max(512, int(one.memory_mib * 0.05), beside))

    def sound(self, name: str, also: Sequence[VmSeen] = ()) -> bool:
        """Whether nothing is given away twice there, and whoever is to be kept apart is."""
        here = [*self.here(name), *also]
        on = [one for one in here if one.running]
        groups = Counter(one.apart for one in here if one.apart)
        return (
            sum(one.memory_mib for one in on) <= self.capacity(name)
            and sum(one.vcpus for one in on) <= 4 * self.hosts[name].cpus
            and max(groups.values(), default=0) <= 1
            and len({one.name for one in here}) == len(here)
        )

    def use(self, name: str) -> float:
        on = [one for one in self.here(name) if one.running]
        memory, capacity = sum(one.memory_mib for one in on), self.capacity(name)
        began = sum(one.load for one in self.census.vms if one.host == name)
        load = max(0.0, self.hosts[name].load - began) + sum(one.load for one in on)
        return max(
            memory / max(1, capacity),
            sum(one.vcpus for one in on) / (4 * self.hosts[name].cpus),
            load / self.hosts[name].cpus,
        )

    def usable(self) -> list[str]:
        return [one.name for one in self.census.hosts if not one.draining and not one.problem]

    def spread(self) -> float:
        used = [self.use(name) for name in self.usable()]
        return max(used) - min(used) if used else 0.0

    def find(self, move: Move) -> VmSeen:
        return next(one for one in self.here(move.source) if one.name == move.vm)

    def make(self, move: Move) -> None:
        """One move; what must hold of each."""
        one, target = self.find(move), self.hosts[move.target]
        assert one.host == move.source, "nobody moves twice"
        assert not one.pinned and not self.hosts[move.source].problem
        assert move.target in self.usable() and target.arch == one.arch and one.accel in target.accels
        assert not one.machine or not target.machines or one.machine in target.machines
        was = self.here(move.target)
        self.at[one.host, one.name] = move.target
        groups = Counter(v.apart for v in self.here(move.target) if v.apart)
        assert groups[one.apart] <= 1 or not one.apart
        assert one.name not in {v.name for v in was}
        on = [v for v in self.here(move.target) if v.running]
        if one.running:
            assert sum(v.memory_mib for v in on) <= self.capacity(move.target)
            assert sum(v.vcpus for v in on) <= 4 * target.cpus

    def after(self) -> Census:
        """The fleet as it is then, looked at anew: all that is not a VM's is where it was."""
        hosts = []
        for one in self.census.hosts:
            was = [v for v in self.census.vms if v.host == one.name and v.running]
            now = [v for v in self.here(one.name) if v.running]
            moved = sum(v.resident_mib for v in was) - sum(v.resident_mib for v in now)
            load = max(0.0, one.load - sum(v.load for v in was)) + sum(v.load for v in now)
            hosts.append(one._replace(available_mib=one.available_mib + moved, load=load))
        vms = tuple(one._replace(host=self.at[one.host, one.name]) for one in self.census.vms)
        return Census(tuple(hosts), vms)


def followed(census: Census, plan: Plan) -> Books:
    """The plan carried out one by one, and wave by wave."""
    books = Books(census)
    for wave in sorted({move.wave for move in plan.moves}):
        moves = [move for move in plan.moves if move.wave == wave]
        for name in {move.target for move in moves}:  # all of a wave there, none of it gone yet
            coming = [books.find(move) for move in moves if move.target == name]
            here = [one for one in [*books.here(name), *coming] if one.running]
            if any(one.running for one in coming):
                assert sum(one.memory_mib for one in here) <= books.capacity(name)
                assert sum(one.vcpus for one in here) <= 4 * books.hosts[name].cpus
        for move in moves:
            books.make(move)
    assert [move.wave for move in plan.moves] == sorted(move.wave for move in plan.moves)
    assert all(move.why for move in plan.moves) and all(left.why for left in plan.left)
    assert plan.spread_after == pytest.approx(books.spread(), abs=1e-6)
    return books


@given(fleets(), st.integers(0, 4))
def test_a_drained_host_is_empty_or_says_why_not(census: Census, number: int) -> None:
    name, problem = census.hosts[number % len(census.hosts)].name, census.hosts[number % len(census.hosts)].problem
    if problem:
        with pytest.raises(HostUnreachable, match=problem):
            rebalance.drain(census, name)
        return
    plan = rebalance.drain(census, name)
    at_first = {one.name for one in census.vms if one.host == name}
    drained = census._replace(
        hosts=tuple(one._replace(draining=one.draining or one.name == name) for one in census.hosts)
    )
    books = followed(drained, plan)
    assert {one.name for one in books.here(name)} == {one.vm for one in plan.left}
    assert {move.vm for move in plan.moves} | {one.vm for one in plan.left} == at_first
    assert all(move.source == name for move in plan.moves)
    assert plan.freed == (() if plan.left else (name,))
    # Whoever is left had no place even with all others gone: the room that is left takes it nowhere.
    for left in plan.left:
        one = next(v for v in census.vms if (v.host, v.name) == (name, left.vm))
        if not one.pinned:
            assert not placement.place(books.after(), one).host
    assert rebalance.drain(census, name) == plan


@given(fleets(sound=True), st.integers(0, 20))
def test_balance_never_worsens_the_spread(census: Census, most: int) -> None:
    plan = rebalance.balance(census, most=most)
    assert len(plan.moves) <= most and not plan.left
    books = Books(census)
    for move in plan.moves:
        spread, worst = books.spread(), books.use(move.source)
        books.make(move)
        assert books.spread() <= spread + 1e-6
        assert max(books.use(move.source), books.use(move.target)) < worst
    followed(census, plan)


@given(fleets())
def test_balance_comes_to_an_end_and_then_does_nothing(census: Census) -> None:
    for _ in range(40):
        plan = rebalance.balance(census, most=100)
        assert rebalance.balance(census, most=100) == plan
        if not plan.moves:
            break
        census = followed(census, plan).after()
    else:
        raise AssertionError("it goes on moving VMs")
    if plan.spread_before <= LIMITS.even:
        assert not plan.moves


@given(fleets())
def test_balance_mends_before_it_evens_out(census: Census) -> None:
    books, plan = Books(census), rebalance.balance(census, most=100)
    after = followed(census, plan)
    for name in books.usable():
        if not after.sound(name):  # then somebody is told why
            assert any(left.host == name for left in plan.left)


@given(fleets(), st.integers(0, 20))
def test_consolidation_frees_whole_hosts(census: Census, most: int) -> None:
    plan = rebalance.consolidate(census, most=most)
    books = Books(census)
    empty = {name for name in books.usable() if not books.here(name)}
    after = followed(census, plan)
    assert len(plan.moves) <= most
    assert {move.source for move in plan.moves} == set(plan.freed)
    assert all(not after.here(name) for name in plan.freed)
    assert not {move.target for move in plan.moves} & (empty | set(plan.freed))
    assert all(after.use(name) <= LIMITS.packed + 1e-6 for name in {move.target for move in plan.moves})
    assert rebalance.consolidate(census, most=most) == plan


@given(fleets())
def test_one_is_placed_where_it_fits_and_all_others_say_why_not(census: Census) -> None:
    new = VmSeen("new", "", 2, 1024, arch="x86_64", accel=Accel.KVM, apart="a")
    choice = placement.place(census, new)
    books = Books(census)
    could = [
        name
        for name in books.usable()
        if books.hosts[name].arch == "x86_64"
        and Accel.KVM in books.hosts[name].accels
        and sum(v.memory_mib for v in books.here(name) if v.running) + 1024 <= books.capacity(name)
        and sum(v.vcpus for v in books.here(name) if v.running) + 2 <= 4 * books.hosts[name].cpus
        and "a" not in {v.apart for v in books.here(name)}
    ]
    assert (choice.host in could) if could else not choice.host
    assert set(choice.refused) == set(books.hosts) - {choice.host} and all(choice.refused.values())


# --- plain fleets ----------------------------------------------------------------------------------------------


def test_the_least_used_host_is_taken_and_refusals_name_their_reason() -> None:
    hosts = (
        host("busy"),
        host("idle"),
        host("small", 2, available_mib=1024),
        host("arm", arch="aarch64"),
        host("tcg", accels=frozenset({Accel.TCG})),
        host("old", machines=frozenset({"pc-q35-6.2"})),
        host("cpu", cpu_models=frozenset({"qemu64"})),
        host("lan", networks=frozenset({"default"})),
        host("gone", problem="no answer within 10 s"),
        host("leaving", draining=True),
        host("taken"),
        host("namesake"),
    )
    vms = (vm("a", "busy", 8192), vm("db1", "taken", apart="db"), vm("new", "namesake", 64))
    new = vm("new", "", 4096, apart="db", accel=Accel.KVM, arch="x86_64", machine="pc-q35-7.2", cpu=Cpu("Skylake"))
    new = new._replace(networks=frozenset({"lan"}))
    choice = placement.place(Census(hosts, vms), new)
    assert choice.host == "idle" and choice.use == pytest.approx(4096 / (16384 * 0.95), abs=1e-4)
    assert choice.refused == {
        "busy": "would be 79% in use, idle 26%",
        "small": "has 1024 MiB left of the 4096 MiB that it takes",
        "arm": "is aarch64, not x86_64",
        "tcg": "runs no guests on kvm",
        "old": "has no machine type pc-q35-7.2",
        "cpu": "cannot give a guest the CPU Skylake",
        "lan": "has no network lan",
        "gone": "cannot be used: no answer within 10 s",
        "leaving": "is to get no VMs",
        "taken": "has db1, which is kept apart from it (db)",
        "namesake": "has a VM of that name",
    }


def test_a_passed_through_cpu_needs_the_same_one() -> None:
    cpu = Cpu("Skylake", frozenset({"avx512f", "pku"}), exact=True)
    hosts = (
        host("here", cpu_model="Skylake", cpu_flags=cpu.flags),
        host("like", cpu_model="Skylake", cpu_flags=cpu.flags | {"more"}),
        host("less", cpu_model="Skylake", cpu_flags=frozenset({"pku"})),
        host("other", cpu_model="EPYC"),
        host("unknown"),
    )
    choice = placement.place(Census(hosts, (one := vm("a", "here", cpu=cpu),)), one)
    assert choice.host == "like" and choice.refused == {
        "here": "is where it is",
        "less": "has a CPU without avx512f",
        "other": "has a CPU EPYC, not Skylake",
        "unknown": "has a CPU of no known model, not Skylake",
    }


def test_room_that_was_not_there_is_found_once_it_is() -> None:
    ledger = Ledger(Census((host("h1", 4),), (there := vm("a", "h1", 3000),)), LIMITS)
    big = vm("big", "", 3000)
    assert ledger.least(big) is None and ledger.fullest(big, 1.0, frozenset()) is None
    ledger.rooms["h1"].leave(there)
    assert ledger.least(big) is ledger.fullest(big, 1.0, frozenset()) is ledger.rooms["h1"]


def test_a_namesake_keeps_a_host_from_being_taken() -> None:
    vms = (vm("a", "h1"), vm("a", "h2", 64), vm("b", "h1"))
    plan = rebalance.drain(Census((host("h1"), host("h2")), vms), "h1")
    assert [move.vm for move in plan.moves] == ["b"] and plan.left == (("a", "h1", "h2 has a VM of that name"),)


def test_a_host_that_refused_it_is_passed_over() -> None:
    census = Census(
        (host("h1"), host("h2"), host("h3", 4)), (one := vm("a", "h1", barred=(("h2", "it has no network"),)),)
    )
    assert placement.place(census, one).refused["h2"] == "cannot take it: it has no network"
    assert [move.target for move in rebalance.drain(census, "h1").moves] == ["h3"]


def test_a_large_host_at_the_same_share_is_preferred() -> None:
    hosts = (host("small", 4), host("large", 64))
    vms = (vm("a", "small", 300), vm("b", "large", 8192))
    assert placement.place(Census(hosts, vms), vm("new", "", 2048)).host == "large"


def test_nowhere_to_go() -> None:
    assert placement.place(Census((), ()), vm("a")) == ("", 0.0, {})
    choice = placement.place(Census((host("h1", 1),), ()), vm("a", "", 4096))
    assert not choice.host and choice.refused == {"h1": "has 512 MiB left of the 4096 MiB that it takes"}


def test_draining_serves_priority_first() -> None:
    hosts = (host("h1"), host("h2", 4))
    vms = (vm("big", "h1", 3072), vm("important", "h1", 3000, priority=5), vm("small", "h1", 256), vm("held", "h1"))
    plan = rebalance.drain(Census(hosts, (*vms[:3], vms[3]._replace(pinned="it has a host device"))), "h1")
    assert [(move.vm, move.target) for move in plan.moves] == [("important", "h2"), ("small", "h2")]
    assert {left.vm: left.why for left in plan.left} == {
        "big": "h2 has 584 MiB left of the 3072 MiB that it takes",
        "held": "it has a host device",
    }
    assert plan.freed == ()
    with pytest.raises(NotFound, match="cannot drain host h9"):
        rebalance.drain(Census(hosts, vms), "h9")


def test_some_of_a_host() -> None:
    hosts = (host("h1"), host("h2"), host("h3"))
    vms = (vm("a", "h1"), vm("b", "h1"), vm("c", "h1"))
    plan = rebalance.drain(Census(hosts, vms), "h1", only=("a", "c", "elsewhere"))
    assert [(move.vm, move.target) for move in plan.moves] == [("a", "h2"), ("c", "h3")] and not plan.freed
    assert plan.moves[0].why == "leaves h1; h2 is then 7% in use"


def test_a_host_that_does_not_answer_is_not_drained() -> None:
    """What is on it is not known: that there is nothing to move would be a lie."""
    census = Census((host("h1", problem="no route"), host("h2")), ())
    with pytest.raises(HostUnreachable, match="cannot drain host h1: no route"):
        rebalance.drain(census, "h1")
    with pytest.raises(HostUnreachable, match="cannot place VMs of host h1: no route"):
        rebalance.drain(census, "h1", only=["a"])


def test_a_stopped_vm_moves_too_and_needs_no_room_now() -> None:
    hosts = (host("h1"), host("h2", 4))
    vms = (vm("a", "h1", 2048, running=False), vm("b", "h1", 2048, running=False), vm("c", "h1", 8192, running=False))
    plan = rebalance.drain(Census(hosts, vms), "h1")
    assert {move.vm for move in plan.moves} == {"a", "b"} and [left.vm for left in plan.left] == ["c"]


def test_balance_takes_few_moves_and_disturbs_low_priority() -> None:
    hosts = (host("h1"), host("h2"))
    vms = (vm("precious", "h1", 4096, priority=9), vm("plain", "h1", 4096), vm("tiny", "h1", 128))
    plan = rebalance.balance(Census(hosts, vms))
    assert [(move.vm, move.source, move.target) for move in plan.moves] == [("plain", "h1", "h2")]
    assert plan.moves[0].why == "evens out: h1 53% -> 27% in use, h2 0% -> 26%"
    assert plan.spread_before > 0.5 and plan.spread_after < 0.02


def test_balance_looks_at_processors_too() -> None:
    hosts = (host("h1", load=7.9), host("h2", load=0.1))
    vms = (vm("hot", "h1", 512, load=4.0), vm("warm", "h1", 512, load=3.0), vm("cold", "h1", 512, load=0.1))
    plan = rebalance.balance(Census(hosts, vms))
    assert [move.vm for move in plan.moves] == ["hot"]
    # A host that is busy beside its VMs, as the other is: only what is given away can be evened out.
    census = Census(tuple(one._replace(load=9.0) for one in hosts), tuple(one._replace(load=0.0) for one in vms))
    assert not rebalance.balance(census).moves
    by_memory = Limits(by=frozenset({By.MEMORY}), even=0.01)
    assert len(rebalance.balance(census, by_memory).moves) == 1


def test_balance_parts_and_relieves_first() -> None:
    hosts = (host("h1"), host("h2"), host("h3", 4))
    vms = (
        vm("db1", "h1", 256, apart="db", priority=3),
        vm("db2", "h1", 256, apart="db"),
        vm("big", "h3", 3000, priority=1),
        vm("low", "h3", 2500),
    )
    plan = rebalance.balance(Census(hosts, vms))
    assert [(move.vm, move.source, move.target) for move in plan.moves[:2]] == [
        ("db2", "h1", "h2"),
        ("low", "h3", "h1"),
    ]
    assert plan.moves[0].why.startswith("it is kept apart from db1 (db)")
    assert plan.moves[1].why.startswith("h3 has given away more than it has, 153%")
    alone = rebalance.balance(Census((host("h1"),), vms[:2]))
    assert not alone.moves and alone.left[0][:2] == ("db2", "h1")
    over = rebalance.balance(Census(hosts[2:], vms[2:]))
    assert not over.moves and over.left[0].host == "h3" and "nobody else has room" in over.left[0].why


def test_what_needs_room_that_another_frees_goes_in_a_later_wave() -> None:
    hosts = (host("h1", 4), host("h2", 4), host("h3", 4))
    for mib, waves in ((2000, [0, 1]), (500, [0, 0])):
        first, second = vms = (vm("a", "h2", mib), vm("b", "h1", mib))
        moves = ((first, Move("a", "h2", "h3", "why")), (second, Move("b", "h1", "h2", "why")))
        assert [move.wave for move in rebalance.in_waves(Census(hosts, vms), LIMITS, moves)] == waves


def test_a_host_that_nobody_could_ask_is_in_each_plan() -> None:
    census = Census((host("h1"), host("h2"), host("gone", problem="no route")), (vm("a", "h1", 9000),))
    for plan in (rebalance.balance(census), rebalance.consolidate(census), rebalance.drain(census, "h1")):
        assert plan.unseen == (("gone", "no route"),)


def test_consolidation_packs_the_fullest_and_keeps_a_reserve() -> None:
    hosts = tuple(host(f"h{n}") for n in range(1, 5))
    vms = (vm("a", "h1", 8192), vm("b", "h2", 2048), vm("c", "h3", 1024), vm("d", "h3", 1024))
    plan = rebalance.consolidate(Census(hosts, vms))
    assert plan.freed == ("h2", "h3")
    assert [(move.vm, move.target) for move in plan.moves] == [("b", "h1"), ("c", "h1"), ("d", "h1")]
    held = rebalance.consolidate(Census(hosts, (*vms[:3], vms[3]._replace(pinned="held"))))
    assert held.freed == ("h2",)
    # Where the last of a host's VMs has no place, none leaves.
    half = (vm("a", "h1", 10000), vm("b", "h2", 1024, priority=1), vm("c", "h2", 4096))
    assert rebalance.consolidate(Census(hosts, half)).moves == ()
    full = Census(hosts[:2], (vm("a", "h1", 9000), vm("b", "h2", 9000)))
    assert rebalance.consolidate(full) == ((), (), pytest.approx(0.0), pytest.approx(0.0), (), ())
    assert rebalance.consolidate(Census(hosts, vms), most=1).freed == ("h2",)


def test_hosts_that_cannot_share_are_not_evened_out_for_ever() -> None:
    """An empty host that none of the VMs can run on makes nobody move to and fro."""
    hosts = (host("arm", arch="aarch64"), host("h1"), host("h2"))
    vms = tuple(vm(f"v{n}", f"h{1 + n % 2}", 2048, arch="x86_64") for n in range(4))
    assert not rebalance.balance(Census(hosts, vms)).moves
