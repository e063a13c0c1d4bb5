"""Measures what traps cost: fresh bare-metal guests, one after the other, each with all rows that are left.

A row that ends its guest, or makes it fall silent, is reported; the next guest goes on with the row after it, and later
ones leave it out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from vmctl import __version__, bare_guest
from vmctl.accel import Verdict
from vmctl.bench import environment, guests, store, words
from vmctl.bench.environment import Waiting
from vmctl.bench.result import Guest, Head, RowResult, Run, TrapResult
from vmctl.bench.rows import BASE, BY_NAME, ROWS
from vmctl.bench.words import Said
from vmctl.choices import AccelChoice
from vmctl.errors import GuestCommandFailed, SpecError, Unsupported, VmctlError
from vmctl.events import Progress, Reporter, Step, Warned
from vmctl.hosts import Host, decide_accel
from vmctl.render import ProbeView
from vmctl.spec import Accel

METHOD = 1  # counted up when a row's figure would mean something else
_NAME = "vmctl-bench-trap"
_SILENT_S = 10.0  # a row takes a twentieth of a second, an overloaded machine longer
_TEST_DEVICE = ("-device", "pci-testdev,bus=pcie.0,addr=0x10")


@dataclass(frozen=True, slots=True)
class Plan:
    """How thorough to be: so many guests, and in each so many parts of a row, of so many microseconds each."""

    guests: int = 5
    parts: int = 100
    part_us: int = 500
    rows: tuple[str, ...] = tuple(row.name for row in ROWS)


QUICK = Plan(guests=3, parts=20)


def plan(rows: Sequence[str], *, quick: bool, guests: int | None) -> Plan:
    """What to do for what was asked. The empty loop is always measured: net figures need it. Raises SpecError."""
    unknown = [f"no row is called {name}" for name in rows if name not in BY_NAME]
    if unknown:
        raise SpecError("cannot measure traps", problems=unknown, hint="rows: " + ", ".join(BY_NAME))
    chosen = QUICK if quick else Plan()
    wanted = tuple(name for name in BY_NAME if not rows or name in rows or name == BASE)
    return replace(chosen, rows=wanted, guests=guests or chosen.guests)


@dataclass(slots=True)
class _Rows:
    """What is known of each row so far."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def take(self, said: Said, guest: int, waiting: Waiting) -> None:
        for name, batch in said.batches.items():
            run = Run(guest, batch.calls, batch.ticks, batch.asked_ns, waiting.percent(name))
            self.runs.setdefault(name, []).append(run)
        self.skipped |= said.skipped
        self.failed |= said.wrong

    def results(self, wanted: Sequence[str]) -> tuple[RowResult, ...]:
        return tuple(
            RowResult(name, tuple(self.runs.get(name, ())), self.skipped.get(name, ""), self.failed.get(name, ""))
            for name in wanted
        )


def run(host: Host, wanted: Plan, choice: AccelChoice, report: Reporter, *, guest: Path | None = None) -> TrapResult:
    """Measure, and keep the result after each guest. ``guest`` is another build of the same guest.

    Raises Unsupported where KVM is required and not there, Conflict while another measures on that host,
    GuestCommandFailed when no guest came as far as its first row.
    """
    if not host.conn.qemu:
        raise Unsupported(f"cannot measure traps at {host.conn.uri}: no QEMU guests run there")
    elf = guests.read(guest) if guest else guests.compiled("traps")
    decision = decide_accel(host, choice)
    interpreted = decision.chosen is Accel.KVM and decision.kvm.verdict is Verdict.INTERPRETED
    if decision.chosen is Accel.TCG and decision.requested is not AccelChoice.TCG:
        report(Warned(f"measuring TCG: {decision.reason}", "vmctl host info"))
    if interpreted:
        report(Warned("this KVM interprets its guests: the figures are the interpreter's, not a CPU's"))
    place = store.folder(host.folders.data)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    dimensions = {
        "unit": "TSC cycles per call",
        "method": METHOD,
        "accelerator": str(decision.chosen),
        "interpreted": interpreted,
        "arch": host.facts.arch,
        "vcpus": guests.VCPUS,
        "parts": wanted.parts,
        "part_us": wanted.part_us,
    }
    with guests.on(host, _NAME, elf) as kernel:
        env = environment.capture(host, decision)
        dimensions["host_cpu"] = env.get("cpu") or env["cpu_model"]
        head = Head(store.new_id(place, "trap", made), "trap", made, __version__, False, dimensions, env)
        view = guests.machine(host, _NAME, decision.chosen, decision.kvm, kernel)
        return _Measuring(host, wanted, report, head, place).all(replace(view, arguments=_TEST_DEVICE))


class _Heard(NamedTuple):
    """What one guest said, how it ended, and whether it vanished with words that nobody heard."""

    said: Said
    how: str
    last_words_lost: bool


