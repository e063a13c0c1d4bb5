"""Where a VM goes: the best of many hosts, and why it is none of the others. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from vmctl.capacity import Ledger
from vmctl.census import Census, Limits, VmSeen

_DEFAULT = Limits()


class Choice(NamedTuple):
    """Where a VM goes, "" for nowhere; how much is in use there then, a share of 1; why not to each other host."""

    host: str
    use: float
    refused: Mapping[str, str]


def place(census: Census, vm: VmSeen, limits: Limits = _DEFAULT) -> Choice:
    """The best host for one VM, new or to be moved: of each kind the least used with room, then the one used least."""
    ledger = Ledger(census, limits)
    best = ledger.least(vm)
    if best is None:
        return Choice("", 0.0, {name: room.refusal(vm) for name, room in ledger.rooms.items()})
    use = best.used(vm)
    others = {name: room for name, room in ledger.rooms.items() if room is not best}
    refused = {
        name: room.refusal(vm) or f"would be {room.used(vm):.0%} in use, {best.host.name} {use:.0%}"
        for name, room in others.items()
    }
    return Choice(best.host.name, use, refused)


def first_served(vm: VmSeen) -> tuple[int, int, str, str]:
    """The order in which VMs are given their places: by priority, and large ones before the room is in pieces."""
    return -vm.priority, -vm.memory_mib, vm.name, vm.host


def first_disturbed(vm: VmSeen) -> tuple[int, int, str, str]:
    """The order in which VMs have to move: those of low priority, of these the one that is moved soonest."""
    return vm.priority, vm.memory_mib, vm.name, vm.host


def why_nowhere(refused: Mapping[str, str]) -> str:
    """All refusals in one line."""
    return "; ".join(f"{name} {why}" for name, why in refused.items()) or "there is no other host"
