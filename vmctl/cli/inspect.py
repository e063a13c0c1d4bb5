"""vmctl list, show, wait, logs, events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli.options import (
    GLOBALS,
    ConnectOption,
    Name,
    Names,
    OutputOption,
    TimeoutOption,
    each,
    fleet_of_config,
    note,
    opened,
    reporter,
    until_ctrl_c,
)
from vmctl.errors import PartialFailure, SpecError
from vmctl.ui import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from vmctl.detail import Detail
    from vmctl.fleet_events import HostEvent
    from vmctl.hypervisor.states import State
    from vmctl.listing import Row

_HEADER = ("NAME", "STATE", "ACCEL", "VCPUS", "MEMORY", "ADDRESS", "HOST", "IMAGE", "UPTIME")


_AGENT = {"frozen": "answers; file systems frozen (vmctl thaw)", "silent": "connected, but does not answer"}


def _table(rows: Sequence[Row]) -> str:
    return ui.columns(
        _HEADER,
        [
            (
                r.name,
                r.state,
                r.accel,
                str(r.vcpus or ""),
                ui.memory(r.memory_mib) if r.vcpus else "",
                r.address,
                r.host,
                r.image,
                ui.duration(r.uptime_s),
            )
            for r in rows
        ],
    )


def list_(
    state: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--state", "-s", metavar="STATE", help="Only VMs in this state. Repeatable."),
    ] = None,
    label: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--label", "-l", metavar="KEY[=VALUE]", help="Only VMs with this label. Repeatable."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show again whenever something changes; Ctrl-C ends.")
    ] = False,
    all_hosts: Annotated[bool, typer.Option("--all-hosts", help="Of all hosts that `vmctl host list` lists.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Longest wait for each of --all-hosts; 10.")
    ] = 10.0,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List VMs by name, n2 before n10. With -w, JSON is one line for each list.

    With --all-hosts, all are asked at once; one that does not answer in time is a row of state unreachable, and the
    exit code is 14.
    """
    from vmctl import listing
    from vmctl.hypervisor.states import State

    known = {one.value: one for one in State}
    if unknown := [text for text in state or [] if text not in known]:
        raise SpecError(f"cannot list VMs: {unknown[0]!r} is no state", hint="states: " + ", ".join(known))
    states = {known[text] for text in state or []}
    labels = {key: value if sep else None for key, sep, value in (text.partition("=") for text in label or [])}
    if all_hosts:
        if (one := connect or GLOBALS.connect) or watch:
            raise SpecError(f"cannot list VMs: --all-hosts goes with no {'--connect' if one else '--watch'}")
        _list_all(states, labels, timeout, output)
        return
    with opened(connect, events=watch) as host:

        def show(emit: Callable[..., None]) -> None:
            rows = listing.rows(host, states=states, labels=labels)
            emit(rows, output, lambda: _table(rows), lambda: [row.name for row in rows])

        if not watch:
            show(ui.emit)
        else:
            from vmctl.hypervisor import events

            # Shown first once nothing that comes after can be missed.
            with until_ctrl_c():
                for _ in events.watch(host.conn, ready=lambda: show(ui.emit_again), idle=ui.require_reader):
                    if output in {Output.TABLE, Output.NAME}:
                        ui.clear_or_blank()
                    show(ui.emit_again)


def _list_all(states: set[State], labels: dict[str, str | None], timeout: float, output: Output) -> None:
    from vmctl import fleet

    asked = fleet_of_config()
    rows, failures = fleet.rows(asked, states=states, labels=labels, timeout_s=timeout)
    ui.emit(rows, output, lambda: _table(rows), lambda: [row.name for row in rows if row.name])
    if failures:
        raise PartialFailure(
            f"cannot list the VMs of {len(failures)} of {len(asked.entries())} hosts", failures=failures
        )


def _details(d: Detail) -> str:
    asked = f"asked: {d.accel['requested']}; " if d.accel["requested"] else ""
    accel = f"{d.accel['chosen']}  ({asked}{d.accel['reason']})"
    disks = "\n".join(
        f"{x.target}  {x.source or 'empty'}  {x.format}{'  read-only' if x.readonly else ''}" for x in d.disks
    )
    nics = "\n".join(f"{x.mac}  {x.source}  {x.model}" for x in d.nics)
    shares = "\n".join(
        f"{x.folder} -> {x.mount or '?'}  {x.driver}{'  read-only' if x.readonly else ''}"
        + ("" if x.live or d.uptime_s is None else "  from its next start on")
        for x in d.shares
    )
    labels = "\n".join(f"{key}={value}" for key, value in d.labels.items())
    state = f"{d.state} ({d.why})" if d.why else d.state.value
    return ui.fields(
        [
            ("name", d.name),
            ("state", state),
            ("uptime", ui.duration(d.uptime_s)),
            ("description", d.description),
            ("labels", labels),
            ("accel", accel),
            ("vcpus", str(d.vcpus)),
            ("memory", ui.memory(d.memory_mib)),
            ("cpu", d.cpu),
            ("machine", f"{d.machine}, {d.firmware}"),
            ("tpm", _tpm(d)),
            ("image", f"{d.image}  {d.image_digest}".strip()),
            ("address", d.address),
            ("addresses", "\n".join(f"{x.interface}  {x.address}" for x in d.addresses)),
            ("ssh", f"{d.ssh_user}, host key {d.ssh_host_key}" if d.ssh_host_key else ""),
            ("disks", disks),
            ("nics", nics),
            ("shares", shares),
            ("graphics", "" if d.graphics == "none" else d.graphics),
            ("agent", _AGENT.get(d.agent_state, d.agent_state)),
            ("console log", d.console_log),
            ("autostart", "on" if d.autostart else "off"),
            ("host", d.host),
            ("uuid", d.uuid),
        ]
    )


