"""vmctl start, stop, reboot, reset, pause, resume, save, rename, autostart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmctl import ui
from vmctl.cli.options import ConnectOption, Name, Names, TimeoutOption, WaitOption, goal_of, on_vms, opened, reporter

if TYPE_CHECKING:
    from vmctl.hosts import Host


def start(
    names: Names,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Also one that may run on a host that cannot be asked: that one is gone."),
    ] = False,
    wait: WaitOption = None,
    timeout: TimeoutOption = None,
    connect: ConnectOption = None,
) -> None:
    """Start VMs; one with saved memory goes on where it was. A running one is left alone."""
    from vmctl import lifecycle

    report, goal = reporter(), goal_of(wait)

    def work(host: Host, name: str) -> str:
        how = lifecycle.start(host, name, report, take_over=take_over)
        if goal is None:
            return how
        from vmctl import readiness
        from vmctl.events import stages_of
        from vmctl.hypervisor import domain

        vm = domain.find(host.conn, name)
        where = readiness.wait_for(host, vm, goal, timeout_s=timeout, report=stages_of(name, report))
        return f"{how}; {goal}" + (f" at {where.host}" if where else "")

    on_vms(connect, names, "start", work, lambda how: how)


def stop(
    names: Names,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Pull the plug if the guest does not stop in time.")
    ] = False,
    timeout: TimeoutOption = None,
    connect: ConnectOption = None,
) -> None:
    """Stop VMs: by the power button (ACPI), then the guest agent, then, with --force, by pulling the plug."""
    from vmctl import lifecycle

    report = reporter()
    on_vms(
        connect,
        names,
        "stop",
        lambda host, name: lifecycle.stop(host, name, report, timeout_s=timeout, force=force),
        lambda how: how,
    )


def reboot(names: Names, timeout: TimeoutOption = None, connect: ConnectOption = None) -> None:
    """Ask the guests to restart, and wait until their machines start anew."""
    from vmctl import lifecycle

    on_vms(
        connect,
        names,
        "reboot",
        lambda host, name: lifecycle.reboot(host, name, timeout_s=timeout),
        lambda _: "rebooting",
        events=True,
    )


def reset(names: Names, connect: ConnectOption = None) -> None:
    """Restart VMs at once, without asking the guests."""
    from vmctl import lifecycle

    on_vms(connect, names, "reset", lambda host, name: lifecycle.reset(host, name), lambda _: "reset")


def pause(names: Names, connect: ConnectOption = None) -> None:
    """Stop the virtual CPUs; memory stays as it is."""
    from vmctl import lifecycle

    on_vms(
        connect,
        names,
        "pause",
        lambda host, name: lifecycle.pause(host, name),
        lambda changed: "paused" if changed else "paused already",
    )


def resume(names: Names, connect: ConnectOption = None) -> None:
    """Let paused VMs run on."""
    from vmctl import lifecycle

    on_vms(
        connect,
        names,
        "resume",
        lambda host, name: lifecycle.resume(host, name),
        lambda changed: "running" if changed else "running already",
    )


def save(names: Names, connect: ConnectOption = None) -> None:
    """Save memory to disk and stop; `start` goes on from there."""
    from vmctl import lifecycle

    report = reporter()
    on_vms(
        connect,
        names,
        "save",
        lambda host, name: lifecycle.save(host, name, report),
        lambda changed: "saved" if changed else "saved already",
    )


def rename(
    name: Name,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new name.")],
    connect: ConnectOption = None,
) -> None:
    """Rename a stopped VM. Its disks, address and host key stay its own."""
    from vmctl import lifecycle

    with opened(connect) as host:
        lifecycle.rename(host, name, new, reporter())
    ui.say(new)


def autostart(
    names: Names,
    off: Annotated[bool, typer.Option("--off", help="Do not start with the host.")] = False,
    connect: ConnectOption = None,
) -> None:
    """Start VMs with their host, or with --off no longer."""
    from vmctl import lifecycle

    report = reporter()
    on_vms(
        connect,
        names,
        "set autostart of",
        lambda host, name: lifecycle.autostart(host, name, report, on=not off),
        lambda _: f"autostart {'off' if off else 'on'}",
    )
