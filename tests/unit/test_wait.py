"""What is waited for."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from vmctl.wait import Worker


def test_a_worker_goes_on_when_who_waits_is_interrupted() -> None:
    end, heard = threading.Event(), threading.Event()
    worker = Worker(end.wait, "waits")
    assert not worker.is_alive(), "it was not begun"

    def raise_once(*_: object) -> None:
        if not heard.is_set():
            heard.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        while not heard.wait(0.01):  # one that comes just before the wait begins would not end it
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, raise_once)
    worker.start()
    try:
        for wait in (None, 60.0):
            heard.clear()
            interrupter = Worker(interrupt, "interrupts")
            with pytest.raises(KeyboardInterrupt):
                interrupter.start()
                worker.join(wait)
            interrupter.join()
            assert worker.is_alive()
    finally:
        signal.signal(signal.SIGINT, before)
        end.set()
    worker.join()
    assert not worker.is_alive()
