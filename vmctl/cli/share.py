"""vmctl share, unshare: folders of the host in a guest."""

from __future__ import annotations

from typing import Annotated

import typer

from vmctl import ui
from vmctl.cli.options import ConnectOption, Name, OutputOption, opened, reporter
from vmctl.ui import Output


def share(
    name: Name,
    folders: Annotated[str, typer.Argument(metavar="HOST:GUEST[:ro]", help="Folder here, and where the guest has it.")],
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Mount a folder of the host in a guest, by virtiofs where that can be, else by 9p."""
    from vmctl import share as sharing
    from vmctl import spec

    wanted = spec.parse_share(folders)
    with opened(connect) as host:
        done = sharing.share(host, name, wanted, reporter())

        def told() -> str:
            text = f"{name}: {wanted.folder} is at {wanted.mount}, from {done.there} on ({done.driver})"
            return text if done.done else f"{text}; in the guest, run:\n{done.command}"

        ui.emit(done, output, told, lambda: [done.tag])


def unshare(
    name: Name,
    mount: Annotated[str, typer.Argument(metavar="GUEST", help="Where the guest has the folder.")],
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Take a shared folder from a guest: at once where it can be unplugged, else from its next start on."""
    from vmctl import share as sharing

    with opened(connect) as host:
        done = sharing.unshare(host, name, mount, reporter())

        def told() -> str:
            text = f"{name}: {done.folder} is gone from {mount}, from {done.gone} on"
            return text if done.done else f"{text}; in the guest, as root, run:\n{done.command}"

        ui.emit(done, output, told, lambda: [done.tag])
