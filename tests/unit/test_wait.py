"""What is waited for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from vmctl.at_once import beside
from vmctl.errors import WaitTimeout
from vmctl.hypervisor.waiting import Patient
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


def test_a_call_that_does_not_come_back_is_not_made_again_meanwhile() -> None:
    back, calls = threading.Event(), []

    def call() -> int:
        calls.append(1)
        back.wait(60)
        return len(calls)

    patient = Patient(0.01)
    for _ in range(3):
        with pytest.raises(WaitTimeout, match="the answer: not after"):
            patient.answer("key", call, "the answer")
    assert len(calls) == 1
    back.set()
    found = None
    while found is None:
        with suppress(WaitTimeout):
            found = patient.answer("key", call, "the answer")
    assert found == 1 and len(calls) == 1, "the one that was late"
    assert Patient(60).answer("key", lambda: None, "") is None


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
