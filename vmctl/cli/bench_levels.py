"""vmctl bench levels, sheet: what each level of virtualization costs, and what a VM has."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli.access import Via
from vmctl.cli.bench_report import section_text
from vmctl.cli.options import ConnectOption, Name, OutputOption, UserOption, note, opened, reporter
from vmctl.errors import SpecError
from vmctl.ui import Output


def _complete_level(incomplete: str) -> list[str]:
    from vmctl.bench.levels import LEVELS

    return [name for name in (*LEVELS, "shares") if name.startswith(incomplete)]


def _complete_work(incomplete: str) -> list[str]:
    from vmctl.bench.levels_result import BY_NAME

    return [name for name in BY_NAME if name.startswith(incomplete)]


def levels(
    level: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--level",
            metavar="LEVEL",
            help="Only this level beside native; may be given again.",
            autocompletion=_complete_level,
        ),
    ] = None,
    row: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--row", metavar="ROW", help="Only this row; may be given again.", autocompletion=_complete_work),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three short rounds: a rough look.")] = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Measure the same work natively and on each level of virtualization, and whether CPU shares are kept.

    Levels: native, container, qemu-user, tcg, kvm, nested; and shares.
    """
    from vmctl.bench import levels as measuring

    wanted = measuring.plan(level or (), row or (), quick=quick)
    with opened(connect) as host:
        result = measuring.run(host, wanted, reporter())
    show(result.to_json(), output)
    note(f"kept as {result.head.id}")


def sheet(
    name: Name,
    folder: Annotated[
        str, typer.Option("--folder", metavar="PATH", help="Folder in the guest whose disk is measured.")
    ] = "/var/tmp",
    via: Annotated[Via, typer.Option(help="By SSH, or by the guest agent, which needs no network.")] = Via.SSH,
    user: UserOption = None,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Fill the numerical sheet of a running VM, measured inside of it: cores, RAM, disk, rates, latency, uptime."""
    from vmctl.bench import sheet as measuring

    if via is Via.AGENT and user:
        raise SpecError("cannot measure: the agent takes no --user", hint="leave out --via agent")
    if not folder.startswith("/"):
        raise SpecError(f"cannot measure in {folder}: it is no whole path", hint="--folder /var/tmp")
    with opened(connect) as host:
        result = measuring.measure(host, name, folder, reporter(), by_agent=via is Via.AGENT, user=user)
    show(result.to_json(), output)
    note(f"kept as {result.head.id}")


def show(values: dict[str, object], output: Output) -> None:
    """Print a result of a workload that has sections, its figures computed anew from its samples."""
    from vmctl.bench import kinds

    kind = kinds.BY_NAME[str(values["workload"])]
    cases = kind.cases(values)
    shown = {**values, "table": [ui.jsonable(one) for one in cases]}
    ui.emit(
        shown,
        output,
        lambda: "\n\n".join(section_text(one) for one in kind.sections([values])),
        lambda: [one.name for one in cases],
    )
