"""Options and arguments that several commands share, and opening the host they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Optional, TypeVar

import typer

from vmctl import ui
from vmctl.cli.many import each
from vmctl.errors import Interrupted, NotFound, PartialFailure, SpecError, VmctlError
from vmctl.ui import Output, Verbosity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmctl.config import HostEntry
    from vmctl.events import Reporter
    from vmctl.fleet import Fleet
    from vmctl.hosts import Host
    from vmctl.readiness import Goal

__all__ = ["each"]

T = TypeVar("T")


@dataclass(slots=True)
class Globals:
    """What was given before the command."""

    connect: str | None = None
    verbosity: Verbosity = Verbosity.NORMAL
    output: Output | None = None
    wrong: list[str] = field(default_factory=list)  # what the command line has that its options cannot take
    missing: bool = False  # and whether something that cannot be done without is among it


GLOBALS = Globals()


def _complete_vm(incomplete: str) -> list[str]:
    from vmctl.hosts import open_host
    from vmctl.hypervisor import inventory

    try:
        with open_host(GLOBALS.connect) as host:
            return [name for name in inventory.names(host.conn) if name.startswith(incomplete)]
    except VmctlError:
        return []  # a shell that completes has no place for an error


def _complete_image(incomplete: str) -> list[str]:
    from vmctl import images
    from vmctl.hosts import open_host

    try:
        with open_host(GLOBALS.connect) as host:
            return sorted({m.name for m in images.list_images(host) if m.name.startswith(incomplete)})
    except VmctlError:
        return []


def _complete_disk(incomplete: str) -> list[str]:
    from vmctl.hosts import open_host
    from vmctl.hypervisor import disks

    try:
        with open_host(GLOBALS.connect) as host:
            found = [f"{vm}:{one.target}" for vm, _, these in disks.all_disks(host.conn) for one in these]
            return [name for name in found if name.startswith(incomplete)]
    except VmctlError:
        return []


Name = Annotated[str, typer.Argument(metavar="NAME", help="Name (or UUID) of the VM.", autocompletion=_complete_vm)]
Names = Annotated[
    list[str],
    typer.Argument(metavar="NAME...", help="Names of VMs, or globs such as 'web*'.", autocompletion=_complete_vm),
]
ImageName = Annotated[str, typer.Argument(metavar="IMAGE", help="Name of the image.", autocompletion=_complete_image)]
DiskName = Annotated[
    str,
    typer.Argument(
        metavar="DISK", help="VM:TARGET, VM:SERIAL, POOL/VOLUME, VOLUME or a file.", autocompletion=_complete_disk
    ),
]


def complete_host(incomplete: str) -> list[str]:
    """Names of hosts."""
    from vmctl import config

    try:
        known = config.load(config.folders().config / "config.toml").hosts
    except VmctlError:
        return []
    return [name for name in known if name.startswith(incomplete)]


ConnectOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--connect",
        "-c",
        metavar="HOST",
        help="Host: its name (see `vmctl host`), or a libvirt URI such as qemu:///session.",
        autocompletion=complete_host,
    ),
]
HostName = Annotated[str, typer.Argument(metavar="HOST", help="Name of the host.", autocompletion=complete_host)]
HostNames = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="[HOST...]", help="Names of hosts; default: all.", autocompletion=complete_host),
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="Form of the result.")]
# Of the commands' own options, those that may stand before a command, too.
EarlyOutputOption = Annotated[
    Optional[Output],  # noqa: UP045
    typer.Option("--output", "-o", help="Form of the result, of commands that have one."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors: no progress, no notes.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="More progress.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]
WaitOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--wait", metavar="GOAL", help="Wait until running, ip, ssh, agent or cloud-init."),
]
TimeoutOption = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        min=0.0,
        help="Longest wait. Default: stop and reboot 30, cloud-init 300, others 60; under TCG thrice that.",
    ),
]
UserOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--user", "-u", metavar="USER", help="User in the guest; the default is the image's."),
]


def reporter() -> Reporter:
    """The Reporter this run asked for."""
    from vmctl import progress  # late: a command that is done at once reports none

    return progress.reporter(GLOBALS.verbosity)


@contextmanager
def until_ctrl_c(*, only_end: bool = True) -> Iterator[None]:
    """What Ctrl-C ends well: a block that has no other end, where it is so. What is before the block it interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        if not only_end:
            raise


