"""Tries Popek and Goldberg's conditions on every accelerator of a host: instructions, a workload, what is out of reach.

An instruction that ends its guest, as a kernel that interprets its guests has them, is told; the next guest goes on
with the one after it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

from vmctl import __version__, bare_guest
from vmctl.accel import Decision, Verdict
from vmctl.bench import environment, guests, popek_words, store, theorems
from vmctl.bench.popek_result import PopekResult
from vmctl.bench.popek_words import Said
from vmctl.bench.result import Head
from vmctl.bench.theorems import Machine, Outcome
from vmctl.choices import AccelChoice
from vmctl.errors import GuestCommandFailed, Unsupported, VmctlError, reason
from vmctl.events import Progress, Reporter, Step, Warned
from vmctl.hosts import Host, decide_accel
from vmctl.render import ProbeView
from vmctl.resources import baremetal_guest
from vmctl.spec import Accel

METHOD = 1
_NAME = "vmctl-bench-popek"
_ROUNDS = 100  # of the workload: some 7 million instructions, which an interpreter gets through in seconds
_SILENT_S = 120.0  # that long may an interpreter on a busy machine be at the workload
_TRY_SILENT_S = 5.0
_SPIN_S = 0.3  # before a guest that never ends is ended
_NATIVE_RUNS = 20
_NATIVE_TIMEOUT_S = 60.0
_COUNTING = ("-icount", "shift=0")  # one tick of the TSC for each instruction


def accelerators(host: Host, choice: AccelChoice) -> tuple[Decision, tuple[Accel, ...]]:
    """What is known of KVM there, and what to try: with ``auto`` every accelerator that runs a guest at all."""
    decision = decide_accel(host, AccelChoice.AUTO if choice is AccelChoice.TCG else choice)
    if choice is AccelChoice.TCG:
        return decision, (Accel.TCG,)
    if choice is not AccelChoice.AUTO:
        return decision, (decision.chosen,)
    runs = decision.kvm.verdict in {Verdict.WORKS, Verdict.INTERPRETED}
    return decision, (Accel.TCG, Accel.KVM) if runs else (Accel.TCG,)


def run(host: Host, choice: AccelChoice, report: Reporter) -> PopekResult:
    """Try everything, and keep the result after each accelerator.

    Raises Unsupported where no QEMU guests run or KVM is required and not there, Conflict while another measures there.
    """
    if not host.conn.qemu:
        raise Unsupported(f"cannot try instructions at {host.conn.uri}: no QEMU guests run there")
    elf = guests.compiled("popek")
    decision, wanted = accelerators(host, choice)
    if Accel.KVM not in wanted and choice is AccelChoice.AUTO:
        report(Warned(f"TCG only: {decision.reason}", "vmctl host info"))
    place, made = store.folder(host.folders.data), datetime.now(UTC).isoformat(timespec="seconds")
    native = _native(report)
    with guests.on(host, _NAME, elf) as kernel:
        env = environment.capture(host, decision)
        interpreted = Accel.KVM in wanted and decision.kvm.verdict is Verdict.INTERPRETED
        dimensions = {
            "method": METHOD,
            "accelerator": ",".join(wanted),
            "interpreted": interpreted,
            "host_cpu": env.get("cpu") or env["cpu_model"],
        }
        name = store.new_id(place, "popek-goldberg", made)
        result = PopekResult(Head(name, "popek-goldberg", made, __version__, False, dimensions, env), ())
        instructions = 0
        for number, accel in enumerate(wanted, 1):
            view = guests.machine(host, _NAME, accel, decision.kvm, kernel)
            if accel is Accel.TCG:
                instructions = _count(host, view)
            found = _Trying(host, view, report).machine(decision, accel, native, instructions)
            done = replace(result.head, complete=number == len(wanted))
            result = PopekResult(done, (*result.machines, found))
            store.write(place, result.to_json())
    return result


def _native(report: Reporter) -> tuple[int, int]:
    """Digest and ticks of the workload in a process here, the quickest of some; zeros where it cannot run."""
    best = (0, 0)
    try:
        for _ in range(_NATIVE_RUNS):
            done = subprocess.run(
                [str(baremetal_guest("process")), str(_ROUNDS)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_NATIVE_TIMEOUT_S,
            )
            digest, ticks = (int(word) for word in done.stdout.split())
            if not best[1] or ticks < best[1]:
                best = (digest, ticks)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        report(Warned(f"the workload cannot run in a process of this machine: {reason(error)}"))
    return best


class _Heard(NamedTuple):
    """What one guest said, how it ended ("" for as it should), and whether it vanished with words that nobody heard."""

    said: Said
    how: str
    last_words_lost: bool


def _hear(
    host: Host, view: ProbeView, over: Callable[[Said], bool], silent_s: float, goodbye: bytes = guests.GOODBYE
) -> _Heard:
    """What a guest said until ``over`` says it is enough, and how it ended."""

    def look(said: bytes) -> tuple[bool, bool]:
        found = popek_words.read(said)
        return over(found) or bool(found.trapped), found.greeted

    ear = guests.Ear(look, silent_s)
    heard = bare_guest.hear(host.conn, view, until=ear.enough, timeout_s=guests.LONGEST_S, goodbye=goodbye)
    said = popek_words.read(heard.said)
    if over(said):
        return _Heard(said, "", False)
    return _Heard(said, ear.how(heard), heard.gone and not said.trapped)


def _count(host: Host, view: ProbeView) -> int:
    """How many instructions the workload has; 0 where that QEMU cannot count them."""
    counting = replace(view, arguments=_COUNTING, vcpus=1, words=f"tries=none rounds={_ROUNDS}")
    try:
        said = _hear(host, counting, lambda found: found.done, _SILENT_S).said
    except VmctlError:
        return 0
    return said.work.ticks if said.work else 0


class _Trying:
    """One accelerator being tried."""

    def __init__(self, host: Host, view: ProbeView, report: Reporter) -> None:
        self._host, self._view, self._report = host, view, report
        self._facts: dict[str, str] = {}

    def machine(self, decision: Decision, accel: Accel, native: tuple[int, int], instructions: int) -> Machine:
        """Everything that can be seen of it."""
        outcomes = self._instructions(str(accel))
        shape = f"memory={guests.MEMORY_MIB}"
        rest, how, _ = self._listen(f"tries=none rounds={_ROUNDS} reach=1 {shape}", lambda said: said.done, _SILENT_S)
        if how:
            self._report(Step(f"{accel}: the guest {how} at the workload"))
        return Machine(
            accelerator=str(accel),
            interpreted=accel is Accel.KVM and decision.kvm.verdict is Verdict.INTERPRETED,
            cpu=self._facts.get("brand", ""),
            hypervisor=self._facts.get("hypervisor", ""),
            umip=self._facts.get("umip") == "1",
            nested="1" in (self._facts.get("vmx"), self._facts.get("svm")),
            outcomes=outcomes,
            work=rest.work,
            work_user=rest.work_user,
            native_digest=native[0],
            native_ticks=native[1],
            instructions=instructions,
            reach=rest.reach,
            ended_in_s=self._ended_in_s(),
        )

    def _listen(self, words: str, over: Callable[[Said], bool], silent_s: float) -> _Heard:
        heard = _hear(self._host, replace(self._view, words=words), over, silent_s)
        self._facts |= heard.said.facts
        return heard

    def _instructions(self, accel: str) -> tuple[Outcome, ...]:
        left, found, slowly = list(theorems.names()), dict[str, Outcome](), ""
        total = len(left)
        while left:
            over = partial(self._tell, accel, total - len(left), total)
            heard = self._listen(f"tries={','.join(left)} {slowly}", over, _TRY_SILENT_S)
            # Of one that vanished it is not sure where it was: again from there, and with time to be heard.
            sure = bool(slowly) or not heard.last_words_lost
            seen = self._judged(accel, heard, sure=sure)
            if sure and not seen:
                raise GuestCommandFailed(
                    f"cannot try instructions under {accel}: the guest {heard.how} before any",
                    evidence=list(heard.said.facts.values()) or ["(nothing)"],
                    hint="vmctl host info shows which accelerator works",
                )
            found |= seen
            left = [name for name in left if name not in found]
            if heard.said.done:
                break
            slowly = "" if sure else guests.SLOWLY
        return tuple(found[name] for name in theorems.names() if name in found)

    def _judged(self, accel: str, heard: _Heard, *, sure: bool) -> dict[str, Outcome]:
        """What a guest found out of each instruction; where it ended is the culprit, if that is sure."""
        said, found = heard.said, {}
        culprit = said.begun if not said.done else ""
        if culprit and sure:
            why = said.trapped or f"the guest {heard.how}"
            self._report(Step(f"{accel}: {culprit}: {why}; going on with the next"))
            found[culprit] = theorems.outcome(culprit, said.tries.get(culprit, {}), "", why)
        for name in {**said.tries, **said.skipped}:
            if name != culprit:
                found[name] = theorems.outcome(name, said.tries.get(name, {}), said.skipped.get(name, ""), "")
        return found

    def _tell(self, accel: str, before: int, total: int, said: Said) -> bool:
        through = before + len(said.tries) + len(said.skipped)
        self._report(Progress(f"instructions under {accel}", through, total, "instructions"))
        return said.done

    def _ended_in_s(self) -> float | None:
        """How long it took to end a guest that forbids interrupts and loops for ever; None: it came to no loop."""
        first: list[float] = []

        def spun(said: Said) -> bool:
            if said.spins and not first:
                first.append(time.monotonic())
            return bool(first) and time.monotonic() - first[0] > _SPIN_S

        view = replace(self._view, words="tries=none spin=1")
        said = _hear(self._host, view, spun, _TRY_SILENT_S, b"").said  # it would not hear a goodbye
        return time.monotonic() - first[0] - _SPIN_S if said.spins and first else None


def sound(machines: Sequence[Machine]) -> list[str]:
    """What contradicts the list, by accelerator; nothing in a sound run."""
    return [f"{one.accelerator}: {name}" for one in machines for name in theorems.proves_itself(one)]
