"""Levels and the sheet of an instance: what the program says, figures against native, and results kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmctl import json_schema
from vmctl.bench import kinds, levels, levels_words, store
from vmctl.bench.compare import compare
from vmctl.bench.levels_result import BY_NAME, Level, LevelsResult, Share, Shares, figures, levels_of, told
from vmctl.bench.result import Head, RowResult, Run
from vmctl.bench.sheet_result import SheetResult, entries, sheet_of
from vmctl.cli import run as vmctl
from vmctl.errors import SpecError

SAID = b"""SeaBIOS (version)
row not-ours
vmctl-levels 1
round 1
row syscall
units 100
waited 1500
ns 9000 10000 11000
row file_create
skip there is no tmpfs to make files in
round 2
row syscall
units 100
ns 20000 21000 19000
row pipe
units 65536
ns 1"""


def head(workload: str, **dimensions: Any) -> Head:
    shape = {"accelerator": "tcg", "interpreted": False, "host_cpu": "x"} | dimensions
    return Head(f"{workload}-1", workload, "2026-01-01T00:00:01+00:00", "0", True, shape, {"qemu": "7.2", "cpus": 2})


def rows(factor: float) -> tuple[RowResult, ...]:
    def runs(cost: float) -> tuple[Run, ...]:
        return tuple(Run(n, 100, tuple(int(100 * cost * factor + part) for part in range(4))) for n in range(1, 6))

    return (RowResult("syscall", runs(100.0)), RowResult("pipe", runs(0.25)))


def made(factor: float = 7.0) -> LevelsResult:
    return LevelsResult(
        head("levels"),
        (
            Level("native", "process of this machine", rows=rows(1.0)),
            Level("container", "container", skipped="no LXC driver"),
            Level("tcg", "guest", "2 vCPUs", rows(factor), took_s=3.0),
            Level("kvm", "guest on KVM", failed="it said nothing for 20 s"),
        ),
        Shares(10.0, (Share(1, 1.5), Share(2, 2.5), Share(4, 6.0))),
    )


def sheet() -> SheetResult:
    timed = (
        RowResult("cpu", (Run(1, 2_000_000, (1_000_000, 1_000_000, 9_000_000)),)),
        RowResult("ram", (Run(1, 100, (10_000,)),)),
        RowResult("disk_write", skipped="no file past the page cache in /var/tmp: Invalid argument"),
        RowResult("disk_latency", (Run(1, 1, (100_000, 100_000, 400_000)),)),
    )
    has = {"cores": 2, "ram_bytes": 512 << 20, "disk_bytes": 1 << 30, "uptime_s": 75}
    return SheetResult(head("sheet"), "web1", "/var/tmp", has, timed)


def test_what_the_program_says() -> None:
    said = levels_words.read(SAID)
    assert said.greeted and not said.done and said.begun == "pipe", "half a line at the end is not read"
    assert said.ended_rows() == 3
    assert said.rows() == (
        RowResult("syscall", (Run(1, 100, (9000, 10000, 11000), 0, 5.0), Run(2, 100, (20000, 21000, 19000)))),
        RowResult("file_create", skipped="there is no tmpfs to make files in"),
    )


@pytest.mark.parametrize("line", [b"ns 1 0 2\n", b"ns\n", b"ns 1 x\n", b"units 0\nns 5\n"])
def test_what_makes_no_sense_is_wrong(line: bytes) -> None:
    said = levels_words.read(b"vmctl-levels 1\nround 1\nrow pipe\nunits 5\n" + line)
    assert not said.runs and said.wrong == "what it said of pipe cannot be read"


def test_an_outer_guest_that_cannot_run_the_inner_one() -> None:
    assert levels_words.read(b"wrong the inner QEMU ended with 1\n").wrong == "the inner QEMU ended with 1"


def test_figures_are_against_the_native_median() -> None:
    found = figures(made())
    assert found["syscall"]["native"].times == 1.0 and found["syscall"]["tcg"].times == pytest.approx(7, rel=0.01)
    tcg = found["pipe"]["tcg"]
    assert tcg.ns == pytest.approx(1.75) and tcg.least is not None and tcg.most is not None
    assert set(found["syscall"]) == {"native", "tcg"}, "what was not measured has no figure"
    assert told(BY_NAME["syscall"], 100.0) == "100 ns" and told(BY_NAME["pipe"], 0.25) == "4.00 GB/s"


def test_without_native_there_is_no_ratio() -> None:
    found = figures(replace(made(), levels=made().levels[1:]))
    assert found["syscall"]["tcg"].ns and found["syscall"]["tcg"].times is None
    assert kinds.BY_NAME["levels"].sections([replace(made(), levels=made().levels[1:]).to_json()])


def test_shares() -> None:
    shares = made().shares
    assert shares is not None
    assert [line[:2] for line in shares.lines()] == [(1, 1 / 7), (2, 2 / 7), (4, 4 / 7)]
    assert [line[2] for line in shares.lines()] == [0.15, 0.25, 0.6]


@pytest.mark.parametrize("shares", [None, Shares(skipped="no cgroups"), made().shares])
def test_kept_and_found_again(tmp_path: Path, shares: Shares | None) -> None:
    result = replace(made(), shares=shares)
    store.write(tmp_path, result.to_json())
    assert levels_of(store.find(tmp_path, "levels-1")) == result
    store.write(tmp_path, sheet().to_json())
    assert sheet_of(store.find(tmp_path, "sheet-1")) == sheet()


def test_two_can_be_compared_level_by_level() -> None:
    found = compare(made(), made(9.0))
    assert {one.name: str(one.verdict) for one in found.changes} == {
        "native syscall": "same",
        "native pipe": "same",
        "tcg syscall": "slower",
        "tcg pipe": "slower",
    }
    native, _container, tcg, _kvm = made().levels
    failed = replace(made(), levels=(native, replace(tcg, rows=(), failed="it said nothing")))
    gone = {one.name: str(one.verdict) for one in compare(made(), failed).changes}
    assert gone["tcg syscall"] == gone["tcg pipe"] == "only before" and compare(made(), failed).regressed
    less = compare(made(), replace(made(), levels=(native,)))
    assert less.verdict == "2 not measured" and not less.regressed, "a level that nobody asked for"
    with pytest.raises(SpecError, match="no figures that could be"):
        kinds.rows_of(sheet().to_json())


def test_the_sheet() -> None:
    lines = {one.name: one for one in entries(sheet())}
    told_ = {name: one.told() for name, one in lines.items()}
    assert (told_["cores"], told_["RAM"], told_["disk"], told_["uptime"]) == ("2", "512.0 MiB", "1.0 GiB", "75 s")
    assert told_["CPU"] == "2.00 GFLOP/s" and told_["RAM operations"] == "10.0 M/s"
    assert told_["average latency"] == "200 µs" and told_["maximal latency"] == "400 µs"
    assert lines["disk, write"].value is None and "Invalid argument" in lines["disk, write"].note
    assert lines["disk, read"].note == "it was not measured"


def test_what_is_asked_for() -> None:
    quick = levels.plan((), (), quick=True)
    assert quick.levels == tuple(levels.LEVELS) and quick.window_s and quick.order.rounds == 3
    some = levels.plan(("tcg",), ("pipe",), quick=False)
    assert some.levels == ("native", "tcg") and not some.window_s and some.order.rows == ("pipe",)
    with pytest.raises(SpecError) as caught:
        levels.plan(("tgc",), ("pip",), quick=False)
    assert "no level is called tgc" in caught.value.message and "no row is called pip" in caught.value.message


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    place = store.folder(tmp_path / "vmctl")
    for result in (made(), sheet()):
        store.write(place, result.to_json())
    assert vmctl(["bench", "show", "levels-1"]) == 0
    out = capsys.readouterr().out
    assert "system call" in out and "×7.00" in out and "it said nothing for 20 s" in out and "weight 4" in out
    assert vmctl(["bench", "show", "sheet-1", "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert json_schema.errors(store.schema(), shown) == [] and shown["table"][0]["figure"] == "2"
    assert vmctl(["bench", "compare", "levels-1", "levels-1"]) == 0
    assert vmctl(["bench", "compare", "levels-1", "sheet-1"]) == 2
    assert vmctl(["bench", "levels", "-c", "test:///default"]) == 8
    assert vmctl(["bench", "levels", "--level", "nope"]) == 2
    assert vmctl(["bench", "sheet", "nope", "-c", "test:///default"]) == 4
    assert vmctl(["bench", "sheet", "test", "--folder", "here", "-c", "test:///default"]) == 2
