"""Who a new VM is: a UUID that no VM has, and volumes' names of which no file is in use.

And whether a VM that is off here may be started: one that went to another host may run there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vmctl import homes, image_users, locks, networks, render, resolve
from vmctl.errors import Conflict
from vmctl.events import Reporter, Warned, silent
from vmctl.hosts import Host
from vmctl.hypervisor import domain, storage
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.states import MOVED

_TURN_S = 120.0


def volumes_of(host: Host, prefix: str) -> tuple[str, ...]:
    """Volumes in vmctl's pool whose names only a VM of that prefix gives."""
    pool = host.settings.pool
    if not storage.pool_exists(host.conn, pool):
        return ()
    names = storage.volume_names(host.conn, pool)
    return tuple(one for one in names if one == f"{prefix}.qcow2" or one.startswith(f"{prefix}-"))


def prefixes(vm: Domain) -> tuple[str, ...]:
    """What the names of a VM's volumes begin with: its name, and those it had when they were made."""
    sign = f"-{vm.uuid[:8]}"
    owned = vm.facts.record.owned if vm.facts.record else ()
    named = {one.volume.partition(sign)[0] + sign for one in owned if sign in one.volume}
    return tuple(sorted({resolve.volume_prefix(vm.name, vm.uuid), *named}))


_MOVED = ".moved"


def mark_moved(host: Host, prefix: str) -> None:
    """Note beside volumes of that prefix that their VM goes to another host, and they stay, on storage both see.

    What a killed creation left has no VM either: without a mark it would be taken for that, and cleared away.
    """
    name = prefix + _MOVED
    with suppress(Conflict):
        storage.create_volume(
            host.conn, host.settings.pool, render.volume(render.VolumeView(name, 1, "raw")), name=name
        )


def unmark_moved(host: Host, prefix: str) -> None:
    """The VM is no more, or has taken its volumes along."""
    storage.delete_volume(host.conn, host.settings.pool, prefix + _MOVED)


def moved(names: Collection[str]) -> frozenset[str]:
    """Those of a pool's volumes that are of VMs which went to other hosts, and the marks themselves. Pure."""
    marks = {one.removesuffix(_MOVED) for one in names if one.endswith(_MOVED)}
    ours = tuple(f"{mark}{sign}" for mark in marks for sign in ".-")
    return frozenset(one for one in names if ours and one.startswith(ours))


def is_moved(host: Host, prefix: str) -> bool:
    """Whether volumes of that prefix are of a VM that went to another host."""
    pool = host.settings.pool
    return storage.pool_exists(host.conn, pool) and prefix + _MOVED in storage.volume_names(host.conn, pool)


def went(host: Host, vm: Domain) -> bool:
    """Whether that VM, which is off here, went to another host once, as far as this one knows."""
    return vm.why == MOVED or bool(homes.others(host, vm)) or any(is_moved(host, one) for one in prefixes(vm))


def require_off_elsewhere(host: Host, vm: Domain, doing: str, report: Reporter, *, take_over: bool = False) -> None:
    """Raise Conflict where a VM, which is off here, is in use on another host, or on one that must be asked and cannot.

    Whatever lets one run that may have been here while it ran elsewhere asks this first. ``take_over``: what cannot be
    asked is taken for gone for good.
    """
    with alone(host, vm, doing, report, take_over=take_over):
        pass


@contextmanager
def alone(host: Host, vm: Domain, doing: str, report: Reporter, *, take_over: bool = False) -> Iterator[None]:
    """A block that starts it: of those in several vmctls, each for another host, the next one asks when one is over.

    Raises Conflict as require_off_elsewhere() does.
    """
    with ExitStack() as turn:
        if homes.others(host, vm) or (host.others and went(host, vm)):
            from vmctl import elsewhere  # late: most know one host

            what = f"VM {vm.uuid} on all its hosts"  # on which it may have several names
            turn.enter_context(locks.held(host.folders.runtime, what, timeout_s=_TURN_S))
            elsewhere.require_off(host, vm, doing, report, take_over=take_over)
        yield


def require_no_twin(host: Host, vm: Domain, paths: Collection[str], doing: str, *, reading: bool = False) -> None:
    """Raise Conflict where a host that has a definition of the VM too has these disks, on storage that both see.

    What gets a layer here is written to there, at its next start. ``reading``: only where it is in use there.
    """
    if not homes.others(host, vm):
        return
    from vmctl import elsewhere  # late: most know one host

    elsewhere.require_no_twin(host, vm, paths, doing, reading=reading)


