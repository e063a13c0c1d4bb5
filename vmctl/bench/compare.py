"""What became slower or faster from one result to another. Pure.

Two things must come together: significance, by the exact Mann-Whitney test over the medians of the guests, or the
figures of the rounds (each is one independent look), and an effect that matters, as the ratio of medians. (Georges,
Buytaert, Eeckhout 2007; Kalibera and Jones 2013: repeat at the level where the variation is, and report effect sizes.)
Results of unlike dimensions measure different things and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from vmctl.bench import stats
from vmctl.bench.levels_result import quickest
from vmctl.bench.measured import Measured
from vmctl.bench.result import Head, Rows
from vmctl.bench.rows import OF_THE_MOMENT
from vmctl.bench.table import guest_medians
from vmctl.errors import SpecError

ALPHA = 0.01
THRESHOLD = 0.05


class Verdict(StrEnum):
    """What is said of one row."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "same"
    UNCLEAR = "unclear"  # too few guests to tell whether a difference this large is chance
    MOMENT = "as the host was"  # a difference that the state of the host's memory makes, too
    GONE = "only before"  # it was tried again, and there is a reason why it has no figure
    LEFT_OUT = "not measured"  # nobody asked for it, or it was cut off before
    NEW = "only after"


@dataclass(frozen=True, slots=True)
class Change:
    """One row before and after, in gross cycles or its own unit; ``superiority`` is Vargha and Delaney's A, 0.5: none.

    ``ratio`` is of the figures, ``cost`` of what they mean: above 1 it is slower, also where a larger figure is better.
    """

    name: str
    before: float
    after: float
    ratio: float
    p: float
    superiority: float
    verdict: Verdict
    unit: str
    cost: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows. ``drift`` is the median of the costs: away from 1, the machine as a whole was faster or slower."""

    before: str
    after: str
    verdict: str
    drift: float
    differs: tuple[str, ...]
    changes: tuple[Change, ...]

    @property
    def regressed(self) -> bool:
        """Whether anything became slower, or could not be measured any more."""
        return any(change.verdict in {Verdict.SLOWER, Verdict.GONE} for change in self.changes)


def require_alike(before: Head, after: Head) -> None:
    """Raise SpecError that names each dimension in which the two differ."""
    mine = {"workload": before.workload, **before.dimensions}
    other = {"workload": after.workload, **after.dimensions}
    unlike = [
        f"{name} is {mine.get(name, 'not told')} before and {other.get(name, 'not told')} after"
        for name in sorted({*mine, *other})
        if mine.get(name) != other.get(name)
    ]
    if unlike:
        raise SpecError(
            f"cannot compare {before.id} with {after.id}",
            problems=unlike,
            hint="compare results of the same workload on the same accelerator and CPU",
        )


@dataclass(frozen=True, slots=True)
class _Looks:
    """The independent looks at one row, and what they are in."""

    values: tuple[float, ...]
    unit: str
    more_is_better: bool = False


def _looks(result: Rows | Measured) -> dict[str, _Looks]:
    if not isinstance(result, Measured):
        figures, unit = (quickest, "ns") if result.head.workload == "levels" else (guest_medians, "cycles")
        return {row.name: _Looks(tuple(figures(row)), unit) for row in result.rows if row.runs}
    return {
        f"{row.name}: {one.name}": _Looks(tuple(one.values), one.unit, one.better == "higher")
        for row in result.rows
        for one in row.measures
        if one.samples
    }


def _without(result: Rows | Measured) -> set[str]:
    """The rows that a reason is told for."""
    return {row.name for row in result.rows if row.skipped or row.failed}


_SHOWN = (
    "libvirt", "qemu", "kernel", "microcode", "transparent_hugepages", "mitigations", "image", "storage",
    "guest_kernel", "guest_clock",
)  # fmt: skip


def compare(before: Rows | Measured, after: Rows | Measured, *, threshold: float = THRESHOLD) -> Comparison:
    """Judge each row. Raises SpecError when the two are unlike."""
    require_alike(before.head, after.head)
    old, new, without = _looks(before), _looks(after), _without(after)
    changes = tuple(_change(name, old, new, without, threshold) for name in {**old, **new})
    costs = [change.cost for change in changes if change.cost]
    environments: tuple[Mapping[str, object], ...] = (before.head.environment, after.head.environment)
    differs = tuple(
        f"{name}: {environments[0].get(name)} -> {environments[1].get(name)}"
        for name in _SHOWN
        if environments[0].get(name) != environments[1].get(name)
    )
    drift = stats.median(costs) if costs else 1.0
    return Comparison(before.head.id, after.head.id, _overall(changes), drift, differs, changes)


def _change(
    name: str, before: Mapping[str, _Looks], after: Mapping[str, _Looks], without: set[str], threshold: float
) -> Change:
    old, new = before.get(name), after.get(name)
    was, now = (stats.median(looks.values) if looks else 0.0 for looks in (old, new))
    unit = (old or new or _Looks((), "")).unit
    if old is None or new is None:
        gone = Verdict.GONE if name.partition(": ")[0] in without else Verdict.LEFT_OUT
        verdict = Verdict.NEW if old is None else gone
        return Change(name, was, now, 0.0, 1.0, 0.5, verdict, unit, 0.0)
    ratio, p = now / was, stats.p_value(old.values, new.values)
    cost = 1 / ratio if new.more_is_better and ratio else ratio
    large = cost >= 1 + threshold or cost <= 1 / (1 + threshold)
    if not large:
        verdict = Verdict.SAME
    elif stats.least_p(len(old.values), len(new.values)) > ALPHA:
        verdict = Verdict.UNCLEAR
    elif p > ALPHA:
        verdict = Verdict.SAME
    elif name in OF_THE_MOMENT:
        verdict = Verdict.MOMENT
    else:
        verdict = Verdict.SLOWER if cost > 1 else Verdict.FASTER
    return Change(name, was, now, ratio, p, stats.superiority(old.values, new.values), verdict, unit, cost)


def _overall(changes: tuple[Change, ...]) -> str:
    counts = {verdict: sum(change.verdict is verdict for change in changes) for verdict in Verdict}
    none = {Verdict.SAME, Verdict.MOMENT}
    told = [f"{count} {verdict}" for verdict, count in counts.items() if count and verdict not in none]
    return ", ".join(told) if told else "no change"
