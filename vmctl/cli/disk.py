"""vmctl disk: the group, with list, show, create, delete, attach, detach and limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vmctl import ui
from vmctl.choices import Aio, Bus, Cache, Discard, DiskFormat
from vmctl.cli import disk_content, disk_pool
from vmctl.cli.command import Command, group
from vmctl.cli.options import (
    ConnectOption,
    DiskName,
    DryRunOption,
    Name,
    OutputOption,
    YesOption,
    opened,
    refuse_unless_yes,
    reporter,
)
from vmctl.ui import Output

if TYPE_CHECKING:
    from vmctl.disks import Shown

app = group("Disks of VMs, and the pools they lie in.")
app.add_typer(disk_pool.app, name="pool")


@app.command("list", cls=Command)
def list_(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[VM...]", help="Names of VMs, or globs; default: all, and disks no VM has."),
    ] = None,
    pool: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--pool", metavar="POOL", help="Where to look for disks no VM has; default: vmctl's own pool."),
    ] = None,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the disks of VMs, and those that no VM has.

    Of these, what snapshots hold or other disks are based on says so: it is no disk to attach, write to or delete.
    """
    from vmctl import disks

    with opened(connect) as host:
        found = disks.list_disks(host, names or (), pool=pool or host.settings.pool)
        ui.emit(
            found,
            output,
            lambda: ui.columns(
                ("VM", "DISK", "SERIAL", "BUS", "FORMAT", "SIZE", "USED", "SOURCE", "NEEDED BY"),
                [
                    (
                        d.vm,
                        d.disk,
                        d.serial,
                        d.bus,
                        d.format,
                        ui.size(d.capacity) if d.capacity else "",
                        ui.size(d.allocation) if d.capacity else "",
                        d.source,
                        ", ".join(d.needed_by),
                    )
                    for d in found
                ],
            ),
            lambda: [d.name for d in found],
        )


def _details(shown: Shown) -> str:
    disk = shown.disk
    pairs = [("disk", shown.name), ("vm", shown.vm), ("source", shown.path or (disk.source if disk else ""))]
    if shown.volume:
        pairs.append(("volume", f"{shown.pool}/{shown.volume}"))
    if disk is not None:
        pairs += [
            ("target", disk.target),
            ("serial", disk.serial),
            ("bus", disk.bus),
            ("read-only", "yes" if disk.readonly else ""),
            ("cache", disk.cache),
            ("aio", disk.aio),
            ("discard", disk.discard),
            ("iothread", str(disk.iothread or "")),
            ("limits", ", ".join(f"{name} {value}" for name, value in disk.limits.items())),
        ]
    if shown.chain.layers:
        pairs += [("format", shown.chain.top.format), ("size", ui.size(shown.chain.top.virtual_size))]
        lines = [f"{layer.path} ({layer.format}, {ui.size(layer.size)})" for layer in shown.chain.layers]
        pairs.append(("chain", "\n".join(lines)))
    pairs += [("not read", shown.why), ("used by", ", ".join(shown.users)), ("leases", shown.leases)]
    return ui.fields(pairs)


