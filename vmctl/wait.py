"""Bounded waiting. Every wait in vmctl goes through here, so that none can hang and each can say why it ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from vmctl.errors import WaitTimeout

T = TypeVar("T")


def wait_until(
    probe: Callable[[], T | None],
    *,
    what: str,
    timeout_s: float,
    interval_s: float = 0.1,
    growth: float = 1.0,
    evidence: Callable[[], Sequence[str]] = tuple,
    hint: str = "",
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call ``probe`` until it returns something other than None or False, and return that.

    Probes at least once, also when ``timeout_s`` is 0, and once more at the very end, so that a slow probe
    cannot make a ready thing look late. Raises WaitTimeout with the lines of ``evidence``; whatever the probe
    raises goes straight through. Each pause is ``growth`` times as long as the one before.
    """
    began = clock()
    deadline = began + timeout_s
    while True:
        last = clock() >= deadline
        found = probe()
        if found is not None and found is not False:
            return found
        if last:
            raise WaitTimeout(what, after_s=clock() - began, evidence=evidence(), hint=hint)
        sleep(max(0.0, min(interval_s, deadline - clock())))
        interval_s *= growth


class Worker(threading.Thread):
    """A thread that can be waited for again after an interrupt.

    Python 3.11 takes a thread for ended when an interrupt comes while it is joined (bpo-45274): whoever then waits for
    the end of what was cancelled, to clear up after it, would do so while it goes on.
    """

    def __init__(self, work: Callable[[], object], name: str) -> None:
        super().__init__(target=work, name=name, daemon=True)
        self._over = threading.Event()

    def run(self) -> None:
        """Do the work."""
        try:
            super().run()
        finally:
            self._over.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, ``timeout`` seconds at most."""
        self._over.wait(timeout)

    def is_alive(self) -> bool:
        """Whether it was begun, and has not ended."""
        return self.ident is not None and not self._over.is_set()


def pause(seconds: float) -> None:
    """Let ``seconds`` pass between two looks at something that is watched without end."""
    time.sleep(seconds)
