"""How fast `vmctl image import` and `export` are beside bare `qemu-img convert` of the same file on the same disk.

In turns, in one run, from the page cache to the store's own disk, and each side's time ends when its result is on the
disk: an import is not done while a power cut can undo it. What vmctl does beside (starting, its own look at the
header, the sha256 of what it stores) is in its time.

Usage, as root: python tests/perf/images.py [ROUNDS [MIB]]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vmctl.hosts import open_host
from vmctl.images import ensure_pools, find, pool_path

VMCTL = [sys.executable, "-m", "vmctl", "-q"]
TIMEOUT_S = 600.0
OPTIONS = {"qcow2": [], "raw": [], "vmdk": [], "vdi": [], "qcow2 -c": ["-c"]}


def timed(command: list[str]) -> float:
    """Seconds until a command has ended and what it wrote is on the disk."""
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    os.sync()
    return time.monotonic() - began


def measure(rounds: int, qemu: Callable[[], float], ours: Callable[[], float], name: str) -> None:
    """Take turns, and print medians and their ratio."""
    bare, own = [], []
    for _ in range(rounds):
        bare.append(qemu())
        own.append(ours())
    one, two = statistics.median(bare), statistics.median(own)
    print(f"{name:<18} qemu-img {one:6.2f} s   vmctl {two:6.2f} s   speed of qemu-img's {one / two:.2f}", flush=True)


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    mib = int(sys.argv[2]) if len(sys.argv) > 2 else 1024
    with open_host() as host:
        ensure_pools(host)
        store = Path(pool_path(host, host.settings.image_pool))
        with tempfile.TemporaryDirectory(prefix=".perf-", dir=store) as name:
            folder = Path(name)
            raw = folder / "perf-image.raw"
            with raw.open("wb") as file:
                # A third is content that does not compress, a third text, a third empty, as in an installed disk.
                for _ in range(mib // 3):
                    file.write(os.urandom(1 << 20))
                for number in range(mib // 3):
                    file.write((f"line {number} of a text\n".encode() * 65536)[: 1 << 20])
                file.seek(510)
                file.write(b"\x55\xaa")
                file.truncate(mib << 20)
            for kind in ("raw", "qcow2", "vmdk"):
                source, out = folder / f"perf-image.{kind}", folder / "out"
                if kind != "raw":
                    timed(["qemu-img", "convert", "-f", "raw", "-O", kind, str(raw), str(source)])

                def qemu(kind: str = kind, source: Path = source, out: Path = out) -> float:
                    out.unlink(missing_ok=True)
                    return timed(["qemu-img", "convert", "-f", kind, "-O", "qcow2", str(source), str(out)])

                def ours(source: Path = source) -> float:
                    subprocess.run([*VMCTL, "image", "delete", "perf-image", "--yes"], capture_output=True, check=False)
                    return timed([*VMCTL, "image", "import", str(source)])

                measure(rounds, qemu, ours, f"import {kind}")
            disk = find(host, "perf-image").disk
            for form, options in OPTIONS.items():
                target, out = folder / "ours", folder / "out"
                plain = form.split()[0]

                def qemu_out(plain: str = plain, options: list[str] = options, out: Path = out) -> float:
                    out.unlink(missing_ok=True)
                    return timed(["qemu-img", "convert", "-f", "qcow2", "-O", plain, *options, disk, str(out)])

                def ours_out(plain: str = plain, options: list[str] = options, target: Path = target) -> float:
                    target.unlink(missing_ok=True)
                    more = ["--compress"] if options else []
                    return timed([*VMCTL, "image", "export", "perf-image", str(target), "--format", plain, *more])

                measure(rounds, qemu_out, ours_out, f"export {form}")
        subprocess.run([*VMCTL, "image", "delete", "perf-image", "--yes"], check=True, capture_output=True)


if __name__ == "__main__":
    main()
