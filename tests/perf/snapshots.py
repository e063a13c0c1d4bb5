"""How long a revert to a snapshot with memory takes: vmctl's beside virsh's of an internal one, turn by turn.

Two micro VMs of the same make, running, each with a snapshot. `vmctl snapshot revert` is timed from its exec to its
end, the VM running again; so is `virsh snapshot-revert` of the internal one, the only kind libvirt 9.0 reverts to.
Then the same of a snapshot fifty deep, taken as often.

Usage, as root: python tests/perf/snapshots.py [ROUNDS [DEPTH]]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

VMCTL = str(Path(sys.executable).with_name("vmctl"))


def took(*argv: str) -> float:
    """Seconds of one command."""
    began = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return time.perf_counter() - began


def told(name: str, samples: list[float]) -> str:
    """One line: median, least and most."""
    return f"{name:<46} median {statistics.median(samples):5.2f} s   {min(samples):.2f} to {max(samples):.2f} s"


def beside(ours: str, other: str, rounds: int) -> None:
    """Both kinds, turn by turn."""
    took(VMCTL, "snapshot", "create", f"{ours}.mark")
    took("virsh", "-q", "snapshot-create-as", other, "mark")
    samples: dict[str, list[float]] = {"vmctl": [], "virsh": []}
    for _ in range(rounds):
        samples["vmctl"].append(took(VMCTL, "-q", "snapshot", "revert", f"{ours}.mark", "--yes"))
        samples["virsh"].append(took("virsh", "-q", "snapshot-revert", other, "mark"))
    print(f"micro VM of 512 MiB, running, revert to a snapshot with memory, {rounds} rounds, turn by turn")
    print(told("vmctl snapshot revert (external)", samples["vmctl"]) + "   (aim: at most 1.0 s)")
    print(told("virsh snapshot-revert (internal)", samples["virsh"]), flush=True)


def deep(vm: str, depth: int) -> None:
    """Snapshots on top of each other: the first verbs and the last."""
    subprocess.run(["virsh", "-q", "destroy", vm], check=False, capture_output=True)
    creates = [took(VMCTL, "-q", "snapshot", "create", f"{vm}.d{number}") for number in range(depth)]
    print(f"\nmicro VM, stopped, {depth} snapshots on top of each other")
    print(told("snapshot create, the first five", creates[:5]))
    print(told("snapshot create, the last five", creates[-5:]))
    print(told("snapshot list", [took(VMCTL, "-q", "snapshot", "list", vm) for _ in range(5)]))
    newest = took(VMCTL, "-q", "snapshot", "revert", f"{vm}.d{depth - 1}", "--yes")
    print(told("snapshot revert to the newest", [newest]))
    middle = [took(VMCTL, "-q", "snapshot", "delete", f"{vm}.d{n}", "--yes") for n in (0, depth // 2, depth - 1)]
    print(told("snapshot delete: oldest, middle, newest", middle), flush=True)


def main() -> None:
    """Measure and print."""
    rounds, depth = (int(word) for word in (*sys.argv[1:], *("7", "50")[len(sys.argv) - 1 :]))
    ours, other = (f"perf-snap-{os.getpid()}-{letter}" for letter in "ab")
    took(VMCTL, "image", "build", "micro")
    try:
        for vm in (ours, other):
            took(VMCTL, "-q", "create", vm, "--image", "micro", "--wait", "ssh")
        beside(ours, other, rounds)
        deep(ours, depth)
    finally:
        subprocess.run([VMCTL, "-q", "delete", ours, other, "--yes"], check=False, capture_output=True)


if __name__ == "__main__":
    main()
