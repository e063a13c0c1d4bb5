"""What a run of everything measures on a host, part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmctl.accel import Verdict
from vmctl.bench.result import Head
from vmctl.choices import AccelChoice
from vmctl.events import Reporter
from vmctl.hosts import Host, kvm_findings


class Part(NamedTuple):
    """One measurement of a run of everything. ``expected_s`` is what it takes on a machine of two slow cores."""

    name: str
    expected_s: float
    measure: Callable[[Host, Reporter], Head]


def parts(host: Host, *, quick: bool) -> tuple[Part, ...]:
    """All that can be measured on that host."""

    def trap(choice: AccelChoice) -> Callable[[Host, Reporter], Head]:
        def measure(host: Host, report: Reporter) -> Head:
            from vmctl.bench import trap

            return trap.run(host, trap.plan((), quick=quick, guests=None), choice, report).head

        return measure

    def popek(choice: AccelChoice) -> Callable[[Host, Reporter], Head]:
        def measure(host: Host, report: Reporter) -> Head:
            from vmctl.bench import popek

            return popek.run(host, choice, report).head

        return measure

    def levels(host: Host, report: Reporter) -> Head:
        from vmctl.bench import levels

        return levels.run(host, levels.plan((), (), quick=quick), report).head

    def io(host: Host, report: Reporter) -> Head:
        from vmctl.bench import io, setups

        rows = setups.chosen([], [], [], [], [], quick=quick, everything=False)
        plan = io.plan(rows, quick=quick, rounds=None, length_ms=None, size_mib=64)
        return io.run(host, plan, AccelChoice.AUTO, None, report).head

    def net(host: Host, report: Reporter) -> Head:
        from vmctl.bench import links, net

        rows = links.chosen([], [])
        return net.run(host, net.plan(rows, quick=quick, rounds=None, length_s=None), AccelChoice.AUTO, report).head

    found = [
        Part("trap-tcg", 5 if quick else 25, trap(AccelChoice.TCG)),
        Part("popek-tcg", 15, popek(AccelChoice.TCG)),
    ]
    if kvm_findings(host).verdict in {Verdict.WORKS, Verdict.INTERPRETED}:
        found.append(Part("trap-kvm", 20 if quick else 60, trap(AccelChoice.KVM)))
        found.append(Part("popek-kvm", 40, popek(AccelChoice.KVM)))
    found.append(Part("levels", 120 if quick else 250, levels))
    found.append(Part("io", 60 if quick else 400, io))
    found.append(Part("net", 60 if quick else 300, net))
    return tuple(found)
