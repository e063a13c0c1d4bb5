"""vmctl's trap table beside kvm-unit-tests' x86/vmexit, for those who have that binary.

Usage: python tests/perf/vmexit.py VMEXIT_FLAT [kvm|tcg] [QEMU]      ends with 1 when a row is more than 10 % apart

Each of its tests runs in a QEMU of its own, for under TCG a whole run ends at vmcall. Gross cycles on both sides:
vmexit takes off no loop. Its `ipi` and `self_ipi` tests do other things than our rows of those names, and are left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from vmctl.bench import trap
from vmctl.bench.rows import ROWS
from vmctl.bench.table import table
from vmctl.choices import AccelChoice
from vmctl.hosts import open_host
from vmctl.progress import reporter

CLOSE = 0.10
TIMEOUT_S = 120


def theirs(qemu: str, flat: Path, accel: str, test: str) -> int | None:
    """Cycles that vmexit prints for a test; None when it skips it or comes to no end."""
    board = ["-M", "q35", "-accel", accel, "-cpu", "host" if accel == "kvm" else "max", "-smp", "2", "-nodefaults"]
    devices = ["-display", "none", "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-no-reboot"]
    devices += ["-device", "pc-testdev", "-device", "pci-testdev"]
    command = [qemu, *board, *devices, "-kernel", str(flat), "-append", test.rpartition(":")[2]]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False).stdout
    except subprocess.TimeoutExpired:
        return None
    match = re.search(rf"^{re.escape(test)} (\d+)$", said, re.MULTILINE)
    return int(match[1]) if match else None


def main() -> int:
    """Measure both, row by row, and tell."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"usage: {sys.argv[0]} VMEXIT_FLAT [kvm|tcg] [QEMU]   (make x86/vmexit.flat in kvm-unit-tests)")
    flat, accel = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "tcg"
    shared = [row for row in ROWS if row.vmexit]
    with open_host("qemu:///system") as host:
        qemu = sys.argv[3] if len(sys.argv) > 3 else str(host.facts.emulator)
        plan = trap.plan([row.name for row in shared], quick=False, guests=None)
        result = trap.run(host, plan, AccelChoice(accel), reporter())
    ours = {line.name: line.gross_cycles for line in table(result) if line.guests}
    print(f"{'row':<18} {'vmexit':>10} {'vmctl':>10}  ratio")
    apart = 0
    for row in shared:
        cycles = theirs(qemu, flat, accel, row.vmexit)
        if cycles is None or row.name not in ours:
            print(f"{row.name:<18} {cycles or '-':>10} {'-':>10}  not on both sides")
            continue
        ratio = ours[row.name] / cycles
        apart += abs(ratio - 1) > CLOSE
        mark = "" if abs(ratio - 1) <= CLOSE else "  more than 10 % apart"
        print(f"{row.name:<18} {cycles:>10,} {ours[row.name]:>10,.0f}  {ratio:.2f}{mark}")
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
