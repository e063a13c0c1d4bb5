"""vmctl backup: create, list, show, verify, restore, prune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vmctl import ui
from vmctl.choices import Compression
from vmctl.cli.command import Command, group
from vmctl.cli.options import (
    ConnectOption,
    DryRunOption,
    Name,
    OutputOption,
    YesOption,
    opened,
    refuse_unless_yes,
    reporter,
)
from vmctl.errors import ImageError
from vmctl.ui import Output

if TYPE_CHECKING:
    from datetime import timedelta

    from vmctl.backup import Made
    from vmctl.backup_plan import Pruning
    from vmctl.hosts import Host

app = group("Backups of VMs, and VMs restored from them.")

FolderOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--folder",
        metavar="FOLDER",
        help="Where backups are kept; default: `backups` of the config file, or vmctl's own.",
    ),
]
KeepOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--keep", metavar="N", min=1, help="Number of backups to keep."),
]
OlderOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--older-than", metavar="AGE", help="Delete only what is older, as 30d, 12h or 2w."),
]
Vm = Annotated[str, typer.Argument(metavar="VM", help="Name of the VM that was backed up; it need not be there.")]


def _root(folder: Path | None, host: Host | None = None) -> Path:
    from vmctl import config

    own = host.folders if host else config.folders()
    return config.backup_folder(folder, host.settings if host else config.load(own.config / "config.toml"), own)


def _age(text: str | None) -> timedelta | None:
    from vmctl import backup_plan

    return None if text is None else backup_plan.parse_age(text)


def _told(made: Made, dry_run: bool) -> str:
    if dry_run:
        return "\n".join(f"would {one}" for one in made.touches)
    text = f"{made.vm} {made.id}: {made.kind}, {ui.size(made.size)}, {made.consistency}, {made.took_s:.1f} s"
    return text + (f"; deleted {', '.join(made.pruned)}" if made.pruned else "")


@app.command(cls=Command)
def create(
    name: Name,
    folder: FolderOption = None,
    full: Annotated[bool, typer.Option("--full", help="Take all of each disk.")] = False,
    incremental: Annotated[
        bool, typer.Option("--incremental", help="Take only what changed since the backup before, or nothing.")
    ] = False,
    freeze: Annotated[
        bool,
        typer.Option("--freeze", help="Hold the guest's file systems still for the moment it is of, by the agent."),
    ] = False,
    compress: Annotated[
        Compression, typer.Option("--compress", help="How its files are compressed.")
    ] = Compression.NONE,
    keep: KeepOption = None,
    older_than: OlderOption = None,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Back up a VM, running or not: what changed since the backup before where that can be told, else all of it."""
    from vmctl import backup
    from vmctl.backup_plan import Wanted
    from vmctl.errors import SpecError

    if full and incremental:
        raise SpecError("cannot back up both --full and --incremental")
    wanted = Wanted.FULL if full else Wanted.INCREMENTAL if incremental else Wanted.AUTO
    with opened(connect) as host:
        wish = backup.Wish(_root(folder, host), wanted, freeze, compress, keep, _age(older_than))
        made = backup.create(host, name, wish, reporter(), dry=dry_run)
        ui.emit(made, output, lambda: _told(made, dry_run), lambda: [made.id])


@app.command("list", cls=Command)
def list_(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[VM...]", help="Names of VMs; default: all that have backups."),
    ] = None,
    folder: FolderOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List backups, oldest first. Needs no libvirt."""
    from vmctl import backup_list

    found = backup_list.list_backups(_root(folder), names or ())
    rows = [
        (
            one.vm,
            one.id,
            one.kind,
            one.consistency,
            ui.size(one.size) if one.size else "",
            ", ".join(one.needs),
            one.problem,
        )
        for one in found
    ]
    header = ("VM", "BACKUP", "KIND", "CONSISTENCY", "SIZE", "NEEDS", "PROBLEM")
    ui.emit(found, output, lambda: ui.columns(header, rows), lambda: [f"{one.vm}/{one.id}" for one in found])


PointArgument = Annotated[
    str, typer.Argument(metavar="[BACKUP]", help="Which: its id, the beginning of one, or latest.")
]


@app.command(cls=Command)
def show(
    vm: Vm, point: PointArgument = "latest", folder: FolderOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Show everything about a backup. Needs no libvirt."""
    from vmctl import backup_store

    one = backup_store.shelf(backup_store.vm_folder(_root(folder), vm)).point(point)
    pairs = [
        ("backup", one.id),
        ("vm", f"{one.vm} ({one.uuid})"),
        ("host", one.host),
        ("created", one.created),
        ("kind", one.kind),
        ("consistency", one.consistency),
        ("compression", one.compression),
        ("counts from", one.checkpoint),
        ("not in it", "\n".join(one.left_out)),
    ]
    for disk in one.disks:
        lines = [f"{disk.file}, {ui.size(disk.file_size)} of {ui.size(disk.size)}, was {disk.format} at {disk.source}"]
        lines.append(f"laid over {disk.parent}" if disk.parent else "whole" + (f": {disk.why}" if disk.why else ""))
        pairs.append((f"disk {disk.target}", "\n".join([*lines, f"digest {disk.digest}"])))
    pairs += [(x.role, ", ".join(filter(None, [x.file, ui.size(x.size), x.source]))) for x in one.files]
    ui.emit(one, output, lambda: ui.fields(pairs), lambda: [one.id])


