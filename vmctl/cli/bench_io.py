"""vmctl bench io and net: what an I/O costs, of a disk and of a network card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from vmctl import ui
from vmctl.choices import AccelChoice
from vmctl.cli.options import ConnectOption, OutputOption, note, opened, reporter
from vmctl.errors import SpecError
from vmctl.ui import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from enum import StrEnum

    from vmctl.bench.measured import Line, Measured, Row

QuickOption = Annotated[bool, typer.Option("--quick", help="One short round of fewer rows: a rough look.")]
RoundsOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--rounds", metavar="N", min=1, max=100, help="Looks at each row; default: 5."),
]
AccelOption = Annotated[AccelChoice, typer.Option("--accel", help="Which accelerator to measure.")]
ExplainOption = Annotated[bool, typer.Option("--explain", help="What each column is.")]


def _kinds(name: str) -> type[StrEnum]:
    from vmctl.bench import links, setups

    found: dict[str, type[StrEnum]] = {
        "path": links.Way,
        "card": links.Card,
        "device": setups.Device,
        "backend": setups.Backend,
        "cache": setups.Cache,
        "aio": setups.Aio,
    }
    return found[name]


def _words(name: str) -> list[str]:
    return [word for word in _kinds(name) if word != "host"]


def _axis(name: str, help: str) -> Any:
    def complete(incomplete: str) -> list[str]:
        return [word for word in _words(name) if word.startswith(incomplete)]

    return typer.Option(f"--{name}", metavar=name.upper(), help=help, autocompletion=complete)


def _chosen(**given: list[str] | None) -> dict[str, list[Any]]:
    """What was named of each axis. Raises SpecError with every word that is none."""
    problems: list[str] = []
    found: dict[str, list[Any]] = {}
    for name, words in given.items():
        unknown = [word for word in words or [] if word not in _words(name)]
        problems += [f"no {name} is called {word} (there are {', '.join(_words(name))})" for word in unknown]
        found[name] = [_kinds(name)(word) for word in words or [] if word not in unknown]
    if problems:
        raise SpecError("cannot measure", problems=problems)
    return found


def io(
    device: Annotated[Optional[list[str]], _axis("device", "Only this device; may be given again.")] = None,  # noqa: UP045
    backend: Annotated[Optional[list[str]], _axis("backend", "Only this backend; may be given again.")] = None,  # noqa: UP045
    cache: Annotated[Optional[list[str]], _axis("cache", "Only this cache mode; may be given again.")] = None,  # noqa: UP045
    aio: Annotated[Optional[list[str]], _axis("aio", "Only this way of I/O; may be given again.")] = None,  # noqa: UP045
    iothread: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--iothread/--no-iothread", help="Only with, or only without, a thread of the disk's own."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every combination (of what is named): hours.")] = False,
    quick: QuickOption = False,
    rounds: RoundsOption = None,
    length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--length", metavar="MS", min=50, max=60_000, help="Of each job, in ms; default: 300."),
    ] = None,
    size: Annotated[int, typer.Option("--size", metavar="MIB", min=8, max=65_536, help="Of each disk, in MiB.")] = 64,
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--folder", metavar="DIR", help="Where to put the disks' files; default: where VMs have theirs."),
    ] = None,
    accel: AccelOption = AccelChoice.AUTO,
    explain: ExplainOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Measure what disk I/O costs: devices, formats, caches, ways of I/O, beside the host's own."""
    named = _chosen(device=device, backend=backend, cache=cache, aio=aio)
    from vmctl.bench import io as measuring
    from vmctl.bench import setups

    rows = setups.chosen(
        named["device"], named["backend"], named["cache"], named["aio"], [] if iothread is None else [iothread],
        quick=quick, everything=everything,
    )  # fmt: skip
    wanted = measuring.plan(rows, quick=quick, rounds=rounds, length_ms=length, size_mib=size)
    with opened(connect) as host:
        result = measuring.run(host, wanted, accel, folder, reporter())
    show(result, output, explain=explain)
    note(f"kept as {result.head.id}")


