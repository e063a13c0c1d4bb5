"""What planning costs for a simulated fleet: VMs placed, a host drained, use evened out, hosts freed.

Usage: python tests/perf/placement.py [HOSTS [VMS]]      1000 and 20000
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from vmctl import placement, rebalance
from vmctl.capacity import Ledger
from vmctl.census import Accel, Census, HostSeen, Limits, VmSeen

T = TypeVar("T")
AIM_S = 2.0
_GENERATIONS = ((16, 64), (32, 128), (48, 256), (64, 384))


def fleet(hosts: int, vms: int, seed: int = 1) -> tuple[Census, tuple[VmSeen, ...]]:
    """Hosts of four generations, a few of them on another architecture or without KVM; and VMs that are nowhere yet."""
    rng = random.Random(seed)
    made = []
    for number in range(hosts):
        cpus, gib = _GENERATIONS[number % len(_GENERATIONS)]
        made.append(
            HostSeen(
                f"h{number}",
                cpus,
                gib * 1024,
                gib * 1024 - rng.randrange(400, 4000),
                rng.uniform(0, 0.05) * cpus,
                "aarch64" if number % 50 == 7 else "x86_64",
                frozenset({Accel.TCG} if number % 50 == 9 else {Accel.TCG, Accel.KVM}),
            )
        )
    wanted = tuple(
        VmSeen(
            f"vm{number}",
            vcpus=(size := rng.choice((1, 1, 2, 2, 4, 8))),
            memory_mib=size * rng.choice((1024, 2048)),
            load=rng.betavariate(1, 5) * size,
            priority=rng.choice((0, 0, 0, 10)),
            apart=f"group{number // 5}" if number % 4 == 0 else "",
            arch="x86_64",
            accel=Accel.KVM,
        )
        for number in range(vms)
    )
    return Census(tuple(made), ()), wanted


def skewed(census: Census, vms: tuple[VmSeen, ...], seed: int = 2) -> Census:
    """The same VMs, on a third of the hosts more than on the others."""
    rng = random.Random(seed)
    able = [host.name for host in census.hosts if host.arch == "x86_64" and Accel.KVM in host.accels]
    third = able[: len(able) // 3]
    return census._replace(vms=tuple(vm._replace(host=rng.choice(third if rng.random() < 0.5 else able)) for vm in vms))


def placed(census: Census, vms: tuple[VmSeen, ...]) -> dict[str, str]:
    """A host for each, one after the other, as a drained host's are placed."""
    ledger, found = Ledger(census, Limits()), {}
    for vm in sorted(vms, key=placement.first_served):
        if room := ledger.least(vm):
            room.arrive(vm)
            found[vm.name] = room.host.name
    return found


def timed(title: str, work: Callable[[], T], told: Callable[[T], str]) -> T:
    """Do it once, and say how long that took."""
    began = time.perf_counter()
    result = work()
    print(f"  {title:<34} {time.perf_counter() - began:6.3f} s   {told(result)}")
    return result


def main() -> None:
    """Plan and print."""
    hosts, vms = (int(word) for word in (sys.argv[1:] + ["1000", "20000"][len(sys.argv) - 1 :])[:2])
    empty, wanted = fleet(hosts, vms)
    print(f"planning for {hosts} hosts and {vms} VMs (aim: each within {AIM_S:g} s)")
    where = timed(
        "all VMs placed on empty hosts",
        lambda: placed(empty, wanted),
        lambda found: f"{len(found)} have a host",
    )
    even = empty._replace(vms=tuple(vm._replace(host=where[vm.name]) for vm in wanted if vm.name in where))
    one = VmSeen("one-more", vcpus=4, memory_mib=4096, arch="x86_64", accel=Accel.KVM)
    timed(
        "one VM placed, with all refusals",
        lambda: placement.place(even, one),
        lambda choice: f"{choice.host}, not {len(choice.refused)} others",
    )

    def told(plan: rebalance.Plan) -> str:
        spread = f"spread {plan.spread_before:.2f} -> {plan.spread_after:.2f}"
        return f"{len(plan.moves)} moves, {len(plan.left)} left, {len(plan.freed)} hosts freed, {spread}"

    timed("a host drained", lambda: rebalance.drain(even, "h0"), told)
    timed("balanced: nothing to do", lambda: rebalance.balance(even), told)
    tilted = skewed(empty, wanted)
    timed("balanced: skewed, 20 moves", lambda: rebalance.balance(tilted), told)
    timed("balanced: skewed, no bound", lambda: rebalance.balance(tilted, most=vms), told)
    timed("consolidated: 20 moves", lambda: rebalance.consolidate(even), told)
    timed("consolidated: no bound", lambda: rebalance.consolidate(even, most=vms), told)


if __name__ == "__main__":
    main()
