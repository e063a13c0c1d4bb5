"""A series of runs: which, in which order, what became of them, and the table of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.faults.phases import Phase
from tests.faults.strikes import PHASES, SLOW, Fault

_SLOW_EVERY = 4


class Run(NamedTuple):
    """One of a series; all that is left to chance in it comes from ``random``."""

    number: int
    fault: Fault
    phase: Phase
    random: Random
    direct: bool | None = None


def runs(seed: int) -> Iterator[Run]:
    """Without end: each fault in each of its phases, shuffled; then again, the slow ones every fourth time."""
    number = around = 0
    while True:
        cells = [
            (fault, phase)
            for fault, phases in PHASES.items()
            for phase in phases
            if fault not in SLOW or around % _SLOW_EVERY == 0
        ]
        Random(f"{seed}:{around}").shuffle(cells)
        for fault, phase in cells:
            yield Run(number, fault, phase, Random(f"{seed}/{number}"))
            number += 1
        around += 1


def read(log: Path) -> list[dict[str, Any]]:
    """The runs that a file tells of."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def table(records: list[dict[str, Any]]) -> str:
    """Of each fault in each phase, in Markdown: how often it was survived, of how many; what the others came to."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for one in records:
        counts[one["fault"], one["phase"], one["outcome"]] += 1
    lines = ["| | " + " | ".join(Phase) + " |", "|---" * (len(Phase) + 1) + "|"]
    for fault in Fault:
        cells = [_cell(counts, fault, phase) for phase in Phase]
        lines.append(f"| {fault} | " + " | ".join(cells) + " |")
    every = Counter(one["outcome"] for one in records if one["outcome"] != "missed")
    total = sum(every.values())
    took = sorted(one["took_s"] for one in records if one["outcome"] != "missed")
    words = f"{total} runs: {every['kept']} kept, {every['lost']} lost as they had to be and as it was told, "
    words += f"{every['torn']} torn by QEMU, {every['failed']} failed"
    if took:
        words += f"; vmctl ended after {took[len(took) // 2]:.1f} s (median), {took[-1]:.1f} s at most"
    return "\n".join(lines) + f"\n\n{words}"


def _cell(counts: Counter[tuple[str, str, str]], fault: Fault, phase: Phase) -> str:
    kept, lost, torn, failed = (counts[fault, phase, outcome] for outcome in ("kept", "lost", "torn", "failed"))
    if not kept + lost + torn + failed:
        return "" if phase in PHASES[fault] else "–"
    words = [f"{kept}/{kept + lost + torn + failed}", f"{lost} lost" if lost else "", f"{torn} torn" if torn else ""]
    return ", ".join(word for word in words if word)
