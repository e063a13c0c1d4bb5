"""A guest's cards after a live move, on networks whose hosts give addresses: on each host another machine may have its.

Whoever had an address of such a network where it was keeps it until its DHCP client next asks, half an hour later, and
is then told that it is another's. A DHCP client asks when the cable comes back.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection

from vmctl.errors import VmctlError
from vmctl.events import Reporter, Step, Warned
from vmctl.hypervisor import domain, network, saved
from vmctl.hypervisor.states import State
from vmctl.migrate_ends import Ends
from vmctl.wait import pause

# Linux tells of links at most once a second: pulled and plugged in again within one, a cable may not have been pulled
# at all to whoever listens in the guest. Longer than that only its processors could be late, of which no host tells.
_PULLED_S = 1.2


def cards(text: str, nets: Collection[str]) -> dict[str, str]:
    """The cards in a domain's XML, by their MACs, that are plugged in to one of these networks. Pure."""
    found = {}
    for card in ET.fromstring(text).iterfind("devices/interface[@type='network']"):
        source, mac, link = card.find("source"), card.find("mac"), card.find("link")
        net = "" if source is None else source.get("network", "")
        if mac is not None and net in nets and (link is None or link.get("state") != "down"):
            found[mac.get("address", "")] = net
    return found


def plug_anew(ends: Ends, name: str, report: Reporter, *, again: bool = False) -> None:
    """Pull the cables of such cards of a VM that has come to the target, and plug them in; a failure is only warned of.

    ``again``: who did so may have been killed with them pulled; those that its definition has plugged in come back.
    """
    try:
        vm = domain.find(ends.target.conn, name)
        sources = dict.fromkeys(nic.source for nic in vm.facts.nics)
        nets = {net.name for net in network.named(ends.target.conn, sources) if net.dhcp} if vm.active else set()
        found = cards(domain.xml(ends.target.conn, name, inactive=True) if again else vm.xml, nets)
        if not found:
            return
        where = " and ".join(dict.fromkeys(found.values()))
        if vm.state is not State.RUNNING:
            raise VmctlError(f"it is {vm.state}, and does not see that its cable is pulled")
        try:
            saved.set_links(ends.target.conn, name, up=False, macs=found)
            pause(_PULLED_S)
        finally:
            saved.set_links(ends.target.conn, name, up=True, macs=found)
    except VmctlError as error:
        told = f"{name} may keep for a while an address that another VM on {ends.names[1]} has: {error.message}"
        mend = f"on {ends.names[1]}, virsh domif-setlink {name} MAC down, and up, has it ask for one"
        report(Warned(told, mend))
        return
    report(Step(f"{name} is plugged in anew to {where} on {ends.names[1]}, which gives it an address"))
