"""The Reporters: progress events as lines on stderr, and on a terminal as bars."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import IO

from vmctl.events import Event, Progress, Reporter, StageBegan, StageDone, StageGoesOn, Status, Step, Warned
from vmctl.ui import Verbosity, duration, paint, size, visible

_BAR_EVERY_S = 0.1
_PLAIN_EVERY_S = 5.0


class _Lines:
    """A Reporter that writes lines, and on a terminal a bar that rewrites its own."""

    def __init__(self, stream: IO[str], *, verbosity: Verbosity) -> None:
        self._stream = stream
        self._verbosity = verbosity
        self._tty = stream.isatty()
        # By name: when it was first told of, how much was done then, and when it was last shown.
        self._bars: dict[str, tuple[float, int, float]] = {}
        self._told: dict[str, float] = {}
        self._open_line = False
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        match event:
            case _ if self._verbosity is Verbosity.QUIET:
                return
            case Warned(text, hint):
                mend = f" ({visible(hint)})" if hint else ""
                self._line(paint("note: ", "33", self._stream) + visible(text) + mend)
            case Step(text):
                self._line(visible(text))
            case StageBegan(name, elapsed_s) | StageGoesOn(name, elapsed_s) if self._tty:
                self._rewrite(f"  {name:<8} … {elapsed_s:5.1f} s so far")
            case StageBegan(name, elapsed_s) if self._verbosity is Verbosity.VERBOSE:
                self._line(f"  {name:<8} begins at {elapsed_s:.2f} s")
            case StageDone(name, took_s, elapsed_s, detail):
                self._line(f"  {name:<8} {took_s:6.2f} s   at {elapsed_s:6.2f} s   {visible(detail)}".rstrip())
            case Progress(name, done, total, unit):
                self._progress(name, done, total, unit)
            case Status(name, text):
                self._status(name, text)

    def _status(self, name: str, text: str) -> None:
        now = time.monotonic()
        if now - self._told.get(name, 0.0) < (_BAR_EVERY_S if self._tty else _PLAIN_EVERY_S):
            return
        self._told[name] = now
        (self._rewrite if self._tty else self._line)(f"{visible(name)}: {visible(text)}")

    def _progress(self, name: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        began, first, last = self._bars.get(name, (now, done, 0.0 if self._tty else now))
        if done < first:
            began, first = now, done  # begun again
        finished = bool(total) and done >= total
        if not finished and now - last < (_BAR_EVERY_S if self._tty else _PLAIN_EVERY_S):
            self._bars[name] = (began, first, last)
            return
        self._bars[name] = (began, first, now)
        text = _bar_text(visible(name), done, total, unit, done - first, now - began)
        if finished:
            self._bars.pop(name)
            if self._tty or now - began > _PLAIN_EVERY_S or self._verbosity is Verbosity.VERBOSE:
                self._line(text)
        elif self._tty:
            self._rewrite(text)
        else:
            self._line(text)

    def _rewrite(self, text: str) -> None:
        # A line that wraps could not be rewritten: each time one more would stand there.
        self._stream.write(f"\r\x1b[K{text[: os.get_terminal_size(self._stream.fileno()).columns - 1]}")
        self._stream.flush()
        self._open_line = True

    def _line(self, text: str) -> None:
        self._stream.write(("\r\x1b[K" if self._open_line else "") + text + "\n")
        self._stream.flush()
        self._open_line = False


def _bar_text(name: str, done: int, total: int, unit: str, lately: int, spent_s: float) -> str:
    amount: Callable[[float], str] = size if unit == "B" else lambda n: f"{n:.{int(0 < n < 10 and n % 1 > 0)}f} {unit}"
    rate = lately / spent_s if spent_s > 0 else 0.0
    text = f"{name}: {amount(done)}"
    if total:
        text += f" of {amount(total)} ({100 * done // total} %)"
    if rate and spent_s > 0.5:
        text += f", {amount(rate)}/s"
        if total > done:
            text += f", {duration((total - done) / rate)} to go"
    return text


def reporter(verbosity: Verbosity = Verbosity.NORMAL) -> Reporter:
    """The Reporter for this run's stderr."""
    return _Lines(sys.stderr, verbosity=verbosity)
