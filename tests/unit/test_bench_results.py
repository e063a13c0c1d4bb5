"""Results: kept and found again, their table, and what a comparison says of two of them."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmctl.bench import store
from vmctl.bench.compare import Verdict, compare
from vmctl.bench.result import Guest, Head, RowResult, Run, TrapResult, trap_of
from vmctl.bench.table import table
from vmctl.cli import run as vmctl
from vmctl.errors import NotFound, SpecError

KHZ = 2_000_000  # 2 cycles are 1 ns
COSTS = {"loop": 20.0, "cpuid": 120.0, "timer_wake": 100_220.0, "in_user": 2000.0}


def made(seed: int, *, guests: int = 5, slowed: float = 1.0, **dimensions: Any) -> TrapResult:
    """A result with some per cent of noise between guests and parts, and at times a part with a gap in it."""
    numbers = random.Random(seed)
    shape = {"accelerator": "tcg", "interpreted": False, "host_cpu": "x"} | dimensions
    head = Head(f"trap-{seed}", "trap", f"2026-01-01T00:00:{seed:02d}+00:00", "0", True, shape, {"qemu": "7.2"})
    rows = []
    for name, cost in COSTS.items():
        cost *= slowed if name == "cpuid" else 1.0
        runs = []
        for guest in range(1, guests + 1):
            mine = cost * numbers.uniform(0.99, 1.01)
            ticks = tuple(
                int(100 * mine * numbers.uniform(0.99, 1.01)) + (9_000_000 if numbers.random() < 0.1 else 0)
                for _ in range(40)
            )
            runs.append(Run(guest, 100, ticks, 50_000 if name == "timer_wake" else 0, 1.0))
        rows.append(RowResult(name, tuple(runs)))
    rows.append(RowResult("vmcall", skipped="no KVM"))
    return TrapResult(head, tuple(Guest(n, KHZ, "hpet", 1.0, "done") for n in range(1, guests + 1)), tuple(rows))


def test_the_table() -> None:
    lines = {line.name: line for line in table(made(1))}
    cpuid = lines["cpuid"]
    assert cpuid.gross_cycles == pytest.approx(120, rel=0.02) and cpuid.net_cycles == pytest.approx(100, rel=0.03)
    assert cpuid.net_ns == pytest.approx(50, rel=0.03) and cpuid.calls == 5 * 40 * 100 and cpuid.guests == 5
    assert cpuid.mad_cycles < 5 and cpuid.p99_cycles > 1000, "gaps move the 99th percentile and nothing else"
    # What the row asked for, 50 us or 100,000 cycles, is not its cost.
    assert lines["timer_wake"].net_cycles == pytest.approx(200, abs=1500)
    assert lines["vmcall"].note == "no KVM" and lines["vmcall"].guests == 0
    assert lines["loop"].net_cycles == 0 and cpuid.handled_by == "translator's helper"


def test_a_vcpu_that_had_to_wait_is_told() -> None:
    result = made(1)
    row = replace(result.rows[1], runs=(replace(result.rows[1].runs[0], waited_percent=2.5), *result.rows[1].runs[1:]))
    line = table(replace(result, rows=(result.rows[0], row)))[1]
    assert (line.waited_percent, line.suspect) == (2.5, True) and not table(result)[1].suspect


def verdicts(before: TrapResult, after: TrapResult) -> dict[str, Verdict]:
    return {change.name: change.verdict for change in compare(before, after).changes}


def test_twice_the_same_is_no_change() -> None:
    for seed in range(10, 30, 2):
        found = compare(made(seed), made(seed + 1))
        assert found.verdict == "no change" and not found.regressed, found


def test_a_slowed_row_is_found_and_only_that() -> None:
    found = compare(made(1), made(2, slowed=1.1))
    assert found.verdict == "1 slower" and found.regressed and abs(found.drift - 1) < 0.05
    assert verdicts(made(1), made(2, slowed=1.1))["cpuid"] is Verdict.SLOWER
    assert verdicts(made(2, slowed=1.1), made(1))["cpuid"] is Verdict.FASTER


def test_a_small_change_is_none_however_sure() -> None:
    assert set(verdicts(made(1), made(2, slowed=1.03)).values()) == {Verdict.SAME}


def test_few_guests_cannot_tell() -> None:
    assert verdicts(made(1, guests=3), made(2, guests=3, slowed=2.0))["cpuid"] is Verdict.UNCLEAR
    assert not compare(made(1, guests=3), made(2, guests=3, slowed=2.0)).regressed


def test_a_row_that_is_gone_is_a_regression() -> None:
    less = made(2)
    less = replace(less, rows=tuple(RowResult("cpuid", failed="x") if r.name == "cpuid" else r for r in less.rows))
    assert verdicts(made(1), less)["cpuid"] is Verdict.GONE and compare(made(1), less).regressed
    assert verdicts(less, made(1))["cpuid"] is Verdict.NEW and not compare(less, made(1)).regressed


def test_a_row_that_nobody_asked_for_is_none() -> None:
    """As after `--row`, or an interrupt: another row's figures are no worse for it."""
    less = made(2)
    less = replace(less, rows=tuple(row for row in less.rows if row.name in {"loop", "cpuid"}))
    found = compare(made(1), less)
    assert found.verdict == "2 not measured" and not found.regressed
    assert verdicts(made(1), less)["in_user"] is Verdict.LEFT_OUT
    cut = replace(made(2), rows=tuple(RowResult(r.name) if r.name == "in_user" else r for r in made(2).rows))
    assert verdicts(made(1), cut)["in_user"] is Verdict.LEFT_OUT and not compare(made(1), cut).regressed


