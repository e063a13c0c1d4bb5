"""Forks beside cold boots, in one run: from the command's exec until the new machine greets by SSH.

For each image: one cold boot to SSH (which becomes the parent, once its system is through), then forks one by one, the
first to the tenth, then five at once, then VMs made from a kept state of the image (`image warm`, `create --warm`), one
by one. How long the parent is held is seen from outside: the longest gap in a stream of pings. Says how busy the
machine was, and what a page of memory costs there: a fork of Debian takes 125,000, and both move all figures.

Usage, as root: python tests/perf/fork.py [IMAGE:MEMORY_MIB…]     default: micro:512 debian-12:1024
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from boot import VMCTL, banner

from vmctl import image_build
from vmctl.events import silent
from vmctl.hosts import open_host

FORKS, WARM, TIMEOUT_S = 10, 5, 900


def timed(*words: str) -> tuple[float, str]:
    """Seconds that a command took, and what it said."""
    began = time.monotonic()
    done = subprocess.run([*VMCTL, *words], check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"vmctl {' '.join(words)} ended with {done.returncode}: {done.stderr}")
    return time.monotonic() - began, done.stdout + done.stderr


def clear_away(prefix: str) -> None:
    """Delete all VMs of that prefix, each by a command of its own: one that cannot be deleted keeps no other."""
    listed = subprocess.run([*VMCTL, "list", "-o", "name"], check=True, capture_output=True, text=True).stdout
    for name in listed.split():
        if name.startswith(prefix):
            subprocess.run([*VMCTL, "delete", name, "--yes"], check=False, stdout=subprocess.DEVNULL)


class Gaps:
    """Pings a guest without a pause and keeps the longest time without an answer."""

    def __init__(self, address: str) -> None:
        self.longest, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(address,))
        self._thread.start()

    def _watch(self, address: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
            raw.settimeout(0.02)
            last, number = time.monotonic(), 0
            while not self._over.is_set():
                number = number % 0xFFFF + 1
                head = struct.pack("!BBHHH", 8, 0, 0xFFFF - (0x0800 + 0x1234 + number) % 0xFFFF, 0x1234, number)
                raw.sendto(head, (address, 0))
                try:
                    answer = raw.recv(256)
                except TimeoutError:
                    continue
                if answer[20:21] == b"\0" and answer[24:26] == b"\x12\x34":
                    now = time.monotonic()
                    self.longest, last = max(self.longest, now - last), now

    def end(self) -> float:
        """The longest gap in seconds."""
        self._over.set()
        self._thread.join()
        return self.longest


def page_us() -> float:
    """Microseconds that the machine takes to give a page of memory, in the mean of 512 MiB."""
    began = time.monotonic()
    with mmap.mmap(-1, 512 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        return (time.monotonic() - began) * 1e6 / (512 << 8)


def measure(image: str, memory_mib: int) -> None:
    """Measure one image and print."""
    parent = f"perf-{os.getpid()}-p"
    memory = ("--memory", f"{memory_mib}M")
    try:
        cold, _ = timed("create", parent, "--image", image, *memory, "--wait", "ssh", "--timeout", str(TIMEOUT_S))
        if image != "micro":
            timed("wait", parent, "--for", "cloud-init", "--timeout", str(TIMEOUT_S))
        timed("wait", parent, "--for", "agent", "--timeout", str(TIMEOUT_S))
        singles = [timed("fork", parent, f"{parent}-{number}")[0] for number in range(FORKS)]
        for number in range(FORKS):
            timed("delete", f"{parent}-{number}", "--yes")
        address = subprocess.run([*VMCTL, "list", "-o", "json"], check=True, capture_output=True, text=True).stdout
        (where,) = [row["address"] for row in json.loads(address) if row["name"] == parent]
        assert banner(where)
        gaps = Gaps(where)
        five, _ = timed("fork", parent, f"{parent}-five", "--count", "5")
        held = gaps.end()
        print(f"{image}, {memory_mib} MiB; a page of memory takes {page_us():.1f} µs", flush=True)
        print(f"  cold boot to SSH             {cold:.2f} s")
        print(f"  fork to SSH, one by one      {' '.join(f'{one:.2f}' for one in singles)} s")
        median = statistics.median(singles)
        print(f"  median {median:.2f} s, least {min(singles):.2f} s; the boot takes {cold / median:.0f} times as long")
        print(f"  five at once, all reachable  {five:.2f} s; the parent held {held:.2f} s at most")
        clear_away(parent)
        kept = [f"{one:.2f}" for one in from_kept_state(image, memory, parent)]
        print(
            f"  create --warm, one by one    {' '.join(kept) or 'the image is warm already: not touched'} s", flush=True
        )
    finally:
        clear_away(parent)


def from_kept_state(image: str, memory: tuple[str, str], prefix: str) -> list[float]:
    """Seconds that each new VM takes; none where the state that is kept is somebody else's."""
    shown = subprocess.run([*VMCTL, "image", "show", image, "-o", "json"], check=True, capture_output=True, text=True)
    if json.loads(shown.stdout)["warm"]:
        return []
    timed("image", "warm", image, *memory)
    try:
        made = ["create", "--image", image, *memory, "--warm"]
        return [timed(*made, f"{prefix}-{number}")[0] for number in range(WARM)]
    finally:
        clear_away(prefix)
        timed("image", "warm", image, "--remove")


def ended(*_: object) -> None:
    """Asked to end: what is made is cleared away first, which a second signal (timeout(1) sends two) does not stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main() -> None:
    """Measure all that was named."""
    signal.signal(signal.SIGTERM, ended)
    named = sys.argv[1:] or ["micro:512", "debian-12:1024"]
    with open_host() as host:
        for one in named:
            image_build.build(host, one.partition(":")[0], silent)
    for one in named:
        image, _, memory = one.partition(":")
        measure(image, int(memory or 512))
        print(f"  load {Path('/proc/loadavg').read_text().split()[0]}", flush=True)


if __name__ == "__main__":
    main()
