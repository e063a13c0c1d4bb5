"""An address kept for a MAC."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reservation:
    """One line of a network's DHCP: this MAC always gets this address."""

    mac: str
    address: str
