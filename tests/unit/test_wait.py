"""What is waited for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vmctl.at_once import beside
from vmctl.wait import Worker


@contextmanager
def interrupted() -> Iterator[threading.Event]:
    """Ctrl-C, once, as soon as the block waits. What is yielded says that it was heard, and asks for one more."""
    heard, over = threading.Event(), threading.Event()

    def raise_once(*_: object) -> None:
        if not heard.is_set():
            heard.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        while not over.wait(0.01):  # one that comes just before the wait begins would not end it
            if not heard.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, raise_once)
    interrupter = Worker(interrupt, "interrupts")
    try:
        heard.set()
        interrupter.start()
        yield heard
    finally:
        over.set()
        interrupter.join()
        signal.signal(signal.SIGINT, before)


def test_a_worker_goes_on_when_who_waits_is_interrupted() -> None:
    end = threading.Event()
    worker = Worker(end.wait, "waits")
    assert not worker.is_alive(), "it was not begun"
    worker.start()
    try:
        with interrupted() as heard:
            for wait in (None, 60.0):
                with pytest.raises(KeyboardInterrupt):
                    heard.clear()
                    worker.join(wait)
                assert worker.is_alive()
    finally:
        end.set()
    worker.join()
    assert not worker.is_alive()


def test_what_is_done_beside_a_block_has_ended_after_it_also_when_its_wait_is_interrupted() -> None:
    end, over = threading.Event(), threading.Event()

    def work() -> None:
        end.wait(60)
        over.set()

    with interrupted() as heard, pytest.raises(KeyboardInterrupt), beside(work) as result:
        heard.clear()
        try:
            result()
        finally:
            threading.Timer(0.05, end.set).start()
    assert over.is_set()
