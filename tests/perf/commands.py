"""What commands cost: `vmctl list` with 200 domains beside a bare script with one bulk call; `--help` beside typer.

Usage: python tests/perf/commands.py [ROUNDS]      on qemu:///system, as root
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from vmctl import render, resolve
from vmctl.hosts import open_host
from vmctl.hypervisor import domain
from vmctl.record import Record
from vmctl.spec import VM, Accel

DOMAINS = 200
BARE = (
    "import libvirt\n"
    "for d, s in libvirt.open('qemu:///system').getAllDomainStats(0, 0): print(d.name(), s.get('state.state'))"
)
ENTRY = str(Path(sys.executable).with_name("vmctl"))


def took(argv: list[str]) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    # Where Python was told to write no bytecode, vmctl's modules would be compiled in each run, typer's would not.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=env)
    return time.perf_counter() - began


def beside(rounds: int, base: list[str], ours: list[str]) -> tuple[list[float], list[float]]:
    """Both, turn by turn, after one run of each that does not count."""
    took(base), took(ours)
    pairs = [(took(base), took(ours)) for _ in range(rounds)]
    return [b for b, _ in pairs], [o for _, o in pairs]


def tell(title: str, base_name: str, base: list[float], ours: list[float]) -> None:
    """Medians, spread and ratio."""
    print(title)
    for name, samples in ((base_name, base), ("vmctl", ours)):
        ms = [1000 * s for s in samples]
        print(f"  {name:<28} median {statistics.median(ms):6.1f} ms   {min(ms):.1f} to {max(ms):.1f} ms")
    print(
        f"  ratio of medians             {statistics.median(ours) / statistics.median(base):.2f}   (aim: at most 2.00)"
    )


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    stem = f"perf-{os.getpid()}"
    placement = resolve.Placement("/nope/r", "/nope/s", (), "/nope/l", "", "/nope/k", "/nope/i", "", "default", None)
    record = Record("micro", "0" * 12, "0" * 16, "measured", labels={"role": "perf"})
    made = []
    with open_host("qemu:///system") as host:
        try:
            for number in range(DOMAINS):
                name = f"{stem}-{number}"
                ident = resolve.identity(stem, name, ())
                view = resolve.resolve(
                    VM(name, "micro"), vm_uuid=ident, accel=Accel.TCG, placement=placement, record=record
                )
                domain.define(host.conn, render.domain(view), name=name)
                made.append(name)
            base, ours = beside(rounds, [sys.executable, "-c", BARE], [ENTRY, "-c", "qemu:///system", "list"])
            tell(f"list, {DOMAINS} defined domains, {rounds} rounds", "bare script, one bulk call", base, ours)
        finally:
            for name in made:
                domain.undefine(host.conn, name)
    base, ours = beside(rounds, [sys.executable, "-c", "import typer"], [ENTRY, "--help"])
    tell(f"vmctl --help, {rounds} rounds", "python -c 'import typer'", base, ours)


if __name__ == "__main__":
    main()
