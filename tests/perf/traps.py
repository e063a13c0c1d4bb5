"""Whether the trap table can be had twice: two runs, turn by turn with nothing else, and what differs between them.

Usage: python tests/perf/traps.py [ACCEL] [GUESTS]      for a quiet time; ends with 1 when the aim is missed

The aim: a run of five guests under TCG takes 20 s at most, medians of nine rows in ten agree within 5 %, `bench
compare` says "no change", and a row that is made slower (CPUID done twice, in a guest built for it) is the one that
it finds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from vmctl.bench import trap
from vmctl.bench.compare import Verdict, compare
from vmctl.bench.result import TrapResult
from vmctl.choices import AccelChoice
from vmctl.events import silent
from vmctl.hosts import open_host
from vmctl.progress import reporter

AGREE, ROWS = 0.05, 0.9
LONGEST_S = 20.0  # one run under TCG
SOURCES = Path(__file__).parents[2] / "vmctl/baremetal"


def slowed(folder: Path) -> Path:
    """The guest with CPUID done twice in its row."""
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("*.elf", "__pycache__"))
    rows = folder / "rows.c"
    text, old = rows.read_text(), 'volatile("cpuid" : :'
    assert text.count(old) == 1
    rows.write_text(text.replace(old, 'volatile("cpuid; xor %%eax, %%eax; cpuid" : :'))
    subprocess.run([sys.executable, str(folder / "build_hook.py")], check=True)
    return folder / "traps.elf"


def agreement(first: TrapResult, second: TrapResult) -> bool:
    """Print how the rows agree; whether nine in ten do."""
    changes = compare(first, second).changes
    apart = {change.name: change.ratio - 1 for change in changes if abs(change.ratio - 1) > AGREE}
    share = 1 - len(apart) / len(changes)
    print(f"{len(changes) - len(apart)} of {len(changes)} rows agree within {AGREE:.0%} ({share:.0%}; aim {ROWS:.0%})")
    for name, by in apart.items():
        print(f"  apart: {name} by {by:+.1%}")
    return share >= ROWS


def main() -> int:
    """Measure, tell, judge."""
    choice = AccelChoice(sys.argv[1]) if len(sys.argv) > 1 else AccelChoice.TCG
    wanted = replace(trap.Plan(), guests=int(sys.argv[2]) if len(sys.argv) > 2 else 5)
    print(f"load at the start: {os.getloadavg()[0]:.2f}")
    with open_host("qemu:///system") as host, tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        first = trap.run(host, wanted, choice, reporter())
        took_s = time.monotonic() - began
        print(f"one run took {took_s:.1f} s (aim under TCG: {LONGEST_S:.0f} s)")
        second = trap.run(host, wanted, choice, reporter())
        slow = trap.run(host, wanted, choice, silent, guest=slowed(Path(folder) / "slow"))
    alike = agreement(first, second)
    same = compare(first, second)
    print(f"compare of two runs of the same: {same.verdict} (drift {same.drift - 1:+.1%})")
    found = [change.name for change in compare(second, slow).changes if change.verdict is Verdict.SLOWER]
    print(f"with CPUID done twice, slower: {', '.join(found) or 'none'}")
    print(f"load at the end: {os.getloadavg()[0]:.2f}")
    in_time = took_s <= LONGEST_S or choice is not AccelChoice.TCG or wanted.guests > 5
    return 0 if in_time and alike and same.verdict == "no change" and found == ["cpuid"] else 1


if __name__ == "__main__":
    sys.exit(main())
