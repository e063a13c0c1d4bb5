"""Carries Ethernet frames between two interfaces, each later than it came, and some not at all.

    relay.py DEV DEV DELAY_MS LOSS_PERCENT      says `ready`, runs until it is ended
    relay.py --plain DEV                        no offloads on DEV: what it sends has checksums and fits its MTU

In the place of netem, which not every kernel has.
"""

from __future__ import annotations

import ctypes
import fcntl
import random
import select
import socket
import struct
import sys
import time
from collections import deque
from contextlib import suppress

_ETH_P_ALL = 3
_IGNORE_OUTGOING = 23  # of SOL_PACKET
_SIOCETHTOOL = 0x8946
_OFFLOADS = (0x2C, 0x24, 0x1F, 0x19, 0x17)  # ETHTOOL_SGRO, SGSO, STSO, SSG, STXCSUM


def plain(dev: str) -> None:
    """Switch the offloads off, those that can be."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in _OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            try:
                fcntl.ioctl(sock, _SIOCETHTOOL, struct.pack("16sP", dev.encode(), ctypes.addressof(value)) + bytes(16))
            except OSError:
                continue


def carry(devs: tuple[str, str], delay_s: float, loss: float) -> None:
    """For ever."""
    socks = []
    for dev in devs:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        sock.bind((dev, 0))
        sock.setsockopt(263, _IGNORE_OUTGOING, 1)
        sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
        sock.setblocking(False)
        socks.append(sock)
    others = {socks[0]: socks[1], socks[1]: socks[0]}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    print("ready", flush=True)
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, to, frame = waiting.popleft()
            with suppress(OSError):  # a full queue or an interface that is down: lost, as on a wire
                to.send(frame)
        left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for sock in select.select(socks, [], [], left)[0]:
            for _ in range(64):
                try:
                    frame = sock.recv(65536)
                except OSError:  # nothing more, or an interface that is down
                    break
                if random.random() >= loss:
                    waiting.append((time.monotonic() + delay_s, others[sock], frame))


if __name__ == "__main__":
    if sys.argv[1] == "--plain":
        plain(sys.argv[2])
    else:
        carry((sys.argv[1], sys.argv[2]), float(sys.argv[3]) / 1000, float(sys.argv[4]) / 100)
