"""Calls of libvirt that have no deadline of their own, made by a thread: who asked waits as long as it likes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import libvirt


class Waiting:
    """A call on its way. One given up goes on by itself, and what comes of it is heard by nobody."""

    def __init__(self, call: Callable[[], str]) -> None:
        """Begin it."""
        self._answers: queue.Queue[str | libvirt.libvirtError] = queue.Queue()
        self._call = call
        threading.Thread(target=self._run, name="waiting", daemon=True).start()

    def _run(self) -> None:
        try:
            self._answers.put(self._call())
        except libvirt.libvirtError as error:
            self._answers.put(error)

    def answer(self, within_s: float) -> str | None:
        """What came of it; None when nothing has by then. Raises its libvirtError."""
        try:
            found = self._answers.get(timeout=max(0.0, within_s))
        except queue.Empty:
            return None
        if isinstance(found, str):
            return found
        raise found
