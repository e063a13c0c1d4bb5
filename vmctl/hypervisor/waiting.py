"""Calls of libvirt that have no deadline of their own, made by a thread: who asked waits as long as it likes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar, cast

from vmctl.errors import WaitTimeout

T = TypeVar("T")
_STEP_S = 0.2  # an interrupt that another thread is given is heard between two


class Patient:
    """Calls that may not come back: each waited for within a time, and not made again while the last one is on its way.

    Else whoever looks again and again would keep one of libvirtd's threads busy with each look, until it has none left.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._asked: dict[Hashable, Waiting[list[Any]]] = {}

    def answer(self, key: Hashable, call: Callable[[], T], what: str) -> T:
        """What the call of that key comes to. Raises its error, and WaitTimeout when it is not back in time."""
        asked = self._asked.pop(key, None) or Waiting(lambda: [call()])
        found = asked.answer(self._patience_s)
        if found is None:
            self._asked[key] = asked
            raise WaitTimeout(what, after_s=self._patience_s)
        return cast("T", found[0])


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
