"""Who on other hosts needs files of a host, where they see the same storage: none of its own VMs tells of them.

And whether a VM of which a host has a definition is on another by now.

Nobody is asked where neither the config file has another host, nor a note in the VM names one; nor about a folder that
this machine alone can see.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from vmctl import folder_pools, homes, host_ssh, image_users
from vmctl.config import HostEntry
from vmctl.errors import Conflict, HostUnreachable, VmctlError
from vmctl.events import Reporter, Warned
from vmctl.fleet import DEADLINE_S, Fleet, called, each
from vmctl.hosts import Host
from vmctl.hypervisor import connection, domain, storage
from vmctl.hypervisor.connection import SESSION, SYSTEM
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.states import State
from vmctl.record import Home

T = TypeVar("T")
_ANEW_S = 60.0
_late: dict[str, tuple[float, HostUnreachable]] = {}  # who did not answer, and when: several disks wait for it once


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What the other hosts of the config file say: of each path ``users`` its users, each by host and name.

    ``unasked``: hosts that did not answer, and why.
    """

    users: Mapping[str, tuple[tuple[str, str], ...]]
    unasked: Mapping[str, str]

    def told(self, path: str) -> str:
        """Who needs it, in words."""
        return ", ".join(f"{user} on {host}" for host, user in self.users[path])


def look(
    host: Host,
    paths: Collection[str],
    timeout_s: float = DEADLINE_S,
    *,
    but: Host | None = None,
    noted: Collection[Home] = (),
) -> Elsewhere:
    """Ask all other hosts that vmctl knows, ``but`` one, and those ``noted``, at once, each until the time is over.

    A path that is in use there counts where both see one folder, which is proved by a file that is gone again.
    """
    beside = dict.fromkeys(_unnamed(host, noted).values())
    spelled = {path: _spellings(host, path) for path in paths if path}
    spelled = {path: names for path, names in spelled.items() if names}
    if not (host.others or beside) or not spelled:
        return Elsewhere({}, {})
    users: dict[str, list[tuple[str, str]]] = {}
    unasked = {}
    for name, answer in _answers(host, lambda other: _asked(host, other, spelled), timeout_s, but=but, beside=beside):
        if isinstance(answer, VmctlError):
            unasked[name] = answer.message
            continue
        for path, names in answer.items():
            users.setdefault(path, []).extend((name, user) for user in names)
    return Elsewhere({path: tuple(found) for path, found in users.items()}, unasked)


def _answers(
    host: Host,
    ask: Callable[[Host], T],
    timeout_s: float,
    *,
    but: Host | None = None,
    beside: Collection[HostEntry] = (),
) -> Iterator[tuple[str, T | VmctlError]]:
    """What each of the other hosts says, and those ``beside`` them, or why it says nothing; who was late is not waited
    for within a minute.
    """
    fleet, now = Fleet(host.settings, host.folders), time.monotonic()
    silent = {name: error for name, (since, error) in _late.items() if now - since < _ANEW_S}

    def one(entry: HostEntry) -> T:
        if called(entry) in silent:
            raise silent[called(entry)]
        with _opened(fleet, entry) as other:
            return ask(other)

    entries = [entry for entry in (*host.others, *beside) if but is None or entry != but.entry]
    for name, answer in each(entries, one, timeout_s):
        if isinstance(answer, HostUnreachable) and name not in silent:
            _late[name] = time.monotonic(), answer
        yield name, answer


def _opened(fleet: Fleet, entry: HostEntry) -> Host:
    """A host; one that a note alone names is opened as such: nobody knows of it now, to be asked anything."""
    if entry.name or entry.uri in {SESSION, SYSTEM}:
        return fleet.open(entry)
    conn = connection.connect(entry.uri, host_ssh.unattended(entry.uri))
    return Host(conn, fleet.settings, fleet.folders, entry)


