"""What room hosts have, kept up to date while VMs are moved on paper; hosts of a kind are kept in order of use."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Set

from vmctl.census import By, Census, HostSeen, Limits, VmSeen

_EPSILON = 1e-9


class Room:
    """One host and what is given away of it. Use is its scarcest thing's: memory, vCPUs or busy processors."""

    __slots__ = (
        *("host", "able", "capacity_mib", "most_vcpus", "memory_mib", "vcpus", "load", "vms", "apart", "use"),
        *("per_mib", "per_vcpu", "per_load", "watchers"),
    )

    def __init__(self, host: HostSeen, vms: Iterable[VmSeen], limits: Limits) -> None:
        here = tuple(vms)
        beside = host.memory_mib - host.available_mib - sum(vm.resident_mib for vm in here)
        reserve = max(limits.reserve_mib, int(host.memory_mib * limits.reserve), beside)
        self.host, self.able = host, not host.problem and not host.draining
        self.capacity_mib = max(0, host.memory_mib - reserve)
        self.most_vcpus = host.cpus * limits.vcpus_per_cpu
        # What one more of each adds to the use.
        self.per_mib = (By.MEMORY in limits.by) / max(1, self.capacity_mib)
        self.per_vcpu = (By.VCPUS in limits.by) / max(1.0, self.most_vcpus)
        self.per_load = (By.CPU in limits.by) / max(1, host.cpus)
        self.memory_mib, self.vcpus, self.load = 0, 0, max(0.0, host.load - sum(vm.load for vm in here))
        self.vms: dict[str, VmSeen] = {}
        self.apart: dict[str, int] = {}
        self.watchers: list[Order] = []
        for vm in here:
            self._count(vm, 1)
        self.use = self.used()

    def _count(self, vm: VmSeen, sign: int) -> None:
        if vm.running:
            self.memory_mib += sign * vm.memory_mib
            self.vcpus += sign * vm.vcpus
            self.load += sign * vm.load
        if vm.apart:
            self.apart[vm.apart] = self.apart.get(vm.apart, 0) + sign
        if sign > 0:
            self.vms[vm.name] = vm
        else:
            del self.vms[vm.name]

    def arrive(self, vm: VmSeen) -> None:
        """It is here from now on."""
        self._changed(vm, 1)

    def leave(self, vm: VmSeen) -> None:
        """It is not here any more."""
        self._changed(vm, -1)

    def _changed(self, vm: VmSeen, sign: int) -> None:
        before = self.use
        self._count(vm, sign)
        self.use = self.used()
        for order in self.watchers:
            order.moved(self, before)

    def used(self, vm: VmSeen | None = None, sign: int = 1) -> float:
        """The share in use; with ``vm`` come, or with ``sign`` -1 gone."""
        memory, vcpus, load = self.memory_mib, self.vcpus, self.load
        if vm is not None and vm.running:
            memory, vcpus, load = memory + sign * vm.memory_mib, vcpus + sign * vm.vcpus, load + sign * vm.load
        return max(memory * self.per_mib, vcpus * self.per_vcpu, load * self.per_load)

    @property
    def over(self) -> bool:
        """Whether more is given away than there is."""
        return self.memory_mib > self.capacity_mib or self.vcpus > self.most_vcpus

    def takes(self, vm: VmSeen) -> bool:
        """Whether there is room for it, now. What kind of host it needs is told by ``unlike``."""
        if vm.name in self.vms or (vm.apart and self.apart.get(vm.apart)):
            return False
        if vm.barred and self.host.name in dict(vm.barred):
            return False
        if not vm.running:  # it must be able to start there, one day
            return vm.memory_mib <= self.capacity_mib and vm.vcpus <= self.most_vcpus
        return self.memory_mib + vm.memory_mib <= self.capacity_mib and self.vcpus + vm.vcpus <= self.most_vcpus

    def refusal(self, vm: VmSeen) -> str:
        """Why it does not take it; "" when it does."""
        if why := (unusable(self.host) or unlike(self.host, vm)):
            return why
        if vm.name in self.vms:
            return "has a VM of that name" if vm.host != self.host.name else "is where it is"
        if vm.apart and self.apart.get(vm.apart):
            there = next(one.name for one in self.vms.values() if one.apart == vm.apart)
            return f"has {there}, which is kept apart from it ({vm.apart})"
        if why := dict(vm.barred).get(self.host.name, ""):
            return f"cannot take it: {why}"
        memory = self.capacity_mib - (self.memory_mib if vm.running else 0)
        if vm.memory_mib > memory:
            return f"has {max(0, memory)} MiB left of the {vm.memory_mib} MiB that it takes"
        vcpus = int(self.most_vcpus) - (self.vcpus if vm.running else 0)
        if vm.vcpus > vcpus:
            return f"has {max(0, vcpus)} vCPUs left of the {vm.vcpus} that it takes"
        return ""


def unusable(host: HostSeen) -> str:
    """Why nothing can be placed on a host; "" when it can."""
    if host.problem:
        return f"cannot be used: {host.problem}"
    return "is to get no VMs" if host.draining else ""


def unlike(host: HostSeen, vm: VmSeen) -> str:
    """Why a VM cannot run on such a host, however empty; "" when it can."""
    if vm.arch and host.arch and vm.arch != host.arch:
        return f"is {host.arch}, not {vm.arch}"
    if vm.accel is not None and vm.accel not in host.accels:
        return f"runs no guests on {vm.accel}"
    if vm.machine and host.machines and vm.machine not in host.machines:
        return f"has no machine type {vm.machine}"
    if host.networks and (absent := vm.networks - host.networks):
        return f"has no network {', '.join(sorted(absent))}"
    if vm.cpu.exact:
        if host.cpu_model != vm.cpu.model:
            return f"has a CPU {host.cpu_model or 'of no known model'}, not {vm.cpu.model}"
        if lacking := vm.cpu.flags - host.cpu_flags:
            return f"has a CPU without {', '.join(sorted(lacking))}"
    elif vm.cpu.model and host.cpu_models and vm.cpu.model not in host.cpu_models:
        return f"cannot give a guest the CPU {vm.cpu.model}"
    return ""


