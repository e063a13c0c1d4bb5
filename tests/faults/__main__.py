"""python -m tests.faults [--runs N] [--seed N] [--only FAULT] [--phase PHASE] [--quick] [--log FILE] | --table"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults import series
from tests.faults.phases import Phase
from tests.faults.strikes import SLOW, Fault

_ROOT = Path(__file__).parents[2]
_MARKER = Path("/run/vmctl-test-host")
_LOG = Path.home() / ".cache/vmctl/migrate-faults.jsonl"


def main() -> int:
    """Go on with the series where its log ends; inside a test host, which is entered first."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="how many the log shall tell of in the end")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=Fault, choices=list(Fault), metavar="FAULT")
    parser.add_argument("--phase", type=Phase, choices=list(Phase))
    parser.add_argument("--quick", action="store_true", help="without the faults that take a minute each")
    parser.add_argument("--log", type=Path, default=_LOG)
    parser.add_argument("--table", action="store_true", help="only print the table of what the log tells")
    given = parser.parse_args()
    if given.table:
        print(series.table(series.read(given.log)))
        return 0
    if not _MARKER.exists():
        words = [sys.executable, "-m", "tests.faults", *sys.argv[1:]]
        os.execv(_ROOT / "tests/run", ["tests/run", "--run", *words])
    done = [one for one in series.read(given.log) if one["seed"] == given.seed]
    counted = sum(one["outcome"] != "missed" for one in done)
    wanted = (
        run
        for run in series.runs(given.seed)
        if given.only in {None, run.fault}
        and given.phase in {None, run.phase}
        and not (given.quick and run.fault in SLOW)
    )
    known = {one["number"] for one in done}
    from tests.faults.bench import Bench
    from tests.hosts import booted

    with booted(2, shared=True, qemu_root=True) as bed, TemporaryDirectory() as config, given.log.open("a") as log:
        bench = Bench(bed, Path(config))
        for run in islice((run for run in wanted if run.number not in known), 10 * given.runs):
            if counted >= given.runs:
                break
            began = time.monotonic()
            record = {"seed": given.seed, **bench.do(run), "run_s": round(time.monotonic() - began, 1)}
            log.write(json.dumps(record) + "\n")
            log.flush()
            counted += record["outcome"] != "missed"
            problems = "; ".join(record["problems"])
            print(
                f"{counted:>4} #{run.number} {run.fault}, {run.phase} ({record['libvirt']}): {record['outcome']}, "
                f"{record['took_s']} s, {record['attempts']} to recover in {record['recovery_s']} s, "
                f"{record['run_s']} s in all; {' '.join(record['options'])} {record['done']} {problems}",
                flush=True,
            )
    every = [one for one in series.read(given.log) if one["seed"] == given.seed]
    print(series.table(every))
    return any(one["outcome"] == "failed" for one in every)


if __name__ == "__main__":
    sys.exit(main())
