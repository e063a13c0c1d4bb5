"""The workloads there are: how results of each are shown, counted and compared, and what `bench run` measures.

A workload joins by a line in KINDS, and one in ``parts`` if it belongs to a run of everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vmctl.accel import Verdict
from vmctl.bench import sections
from vmctl.bench.levels_result import levels_of
from vmctl.bench.result import Head, Rows, trap_of
from vmctl.bench.section import Case, Section
from vmctl.choices import AccelChoice
from vmctl.errors import SpecError
from vmctl.events import Reporter
from vmctl.hosts import Host, kvm_findings

Values = Mapping[str, Any]


class Kind(NamedTuple):
    """One workload, by the name its results bear. ``rows`` None: two of them cannot be compared."""

    name: str
    sections: Callable[[Sequence[Values]], list[Section]]
    cases: Callable[[Values], list[Case]]
    rows: Callable[[Values], Rows] | None = None


KINDS = (
    Kind("trap", sections.traps, sections.trap_cases, trap_of),
    Kind("popek-goldberg", sections.popek, sections.popek_cases),
    Kind("levels", sections.levels, sections.levels_cases, levels_of),
    Kind("sheet", sections.sheets, sections.sheet_cases),
)
BY_NAME = {kind.name: kind for kind in KINDS}


def rows_of(values: Values) -> Rows:
    """The rows of a result. Raises SpecError for a workload that has none to compare."""
    found = BY_NAME[values["workload"]].rows
    if found is None:
        raise SpecError(
            f"cannot compare {values['id']}: {values['workload']} has no rows of samples",
            hint="vmctl bench list shows what each result is",
        )
    return found(values)


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

    def popek(host: Host, report: Reporter) -> Head:
        from vmctl.bench import popek

        return popek.run(host, AccelChoice.AUTO, report).head

    def levels(host: Host, report: Reporter) -> Head:
        from vmctl.bench import levels

        return levels.run(host, levels.plan((), (), quick=quick), report).head

    found = [Part("trap-tcg", 5 if quick else 25, trap(AccelChoice.TCG))]
    if kvm_findings(host).verdict in {Verdict.WORKS, Verdict.INTERPRETED}:
        found.append(Part("trap-kvm", 20 if quick else 60, trap(AccelChoice.KVM)))
    found.append(Part("popek-goldberg", 20, popek))
    found.append(Part("levels", 120 if quick else 300, levels))
    return tuple(found)