@app.command(cls=Command)
def show(disk: DiskName, connect: ConnectOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show everything about a disk."""
    from vmctl import disks

    with opened(connect) as host:
        found = disks.show(host, disk)
        ui.emit(found, output, lambda: _details(found), lambda: [found.name])


@app.command(cls=Command)
def create(
    name: Annotated[str, typer.Argument(metavar="[POOL/]VOLUME", help="Name of the new volume.")],
    size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[SIZE]", help="Its size, such as 10G; with --backing, that disk's."),
    ] = None,
    format: Annotated[
        Optional[DiskFormat],  # noqa: UP045
        typer.Option("--format", help="Its format; by default what its name says, else qcow2 in a pool of files."),
    ] = None,
    backing: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--backing", metavar="DISK", help="Disk it begins as and then differs from."),
    ] = None,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a disk that belongs to no VM yet."""
    from vmctl import disk_spec, disks

    with opened(connect) as host:
        count = disk_spec.parse_size(size) if size else None
        if dry_run:
            made = disks.plan_create(host, name, count, format, backing or "")
        else:
            made = disks.create(host, name, count, format, backing or "", reporter())
        told = f"{'would make ' if dry_run else ''}{made.pool}/{made.volume}"
        ui.emit(made, output, lambda: told, lambda: [f"{made.pool}/{made.volume}"])


@app.command(cls=Command)
def delete(
    disk: DiskName,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Delete a disk that no VM has and no other disk is based on."""
    from vmctl import disks
    from vmctl.events import silent

    with opened(connect) as host:
        found = disks.deletable(host, disk, reporter() if dry_run else silent)
        if not dry_run:
            refuse_unless_yes([f"disk {found.path}"], yes=yes)
            disks.delete(host, disk, reporter())
        gone = {"pool": found.pool, "volume": found.volume, "path": found.path}
        ui.emit(gone, output, lambda: f"would delete {found.path}" if dry_run else disk, lambda: [disk])


IOPS = Annotated[Optional[int], typer.Option("--iops", metavar="N", help="Most operations a second.")]  # noqa: UP045
READ_IOPS = Annotated[Optional[int], typer.Option("--read-iops", metavar="N", help="Most reads.")]  # noqa: UP045
WRITE_IOPS = Annotated[Optional[int], typer.Option("--write-iops", metavar="N", help="Most writes.")]  # noqa: UP045
BPS = Annotated[Optional[str], typer.Option("--bps", metavar="SIZE", help="Most bytes a second, as 10M.")]  # noqa: UP045
READ_BPS = Annotated[Optional[str], typer.Option("--read-bps", metavar="SIZE", help="Most bytes read.")]  # noqa: UP045
WRITE_BPS = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--write-bps", metavar="SIZE", help="Most bytes written."),
]


def _bytes(text: str | None) -> int | None:
    from vmctl import disk_spec

    return None if text is None else 0 if text == "0" else disk_spec.parse_bytes(text)


@app.command(cls=Command)
def attach(
    name: Name,
    what: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="10G for a new disk; VOLUME, POOL/VOLUME, a file; nbd://, iscsi:// or rbd:// address.",
        ),
    ],
    bus: Annotated[Bus, typer.Option("--bus", help="How it is attached.")] = Bus.VIRTIO,
    format: Annotated[
        Optional[DiskFormat],  # noqa: UP045
        typer.Option("--format", help="Format of its content, where no pool tells it."),
    ] = None,
    target: Annotated[str, typer.Option("--target", metavar="NAME", help="vdc and the like; default: next free.")] = "",
    serial: Annotated[
        str, typer.Option("--serial", metavar="TEXT", help="What the guest knows it by; default: diskN.")
    ] = "",
    readonly: Annotated[bool, typer.Option("--readonly", help="The guest can only read it.")] = False,
    cache: Annotated[Cache, typer.Option("--cache", help="Use of the host's page cache.")] = Cache.DEFAULT,
    aio: Annotated[Aio, typer.Option("--aio", help="How the host is asked to read and write.")] = Aio.DEFAULT,
    discard: Annotated[Discard, typer.Option("--discard", help="What becomes of freed blocks.")] = Discard.UNMAP,
    iothread: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--iothread", metavar="N", help="Number of a thread of its own; made where there is none."),
    ] = None,
    iops: IOPS = None,
    read_iops: READ_IOPS = None,
    write_iops: WRITE_IOPS = None,
    bps: BPS = None,
    read_bps: READ_BPS = None,
    write_bps: WRITE_BPS = None,
    next_start: Annotated[
        bool, typer.Option("--next-start", help="Leave a running VM alone; from its next start on.")
    ] = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Attach a disk to a VM, running or not."""
    from vmctl import disk_plug
    from vmctl.disk_spec import Attachment, IoLimits

    limits = IoLimits(iops, read_iops, write_iops, _bytes(bps), _bytes(read_bps), _bytes(write_bps))
    wanted = Attachment(bus, format, target, serial, readonly, cache, aio, discard, iothread, limits)
    with opened(connect) as host:
        done = disk_plug.attach(host, name, what, wanted, reporter(), next_start=next_start, dry=dry_run)

        def told() -> str:
            text = (
                f"{'would be ' if dry_run else ''}{done.vm}:{done.target} (serial {done.serial}), from {done.there} on"
            )
            if dry_run and done.made:
                text += f"; would make volume {done.made}"
            if dry_run and done.added:
                text += f"; would add {' and '.join(done.added)} to VM {done.vm}"
            return f"{text}; the guest has it as {done.guest}" if done.guest else text

        ui.emit(done, output, told, lambda: [f"{done.vm}:{done.target}"])


@app.command(cls=Command)
def detach(
    disk: DiskName,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.0, help="Longest wait for the guest to let go.")
    ] = 60.0,
    next_start: Annotated[
        bool, typer.Option("--next-start", help="Leave a running VM alone; from its next start on.")
    ] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete its volume then.")] = False,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Take a disk from its VM, which lets go of it first. The disk stays."""
    from vmctl import disk_unplug
    from vmctl.events import silent

    with opened(connect, events=True) as host:
        if delete and not dry_run:
            planned = disk_unplug.detach(
                host, disk, silent, timeout_s=timeout, next_start=next_start, delete=True, dry=True
            )
            refuse_unless_yes([f"disk {planned.source}"], yes=yes)
        done = disk_unplug.detach(
            host, disk, reporter(), timeout_s=timeout, next_start=next_start, delete=delete, dry=dry_run
        )
        verb = "would be detached" if dry_run else "is detached"
        then = done.source if done.kept else f"{done.source} {'would be' if dry_run else 'is'} deleted"
        for one in done.removed:
            then += f"; {one} {'would go' if dry_run else 'is gone'} with it"
        ui.emit(
            done,
            output,
            lambda: f"{done.vm}:{done.target} {verb}, from {done.when} on; {then}",
            lambda: [f"{done.vm}:{done.target}"],
        )


@app.command(cls=Command)
def limit(
    disk: DiskName,
    iops: IOPS = None,
    read_iops: READ_IOPS = None,
    write_iops: WRITE_IOPS = None,
    bps: BPS = None,
    read_bps: READ_BPS = None,
    write_bps: WRITE_BPS = None,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Limit what a disk may do a second, also while its VM runs; 0 takes a limit away, none given shows them."""
    from vmctl import disk_unplug
    from vmctl.disk_spec import IoLimits

    limits = IoLimits(iops, read_iops, write_iops, _bytes(bps), _bytes(read_bps), _bytes(write_bps))
    with opened(connect) as host:
        found = disk_unplug.limit(host, disk, limits, reporter(), dry=dry_run)
        changes = dry_run and bool(limits.given())

        def told() -> str:
            lines = [f"{'would be ' if changes else ''}{name} {value}" for name, value in found.items()]
            lines = lines or [f"{'would have ' if changes else ''}no limits"]
            return "\n".join([*([f"would change VM {disk.partition(':')[0]}"] if changes else []), *lines])

        ui.emit(found, output, told, lambda: found)


app.command(cls=Command)(disk_content.resize)
app.command(cls=Command)(disk_content.move)
app.command(cls=Command)(disk_content.convert)
app.command("map", cls=Command)(disk_content.map_)
app.command(cls=Command)(disk_content.check)
app.command(cls=Command)(disk_content.compact)
app.command(cls=Command)(disk_content.flatten)
app.command(cls=Command)(disk_content.rebase)
