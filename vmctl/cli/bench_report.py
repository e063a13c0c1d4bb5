"""vmctl bench run, report: everything measured, and all results in one page, a picture, or on the terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli.options import ConnectOption, OutputOption, note, opened, reporter
from vmctl.errors import NotFound, PartialFailure, VmctlError
from vmctl.ui import Output

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from vmctl.bench.everything import Run
    from vmctl.bench.section import Section

JunitOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--junit", metavar="FILE", help="Write each row as a JUnit test case to this file."),
]
_NARROW, _WIDE = 60, 140


def _place() -> Path:
    from vmctl import config
    from vmctl.bench import store

    return store.folder(config.folders().data)


def complete_kept(incomplete: str) -> list[str]:
    """Ids of results and of runs."""
    from vmctl.bench import everything, store

    place = _place()
    found = [one.id for one in store.kept(place)] + [one.id for one in everything.runs(place)]
    return [one for one in found if one.startswith(incomplete)]


def _columns() -> int:
    try:
        found = os.get_terminal_size(1).columns
    except OSError:
        found = 100
    return max(_NARROW, min(_WIDE, found))


def section_text(section: Section) -> str:
    """A section for a terminal."""
    from vmctl.bench import chart_text

    parts = [section.title, ui.fields(section.facts)]
    parts += [chart_text.text(chart, _columns()) for chart in section.charts]
    for table in section.tables:
        parts.append(
            (f"{table.title}\n" if table.title else "") + ui.columns([one.upper() for one in table.header], table.rows)
        )
    parts += [ui.visible(one) for one in section.notes]
    return "\n\n".join(parts)


def run(
    quick: Annotated[bool, typer.Option("--quick", help="A rough look at everything.")] = False,
    new: Annotated[
        bool, typer.Option("--new", help="Begin anew rather than go on with a run that was cut off.")
    ] = False,
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--only", metavar="PART", help="Only this part, such as trap-tcg or levels; may be given again."),
    ] = None,
    junit: JunitOption = None,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Measure everything there is, one after the other. Cut off, the next run goes on where this one was.

    Ends with 14 when some of it could not be measured.
    """
    from vmctl.bench import everything

    with opened(connect) as host:
        done = everything.run(host, reporter(), only or (), quick=quick, new=new)
    rows = [[one.name, one.result, f"{one.took_s:.1f} s", one.problem] for one in done.parts]
    ui.emit(
        done,
        output,
        lambda: ui.columns(["PART", "RESULT", "TOOK", "PROBLEM"], rows),
        lambda: [one.result for one in done.parts if one.result],
    )
    note(f"kept as {done.id}; `vmctl bench report {done.id}` shows it")
    if junit:  # last: where it cannot be written, what took so long has been told
        _write_junit(junit, done)
    failures = {one.name: VmctlError(one.problem) for one in done.parts if one.problem}
    if failures:
        raise PartialFailure(f"cannot measure {len(failures)} of {len(done.parts)} parts", failures=failures)


def _write_junit(path: Path, done: Run) -> None:
    from vmctl.bench import junit, store

    place = _place()
    suites = []
    for one in done.parts:
        if one.result:
            suites.append(junit.of_result(store.find(place, one.result)))
        else:
            suites.append(junit.problem(one.name, one.problem, done.made))
    junit.write(path, suites)


def _chosen(named: Sequence[str]) -> list[Mapping[str, Any]]:
    """The results that are named, those of a run for its id, or the latest of each kind. Raises NotFound."""
    from vmctl.bench import everything, store
    from vmctl.bench import report as reporting

    place = _place()
    wanted: list[str] = []
    for name in named:
        if name.startswith("run-"):
            wanted += [one.result for one in everything.find(place, name).parts if one.result]
        else:
            wanted.append(name)
    if not named:
        wanted = list(reporting.latest(store.kept(place)))
    if not wanted:
        raise NotFound("cannot report: no result is kept yet", hint="vmctl bench run makes them")
    return [store.find(place, name) for name in dict.fromkeys(wanted)]


def report(
    result: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[RESULT...]",
            help="Ids of results, or of a run; default: the latest of each kind.",
            autocompletion=complete_kept,
        ),
    ] = None,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--html", metavar="FILE", help="Write one page with pictures, tables and samples."),
    ] = None,
    png: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--png", metavar="FILE", help="Write all pictures as one."),
    ] = None,
    junit: JunitOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show results with pictures: on the terminal, and with --html and --png as files. Needs no libvirt."""
    from vmctl.bench import report as reporting
    from vmctl.bench import store

    results = _chosen(result or ())
    if html:
        store.put(html, reporting.html(results).encode(), f"write {html}", mode=0o644)
    if png:
        _write_png(png, results)
    if junit:
        from vmctl.bench import junit as writing

        writing.write(junit, [writing.of_result(values) for values in results])
    found = reporting.sections(results)
    ui.emit(
        found,
        output,
        lambda: "\n\n\n".join(section_text(one) for one in found),
        lambda: [str(values["id"]) for values in results],
    )
    for path in (html, png, junit):
        if path:
            note(f"wrote {path}")


def _write_png(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    from vmctl.bench import drawing_png, store
    from vmctl.bench import report as reporting

    drawn = reporting.picture(results)
    if drawn is None:
        raise NotFound("cannot draw: nothing of this has a picture", hint="vmctl bench list shows what each result is")
    store.put(path, drawing_png.png(drawn), f"write {path}", mode=0o644)
