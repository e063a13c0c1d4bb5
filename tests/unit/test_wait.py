"""What is waited for."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from vmctl.wait import Worker


def test_a_worker_goes_on_when_who_waits_is_interrupted() -> None:
    end = threading.Event()
    worker = Worker(end.wait, "waits")
    assert not worker.is_alive(), "it was not begun"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    worker.start()
    try:
        for wait in (None, 60.0):
            joining = threading.Event()

            def interrupt(joining: threading.Event = joining) -> None:
                joining.wait()
                os.kill(os.getpid(), signal.SIGINT)

            Worker(interrupt, "interrupts").start()
            with pytest.raises(KeyboardInterrupt):
                joining.set()
                worker.join(wait)
            assert worker.is_alive()
    finally:
        signal.signal(signal.SIGINT, before)
        end.set()
    worker.join()
    assert not worker.is_alive()
