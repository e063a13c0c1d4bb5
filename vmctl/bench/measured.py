"""Results of workloads that measure by rounds: rows with settings and measures, these with raw samples; and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmctl.bench import stats
from vmctl.bench.result import Head, head_of


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. A round has one of each; ``details`` are further figures of the same look, named with their units."""

    round: int
    value: float
    details: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of a row; ``better`` is "lower" or "higher"."""

    name: str
    unit: str
    better: str
    samples: tuple[Sample, ...]

    @property
    def values(self) -> list[float]:
        """The samples' values."""
        return [sample.value for sample in self.samples]

    def detail(self, name: str) -> float | None:
        """The median of a detail; None where no sample has it."""
        found = [sample.details[name] for sample in self.samples if name in sample.details]
        return stats.median(found) if found else None


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was measured; ``skipped`` says why it cannot be had there, ``failed`` what went wrong.

    ``counted`` is what was counted of it and not timed.
    """

    name: str
    setting: Mapping[str, str]
    measures: tuple[Measure, ...] = ()
    skipped: str = ""
    failed: str = ""
    counted: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """A result, raw."""

    head: Head
    rows: tuple[Row, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {**self.head.to_json(), "rows": [_row_json(row) for row in self.rows]}


def _row_json(row: Row) -> dict[str, Any]:
    measures = [
        {
            "name": one.name,
            "unit": one.unit,
            "better": one.better,
            "samples": [
                {"round": sample.round, "value": sample.value, "details": dict(sample.details)}
                for sample in one.samples
            ],
        }
        for one in row.measures
    ]
    counted = None if row.counted is None else dict(row.counted)
    return {
        "name": row.name,
        "setting": dict(row.setting),
        "skipped": row.skipped,
        "failed": row.failed,
        "measures": measures,
        "counted": counted,
    }


def measured_of(values: Mapping[str, Any]) -> Measured:
    """A result as it was kept; the values have been checked against the schema."""
    return Measured(head_of(values), tuple(_row_of(row) for row in values["rows"]))


def _row_of(values: Mapping[str, Any]) -> Row:
    measures = tuple(
        Measure(one["name"], one["unit"], one["better"], tuple(Sample(**sample) for sample in one["samples"]))
        for one in values["measures"]
    )
    return Row(values["name"], values["setting"], measures, values["skipped"], values["failed"], values["counted"])


@dataclass(frozen=True, slots=True)
class Line:
    """The figures of one measure of one row: the median of the rounds, their MAD, and medians of the details."""

    row: str
    measure: str
    unit: str
    better: str
    median: float
    mad: float
    samples: int
    details: Mapping[str, float]


def lines(result: Measured) -> tuple[Line, ...]:
    """The figures of every measure that has a sample."""
    return tuple(_line(row, one) for row in result.rows for one in row.measures if one.samples)


def _line(row: Row, one: Measure) -> Line:
    names = dict.fromkeys(name for sample in one.samples for name in sample.details)
    details = {name: value for name in names if (value := one.detail(name)) is not None}
    median = stats.median(one.values)
    return Line(row.name, one.name, one.unit, one.better, median, stats.mad(one.values), len(one.samples), details)


class Gathering:
    """Rows on their way: what is known of each so far."""

    def __init__(self, settings: Mapping[str, Mapping[str, str]]) -> None:
        self._settings = settings
        self._samples: dict[str, dict[str, list[Sample]]] = {}
        self._kinds: dict[str, tuple[str, str]] = {}
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.counted: dict[str, Mapping[str, Any]] = {}

    def take(self, row: str, measure: str, unit: str, better: str, sample: Sample) -> None:
        """One more sample."""
        self._kinds[measure] = (unit, better)
        self._samples.setdefault(row, {}).setdefault(measure, []).append(sample)

    def over(self, row: str) -> bool:
        """Whether nothing more is to be had of a row."""
        return row in self.skipped or row in self.failed

    def rows(self) -> tuple[Row, ...]:
        """All rows, in their order."""
        return tuple(self._row(name) for name in self._settings)

    def _row(self, name: str) -> Row:
        measures = tuple(
            Measure(measure, *self._kinds[measure], tuple(samples))
            for measure, samples in self._samples.get(name, {}).items()
        )
        return Row(
            name,
            self._settings[name],
            measures,
            self.skipped.get(name, ""),
            self.failed.get(name, ""),
            self.counted.get(name),
        )
