"""Measures what an I/O costs: fio in guests with disks of every kind, and on the host as the ceiling.

A round is one look at every row: a fresh guest (or as many as the disks need), in it one row after the other. A row
that QEMU will not have, or whose driver the guest lacks, is skipped with that reason; one that ends its guest is told,
and a new guest goes on with the next.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmctl.bench import fio, machine, registers, setups, store
from vmctl.bench.disk_files import Files
from vmctl.bench.fio import Figure
from vmctl.bench.ground import Window, prepared, storage_of
from vmctl.bench.machine import Board, Guest, Refused
from vmctl.bench.measured import Gathering, Measured, Sample
from vmctl.bench.result import Head
from vmctl.bench.setups import Backend, Device, Setup
from vmctl.bench.wire import Declined, Gone
from vmctl.choices import Accel, AccelChoice
from vmctl.errors import GuestCommandFailed, WaitTimeout, reason
from vmctl.events import Progress, Reporter, Step, Warned
from vmctl.hosts import Host

METHOD = 1  # counted up when a figure would mean something else
_SLACK_S = 120.0  # for a row, beside its jobs: an overloaded machine is slow to start fio
_COUNTED_IOS = 500
BEGINS = "fio begins"  # what the guest then says on its console
_FIND = r"""
for turn in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    found=0
    for disk in /sys/block/*; do
        for file in serial device/serial device/vpd_pg80; do
            [ -r $disk/$file ] || continue
            serial=$(tr -cd 'a-z0-9' < $disk/$file 2>/dev/null)
            case $serial in row*) echo none > $disk/queue/scheduler 2>/dev/null; found=$((found + 1))
                eval "name_$found=\"${disk##*/} $serial\"";; esac
            break
        done
    done
    [ $found -ge WANTED ] && break
    sleep 0.2
