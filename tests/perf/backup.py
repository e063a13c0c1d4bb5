"""What a backup of a running VM costs beside `qemu-img convert` of the same disk, turn by turn, on a real disk.

A disk of 4 GiB with 1 GiB of data, or as much as is asked for, on a running micro guest. convert reads the live file
with -U, which gives no consistent copy, but the same work; it is measured as it is, and with its copy put on the disk
for good, as a backup is when vmctl says it is made. Then the guest writes 1 % of the disk and an increment is taken.
Each result is compared with the disk.

Usage: python tests/perf/backup.py [ROUNDS [FOLDER [MIB]]]     on qemu:///system, as root; FOLDER on the disk to measure
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENTRY = str(Path(sys.executable).with_name("vmctl"))
DISK_MIB, CHANGED_MIB = 4096, 41
DATA_MIB = int(sys.argv[3]) if len(sys.argv) > 3 else 1024


def took(*argv: str) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return time.perf_counter() - began


def size(path: Path) -> int:
    """Bytes on the disk, files with several names once."""
    found = {one.stat().st_ino: one.stat().st_blocks * 512 for one in path.rglob("*") if one.is_file()}
    return sum(found.values())


def source(vm: str) -> str:
    """The file of the VM's data disk."""
    shown = subprocess.run([ENTRY, "show", vm, "-o", "json"], check=True, capture_output=True).stdout
    return str(json.loads(shown)["disks"][-1]["source"])


def prepare(vm: str, folder: Path) -> None:
    """Give a VM a disk that holds what cannot be compressed, in pieces with room between."""
    raw = folder / "raw"
    with raw.open("wb") as file:
        file.truncate(DISK_MIB << 20)
        for number in range(DATA_MIB):
            file.seek((number // 64 * (DISK_MIB * 64 // DATA_MIB) + number % 64) << 20)
            file.write(os.urandom(1 << 20))
    took("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), source(vm))
    raw.unlink()


def change(vm: str, *, at: int) -> None:
    """Have the guest write 1 % of the disk, in one piece."""
    script = f"dd if=/dev/urandom of=/dev/vdc bs=1M count={CHANGED_MIB} seek={at} conv=notrunc,fsync"
    took(ENTRY, "exec", vm, "--", "sh", "-c", script)


def row(label: str, samples: list[float]) -> float:
    """Print a row; its median."""
    middle = statistics.median(samples)
    print(f"  {label:<34} {middle:7.2f} s   {' '.join(f'{one:.2f}' for one in samples)}", flush=True)
    return middle


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    vm = f"perf-backup-{os.getpid()}"
    took(ENTRY, "create", vm, "-q", "--image", "micro", "--disk", f"{DISK_MIB}M", "--no-start")
    place = tempfile.mkdtemp(prefix="vmctl-perf-backup-", dir=sys.argv[2] if len(sys.argv) > 2 else "/var/tmp")
    try:
        prepare(vm, Path(place))
        took(ENTRY, "start", vm)
        took(ENTRY, "wait", vm, "--for", "ssh", "--timeout", "300")
        measure(vm, Path(place), rounds)
    finally:
        shutil.rmtree(place)
        took(ENTRY, "delete", vm, "--yes")


def measure(vm: str, place: Path, rounds: int) -> None:
    """The rounds: convert, full and increment, each on a clean place and with nothing of the one before unwritten."""
    path, store, copy = source(vm), place / "store", place / "copy.qcow2"
    samples: dict[str, list[float]] = {one: [] for one in ("convert", "durable", "full", "increment")}
    spaces: list[tuple[int, int]] = []
    for number in range(rounds):
        took("sync")
        alone = took("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "qcow2", path, str(copy))
        samples["convert"].append(alone)
        samples["durable"].append(alone + took("sync", "-d", str(copy)))
        copy.unlink()
        took("sync")
        samples["full"].append(took(ENTRY, "backup", "create", vm, "--full", "--folder", str(store)))
        whole = size(store)
        change(vm, at=number * CHANGED_MIB * 2)
        took("sync")
        samples["increment"].append(took(ENTRY, "backup", "create", vm, "--incremental", "--folder", str(store)))
        spaces.append((whole, size(store) - whole))
        proved = took(ENTRY, "backup", "verify", vm, "--folder", str(store))
        print(f"  round {number + 1}: both proved in {proved:.2f} s", flush=True)
        if number + 1 < rounds:
            shutil.rmtree(store)
    took("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, str(place / "raw"))
    print(f"{DISK_MIB} MiB disk with {DATA_MIB} MiB of data, live; increment after {CHANGED_MIB} MiB written")
    print(f"  load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    convert, durable = (
        row("qemu-img convert, in memory", samples["convert"]),
        row("… and on the disk", samples["durable"]),
    )
    full, increment = row("vmctl backup create --full", samples["full"]), row("… --incremental", samples["increment"])
    print(f"  full: {durable / full:.2f} of convert's speed on the disk (aim: at least 0.85)")
    print(f"  full: {convert / full:.2f} of convert's speed in memory")
    print(f"  increment: {increment / full:.3f} of the full's time (aim: at most 0.1)")
    space = statistics.median(part / whole for whole, part in spaces)
    print(f"  increment: {space:.3f} of the full's space (aim: at most 0.1)", flush=True)


if __name__ == "__main__":
    main()
