"""The image debian-12 under this machine's accelerator: from nothing to SSH, and to the end of cloud-init.

`vmctl create --wait ssh` beside raw QEMU with the same kernel, disk and seed, turn by turn; then, of vmctl's guest, how
long until cloud-init is through. Says how busy the machine was: a load beside one's own moves all figures.

Usage, as root: python tests/perf/debian_boot.py [ROUNDS]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from boot import VMCTL, raw, told

from vmctl import image_build
from vmctl.events import silent
from vmctl.hosts import decide_accel, open_host
from vmctl.spec import AccelChoice

IMAGE, MEMORY_MIB, TIMEOUT_S = "debian-12", 1024, 400


def ours(number: int) -> tuple[float, float]:
    """Seconds from vmctl's exec until the VM is reachable, and until cloud-init is through."""
    name = f"bench-{os.getpid()}-{number}"
    began = time.monotonic()
    try:
        create = [*VMCTL, "-q", "create", name, "--image", IMAGE, "--memory", f"{MEMORY_MIB}M", "--wait", "ssh"]
        subprocess.run(create, check=True, capture_output=True, timeout=TIMEOUT_S)
        reached = time.monotonic() - began
        done = [*VMCTL, "-q", "exec", name, "--", "cloud-init", "status", "--wait"]
        subprocess.run(done, check=True, capture_output=True, timeout=TIMEOUT_S)
        return reached, time.monotonic() - began
    finally:
        subprocess.run([*VMCTL, "-q", "delete", name, "--yes"], check=False, capture_output=True)


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with open_host() as host, tempfile.TemporaryDirectory(prefix="vmctl-bench-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        image_build.build(host, IMAGE, silent)
        decision = decide_accel(host, AccelChoice.AUTO)
        bare: list[float] = []
        pairs: list[tuple[float, float]] = []
        for number in range(rounds):
            bare.append(raw(host, decision, Path(folder), number, name=IMAGE, memory_mib=MEMORY_MIB))
            pairs.append(ours(number))
    reached = [pair[0] for pair in pairs]
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"{IMAGE}, nothing to SSH banner, {decision.chosen}, 1 vCPU, {rounds} rounds, turn by turn; load now {load}")
    print(told("raw QEMU", bare))
    print(told("vmctl create --wait ssh", reached))
    print(told("  and cloud-init done", [pair[1] for pair in pairs]))
    print(f"ratio of medians           {statistics.median(reached) / statistics.median(bare):.2f}")


if __name__ == "__main__":
    main()
