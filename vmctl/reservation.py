"""An address kept for a MAC."""

from __future__ import annotations

from typing import NamedTuple


class Reservation(NamedTuple):
    """One line of a network's DHCP: this MAC always gets this address."""

    mac: str
    address: str
