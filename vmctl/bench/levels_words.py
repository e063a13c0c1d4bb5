"""What the program of the levels says, read. Its own side is baremetal/levels.c and sheet.c. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmctl.bench.result import RowResult, Run

GREETING = "vmctl-levels 1"


@dataclass(slots=True)
class Said:
    """All that was said, whole lines only. ``begun`` is the row it was at last and did not end; "" for none."""

    greeted: bool = False
    runs: dict[str, list[Run]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    has: dict[str, int] = field(default_factory=dict)
    begun: str = ""
    wrong: str = ""
    done: bool = False

    def ended_rows(self) -> int:
        """How many rows of how many rounds are through."""
        return sum(len(runs) for runs in self.runs.values()) + len(self.skipped)

    def rows(self) -> tuple[RowResult, ...]:
        """The rows in the order they came in; the ticks of their runs are nanoseconds, their calls units."""
        names = {**self.runs, **self.skipped}
        return tuple(RowResult(name, tuple(self.runs.get(name, ())), self.skipped.get(name, "")) for name in names)


def read(said: bytes) -> Said:
    """Read what has come so far; what firmware and kernels say before and between is left out."""
    found, round_, units, waited = Said(), 1, 0, -1
    for raw in said[: said.rfind(b"\n") + 1].decode("ascii", "replace").splitlines():
        line = raw.strip()
        word, _, rest = line.partition(" ")
        if line == GREETING:
            found = Said(greeted=True)
        elif word == "wrong":  # an outer guest says it before any greeting
            found.wrong = rest
        elif not found.greeted:
            continue
        elif word == "round":
            round_ = _number(rest)
        elif word == "row":
            found.begun, units, waited = rest, 0, -1
        elif word == "units":
            units = _number(rest)
        elif word == "waited":
            waited = _number(rest)
        elif word == "ns":
            parts = tuple(_number(one) for one in rest.split())
            if found.begun and units and parts and all(parts):
                percent = None if waited < 0 else round(min(100.0, 100 * waited / sum(parts)), 1)
                found.runs.setdefault(found.begun, []).append(Run(round_, units, parts, waited_percent=percent))
            else:
                found.wrong = f"what it said of {found.begun or 'a row'} cannot be read"
            found.begun = ""
        elif word == "skip":
            found.skipped[found.begun], found.begun = rest, ""
        elif word == "has":
            name, _, value = rest.partition(" ")
            found.has[name] = _number(value)
        elif line == "done":
            found.done = True
    return found


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0