def net(
    path: Annotated[Optional[list[str]], _axis("path", "Only this way; may be given again.")] = None,  # noqa: UP045
    card: Annotated[Optional[list[str]], _axis("card", "Only this card; may be given again.")] = None,  # noqa: UP045
    quick: QuickOption = False,
    rounds: RoundsOption = None,
    length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--length", metavar="SECONDS", min=1, max=600, help="Of each flow, in s; default: 1."),
    ] = None,
    accel: AccelOption = AccelChoice.AUTO,
    explain: ExplainOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Measure what a network card costs: streams, round trips, small packets, beside veth and loopback."""
    named = _chosen(path=path, card=card)
    from vmctl.bench import links
    from vmctl.bench import net as measuring

    rows = links.chosen(named["path"], named["card"])
    wanted = measuring.plan(rows, quick=quick, rounds=rounds, length_s=length)
    with opened(connect) as host:
        result = measuring.run(host, wanted, accel, reporter())
    show(result, output, explain=explain)
    note(f"kept as {result.head.id}")


def show(result: Measured, output: Output, *, explain: bool) -> None:
    """Print a result of io or net."""
    from vmctl.bench.measured import lines

    found = lines(result)
    shown = {**result.to_json(), "table": [ui.jsonable(line) for line in found]}
    ui.emit(shown, output, lambda: _text(result, found, explain=explain), lambda: [row.name for row in result.rows])


def _text(result: Measured, found: Sequence[Line], *, explain: bool) -> str:
    from vmctl.cli import bench_columns

    by_row: dict[str, dict[str, Line]] = {}
    for line in found:
        by_row.setdefault(line.row, {})[line.measure] = line
    kinds = bench_columns.IO if result.head.workload == "io" else bench_columns.NET
    parts = [ui.fields(_conditions(result, found))]
    for title, rows in bench_columns.blocks(result):
        kept = [column for column in kinds if any(column.cell(row, by_row.get(row.name, {})) for row in rows)]
        cells = [[column.cell(row, by_row.get(row.name, {})) for column in kept] for row in rows if row.measures]
        if cells:
            parts.append((f"{title}\n" if title else "") + ui.columns([column.head for column in kept], cells))
    parts += _missing(result.rows)
    if explain:
        parts.append(ui.columns(["COLUMN", "WHAT IT IS"], [[one.head, one.what] for one in kinds]))
    return "\n\n".join(parts)


def _missing(rows: Iterable[Row]) -> list[str]:
    """Why rows have no figures: those of one reason together."""
    why: dict[str, list[str]] = {}
    for row in rows:
        if reason := row.failed or row.skipped:
            why.setdefault(("failed: " if row.failed else "skipped: ") + reason, []).append(row.name)
    told = [ui.visible(f"{', '.join(names)}: {reason}") for reason, names in why.items()]
    return ["\n".join(told)] if told else []


def _conditions(result: Measured, found: Sequence[Line]) -> list[tuple[str, str]]:
    head, env = result.head, result.head.environment
    rounds = max((line.samples for line in found), default=0)
    suspect = sum(line.details.get("waited_percent", 0.0) > 2.0 for line in found)
    storage, guest = env.get("storage") or {}, env.get("guest_kernel")  # with veth and loopback alone there is no guest
    lookups: list[tuple[str, Callable[[], str]]] = [
        ("result", lambda: head.id + ("" if head.complete else " (incomplete)")),
        ("accelerator", lambda: str(head.dimensions["accelerator"])),
        ("cpu", lambda: str(head.dimensions.get("host_cpu", ""))),
        ("software", lambda: f"QEMU {env.get('qemu', '?')}, host {env.get('kernel', '?')}"),
        ("guest", lambda: f"kernel {guest}, clock {env.get('guest_clock', '?')}" if guest else ""),
        ("storage", lambda: f"{storage.get('filesystem', '')} on {storage.get('source', '')}" if storage else ""),
        ("rounds", lambda: f"{rounds}; a figure is the median of them, ± their median deviation"),
        (
            "waited",
            lambda: (
                f"QEMU's threads waited for a CPU more than 2 % of the time in {suspect} figures" if suspect else ""
            ),
        ),
    ]
    return [(name, look()) for name, look in lookups]
