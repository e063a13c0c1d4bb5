"""Plans of moves: a host emptied, use evened out, hosts freed. Pure.

Moves are planned one after the other on paper, each into room that is there at that moment, none VM's second. Those
of one ``wave`` can be under way at the same time: they fit though nothing that leaves is gone yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from vmctl.capacity import Ledger, Room
from vmctl.census import Census, Limits, VmSeen
from vmctl.errors import HostUnreachable, NotFound
from vmctl.placement import first_disturbed, first_served, why_nowhere

MOST = 20
_DEFAULT = Limits()
_EPSILON = 1e-9


class Move(NamedTuple):
    """One VM's way, and why. Moves of a wave do not wait for each other; each wave waits for the one before."""

    vm: str
    source: str
    target: str
    why: str
    wave: int = 0


class Left(NamedTuple):
    """A VM that should move and cannot."""

    vm: str
    host: str
    why: str


class Unseen(NamedTuple):
    """A host that the plan takes for not there, and why."""

    host: str
    why: str


class Plan(NamedTuple):
    """Moves in order, what they leave, and how far the most and the least used host are apart, as shares of 1.

    ``unseen`` are hosts of which nothing is known, and why.
    """

    moves: tuple[Move, ...]
    left: tuple[Left, ...]
    spread_before: float
    spread_after: float
    freed: tuple[str, ...] = ()
    unseen: tuple[Unseen, ...] = ()


class _Draft:
    """A plan in the making."""

    def __init__(self, census: Census, limits: Limits) -> None:
        self.census, self.limits, self.ledger = census, limits, Ledger(census, limits)
        self.moves: list[tuple[VmSeen, Move]] = []
        self.left: list[Left] = []
        self.moved: set[tuple[str, str]] = set()
        self.before = self.ledger.spread()

    def move(self, vm: VmSeen, source: Room, target: Room, why: str) -> None:
        self.ledger.move(vm, source, target)
        self.moves.append((vm, Move(vm.name, source.host.name, target.host.name, why)))
        self.moved.add((vm.host, vm.name))

    def undo(self, count: int) -> None:
        """Take the last moves back."""
        for _ in range(count):
            vm, move = self.moves.pop()
            self.ledger.move(vm, self.ledger.rooms[move.target], self.ledger.rooms[move.source])
            self.moved.discard((vm.host, vm.name))

    def leave(self, vm: VmSeen, why: str) -> None:
        self.left.append(Left(vm.name, vm.host, why))

    def movable(self, room: Room) -> Iterator[VmSeen]:
        return (vm for vm in room.vms.values() if not vm.pinned and (vm.host, vm.name) not in self.moved)

    def refusals(self, vm: VmSeen) -> str:
        rooms = self.ledger.rooms.items()
        return why_nowhere({name: room.refusal(vm) for name, room in rooms if name != vm.host})

    def plan(self, freed: Iterable[str] = ()) -> Plan:
        moves = in_waves(self.census, self.limits, self.moves)
        unseen = tuple(Unseen(one.name, one.problem) for one in self.census.hosts if one.problem)
        return Plan(moves, tuple(self.left), self.before, self.ledger.spread(), tuple(freed), unseen)


def in_waves(census: Census, limits: Limits, moves: Sequence[tuple[VmSeen, Move]]) -> tuple[Move, ...]:
    """Number the moves: a new wave begins with the first that needs room which an earlier one frees."""
    rooms = Ledger(census, limits).rooms
    leaving: list[tuple[VmSeen, Room]] = []
    numbered, wave = [], 0
    for vm, move in moves:
        if not rooms[move.target].takes(vm):
            for gone, source in leaving:
                source.leave(gone)
            leaving.clear()
            wave += 1
        rooms[move.target].arrive(vm)
        leaving.append((vm, rooms[move.source]))
        numbered.append(move._replace(wave=wave))
    return tuple(numbered)


def drain(census: Census, host: str, limits: Limits = _DEFAULT, *, only: Collection[str] | None = None) -> Plan:
    """All VMs, or those in ``only``, off a host, high priority first; what cannot leave is told.

    Raises NotFound; HostUnreachable where the host did not answer, for nobody knows then what is on it.
    """
    what = f"drain host {host}" if only is None else f"place VMs of host {host}"
    seen = next((one for one in census.hosts if one.name == host), None)
    if seen is None:
        raise NotFound(f"cannot {what}: there is none of that name", hint="see `vmctl host list`")
    if seen.problem:
        raise HostUnreachable(f"cannot {what}: {seen.problem}", hint="vmctl host check says more")
    hosts = tuple(one._replace(draining=True) if one.name == host else one for one in census.hosts)
    draft = _Draft(census._replace(hosts=hosts), limits)
    source = draft.ledger.rooms[host]
    for vm in sorted(source.vms.values(), key=first_served):
        if only is not None and vm.name not in only:
            continue
        if vm.pinned:
            draft.leave(vm, vm.pinned)
        elif target := draft.ledger.least(vm):
            draft.move(vm, source, target, f"leaves {host}; {_then(target, vm)}")
        else:
            draft.leave(vm, draft.refusals(vm))
    return draft.plan([] if source.vms else [host])


def _then(target: Room, vm: VmSeen) -> str:
    return f"{target.host.name} is then {target.used(vm):.0%} in use"


