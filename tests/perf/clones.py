"""How long 20 linked clones of a stopped Debian take, in one command, beside 20 times `qemu-img create`.

Usage, as root: python tests/perf/clones.py [IMAGE [COUNT]]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from boot import VMCTL

from vmctl import image_build
from vmctl.events import silent
from vmctl.hosts import open_host


def main() -> None:
    """Measure and print."""
    image = sys.argv[1] if len(sys.argv) > 1 else "debian-12"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    source = f"perf-{os.getpid()}"
    with open_host() as host:
        image_build.build(host, image, silent)
    subprocess.run([*VMCTL, "-q", "create", source, "--image", image, "--no-start"], check=True, capture_output=True)
    try:
        began = time.monotonic()
        subprocess.run(
            [*VMCTL, "-q", "clone", source, f"{source}c", "--count", str(count)], check=True, capture_output=True
        )
        ours = time.monotonic() - began
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            base = Path(folder) / "base.qcow2"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(base), "4G"], check=True)
            began = time.monotonic()
            for number in range(count):
                words = ["create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", f"{folder}/{number}.qcow2"]
                subprocess.run(["qemu-img", *words], check=True)
            bare = time.monotonic() - began
        print(f"{count} linked clones of {image}: {ours:.2f} s, each {ours / count:.3f} s")
        print(f"  of that, bare `qemu-img create` {count} times, one by one: {bare:.2f} s")
        print(f"  load {Path('/proc/loadavg').read_text().split()[0]}")
    finally:
        subprocess.run([*VMCTL, "delete", f"{source}*", "--yes"], check=False, capture_output=True)


if __name__ == "__main__":
    main()
