"""Pictures, the page, JUnit, and a run's bookkeeping."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.unit.test_bench_levels import made as levels
from tests.unit.test_bench_levels import sheet
from tests.unit.test_bench_results import made as traps
from vmctl.bench import chart_text, drawing, drawing_png, everything, junit, kinds, report, sections_measured, store
from vmctl.bench.chart import Chart, Point, scale
from vmctl.bench.everything import Clock, Run, Through
from vmctl.bench.parts import Part
from vmctl.bench.section import Case
from vmctl.bench.units import si, tick, times
from vmctl.cli import run as vmctl
from vmctl.errors import SpecError

SMALL = Chart(
    "Cost",
    "times native",
    "×",
    ("native", "tcg"),
    (("a <row>", {"native": Point(1.0), "tcg": Point(12.0, 10.0, 15.0)}), ("b", {"tcg": Point(0.0)})),
    mark=1.0,
)


def measured() -> dict[str, Any]:
    """A result of a workload whose rows have measures."""

    def samples(*values: float) -> list[dict[str, Any]]:
        return [{"round": n, "value": value, "details": {}} for n, value in enumerate(values, 1)]

    measures = [
        {"name": "read", "unit": "us", "better": "lower", "samples": samples(80.0, 90.0, 100.0)},
        {"name": "rate", "unit": "IOPS", "better": "higher", "samples": samples(11_000.0)},
    ]
    rows = [
        {"name": "virtio", "setting": {}, "skipped": "", "failed": "", "measures": measures, "counted": None},
        {"name": "sata", "setting": {}, "skipped": "no driver", "failed": "", "measures": [], "counted": None},
    ]
    return {**traps(1).head.to_json(), "id": "io-1", "workload": "io", "rows": rows}


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.21e9, "3.21 GB/s"), (230e-9, "230 nB/s"), (0.9999e-6, "1.00 µB/s"), (1234.0, "1.23 kB/s"), (0.0, "0.00 nB/s")],
)
def test_values_for_people(value: float, text: str) -> None:
    assert si(value, "B/s") == text


def test_ratios_and_marks() -> None:
    assert [times(one) for one in (1.0, 12.34, 1234.5, None)] == ["×1.00", "×12.3", "×1,234", ""]
    assert [tick(1e-6, "s"), tick(20, "%"), tick(1000, "×"), tick(0, "s")] == ["1 µs", "20 %", "×1,000", "0 s"]


@given(st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=8), st.booleans())
def test_every_value_has_its_place_and_marks_are_few(values: list[float], log: bool) -> None:
    rows = tuple((f"{n}", {"x": Point(value)}) for n, value in enumerate(values))
    axis = scale(Chart("t", "a", "s", ("x",), rows, log=log))
    assert all(0 <= axis.at(value) <= 1 for value in values)
    assert sorted(values, key=axis.at) == pytest.approx(sorted(values), rel=1e-6)
    assert 1 <= len(axis.ticks) <= 12 and all(axis.low <= one <= axis.high for one in axis.ticks)


@given(st.floats(1e-9, 1e9), st.floats(1.0, 1e4))
def test_an_axis_has_marks_enough_to_be_read(low: float, ratio: float) -> None:
    rows = (("a", {"x": Point(low)}), ("b", {"x": Point(low * ratio)}))
    axis = scale(Chart("t", "a", "s", ("x",), rows))
    assert 3 <= len(axis.ticks) <= 9, axis
    assert len({tick(one, "s") for one in axis.ticks}) == len(axis.ticks), "marks are told apart"


def test_a_chart_in_letters() -> None:
    text = chart_text.text(SMALL, 70)
    lines = text.splitlines()
    assert lines[:2] == ["Cost", "○ native  ● tcg"] and max(map(len, lines)) <= 70
    assert re.fullmatch(r"a <row> +○·+●", lines[2]) and lines[3].split() == ["b", "│"], "0 has no place on a logarithm"
    assert "×1" in lines[5] and "×10" in lines[5] and lines[6].strip() == "times native"


def test_symbols_that_meet_are_both_seen() -> None:
    rows = (("a", {"x": Point(5.0), "y": Point(5.0)}), ("b", {"x": Point(1.0), "y": Point(9.0)}))
    line = chart_text.text(Chart("t", "a", "s", ("x", "y"), rows), 60).splitlines()[2]
    assert "○●" in line


def test_nothing_to_show() -> None:
    assert "nothing to show" in chart_text.text(Chart("t", "a", "s", ("x",), (("r", {}),)))
    assert report.picture([sheet().to_json()]) is None


def test_a_chart_as_svg_is_well_formed_and_within_its_sheet() -> None:
    drawn = drawing.draw(SMALL)
    root = ET.fromstring(drawing.svg(drawn, "a & b"))
    words = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Cost", "native", "tcg", "a <row>", "×12.0", "times native"} <= set(words)
    for one in root.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 <= float(one.attrib["x"]) <= drawn.width and 0 <= float(one.attrib["y"]) <= drawn.height
    assert len({one.attrib["fill"] for one in root.iter() if one.tag.endswith(("circle", "polygon"))}) == 2


def test_a_chart_as_png() -> None:
    data = drawing_png.png(drawing.draw(SMALL))
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG" and image.size == (2 * drawing.WIDTH, round(2 * drawing.draw(SMALL).height))
    colours = {colour for _, colour in image.getcolors(1 << 20) or []}
    assert {(255, 255, 255), (0, 0, 0), (0x00, 0x72, 0xB2)} <= colours


class Page(HTMLParser):
    """What of a page is loaded from elsewhere, its tables, and its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.data: dict[str, Any] = {}
        self._name = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in {"src", "href"} and value]
        self._name = found.get("id") or "" if tag == "script" else ""

    def handle_data(self, data: str) -> None:
        if self._name:
            self.data[self._name] = json.loads(data)
            self._name = ""


