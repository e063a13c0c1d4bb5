"""Calls of libvirt that have no deadline of their own, made by a thread: who asked waits as long as it likes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_STEP_S = 0.2  # an interrupt that another thread is given is heard between two


class Waiting(Generic[T]):
    """A call on its way. One given up goes on by itself, and what comes of it is heard by nobody."""

    def __init__(self, call: Callable[[], T]) -> None:
        """Begin it."""
        self._answers: queue.Queue[T | Exception] = queue.Queue()
        self._call = call
        threading.Thread(target=self._run, name="waiting", daemon=True).start()

    def _run(self) -> None:
        try:
            self._answers.put(self._call())
        except Exception as error:  # noqa: BLE001  raised by who waits
            self._answers.put(error)

    def answer(self, within_s: float) -> T | None:
        """What came of it; None when nothing has by then. Raises its error."""
        deadline = time.monotonic() + max(0.0, within_s)
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                found = self._answers.get(timeout=min(_STEP_S, left))
            except queue.Empty:
                if left:
                    continue
                return None
            if isinstance(found, Exception):
                raise found
            return found