def _tpm(d: Detail) -> str:
    if d.tpm is None:
        return ""
    what = "swtpm" if d.tpm.backend == "emulator" else d.tpm.backend
    return f"{d.tpm.version or '?'}, {d.tpm.model} ({what})"


def show(names: Names, connect: ConnectOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show everything about VMs. With -o json, one VM is an object and several are a list."""
    from vmctl.detail import details
    from vmctl.listing import matching

    with opened(connect) as host:
        found = details(host, matching(host, names))
        value = found[0] if len(names) == 1 and len(found) == 1 else found
        ui.emit(value, output, lambda: "\n\n".join(map(_details, found)), lambda: [d.name for d in found])


def wait(
    names: Names,
    goal: Annotated[
        str, typer.Option("--for", metavar="GOAL", help="running, ip, ssh, agent, cloud-init or stopped.")
    ] = "ssh",
    timeout: TimeoutOption = None,
    connect: ConnectOption = None,
) -> None:
    """Wait until VMs run, have an address, answer SSH or by agent, are set up by cloud-init, or have stopped."""
    from vmctl import readiness
    from vmctl.events import stages_of
    from vmctl.hypervisor import domain
    from vmctl.listing import matching
    from vmctl.readiness import Goal

    if goal not in list(Goal):
        raise SpecError(f"cannot wait for {goal!r}", hint="goals: " + ", ".join(Goal))
    report = reporter()
    with opened(connect) as host:
        wanted = matching(host, names)

        def work(name: str) -> str:
            vm = domain.find(host.conn, name)
            told = stages_of(name, report) if len(wanted) > 1 else report
            where = readiness.wait_for(host, vm, Goal(goal), timeout_s=timeout, report=told)
            return where.host if where else ""

        each(
            wanted,
            work,
            lambda name, address: ui.say(f"{name}: {goal}" + (f" at {address}" if address else "")),
            "wait for",
        )


def logs(
    name: Name,
    lines: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--lines", "-n", min=0, help="Only the last N lines."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the guest prints; Ctrl-C ends.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Keep terminal escapes.")] = False,
    connect: ConnectOption = None,
) -> None:
    """Show what the guest printed on its serial console."""
    from vmctl import guest
    from vmctl.hypervisor import domain

    with opened(connect) as host:
        vm = domain.find(host.conn, name)
        text = guest.console_text(host, vm)
        shown = text if raw else guest.plain(text)
        if lines is not None:
            shown = "".join(shown.splitlines(keepends=True)[-lines:]) if lines else ""
        ui.write(shown)
        if follow:
            with until_ctrl_c():
                for more in guest.follow_console(host, vm, start=len(text.encode())):
                    ui.write(more if raw else guest.plain(more))


def events(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[NAME...]", help="Only events of these VMs; a glob also of later ones."),
    ] = None,
    count: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--count", metavar="N", min=1, help="End after N events of VMs."),
    ] = None,
    all_hosts: Annotated[bool, typer.Option("--all-hosts", help="Of all hosts that `vmctl host list` lists.")] = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what happens to VMs as it happens: a line each; with -o json, a JSON object per line.

    With --all-hosts, one that does not answer or was lost is a line of its own, and is looked for again; the others go
    on. A host that is watched alone and lost is an error.
    """
    from vmctl import fleet_events
    from vmctl.fleet_events import HostEvent
    from vmctl.hypervisor import domain
    from vmctl.hypervisor import events as stream
    from vmctl.listing import is_glob

    def begun() -> None:
        note("watching; Ctrl-C ends")

    names = names or []
    if all_hosts:
        if connect or GLOBALS.connect:
            raise SpecError("cannot show events: --all-hosts goes with no --connect")
        stream.start_loop()
        asked = fleet_of_config()
        wanted = {*names, *fleet_events.known(asked, [one for one in names if not is_glob(one)])}
        with until_ctrl_c(only_end=count is None):
            _show(fleet_events.watch(asked, begun, ui.require_reader), wanted, count, output, with_host=True)
        return
    with opened(connect, events=True) as host:
        wanted = {one if is_glob(one) else domain.find(host.conn, one).name for one in names}
        heard = stream.watch(host.conn, ready=begun, idle=ui.require_reader)
        with until_ctrl_c(only_end=count is None):
            _show((HostEvent.of(host.name, one) for one in heard), wanted, count, output, with_host=False)


def _show(
    heard: Iterable[HostEvent], wanted: Collection[str], count: int | None, output: Output, *, with_host: bool
) -> None:
    """A line for each event of the VMs that are meant, and of hosts, which are none of those that are counted."""
    import fnmatch
    import json

    seen = 0
    for event in heard:
        if wanted and event.name and not any(fnmatch.fnmatchcase(event.name, pattern) for pattern in wanted):
            continue
        if output is Output.NAME:
            ui.write(f"{event.name}\n" if event.name else "")
        elif output in {Output.JSON, Output.YAML}:
            ui.write(json.dumps(ui.jsonable(event), ensure_ascii=False) + "\n")
        else:
            stamp = event.time.astimezone().strftime("%H:%M:%S.%f")[:-3]
            where = f"{ui.visible(event.host)}  " if with_host else ""
            said = f"{ui.visible(event.name) or '-'}  {event.event}  {ui.visible(event.detail)}"
            ui.write(f"{stamp}  {where}{said}".rstrip() + "\n")
        seen += bool(event.name)
        if seen == count:
            return
