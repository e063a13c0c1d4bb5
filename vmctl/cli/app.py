"""The whole command tree. A command's file is imported when the command is asked for, not before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.main import get_command

from vmctl import __version__
from vmctl.cli.command import Command, GoesOn, Group
from vmctl.cli.options import GLOBALS, ConnectOption, EarlyOutputOption, QuietOption, VerboseOption
from vmctl.ui import Verbosity

_PASS_THROUGH = {"ignore_unknown_options": True, "allow_interspersed_args": False}


class Entry(NamedTuple):
    """Where a command (or a group of commands) is, and its line in the overview."""

    module: str
    attribute: str
    summary: str
    context_settings: Mapping[str, Any] = {}
    kind: type[Command] = Command


COMMANDS: Mapping[str, Entry] = {
    "create": Entry("create", "create", "Create a VM from an image and start it.", kind=GoesOn),
    "list": Entry("inspect", "list_", "List VMs."),
    "show": Entry("inspect", "show", "Show everything about VMs."),
    "wait": Entry("inspect", "wait", "Wait until VMs are running, reachable or stopped."),
    "ssh": Entry("access", "ssh", "Log in by SSH.", _PASS_THROUGH),
    "exec": Entry("access", "exec_", "Run a command in the guest.", _PASS_THROUGH),
    "freeze": Entry("agent", "freeze", "Stop all writing to the guests' file systems."),
    "thaw": Entry("agent", "thaw", "Let frozen file systems be written to again."),
    "trim": Entry("agent", "trim", "Give the guests' free disk blocks back."),
    "passwd": Entry("agent", "passwd", "Set a user's password in the guest."),
    "time-sync": Entry("agent", "time_sync", "Set the guests' clocks by this machine's."),
    "cp": Entry("access", "cp", "Copy files into a guest or out of it."),
    "forward": Entry("forward", "forward", "Lead ports of this machine to ports of a guest."),
    "share": Entry("share", "share", "Mount a folder of the host in a guest."),
    "unshare": Entry("share", "unshare", "Take a shared folder from a guest."),
    "console": Entry("access", "console", "Open the serial console."),
    "view": Entry("view", "view", "Show the screen in a browser."),
    "screenshot": Entry("view", "screenshot", "Save what is on the screen as PNG, by default in NAME.png."),
    "logs": Entry("inspect", "logs", "Show what the guest printed on its serial console."),
    "start": Entry("state", "start", "Start VMs, or bring them back from saved memory."),
    "stop": Entry("state", "stop", "Stop VMs by ACPI, then agent, then --force."),
    "reboot": Entry("state", "reboot", "Ask the guests to restart."),
    "reset": Entry("state", "reset", "Restart VMs at once."),
    "pause": Entry("state", "pause", "Stop the virtual CPUs."),
    "resume": Entry("state", "resume", "Let paused VMs run on."),
    "save": Entry("state", "save", "Save memory to disk and stop."),
    "rename": Entry("state", "rename", "Rename a stopped VM."),
    "autostart": Entry("state", "autostart", "Start VMs with their host, or no longer."),
    "clone": Entry("copies", "clone", "Make new VMs with the disks of a stopped one."),
    "fork": Entry("copies", "fork", "Make new running VMs from a running one."),
    "migrate": Entry("migrate", "migrate", "Move VMs to another host, running ones live."),
    "delete": Entry("create", "delete", "Delete VMs with what is their own."),
    "events": Entry("inspect", "events", "Show what happens to VMs as it happens."),
    "image": Entry("image", "app", "Images that VMs start from."),
    "disk": Entry("disk", "app", "Disks of VMs, and the pools they lie in."),
    "snapshot": Entry("snapshot", "app", "States of VMs to go back to."),
    "backup": Entry("backup", "app", "Backups of VMs, and VMs restored from them."),
    "host": Entry("host", "app", "Hosts that VMs run on."),
    "bench": Entry("bench", "app", "What virtualization costs, measured."),
    "doctor": Entry("diagnose", "doctor", "Find, explain and mend what is wrong with a host."),
    "demo": Entry("diagnose", "demo", "Show the main job from end to end."),
}


class _Loaded(Mapping[str, Any]):
    """The commands by name, each built when it is first looked at."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = _build(name, COMMANDS[name])
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def _build(name: str, entry: Entry) -> Any:
    found = getattr(import_module(f"vmctl.cli.{entry.module}"), entry.attribute)
    if not isinstance(found, typer.Typer):
        alone = _typer()
        alone.command(name, cls=entry.kind, context_settings=dict(entry.context_settings))(found)
        found = alone
    built = get_command(found)
    built.name = name
    return built


class _Top(Group):
    """The top of the tree, with an overview that needs no command imported."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.commands = _Loaded()  # type: ignore[assignment]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the overview."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


def _typer(**values: Any) -> typer.Typer:
    # Plain help: the styled one takes longer to import than most commands take to run.
    return typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **{"add_completion": False} | values,
    )


app = _typer(
    name="vmctl",
    cls=_Top,
    help="Virtual machines on real KVM/QEMU hosts, through libvirt.",
    no_args_is_help=True,
    add_completion=True,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vmctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    connect: ConnectOption = None,
    output: EarlyOutputOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Virtual machines on real KVM/QEMU hosts, through libvirt."""
    GLOBALS.connect, GLOBALS.output = connect, output
    GLOBALS.verbosity = Verbosity.QUIET if quiet else Verbosity.VERBOSE if verbose else Verbosity.NORMAL


def command() -> Any:
    """The tree as an object with ``main``."""
    return get_command(app)
