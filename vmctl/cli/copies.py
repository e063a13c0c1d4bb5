"""vmctl clone and fork."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli.options import ConnectOption, DryRunOption, Name, OutputOption, each, opened, reporter
from vmctl.ui import Output

CountOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--count", "-n", metavar="N", help="How many, named NEW-1 to NEW-N."),
]


def clone(
    name: Name,
    new: Annotated[str, typer.Argument(metavar="NEW", help="Name of the new VM, also its host name.")],
    count: CountOption = None,
    full: Annotated[
        bool, typer.Option("--full", help="Copy the disks whole instead of sharing what is on them.")
    ] = False,
    start: Annotated[bool, typer.Option("--start", help="Start the new VMs.")] = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make new VMs with the disks of a stopped one, and an identity of their own each.

    What is on the disks is shared and frozen: the VM and its clones write into layers of their own.
    """
    from vmctl import cloning, copies, lifecycle

    names = copies.numbered(new, count)
    report = reporter()
    with opened(connect) as host:
        if dry_run:
            lines = cloning.plan(host, name, names, full=full).lines
            lines += [f"VM {one} is started" for one in names if start]
            ui.emit({"touches": lines}, output, lambda: "\n".join(lines), lambda: list(names))
            return
        made = cloning.clone(host, name, names, report, full=full)
        if start:
            each(names, lambda one: lifecycle.start(host, one, report), lambda _one, _how: None, "start")
        result = [{"name": one.name, "uuid": one.uuid} for one in made]
        ui.emit(result, output, lambda: "\n".join(names), lambda: list(names))


def fork(
    name: Name,
    new: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="NEW", help="Name of the new VM, also its host name; default: NAME-fork."),
    ] = None,
    count: CountOption = None,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make new running VMs from the memory and disks of a running one, which runs on.

    Nothing boots. Each is told who it is by its guest agent before it is connected to its network.
    """
    from vmctl import copies, forking

    names = copies.numbered(new or f"{name}-fork", count)
    with opened(connect) as host:
        if dry_run:
            lines = forking.plan(host, name, names).lines
            ui.emit({"touches": lines}, output, lambda: "\n".join(lines), lambda: list(names))
            return
        made = forking.fork(host, name, names, reporter())
        rows = [(one.name, one.address) for one in made]
        ui.emit(made, output, lambda: ui.columns(("NAME", "ADDRESS"), rows), lambda: [one.name for one in made])