def test_what_the_hosts_memory_makes_is_no_regression() -> None:
    def named(result: TrapResult) -> TrapResult:
        rows = tuple(replace(row, name="touch_first") if row.name == "cpuid" else row for row in result.rows)
        return replace(result, rows=rows)

    found = compare(named(made(1)), named(made(2, slowed=20.0)))
    assert {change.name: change.verdict for change in found.changes}["touch_first"] is Verdict.MOMENT
    assert found.verdict == "no change" and not found.regressed


def test_unlike_dimensions_are_refused_with_all_their_names() -> None:
    with pytest.raises(SpecError) as caught:
        compare(made(1), made(2, accelerator="kvm", host_cpu="y"))
    assert "accelerator is tcg before and kvm after" in caught.value.message and "host_cpu" in caught.value.message


def test_kept_and_found_again(tmp_path: Path) -> None:
    first, second = made(1), made(2)
    for result in (second, first):
        store.write(tmp_path, result.to_json())
    assert trap_of(store.find(tmp_path, "trap-1")) == first
    assert [one.id for one in store.kept(tmp_path)] == ["trap-1", "trap-2"]
    assert store.find(tmp_path, "latest")["id"] == "trap-2"
    assert store.find(tmp_path, str(tmp_path / "trap-1.json"))["id"] == "trap-1"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["trap-1.json", "trap-2.json"]


def test_names_never_clash(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        names.append(store.new_id(tmp_path, "trap", "2026-01-02T03:04:05+00:00"))
        store.write(tmp_path, {"id": names[-1]})
    assert names == ["trap-20260102-030405", "trap-20260102-030405-2", "trap-20260102-030405-3"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"id": 1}', '{"workload": "trap", "format": 1}', "[" * 99999])
def test_what_is_no_result_is_refused_and_listed_as_such(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(SpecError):
        store.find(tmp_path, "broken")
    (one,) = store.kept(tmp_path)
    assert one.id == "broken" and one.problem


def test_every_part_of_a_result_is_checked(tmp_path: Path) -> None:
    whole = made(1).to_json()
    whole["rows"][0]["runs"][0]["ticks"][3] = -1
    del whole["guests"][0]["khz"]
    store.write(tmp_path, whole)
    with pytest.raises(SpecError) as caught:
        store.find(tmp_path, "trap-1")
    assert "khz" in caught.value.message and "rows.0.runs.0.ticks.3" in caught.value.message


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity", "9" * 400, "9" * 5000, "1e-300"])
@pytest.mark.parametrize(
    "place", [("guests", 0, "khz"), ("rows", 1, "runs", 0, "waited_percent"), ("rows", 1, "extra")]
)
def test_a_number_that_is_none_of_a_measurement(tmp_path: Path, number: str, place: tuple[str | int, ...]) -> None:
    values = made(1).to_json()
    inner: Any = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "HERE"
    (tmp_path / "trap-1.json").write_text(json.dumps(values).replace('"HERE"', number))
    with pytest.raises(SpecError, match="is no figure of a measurement"):
        store.find(tmp_path, "trap-1")


@pytest.mark.parametrize("environment", [{"load": "busy"}, {"load": ["x"]}, {"storage": "ext4"}])
def test_conditions_that_are_shown_are_checked(tmp_path: Path, environment: dict[str, Any]) -> None:
    store.write(tmp_path, {**made(1).to_json(), "environment": environment})
    with pytest.raises(SpecError, match=r"environment\."):
        store.find(tmp_path, "trap-1")


def test_the_latest_of_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        store.find(tmp_path, "latest")
    with pytest.raises(NotFound):
        store.find(tmp_path, "nope")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    place = store.folder(tmp_path / "vmctl")
    for result in (made(1), made(2), made(3, slowed=1.2), made(4, accelerator="kvm")):
        store.write(place, result.to_json())
    return place


def test_the_commands(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(kept / "pipe.json")
    assert vmctl(["bench", "list", "-o", "name"]) == 0
    assert capsys.readouterr().out.split() == ["trap-1", "trap-2", "trap-3", "trap-4"]
    assert vmctl(["bench", "show", "trap-1", "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"][1]["runs"] and shown["table"][1]["name"] == "cpuid"
    from vmctl import json_schema

    assert json_schema.errors(store.schema(), shown) == []
    assert vmctl(["bench", "show", "trap-1", "--explain"]) == 0
    assert "always exits" in capsys.readouterr().out
    assert vmctl(["bench", "compare", "trap-1", "trap-2"]) == 0
    assert "no change" in capsys.readouterr().out
    assert vmctl(["bench", "compare", "trap-1", "trap-3", "-o", "json"]) == 15
    assert json.loads(capsys.readouterr().out)["verdict"] == "1 slower"
    assert vmctl(["bench", "compare", "trap-3", "trap-1"]) == 0, "faster is no regression"
    assert vmctl(["bench", "compare", "trap-1", "trap-3", "--threshold", "50"]) == 0
    assert vmctl(["bench", "compare", "trap-1", "trap-3", "--threshold", "nan"]) == 2
    assert "'nan' is not a number" in capsys.readouterr().err
    assert vmctl(["bench", "compare", "trap-1", "trap-4"]) == 2
    assert "cannot compare" in capsys.readouterr().err
    assert vmctl(["bench", "schema"]) == 0 and json.loads(capsys.readouterr().out) == store.schema()
    assert vmctl(["bench", "trap", "--row", "nope", "-c", "test:///default"]) == 2
    assert vmctl(["bench", "trap", "-c", "test:///default"]) == 8
