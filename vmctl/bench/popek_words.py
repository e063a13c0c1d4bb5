"""What the guest of Popek and Goldberg says on its serial line, read. The guest's side is baremetal/popek.c. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmctl.bench.sensitive import Try

GREETING = "vmctl-popek 1"


@dataclass(frozen=True, slots=True)
class Work:
    """The workload: a digest of its results, the ticks it took, and the sensitive instructions of its second run."""

    digest: int
    ticks: int
    interventions: int


@dataclass(frozen=True, slots=True)
class Reach:
    """Beyond its memory: places looked at, those that answered, and those that kept what was written."""

    looked: int
    answered: int
    kept: int


@dataclass(slots=True)
class Said:
    """All that one guest said, whole lines only. ``begun`` is the instruction it was at and did not get over."""

    greeted: bool = False
    facts: dict[str, str] = field(default_factory=dict)
    tries: dict[str, dict[str, Try]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    begun: str = ""
    work: Work | None = None
    work_user: Work | None = None
    reach: Reach | None = None
    spins: bool = False
    trapped: str = ""
    done: bool = False


_FACTS = ("cpu", "brand", "hypervisor", "signature", "umip", "vmx", "svm")
_LEVELS = ("kernel", "user", "umip")


def read(said: bytes) -> Said:
    """Read what has come so far; half a line at the end is left out."""
    found = Said()
    for line in said[: said.rfind(b"\n") + 1].decode("ascii", "replace").splitlines():
        words = line.split()
        if line.strip() == GREETING:
            found = Said(greeted=True)
        elif found.greeted and words:
            _take(found, words[0], words[1:], line.strip())
    return found


def _take(found: Said, word: str, rest: list[str], line: str) -> None:
    if word == "try" and rest:
        found.begun = rest[0]
        found.tries[found.begun] = {}
    elif word in _LEVELS and len(rest) == 2 and found.begun:
        if (tried := _try(*rest)) is not None:
            found.tries[found.begun][word] = tried
    elif word == "skip":
        found.skipped[found.begun] = " ".join(rest)
        found.tries.pop(found.begun, None)
        found.begun = ""
    elif word == "tried":
        found.begun = ""
    elif word in _FACTS:
        found.facts[word] = " ".join(rest)
    elif word == "work" and (numbers := _numbers(rest)):
        found.work = Work(*numbers)
    elif word == "work_user" and (numbers := _numbers(rest)):
        found.work_user = Work(*numbers)
    elif word == "reach" and (numbers := _numbers(rest)):
        found.reach = Reach(*numbers)
    elif word == "unexpected":
        found.trapped = line
    elif word == "spin":
        found.spins = True
    elif word == "done":
        found.done = True


def _numbers(words: list[str]) -> list[int]:
    return [int(word) for word in words] if len(words) == 3 and all(w.isascii() and w.isdigit() for w in words) else []


def _try(what: str, number: str) -> Try | None:
    try:
        return Try(vector=int(number)) if what == "trap" else Try(value=int(number, 16))
    except ValueError:
        return None
