"""vmctl host: the group, with add, list, show, check, remove and top; the others are in files of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli.command import Command, group
from vmctl.cli.diagnose import info
from vmctl.cli.host_plan import balance, consolidate, drain
from vmctl.cli.host_setup import setup
from vmctl.cli.options import HostName, HostNames, OutputOption, fleet_of_config, note, until_ctrl_c
from vmctl.errors import SpecError
from vmctl.ui import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmctl.fleet import HostRow, TopRow
    from vmctl.host_add import Trust
    from vmctl.host_check import HostFinding
    from vmctl.host_show import HostDetail

app = group("Hosts that VMs run on.")
app.command("info", cls=Command)(info)
app.command("setup", cls=Command)(setup)

HostTimeout = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Longest wait for each host.")
]


@app.command("add", cls=Command)
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it.")],
    uri: Annotated[str, typer.Argument(metavar="URI", help="qemu+ssh://USER@HOST/system, or qemu+tls://HOST/system.")],
    host_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--host-key", metavar="KEY", help="The SSH host key it must show, as in its .pub file."),
    ] = None,
    fingerprint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--fingerprint", metavar="SHA256:…", help="Fingerprint of the SSH host key it must show."),
    ] = None,
    peer: Annotated[str, typer.Option("--peer", metavar="URI", help="How other hosts reach it, if not by URI.")] = "",
    address: Annotated[
        str, typer.Option("--address", metavar="ADDRESS", help="Where others send migrations to, if not to URI's.")
    ] = "",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let qemu+tcp be: anyone there can do anything.")
    ] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Add it though it may not answer now.")] = False,
) -> None:
    """Make a host known by a name, in the config file. Its SSH host key is pinned.

    The key is given, or its fingerprint, or your known_hosts has it; else you are asked about the one it shows now.
    """
    from vmctl import host_add

    given = host_add.Wish(
        name, uri, host_key or "", fingerprint or "", peer, address, insecure=insecure, check=not no_check
    )
    added = host_add.add(fleet_of_config(), given, trusts)
    ui.say(f"{name}: {added.uri}" + (f", SSH host key {host_add.fingerprint(added)}" if added.host_key else ""))


def trusts(shown: Trust) -> bool:
    """Whether a person says that this is the key."""
    if not ui.interactive():
        raise SpecError(
            f"cannot trust {shown.host}: its SSH host key is not known, and there is no terminal to ask on",
            hint=f"--fingerprint {shown.fingerprint}, if its `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` agrees",
        )
    ui.note(f"{shown.host} shows the SSH host key {shown.fingerprint} ({shown.kind})")
    return ui.confirm("Is that its key?")


@app.command("list", cls=Command)
def list_(timeout: HostTimeout = 10.0, output: OutputOption = Output.TABLE) -> None:
    """List the hosts of the config file, with what runs there. One that does not answer has state unreachable."""
    from vmctl import fleet

    rows = fleet.hosts(fleet_of_config(), timeout_s=timeout)
    ui.emit(rows, output, lambda: _table(rows), lambda: [row.name for row in rows])
    for row in rows:
        if row.problem:
            note(f"{row.name}: {row.problem}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _memory(mib: int | None) -> str:
    return "" if mib is None else ui.size(mib << 20)


def _table(rows: Sequence[HostRow]) -> str:
    return ui.columns(
        ("NAME", "STATE", "VMS", "RUNNING", "CPUS", "MEMORY", "AVAILABLE", "LIBVIRT", "QEMU", "URI"),
        [
            (
                *(r.name, r.state, _number(r.vms), _number(r.running), _number(r.cpus)),
                *(_memory(r.memory_mib), _memory(r.available_mib), r.libvirt, r.qemu, r.uri),
            )
            for r in rows
        ],
    )


@app.command("show", cls=Command)
def show(name: HostName, output: OutputOption = Output.TABLE) -> None:
    """Show everything about a host."""
    from vmctl import host_show

    found = host_show.show(fleet_of_config(), name)
    ui.emit(found, output, lambda: _details(found), lambda: [found.name])


def _details(d: HostDetail) -> str:
    return ui.fields(
        [
            ("name", d.name),
            ("uri", d.uri),
            ("host name", d.hostname),
            ("uuid", d.uuid),
            ("ssh host key", d.fingerprint),
            ("other hosts", f"reach it by {d.peer}, and send migrations to {d.address or 'what it says itself'}"),
            ("cpu", f"{d.cpus} x {d.cpu_model} ({d.arch})"),
            ("memory", f"{_memory(d.memory_mib)}, {_memory(d.available_mib)} available"),
            ("libvirt", d.libvirt),
            ("qemu", d.qemu),
            ("guests", ", ".join(d.domain_types)),
            ("vms", f"{d.vms}, {d.running} running with {d.vcpus} vCPUs and {_memory(d.given_mib)}"),
            ("pools", "\n".join(f"{p.name}  {p.state}  {p.path}  {ui.size(p.available)} free" for p in d.pools)),
            ("networks", "\n".join(d.networks)),
        ]
    )


@app.command("check", cls=Command)
def check(names: HostNames = None, timeout: HostTimeout = 45.0, output: OutputOption = Output.TABLE) -> None:
    """Look at hosts, all or those named: whether they answer, can be trusted, have room, the right time, and reach
    each other.

    Exits 1 while something is broken.
    """
    from vmctl import host_check

    found = host_check.check(fleet_of_config(), names or (), timeout_s=timeout)
    broken = [one for one in found if one.result == "failed"]
    ui.emit(found, output, lambda: _findings(found), lambda: dict.fromkeys(one.host for one in broken))
    if broken:
        raise typer.Exit(1)


def _findings(found: Sequence[HostFinding]) -> str:
    lines = []
    for one in found:
        lines.append(f"{one.result:<8} {one.host} {one.name}: {ui.visible(one.detail)}")
        if one.mend and one.result != "ok":
            lines.append(f"{'':<8}   mend: {one.mend}")
    return "\n".join(lines)


@app.command("remove", cls=Command)
def remove(name: HostName) -> None:
    """Take a host out of the config file. Nothing is done on the host."""
    from vmctl import config, host_book

    folders = config.folders()
    gone = host_book.remove(folders, name)
    ui.say(f"{name}: no longer known; it was {gone.uri}")
    if config.load(host_book.path(folders)).connect == name:
        note("`connect` in the config file still names it, for every command without -c")


@app.command("top", cls=Command)
def top(
    names: HostNames = None,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.1, help="Time between looks.")
    ] = 2.0,
    count: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--count", metavar="N", min=1, help="End after N looks; else on Ctrl-C."),
    ] = None,
    timeout: HostTimeout = 10.0,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show how busy hosts are, again and again. With -o json, each look is a list on a line of its own."""
    from vmctl import fleet
    from vmctl.wait import pause

    watch = fleet.Watch(fleet_of_config(), names or (), timeout_s=timeout)
    watch.look()  # how busy is told from the difference of two looks
    looks = 0
    with until_ctrl_c(only_end=count is None):
        while count is None or looks < count:
            pause(interval)
            ui.require_reader()
            rows = watch.look()
            if output in {Output.TABLE, Output.NAME}:
                ui.clear_or_blank(first=not looks)
            _show(rows, output)
            looks += 1


def _show(rows: Sequence[TopRow], output: Output) -> None:
    ui.emit_again(rows, output, lambda: _top(rows), lambda: [row.name for row in rows])


def _top(rows: Sequence[TopRow]) -> str:
    return ui.columns(
        ("NAME", "CPU%", "CPUS", "VCPUS", "MEMORY", "AVAILABLE", "GIVEN", "RUNNING", "PROBLEM"),
        [
            (
                *(r.name, _number(r.cpu_percent), _number(r.cpus), _number(r.vcpus), _memory(r.memory_mib)),
                *(_memory(r.available_mib), _memory(r.given_mib), _number(r.running), r.problem),
            )
            for r in rows
        ],
    )


for verb in (drain, balance, consolidate):
    app.command(cls=Command)(verb)
