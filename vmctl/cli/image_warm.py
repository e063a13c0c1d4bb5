"""vmctl image warm."""

from __future__ import annotations

from typing import Annotated

import typer

from vmctl import ui
from vmctl.cli.options import ConnectOption, DryRunOption, ImageName, OutputOption, opened, reporter
from vmctl.ui import Output


def warm(
    name: ImageName,
    memory: Annotated[str, typer.Option("--memory", "-m", metavar="SIZE", help="Memory of the VMs to be.")] = "512M",
    vcpus: Annotated[int, typer.Option("--vcpus", help="Their number of virtual CPUs.")] = 1,
    remove: Annotated[bool, typer.Option("--remove", help="Delete the state that is kept.")] = False,
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Boot an image once and keep the running state beside it; `create --warm` goes on from there at once."""
    from vmctl import images, spec, warming

    memory_mib = spec.parse_size_mib(memory)
    with opened(connect) as host:
        stem = images.find(host, name).manifest.stem
        if dry_run:
            if remove:
                lines = warming.preview_drop(host, name, reporter())
            else:
                lines = warming.preview(host, name, reporter(), memory_mib=memory_mib, vcpus=vcpus)
            ui.emit({"touches": lines}, output, lambda: "\n".join(lines), lambda: [stem])
            return
        if remove:
            manifest = warming.drop(host, name, reporter())
        else:
            manifest = warming.warm(host, stem, reporter(), memory_mib=memory_mib, vcpus=vcpus)
        ui.emit(manifest, output, lambda: manifest.stem, lambda: [manifest.stem])
