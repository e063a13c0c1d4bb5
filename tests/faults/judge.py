"""What a run came to: whether the VM is whole, in one place, where vmctl said, and nothing else is left of it."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, field

from tests.faults import witness
from tests.faults.phases import Phase
from tests.faults.strikes import Fault, running_qemus
from tests.hosts import Machine
from tests.system.migrating import Pair
from vmctl.wait import pause

_RECOVERY_S = 120.0
_VERIFY_S = 20.0
_BEFORE_IT_RUNS_THERE = {Phase.BEGIN, Phase.PREPARE, Phase.PERFORM, Phase.DISKS, Phase.DONE, Phase.FINISH}
_RUNS_THERE = {Phase.FINISH, Phase.CONFIRM}
_NEVER_BEGAN = "CMD_PACKAGED: Buffer receive fail"
_LOSS = ("on neither host", "memory is gone", "is lost")


def may_be_lost(fault: Fault, phase: Phase) -> bool:
    """Whether the fault takes away memory that was in no other place."""
    if fault in {Fault.SOURCE_QEMU, Fault.SOURCE_POWER}:
        return phase in _BEFORE_IT_RUNS_THERE or phase is Phase.POSTCOPY
    if fault in {Fault.TARGET_QEMU, Fault.TARGET_POWER}:
        return phase in _RUNS_THERE or phase is Phase.POSTCOPY
    # libvirt 9.0, begun anew, may end a VM that it finds on its way in, also where that runs already.
    return fault in {Fault.MEMORY, Fault.TARGET_LIBVIRTD} and phase is Phase.POSTCOPY


@dataclass
class Verdict:
    """``outcome``: kept, lost (as it had to be, and as it was told), torn, or failed, for what ``problems`` say.

    torn: sent while it ran, it has pages of different moments. QEMU does that to emulated guests, with no fault and no
    vmctl as well, which is why vmctl holds them; who resumes the wrong copy has a memory that is older than its disk.
    """

    outcome: str = "kept"
    problems: list[str] = field(default_factory=list)
    attempts: int = 0
    crashed: list[str] = field(default_factory=list)
    recovery_s: float = 0.0
    said: list[str] = field(default_factory=list)

    def bad(self, what: str) -> None:
        self.outcome = "failed"
        self.problems.append(what)


@dataclass(frozen=True)
class Case:
    """What was done."""

    pair: Pair
    vm: str
    source: Machine
    target: Machine
    fault: Fault
    phase: Phase
    options: tuple[str, ...]

    def states(self) -> dict[str, str]:
        """What virsh says of the VM on each host, with the reason."""
        found = {}
        for one in (self.source, self.target):
            state = " ".join(one.virsh("domstate", self.vm, "--reason", check=False).split())
            if state:
                found[one.name] = state
        return found

    def may_be_lost(self) -> bool:
        """Whether the fault took memory that was in no other place, or that QEMU gives to nobody any more."""
        if may_be_lost(self.fault, self.phase):
            return True
        # With the link went the state of the devices, on its way behind what still lay in the socket. The target's
        # QEMU, which has not run the guest, ends; the source's, which has all of its memory, runs no guest any more
        # that it began to send by post-copy ("Migration is not finalized yet").
        if self.fault is not Fault.CUT or self.phase is not Phase.POSTCOPY:
            return False
        return _NEVER_BEGAN in _last_run((self.target.folder / f"log/qemu/{self.vm}.log").read_text())


def _last_run(log: str) -> str:
    """What libvirt's log of a VM tells of its last QEMU."""
    return log.rpartition(": starting up libvirt version")[2]


def judge(case: Case, code: int | None, text: str, *, plain: bool) -> Verdict:
    """All is mended: what did vmctl say, is it so, and is the job finished by another run of it?"""
    verdict = Verdict()
    revive(case, verdict)
    if code is None:
        verdict.bad("vmctl hung")
    elif "Traceback" in text:
        verdict.bad("a traceback")
    elif case.fault is not Fault.VMCTL_KILLED:
        _as_told(case, code, text, verdict)
    lost = any(word in text for word in _LOSS)
    moved = _recovered(case, verdict, plain=plain)
    lost = lost or any(word in one for one in verdict.said for word in _LOSS)
    if not moved or "running" not in case.states().get(case.target.name, ""):
        if case.may_be_lost() and lost:
            verdict.outcome = "lost" if verdict.outcome == "kept" else verdict.outcome
            _begin_anew(case, verdict)
        else:
            verdict.bad(f"it is not on {case.target.name} after all: {case.states()}" + (" (told)" if lost else ""))
            return verdict
    _whole(case, verdict)
    _nothing_left(case, verdict)
    return verdict


def _as_told(case: Case, code: int, text: str, verdict: Verdict) -> None:
    """What vmctl said is how it is, as far as it knew."""
    if code not in {0, 3, 11, 12, 130}:
        verdict.bad(f"exit code {code}")
    if f"{case.vm} runs on {case.source.name} as before" in text:
        states = case.states()
        if "running" not in states.get(case.source.name, ""):
            verdict.bad(f"said to run on {case.source.name}: {states}")
    if code == 0:
        states = case.states()
        if "running" not in states.get(case.target.name, "") and case.fault not in {
            Fault.TARGET_QEMU,
            Fault.TARGET_POWER,
        }:
            verdict.bad(f"said to have moved: {states}")