@contextmanager
def opened(connect: str | None, *, events: bool = False) -> Iterator[Host]:
    """Open the host that the option, or the global one, or the environment names."""
    if events:
        from vmctl.hypervisor.events import start_loop

        start_loop()
    from vmctl.hosts import open_host

    given = connect or GLOBALS.connect
    # Loaded only when there is something to tell.
    with open_host(given, report=lambda event: reporter()(event)) as host:
        try:
            yield host
        except (VmctlError, Interrupted) as error:
            tell_of_hosts(error, [host.entry] if host.entry else [], [one.name for one in host.others])
            if given:
                tell_where(error, given)
            raise


# What a hint may name that works on the host of the command it is the hint of.
_ON_HOST = re.compile(
    r"(?<![\w/-])vmctl (?=(?:agent|autostart|console|create|delete|disk|doctor|exec|image|list(?! --all-hosts)|logs|"
    r"pause|rename|reset|resume|save|show|snapshot|start|stop|thaw|trim|unshare|view|wait)\b)"
)


def tell_where(error: VmctlError | Interrupted, given: str) -> None:
    """Let hints of an error name the host that was given with the command: without it they are of another one."""
    for one in _all(error):
        one.hint = on_host(one.hint, given)


def tell_of_hosts(error: VmctlError | Interrupted, entries: Sequence[HostEntry], others: Sequence[str]) -> None:
    """Let an error tell of hosts as people call them; what is not found may be on the ``others``.

    Who named no host has hosts that have names perhaps not in mind: so they are said.
    """
    from vmctl.config import by_name

    for one in _all(error):
        if others and isinstance(one, NotFound) and one.missing == "VM" and not one.meant:
            named = any(entry.name for entry in entries)
            one.hint = "see `vmctl list --all-hosts`" + ("" if named else f"; hosts: {', '.join(others)}")
        for entry in entries:
            one.message = by_name(one.message, entry)


def _all(error: VmctlError | Interrupted) -> tuple[VmctlError | Interrupted, ...]:
    """An error, and those it is made of."""
    return (error, *(error.failures.values() if isinstance(error, PartialFailure) else ()))


def on_host(hint: str, given: str) -> str:
    """A hint whose commands, but those that name a host already, are for the host that was given. Pure."""
    return _ON_HOST.sub(lambda _: f"vmctl -c {shlex.quote(given)} ", hint)


def fleet_of_config() -> Fleet:
    """The hosts of the config file, none of them asked yet."""
    from vmctl import config
    from vmctl.fleet import Fleet

    folders = config.folders()
    return Fleet(config.load(folders.config / "config.toml"), folders)


def note(text: str) -> None:
    """One line beside the result, for people; not with --quiet."""
    if GLOBALS.verbosity is not Verbosity.QUIET:
        ui.note(text)


def refuse_unless_yes(
    what: Sequence[str], *, yes: bool, question: str = "Delete all of this?", hint: str = "add --yes"
) -> None:
    """Show what will be destroyed and ask; without a terminal only --yes goes on.

    Raises SpecError where nobody can be asked, VmctlError after a no.
    """
    if yes:
        return
    for line in what:
        ui.note(f"  {line}")
    if not ui.interactive():
        verb = question.split()[0].lower()
        raise SpecError(f"cannot {verb} without being sure: there is no terminal to ask on", hint=hint)
    if not ui.confirm(question):
        raise VmctlError("nothing was done")


def goal_of(wait: str | None) -> Goal | None:
    """What a started VM is to be waited for. Raises SpecError."""
    if wait is None:
        return None
    from vmctl.readiness import Goal

    if wait not in set(Goal) - {Goal.STOPPED}:
        raise SpecError(f"--wait {wait!r} is none of running, ip, ssh, agent, cloud-init")
    return Goal(wait)


def on_vms(
    connect: str | None,
    names: Sequence[str],
    doing: str,
    work: Callable[[Host, str], T],
    said: Callable[[T], object],
    *,
    events: bool = False,
) -> None:
    """Do ``work`` on each VM that ``names`` matches on the host, and print ``NAME: what was said of it``."""
    from vmctl.listing import matching

    with opened(connect, events=events) as host:
        each(
            matching(host, names),
            lambda name: work(host, name),
            lambda name, result: ui.say(f"{name}: {said(result)}"),
            doing,
        )
