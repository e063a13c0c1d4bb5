"""vmctl console, ssh, exec, cp."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Optional

import typer

from vmctl.cli.options import ConnectOption, Name, UserOption, note, opened, reporter
from vmctl.errors import SpecError

_HOUR_S = 3600.0


class Via(StrEnum):
    """How a command gets into the guest."""

    SSH = "ssh"
    AGENT = "agent"


def console(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Take it over from whoever has it open.")] = False,
    connect: ConnectOption = None,
) -> None:
    """Open the serial console. Ctrl-] leaves it."""
    from vmctl import terminal
    from vmctl.hypervisor import domain
    from vmctl.hypervisor.domain import State

    with opened(connect, events=True) as host:
        vm = domain.find(host.conn, name)
        domain.require(vm, frozenset({State.RUNNING, State.PAUSED}), "open the console of", f"vmctl start {name}")
        if sys.stdin.isatty():
            note(f"connected to {name}; Ctrl-] leaves")
        terminal.attach(host.conn, vm.name, force=force)
        if sys.stdin.isatty():
            note(f"\r\nleft the console of {name}")


def _command(words: list[str] | None) -> list[str]:
    """The words of a command for the guest, without the ``--`` that sets them apart from ours."""
    if words and words[0][:1] == "-" and words[0] != "--":
        raise SpecError(
            f"cannot run {words[0]!r} in a guest: options stand before the VM's name, and a command begins with none",
            hint="vmctl exec [OPTIONS] NAME -- COMMAND",
        )
    return words[1:] if words and words[0] == "--" else words or []


def ssh(
    name: Name,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND...]", help="Command instead of a shell.")
    ] = None,
    user: UserOption = None,
    connect: ConnectOption = None,
) -> None:
    """Log in by SSH, with OpenSSH's client. Only the host key planted at creation is trusted."""
    from vmctl import terminal

    with opened(connect) as host:
        raise typer.Exit(terminal.login(host, name, _command(words), user=user, report=reporter()))


def exec_(
    name: Name,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="Command and arguments, after --.")],
    user: UserOption = None,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give the command a terminal.")] = False,
    no_stdin: Annotated[bool, typer.Option("--no-stdin", "-n", help="Give the command no input.")] = False,
    via: Annotated[Via, typer.Option(help="By SSH, or by the guest agent, which needs no network.")] = Via.SSH,
    timeout: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="SECONDS", min=0.0, help="With --via agent: longest run; an hour by default."),
    ] = None,
    connect: ConnectOption = None,
) -> None:
    """Run a command in the guest: input, output, errors and exit code pass through.

    Example: vmctl exec web1 -- uname -a
    """
    from vmctl import guest, terminal
    from vmctl.login import Terminal

    argv = _command(command)
    if not argv:
        raise SpecError("cannot run a command: none was given", hint="vmctl exec NAME -- COMMAND")
    if via is Via.AGENT:
        if user or tty:
            raise SpecError(
                "cannot run a command: the agent takes no --user and no --tty", hint="leave out --via agent"
            )
        raise typer.Exit(
            _by_agent(connect, name, argv, no_stdin=no_stdin, timeout_s=_HOUR_S if timeout is None else timeout)
        )
    if timeout is not None:
        raise SpecError("cannot run a command: --timeout goes with --via agent only")
    with opened(connect) as host, terminal.raw_if(tty):
        code = guest.execute(
            host,
            name,
            argv,
            stdin=None if no_stdin else terminal.stdin_or_none(),
            out=terminal.writer(1),
            err=terminal.writer(2),
            user=user,
            terminal=Terminal(*terminal.size()) if tty else None,
            report=reporter(),
        )
    raise typer.Exit(code)


def _by_agent(connect: str | None, name: str, argv: list[str], *, no_stdin: bool, timeout_s: float) -> int:
    from vmctl import agent, terminal

    # Its input is taken whole before it begins: what a person might yet type is none.
    given = None if no_stdin or sys.stdin is None or sys.stdin.isatty() else terminal.stdin_or_none()
    with opened(connect) as host:
        return agent.execute(
            host, name, argv, stdin=given, out=terminal.writer(1), err=terminal.writer(2), timeout_s=timeout_s
        )


def cp(
    paths: Annotated[list[str], typer.Argument(metavar="SOURCE... DEST", help="Paths; VM:/path is in a guest.")],
    user: UserOption = None,
    connect: ConnectOption = None,
) -> None:
    """Copy files and folders into a guest or out of it."""
    from vmctl import copying

    if len(paths) < 2:
        raise SpecError("cannot copy: a source and a destination are needed", hint="vmctl cp FILE VM:/path")
    with opened(connect) as host:
        copying.copy(host, paths[:-1], paths[-1], reporter(), user=user)
