"""Moving all VMs off a host, each to where there is most room; what did not move is left for the next run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vmctl import migrate
from vmctl.config import HostEntry
from vmctl.errors import PreflightFailed, SpecError, VmctlError
from vmctl.events import Reporter, Warned
from vmctl.fleet import Fleet, called, each
from vmctl.hypervisor import inventory, node
from vmctl.hypervisor.domain import ACTIVE
from vmctl.migrate import Moved, Wish
from vmctl.migrate_ends import Ends

_ASK_S = 15.0


class Load(NamedTuple):
    """A VM to be moved: what it takes on its new host, nothing when it is stopped."""

    name: str
    memory_mib: int


class Plan(NamedTuple):
    """A VM and the hosts it may go to, best first."""

    vm: str
    hosts: tuple[str, ...]


def plan(vms: Sequence[Load], room: Mapping[str, int]) -> tuple[Plan, ...]:
    """The largest first, each to the host with most memory left once those before it are there. Pure."""
    left = dict(room)
    found = []
    for vm in sorted(vms, key=lambda one: (-one.memory_mib, one.name)):
        order = sorted(left, key=lambda host: (-left[host], host))
        found.append(Plan(vm.name, tuple(order)))
        if order:
            left[order[0]] -= vm.memory_mib
    return tuple(found)


def look(
    fleet: Fleet, source: HostEntry, to: Sequence[str], report: Reporter, *, only: Sequence[str] | None = None
) -> tuple[Plan, ...]:
    """What would go where: all VMs, or those of ``only``. Raises SpecError where no other host answers."""
    others = [one for one in fleet.entries(to) if called(one) != called(source)]
    room: dict[str, int] = {}
    for name, answer in each(others, lambda entry: _available(fleet, entry), _ASK_S):
        if isinstance(answer, VmctlError):
            report(Warned(f"{name} takes no VMs: {answer.message}"))
        else:
            room[name] = answer
    if not room:
        raise SpecError(f"cannot move VMs off {called(source)}: no other host answers", hint="vmctl host check")
    with fleet.open(source) as host:
        vms = [
            Load(one.name, one.memory_mib if one.state in ACTIVE else 0)
            for one in inventory.list_domains(host.conn)
            if only is None or one.name in only
        ]
    return plan(vms, room)


def _available(fleet: Fleet, entry: HostEntry) -> int:
    with fleet.open(entry) as host:
        return node.load(host.conn).available_mib


def move(fleet: Fleet, source: HostEntry, one: Plan, wish: Wish, report: Reporter) -> Moved:
    """Move a VM to the first of its hosts that nothing stands against. Raises as ``migrate`` does."""
    refused: list[tuple[str, str]] = []
    for name in one.hosts:
        with Ends(fleet, source, next(entry for entry in fleet.entries() if called(entry) == name)) as ends:
            try:
                return migrate.migrate(ends, one.vm, wish, report)
            except PreflightFailed as error:
                refused += [(f"{name}: {what}", mend) for what, mend in error.problems]
    raise PreflightFailed(f"cannot move VM {one.vm} off {called(source)}: no host can take it", problems=refused)
