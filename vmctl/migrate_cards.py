"""A guest's cards after a live move, on networks whose hosts give addresses: on each host another machine may have its.

Whoever had an address of such a network where it was keeps it until its DHCP client next asks, half an hour later, and
is then told that it is another's. A DHCP client asks when the cable comes back.

That it moves is noted in the running VM itself before it does, and goes along; and which cables are pulled, before they
are. Whoever is killed meanwhile leaves a VM that says so, to --recover, to its next move and to doctor; a cable that
its user pulled is told apart, and one that has moved, and whose move has come to its end, is left alone.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection

from vmctl import record
from vmctl.errors import HostUnreachable, Interrupted, NotFound, VmctlError, WrongState, quietly
from vmctl.events import Reporter, Step, Warned
from vmctl.hosts import Host
from vmctl.hypervisor import domain, network, saved
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.states import State
from vmctl.migrate_ends import Ends
from vmctl.wait import pause, wait_until

# Linux tells of links at most once a second: pulled and plugged in again within one, a cable may not have been pulled
# at all to whoever listens in the guest. Longer than that only its processors could be late, of which no host tells.
_PULLED_S = 1.2
_BACK_S, _AGAIN_S = 30.0, 0.5  # a libvirt that has just died comes back


def cards(text: str, nets: Collection[str], pulled: Collection[str] = ()) -> dict[str, str]:
    """The cards in a domain's XML, by their MACs, that are plugged in to one of these networks, or are ``pulled``.

    Pure.
    """
    found = {}
    for card in ET.fromstring(text).iterfind("devices/interface[@type='network']"):
        source, mac, link = card.find("source"), card.find("mac"), card.find("link")
        net, address = ("" if one is None else one.get(key, "") for one, key in ((source, "network"), (mac, "address")))
        plugged = link is None or link.get("state") != "down"
        if address in pulled or (address and net in nets and plugged):
            found[address] = net
    return found


def note(host: Host, vm: Domain) -> None:
    """Note in a running VM that it moves; what a move before has noted stays, for it may have pulled cables."""
    if vm.facts.nics and not record.moving(vm.xml):
        quietly(lambda: domain.note_pulled(host.conn, vm.name, ()))


def forget(host: Host, name: str) -> None:
    """It has not moved: the note goes, unless it tells of cables that a move before has pulled."""

    def act() -> None:
        vm = domain.find(host.conn, name)
        if vm.active and record.moving(vm.xml) and not record.pulled(vm.xml):
            domain.note_pulled(host.conn, name, None)

    quietly(act)


def noted(host: Host, name: str) -> bool:
    """Whether a VM says that its move, or one before, has not come to its end."""
    vm = domain.find_or_none(host.conn, name)
    return vm is not None and vm.active and record.moving(vm.xml)


def plug_anew(ends: Ends, name: str, report: Reporter) -> None:
    """Pull the cables of such cards of a VM that has come to the target, and plug them in; a failure is only warned of.

    Those that somebody pulled who was killed before they were plugged in are among them.
    """
    try:
        vm = domain.find(ends.target.conn, name)
        before = record.pulled(vm.xml)
        sources = dict.fromkeys(nic.source for nic in vm.facts.nics)
        nets = {net.name for net in network.named(ends.target.conn, sources) if net.dhcp} if vm.active else set()
        found = cards(vm.xml, nets, before) if vm.active else {}
        if not found:
            if vm.active and record.moving(vm.xml):
                domain.note_pulled(ends.target.conn, name, None)
            return
        where = " and ".join(dict.fromkeys(found.values()))
        if vm.state is not State.RUNNING:
            if before:
                _plug_in(ends, name, before, report)
            raise VmctlError(f"it is {vm.state}, and does not see that its cable is pulled")
        domain.note_pulled(ends.target.conn, name, found)
        try:
            saved.set_links(ends.target.conn, name, up=False, macs=found)
            pause(_PULLED_S)
        finally:
            plugged = _plug_in(ends, name, found, report)
    except VmctlError as error:
        told = f"{name} may keep for a while an address that another VM on {ends.names[1]} has: {error.message}"
        mend = f"on {ends.names[1]}, virsh domif-setlink {name} MAC down, and up, has it ask for one"
        report(Warned(told, mend))
        return
    if plugged:
        report(Step(f"{name} is plugged in anew to {where} on {ends.names[1]}, which gives it an address"))


def _plug_in(ends: Ends, name: str, macs: Collection[str], report: Reporter) -> bool:
    """Plug them in, whatever comes between; whether they are. An interrupt is heard afterwards."""
    try:
        return _plugged(ends, name, macs, report)
    except (KeyboardInterrupt, Interrupted):
        _plugged(ends, name, macs, report)
        raise


def _plugged(ends: Ends, name: str, macs: Collection[str], report: Reporter) -> bool:
    again = False

    def probe() -> bool:
        nonlocal again
        try:
            plug_in(ends.target, name, macs, anew=again)
        except HostUnreachable:
            again = True
            return False
        return True

    try:
        return wait_until(probe, what="its libvirt does not answer", timeout_s=_BACK_S, interval_s=_AGAIN_S)
    except (NotFound, WrongState):
        return False  # it has ended meanwhile, and its cables with it
    except VmctlError as error:
        told = f"{name} has no network on {ends.names[1]}: its cable is pulled, and stays so: {error.message}"
        report(Warned(told, f"vmctl -c {ends.names[1]} doctor --fix plugs it in"))
        return False


def plug_in(host: Host, name: str, macs: Collection[str], *, anew: bool = True) -> None:
    """Plug in the cables that are noted as pulled, and take the note away.

    ``anew``: libvirt that was killed as one was pulled may take it for plugged in, and would do nothing.
    """
    if anew:
        saved.set_links(host.conn, name, up=False, macs=macs)
    saved.set_links(host.conn, name, up=True, macs=macs)
    domain.note_pulled(host.conn, name, None)


def pulled(host: Host, name: str) -> tuple[str, ...]:
    """The MACs of a VM's cards whose cables a move has pulled, and not plugged in yet."""
    vm = domain.find_or_none(host.conn, name)
    return record.pulled(vm.xml) if vm is not None and vm.active else ()