class _Measuring:
    """One measurement on its way."""

    def __init__(self, host: Host, wanted: Plan, report: Reporter, head: Head, place: Path) -> None:
        self._host, self._plan, self._report = host, wanted, report
        self._head, self._place = head, place
        self._rows = _Rows()
        self._guests: list[Guest] = []
        self._through = 0

    def all(self, view: ProbeView) -> TrapResult:
        """Every guest."""
        for number in range(1, self._plan.guests + 1):
            view = self._round(number, view)
            if number < self._plan.guests:
                self._keep(complete=False)
        return self._keep(complete=True)

    def _round(self, number: int, view: ProbeView) -> ProbeView:
        """One look at every row: one guest, and further ones for each row that ends one. Returns what to start next."""
        left = [row for row in self._plan.rows if row not in {**self._rows.skipped, **self._rows.failed}]
        self._through, slowly = 0, ""
        while left:
            began, waiting = time.monotonic(), Waiting(time.monotonic)
            try:
                heard = self._hear(number, replace(view, words=self._words(left, slowly)), waiting)
            except VmctlError:
                if not view.arguments or self._guests:
                    raise
                view = bare_guest.without_devices(view)  # that QEMU may have none; if it is not that, it fails again
                continue
            said = heard.said
            if heard.last_words_lost and not slowly:
                # Which row it was in is not sure: again from where it was last heard, and with time to be heard.
                left, slowly = self._taken(heard, number, began, waiting, left, sure=False), guests.SLOWLY
                continue
            self._require_begun(heard)
            left, slowly = self._taken(heard, number, began, waiting, left, sure=True), ""
            if said.done:
                break
        return view

    def _taken(
        self, heard: _Heard, number: int, began: float, waiting: Waiting, left: list[str], *, sure: bool
    ) -> list[str]:
        """Take what a guest found out; the rows that are left then. Whatever it was in when it ended is the culprit."""
        said = heard.said
        self._rows.take(said, number, waiting)
        self._guests.append(Guest(number, said.khz, said.clock_source, time.monotonic() - began, heard.how))
        self._head = replace(self._head, dimensions={**self._head.dimensions, **_guest_cpu(said)})
        self._through += said.ended_rows
        if sure and not said.done:
            if not said.begun:
                raise GuestCommandFailed(f"cannot measure traps: the guest {heard.how} between two rows")
            self._rows.failed[said.begun] = said.trapped or f"the guest {heard.how}"
            self._report(Step(f"row {said.begun}: {self._rows.failed[said.begun]}; going on with the next"))
            self._through += 1
        over = {*said.batches, *said.skipped, *said.wrong, *self._rows.failed}
        return [row for row in left if row not in over]

    def _words(self, left: Sequence[str], slowly: str) -> str:
        shape = f"memory={guests.MEMORY_MIB} parts={self._plan.parts} part={self._plan.part_us} {slowly}"
        return f"{shape} rows={','.join(left)}"

    def _hear(self, number: int, view: ProbeView, waiting: Waiting) -> _Heard:
        """What a guest said, and how it ended."""
        listener = _Listener(waiting, lambda ended: self._tell(number, ended))
        ear = guests.Ear(listener.over, _SILENT_S)
        heard = bare_guest.hear(
            self._host.conn,
            view,
            until=ear.enough,
            timeout_s=guests.LONGEST_S,
            waited=waiting.look,
            goodbye=guests.GOODBYE,
        )
        said = words.read(heard.said)
        over = said.done or bool(said.refused)
        lost = heard.gone and not over and not said.trapped
        return _Heard(said, "done" if said.done else ear.how(heard), lost)

    def _tell(self, number: int, ended: int) -> None:
        rows = len(self._plan.rows)
        done = (number - 1) * rows + min(rows, self._through + ended)
        self._report(Progress("traps", done, rows * self._plan.guests, "rows"))

    def _require_begun(self, heard: _Heard) -> None:
        said = heard.said
        if said.refused:
            raise Unsupported(f"cannot measure time here: {said.refused}")
        if not (said.begun or said.ended_rows):
            raise GuestCommandFailed(
                f"cannot measure traps: the guest {heard.how} before its first row",
                evidence=list(said.facts.values()) or ["(nothing)"],
                hint="vmctl host info shows which accelerator works",
            )
        if not said.khz:
            self._report(Warned("the guest found no clock to measure its TSC by: there are cycles, and no ns"))

    def _keep(self, *, complete: bool) -> TrapResult:
        head = replace(self._head, complete=complete)
        result = TrapResult(head, tuple(self._guests), self._rows.results(self._plan.rows))
        store.write(self._place, result.to_json())
        return result


def _guest_cpu(said: Said) -> dict[str, str]:
    return {"guest_cpu": said.facts.get("brand", ""), "hypervisor": said.facts.get("hypervisor", "")}


class _Listener:
    """Hears a guest: tells how far it is, and lays waiting to the rows it fell on."""

    def __init__(self, waiting: Waiting, tell: Callable[[int], None]) -> None:
        self._waiting, self._tell = waiting, tell
        self._ended: set[str] = set()

    def over(self, said: bytes) -> tuple[bool, bool]:
        """Whether the guest is done, and whether it has begun."""
        found = words.read(said)
        ended = {*found.batches, *found.skipped, *found.wrong}
        self._waiting.during(ended - self._ended | ({found.begun} if found.begun else set()))
        if ended != self._ended:
            self._ended = ended
            self._tell(found.ended_rows)
        return found.done or bool(found.refused or found.trapped), found.greeted
