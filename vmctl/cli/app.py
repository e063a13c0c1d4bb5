"""The whole command tree."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.main import get_command

from vmctl import __version__
from vmctl.cli import access, create, diagnose, image, inspect, state
from vmctl.cli.options import GLOBALS, ConnectOption
from vmctl.ui import Verbosity

app = typer.Typer(
    name="vmctl",
    help="Virtual machines on real KVM/QEMU hosts, through libvirt.",
    no_args_is_help=True,
    add_completion=True,
    # Plain help: the styled one takes longer to import than most commands take to run.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vmctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    connect: ConnectOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only results, notes and errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More progress.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Virtual machines on real KVM/QEMU hosts, through libvirt."""
    GLOBALS.connect = connect
    GLOBALS.verbosity = Verbosity.QUIET if quiet else Verbosity.VERBOSE if verbose else Verbosity.NORMAL


create.register(app)
state.register(app)
inspect.register(app)
access.register(app)
diagnose.register(app)
app.add_typer(image.app, name="image")
app.add_typer(diagnose.host_app, name="host")


def command() -> Any:
    """The tree as an object with ``main``."""
    return get_command(app)
