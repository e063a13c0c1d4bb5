"""Ways from one network stack to another: a guest's card, a container's veth, loopback; QEMU's arguments. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Way(StrEnum):
    """What is between. USER is QEMU's own stack in user space (slirp): its figures are slirp's, whatever the card."""

    TAP = "tap"
    USER = "user"
    VETH = "veth"
    LOOPBACK = "loopback"


class Card(StrEnum):
    """What the guest sees."""

    VIRTIO_NET = "virtio-net"
    E1000 = "e1000"
    E1000E = "e1000e"


DRIVERS = {Card.VIRTIO_NET: "virtio_net", Card.E1000: "e1000", Card.E1000E: "e1000e"}
GUEST_PATHS = (Way.TAP, Way.USER)
TCP_PORT, PING_PORT = 5201, 11111


@dataclass(frozen=True, slots=True)
class Link:
    """One row. Without a guest there is no card; ``vhost``: the kernel serves the card's queues, not QEMU."""

    path: Way
    card: Card | None = None
    vhost: bool = False

    @property
    def name(self) -> str:
        """What the row is called."""
        return " ".join(word for word in (self.card or "", self.path, "vhost" if self.vhost else "") if word)

    def to_json(self) -> dict[str, str]:
        """The documented JSON form."""
        return {"path": self.path, "card": self.card or "", "vhost": "yes" if self.vhost else "no"}


def apart(setting: Mapping[str, Any]) -> str:
    """What a row of these settings is of, when it must not be read beside the others; "" for those that may."""
    return "user mode" if setting.get("path") == Way.USER else ""


ALL = (
    Link(Way.TAP, Card.VIRTIO_NET),
    Link(Way.TAP, Card.VIRTIO_NET, vhost=True),
    Link(Way.TAP, Card.E1000),
    Link(Way.TAP, Card.E1000E),
    Link(Way.USER, Card.VIRTIO_NET),
    Link(Way.USER, Card.E1000),
    Link(Way.VETH),
    Link(Way.LOOPBACK),
)


def chosen(paths: Sequence[Way], cards: Sequence[Card]) -> tuple[Link, ...]:
    """The rows to measure; a choice of cards leaves those without a card in, for they are what to measure against."""
    return tuple(
        link
        for link in ALL
        if (not paths or link.path in paths) and (not cards or link.card is None or link.card in cards)
    )


@dataclass(frozen=True, slots=True)
class Ends:
    """A row's addresses: ``near`` where clients run (in the guest, in a container), ``far`` where they connect to."""

    near: str
    far: str
    tap: str
    mac: str


def ends(number: int, path: Way) -> Ends:
    """The addresses of a row; of user mode they are slirp's, whose host is .2 and whose guest is .15."""
    net = f"10.199.{number}"
    if path is Way.USER:
        return Ends(f"{net}.15", f"{net}.2", "", _mac(number))
    if path is Way.LOOPBACK:
        return Ends("127.0.0.1", "127.0.0.1", "", "")
    return Ends(f"{net}.2", f"{net}.1", f"tap{number}" if path is Way.TAP else f"veth{number}", _mac(number))


def _mac(number: int) -> str:
    return f"52:54:00:be:0c:{number:02x}"


def arguments(number: int, link: Link) -> list[str]:
    """QEMU's arguments for the card of a row; its tap is there already."""
    own = ends(number, link.path)
    if link.path is Way.TAP:
        vhost = ",vhost=on" if link.vhost else ""
        back = f"tap,id=net{number},ifname={own.tap},script=no,downscript=no{vhost}"
    else:
        network = own.far.rpartition(".")[0]
        back = f"user,id=net{number},ipv6=off,net={network}.0/24,host={own.far},dhcpstart={own.near}"
    card = "virtio-net-pci,disable-legacy=on" if link.card is Card.VIRTIO_NET else str(link.card)
    return ["-netdev", back, "-device", f"{card},netdev=net{number},mac={own.mac},id=card{number},romfile="]
