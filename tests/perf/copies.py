"""What `vmctl cp` costs beside the system's own tools, turn by turn, on one micro guest.

A large file beside scp, a tree of many small files beside tar over ssh, with the same keys; what arrived is compared.

Usage: python tests/perf/copies.py [MEBIBYTES [FILES [ROUNDS]]]      on qemu:///system, as root
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vmctl import guest
from vmctl.hosts import open_host

ENTRY = str(Path(sys.executable).with_name("vmctl"))


def took(*argv: str) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return time.perf_counter() - began


def beside(title: str, rounds: int, base: tuple[str, list[str]], ours: list[str], clear: list[str]) -> None:
    """Both, turn by turn, each on a clean place; medians and their ratio."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for argv, into in ((base[1], samples[0]), (ours, samples[1])):
            took(*clear)
            into.append(took(*argv))
    medians = [statistics.median(s) for s in samples]
    print(f"{title}\n  {base[0]:<16} {medians[0]:7.2f} s   {' '.join(f'{s:.2f}' for s in samples[0])}")
    print(f"  {'vmctl cp':<16} {medians[1]:7.2f} s   {' '.join(f'{s:.2f}' for s in samples[1])}")
    print(f"  speed of vmctl   {medians[0] / medians[1]:7.2f} of it   (aim: at least 0.80)", flush=True)


def make(folder: Path, mebibytes: int, files: int) -> None:
    """The file and the tree."""
    with (folder / "file").open("wb") as file:
        for _ in range(mebibytes):
            file.write(os.urandom(1 << 20))
    for number in range(files):
        path = folder / "tree" / f"d{number // 100}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * 37 % 8192))


def main() -> None:
    """Measure and print."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the guest's end, whoever stops it
    mebibytes, files, rounds = (int(w) for w in (*sys.argv[1:], *("1024", "5000", "1")[len(sys.argv) - 1 :]))
    vm = f"perf-copy-{os.getpid()}"
    took(ENTRY, "create", vm, "-q", "--image", "micro", "--memory", "1G", "--root-size", "6G", "--wait", "ssh")
    try:
        with tempfile.TemporaryDirectory() as name:
            here = Path(name)
            make(here, mebibytes, files)
            measure(vm, here, rounds, f"{mebibytes} MiB", f"{files} files")
    finally:
        took(ENTRY, "delete", vm, "--yes")


def measure(vm: str, here: Path, rounds: int, size: str, count: str) -> None:
    """The four pairs."""
    with open_host("qemu:///system") as host:
        ssh = guest.openssh_argv(host, vm, [])
    at, options = ssh[-1], ssh[5:-1]
    remote = " ".join(f"'{w}'" for w in ssh)
    scp = ["scp", "-q", *options]
    there = [*ssh, "rm -rf /root/file /root/tree && sync"]
    back = ["rm", "-rf", str(here / "back")]
    beside(
        f"{size} in",
        rounds,
        ("scp", [*scp, f"{here}/file", f"root@{at}:/root/file"]),
        [ENTRY, "cp", "-q", f"{here}/file", f"{vm}:/root/file"],
        there,
    )
    same(ssh, here / "file", "/root/file")
    beside(
        f"{size} out",
        rounds,
        ("scp", [*scp, f"root@{at}:/root/file", f"{here}/back"]),
        [ENTRY, "cp", "-q", f"{vm}:/root/file", f"{here}/back"],
        back,
    )
    subprocess.run(["cmp", here / "file", here / "back"], check=True)
    into = f"tar -C {here} -cf - tree | {remote} 'tar -xf - -C /root'"
    beside(
        f"{count} in",
        rounds,
        ("tar over ssh", ["sh", "-c", into]),
        [ENTRY, "cp", "-q", f"{here}/tree", f"{vm}:/root/tree"],
        there,
    )
    out = f"mkdir {here}/back && {remote} 'tar -C /root -cf - tree' | tar -xf - -C {here}/back --strip-components=1"
    beside(
        f"{count} out",
        rounds,
        ("tar over ssh", ["sh", "-c", out]),
        [ENTRY, "cp", "-q", f"{vm}:/root/tree", f"{here}/back"],
        back,
    )
    subprocess.run(["diff", "-r", here / "tree", here / "back"], check=True)


def same(ssh: list[str], path: Path, there: str) -> None:
    """Both files have one digest."""
    digests = [
        subprocess.run(a, check=True, capture_output=True).stdout.split()[0]
        for a in (["sha256sum", path], [*ssh, f"sha256sum {there}"])
    ]
    assert digests[0] == digests[1]


if __name__ == "__main__":
    main()
