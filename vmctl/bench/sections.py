"""The results of each workload as sections. One that is added has its functions and a line in kinds.py. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vmctl.bench import units
from vmctl.bench.chart import Chart, Point
from vmctl.bench.levels_result import BY_NAME, LevelsResult, figures, levels_of, told
from vmctl.bench.popek_result import popek_of
from vmctl.bench.result import TrapResult, trap_of
from vmctl.bench.section import Case, Section, Table, facts
from vmctl.bench.sensitive import Finding
from vmctl.bench.sheet_result import entries, sheet_of
from vmctl.bench.table import Line, table
from vmctl.bench.theorems import Statement, lines, statements

Values = Mapping[str, Any]


# --- traps ------------------------------------------------------------------------------------------------------


def traps(results: Sequence[Values]) -> list[Section]:
    """Trap tables of several accelerators beside each other in one picture."""
    found = [trap_of(values) for values in results]
    names = [_accelerator(one) for one in found]
    series = tuple(
        name if names.count(name) == 1 else f"{name}, {one.head.id}" for one, name in zip(found, names, strict=True)
    )
    points: dict[str, dict[str, Point]] = {}
    for result, name in zip(found, series, strict=True):
        for line in table(result):
            row = points.setdefault(line.name, {})
            if line.guests and line.net_ns > 0:
                row[name] = Point(line.net_ns * 1e-9)
    rows = tuple((name, row) for name, row in points.items() if row)
    chart = Chart("What a trap costs", "time of one call, without the loop around it", "s", series, rows)
    return [
        Section(
            "Traps",
            tuple(one for values in results for one in facts(values)),
            (chart,) if rows else (),
            tuple(_trap_table(one, name) for one, name in zip(found, series, strict=True)),
            ("A row is the median of its guests' medians; `vmctl bench show --explain` says what each does.",),
        )
    ]


def _accelerator(result: TrapResult) -> str:
    shape = result.head.dimensions
    return str(shape["accelerator"]).upper() + (" (interpreted)" if shape["interpreted"] else "")


def _trap_table(result: TrapResult, name: str) -> Table:
    header = ("row", "net", "net cycles", "gross cycles", "MAD", "p99", "calls", "waited", "handled by")
    return Table(f"Traps under {name}", header, tuple(_trap_row(line) for line in table(result)))


def _trap_row(line: Line) -> tuple[str, ...]:
    if not line.guests:
        return (line.name, *[""] * 7, line.note)
    waited = "?" if line.waited_percent is None else f"{line.waited_percent:.1f} %{'!' if line.suspect else ''}"
    cycles = (line.net_cycles, line.gross_cycles, line.mad_cycles, line.p99_cycles)
    net = units.si(line.net_ns * 1e-9, "s") if line.net_ns else "-"
    return (line.name, net, *(f"{one:,.1f}" for one in cycles), f"{line.calls:,}", waited, line.handled_by)


def trap_cases(values: Values) -> list[Case]:
    """Its rows as test cases."""
    return [
        Case(one.name, units.si(one.net_ns * 1e-9, "s"), "" if one.guests else one.note)
        if not _failed(values, one.name)
        else Case(one.name, failed=one.note)
        for one in table(trap_of(values))
    ]


def _failed(values: Values, name: str) -> bool:
    return any(row["name"] == name and row["failed"] for row in values["rows"])


# --- Popek and Goldberg ---------------------------------------------------------------------------------------


def popek(results: Sequence[Values]) -> list[Section]:
    """Instructions, theorems and properties, and how long the workload takes where."""
    series = ("guest's kernel", "guest's user mode")
    rows: list[tuple[str, Mapping[str, Point]]] = []
    tables: list[Table] = []
    for machine in (machine for values in results for machine in popek_of(values).machines):
        name = machine.accelerator.upper() + (" (interpreted)" if machine.interpreted else "")
        works = zip(series, (machine.work, machine.work_user), strict=True)
        native = machine.native_ticks
        rows.append((name, {level: Point(work.ticks / native) for level, work in works if work and native}))
        header = ("instruction", "CPL 0", "CPL 3", "UMIP", "finding", "why")
        tables.append(Table(f"Sensitive instructions under {name}", header, tuple(map(tuple, lines(machine)))))
        told_ = tuple(row for one in statements(machine) for row in _with_evidence(one))
        tables.append(Table(f"Theorems and properties, {name}", ("statement", "holds", "why, and the evidence"), told_))
    title, axis = "Efficiency: one workload", "time, in times of a process's"
    chart = Chart(title, axis, units.TIMES, series, tuple(rows), mark=1.0)
    drawn = (chart,) if chart.used() else ()
    about = tuple(one for values in results for one in facts(values))
    return [Section("Popek and Goldberg", about, drawn, tuple(tables))]


def _with_evidence(one: Statement) -> list[tuple[str, ...]]:
    """A statement's line, and one for each piece of its evidence."""
    return [(one.title, one.holds, one.why), *((" ", " ", f"- {line}") for line in one.evidence)]  # "" would say: none


