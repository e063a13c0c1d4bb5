"""vmctl host drain."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vmctl import ui
from vmctl.choices import StorageCopy
from vmctl.cli.migrate import told
from vmctl.cli.options import HostName, OutputOption, complete_host, each, fleet_of_config, note, reporter
from vmctl.ui import Output

if TYPE_CHECKING:
    from vmctl.migrate import Moved


def drain(
    name: HostName,
    to: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--to", metavar="HOST", help="Only to these. Repeatable.", autocompletion=complete_host),
    ] = None,
    copy_storage: Annotated[
        Optional[StorageCopy],  # noqa: UP045
        typer.Option("--copy-storage", help="As of `vmctl migrate`."),
    ] = None,
    direct: Annotated[bool, typer.Option("--direct", help="As of `vmctl migrate`.")] = False,
    at_once: Annotated[int, typer.Option("--at-once", metavar="N", min=1, max=8, help="VMs moved side by side.")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go where.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Move all VMs off a host, running and stopped, each to the host with most memory left.

    One that no host can take stays, and is told of at the end (exit 14); run it again for what is left.
    """
    from vmctl import config, drain, events
    from vmctl.hypervisor.events import start_loop
    from vmctl.hypervisor.migration import Copying, Way
    from vmctl.migrate import Wish

    start_loop()
    fleet, report = fleet_of_config(), reporter()
    source = config.entry(name, fleet.settings)
    plans = {one.vm: one for one in drain.look(fleet, source, to or (), report)}
    if dry_run:
        rows = [{"vm": one.vm, "to": one.hosts[0]} for one in plans.values()]
        ui.emit(rows, output, lambda: "\n".join(f"{row['vm']} -> {row['to']}" for row in rows), lambda: list(plans))
        return
    if not plans:
        note(f"{name} has no VMs")
    wish = Wish(
        way=Way.DIRECT if direct else Way.PEER,
        copying=Copying(copy_storage.value) if copy_storage else Copying.NONE,
    )
    gate, moved = threading.Semaphore(at_once), list[object]()

    def work(vm: str) -> Moved:
        with gate:
            return drain.move(fleet, source, plans[vm], wish, events.stages_of(vm, report))

    def done(_vm: str, result: Moved) -> None:
        moved.append(result)
        if output is Output.TABLE:
            ui.say(told(result))

    try:
        if plans:
            each(tuple(plans), work, done, "move")
    finally:
        if output is not Output.TABLE:
            ui.emit(moved, output, str, lambda: list(plans))
