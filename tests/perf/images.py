"""How fast `vmctl image import` and `export` are beside bare `qemu-img convert` of the same file on the same disk.

Like beside like, in turns, from the page cache to the store's own disk. Each side's time ends when its result is on the
disk: bare qemu-img is followed by `sync -d RESULT`, and so is vmctl, which has done it by then. What vmctl does beside
(starting, its own look at the header, the digest of what it stores) is in its time. Two disks are tried: one
full of content that cannot be compressed, and, where the store has it, Debian's, most of which is empty.

Usage, as root: python tests/perf/images.py [ROUNDS [MIB [import | export]]]
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vmctl.errors import NotFound
from vmctl.hosts import open_host
from vmctl.images import ensure_pools, find, pool_path

VMCTL = [sys.executable, "-m", "vmctl", "-q"]
NAME = "perf-image"
TIMEOUT_S = 600.0
IMPORTED = ("raw", "qcow2", "vmdk", "vdi")
EXPORTED = {"qcow2": [], "raw": [], "vmdk": [], "vdi": [], "qcow2 -c": ["-c"]}


def cpu_s() -> float:
    """Seconds of processor time of all children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(command: list[str], result: Callable[[], Path]) -> tuple[float, float]:
    """Wall and processor seconds until a command has ended and its result is on the disk."""
    os.sync()  # what others have written before is not to be waited for inside
    before, began = cpu_s(), time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    subprocess.run(["sync", "-d", str(result())], check=True, timeout=TIMEOUT_S)
    return time.monotonic() - began, cpu_s() - before


def measure(rounds: int, sides: list[Callable[[], tuple[float, float]]], name: str, clear: Callable[[], None]) -> None:
    """Take turns, each side first in every other round, and print what each took and the ratio of their times.

    What a turn made goes at once, so that each begins with the same memory free: in a virtual machine, memory that was
    never used before costs seconds for each GiB.
    """
    taken: list[list[tuple[float, float]]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            taken[which].append(sides[which]())
            clear()
    middle = [[statistics.median(values) for values in zip(*side, strict=True)] for side in taken]
    least = [min(wall for wall, _ in side) for side in taken]
    told = [
        f"{who} {wall:5.2f} s (least {low:5.2f}, CPU {cpu:5.2f})"
        for who, (wall, cpu), low in zip(("qemu-img", "vmctl"), middle, least, strict=True)
    ]
    ratios = f"{middle[0][0] / middle[1][0]:.2f} (of the least {least[0] / least[1]:.2f})"
    print(f"{name:<22} {'   '.join(told)}   speed of qemu-img's {ratios}", flush=True)


def forget() -> None:
    """Take the image out of the store."""
    subprocess.run([*VMCTL, "image", "delete", NAME, "--yes"], capture_output=True, check=False, timeout=TIMEOUT_S)


def full(path: Path, mib: int) -> None:
    """A raw disk of bytes that nothing can make fewer."""
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
        file.seek(510)
        file.write(b"\x55\xaa")


def compare(what: str, raw: Path, store: Path, rounds: int, only: str) -> None:
    """Both directions of one disk, or one, in all forms."""
    folder, out, ours = raw.parent, raw.parent / "out", raw.parent / "ours"

    def stored() -> Path:
        return next(store.glob(f"{NAME}-*.qcow2"))

    def clear_files() -> None:
        for path in (out, ours):
            path.unlink(missing_ok=True)

    def clear() -> None:
        clear_files()
        forget()

    forget()
    for kind in IMPORTED if only != "export" else ():
        source = folder / f"{NAME}.{kind}"
        if kind != "raw":
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, raw, source], check=True)

        def bare(kind: str = kind, source: Path = source) -> tuple[float, float]:
            return timed(["qemu-img", "convert", "-f", kind, "-O", "qcow2", str(source), str(out)], lambda: out)

        def own(source: Path = source) -> tuple[float, float]:
            return timed([*VMCTL, "image", "import", str(source)], stored)

        measure(rounds, [bare, own], f"import {what} {kind}", clear)
    subprocess.run([*VMCTL, "image", "import", str(raw)], check=True, capture_output=True, timeout=TIMEOUT_S)
    disk = str(stored())
    Path(disk).read_bytes()  # for both sides: what an import has written is not in the page cache
    for form, options in EXPORTED.items() if only != "import" else ():
        plain = form.split()[0]

        def bare_out(plain: str = plain, options: list[str] = options) -> tuple[float, float]:
            return timed(["qemu-img", "convert", "-f", "qcow2", "-O", plain, *options, disk, str(out)], lambda: out)

        def own_out(plain: str = plain, options: list[str] = options) -> tuple[float, float]:
            more = ["--compress"] if options else []
            return timed([*VMCTL, "image", "export", NAME, str(ours), "--format", plain, *more], lambda: ours)

        measure(rounds, [bare_out, own_out], f"export {what} {form}", clear_files)
    forget()


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    mib = int(sys.argv[2]) if len(sys.argv) > 2 else 1024
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    with open_host() as host:
        ensure_pools(host)
        store = Path(pool_path(host, host.settings.image_pool))
        try:
            debian = find(host, "debian-12").disk
        except NotFound:
            debian = ""
    for what in ("full", "debian") if debian else ("full",):
        with tempfile.TemporaryDirectory(prefix=".perf-", dir=store) as name:
            raw = Path(name) / f"{NAME}.raw"
            if what == "full":
                full(raw, mib)
            else:
                subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", debian, raw], check=True)
            compare(what, raw, store, rounds, only)


if __name__ == "__main__":
    main()
