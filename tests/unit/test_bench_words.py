"""What a trap guest says, whole and cut off; what is known of rows; waiting laid to rows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl.bench import trap, words
from vmctl.bench.environment import Waiting
from vmctl.bench.rows import BASE, BY_NAME, ROWS, handled_by
from vmctl.bench.words import Batch
from vmctl.errors import SpecError

SAID = b"""SeaBIOS (version 1)\r
vmctl-trap 1
cpu GenuineIntel
brand Some CPU @ 2 GHz
hypervisor TCGTCGTCGTCG
clock hpet 2300000
row loop
calls 10
ticks 100 110 120
row timer_wake
calls 2
asked 50000
ticks 9 9
row vmcall
skip no hypervisor that takes calls
row self_ipi
wrong 7 interrupts did not come
row int
"""
SOURCE = (Path(words.__file__).parents[1] / "baremetal/rows.c").read_text()


def test_a_guest_that_ended_in_a_row() -> None:
    said = words.read(SAID)
    assert said.facts["brand"] == "Some CPU @ 2 GHz" and (said.clock_source, said.khz) == ("hpet", 2300000)
    assert said.batches == {"loop": Batch(10, (100, 110, 120)), "timer_wake": Batch(2, (9, 9), 50000)}
    assert said.skipped == {"vmcall": "no hypervisor that takes calls"} and "self_ipi" in said.wrong
    assert said.begun == "int" and not said.done and said.ended_rows == 4
    assert words.read(SAID + b"unexpected trap 13 at 0x1000\n").trapped == "unexpected trap 13 at 0x1000"
    assert words.read(SAID + b"calls 1\nticks 5\ndone\n").done


def test_half_a_line_is_not_yet_said() -> None:
    assert "int" not in words.read(SAID + b"calls 3\nticks 12").batches
    assert words.read(b"vmctl-trap 1\ndon").done is False and not words.read(b"SeaBIOS\n").greeted


def test_nonsense_is_told_and_not_counted() -> None:
    for ticks in (b"ticks", b"ticks 1 x 3", b"ticks 0"):
        said = words.read(b"vmctl-trap 1\nrow cpuid\ncalls 4\n" + ticks + b"\n")
        assert not said.batches and "cannot be read" in said.wrong["cpuid"]


@given(st.binary(max_size=300))
def test_anything_can_be_read(noise: bytes) -> None:
    words.read(noise)
    words.read(b"vmctl-trap 1\nrow cpuid\n" + noise)


def test_the_guest_and_the_catalogue_have_the_same_rows_in_the_same_order() -> None:
    table = SOURCE.partition("const struct row rows[]")[2]
    assert re.findall(r'^    \{"(\w+)"', table, re.MULTILINE) == [row.name for row in ROWS]


def test_who_answers() -> None:
    port = BY_NAME["in_user"]
    assert handled_by(port, "tcg", interpreted=False) == "device model"
    assert handled_by(port, "kvm", interpreted=False) == "QEMU"
    assert handled_by(port, "kvm", interpreted=True) == "kernel's interpreter and QEMU"
    assert handled_by(BY_NAME["nops"], "kvm", interpreted=True) == "kernel's interpreter"


def test_the_plan() -> None:
    assert trap.plan((), quick=False, guests=None).guests == 5
    some = trap.plan(("cpuid",), quick=True, guests=7)
    assert some.rows == (BASE, "cpuid") and some.guests == 7 and some.parts < trap.Plan().parts
    assert trap.Plan().parts * trap.Plan().part_us >= 50_000, "a batch is at least 50 ms"
    # Half of the 20 s, and 5 s, that a run may take is for starting guests and for finding out how many calls to make.
    for one, most_s in ((trap.Plan(), 20), (trap.QUICK, 5)):
        assert one.guests * len(one.rows) * one.parts * one.part_us / 1e6 < 0.6 * most_s, one
    with pytest.raises(SpecError) as caught:
        trap.plan(("cpuid", "nope", "neither"), quick=False, guests=None)
    assert "nope" in caught.value.message and "neither" in caught.value.message and "cpuid" in caught.value.hint


def test_waiting_is_laid_to_the_rows_it_fell_on() -> None:
    times = iter((0.0, 1.0, 2.0, 3.0, 4.0))
    waiting = Waiting(lambda: next(times))
    for reading, rows in ((0.0, {"a"}), (0.0, {"a"}), (0.5, {"a", "b"}), (0.6, {"b"})):
        waiting.look(reading)
        waiting.during(rows)
    assert waiting.percent("a") == 25.0 and waiting.percent("b") == 30.0 and waiting.percent("c") is None
    waiting.look(None)
    waiting.during({"c"})
    assert waiting.percent("c") is None
