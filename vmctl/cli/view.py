"""vmctl view, screenshot: the guest's screen."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli.options import ConnectOption, Name, note, opened, until_ctrl_c


def view(
    name: Name,
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="Port of the page; 0: a free one.")] = 0,
    no_open: Annotated[bool, typer.Option("--no-open", help="Only print the address.")] = False,
    connect: ConnectOption = None,
) -> None:
    """Show the screen in a browser, by noVNC, served on loopback until Ctrl-C."""
    from vmctl.view import served

    with opened(connect) as host, served(host, name, port=port) as url:
        ui.write(url + "\n")
        if not no_open:
            _open(url)
        note("Ctrl-C ends")
        with until_ctrl_c():
            threading.Event().wait()


def _open(url: str) -> None:
    """Hand the page to the desktop's browser, where there is a desktop."""
    opener = shutil.which("xdg-open")
    if opener and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        subprocess.Popen([opener, url], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def screenshot(
    name: Name,
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="FILE", help="File to write."),
    ] = None,
    connect: ConnectOption = None,
) -> None:
    """Save what is on the screen as PNG, by default in NAME.png."""
    from vmctl.view import screenshot as save

    path = file or Path(f"{name}.png")
    with opened(connect) as host:
        size = save(host, name, path)
        note(ui.size(size))
        ui.say(str(path))