def test_the_page_holds_everything() -> None:
    odd = sheet().to_json()
    odd["rows"][2]["skipped"] = "</script><b>&"
    results = [traps(1).to_json(), traps(2, accelerator="kvm", interpreted=True).to_json(), levels().to_json(), odd]
    page = Page(text := report.html(results))
    assert page.loaded == [] and "url(" not in text and "@import" not in text
    assert [page.data[one["id"]] for one in results] == [json.loads(json.dumps(one)) for one in results]
    assert page.tags.count("svg") == 3 and page.tags.count("b") == 0 and page.tags.count("h2") == 3
    assert "KVM (interpreted)" in text and "timer_wake" in text


def test_every_workload_of_the_schema_is_shown_once() -> None:
    assert sorted(kind.name for kind in kinds.KINDS) == sorted(store.schema()["properties"]["workload"]["enum"])


def test_several_of_one_accelerator_are_told_apart() -> None:
    (section,) = kinds.BY_NAME["trap"].sections([traps(1).to_json(), traps(2).to_json()])
    assert section.charts[0].series == ("TCG, trap-1", "TCG, trap-2")


def test_rows_with_measures() -> None:
    (section,) = sections_measured.titled("Disks")([measured()])
    assert [chart.unit for chart in section.charts] == ["s", "IOPS"]
    assert section.charts[0].rows[0][1]["read"] == Point(
        pytest.approx(90e-6), pytest.approx(80e-6), pytest.approx(100e-6)
    )
    assert section.tables[0].rows == (("virtio", "90.0 µs", "11.0 kIOPS"),)
    assert section.tables[1].rows == (("sata", "no driver"),)
    cases = sections_measured.cases(measured())
    assert cases[0].figure == "read 90.0 µs, rate 11.0 kIOPS" and cases[1].skipped == "no driver"


def test_user_mode_is_never_beside_the_cards() -> None:
    values = measured()
    (row, _) = values["rows"]
    values["rows"] = [row | {"name": path, "setting": {"path": path}} for path in ("tap", "user", "veth")]
    (section,) = kinds.BY_NAME["net"].sections([values])
    assert [(chart.title, [name for name, _ in chart.rows]) for chart in section.charts] == [
        ("Networks: read", ["tap", "veth"]),
        ("Networks: rate", ["tap", "veth"]),
        ("Networks, user mode: read", ["user"]),
        ("Networks, user mode: rate", ["user"]),
    ]
    assert [(table.title, len(table.rows)) for table in section.tables] == [("Medians", 2), ("Medians, user mode", 1)]


