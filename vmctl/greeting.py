"""Whether an SSH server greets at an address, which tells a guest that can be logged in to from one that boots."""

from __future__ import annotations

import select
import socket

from vmctl.errors import reason

_CONNECT_S = 0.15  # short tries, for a lost SYN is repeated only after a second


def missing(host: str, port: int, *, patience_s: float) -> str:
    """Why no SSH server greets there within ``patience_s`` of the connection; "" when one does."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S) as sock:
            greeting = sock.recv(64) if select.select([sock], [], [], patience_s)[0] else b""
    except OSError as error:
        return reason(error)
    if not greeting:
        return "connected, but no greeting yet"
    return "" if greeting.startswith(b"SSH-") else "what answers there is no SSH server"