class Order:
    """Hosts by their use, the least used first, whatever moves."""

    __slots__ = ("rooms", "sorted")

    def __init__(self, rooms: Iterable[Room]) -> None:
        self.rooms = {room.host.name: room for room in rooms}
        self.sorted = sorted((room.use, name) for name, room in self.rooms.items())
        for room in self.rooms.values():
            room.watchers.append(self)

    def moved(self, room: Room, before: float) -> None:
        """Put a host into its place, now that it is used otherwise."""
        del self.sorted[bisect_left(self.sorted, (before, room.host.name))]
        insort(self.sorted, (room.use, room.host.name))


class Kind(Order):
    """Hosts that can run the same VMs and are of about one size.

    ``free_mib`` and ``free_vcpus``: no host of these has more left; they spare looking through hosts that are full.
    """

    __slots__ = ("free_mib", "free_vcpus", "host")

    def __init__(self, rooms: Iterable[Room]) -> None:
        super().__init__(rooms)
        self.host = next(iter(self.rooms.values())).host
        self.measure()

    def measure(self) -> None:
        """Look what is left at most."""
        self.free_mib = max(room.capacity_mib - room.memory_mib for room in self.rooms.values())
        self.free_vcpus = max(room.most_vcpus - room.vcpus for room in self.rooms.values())

    def moved(self, room: Room, before: float) -> None:
        """Put a host into its place, and note what it has left."""
        super().moved(room, before)
        self.free_mib = max(self.free_mib, room.capacity_mib - room.memory_mib)
        self.free_vcpus = max(self.free_vcpus, room.most_vcpus - room.vcpus)

    def hopeless(self, vm: VmSeen) -> bool:
        """Whether none has room for it, known without looking."""
        return vm.running and (vm.memory_mib > self.free_mib or vm.vcpus > self.free_vcpus)

    def least(self, vm: VmSeen) -> Room | None:
        """The least used that has room for it."""
        if self.hopeless(vm):
            return None
        for _, name in self.sorted:
            if self.rooms[name].takes(vm):
                return self.rooms[name]
        self.measure()
        return None

    def fullest(self, vm: VmSeen, most: float, spared: Set[str]) -> Room | None:
        """The most used that has room for it and is then used by ``most`` at most; none of ``spared``."""
        if self.hopeless(vm):
            return None
        rooms, most = self.rooms, most + _EPSILON
        memory, vcpus = (vm.memory_mib, vm.vcpus) if vm.running else (0, 0)
        for index in range(bisect_left(self.sorted, (most, "")) - 1, -1, -1):
            name = self.sorted[index][1]
            room = rooms[name]
            if room.memory_mib + memory > most * room.capacity_mib or room.vcpus + vcpus > most * room.most_vcpus:
                continue  # said again by what follows, which takes longer
            if name not in spared and room.takes(vm) and room.used(vm) <= most:
                return room
        return None


class Ledger:
    """All rooms of a census. Moving on paper changes it, never the census."""

    def __init__(self, census: Census, limits: Limits) -> None:
        here: dict[str, list[VmSeen]] = {host.name: [] for host in census.hosts}
        for vm in census.vms:
            here[vm.host].append(vm)
        self.rooms = {host.name: Room(host, here[host.name], limits) for host in census.hosts}
        alike: dict[object, list[Room]] = {}
        for room in self.usable():
            host = room.host
            size = host.cpus.bit_length(), host.memory_mib.bit_length()
            cpu = host.cpu_model, host.cpu_flags, host.cpu_models
            what = host.arch, host.accels, cpu, host.machines, host.networks
            alike.setdefault((what, size), []).append(room)
        self.kinds = [Kind(rooms) for rooms in alike.values()]
        self.order = Order(self.usable())
        self._fit: dict[object, list[Kind]] = {}

    def usable(self) -> Iterator[Room]:
        """The rooms that VMs can be placed in."""
        return (room for room in self.rooms.values() if room.able)

    def fit(self, vm: VmSeen) -> list[Kind]:
        """The kinds of hosts that can run it."""
        what = vm.arch, vm.accel, vm.machine, vm.cpu, vm.networks
        if what not in self._fit:
            self._fit[what] = [kind for kind in self.kinds if not unlike(kind.host, vm)]
        return self._fit[what]

    def least(self, vm: VmSeen) -> Room | None:
        """Where to place it for room on all hosts.

        Of each kind the least used host that takes it; of these the one that is then used least.
        """
        found = [room for kind in self.fit(vm) if (room := kind.least(vm)) is not None]
        return min(found, key=lambda room: (room.used(vm), room.host.name), default=None)

    def fullest(self, vm: VmSeen, most: float, spared: Set[str]) -> Room | None:
        """Where to place it for empty hosts: the one that is used most, and by ``most`` at most."""
        found = [room for kind in self.fit(vm) if (room := kind.fullest(vm, most, spared)) is not None]
        return max(found, key=lambda room: (room.used(vm), room.host.name), default=None)

    def move(self, vm: VmSeen, source: Room, target: Room) -> None:
        """Move it on paper."""
        target.arrive(vm)
        source.leave(vm)

    def spread(self) -> float:
        """How far the most used and the least used host are from each other."""
        used = self.order.sorted
        return used[-1][0] - used[0][0] if used else 0.0
