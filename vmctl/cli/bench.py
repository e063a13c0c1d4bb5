"""vmctl bench: what virtualization costs, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vmctl import ui
from vmctl.choices import AccelChoice
from vmctl.cli import bench_io, bench_levels, bench_report
from vmctl.cli.command import Command, group
from vmctl.cli.options import ConnectOption, OutputOption, note, opened, reporter
from vmctl.ui import Output

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vmctl.bench.compare import Change, Comparison
    from vmctl.bench.popek_result import PopekResult
    from vmctl.bench.result import TrapResult
    from vmctl.bench.table import Line
    from vmctl.bench.theorems import Machine

REGRESSED = 15
_THRESHOLDS = {"io": 10.0, "net": 10.0}  # per cent
_MEASURED = {"io", "net"}  # workloads whose results are rows of samples by rounds

app = group("What virtualization costs, measured.")


def _place() -> Path:
    from vmctl import config
    from vmctl.bench import store

    return store.folder(config.folders().data)


def _complete_result(incomplete: str) -> list[str]:
    from vmctl.bench import store

    return [one.id for one in store.kept(_place()) if one.id.startswith(incomplete)]


def _complete_row(incomplete: str) -> list[str]:
    from vmctl.bench.rows import BY_NAME

    return [name for name in BY_NAME if name.startswith(incomplete)]


ResultName = Annotated[
    str,
    typer.Argument(metavar="RESULT", help="Its id, a file, or latest.", autocompletion=_complete_result),
]
ExplainOption = Annotated[bool, typer.Option("--explain", help="What each row does, and which exit it is.")]


@app.command(cls=Command)
def trap(
    row: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--row", metavar="ROW", help="Only this row; may be given again.", autocompletion=_complete_row),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three guests with short batches: a rough look.")] = False,
    guests: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--guests", metavar="N", min=1, max=100, help="Number of fresh guests; default: 5."),
    ] = None,
    accel: Annotated[AccelChoice, typer.Option("--accel", help="Which accelerator to measure.")] = AccelChoice.AUTO,
    explain: ExplainOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Measure what traps cost: CPUID, MSRs, ports, device memory, doorbells, faults, interrupts."""
    from vmctl.bench import trap as measuring

    wanted = measuring.plan(row or (), quick=quick, guests=guests)
    with opened(connect) as host:
        result = measuring.run(host, wanted, accel, reporter())
    _show_trap(result, output, explain=explain)
    note(f"kept as {result.head.id}")


def _show_trap(result: TrapResult, output: Output, *, explain: bool) -> None:
    from vmctl.bench.table import table

    lines = table(result)
    shown: dict[str, Any] = {**result.to_json(), "table": [ui.jsonable(line) for line in lines]}
    ui.emit(shown, output, lambda: _trap_text(result, lines, explain=explain), lambda: [line.name for line in lines])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _trap_text(result: TrapResult, lines: Sequence[Line], *, explain: bool) -> str:
    header = ["ROW", "NET NS", "NET", "GROSS", "MAD", "P99", "CALLS", "WAITED", "HANDLED BY"]
    rows = [
        [
            line.name,
            _number(line.net_ns) if line.net_ns else "-",
            *(_number(value) for value in (line.net_cycles, line.gross_cycles, line.mad_cycles, line.p99_cycles)),
            f"{line.calls:,}",
            "?" if line.waited_percent is None else f"{line.waited_percent:.1f} %" + ("!" if line.suspect else ""),
            line.handled_by,
        ]
        for line in lines
        if line.guests
    ]
    parts = [ui.fields(_conditions(result, lines)), ui.columns(header, rows)]
    missing = [f"{line.name}: {line.note}" for line in lines if line.note]
    if missing:
        parts.append("\n".join(ui.visible(one) for one in missing))
    if explain:
        parts.append(_explained(lines))
    return "\n\n".join(parts)