done
while [ $found -gt 0 ]; do eval "echo \$name_$found"; found=$((found - 1)); done
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, in how many rounds, and how long each job runs. ``size`` of a disk in bytes."""

    setups: tuple[Setup, ...]
    rounds: int = 5
    length_ms: int = 300
    size: int = 64 << 20


def plan(rows: tuple[Setup, ...], *, quick: bool, rounds: int | None, length_ms: int | None, size_mib: int) -> Plan:
    """What to do for what was asked."""
    usual = Plan(rows, 1, 200) if quick else Plan(rows)
    return replace(usual, rounds=rounds or usual.rounds, length_ms=length_ms or usual.length_ms, size=size_mib << 20)


def run(host: Host, wanted: Plan, choice: AccelChoice, folder: Path | None, report: Reporter) -> Measured:
    """Measure, and keep the result after each row. Raises as ground.prepared does."""
    own = {"method": METHOD, "length_ms": wanted.length_ms, "size_mib": wanted.size >> 20}
    with prepared(host, "io", choice, folder, own, report) as (board, head, place):
        head = head.with_environment(storage=storage_of(board.folder))
        return _Measuring(board, wanted, report, head, place).all()


class _Measuring:
    """One measurement on its way."""

    def __init__(self, board: Board, wanted: Plan, report: Reporter, head: Head, place: Path) -> None:
        self._board, self._plan, self._report = board, wanted, report
        self._head, self._place = head, place
        self._files = Files(board.folder, wanted.size)
        self._found = Gathering({setup.name: setup.to_json() for setup in wanted.setups})
        self._numbered = list(enumerate(wanted.setups, 1))
        self._done = 0

    def all(self) -> Measured:
        """Every round, then what is counted."""
        for number in range(1, self._plan.rounds + 1):
            left = [one for one in self._numbered if not self._found.over(one[1].name)]
            self._round(number, [one for one in left if one[1].device is not Device.HOST])
            for _, setup in left:
                if setup.device is Device.HOST:
                    self._on_host(number, setup)
            self._done = number * len(self._numbered)
            self._tell()
        self._count()
        return self._keep(complete=True)

    def _round(self, number: int, left: Sequence[tuple[int, Setup]]) -> None:
        """One look at each row, in as many guests as it takes."""
        waiting = list(left)
        while waiting:
            group = setups.in_guests(waiting)[0]
            looked = self._guest(number, group)
            over = {n for n, setup in group if n in looked or self._found.over(setup.name)}
            waiting = [one for one in waiting if one[0] not in over]

    @contextmanager
    def _booted(
        self, board: Board, group: Sequence[tuple[int, Setup]], more: Sequence[str] = (), *, doorbells: bool = True
    ) -> Iterator[tuple[Guest, dict[int, str]] | None]:
        """A guest with the disks of these rows, and by row which disk it is; None where QEMU would not have one."""
        words, owners, ide = list(more), dict[str, Setup](), 0
        for slot, (n, setup) in enumerate(group):
            files = self._files.of(f"disk{slot}", setup)
            own = setups.arguments(n, setup, files, self._plan.size, ide=ide, doorbells=doorbells)
            ide += setup.device is Device.IDE
            owners |= dict.fromkeys(own, setup)
            words += own
        try:
            with machine.running(board, words) as guest:
                yield guest, self._disks(guest, group)
        except Refused as refused:
            argument, why = refused.of(words)
            if argument not in owners:
                raise
            self._found.skipped[owners[argument].name] = why
            self._report(Step(f"{owners[argument].name}: skipped: {why}"))
            yield None

    def _guest(self, number: int, group: Sequence[tuple[int, Setup]]) -> set[int]:
        """The rows of these that were looked at."""
        looked: set[int] = set()
        with self._booted(self._board, group) as booted:
            if booted is None:
                return looked
            guest, disks = booted
            for n, setup in group:
                if n not in disks:
                    continue
                looked.add(n)
                try:
                    self._row(number, guest, setup, f"/dev/{disks[n]}")
                except (Gone, WaitTimeout) as error:
                    self._fail(setup, error.message)
                    break
                except GuestCommandFailed as error:
                    self._fail(setup, "; ".join([error.message, *error.evidence[:2]]))
                self._done += 1
                self._tell()
                self._keep(complete=False)
        return looked

    def _fail(self, setup: Setup, why: str) -> None:
        self._found.failed[setup.name] = why
        self._report(Step(f"{setup.name}: {why}; going on with the next"))

    def _disks(self, guest: Guest, group: Sequence[tuple[int, Setup]]) -> dict[int, str]:
        """By row, the name of its disk in the guest; rows without a driver are skipped."""
        wanted = {setup.device for _, setup in group}
        missing = set()
        for device in sorted(wanted):
            modules = setups.DRIVERS[device]
            said = guest.run(
                f"for m in {' '.join(modules)}; do modprobe $m || echo $m; done", timeout_s=_SLACK_S
            ).split()
            if said:
                missing.add(device)
                for _, setup in group:
                    if setup.device is device:
                        self._found.skipped[setup.name] = f"the guest's kernel has no driver {', '.join(said)}"
        count = sum(setup.device not in missing for _, setup in group)
        self._head = self._head.with_environment(**guest.facts())
        found: dict[int, str] = {}
        for line in guest.run(_FIND.replace("WANTED", str(count)), timeout_s=_SLACK_S).splitlines():
            disk, serial = line.split()
            found[int(serial.removeprefix("row"))] = disk
        for n, setup in group:
            if n not in found and not self._found.over(setup.name):
                self._found.skipped[setup.name] = "no such disk came up in the guest"
        return found

    def _row(self, number: int, guest: Guest, setup: Setup, disk: str) -> None:
        text = fio.job_file(disk, length_ms=self._plan.length_ms, seed=number, direct=True, marks=machine.MARKS)
        window = Window(guest.clock)
        limit_s = len(fio.JOBS) * self._plan.length_ms / 1000 + _SLACK_S
        figures = fio.read(guest.run(_fio_script(text), timeout_s=limit_s, marked=window.hear))
        for job, figure in figures.items():
            self._take(setup, number, job, figure, window.host_side(job, figure.ios))

    def _take(self, setup: Setup, number: int, name: str, figure: Figure, more: dict[str, float]) -> None:
        job = fio.BY_NAME[name]
        sample = Sample(number, round(figure.value, 1), {**figure.details, **more})
        self._found.take(setup.name, name, job.unit, job.better, sample)

    def _on_host(self, number: int, setup: Setup) -> None:
        """The same jobs by a process of the host, on a file of its own."""
        program = shutil.which("fio")
        if program is None:
            self._found.skipped[setup.name] = "fio is not on this host: apt-get install fio"
            return
        (path,) = self._files.of("host", setup)
        jobs = self._board.folder / "jobs"
        direct = setup.cache is setups.Cache.NONE
        jobs.write_text(fio.job_file(str(path), length_ms=self._plan.length_ms, seed=number, direct=direct))
        try:
            done = subprocess.run(
                [*machine.DYING_WITH_US, program, "--output-format=json", str(jobs)],
                capture_output=True, text=True, timeout=_SLACK_S, check=True, cwd=self._board.folder,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            figures = fio.read(done.stdout)
        except subprocess.CalledProcessError as error:
            self._found.skipped[setup.name] = f"fio on the host: {(error.stderr or error.stdout).strip()[:200]}"
            return
        except (GuestCommandFailed, subprocess.TimeoutExpired) as error:
            self._fail(setup, f"fio on the host: {error}")
            return
        for job, figure in figures.items():
            own = {"host_cpu_ns_per_io": figure.details["process_cpu_ns_per_io"]}
            self._take(setup, number, job, figure, own)

    def _count(self) -> None:
        """Register accesses of each device, in a guest of its own; on null, for what is behind makes no difference."""
        waiting = [
            (n, setup)
            for n, setup in self._numbered
            if setup.backend is Backend.NULL and not setup.iothread and not self._found.over(setup.name)
        ]
        self._report(Step("counting register accesses"))
        log = self._board.folder / "trace"
        board, more = replace(self._board, accel=Accel.TCG), registers.arguments(log)
        try:
            while waiting:
                group = setups.in_guests(waiting)[0]
                with self._booted(board, group, more, doorbells=False) as booted:
                    if booted:  # fio is read from the guest's disk before anything is counted
                        booted[0].run("fio --version", timeout_s=_SLACK_S)
                    for n, setup in group if booted else ():
                        waiting.remove((n, setup))
                        if booted and n in booted[1]:
                            self._found.counted[setup.name] = self._counted(booted[0], setup, booted[1][n], log)
                waiting = [one for one in waiting if not self._found.over(one[1].name)]
        except (Declined, Gone, GuestCommandFailed, Refused, WaitTimeout, OSError) as error:
            self._report(Warned(f"register accesses were not counted: {reason(error)}"))

    def _counted(self, guest: Guest, setup: Setup, disk: str, log: Path) -> dict[str, Any]:
        script = _fio_script(fio.counted_file(f"/dev/{disk}", _COUNTED_IOS))
        begin = log.stat().st_size if log.exists() else 0
        registers.watch(guest, on=True)
        guest.run(script, timeout_s=_SLACK_S)
        registers.watch(guest, on=False)
        with log.open(errors="replace") as lines:
            lines.seek(begin)
            return registers.count(lines, setup.device, _COUNTED_IOS).to_json()

    def _tell(self) -> None:
        self._report(Progress("io", self._done, self._plan.rounds * len(self._numbered), "rows"))

    def _keep(self, *, complete: bool) -> Measured:
        result = Measured(replace(self._head, complete=complete), self._found.rows())
        store.write(self._place, result.to_json())
        return result


def _fio_script(jobs: str) -> str:
    """Run fio in the guest, and print what it found or why not."""
    return (
        f"echo {BEGINS} > /dev/console; cd /tmp && cat > jobs <<'END_OF_JOBS' "
        f"&& fio --output-format=json --output=found jobs > said 2>&1 "
        f"&& cat found || {{ cat said found >&2; exit 1; }}\n{jobs}END_OF_JOBS\n"
    )