@app.command(cls=Command)
def verify(
    vm: Vm,
    points: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[BACKUP...]", help="Which; default: all of the VM."),
    ] = None,
    folder: FolderOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Prove that backups restore to what was backed up, and exit 10 when one does not. Needs neither VM nor libvirt."""
    from vmctl import backup_store, backup_verify

    found = backup_verify.verify(backup_store.vm_folder(_root(folder), vm), points or (), reporter())
    rows = [
        (
            one.id,
            "damaged" if one.problems else "good",
            ", ".join(one.disks),
            ui.size(one.read),
            "; ".join(one.problems),
        )
        for one in found
    ]
    header = ("BACKUP", "RESULT", "DISKS", "READ", "PROBLEM")
    ui.emit(found, output, lambda: ui.columns(header, rows), lambda: [one.id for one in found if not one.problems])
    bad = [one.id for one in found if one.problems]
    if bad:
        problems = "; ".join(dict.fromkeys(problem for one in found for problem in one.problems))
        raise ImageError(f"cannot call {', '.join(bad)} of {vm} good: {problems}")


@app.command(cls=Command)
def restore(
    vm: Vm,
    point: PointArgument = "latest",
    as_: Annotated[
        str, typer.Option("--as", metavar="NAME", help="Restore under another name, beside the old VM.")
    ] = "",
    new_identity: Annotated[
        bool, typer.Option("--new-identity", help="With --as: new host name, host key and machine-id inside too.")
    ] = False,
    pool: Annotated[str, typer.Option("--pool", metavar="POOL", help="Pool for its disks; default: vmctl's own.")] = "",
    trust: Annotated[
        bool, typer.Option("--trust-definition", help="Let its definition reach what it names of this host.")
    ] = False,
    start: Annotated[bool, typer.Option("--start", help="Start it then.")] = False,
    folder: FolderOption = None,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Restore a VM to what it was at a backup: over the old one, or beside it, here or on another host."""
    from vmctl import backup_origin, backup_restore, backup_store

    wish = backup_origin.Wish(point, as_, pool, new_identity, trust)
    with opened(connect) as host:
        place = backup_store.vm_folder(_root(folder, host), vm)
        planned = backup_origin.plan(host, place, wish, reporter())
        if dry_run:
            done = backup_restore.told(planned, start=start)
        else:
            if planned.lost:
                refuse_unless_yes(planned.lost, yes=yes)
            done = backup_restore.restore(host, place, wish, reporter(), start=start)

        def told() -> str:
            if dry_run:
                return "\n".join(f"would {one}" for one in done.touches)
            return f"{done.vm} is restored from {vm} {done.point}: {', '.join(done.disks)}"

        ui.emit(done, output, told, lambda: [done.vm])


@app.command(cls=Command)
def prune(
    vm: Vm,
    keep: KeepOption = None,
    older_than: OlderOption = None,
    folder: FolderOption = None,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Delete older backups; what is kept takes over first what it needs of them. Needs no libvirt."""
    from vmctl import backup, backup_store

    place, age = backup_store.vm_folder(_root(folder), vm), _age(older_than)
    found = backup.prune(place, keep, age, reporter(), dry=True)
    if not dry_run:
        if found.delete:
            refuse_unless_yes([f"backup {one} of {vm}" for one in found.delete], yes=yes)
        found = backup.prune(place, keep, age, reporter(), dry=False)
    ui.emit(found, output, lambda: _pruned(found, dry_run), lambda: found.delete)


def _pruned(found: Pruning, dry_run: bool) -> str:
    if not found.delete:
        return "nothing to delete"
    would = "would " if dry_run else ""
    lines = [f"{would}{'merge' if dry_run else 'merged'} into {one} what it needs" for one in found.merge]
    return "\n".join([*lines, *(f"{would}{'delete' if dry_run else 'deleted'} {one}" for one in found.delete)])