def _spellings(host: Host, path: str) -> tuple[str, ...]:
    """The names of a file that another host may know it by; none where no other host can see it, or none can tell."""
    if path.startswith("/dev/"):  # no file can be made there to prove that it is one folder
        return ()
    if not host.conn.local or not path.startswith("/"):
        return (path,)
    real = os.path.realpath(path)
    return () if folder_pools.ours_alone(_folder(real)) else tuple(dict.fromkeys((path, real)))


def _asked(host: Host, other: Host, spelled: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    seen, owners = image_users.look(other), _owners(other)
    named, based = image_users.chains(seen.named, seen.bases), image_users.chains(seen.volumes, seen.bases)
    found: dict[str, set[str]] = {}
    unattached: dict[str, set[str]] = {}
    for name in {name for names in spelled.values() for name in names}:
        if users := named.get(name, frozenset()) or _owner(owners, name):
            found[name] = {*users}
        elif volumes := based.get(name):
            unattached[name] = {*volumes}
    if unattached:  # those that this host sees, too, its own rules are for
        known = {one.path for one in storage.all_volumes(host.conn)}
        known |= {os.path.realpath(path) for path in known if host.conn.local}
        beside = {name: {image_users.leaf(one) for one in volumes - known} for name, volumes in unattached.items()}
        found |= {name: rest for name, rest in beside.items() if rest}
    if not found or _is_same(host, other):
        return {}
    both = folder_pools.shared_folders(host, other, {_folder(name) for name in found if name.startswith("/")})
    theirs = {name: users for name, users in found.items() if not name.startswith("/") or _folder(name) in both}
    answer = {path: {user for name in names for user in theirs.get(name, ())} for path, names in spelled.items()}
    return {path: tuple(sorted(users)) for path, users in answer.items() if users}


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _owners(host: Host) -> dict[str, str]:
    """The VM whose own each file in a pool is, be it attached or not, as a console log."""
    owned = [(one.name, own) for one in domain.all_facts(host.conn) if one.record for own in one.record.owned]
    places = {pool: storage.running_path(host.conn, pool) for pool in {own.pool for _, own in owned}}
    return {f"{places[own.pool]}/{own.volume}": vm for vm, own in owned}


def _owner(owners: Mapping[str, str], path: str) -> frozenset[str]:
    """Whose a file is: a log that was rotated has a number after its name."""
    stem, _, number = path.rpartition(".")
    names = (path, stem) if number.isdigit() else (path,)
    return frozenset(owners[one] for one in names if one in owners)


def needed(host: Host, paths: Collection[str], report: Reporter, *, but: Host | None = None) -> dict[str, str]:
    """Those of the files that VMs of other hosts need, and who; warns of hosts that cannot be asked."""
    found = look(host, paths, but=but)
    _warn(found, report)
    return {path: found.told(path) for path in found.users}


def require_unused(host: Host, ref: str, paths: Collection[str], doing: str, report: Reporter) -> None:
    """Raise Conflict when another host has a VM that needs one of the files; warn of hosts that cannot be asked."""
    found = look(host, paths)
    for path, users in found.users.items():
        raise Conflict(
            f"cannot {doing} {ref}: {found.told(path)} needs it, on storage that both hosts see",
            hint=f"vmctl -c {users[0][0]} disk list shows whose it is",
        )
    _warn(found, report)


def require_off(
    host: Host, vm: Domain, doing: str, report: Reporter, timeout_s: float = DEADLINE_S, *, take_over: bool = False
) -> None:
    """Raise Conflict when another host has that very VM, by its UUID, in use, or one that it is noted to be on cannot
    be asked; warn of others that cannot. What it is noted to be on, and is not, is forgotten, and who has it is noted.

    ``take_over``: those that cannot be asked are taken for gone, and forgotten too.
    """
    noted = homes.others(host, vm)
    seen = look_for(host, vm.uuid, noted=noted, timeout_s=timeout_s)
    for name, there in seen.in_use.items():
        how, what = "is saved", f"vmctl -c {shlex.quote(name)} start {there.name} goes on with it there"
        if there.active:
            how, what = "runs", f"vmctl -c {shlex.quote(name)} stop {there.name} ends it there"
        raise Conflict(
            f"cannot {doing} VM {vm.name}: it {how} on {name}, and must not be on two hosts at once",
            hint=f"{what}; vmctl delete {vm.name} gives up what stayed of it here",
        )
    for one in () if take_over else noted:
        if {one.uuid, one.uri} & seen.asked:
            continue
        entry, uri = _entry(host, one), shlex.quote(one.uri) if one.uri else "URI"
        if entry is None:
            why, mend = "the config file has no such host", f"vmctl host add {one.name} {uri} makes it known"
        elif called(entry) in seen.unasked:
            why, mend = seen.unasked[called(entry)], f"again, once {called(entry)} answers"
        else:  # it has answered, as another one
            why = f"{called(entry)} in the config file is another host"
            mend = f"vmctl host add {one.name}-before {uri} makes it known"
        raise Conflict(
            f"cannot {doing} VM {vm.name}: {one.name} has it too, and cannot be asked whether it runs there: {why}",
            hint=f"{mend}; if it is gone for good: vmctl start {vm.name} --take-over",
        )
    gone = [one.uuid for one in noted if not {one.uuid, one.uri} & seen.having]
    homes.learn(host, vm, gone, [one for one in seen.homes if not any(_is(one, other) for other in noted)])
    if unasked := seen.unasked:
        why = next(iter(unasked.values()))
        text = f"not asked whether {vm.name}, which went to another host once, runs there: {', '.join(unasked)} ({why})"
        report(Warned(text, "make sure that it does not: two that run on one disk destroy it"))


def require_no_twin(host: Host, vm: Domain, paths: Collection[str], doing: str, *, reading: bool) -> None:
    """Raise Conflict as identity.require_no_twin() does; of a host that cannot be asked nothing is known."""
    noted = homes.others(host, vm)
    twins = look_for(host, vm.uuid, noted=noted)
    found = look(host, paths, noted=noted) if (twins.in_use if reading else twins.found) else Elsewhere({}, {})
    for path, users in found.users.items():
        for name, there in (twins.in_use if reading else twins.found).items():
            if (name, there.name) in users:
                raise Conflict(
                    f"cannot {doing}: {path} is the disk of {there.name} on {name} too, which is {there.state}",
                    hint="do it where the VM shall stay, once it is off on the other host, and deleted there",
                )


@dataclass(frozen=True, slots=True)
class Sought:
    """A VM on the other hosts, by its UUID: as it is on each that has it, and who cannot be asked, and why.

    ``asked``: UUIDs and URIs of those that answered, and ``having`` of those of them that have it, the ``homes``.
    """

    found: Mapping[str, Domain]
    unasked: Mapping[str, str]
    asked: frozenset[str]
    having: frozenset[str]
    homes: tuple[Home, ...]

    @property
    def in_use(self) -> dict[str, Domain]:
        """Where it runs, or is saved."""
        return {name: one for name, one in self.found.items() if one.active or one.state is State.SAVED}


def look_for(
    host: Host, uuid: str, but: Host | None = None, *, noted: Collection[Home] = (), timeout_s: float = DEADLINE_S
) -> Sought:
    """Ask all other hosts, ``but`` one, for the VM of that UUID; those ``noted`` too, as far as it is known how."""
    found, unasked = {}, {}
    asked: set[str] = set()
    having: list[Home] = []
    unnamed = _unnamed(host, noted)
    beside = dict.fromkeys(unnamed.values())
    for name, answer in _answers(host, partial(_has, host, uuid), timeout_s, but=but, beside=beside):
        if isinstance(answer, VmctlError):
            unasked[name] = answer.message
        elif answer is not None:
            home, there = answer
            asked |= _ids(home)
            if there is not None:
                found[name] = there
                having.append(home)
    if unnamed.keys() <= asked:  # by other names: of this machine, which may have no libvirt, nobody is missed
        for entry in beside:
            unasked.pop(called(entry), None)
    ids = frozenset(one for home in having for one in _ids(home))
    return Sought(found, unasked, frozenset(asked), ids, tuple(having))


def _has(host: Host, uuid: str, other: Host) -> tuple[Home, Domain | None] | None:
    return None if _is_same(host, other) else (homes.of(other), domain.find_or_none(other.conn, uuid))


def _ids(home: Home) -> set[str]:
    """What a host is known by: its UUID, and the URI that it is reached by from everywhere."""
    return {home.uuid, home.uri} - {""}


def _is(one: Home, other: Home) -> bool:
    return bool(_ids(one) & _ids(other))


def _entry(host: Host, home: Home) -> HostEntry | None:
    """The host of the config file that a noted one is, as far as its URI or its name tell."""
    by_uri = [entry for entry in host.others if entry.uri == home.uri]
    return next(iter([*by_uri, *(entry for entry in host.others if entry.name == home.name)]), None)


def _unnamed(host: Host, noted: Collection[Home]) -> dict[str, HostEntry]:
    """Those of the noted hosts that the config file does not name, by their UUIDs, as far as it is known how to ask.

    One that was noted from itself has no URI: it may be the libvirt of the machine that vmctl runs on, or of its user's
    session, which no config file need name; whether it is, its UUID tells. Another one was given by its URI once.
    """
    found = {}
    for one in noted:
        if _entry(host, one) is not None:
            continue
        if not one.uri:
            found[one.uuid] = HostEntry("", SESSION if one.uuid == homes.own_session() else SYSTEM)
        elif host_ssh.unattended(one.uri):
            found[one.uuid] = HostEntry("", one.uri)
    return found


def tell(
    host: Host, vm: Domain, third: Collection[Home], known: Collection[Home], gone: Collection[str], report: Reporter
) -> None:
    """Let ``third`` hosts that have a definition of a VM note who else is ``known`` to, since it went to ``host``, and
    who of UUIDs ``gone`` has not any more. Warns of those not told.
    """
    entries = dict.fromkeys(entry for one in third if (entry := _entry(host, one)))
    unnamed = {one.uuid: one.name for one in third if _entry(host, one) is None}
    beside = dict.fromkeys(_unnamed(host, third).values())
    fleet = Fleet(host.settings, host.folders)

    def work(entry: HostEntry) -> str:
        with _opened(fleet, entry) as other:
            if entry in beside and homes.known_by(other) not in unnamed:
                return ""
            there = domain.find_or_none(other.conn, vm.uuid)
            if there is not None:
                homes.learn(other, there, gone, known)
            return homes.known_by(other)

    untold: dict[str, str] = {}
    for name, answer in each((*entries, *beside), work, DEADLINE_S):
        if not isinstance(answer, VmctlError):
            unnamed.pop(answer, None)
        elif name in {called(entry) for entry in entries}:
            untold[name] = answer.message
    untold |= dict.fromkeys(unnamed.values(), "the config file has no such host")
    for name, why in untold.items():
        text = f"{name}, which has a definition of {vm.name} too, was not told that it is on {host.name} now: {why}"
        report(Warned(text, "make sure that it is not started there: two that run on one disk destroy it"))


def _is_same(host: Host, other: Host) -> bool:
    """Whether it is the same host, by another name."""
    return (host.conn.host, homes.known_by(host)) == (other.conn.host, homes.known_by(other))


def _warn(found: Elsewhere, report: Reporter) -> None:
    if found.unasked:
        why = next(iter(found.unasked.values()))
        report(Warned(f"not asked whether a VM of theirs has it: {', '.join(found.unasked)} ({why})"))
