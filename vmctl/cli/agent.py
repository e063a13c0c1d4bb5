"""vmctl freeze, thaw, trim, passwd, time-sync: what the guest agent does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from vmctl import ui
from vmctl.cli.options import ConnectOption, Name, Names, note, on_vms, opened
from vmctl.errors import SpecError

if TYPE_CHECKING:
    from vmctl.agent import Trimmed


def _counted(count: int, done: str, none: str) -> str:
    return f"{count} file system{'s' * (count != 1)} {done}" if count else none


def freeze(names: Names, connect: ConnectOption = None) -> None:
    """Stop all writing to the guests' file systems, for a copy of their disks taken meanwhile. `thaw` ends it."""
    from vmctl import agent

    on_vms(connect, names, "freeze", agent.freeze, lambda n: _counted(n, "frozen", "frozen already"))


def thaw(names: Names, connect: ConnectOption = None) -> None:
    """Let frozen file systems be written to again."""
    from vmctl import agent

    on_vms(connect, names, "thaw", agent.thaw, lambda n: _counted(n, "thawed", "nothing was frozen"))


def _trimmed(parts: Sequence[Trimmed]) -> str:
    return ", ".join(ui.visible(f"{p.path} {p.error or ui.size(p.trimmed)}") for p in parts) or "nothing to trim"


def trim(names: Names, connect: ConnectOption = None) -> None:
    """Tell the disks which blocks the guests' file systems no longer use, so that image files can shrink."""
    from vmctl import agent

    on_vms(connect, names, "trim", agent.trim, _trimmed)


def passwd(
    name: Name,
    user: Annotated[
        str, typer.Option("--user", "-u", metavar="USER", help="User in the guest; default: root.")
    ] = "root",
    connect: ConnectOption = None,
) -> None:
    """Set a user's password in the guest. It is asked for, or is the first line of a stdin that is no terminal."""
    from vmctl import agent
    from vmctl.cli.first_boot import taking_password

    with taking_password():
        password = _password(f"New password of {user} in {name}")
        password.encode()
    with opened(connect) as host:
        agent.set_password(host, name, user, password)
        note(f"the password of {user} in {name} is set")


def _password(prompt: str) -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    from getpass import getpass

    first = getpass(f"{prompt}: ")
    if getpass("Again: ") != first:
        raise SpecError("cannot set a password: the two are not the same")
    return first


def time_sync(names: Names, connect: ConnectOption = None) -> None:
    """Set the guests' clocks by this machine's, as after a long pause."""
    from vmctl import agent

    on_vms(connect, names, "set the clock of", agent.sync_time, lambda ahead: f"clock set; it was {_ahead(ahead)}")


def _ahead(seconds: float) -> str:
    return f"{abs(seconds):.3f} s {'ahead' if seconds > 0 else 'behind'}"
