"""Popek and Goldberg: what tries prove, what follows from them, and that all of it is kept."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl import json_schema
from vmctl.accel import Check, KvmFindings, Verdict, choose
from vmctl.bench import popek, popek_words, store, theorems
from vmctl.bench.popek_result import PopekResult, popek_of
from vmctl.bench.popek_words import Reach, Work
from vmctl.bench.result import Head
from vmctl.bench.sensitive import BY_NAME, INSTRUCTIONS, Finding, Kind, Origin, Try, finding
from vmctl.bench.theorems import Machine, outcome, statements
from vmctl.choices import AccelChoice
from vmctl.cli import run as vmctl

SOURCE = (Path(popek.__file__).parents[1] / "baremetal/sensitive.c").read_text()
GP = Try(vector=13)
JUDGED = (("rdpid", "skipped"), ("lar", "failure"))
UMIP = {"sgdt", "sidt", "sldt", "smsw", "str"}


def as_on_a_cpu(name: str, *, umip: bool) -> dict[str, Try]:
    """What a CPU shows."""
    known = BY_NAME[name]
    kernel = Try(value=7)
    user = Try(value=7 if known.shows is None else known.shows)
    if known.origin is Origin.PRIVILEGED or name == "rdtsc_tsd":
        user = GP
    return {"kernel": kernel, "user": user} | ({"umip": GP if name in UMIP else user} if umip else {})


def machine(**changes: object) -> Machine:
    """KVM with a CPU's help, all of it as it should be."""
    outcomes = tuple(outcome(one.name, as_on_a_cpu(one.name, umip=True), "", "") for one in INSTRUCTIONS)
    work = Work(0xABC, 1_050, 200)
    made = Machine(
        "kvm", False, "CPU", "KVMKVMKVM", True, True, outcomes, work, work, 0xABC, 1_000, 6_500, Reach(9, 0, 0), 0.2
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def verdicts(one: Machine) -> list[str]:
    return [statement.holds for statement in statements(one)]


def test_the_list_is_the_papers_and_the_guests() -> None:
    ours = {one.mnemonic.split()[0] for one in INSTRUCTIONS if one.origin is Origin.ROBIN_IRVINE} - {"IRET"}
    paper = "SGDT SIDT SLDT SMSW PUSHF POPF LAR LSL VERR VERW POP PUSH CALL JMP INT RET STR MOV"
    assert ours == set(paper.split()) and len(ours) == 18
    table = SOURCE.partition("const struct attempt attempts[]")[2]
    assert re.findall(r'^    \{"(\w+)"', table, re.MULTILINE) == [one.name for one in INSTRUCTIONS]


def test_a_trap_in_user_mode_only_is_what_privileged_means() -> None:
    for one in INSTRUCTIONS:
        assert finding(one, Try(value=1), GP) is Finding.PRIVILEGED
        assert finding(one, GP, GP) is Finding.FAULTY


def test_no_trap_is_not_yet_a_proof() -> None:
    sgdt, popf, mov_cs, hlt, add = (BY_NAME[name] for name in ("sgdt", "popf", "mov_cs", "hlt", "add"))
    assert finding(sgdt, Try(value=5), Try(value=5)) is Finding.SILENT, "it told the kernel's own value"
    assert finding(sgdt, Try(value=5), Try(value=6)) is Finding.FOREIGN
    assert finding(popf, Try(value=0), Try(value=0x200)) is Finding.SILENT, "ignored in user mode only"
    assert finding(popf, Try(value=0), Try(value=0)) is Finding.UNPROVED
    assert finding(mov_cs, Try(value=8), Try(value=0x23)) is Finding.SILENT
    assert finding(mov_cs, Try(value=8), Try(value=0x33)) is Finding.FOREIGN, "a selector that is not the guest's"
    assert finding(hlt, Try(value=0), Try(value=0)) is Finding.SILENT
    assert finding(BY_NAME["syscall"], Try(value=8), Try(value=0x33)) is Finding.FOREIGN, "led to a kernel that is none"
    assert finding(BY_NAME["wrgsbase"], Try(value=0x1000), Try(value=0)) is Finding.FOREIGN, "the kernel saw no change"
    assert finding(BY_NAME["wrpkru"], Try(value=0), Try(value=0)) is Finding.FOREIGN, "nor here"
    assert finding(add, Try(value=42), Try(value=42)) is Finding.INNOCUOUS
    assert finding(add, Try(value=42), Try(value=41)) is Finding.UNPROVED


def test_a_cpu_with_help() -> None:
    one = machine()
    assert verdicts(one) == ["no", "no", "no", "yes", "yes", "yes"] and theorems.proves_itself(one) == []
    without, with_umip = theorems.silent(one, umip=False), theorems.silent(one, umip=True)
    assert {BY_NAME[name].mnemonic for name in UMIP} == set(without) - set(with_umip)
    assert "RDTSC, CR4.TSD" not in without and "POPF" in with_umip
    assert "POPF" not in theorems.silent(one, umip=False, user_only=True)
    assert "give the guest such registers of its own" in statements(one)[0].why
    assert any("97.0149 %" in line for line in statements(one)[3].evidence), "200 of 6,700"


def test_a_machine_that_fulfils_the_condition() -> None:
    good = tuple(
        outcome(one.name, {"kernel": Try(value=1), "user": Try(value=1) if one.kind is Kind.NONE else GP}, "", "")
        for one in INSTRUCTIONS
    )
    assert verdicts(machine(outcomes=good))[:3] == ["yes", "yes", "yes"]
    but_one = tuple(outcome("lar", {}, "", "the guest ended") if one.name == "lar" else one for one in good)
    found = statements(machine(outcomes=but_one))
    assert [one.holds for one in found[:3]] == ["unknown"] * 3, "what ended the guest may trap, or not"
    clac = tuple(outcome("clac", {}, "", "the guest ended") if one.name == "clac" else one for one in good)
    evidence = statements(machine(outcomes=clac))[0].evidence
    assert "23 of 23 instructions that are privileged by design do trap" in evidence, "of CLAC it is not known"
    assert found[4].holds == "unknown" and "end the guest, and no program on a CPU: LAR" in found[4].evidence


def test_a_translator() -> None:
    slow = Work(0xABC, 15_000, 200)
    found = statements(machine(accelerator="tcg", work=slow, work_user=slow))
    assert (found[3].holds, found[4].holds) == ("no", "yes")
    assert "translated" in found[0].why and "15.0 times" in found[3].why


def test_a_kernel_interpreted_and_user_code_let_through() -> None:
    """What the machine does on which this was written."""
    shown = {**as_on_a_cpu("mov_cs", umip=False), "user": Try(value=0x33)}
    lax = {**as_on_a_cpu("rdtsc_tsd", umip=False), "user": Try(value=7)}
    changed = {"mov_cs": shown, "rdtsc_tsd": lax}
    outcomes = tuple(
        outcome(one.name, changed.get(one.name, as_on_a_cpu(one.name, umip=False)), "", "") for one in INSTRUCTIONS
    )
    one = machine(interpreted=True, umip=False, outcomes=outcomes, work=Work(0xABC, 15_000_000, 200))
    found = statements(one)
    assert [statement.holds for statement in found] == ["no", "no", "no", "in user mode", "no", "yes"]
    assert "hybrid" in found[0].why and "price shows under equivalence" in found[2].why
    assert "MOV from CS at CPL 3 shows 0x33, a CPU 0x23" in found[4].evidence
    assert "do not trap though a CPU does: RDTSC, CR4.TSD" in found[4].evidence
    wholly = statements(replace(one, work_user=one.work))
    assert wholly[3].holds == "no" and "interprets them" in wholly[0].why


def test_other_results_and_memory_that_answers_are_seen() -> None:
    assert verdicts(machine(work=Work(0xABD, 1_000, 200)))[4] == "no"
    assert verdicts(machine(work_user=Work(0xABD, 1_000, 200)))[4] == "no"
    assert verdicts(machine(reach=Reach(9, 1, 0)))[5] == "no" and verdicts(machine(reach=Reach(9, 0, 1)))[5] == "no"


def test_what_could_not_be_tried_is_unknown() -> None:
    failed = tuple(outcome(one.name, {}, "", "the guest ended") for one in INSTRUCTIONS)
    one = machine(outcomes=failed, work=None, work_user=None, reach=None, ended_in_s=None)
    assert verdicts(one) == ["unknown"] * 6
    assert verdicts(machine(ended_in_s=None))[5] == "unknown" and verdicts(machine(native_ticks=0))[3] == "unknown"
    assert verdicts(machine(ended_in_s=None, reach=Reach(9, 1, 0)))[5] == "no", "what it got, it got"
    some = replace(one, outcomes=(*machine().outcomes[:5], *failed[5:]))
    assert any(line.startswith("not known, for they ended the guest: POPF") for line in statements(some)[0].evidence)


def test_contradictions_are_named() -> None:
    odd = tuple(outcome(n, {"kernel": Try(value=0), "user": Try(value=0)}, "", "") for n in ("popf", "add"))
    assert theorems.proves_itself(machine(outcomes=odd)) == ["popf"]


SAID = b"""vmctl-popek 1
brand A CPU
umip 1
try sgdt
kernel silent 0x100
user silent 0x100
umip trap 13
tried
try rdpid
skip this CPU has no RDPID
try lar
kernel silent 0x1
"""


def test_a_guest_that_ended_in_an_instruction() -> None:
    said = popek_words.read(SAID)
    assert said.tries["sgdt"] == {"kernel": Try(value=256), "user": Try(value=256), "umip": GP}
    assert said.skipped == {"rdpid": "this CPU has no RDPID"} and said.begun == "lar" and not said.done
    more = popek_words.read(SAID + b"tried\nwork 5 6 7\nwork_user 5 8 7\nreach 1 2 3\nspin\ndone\nhal")
    assert (more.work, more.work_user, more.reach) == (Work(5, 6, 7), Work(5, 8, 7), Reach(1, 2, 3))
    assert more.spins and more.done and not more.begun


@given(st.binary(max_size=200))
def test_anything_can_be_read(noise: bytes) -> None:
    popek_words.read(noise)
    popek_words.read(b"vmctl-popek 1\ntry sgdt\n" + noise + b"\nuser silent \xff\nkernel trap\nwork 1 2\n")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PopekResult:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    missing = outcome("rdpid", {}, "this CPU has none", "")
    ended = outcome("lar", {"kernel": Try(value=1)}, "", "the guest ended")
    whole = machine(outcomes=(*machine().outcomes[:6], missing, ended), work_user=Work(2**64 - 1, 5, 0))
    head = Head("popek-goldberg-1", "popek-goldberg", "2026-01-01T00:00:00+00:00", "0", True,
                {"accelerator": "kvm", "interpreted": False}, {"qemu": "7.2"})  # fmt: skip
    result = PopekResult(head, (whole, machine(accelerator="tcg", reach=None, work=None)))
    store.write(store.folder(tmp_path / "vmctl"), result.to_json())
    return result


def test_kept_shown_and_not_compared(kept: PopekResult, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert popek_of(store.find(store.folder(tmp_path / "vmctl"), "latest")) == kept
    assert vmctl(["bench", "show", "latest", "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert json_schema.errors(store.schema(), shown) == [] and len(shown["verdicts"]["kvm"]) == 6
    assert vmctl(["bench", "show", "latest"]) == 0
    text = capsys.readouterr().out
    assert "theorem 1" in text and "trap #GP" in text and "the guest ended" in text
    page = tmp_path / "page.html"
    xml = tmp_path / "junit.xml"
    assert vmctl(["bench", "report", "latest", "--html", str(page), "--junit", str(xml)]) == 0
    suite = ET.parse(xml).getroot()[0]
    skipped, failed = (suite.find(f"testcase[@name='kvm {name}']/{what}") for name, what in JUDGED)
    assert skipped is not None and skipped.attrib["message"] == "this CPU has none"
    assert failed is not None and (suite.attrib["skipped"], suite.attrib["failures"]) == ("1", "1")
    told, written = capsys.readouterr().out, unescape(page.read_text())
    for machine in kept.machines:
        for one in statements(machine):
            assert one.title in told and one.why in written
            assert all(line in told and line in written for line in one.evidence), one
    assert "Efficiency: one workload" in told and "<svg" in written
    assert vmctl(["bench", "compare", "latest", "latest"]) == 2
    assert "no figures that could be" in capsys.readouterr().err
    assert vmctl(["bench", "popek-goldberg", "-c", "test:///default"]) == 8


@pytest.mark.parametrize(
    ("asked", "verdict", "wanted"),
    [
        (AccelChoice.AUTO, Verdict.WORKS, ("tcg", "kvm")),
        (AccelChoice.AUTO, Verdict.INTERPRETED, ("tcg", "kvm")),
        (AccelChoice.AUTO, Verdict.ABSENT, ("tcg",)),
        (AccelChoice.AUTO, Verdict.HANGS, ("tcg",)),
        (AccelChoice.TCG, Verdict.WORKS, ("tcg",)),
        (AccelChoice.KVM, Verdict.INTERPRETED, ("kvm",)),
        (AccelChoice.REQUIRE_KVM, Verdict.WORKS, ("kvm",)),
    ],
)
def test_every_accelerator_that_runs_a_guest(
    asked: AccelChoice, verdict: Verdict, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = KvmFindings(verdict, (Check("guest-probe", "ok", "detail"),))
    monkeypatch.setattr(popek, "decide_accel", lambda _host, choice: choose(choice, found))
    assert popek.accelerators(None, asked)[1] == wanted  # type: ignore[arg-type]
