"""Results as JUnit's XML, which CI systems read: each row a test case. Pure but for the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmctl import render
from vmctl.bench import kinds, store
from vmctl.bench.compare import Comparison, Verdict
from vmctl.bench.section import Case


@dataclass(frozen=True, slots=True)
class Suite:
    """The cases of one result."""

    name: str
    made: str
    cases: tuple[Case, ...]

    @property
    def failures(self) -> int:
        """How many of them failed."""
        return sum(bool(one.failed) for one in self.cases)

    @property
    def skipped(self) -> int:
        """How many were skipped."""
        return sum(bool(one.skipped) and not one.failed for one in self.cases)


def of_result(values: Mapping[str, Any]) -> Suite:
    """The rows of a result; one that ended its guest has failed."""
    cases = kinds.BY_NAME[values["workload"]].cases(values)
    return Suite(f"{values['workload']}.{values['dimensions']['accelerator']}", values["made"], tuple(cases))


def of_comparison(found: Comparison, made: str) -> Suite:
    """The rows of a comparison; one that became slower, or is gone, has failed."""
    cases = []
    for one in found.changes:
        ratio = f"{100 * (one.ratio - 1):+.1f} %, p {one.p:.3f}" if one.ratio else ""
        bad = one.verdict in {Verdict.SLOWER, Verdict.GONE}
        told = f"{one.verdict} {ratio}".strip()
        cases.append(Case(one.name, ratio, failed=told if bad else ""))
    return Suite(f"compare.{found.before}.{found.after}", made, tuple(cases))


def problem(name: str, why: str, made: str) -> Suite:
    """A measurement that came to nothing."""
    return Suite(name, made, (Case(name, failed=why),))


def write(path: Path, suites: Sequence[Suite]) -> None:
    """Raises VmctlError where the file cannot be written."""
    text = render.junit([_clean(suite) for suite in suites])
    store.put(path, text.encode(), f"write {path}", mode=0o644)


def _clean(suite: Suite) -> Suite:
    """What guests said may hold what no XML can."""

    def plain(text: str) -> str:
        return "".join(one if one.isprintable() else "?" for one in text)

    cases = tuple(
        Case(plain(one.name), plain(one.figure), plain(one.skipped), plain(one.failed)) for one in suite.cases
    )
    return Suite(suite.name, suite.made, cases)
