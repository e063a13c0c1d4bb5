"""libvirt's domain states and reasons in vmctl's words."""

from __future__ import annotations

import shlex
from enum import StrEnum

import libvirt


class State(StrEnum):
    """Domain states in vmctl's words. ``saved`` is shut off with a saved memory image; ``creating`` is defined
    by a create that is still at it, or that was cut off; ``crashed`` is a guest whose kernel panicked, kept as it was
    then (its reason is PANICKED), or a machine whose QEMU is gone; ``unreachable`` stands for all VMs of a host that
    does not answer."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    CRASHED = "crashed"
    SUSPENDED = "suspended"
    SAVED = "saved"
    CREATING = "creating"
    UNREACHABLE = "unreachable"


PANICKED = "guest panicked"
MOVED = "moved to another host"
MOVING = frozenset({"migration", "post-copy", "post-copy failed"})  # what a migration pauses one for

# Of these more can be expected; a panicked guest only waits for someone to look at it.
ACTIVE = frozenset({State.RUNNING, State.PAUSED, State.STOPPING, State.SUSPENDED})

_STATES = {
    libvirt.VIR_DOMAIN_NOSTATE: State.STOPPED,
    libvirt.VIR_DOMAIN_RUNNING: State.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: State.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: State.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: State.STOPPING,
    libvirt.VIR_DOMAIN_SHUTOFF: State.STOPPED,
    libvirt.VIR_DOMAIN_CRASHED: State.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: State.SUSPENDED,
}
_PAUSED_WHY = {
    libvirt.VIR_DOMAIN_PAUSED_USER: "asked",
    libvirt.VIR_DOMAIN_PAUSED_MIGRATION: "migration",
    libvirt.VIR_DOMAIN_PAUSED_SAVE: "save",
    libvirt.VIR_DOMAIN_PAUSED_DUMP: "dump",
    libvirt.VIR_DOMAIN_PAUSED_IOERROR: "I/O error",
    libvirt.VIR_DOMAIN_PAUSED_WATCHDOG: "watchdog",
    libvirt.VIR_DOMAIN_PAUSED_CRASHED: "guest crash",
    libvirt.VIR_DOMAIN_PAUSED_STARTING_UP: "starting",
    libvirt.VIR_DOMAIN_PAUSED_POSTCOPY: "post-copy",
    libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED: "post-copy failed",
}
# It runs, and waits for memory that is not there yet, or will not come.
_RUNNING_WHY = {
    libvirt.VIR_DOMAIN_RUNNING_POSTCOPY: "post-copy",
    libvirt.VIR_DOMAIN_RUNNING_POSTCOPY_FAILED: "post-copy failed",
}


def state_of(code: int, reason: int, *, saved: bool = False) -> tuple[State, str]:
    """vmctl's state and the reason worth telling, from libvirt's numbers."""
    state = _STATES.get(code, State.STOPPED)
    if state is State.STOPPED and saved:
        return State.SAVED, ""
    if state is State.STOPPED and reason == libvirt.VIR_DOMAIN_SHUTOFF_CRASHED:
        return State.CRASHED, ""
    if state is State.STOPPED and reason == libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED:
        return state, MOVED
    if state is State.STOPPED and reason == libvirt.VIR_DOMAIN_SHUTOFF_FAILED:
        return state, "failed to start"
    if state is State.CRASHED:
        return state, PANICKED if reason == libvirt.VIR_DOMAIN_CRASHED_PANICKED else ""
    if state is State.PAUSED:
        return state, _PAUSED_WHY.get(reason, "")
    return state, _RUNNING_WHY.get(reason, "") if code == libvirt.VIR_DOMAIN_RUNNING else ""


def told(state: State, why: str) -> str:
    """A state for people, with its reason unless it is the one they think of."""
    return f"{state} ({why})" if why and why != _PAUSED_WHY[libvirt.VIR_DOMAIN_PAUSED_USER] else str(state)


def remedy(name: str, state: State, why: str) -> str:
    """What makes a VM in that state run."""
    if why == PANICKED:
        return f"vmctl logs {name} shows how; vmctl reset {name} restarts it"
    if why == _PAUSED_WHY[libvirt.VIR_DOMAIN_PAUSED_STARTING_UP]:
        return "wait for it; if that has no end: vmctl doctor"
    if state is State.PAUSED and why in MOVING:
        return f"{recovery(name, 'SOURCE', 'TARGET')} asks both hosts where it is, and ends that"
    return f"vmctl resume {name}" if state is State.PAUSED else f"vmctl start {name}"


def recovery(name: str, here: str, there: str, *, keep: bool = False) -> str:
    """The command that ends a migration which was cut off; the hosts as vmctl calls them.

    ``keep``: it was to leave a definition, and disks, where the VM was.
    """
    command = f"vmctl -c {shlex.quote(here)} migrate {name} --to {shlex.quote(there)} --recover"
    return command + (" --keep-source" if keep else "")
