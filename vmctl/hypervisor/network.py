"""Virtual networks: definitions, DHCP reservations and leases."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any, NamedTuple

import libvirt

from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.reservation import Reservation

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Iterable


class Lease(NamedTuple):
    """An address a guest holds. ``expiry`` is seconds since the epoch, 0 for one that never ends."""

    mac: str
    address: str
    hostname: str
    expiry: int


class NetworkFacts(NamedTuple):
    """One network. ``gateway`` and ``mask`` (dotted, or a prefix length) are "" when libvirt gives it no address.

    ``dhcp``: libvirt's own server gives its guests addresses.
    """

    name: str
    uuid: str
    active: bool
    bridge: str
    gateway: str
    mask: str
    stp: bool
    reservations: tuple[Reservation, ...]
    dhcp: bool = False

    @property
    def subnet(self) -> ipaddress.IPv4Network | None:
        """Its IPv4 subnet; None without an address."""
        import ipaddress  # late: a list reads networks and asks for no subnet

        return ipaddress.IPv4Network(f"{self.gateway}/{self.mask}", strict=False) if self.gateway else None


def _facts(network: Any, *, active: bool) -> NetworkFacts:
    root = ET.fromstring(network.XMLDesc())
    bridge = root.find("bridge")
    mask, gateway = "", ""
    for element in root.iterfind("ip"):
        if element.get("family", "ipv4") == "ipv4" and element.get("address"):
            gateway = element.get("address", "")
            mask = element.get("netmask") or element.get("prefix") or "24"
            break
    return NetworkFacts(
        name=network.name(),
        uuid=network.UUIDString(),
        active=active,
        bridge="" if bridge is None else bridge.get("name", ""),
        gateway=gateway,
        mask=mask,
        stp=bridge is not None and bridge.get("stp", "on") == "on",
        reservations=tuple(
            Reservation(host.get("mac", "").lower(), host.get("ip", "")) for host in root.iterfind("ip/dhcp/host")
        ),
        dhcp=root.find("ip/dhcp") is not None,
    )


def all_networks(conn: Connection) -> tuple[NetworkFacts, ...]:
    """Every network, defined or running."""
    with calling("list networks"):
        every = conn.handle.listAllNetworks(0)
        up = {one.UUIDString() for one in conn.handle.listAllNetworks(libvirt.VIR_CONNECT_LIST_NETWORKS_ACTIVE)}
        return tuple(_facts(one, active=one.UUIDString() in up) for one in every)


def named(conn: Connection, names: Iterable[str]) -> tuple[NetworkFacts, ...]:
    """Those of the networks that there are."""
    return tuple(net for name in names if (net := find(conn, name)) is not None)


def find(conn: Connection, name: str) -> NetworkFacts | None:
    """The network called ``name``; None only when libvirt says there is none."""
    with calling(f"look up network {name}"):
        try:
            network = conn.handle.networkLookupByName(name)
            return _facts(network, active=bool(network.isActive()))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
                return None
            raise


def define(conn: Connection, xml: str, *, name: str) -> None:
    """Define (or replace the definition of) a network, checked against the schema, started with its host."""
    with calling(f"define network {name}"):
        conn.handle.networkDefineXMLFlags(xml, libvirt.VIR_NETWORK_DEFINE_VALIDATE).setAutostart(1)


def start(conn: Connection, name: str) -> None:
    """Bring it up."""
    with calling(f"start network {name}"):
        network = conn.handle.networkLookupByName(name)
        try:
            network.create()
        except libvirt.libvirtError:
            if not network.isActive():  # another vmctl may have started it meanwhile
                raise


def remove(conn: Connection, name: str) -> None:
    """Take it down and forget it."""
    with calling(f"remove network {name}"):
        network = conn.handle.networkLookupByName(name)
        if network.isActive():
            network.destroy()
        network.undefine()


def leases(conn: Connection, network: str) -> tuple[Lease, ...]:
    """Current IPv4 leases of a network; none when it is down."""
    with calling(f"read the leases of network {network}"):
        try:
            found = conn.handle.networkLookupByName(network).DHCPLeases()
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:  # it is down
                raise
            return ()
    return tuple(
        Lease(
            str(lease["mac"]).lower(), str(lease["ipaddr"]), str(lease.get("hostname") or ""), int(lease["expirytime"])
        )
        for lease in found
        if lease.get("type") == libvirt.VIR_IP_ADDR_TYPE_IPV4
    )