def test_junit(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    result = levels().to_json()
    result["levels"][3]["failed"] = "it said <\x01>"
    junit.write(path, [junit.of_result(result), junit.problem("io", "no image", "2026-01-01T00:00:00+00:00")])
    root = ET.parse(path).getroot()
    suite, other = root.findall("testsuite")
    assert (suite.attrib["tests"], suite.attrib["failures"], suite.attrib["skipped"]) == ("9", "1", "1")
    failure = suite.find("testcase[@name='kvm']/failure")
    assert failure is not None and failure.attrib["message"] == "it said <?>"
    assert suite.findtext("testcase[@name='shares weight 4']/system-out") == "60.0 % of 57.1 % promised"
    none = junit.of_result({**result, "shares": {"window_s": 0, "skipped": "no cgroups", "shares": []}})
    assert none.cases[-1] == Case("shares", skipped="no cgroups")
    assert other.find("testcase/failure") is not None and path.stat().st_mode & 0o044


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    place = store.folder(tmp_path / "vmctl")
    for result in (traps(1), traps(2), traps(3, slowed=1.3), levels(), sheet()):
        store.write(place, result.to_json())
    return place


def test_the_report_command(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, png, xml = (tmp_path / name for name in ("r.html", "r.png", "r.xml"))
    words = ["bench", "report", "--html", str(html), "--png", str(png), "--junit", str(xml)]
    assert vmctl(words) == 0
    out, err = capsys.readouterr()
    assert "What a trap costs" in out and "trap-3" in out and "trap-1" not in out, "the latest of each"
    assert "The cost of each level" in out and f"wrote {html}" in err
    assert set(Page(html.read_text()).data) == {"trap-3", "levels-1", "sheet-1"}
    assert Image.open(png).width > 1000 and ET.parse(xml).getroot().findall("testsuite")
    assert vmctl(["bench", "report", "sheet-1", "--png", str(tmp_path / "none.png")]) == 4
    assert vmctl(["bench", "show", "run-1"]) == 4
    assert "hint: a run: `vmctl bench report run-1`" in capsys.readouterr().err
    assert vmctl(["bench", "report", "nope"]) == 4 and vmctl(["bench", "report", "run-nope"]) == 4
    assert vmctl(["bench", "report", "--html", "/proc/none/r.html"]) == 4
    told = capsys.readouterr().err
    assert "cannot write /proc/none/r.html: there is no folder /proc/none\nhint: mkdir -p /proc/none" in told
    assert vmctl(["bench", "report", "--html", "/proc/r.html"]) == 1
    assert vmctl(["bench", "report", "--html", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}: it is a folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.png", "r.xml", "vmctl"]


def test_a_regression_is_a_failed_test_case(kept: Path, tmp_path: Path) -> None:
    path = tmp_path / "compare.xml"
    assert vmctl(["bench", "compare", "trap-1", "trap-3", "--junit", str(path)]) == 15
    failed = [
        case.attrib["name"] for case in ET.parse(path).getroot().iter("testcase") if case.find("failure") is not None
    ]
    assert failed == ["cpuid"]


def test_a_run_is_told_before_its_file_is_written(
    kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have taken long, and the file may be impossible."""
    done = Run("run-1", "2026-01-01", "test:///default", True, (), (Through("p0", "trap-1", "", 4.0),), complete=True)
    monkeypatch.setattr(everything, "run", lambda *_args, **_options: done)
    assert vmctl(["bench", "run", "--junit", "/proc/none/x.xml", "-c", "test:///default"]) == 4
    out, err = capsys.readouterr()
    assert "trap-1" in out and "kept as run-1" in err and "there is no folder /proc/none" in err


def test_a_report_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert vmctl(["bench", "report"]) == 4


# --- runs -----------------------------------------------------------------------------------------------------


def parts(*seconds: float) -> tuple[Part, ...]:
    return tuple(Part(f"p{n}", one, lambda host, report: traps(1).head) for n, one in enumerate(seconds))


def test_how_long_is_left() -> None:
    clock = Clock(parts(10, 20, 30), ())
    assert clock.left_s(("p0", "p1", "p2")) == 60
    clock.now("p0", 0.5)
    assert clock.left_s(("p0", "p1", "p2")) == 55
    clock.over(Through("p0", "r", "", 30.0))  # thrice as long as expected: so will the rest be
    clock.now("p1", 0.0)
    assert clock.left_s(("p1", "p2")) == 150
    clock.over(Through("p1", "", "not there", 0.1))
    clock.now("p2", 0.0)
    assert clock.left_s(("p2",)) == 90, "what came to nothing says nothing of the pace"
    assert Clock(parts(10, 20), (Through("p0", "r", "", 5.0),)).left_s(("p1",)) == 10


def test_only_what_is_asked_for() -> None:
    assert [part.name for part in everything.chosen(parts(1, 2), ("p1",))] == ["p1"]
    with pytest.raises(SpecError, match="there is no part p7 on this host"):
        everything.chosen(parts(1, 2), ("p7",))


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    first = everything.begin(tmp_path, "qemu:///system", (), quick=True, new=False)
    assert not first.parts
    cut = Run(first.id, first.made, first.uri, True, (), (Through("p0", "trap-1", "", 4.0),), complete=False)
    store.write(everything.folder(tmp_path), cut.to_json())
    two = replace(cut, id="run-two", only=("p0", "p1"))
    store.write(everything.folder(tmp_path), two.to_json())
    assert everything.begin(tmp_path, "qemu:///system", ("p1", "p0"), quick=True, new=False) == two, "the same parts"
    part = {"name": "p0", "result": "", "problem": "", "took_s": 1}
    damaged = [{**cut.to_json(), **one} for one in ({"parts": [{**part, "took_s": "x"}]}, {"parts": 5}, {"only": None})]
    for number, text in enumerate(["{", "[" * 99999, "[]", *map(json.dumps, damaged)]):
        (everything.folder(tmp_path) / f"broken{number}.json").write_text(text)
    assert everything.begin(tmp_path, "qemu:///system", (), quick=True, new=False) == cut
    for other in (
        everything.begin(tmp_path, "qemu:///system", (), quick=True, new=True),
        everything.begin(tmp_path, "qemu:///system", (), quick=False, new=False),
        everything.begin(tmp_path, "qemu:///system", ("p1",), quick=True, new=False),
        everything.begin(tmp_path, "qemu:///session", (), quick=True, new=False),
    ):
        assert other.id != cut.id and not other.parts
