"""vmctl disk pool: storage pools of any kind."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from vmctl import ui
from vmctl.choices import PoolType
from vmctl.cli.command import Command, group
from vmctl.cli.options import ConnectOption, DryRunOption, OutputOption, YesOption, opened, refuse_unless_yes, reporter
from vmctl.ui import Output

app = group("Storage pools.")
PoolName = Annotated[str, typer.Argument(metavar="POOL", help="Name of the pool.")]


@app.command("list", cls=Command)
def list_(connect: ConnectOption = None, output: OutputOption = Output.TABLE) -> None:
    """List storage pools."""
    from vmctl import pools

    with opened(connect) as host:
        found = pools.list_pools(host)
        ui.emit(
            found,
            output,
            lambda: ui.columns(
                ("NAME", "TYPE", "STATE", "SIZE", "FREE", "SOURCE", "PATH"),
                [
                    (
                        p.name,
                        p.type,
                        "active" if p.active else "inactive",
                        ui.size(p.capacity) if p.active else "",
                        ui.size(p.available) if p.active else "",
                        p.source,
                        p.path,
                    )
                    for p in found
                ],
            ),
            lambda: [p.name for p in found],
        )


@app.command(cls=Command)
def create(
    name: PoolName,
    type: Annotated[PoolType, typer.Option("--type", help="What it is made of.")] = PoolType.DIR,
    path: Annotated[str, typer.Option("--path", metavar="FOLDER", help="Its folder, or where it is mounted.")] = "",
    device: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--device", metavar="PATH", help="Block device of an fs, or of a new volume group. Repeatable."),
    ] = None,
    host_name: Annotated[str, typer.Option("--host", metavar="HOST", help="Server of nfs, iscsi or rbd.")] = "",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="Its port.")] = 0,
    export: Annotated[str, typer.Option("--export", metavar="FOLDER", help="Folder on the NFS server.")] = "",
    iqn: Annotated[str, typer.Option("--iqn", metavar="IQN", help="Name of the iSCSI target.")] = "",
    initiator: Annotated[str, typer.Option("--initiator", metavar="IQN", help="This host's own iSCSI name.")] = "",
    source_name: Annotated[str, typer.Option("--source-name", metavar="NAME", help="Volume group, or RBD pool.")] = "",
    format: Annotated[str, typer.Option("--format", metavar="NAME", help="File system, such as ext4.")] = "",
    user: Annotated[str, typer.Option("--user", metavar="USER", help="User of CHAP or Ceph.")] = "",
    secret: Annotated[str, typer.Option("--secret", metavar="UUID", help="libvirt's secret with the password.")] = "",
    no_start: Annotated[bool, typer.Option("--no-start", help="Define it only.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--print-xml", help="Print the pool's XML; change nothing.")
    ] = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a storage pool of what is there: a folder, a file system, an NFS export, a volume group, iSCSI, RBD."""
    from vmctl import pools

    devices = tuple(device or ())
    wanted = pools.NewPool(
        name, type, path, devices, host_name, port, export, iqn, initiator, source_name, format, user, secret
    )
    with opened(connect) as host:
        if dry_run:
            ui.write(pools.plan_create(host, wanted))
            return
        made = pools.create(host, wanted, reporter(), start=not no_start)
        ui.emit(made, output, lambda: made.name, lambda: [made.name])


@app.command(cls=Command)
def show(name: PoolName, connect: ConnectOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show a pool and what is in it."""
    from vmctl import pools

    with opened(connect) as host:
        found = pools.show(host, name)
        pool = found.pool
        pairs = [
            ("name", pool.name),
            ("type", pool.type),
            ("state", "active" if pool.active else "inactive"),
            ("starts with host", "yes" if pool.autostart else "no"),
            ("path", pool.path),
            ("source", pool.source),
            ("size", f"{ui.size(pool.capacity)}, {ui.size(pool.available)} free" if pool.active else ""),
            ("VMs", ", ".join(found.users)),
            ("volumes", "\n".join(f"{v.name} ({v.format}, {ui.size(v.capacity)})" for v in found.volumes)),
        ]
        ui.emit(found, output, lambda: ui.fields(pairs), lambda: [pool.name])


@app.command(cls=Command)
def delete(
    name: PoolName,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Forget a pool in which no VM has a disk. What is in it stays."""
    from vmctl import pools

    with opened(connect) as host:
        found = pools.deletable(host, name)
        lines = [f"pool {name}; its {len(found.volumes)} volumes stay in {found.pool.path or found.pool.source}"]
        if not dry_run:
            refuse_unless_yes(lines, yes=yes)
            pools.delete(host, name, reporter())
        gone = {"pool": name, "stay": [volume.name for volume in found.volumes]}
        ui.emit(gone, output, lambda: f"would delete {lines[0]}" if dry_run else name, lambda: [name])