def needed_of(host: Host, volumes: Collection[str]) -> frozenset[str]:
    """Those of the volumes that a VM, or a disk that is none of them, needs. Clones keep the disk of a deleted VM."""
    if not volumes:
        return frozenset()
    needed = image_users.needed(host)
    folder = storage.pool_path(host.conn, host.settings.pool)
    paths = {one: f"{folder}/{one}" for one in volumes}
    here = frozenset(one for one, path in paths.items() if needed.by(path, but=paths.values()))
    theirs = needed_elsewhere(host, [f"{folder}/{one}" for one in volumes], silent)
    return here | {one for one in volumes if f"{folder}/{one}" in theirs}


def needed_elsewhere(host: Host, paths: Collection[str], report: Reporter) -> dict[str, str]:
    """Those of the files that VMs of other hosts need, on storage that both see, and who; warns of hosts not asked."""
    if not host.others:
        return {}
    from vmctl import elsewhere  # late: most know one host

    return elsewhere.needed(host, paths, report)


def note_moving(host: Host, uuid: str) -> None:
    """Keep the UUID of a VM that goes to another host: the next one of its name here is to be another one.

    Kept with what is this user's, for a VM that takes its disks along leaves nothing behind.
    """
    with suppress(OSError):
        _moving(host).mkdir(parents=True, exist_ok=True)
        (_moving(host) / uuid).touch()


def forget_moving(host: Host, uuid: str) -> None:
    """That VM is no more."""
    with suppress(OSError):
        (_moving(host) / uuid).unlink(missing_ok=True)


def _moving(host: Host) -> Path:
    return host.folders.data / "moved"


def _have_moved(host: Host) -> set[str]:
    try:
        return {one.name for one in _moving(host).iterdir()}
    except OSError:
        return set()


def macs_away(host: Host, known: Sequence[str], but: str) -> set[str]:
    """Those of the MACs of vmctl's network that VMs which went to other hosts were given here, ``but`` one VM.

    They may come back, or be met elsewhere. Which MACs they have nobody here knows any more: those that they got if
    these were free.
    """
    found = set()
    for one in _have_moved(host) - {but}:
        with suppress(ValueError):  # no VM's UUID, but some file's name
            found.add(networks.pick_mac(known, one, ()))
    return found


def free_uuid(host: Host, name: str, taken: Iterable[str] = ()) -> str:
    """The UUID for a new VM ``name``: the same each time, unless a VM has it, ``taken`` has, or its disks live on."""
    held = {uuid for other, uuid in domain.identities(host.conn) if other != name} | {*taken} | _have_moved(host)
    while True:
        found = resolve.identity(host.conn.host, name, held)
        prefix = resolve.volume_prefix(name, found)
        if not is_moved(host, prefix) and not needed_of(host, volumes_of(host, prefix)):
            return found
        held.add(found)


def is_elsewhere(host: Host, name: str, uuid: str, came_from: str, report: Reporter) -> bool:
    """Whether another host has a VM that is to come back here from a backup: two of one UUID have one MAC as well.

    Hosts are asked about one that this user moved away, or that was backed up elsewhere; warns of those that cannot be.
    """
    if not host.others or (came_from == host.conn.host and uuid not in _have_moved(host)):
        return False
    from vmctl import elsewhere  # late: most know one host

    seen = elsewhere.look_for(host, uuid)
    if seen.unasked:
        text = f"not asked whether {name} is there: {', '.join(seen.unasked)} ({next(iter(seen.unasked.values()))})"
        report(Warned(text, "make sure that it does not run there"))
    if seen.found:
        text = f"{name} is on {', '.join(seen.found)}: it is restored as another VM, with a UUID and MACs of its own"
        report(Warned(text, "--new-identity gives its guest a host name, host key and machine-id of its own, too"))
    return bool(seen.found)


def left_of_creation(host: Host, name: str) -> tuple[str, ...]:
    """Volumes that a killed creation of ``name`` left: of the UUID that free_uuid() gave it, with no VM of that there.

    Not those that clones of a deleted VM of that name are based on, nor those of one that went to another host.
    """
    held = {uuid for _, uuid in domain.identities(host.conn)} | _have_moved(host)
    while True:
        found = resolve.identity(host.conn.host, name, held)
        prefix = resolve.volume_prefix(name, found)
        there = volumes_of(host, prefix)
        needed = there if is_moved(host, prefix) else needed_of(host, there)
        if free := tuple(one for one in there if one not in needed):
            return free
        if not there:
            return ()
        held.add(found)
