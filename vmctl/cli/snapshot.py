"""vmctl snapshot: states of VMs to go back to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli.command import Command, group
from vmctl.cli.options import (
    GLOBALS,
    ConnectOption,
    DryRunOption,
    OutputOption,
    YesOption,
    _complete_vm,
    opened,
    refuse_unless_yes,
    reporter,
)
from vmctl.errors import SpecError, VmctlError
from vmctl.ui import Output

if TYPE_CHECKING:
    from vmctl.snapshot_delete import Deleted
    from vmctl.snapshot_diff import Difference
    from vmctl.snapshots import Listed, Shown

app = group("States of VMs to go back to.")


def _complete_snapshot(incomplete: str) -> list[str]:
    from vmctl.hosts import open_host
    from vmctl.hypervisor import snapshots

    try:
        with open_host(GLOBALS.connect) as host:
            return [name for name in snapshots.names(host.conn) if name.startswith(incomplete)]
    except VmctlError:
        return []


SnapshotName = Annotated[
    str, typer.Argument(metavar="VM.SNAPSHOT", help="The snapshot.", autocompletion=_complete_snapshot)
]


@app.command(cls=Command)
def create(
    name: Annotated[
        str,
        typer.Argument(
            metavar="VM[.SNAPSHOT]", help="The VM, and a name; default: by the time.", autocompletion=_complete_vm
        ),
    ],
    memory: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--memory/--no-memory", help="With the memory of a running VM, or without; default: with."),
    ] = None,
    internal: Annotated[bool, typer.Option("--internal", help="Inside the disks' own qcow2 files.")] = False,
    external: Annotated[bool, typer.Option("--external", help="New writes go to files of their own.")] = False,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Have the agent hold the guest's file systems still meanwhile.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="The guest runs on while its memory is saved; on KVM only.")
    ] = False,
    description: Annotated[str, typer.Option("--description", metavar="TEXT", help="What it is for.")] = "",
    expiry: Annotated[str, typer.Option("--expiry", metavar="TIME", help="How long it is kept, as 7d or 12h.")] = "",
    reuse: Annotated[bool, typer.Option("--reuse", help="Take the place of the one of that name.")] = False,
    most: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--max", metavar="N", min=1, help="Keep so many that vmctl took; the oldest go."),
    ] = None,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Take a snapshot of a VM, running or not, and say of which kind. Expired ones of that VM go then."""
    from vmctl import snapshot_create, snapshot_plan
    from vmctl.snapshot_plan import Kind, Wanted

    if internal and external:
        raise SpecError("cannot take a snapshot: --internal and --external exclude each other")
    kind = Kind.INTERNAL if internal else Kind.EXTERNAL if external else None
    order = snapshot_create.Order(
        Wanted(kind, memory, freeze), description, snapshot_plan.span(expiry) if expiry else None, reuse, most, live
    )
    with opened(connect) as host:
        done = snapshot_create.create(host, name, order, reporter(), dry=dry_run)
        full = f"{done.vm}.{done.name}"

        def told() -> str:
            if dry_run:
                return "\n".join(f"would {one}" for one in done.touches)
            return full

        ui.emit(done, output, told, lambda: [full])


def _row(one: Listed, show_vm: bool) -> tuple[str, ...]:
    return (
        *((one.vm,) if show_vm else ()),
        f"{one.name}{' *' if one.current else ''}",
        f"{one.created.astimezone():%Y-%m-%d %H:%M:%S}",
        one.state,
        one.kind + (", memory" if one.memory else ""),
        ",".join(one.disks),
        one.parent,
        f"{one.expires.astimezone():%Y-%m-%d %H:%M}" if one.expires else "",
        one.description,
    )


@app.command("list", cls=Command)
def list_(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[VM...]", help="Names of VMs, or globs; default: all.", autocompletion=_complete_vm),
    ] = None,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List snapshots, virsh's too; a * marks where its VM is."""
    from vmctl import snapshots

    header = ("VM", "NAME", "TAKEN", "STATE", "KIND", "DISKS", "PARENT", "EXPIRES", "DESCRIPTION")
    with opened(connect) as host:
        found = snapshots.list_all(host, names or ())
        ui.emit(
            found,
            output,
            lambda: ui.columns(header, [_row(one, show_vm=True) for one in found]),
            lambda: [f"{one.vm}.{one.name}" for one in found],
        )


def _details(shown: Shown) -> str:
    one = shown.snapshot
    pairs = [
        ("snapshot", f"{one.vm}.{one.name}"),
        ("current", "yes" if one.current else ""),
        ("taken", one.created.astimezone().isoformat(sep=" ")),
        ("expires", one.expires.astimezone().isoformat(sep=" ") if one.expires else ""),
        ("state", one.state),
        ("kind", one.kind),
        ("taken by", "vmctl" if one.ours else "another program"),
        ("parent", one.parent),
        ("children", ", ".join(shown.children)),
        ("description", one.description),
        ("memory", f"{shown.memory_file} ({ui.size(one.size)})" if shown.memory_file else "internal" * one.memory),
        ("nvram", shown.nvram),
        ("disks", "\n".join(f"{disk.target} {disk.kind} {disk.file}" for disk in shown.disks)),
        ("revert", shown.revert),
    ]
    return ui.fields(pairs)


