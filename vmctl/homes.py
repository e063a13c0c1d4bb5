"""Which hosts have a definition of a VM, by a note in the definition itself: on each of them its start asks the others.

libvirt tells of a VM only until it is begun anew that it was sent to another host, and a copy of a disk has no lock.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path

from vmctl import record, render
from vmctl.hosts import Host
from vmctl.hypervisor import domain
from vmctl.hypervisor.domain import Domain
from vmctl.record import Home

_SESSIONS = uuid.UUID("a2c1f7f4-0d0c-4c39-8f0c-6d1f5c5ad3a5")


def known_by(host: Host) -> str:
    """What a host is known by in notes: its UUID. The libvirt of a user's session has none that could be one.

    Where it may not read the machine's it draws another one at each start, and else has that of the system's libvirt.
    """
    if not host.conn.session:
        return host.facts.uuid
    return own_session() if host.conn.local else str(uuid.uuid5(_SESSIONS, host.conn.uri))


def own_session() -> str:
    """What the session of the user who runs this is known by."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = ""
    return str(uuid.uuid5(_SESSIONS, f"{machine or os.uname().nodename} {os.geteuid()}"))


def others(host: Host, vm: Domain) -> tuple[Home, ...]:
    """The other hosts that have it, or had when that was noted."""
    found = noted(host, vm)
    mine = known_by(host) if found else ""  # asked of libvirt only where there is a note
    return tuple(one for one in found if one.uuid != mine)


def noted(host: Host, vm: Domain) -> tuple[Home, ...]:
    """All that the note says."""
    if not vm.active:
        return record.homes(vm.xml)
    return record.homes(domain.xml(host.conn, vm.uuid, inactive=True)) if vm.persistent else ()


def note(host: Host, vm: Domain, there: Host) -> tuple[Home, ...]:
    """Note that it stays defined on its host while it goes to another: the note goes along. Returns what it said."""
    before = noted(host, vm)
    known = {one.uuid: one for one in before} | {known_by(one): of(one) for one in (host, there)}
    write(host, vm, tuple(known.values()))
    return before


def of(host: Host) -> Home:
    """A host as it is noted."""
    return Home(known_by(host), host.name, "" if host.conn.local else host.conn.uri)


def learn(host: Host, vm: Domain, gone: Collection[str], found: Collection[Home] = ()) -> tuple[Home, ...]:
    """Hosts of those UUIDs have it no more, and those that were ``found`` do. Returns what the note says then."""
    before = noted(host, vm)
    if not before and not found:
        return ()
    known = {one.uuid: one for one in (*found, *before)}  # what one was called first stays
    here = known.pop(known_by(host), None) or of(host)
    left = [one for one in known.values() if one.uuid not in gone]
    now = (here, *left) if left else ()
    if {one.uuid for one in now} != {one.uuid for one in before}:
        write(host, vm, now)
    return now


def write(host: Host, vm: Domain, found: Sequence[Home]) -> None:
    """Let the note of a definition be that; none at all for nobody."""
    domain.set_homes(host.conn, vm.uuid, render.homes(vm.uuid, found) if found else None)