def balance(census: Census, limits: Limits = _DEFAULT, *, most: int = MOST) -> Plan:
    """At most ``most`` moves that part VMs kept apart, relieve overcommitted hosts, and then even out use.

    Evening out takes from the most used host what relieves it most, VMs of low priority first, until all are within
    ``limits.even`` of each other or no move is worth it. Each such move leaves the spread as it is or smaller.
    """
    draft = _Draft(census, limits)
    for room in draft.ledger.usable():
        _part(draft, room, most)
    for room in draft.ledger.usable():
        _relieve(draft, room, most)
    _even_out(draft, most)
    return draft.plan()


def _part(draft: _Draft, room: Room, most: int) -> None:
    """Move VMs of a group away from each other; the one of highest priority stays, or one that must."""
    for group in sorted(name for name, count in room.apart.items() if count > 1):
        members = sorted((vm for vm in room.vms.values() if vm.apart == group), key=first_disturbed)
        stays = next((vm for vm in members if vm.pinned), members[-1])
        for vm in members:
            if vm is stays or (vm.host, vm.name) in draft.moved or len(draft.moves) >= most:
                continue
            target = None if vm.pinned else draft.ledger.least(vm)
            if target:
                draft.move(vm, room, target, f"it is kept apart from {stays.name} ({group}); {_then(target, vm)}")
            else:
                draft.leave(vm, f"kept apart from {stays.name} ({group}): {vm.pinned or draft.refusals(vm)}")


def _relieve(draft: _Draft, room: Room, most: int) -> None:
    """Take VMs from a host that has given away more than it has; large ones of the lowest priority first."""
    if not room.over:
        return
    for vm in sorted(draft.movable(room), key=lambda vm: (vm.priority, -vm.memory_mib, vm.name)):
        if not room.over or len(draft.moves) >= most:
            return
        if vm.running and (target := draft.ledger.least(vm)):
            why = f"{room.host.name} has given away more than it has, {room.use:.0%}; {_then(target, vm)}"
            draft.move(vm, room, target, why)
    if room.over:
        draft.left.append(Left("", room.host.name, "has given away more than it has, and nobody else has room"))


def _even_out(draft: _Draft, most: int) -> None:
    """Again and again the best move off the most used host that has one."""
    stuck: set[str] = set()
    since = 0  # moves since the hosts in ``stuck`` were found to be so
    while len(draft.moves) < most:
        source = next((room for room in _busiest(draft) if room.host.name not in stuck), None)
        if source is None and not since:
            return
        if source is None:
            stuck.clear()  # what was moved since may have made room for theirs
            since = 0
        elif _step(draft, source):
            since += 1
        else:
            stuck.add(source.host.name)


def _busiest(draft: _Draft) -> Iterator[Room]:
    """The hosts that stand out, the most used first."""
    order = draft.ledger.order
    for use, name in reversed(order.sorted):
        if use - order.sorted[0][0] <= draft.limits.even:
            return
        yield order.rooms[name]


def _step(draft: _Draft, source: Room) -> bool:
    """Make the best move off a host, if one is worth it and makes no host the least used one of all."""
    low = draft.ledger.order.sorted[0][0]
    best: tuple[tuple[float, int, int, str, str], VmSeen, Room, float, float] | None = None
    for vm in sorted(draft.movable(source), key=first_disturbed):
        if best and best[1].priority < vm.priority:
            break
        then = source.used(vm, -1)
        worth = max(draft.limits.gain, -best[0][0] if best else 0.0)
        if source.use - then < worth or not vm.running:
            continue
        target = draft.ledger.least(vm)
        if target is None or source.use - target.use <= draft.limits.even:
            continue
        there = target.used(vm)
        gain = source.use - max(then, there)
        if gain < worth or min(then, there) < low - _EPSILON:
            continue
        order = (-gain, *first_disturbed(vm))
        if best is None or order < best[0]:
            best = order, vm, target, then, there
    if best is None:
        return False
    _, vm, target, then, there = best
    why = (
        f"evens out: {source.host.name} {source.use:.0%} -> {then:.0%} in use,"
        f" {target.host.name} {target.use:.0%} -> {there:.0%}"
    )
    draft.move(vm, source, target, why)
    return True


def consolidate(census: Census, limits: Limits = _DEFAULT, *, most: int = MOST) -> Plan:
    """At most ``most`` moves that empty hosts, the least used first, each of them wholly or not at all.

    Others are filled up to ``limits.packed``; hosts that are empty stay so.
    """
    draft = _Draft(census, limits)
    spared = {room.host.name for room in draft.ledger.usable() if not room.vms}
    received: set[str] = set()
    freed = []
    for source in sorted(draft.ledger.usable(), key=lambda room: (room.use, len(room.vms), room.host.name)):
        name = source.host.name
        vms = sorted(source.vms.values(), key=first_served)
        if name in spared or name in received or len(draft.moves) + len(vms) > most or any(vm.pinned for vm in vms):
            continue
        begun = len(draft.moves)
        for vm in vms:
            target = draft.ledger.fullest(vm, limits.packed, spared | {name})
            if target is None:
                break
            draft.move(vm, source, target, f"frees {name}; {_then(target, vm)}")
        if source.vms:
            draft.undo(len(draft.moves) - begun)
            continue
        received |= {move.target for _, move in draft.moves[begun:]}
        spared.add(name)
        freed.append(name)
    return draft.plan(freed)
