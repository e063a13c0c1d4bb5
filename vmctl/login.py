"""Where and how to log in to a guest: told apart from doing it, whose library takes long to load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Target:
    """Where and as whom to log in. ``host_key`` is "TYPE BASE64"; ``key`` the private key's file."""

    host: str
    port: int
    user: str
    host_key: str
    key: Path

    def __str__(self) -> str:
        """As people write it."""
        return f"{self.user}@{self.host}" + (f":{self.port}" if self.port != 22 else "")


@dataclass(frozen=True, slots=True)
class Terminal:
    """The terminal a remote command gets."""

    kind: str
    columns: int
    rows: int
