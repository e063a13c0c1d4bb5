"""What the trap guest says on its serial line, read. The guest's side is baremetal/traps.c. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

GREETING = "vmctl-trap 1"


@dataclass(frozen=True, slots=True)
class Batch:
    """One row measured by one guest: calls in each part, ticks that each part took, and ns that the row asked for."""

    calls: int
    ticks: tuple[int, ...]
    asked_ns: int = 0


@dataclass(slots=True)
class Said:
    """All that one guest said, whole lines only. ``begun`` is the row it was at last and did not end; "" for none."""

    greeted: bool = False
    facts: dict[str, str] = field(default_factory=dict)
    clock_source: str = ""
    khz: int = 0
    batches: dict[str, Batch] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    begun: str = ""
    refused: str = ""
    trapped: str = ""
    done: bool = False

    @property
    def ended_rows(self) -> int:
        """How many rows are through, one way or the other."""
        return len(self.batches) + len(self.skipped) + len(self.wrong)


_FACTS = ("cpu", "brand", "hypervisor", "signature", "invariant_tsc")


def read(said: bytes) -> Said:
    """Read what has come so far. Lines of firmware before the greeting, and half a line at the end, are left out."""
    found = Said()
    calls = asked = 0
    for line in said[: said.rfind(b"\n") + 1].decode("ascii", "replace").splitlines():
        word, _, rest = line.strip().partition(" ")
        if line.strip() == GREETING:
            found = Said(greeted=True)
        elif not found.greeted:
            continue
        elif word in _FACTS:
            found.facts[word] = rest.strip()
        elif word == "clock":
            source, _, khz = rest.partition(" ")
            found.clock_source, found.khz = ("" if source == "none" else source), _number(khz)
        elif word == "row":
            found.begun, calls, asked = rest, 0, 0
        elif word == "calls":
            calls = _number(rest)
        elif word == "asked":
            asked = _number(rest)
        elif word == "ticks":
            ticks = tuple(_number(one) for one in rest.split())
            if calls and ticks and all(ticks):
                found.batches[found.begun] = Batch(calls, ticks, asked)
            else:
                found.wrong[found.begun] = "what the guest said of it cannot be read"
            found.begun = ""
        elif word in {"skip", "wrong"}:
            (found.skipped if word == "skip" else found.wrong)[found.begun] = rest
            found.begun = ""
        elif word == "refuse":
            found.refused = rest
        elif word == "unexpected":
            found.trapped = line.strip()
        elif word == "done":
            found.done = True
    return found


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0