def _conditions(result: TrapResult, lines: Sequence[Line]) -> list[tuple[str, str]]:
    head, shape = result.head, result.head.dimensions
    accelerator = shape["accelerator"] + (
        ", interpreted by the kernel: not a CPU's figures" if shape["interpreted"] else ""
    )
    clocks = sorted({f"{guest.clock or 'none'}" for guest in result.guests})
    rates = [guest.khz for guest in result.guests if guest.khz]
    rate = f"{min(rates) / 1000:.3f} to {max(rates) / 1000:.3f} MHz by {', '.join(clocks)}" if rates else "unknown"
    suspect = sum(line.suspect for line in lines)
    env = head.environment
    return [
        ("result", head.id + ("" if head.complete else " (incomplete)")),
        ("accelerator", accelerator),
        ("cpu", f"{shape.get('host_cpu', '')}; the guest sees {shape.get('guest_cpu', '')}"),
        ("software", f"QEMU {env.get('qemu', '?')}, libvirt {env.get('libvirt', '?')}, {env.get('kernel', '')}"),
        ("tsc", rate),
        ("guests", f"{len({g.number for g in result.guests})}, {len(result.guests)} started"),
        ("unit", "cycles of the TSC for one call; net is gross without the empty loop and without time asked for"),
        ("waited", f"{suspect} rows above 2 % (!): the host was busy" if suspect else ""),
    ]


def _explained(lines: Sequence[Line]) -> str:
    from vmctl.bench.rows import BY_NAME

    known = [BY_NAME[line.name] for line in lines if line.name in BY_NAME]
    rows = [[row.name, row.title, row.exit, row.kvm, row.tcg, row.why] for row in known]
    return ui.columns(["ROW", "WHAT IS DONE", "EXIT (KVM)", "BY, KVM", "BY, TCG", "WHY"], rows)