def _recovered(case: Case, verdict: Verdict, *, plain: bool) -> bool:
    """Finish the job as a user would: a plain second run, or --recover, until it says that it is done."""
    words = ["-c", case.source.name, "migrate", case.vm, "--to", case.target.name]
    words += [word for word in case.options if word in {"--copy-storage", "full", "--direct"}]
    began = time.monotonic()
    while True:
        verdict.attempts += 1
        more = [] if plain and verdict.attempts == 1 else ["--recover"]
        try:
            done = case.pair.vmctl(*words, *more, check=None, timeout=240)
        except subprocess.TimeoutExpired:
            verdict.bad("vmctl hung in recovery")
            return False
        verdict.recovery_s = round(time.monotonic() - began, 1)
        verdict.said.append(f"[{done.returncode}] {done.stdout}{done.stderr}".strip())
        if "Traceback" in done.stderr:
            verdict.bad("a traceback in recovery")
        if done.returncode == 0:
            return True
        lost = case.may_be_lost() and any(word in done.stderr for word in _LOSS)
        if (lost and verdict.attempts > 1) or time.monotonic() - began > _RECOVERY_S:
            return False
        revive(case, verdict)
        pause(0.5)


def revive(case: Case, verdict: Verdict) -> None:
    """A libvirtd that crashed by itself, as 9.0 may when a QEMU ends at a bad moment, is begun as systemd would."""
    for one in (case.source, case.target):
        if not one.run("pgrep", "-x", "libvirtd", check=False).stdout:
            verdict.crashed.append(one.name)
            one.start("libvirtd")


def _begin_anew(case: Case, verdict: Verdict) -> None:
    """It is lost, and said to be: it is stopped where something is left of it, and started."""
    for one in (case.target, case.source):
        state = one.virsh("domstate", case.vm, check=False)
        if state and state != "shut off":
            case.pair.vmctl("-c", one.name, "stop", case.vm, "--force", check=None)
    there = [one for one in (case.target, case.source) if one.virsh("domstate", case.vm, check=False)]
    if not there:
        verdict.bad("no host has a definition of it")
        return
    done = case.pair.vmctl("-c", there[0].name, "start", case.vm, check=None)
    if done.returncode:
        verdict.bad(f"cannot be started anew: {done.stderr.strip()}")
    elif len(there) > 1:  # it runs on the target now, and what the source knows of it is taken away
        words = ["-c", case.source.name, "migrate", case.vm, "--to", case.target.name, "--recover"]
        done = case.pair.vmctl(*words, check=None)
        verdict.said.append(f"[{done.returncode}] {done.stdout}{done.stderr}".strip())


def home(case: Case) -> Machine | None:
    """The host on which it runs."""
    for one in (case.target, case.source):
        if one.virsh("domstate", case.vm, check=False) == "running":
            return one
    return None


def _whole(case: Case, verdict: Verdict) -> None:
    """It goes on, over all of its memory and disk once more, and finds both as it wrote them."""
    machine = home(case)
    if machine is None:
        verdict.bad(f"it runs nowhere: {case.states()}")
        return
    first, until = None, time.monotonic() + _VERIFY_S
    while time.monotonic() < until:
        now = witness.said(machine, case.vm)
        if now is not None and now.wrong:
            if now.torn and {"--live", "--postcopy"} & set(case.options) and not verdict.problems:
                verdict.outcome = "torn"
                verdict.problems.append(now.wrong)
            else:
                verdict.bad(now.wrong)
            return
        first = first or now
        if (
            first is not None
            and now is not None
            and now.passes >= first.passes + 2
            and now.sectors > first.sectors + 32
        ):
            return
        pause(0.2)
    verdict.bad(f"it does not go on: {first}, then {now}")


def _nothing_left(case: Case, verdict: Verdict) -> None:
    """One QEMU, one definition, no half made files, no pools of ours."""
    qemus = {one.name: running_qemus(one) for one in (case.source, case.target)}
    mine = [name for name, vms in qemus.items() for vm in vms if case.vm in vm]
    if len(mine) != 1:
        verdict.bad(f"QEMU runs it on {mine}")
    states = case.states()
    if len(states) != 1:
        verdict.bad(f"defined on both: {states}")
    for one in (case.source, case.target):
        for folder in (witness.SHARED, witness.OWN):
            names = one.run("find", folder, "-name", "vmctl-token*", "-o", "-name", "*.migrating").stdout.split()
            if names:
                verdict.bad(f"left on {one.name}: {names}")
        pools = [name for name in one.virsh("pool-list", "--all", "--name").split() if "look" in name]
        if pools:
            verdict.bad(f"pools left on {one.name}: {pools}")
    if case.phase is Phase.DISKS:
        name = f"{case.vm}.img"
        both = [one.name for one in (case.source, case.target) if (one.folder / "disk/images" / name).exists()]
        if len(both) != 1:
            verdict.bad(f"its disk is on {both}")
