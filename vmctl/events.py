"""Progress events. The core hands them to a Reporter and never prints; ui.py turns them into lines or bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias


class Step(NamedTuple):
    """One thing done or about to be done, worth a line."""

    text: str


class Warned(NamedTuple):
    """Something the user should know although the work goes on."""

    text: str
    hint: str = ""


class StageBegan(NamedTuple):
    """A named stage of a wait began. ``elapsed_s`` counts from the start of the whole wait."""

    name: str
    elapsed_s: float


class StageGoesOn(NamedTuple):
    """A named stage of a wait has not ended yet. ``elapsed_s`` counts from the start of the whole wait."""

    name: str
    elapsed_s: float


class StageDone(NamedTuple):
    """A named stage of a wait ended well after ``took_s`` seconds of its own."""

    name: str
    took_s: float
    elapsed_s: float
    detail: str = ""


class Progress(NamedTuple):
    """``done`` of ``total`` (0: unknown) units of ``unit`` ("B" for bytes) of the named work."""

    name: str
    done: int
    total: int
    unit: str = "B"


class Status(NamedTuple):
    """How the named work stands, in words; the next one of that name takes its place."""

    name: str
    text: str


Event: TypeAlias = Step | Warned | StageBegan | StageGoesOn | StageDone | Progress | Status
Reporter: TypeAlias = Callable[[Event], None]


def bytes_in_words(count: float) -> str:
    """Bytes for people, such as 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""


def stages_of(name: str, report: Reporter) -> Reporter:
    """A Reporter that says of each stage whose it is, for when several waits go on at once."""

    def named(event: Event) -> None:
        if isinstance(event, StageBegan | StageGoesOn | StageDone):
            event = event._replace(name=f"{name}: {event.name}")
        report(event)

    return named


def silent(event: Event) -> None:
    """A Reporter that drops everything."""
