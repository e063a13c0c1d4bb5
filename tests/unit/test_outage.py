"""Whether a guest answers, at an address of this machine's: a refusal is an answer."""

from __future__ import annotations

import time

from vmctl.outage import Probe


def test_an_answer_before_is_none_after() -> None:
    probe = Probe("127.0.0.1")
    with probe:
        assert probe.answers(5)
        assert probe.answers_again(5)
    assert not probe.answers_again(0.05), "it no longer knocks"


def test_an_answer_again_is_waited_for_no_longer_than_it_takes() -> None:
    with Probe("127.0.0.1") as probe:
        assert probe.answers(5)
        began = time.monotonic()
        assert probe.answers_again(60)
        assert time.monotonic() - began < 30
