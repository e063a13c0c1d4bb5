"""vmctl disk resize, move, convert, map, check, compact, flatten, rebase."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmctl import ui
from vmctl.choices import DiskFormat
from vmctl.cli.options import ConnectOption, DiskName, DryRunOption, OutputOption, opened, reporter
from vmctl.errors import ImageError
from vmctl.ui import Output

if TYPE_CHECKING:
    from vmctl.disk_copy import Rewritten
    from vmctl.disk_map import DiskMap

KeepOption = Annotated[bool, typer.Option("--keep", help="Leave the old file where it is.")]
BandwidthOption = Annotated[
    str, typer.Option("--bandwidth", metavar="SIZE", help="Most bytes copied a second while its VM runs, as 50M.")
]


def _rate(text: str) -> int:
    from vmctl.disk_spec import parse_bytes

    return parse_bytes(text) if text else 0


def resize(
    disk: DiskName,
    size: Annotated[str, typer.Argument(metavar="SIZE", help="+10G, or the whole new size, as 20G.")],
    grow_fs: Annotated[
        bool, typer.Option("--grow-fs", help="Grow partition and file system too, by the agent in the running guest.")
    ] = False,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Let it become smaller, once what is on it is checked; VM stopped.")
    ] = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a disk larger, also while its VM runs; smaller only by --shrink."""
    from vmctl import disk_size

    with opened(connect) as host:
        done = disk_size.resize(host, disk, size, reporter(), grow_fs=grow_fs, shrink=shrink, dry=dry_run)

        def told() -> str:
            if dry_run:
                would = "\n".join(f"would {one}" for one in done.touches)
                return f"{would} ({ui.size(done.before)} -> {ui.size(done.after)})" if would else "nothing to do"
            text = f"{disk}: {ui.size(done.before)} -> {ui.size(done.after)}"
            return f"{text}; grew {done.grown}" if done.grown else text

        ui.emit(done, output, told, lambda: [disk])


def _told(done: Rewritten, dry_run: bool) -> str:
    if done.how == "flat already":
        return f"{done.disk} is flat already"
    if dry_run:
        return "\n".join(f"would {one}" for one in done.touches) + f" ({done.how})"
    return f"{done.disk}: {done.path} ({done.format}), {ui.size(done.size_before)} -> {ui.size(done.size_after)}"


def move(
    disk: DiskName,
    pool: Annotated[str, typer.Option("--pool", metavar="POOL", help="Pool to move it to.")],
    keep: KeepOption = False,
    bandwidth: BandwidthOption = "",
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Bring a disk into another pool, also while its VM runs and writes to it."""
    from vmctl import disk_copy

    with opened(connect) as host:
        done = disk_copy.move(host, disk, pool, reporter(), keep=keep, dry=dry_run, bandwidth=_rate(bandwidth))
        ui.emit(done, output, lambda: _told(done, dry_run), lambda: [done.path])


def convert(
    disk: DiskName,
    format: Annotated[DiskFormat, typer.Option("--format", help="Format it gets.")],
    keep: KeepOption = False,
    bandwidth: BandwidthOption = "",
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Give a disk another format, also while its VM runs; it is based on no other disk then."""
    from vmctl import disk_copy

    with opened(connect) as host:
        done = disk_copy.convert(host, disk, format, reporter(), keep=keep, dry=dry_run, bandwidth=_rate(bandwidth))
        ui.emit(done, output, lambda: _told(done, dry_run), lambda: [done.path])


def _table(found: DiskMap) -> str:
    from vmctl.disk_map import picture

    rows = [
        (
            str(one.offset),
            str(one.length),
            "zero" if one.zero else "data",
            "yes" if one.allocated else "no",
            one.layer,
            "" if one.file_offset is None else str(one.file_offset),
        )
        for one in found.pieces
    ]
    header = ("OFFSET", "LENGTH", "READS", "ALLOCATED", "LAYER", "FILE OFFSET")
    return f"{picture(found)}\n\n{ui.columns(header, rows)}"


def map_(disk: DiskName, connect: ConnectOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show where the blocks of a disk lie: in which file of its backing chain, and where in it; with a picture."""
    from vmctl import disk_map

    with opened(connect) as host:
        found = disk_map.disk_map(host, disk)
        ui.emit(found, output, lambda: _table(found), lambda: [layer.path for layer in found.chain.layers])


def check(
    disk: DiskName,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be; as it was where not all can.")] = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Look for damage in the files of a disk whose VM does not run, and exit 10 when there is any."""
    from vmctl import disk_copy

    with opened(connect) as host:
        found = disk_copy.check(host, disk, reporter(), repair=repair, dry=dry_run)
        bad = [one.path for one in found if one.result is not None and not one.result.clean]
        rows = []
        for one in found:
            if one.result is None:
                rows.append((one.path, one.note, "", ""))
            else:
                verdict = "clean" if one.result.clean else "damaged" + (f"; {one.note}" if one.note else "")
                rows.append((one.path, verdict, str(one.result.corruptions), str(one.result.leaks)))
        header = ("FILE", "RESULT", "CORRUPTIONS", "LOST CLUSTERS")
        ui.emit(found, output, lambda: ui.columns(header, rows), lambda: [one.path for one in found])
        if bad:
            hint = (
                "restore it from a backup"
                if repair and not dry_run
                else "vmctl disk check --repair mends what can be, in a copy"
            )
            raise ImageError(f"cannot call {disk} whole: {', '.join(bad)} is damaged", hint=hint)


def compact(
    disk: DiskName,
    compress: Annotated[bool, typer.Option("--compress", help="Compress what is in it; qcow2 only.")] = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Give the host back what a disk takes without need; its VM must not run."""
    from vmctl import disk_copy

    with opened(connect) as host:
        done = disk_copy.compact(host, disk, reporter(), compress=compress, dry=dry_run)
        ui.emit(done, output, lambda: _told(done, dry_run), lambda: [done.path])


def flatten(
    disk: DiskName, dry_run: DryRunOption = False, connect: ConnectOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Make a disk need no other, also while its VM runs."""
    from vmctl import disk_copy

    with opened(connect) as host:
        done = disk_copy.flatten(host, disk, reporter(), dry=dry_run)
        ui.emit(done, output, lambda: _told(done, dry_run), lambda: [done.path])


def rebase(
    disk: DiskName,
    onto: Annotated[str, typer.Option("--onto", metavar="DISK", help="Disk it shall be based on.")],
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Base a disk on another one, its content the same; while its VM runs, only on one that is below it already."""
    from vmctl import disk_copy

    with opened(connect) as host:
        done = disk_copy.rebase(host, disk, onto, reporter(), dry=dry_run)
        ui.emit(done, output, lambda: _told(done, dry_run), lambda: [done.path])