@app.command(cls=Command)
def show(name: SnapshotName, connect: ConnectOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show everything about a snapshot."""
    from vmctl import snapshots

    with opened(connect) as host:
        found = snapshots.show(host, name)
        full = f"{found.snapshot.vm}.{found.snapshot.name}"
        ui.emit(found, output, lambda: _details(found), lambda: [full])


@app.command(cls=Command)
def revert(
    name: SnapshotName,
    start: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--start/--no-start", help="Whether it runs then; default: if the snapshot has its memory."),
    ] = None,
    safety: Annotated[
        bool, typer.Option("--safety", help="Take a snapshot of how it is now before, so that nothing is lost.")
    ] = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Put a VM back to a snapshot. How it is now is lost, unless --safety keeps it."""
    from vmctl import snapshot_revert

    with opened(connect) as host:
        if dry_run or not (yes or safety):
            planned = snapshot_revert.plan(host, name, reporter(), start=start, safety=safety)
            if dry_run:
                lines = [*(f"would lose {one}" for one in planned.lost), *(f"would {one}" for one in planned.touches)]
                ui.emit(planned, output, lambda: "\n".join(lines), lambda: [name])
                return
            refuse_unless_yes(
                planned.lost, yes=False, question="Lose all of this?", hint="--yes; or --safety, which loses nothing"
            )
        done = snapshot_revert.revert(host, name, reporter(), start=start, safety=safety)
        kept = f"; how it was is {done.vm}.{done.safety}" if done.safety else ""
        ui.emit(done, output, lambda: f"{done.vm} is at {done.snapshot}, {done.state}{kept}", lambda: [name])


@app.command(cls=Command)
def delete(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[VM.SNAPSHOT...]",
            help="The snapshots; with --expired: VMs, or globs, default all.",
            autocompletion=_complete_snapshot,
        ),
    ] = None,
    expired: Annotated[bool, typer.Option("--expired", help="Those whose time is over.")] = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Delete snapshots, also while their VMs run. What others need of their files stays."""
    from vmctl import snapshot_delete

    if not names and not expired:
        raise SpecError("cannot delete snapshots: none is named", hint="VM.SNAPSHOT, or --expired")
    with opened(connect) as host:

        def each(*, dry: bool) -> list[Deleted]:
            if expired:
                return list(snapshot_delete.delete_expired(host, names or (), reporter(), dry=dry))
            return list(snapshot_delete.delete(host, names or (), reporter(), dry=dry))

        if not dry_run and not yes:
            lines = [f"snapshot {one.vm}.{one.name}" for one in each(dry=True)]
            if lines:
                refuse_unless_yes(lines, yes=False)
        done = each(dry=dry_run)

        def told() -> str:
            if dry_run:
                return "\n".join(f"would {what}" for one in done for what in one.touches) or "nothing to delete"
            return "\n".join(f"{one.vm}.{one.name}" for one in done) or "nothing to delete"

        ui.emit(done, output, told, lambda: [f"{one.vm}.{one.name}" for one in done])


def _difference(found: Difference) -> str:
    rows = [
        (one.target, "" if one.changed is None else f"{one.changed} ({ui.size(one.changed)})", one.why)
        for one in found.disks
    ]
    config = [ui.visible(line) for line in found.config] or ["the definition is the same"]
    return "\n".join([*config, "", ui.columns(("DISK", "CHANGED", "NOTE"), rows)])


@app.command(cls=Command)
def diff(
    name: SnapshotName,
    other: Annotated[
        str,
        typer.Argument(
            metavar="[OTHER]", help="Another snapshot of the VM; default: now.", autocompletion=_complete_snapshot
        ),
    ] = "",
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what changed since a snapshot: in the VM's definition, and how many bytes of each disk."""
    from vmctl import snapshot_diff

    with opened(connect) as host:
        found = snapshot_diff.diff(host, name, other)
        ui.emit(found, output, lambda: _difference(found), lambda: [one.target for one in found.disks if one.changed])


@app.command(cls=Command)
def tree(
    name: Annotated[str, typer.Argument(metavar="VM", help="Name of the VM.", autocompletion=_complete_vm)],
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Draw how the snapshots of a VM come from each other, and where it is now."""
    from vmctl import snapshots

    with opened(connect) as host:
        found = snapshots.tree(host, name)
        ui.emit(
            found, output, lambda: "\n".join([name, *(one.line for one in found)]), lambda: [one.name for one in found]
        )