@app.command("popek-goldberg", cls=Command)
def popek_goldberg(
    accel: Annotated[
        AccelChoice, typer.Option("--accel", help="Which accelerator to try; auto: every one that runs a guest.")
    ] = AccelChoice.AUTO,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Try every sensitive instruction in user mode, and tell what Popek and Goldberg's theorems come to here."""
    from vmctl.bench import popek

    with opened(connect) as host:
        result = popek.run(host, accel, reporter())
    _show_popek(result, output)
    note(f"kept as {result.head.id}")


def _show_popek(result: PopekResult, output: Output) -> None:
    from vmctl.bench import theorems

    verdicts = {one.accelerator: [ui.jsonable(s) for s in theorems.statements(one)] for one in result.machines}
    shown = {**result.to_json(), "verdicts": verdicts}
    names = lambda: [f"{one.accelerator}: {name.name}" for one in result.machines for name in one.outcomes]  # noqa: E731
    ui.emit(shown, output, lambda: _popek_text(result), names)


def _popek_text(result: PopekResult) -> str:
    env = result.head.environment
    told = [
        ("result", result.head.id + ("" if result.head.complete else " (incomplete)")),
        ("host", f"{env.get('cpu') or env.get('cpu_model', '')}, QEMU {env.get('qemu', '?')}, {env.get('kernel', '')}"),
    ]
    return "\n\n".join([ui.fields(told), *(_machine_text(machine) for machine in result.machines)])


def _machine_text(machine: Machine) -> str:
    from vmctl.bench import theorems

    what = machine.accelerator.upper() + (", interpreted by the kernel" if machine.interpreted else "")
    umip = "with UMIP" if machine.umip else "without UMIP"
    head = f"{what}: the guest sees {machine.cpu or 'a CPU without a name'}, {umip}"
    header = ["INSTRUCTION", "CPL 0", "CPL 3", "UMIP", "FINDING", "WHY"]
    parts = [head, ui.columns(header, theorems.lines(machine))]
    for one in theorems.statements(machine):
        lines = [f"{one.title} {one.holds}", f"  {one.why}", *(f"  - {line}" for line in one.evidence)]
        parts.append("\n".join(ui.visible(line) for line in lines))
    return "\n\n".join(parts)


app.command(cls=Command)(bench_io.io)
app.command(cls=Command)(bench_io.net)
app.command(cls=Command)(bench_levels.levels)
app.command(cls=Command)(bench_levels.sheet)
app.command(cls=Command)(bench_report.run)
app.command(cls=Command)(bench_report.report)


@app.command("list", cls=Command)
def list_(output: OutputOption = Output.TABLE) -> None:
    """List results, oldest first. Needs no libvirt."""
    from vmctl.bench import store

    found = store.kept(_place())
    rows = [
        [one.id, one.workload, one.accelerator, one.made, one.problem or ("yes" if one.complete else "no")]
        for one in found
    ]
    header = ["ID", "WORKLOAD", "ACCEL", "MADE", "COMPLETE"]
    ui.emit(found, output, lambda: ui.columns(header, rows), lambda: [one.id for one in found])


@app.command(cls=Command)
def show(
    result: ResultName,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="What each row does, and which exit it is; of io and net, what each column is."),
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show a result, its figures computed anew from its samples. Needs no libvirt."""
    from vmctl.bench import store

    values = store.find(_place(), result)
    if values["workload"] == "trap":
        from vmctl.bench.result import trap_of

        _show_trap(trap_of(values), output, explain=explain)
    elif values["workload"] in _MEASURED:
        from vmctl.bench.measured import measured_of

        bench_io.show(measured_of(values), output, explain=explain)
    elif values["workload"] == "popek-goldberg":
        from vmctl.bench.popek_result import popek_of

        _show_popek(popek_of(values), output)
    else:
        bench_levels.show(values, output)


@app.command(cls=Command)
def compare(
    before: ResultName,
    after: ResultName,
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--threshold",
            metavar="PERCENT",
            min=0.1,
            max=1000.0,
            help="Change that matters; default: 5, of io and net 10.",
        ),
    ] = None,
    junit: bench_report.JunitOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Tell what became slower or faster, and exit 15 when something became slower or failed. Needs no libvirt."""
    from vmctl.bench import compare as comparing
    from vmctl.bench import kinds, store

    found_ones = [store.find(_place(), name) for name in (before, after)]
    old, new = (kinds.rows_of(one) for one in found_ones)
    found = comparing.compare(old, new, threshold=(threshold or _THRESHOLDS.get(found_ones[0]["workload"], 5.0)) / 100)
    if junit:
        from vmctl.bench import junit as writing

        writing.write(junit, [writing.of_comparison(found, new.head.made)])
    changed = [change.name for change in found.changes if change.verdict is not comparing.Verdict.SAME]
    ui.emit(found, output, lambda: _compared_text(found), lambda: changed)
    if found.regressed:
        raise typer.Exit(REGRESSED)


def _compared_text(found: Comparison) -> str:
    def cells(change: Change) -> list[str]:
        ratio = f"{100 * (change.ratio - 1):+.1f} %" if change.ratio else ""
        figures = [*(_number(one) if one >= 1 else f"{one:.3g}" for one in (change.before, change.after)), change.unit]
        return [change.name, *figures, ratio, f"{change.p:.3f}", change.verdict]

    header = ["ROW", "BEFORE", "AFTER", "UNIT", "CHANGE", "P", "VERDICT"]
    told = [
        ("before", found.before),
        ("after", found.after),
        ("verdict", found.verdict),
        ("drift", f"{100 * (found.drift - 1):+.1f} % (median of all rows)"),
        ("differs", "\n".join(found.differs)),
    ]
    return ui.fields(told) + "\n\n" + ui.columns(header, [cells(change) for change in found.changes])


@app.command(cls=Command)
def schema() -> None:
    """Print the JSON Schema of results."""
    import json

    from vmctl.bench import store

    ui.say(json.dumps(store.schema(), indent=2))