def popek_cases(values: Values) -> list[Case]:
    """Each instruction on each accelerator as a test case."""
    return [
        Case(
            f"{machine.accelerator} {one.name}",
            one.finding,
            one.note if one.finding == Finding.ABSENT else "",
            one.note if one.finding == Finding.FAILED else "",
        )
        for machine in popek_of(values).machines
        for one in machine.outcomes
    ]


# --- levels ---------------------------------------------------------------------------------------------------


def levels(results: Sequence[Values]) -> list[Section]:
    """The cost of each level against native in one picture, and fair shares."""
    return [_levels(levels_of(values), values) for values in results]


def _levels(result: LevelsResult, values: Values) -> Section:
    found, names = figures(result), tuple(level.name for level in result.levels)
    rows = tuple(
        (
            BY_NAME[row].title,
            {name: Point(one.times, one.least, one.most) for name, one in by_level.items() if one.times is not None},
        )
        for row, by_level in found.items()
        if row in BY_NAME
    )
    chart = Chart(
        "The cost of each level of virtualization", "time, in times of native", units.TIMES, names, rows, mark=1
    )
    measured = [level.name for level in result.levels if level.rows]
    cells = tuple(
        (
            BY_NAME[row].title,
            *(
                f"{told(BY_NAME[row], by[name].ns)}  {units.times(by[name].times)}{'!' if by[name].suspect else ''}"
                if name in by
                else ""
                for name in measured
            ),
        )
        for row, by in found.items()
        if row in BY_NAME
    )
    where = Table(
        "Levels",
        ("level", "what it is", "how", "took", "not measured, because"),
        tuple(
            (one.name, one.title, one.detail, f"{one.took_s:.1f} s" if one.rows else "", one.skipped or one.failed)
            for one in result.levels
        ),
    )
    charts, tables = [chart], [Table("Figures, and times native", ("row", *measured), cells), where]
    suspect = sum(one.suspect for by in found.values() for one in by.values())
    notes = (
        [f"{suspect} figures waited for a CPU for more than 2 % of their time (!): the host was busy."]
        if suspect
        else []
    )
    notes += ["A figure is the quickest part of all rounds; whiskers reach to the quickest part of the worst round."]
    if result.shares and result.shares.shares:
        promised, got = _shares(result)
        charts.append(promised)
        tables.append(got)
    elif result.shares:
        notes.append(f"Fair shares were not measured: {result.shares.skipped}")
    return Section("Levels", facts(values), tuple(charts), tuple(tables), tuple(notes))


def _shares(result: LevelsResult) -> tuple[Chart, Table]:
    assert result.shares
    lines_ = result.shares.lines()
    rows = tuple(
        (f"weight {weight}", {"promised": Point(100 * promised), "received": Point(100 * got)})
        for weight, promised, got in lines_
    )
    title = "Fair shares of one CPU"
    chart = Chart(title, "share of the CPU time of all", units.PERCENT, ("promised", "received"), rows, log=False)
    cells = tuple(
        (f"{weight}", f"{100 * promised:.1f} %", f"{100 * got:.1f} %", f"{100 * (got / promised - 1):+.1f} %")
        for weight, promised, got in lines_
    )
    return chart, Table(title, ("weight", "promised", "received", "off by"), cells)


def levels_cases(values: Values) -> list[Case]:
    """Each row on each level as a test case, and each share; a level that is not there is one of its own."""
    found: list[Case] = []
    result = levels_of(values)
    for level in result.levels:
        if not level.rows:
            found.append(Case(level.name, skipped=level.skipped, failed=level.failed))
        for row in level.rows:
            ns = level.ns(row.name)
            figure = told(BY_NAME[row.name], ns) if ns and row.name in BY_NAME else ""
            found.append(Case(f"{level.name} {row.name}", figure, row.skipped))
        if level.rows and level.failed:
            found.append(Case(level.name, failed=level.failed))
    if result.shares and result.shares.skipped:
        found.append(Case("shares", skipped=result.shares.skipped))
    for weight, promised, got in result.shares.lines() if result.shares else ():
        found.append(Case(f"shares weight {weight}", f"{100 * got:.1f} % of {100 * promised:.1f} % promised"))
    return found


# --- the sheet of an instance -----------------------------------------------------------------------------------


def sheets(results: Sequence[Values]) -> list[Section]:
    """The sheet of each VM."""
    return [_sheet(values) for values in results]


def _sheet(values: Values) -> Section:
    result = sheet_of(values)
    rows = tuple((one.name, one.told(), one.note) for one in entries(result))
    return Section(f"Sheet of {result.vm}", facts(values), (), (Table("", ("what", "value", "how"), rows),))


def sheet_cases(values: Values) -> list[Case]:
    """Each line of the sheet as a test case."""
    return [Case(one.name, one.told(), one.note if one.value is None else "") for one in entries(sheet_of(values))]
