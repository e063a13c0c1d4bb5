"""What Popek and Goldberg's theorems and properties come to on a machine, from what was measured. Pure.

Their theorems give conditions that suffice. Where one is not fulfilled, a VMM of that kind is not ruled out: it must do
more than the theorem's, and what it fails to do shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmctl.bench.popek_words import Reach, Work
from vmctl.bench.sensitive import BY_NAME, INSTRUCTIONS, Finding, Kind, Origin, Try, finding, told

NATIVE_RATIO = 2.0  # of cycles in the guest to those in a process: a CPU that runs the guest itself stays far below

_NOT_ALL = "nothing speaks against it, but some instructions ended the guest: what else they do is not known"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One instruction on one accelerator: its tries, and what they show without UMIP and with it ("" without one)."""

    name: str
    kernel: Try
    user: Try
    umip: Try | None
    finding: str
    finding_umip: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What one accelerator's guests showed.

    ``work`` was done at CPL 0, ``work_user`` at CPL 3. ``instructions`` are those of it, counted; 0: not counted.
    """

    accelerator: str
    interpreted: bool
    cpu: str
    hypervisor: str
    umip: bool
    nested: bool
    outcomes: tuple[Outcome, ...]
    work: Work | None
    work_user: Work | None
    native_digest: int
    native_ticks: int
    instructions: int
    reach: Reach | None
    ended_in_s: float | None  # a guest that would never have given its CPU back


@dataclass(frozen=True, slots=True)
class Statement:
    """One theorem's condition, or a property: whether it is fulfilled, why, and the evidence line by line.

    ``holds`` is yes, no, unknown, or, of efficiency, "in user mode".
    """

    title: str
    holds: str
    why: str
    evidence: tuple[str, ...] = ()


def outcome(name: str, tries: dict[str, Try], skipped: str, failed: str) -> Outcome:
    """What was seen of an instruction, judged."""
    kernel, user, umip = tries.get("kernel", Try()), tries.get("user", Try()), tries.get("umip")
    if skipped:
        return Outcome(name, kernel, user, umip, Finding.ABSENT, "", skipped)
    if failed:
        return Outcome(name, kernel, user, umip, Finding.FAILED, "", failed)
    known = BY_NAME[name]
    with_umip = str(finding(known, kernel, umip)) if umip else ""
    return Outcome(name, kernel, user, umip, finding(known, kernel, user), with_umip)


def silent(machine: Machine, *, umip: bool, user_only: bool = False) -> list[str]:
    """Mnemonics of the instructions that are sensitive and do not trap."""
    return [
        BY_NAME[one.name].mnemonic
        for one in machine.outcomes
        if (one.finding_umip if umip else one.finding) in {Finding.SILENT, Finding.FOREIGN}
        and (BY_NAME[one.name].user or not user_only)
        and one.name != "rdtsc_tsd"  # the same instruction as rdtsc, differently set up
    ]


def statements(machine: Machine) -> tuple[Statement, ...]:
    """The three theorems, then the three properties, for one machine."""
    return (
        _first(machine),
        _second(machine),
        _third(machine),
        _efficiency(machine),
        _equivalence(machine),
        _control(machine),
    )


def _sets(machine: Machine, *, user_only: bool) -> tuple[list[str], list[str]]:
    evidence, without = [], silent(machine, umip=False, user_only=user_only)
    evidence.append(f"without a trap, UMIP off: {', '.join(without) or 'none'}")
    if machine.umip:
        with_umip = silent(machine, umip=True, user_only=user_only)
        evidence.append(f"without a trap, UMIP on: {', '.join(with_umip) or 'none'}")
    if unknown := _ended(machine):
        evidence.append(f"not known, for they ended the guest: {', '.join(unknown)}")
    return without, evidence


def _ended(machine: Machine) -> list[str]:
    """Mnemonics of the instructions that ended the guest: of these, nothing is known."""
    return [BY_NAME[one.name].mnemonic for one in machine.outcomes if one.finding == Finding.FAILED]


def _first(machine: Machine) -> Statement:
    found, evidence = _sets(machine, user_only=False)
    tried = [one for one in machine.outcomes if one.finding not in {Finding.ABSENT, Finding.FAILED}]
    designed = [one.finding for one in tried if BY_NAME[one.name].origin is Origin.PRIVILEGED]
    if designed:
        trapped = designed.count(Finding.PRIVILEGED)
        evidence.append(f"{trapped} of {len(designed)} instructions that are privileged by design do trap")
    title = "theorem 1, that a VMM by trap and emulate can be built: is every sensitive instruction privileged?"
    if not any(one.finding in set(Finding) - {Finding.FAILED, Finding.ABSENT} for one in machine.outcomes):
        return Statement(title, "unknown", "no instruction could be tried", tuple(evidence))
    if not found and _ended(machine):
        return Statement(title, "unknown", _NOT_ALL, tuple(evidence))
    if not found:
        return Statement(title, "yes", "every sensitive instruction traps in user mode", tuple(evidence))
    why = f"{len(found)} sensitive instructions do not trap in user mode, where a guest's kernel would have to run"
    return Statement(title, "no", f"{why}. {_answer(machine)}", tuple(evidence))


def _answer(machine: Machine) -> str:
    if machine.accelerator == "tcg":
        return "TCG needs no trap: it runs no guest instruction as it is, all are translated first"
    if _native(machine, machine.work):
        return (
            "VT-x and AMD-V need none: they give the guest such registers of its own, and what it reads is the guest's"
        )
    if _native(machine, machine.work_user):
        return "This KVM interprets the guest's kernel and lets the CPU run its user code: the hybrid VMM of theorem 3"
    return "This KVM needs no trap: it runs no guest instruction, it interprets them"


def _native(machine: Machine, work: Work | None) -> bool:
    """Whether that work went as fast as in a process."""
    return bool(work and machine.native_ticks and work.ticks <= NATIVE_RATIO * machine.native_ticks)


def _second(machine: Machine) -> Statement:
    title = "theorem 2, that the machine can be virtualized within itself: theorem 1, and does no timing show?"
    clocks = [name for name in silent(machine, umip=False) if name.startswith("RDTSC")]
    evidence = [f"CPUID in the guest offers hardware virtualization: {'yes' if machine.nested else 'no'}"]
    if clocks:
        evidence.append(f"read the time without a trap: {', '.join(clocks)}")
    tsd = next((one for one in machine.outcomes if one.name == "rdtsc_tsd"), None)
    if tsd and tsd.finding == Finding.PRIVILEGED:
        evidence.append("with CR4.TSD the kernel makes RDTSC trap: then it does not show")
    if not machine.outcomes:
        return Statement(title, "unknown", "no instruction could be tried", tuple(evidence))
    if silent(machine, umip=False):
        why = "theorem 1's condition is not fulfilled" + ("; and time shows" if clocks else "")
        way = "; nesting works here by offering the hardware's help again" if machine.nested else ""
        return Statement(title, "no", why + way, tuple(evidence))
    if _ended(machine):
        return Statement(title, "unknown", _NOT_ALL, tuple(evidence))
    return Statement(title, "yes", "theorem 1's condition is fulfilled, and time does not show", tuple(evidence))


def _third(machine: Machine) -> Statement:
    title = "theorem 3, that a hybrid VMM can be built: is all that is sensitive in user mode privileged?"
    found, evidence = _sets(machine, user_only=True)
    if not machine.outcomes:
        return Statement(title, "unknown", "no instruction could be tried", tuple(evidence))
    if not found and _ended(machine):
        return Statement(title, "unknown", _NOT_ALL, tuple(evidence))
    if not found:
        return Statement(title, "yes", "every instruction that is sensitive in user mode traps there", tuple(evidence))
    why = f"{len(found)} instructions are sensitive in user mode and do not trap"
    if machine.accelerator == "kvm" and _native(machine, machine.work_user) and not _native(machine, machine.work):
        why += "; it is done here all the same, and the price shows under equivalence"
    return Statement(title, "no", why, tuple(evidence))


def _efficiency(machine: Machine) -> Statement:
    title = "efficiency: are innocuous instructions run by the CPU itself?"
    if machine.work is None or not machine.native_ticks:
        return Statement(title, "unknown", "the workload did not come to its end")
    ratio = machine.work.ticks / machine.native_ticks
    evidence = [f"{machine.native_ticks:,} cycles in a process, {_cycles(machine, machine.work)} in the guest's kernel"]
    if machine.work_user:
        evidence.append(f"{_cycles(machine, machine.work_user)} in the guest's user mode")
    if machine.instructions:
        stops = machine.work.interventions
        share = 100 * (1 - stops / (machine.instructions + stops))
        evidence.append(
            f"it has {machine.instructions:,} instructions (counted by QEMU's icount); with {stops} sensitive ones put "
            f"among them, {share:.4f} % need no intervention"
        )
    if machine.accelerator == "tcg":
        why = f"{ratio:.1f} times as long as natively: all are translated, none is run as it is"
        return Statement(title, "no", why, tuple(evidence))
    if _native(machine, machine.work):
        return Statement(title, "yes", f"{ratio:.2f} times as long as natively", tuple(evidence))
    if _native(machine, machine.work_user):
        return Statement(title, "in user mode", "the guest's kernel is interpreted", tuple(evidence))
    return Statement(title, "no", f"{ratio:.1f} times as long as natively: all are interpreted", tuple(evidence))


def _cycles(machine: Machine, work: Work) -> str:
    return f"{work.ticks:,} ({work.ticks / machine.native_ticks:.2f} times)"


def _equivalence(machine: Machine) -> Statement:
    title = "equivalence: does a program do in the guest what it does on the host?"
    if machine.work is None or not machine.native_ticks:
        return Statement(title, "unknown", "the workload did not come to its end")
    digests = {work.digest for work in (machine.work, machine.work_user) if work}
    shown = ", ".join(f"{digest:x}" for digest in sorted(digests))
    evidence = [f"digest of all results: {shown} in the guest, {machine.native_digest:x} in a process"]
    foreign = [one for one in machine.outcomes if one.finding == Finding.FOREIGN]
    for one in foreign:
        shows = BY_NAME[one.name].shows
        cpu = told(one.kernel if shows is None else Try(value=shows))
        evidence.append(f"{BY_NAME[one.name].mnemonic} at CPL 3 shows {told(one.user)}, a CPU {cpu}")
    lax = [BY_NAME[one.name].mnemonic for one in machine.outcomes if _must_trap(one) and one.finding == Finding.SILENT]
    if lax:
        evidence.append(f"do not trap though a CPU does: {', '.join(lax)}")
    if ended := _ended(machine):
        evidence.append(f"end the guest, and no program on a CPU: {', '.join(ended)}")
    if digests != {machine.native_digest}:
        return Statement(title, "no", "the results differ", tuple(evidence))
    if foreign or lax:
        why = "innocuous work has the same results; through silent instructions something else than the guest shows"
        return Statement(title, "no", why, tuple(evidence))
    if ended:
        return Statement(title, "unknown", _NOT_ALL, tuple(evidence))
    return Statement(title, "yes", "the same results, timing excepted, as the definition has it", tuple(evidence))


def _must_trap(one: Outcome) -> bool:
    return one.name == "rdtsc_tsd" or BY_NAME[one.name].origin is Origin.PRIVILEGED


def _control(machine: Machine) -> Statement:
    title = "resource control: has the guest what it was given and no more?"
    evidence, good = [], []
    if machine.reach:
        reach = machine.reach
        good.append(not reach.answered and not reach.kept)
        kept = f"{reach.answered} answered and {reach.kept} kept what was written"
        evidence.append(f"of {reach.looked} places beyond its memory, {kept}")
    if machine.ended_in_s is not None:
        good.append(True)
        evidence.append(
            f"a guest that forbade interrupts and looped for ever was ended by the host in {machine.ended_in_s:.2f} s"
        )
    if len(good) < 2 and all(good):  # one that got what is not its own has it, whatever else could be tried
        return Statement(title, "unknown", "not all of it could be tried", tuple(evidence))
    holds = all(good)
    why = (
        "neither memory beyond its own nor the CPU could be taken" if holds else "something beyond its memory answered"
    )
    return Statement(title, "yes" if holds else "no", why, tuple(evidence))


def lines(machine: Machine) -> list[list[str]]:
    """The table of one machine: mnemonic, CPL 0, CPL 3, CPL 3 with UMIP, finding, why."""
    rows = []
    for one in machine.outcomes:
        known = BY_NAME[one.name]
        verdict = one.finding + (f"; UMIP: {one.finding_umip}" if one.finding_umip not in {"", one.finding} else "")
        rows.append([known.mnemonic, told(one.kernel), told(one.user), told(one.umip), verdict, one.note or known.why])
    return rows


def names(wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """All instructions, or those wanted, in the guest's order."""
    return tuple(one.name for one in INSTRUCTIONS if not wanted or one.name in wanted)


def proves_itself(machine: Machine) -> list[str]:
    """Instructions whose tries contradict the list, the method or both; none in a sound run."""
    return [
        one.name
        for one in machine.outcomes
        if one.finding in {Finding.UNPROVED, Finding.FAULTY}
        or (BY_NAME[one.name].kind is Kind.NONE and one.finding not in {Finding.INNOCUOUS, Finding.FAILED})
    ]
