"""What became slower or faster from one result to another. Pure.

Two things must come together: significance, by the exact Mann-Whitney test over the guests' medians (each guest is one
independent look), and an effect that matters, as the ratio of medians. (Georges, Buytaert, Eeckhout 2007; Kalibera and
Jones 2013: repeat at the level where the variation is, and report effect sizes.) Results of unlike dimensions measure
different things and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmctl.bench import stats
from vmctl.bench.result import Head, RowResult, Rows
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
    GONE = "only before"
    NEW = "only after"


@dataclass(frozen=True, slots=True)
class Change:
    """One row before and after, in gross cycles; ``superiority`` is Vargha and Delaney's A, 0.5 for none."""

    name: str
    before: float
    after: float
    ratio: float
    p: float
    superiority: float
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows. ``drift`` is the median ratio: away from 1, the machine as a whole was faster or slower."""

    before: str
    after: str
    verdict: str
    drift: float
    differs: tuple[str, ...]
    changes: tuple[Change, ...]

    @property
    def regressed(self) -> bool:
        """Whether anything became slower, or cannot be measured any more."""
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


def compare(before: Rows, after: Rows, *, threshold: float = THRESHOLD) -> Comparison:
    """Judge each row. Raises SpecError when the two are unlike."""
    require_alike(before.head, after.head)
    old = {row.name: row for row in before.rows if row.runs}
    new = {row.name: row for row in after.rows if row.runs}
    changes = tuple(_change(name, old.get(name), new.get(name), threshold) for name in {**old, **new})
    ratios = [change.ratio for change in changes if change.ratio]
    differs = tuple(
        f"{name}: {before.head.environment.get(name)} -> {after.head.environment.get(name)}"
        for name in ("libvirt", "qemu", "kernel", "microcode", "transparent_hugepages", "mitigations")
        if before.head.environment.get(name) != after.head.environment.get(name)
    )
    drift = stats.median(ratios) if ratios else 1.0
    return Comparison(before.head.id, after.head.id, _overall(changes), drift, differs, changes)


def _change(name: str, old: RowResult | None, new: RowResult | None, threshold: float) -> Change:
    if old is None or new is None:
        verdict = Verdict.NEW if old is None else Verdict.GONE
        was, now = (stats.median(guest_medians(row)) if row else 0.0 for row in (old, new))
        return Change(name, was, now, 0.0, 1.0, 0.5, verdict)
    first, second = guest_medians(old), guest_medians(new)
    was, now = stats.median(first), stats.median(second)
    ratio, p = now / was, stats.p_value(first, second)
    large = ratio >= 1 + threshold or ratio <= 1 / (1 + threshold)
    if not large:
        verdict = Verdict.SAME
    elif stats.least_p(len(first), len(second)) > ALPHA:
        verdict = Verdict.UNCLEAR
    elif p > ALPHA:
        verdict = Verdict.SAME
    elif name in OF_THE_MOMENT:
        verdict = Verdict.MOMENT
    else:
        verdict = Verdict.SLOWER if ratio > 1 else Verdict.FASTER
    return Change(name, was, now, ratio, p, stats.superiority(first, second), verdict)


def _overall(changes: tuple[Change, ...]) -> str:
    counts = {verdict: sum(change.verdict is verdict for change in changes) for verdict in Verdict}
    none = {Verdict.SAME, Verdict.MOMENT}
    told = [f"{count} {verdict}" for verdict, count in counts.items() if count and verdict not in none]
    return ", ".join(told) if told else "no change"
