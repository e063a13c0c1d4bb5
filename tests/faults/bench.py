"""Two hosts and a guest on which one run after the other is done."""

from __future__ import annotations

import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tests.faults import judge, phases, witness
from tests.faults.judge import Case
from tests.faults.phases import Hold, Phase
from tests.faults.series import Run
from tests.faults.strikes import Strike
from tests.hosts import Machine, Testbed
from tests.system.conftest import REPO, VMCTL
from tests.system.migrating import known_pair, until
from vmctl.wait import pause

_RATE, _QUICK_RATE = "24mbit", "200mbit"
_BALLAST_MIB = 8
_HANG_S = 200.0
_KEEPALIVE = "s/^keepalive_interval.*/keepalive_interval = 2/; s/^keepalive_count.*/keepalive_count = 3/"


class Bench:
    """The hosts, and the guest that goes to and fro between them."""

    def __init__(self, bed: Testbed, config: Path) -> None:
        self.pair = known_pair(bed, config)
        self.vm = f"w-{secrets.token_hex(4)}"
        for one in bed.machines:
            phases.install(one)
            # Three times as quick as libvirt's own: what waits for a dead connection waits for 8 s, not for 30.
            one.run("sed", "-i", _KEEPALIVE, "/etc/libvirt/libvirtd.conf", "/etc/libvirt/qemu.conf")
            one.kill("libvirtd", signal.SIGTERM)
            until(lambda one=one: not one.run("pgrep", "libvirtd", check=False).stdout, "libvirtd has ended")  # type: ignore[misc]
            one.start("libvirtd")
        witness.make(bed.machines[0], self.vm, witness.SHARED)
        self._begun(bed.machines[0], self.vm)

    def _begun(self, machine: Machine, vm: str) -> None:
        until(lambda: (now := witness.said(machine, vm)) is not None and now.passes > 1, "the guest works")

    def do(self, run: Run) -> dict[str, Any]:
        """One run, and what it came to."""
        if run.phase is Phase.DISKS:
            with self._other() as vm:
                return self._do(run, vm)
        return self._do(run, self.vm)

    @contextmanager
    def _other(self) -> Iterator[str]:
        """A guest whose disk the other host does not see."""
        vm = f"d-{secrets.token_hex(4)}"
        first = self.pair.bed.machines[0]
        witness.make(first, vm, witness.OWN, ballast_mib=_BALLAST_MIB)
        try:
            self._begun(first, vm)
            yield vm
        finally:
            for one in self.pair.bed.machines:
                witness.forget(one, vm, witness.OWN)

    def _do(self, run: Run, vm: str) -> dict[str, Any]:
        first, second = self.pair.bed.machines
        source, target = (second, first) if second.virsh("domstate", vm, check=False) else (first, second)
        options, moment = _options(run)
        case = Case(self.pair, vm, source, target, run.fault, run.phase, options)
        # What is sent while it runs would take long to come to its end.
        quick = "--live" in options and run.phase is not Phase.PERFORM
        self.pair.bed.limit(_QUICK_RATE if quick else _RATE)
        hold = Hold(run.phase, source, target, vm)
        with TemporaryFile("w+") as words:
            process = self._vmctl("-c", source.name, "migrate", vm, "--to", target.name, *options, file=words)
            strike = Strike(run.fault, source, target, vm, process, run.random)
            try:
                entered = hold.enter(lambda: process.poll() is not None, moment)
                seen = phases.job_phase(source, vm) if source.up else ""
                struck = entered and strike.now()
                at = time.monotonic()
                pause(run.random.uniform(0, 0.3))
            finally:
                hold.release()
            self._unlimited()
            code = _end(process)
            took = time.monotonic() - at
            strike.mend()
            self._unlimited()
            words.seek(0)
            text = words.read()
        verdict = judge.judge(case, code, text, plain=run.random.random() < 0.3)
        if not struck and verdict.outcome != "failed":
            verdict.outcome = "missed"
        record = {
            "number": run.number,
            "fault": run.fault,
            "phase": run.phase,
            "outcome": verdict.outcome,
            "problems": verdict.problems,
            "options": options,
            "moment_s": round(moment, 2),
            "libvirt": seen,
            "done": strike.told,
            "way": f"{source.name} -> {target.name}",
            "code": code,
            "told": (text.strip().splitlines() or [""])[-2:],
            "took_s": round(took, 1),
            "crashed": verdict.crashed,
            "attempts": verdict.attempts,
            "recovery_s": verdict.recovery_s,
        }
        if verdict.outcome == "failed":
            record |= {"said": text, "then": verdict.said}
            self._anew()
        elif verdict.outcome == "torn":
            self._restart(vm)
        return record

    def _restart(self, vm: str) -> None:
        """The same guest, from its boot."""
        for one in self.pair.bed.machines:
            if one.virsh("domstate", vm, check=False):
                one.virsh("reset", vm)
                self._begun(one, vm)

    def _vmctl(self, *words: str, file: Any) -> subprocess.Popen[str]:
        """Its words go to a file: SSH clients that outlive it would keep a pipe open."""
        options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "cwd": REPO, "env": self.pair.env}
        return subprocess.Popen([*VMCTL, *words], text=True, start_new_session=True, **options)

    def _unlimited(self) -> None:
        for one in self.pair.bed.machines:
            if one.up:
                one.limit(None)

    def _anew(self) -> None:
        """After what went wrong: hosts and guest as at the beginning."""
        for one in self.pair.bed.machines:
            one.lose_power()
        for one in self.pair.bed.machines:
            for path in (one.folder / "etc-libvirt/qemu").glob("[wd]-*.xml*"):
                path.unlink()
            for path in (one.folder / "disk/images").glob("d-*"):
                path.unlink()
            one.boot()
        for one in self.pair.bed.machines:
            one.wait_until_up()
        first = self.pair.bed.machines[0]
        witness.make(first, self.vm, witness.SHARED)
        self._begun(first, self.vm)


def _options(run: Run) -> tuple[tuple[str, ...], float]:
    """How vmctl is to migrate, and the moment in the phase."""
    random, options = run.random, ["--stall-timeout", "5"]
    if run.random.random() < 0.3 if run.direct is None else run.direct:
        options.append("--direct")
    if run.phase is Phase.POSTCOPY:
        return (*options, "--postcopy", "--no-auto-converge", "--timeout", "1"), random.uniform(0, 1.0)
    if run.phase is Phase.DISKS:
        return (*options, "--copy-storage", "full"), random.uniform(0, 2.5)
    if random.random() < 0.3:
        options.append("--live")
    return tuple(options), random.uniform(0, 2.0)


def _end(process: subprocess.Popen[str]) -> int | None:
    """vmctl's exit code; None when it does not come to its end, and is killed."""
    try:
        return process.wait(_HANG_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None
