"""Which accelerator really works here, and the evidence.

/dev/kvm may exist, be open to us, make VMs, be advertised by libvirt, and still run no guest: on CI runners, in
containers, in clouds whose kernels interpret their guests. So the last word is a guest that ran at native speed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from vmctl import kvm_device
from vmctl.accel_probe import End, ProbeRun
from vmctl.accel_probe import run as run_probe
from vmctl.errors import Unsupported, VmctlError
from vmctl.kvm_device import DEVICE, GROUP
from vmctl.resources import baremetal_guest
from vmctl.spec import Accel, AccelChoice

# 1000 NOPs: some 250 to 1000 cycles on any CPU of the last twenty years, 1.4 million and more where the kernel
# interprets. The middle of that wide gap, so that neither frequency nor a busy neighbour can cross it.
NATIVE_NOPS_CYCLES = 20_000
_TCG_PATIENCE = 3.0  # a translated guest takes two to three times as long to boot, by NixOS's and our own figures


class Verdict(StrEnum):
    """What KVM is worth here."""

    WORKS = "works"
    INTERPRETED = "interpreted"
    HANGS = "hangs"
    FAILS = "fails"
    PERMISSION = "permission"
    BUSY = "busy"
    ABSENT = "absent"


_MODULES = Path("/sys/module")
# Verdicts that hold until something in the cache's key changes. The others may pass by themselves.
LASTING = {Verdict.WORKS, Verdict.INTERPRETED, Verdict.PERMISSION, Verdict.ABSENT}


@dataclass(frozen=True, slots=True)
class Check:
    """One piece of evidence. ``result`` is ok, warning, failed or skipped; ``mend`` what would change a bad one."""

    name: str
    result: str
    detail: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class KvmFindings:
    """The verdict on KVM with all its evidence."""

    verdict: Verdict
    evidence: tuple[Check, ...]

    @property
    def mend(self) -> str:
        """What to do about the first check that failed; without one, about the first that warned."""
        for result in ("failed", "warning"):
            for check in self.evidence:
                if check.result == result and check.mend:
                    return check.mend
        return ""

    @property
    def only_we_are_refused(self) -> bool:
        """Whether QEMU's own user may open the device, and only we may not, whom guests do not run as."""
        results = {check.name: check.result for check in self.evidence}
        return (results.get("open-qemu-user"), results.get("open-self")) == ("ok", "failed")


@dataclass(frozen=True, slots=True)
class Decision:
    """Which accelerator to use, what was asked, and why."""

    chosen: Accel
    requested: AccelChoice
    reason: str
    mend: str
    kvm: KvmFindings

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form."""
        evidence = [asdict(check) for check in self.kvm.evidence]
        return {
            "chosen": self.chosen.value,
            "requested": self.requested.value,
            "reason": self.reason,
            "mend": self.mend,
            "kvm": {"verdict": self.kvm.verdict.value, "evidence": evidence},
        }


@dataclass(frozen=True, slots=True)
class Observations:
    """What was seen, before any judgement. An errno of 0 means it went well; None means it was not tried."""

    flag: str
    device_there: bool
    device_text: str
    qemu_user: str | None
    open_by_qemu: int | None
    open_by_us: int | None
    create_vm: int | None
    probe: ProbeRun | None


def timeout_scale(accel: Accel) -> float:
    """By how much to lengthen waits for guests under ``accel``."""
    return _TCG_PATIENCE if accel is Accel.TCG else 1.0


def joined(here: KvmFindings, probed: KvmFindings) -> KvmFindings:
    """What was seen here, up to a refusal that guests do not meet, with a probe by the user they run as. Pure."""
    seen = tuple(replace(check, result="warning") if check.name == "open-self" else check for check in here.evidence)
    return KvmFindings(probed.verdict, (*seen, *(check for check in probed.evidence if check.name != "device")))


def not_examined(why: str) -> KvmFindings:
    """Findings where KVM could not be examined: unproven counts as not there."""
    return KvmFindings(Verdict.ABSENT, (Check("device", "skipped", why),))


def _error(number: int) -> str:
    return f"{errno.errorcode.get(number, number)} ({os.strerror(number)})"


def _flag_check(seen: Observations) -> Check:
    if seen.flag:
        return Check("cpu-flags", "ok", f"the CPU has {seen.flag}")
    return Check(
        "cpu-flags",
        "warning",
        "no vmx or svm in /proc/cpuinfo",
        "switch on VT-x/AMD-V in the firmware, or, inside a VM, nested virtualization on the host below",
    )


def _open_checks(seen: Observations) -> list[Check]:
    checks = []
    user = seen.qemu_user or "our own user"
    for name, who, result in (("open-qemu-user", user, seen.open_by_qemu), ("open-self", "we", seen.open_by_us)):
        if name == "open-qemu-user" and result is None:
            checks.append(Check(name, "skipped", "QEMU runs as we do"))
        elif result == 0:
            checks.append(Check(name, "ok", f"{who} can open {DEVICE} ({seen.device_text})"))
        else:
            mend = f"chgrp {GROUP} {DEVICE} && chmod 660 {DEVICE} (vmctl doctor --fix does it)"
            if name == "open-self":
                mend = f"usermod -aG {GROUP} $USER, then log in again; if the device is not of group {GROUP}: {mend}"
            checks.append(
                Check(name, "failed", f"{who} cannot open it ({seen.device_text}): {_error(result or 0)}", mend)
            )
    return checks


def probe_check(probe: ProbeRun) -> tuple[Verdict, Check]:
    """What a run of the probe guest proves. Pure."""
    name = "guest-probe"
    cycles = probe.nops_cycles
    if cycles is not None and cycles > NATIVE_NOPS_CYCLES:
        numbers = f"1000 NOPs took {cycles:,} cycles, native is below {NATIVE_NOPS_CYCLES:,}"
        detail = f"{numbers}: the kernel interprets its guests"
        return Verdict.INTERPRETED, Check(
            name, "failed", detail, "nothing inside this machine helps; the host below must offer nested virtualization"
        )
    if probe.complete and not probe.missing and cycles is not None:
        return Verdict.WORKS, Check(
            name, "ok", f"a guest ran: 1000 NOPs in {cycles:,} cycles, #UD, #PF and CPL 3 as they should be"
        )
    said = probe.lines[-1] if probe.lines else "nothing"
    if probe.end is End.TIMEOUT and not probe.stopped:
        return Verdict.HANGS, Check(
            name,
            "failed",
            f"the guest did not end in time; its last words: {said}",
            "see the kernel log of this host: dmesg",
        )
    missing = ", ".join(probe.missing) or "none"
    how = "KVM gave the guest up" if probe.stopped else f"QEMU ended with {probe.status}"
    detail = f"{how}; proofs missing: {missing}; last words: {said}"
    if probe.complaint:
        detail += f"; QEMU: {probe.complaint}"
    return Verdict.FAILS, Check(name, "failed", detail, "see the kernel log of this host: dmesg")


def judge(seen: Observations) -> KvmFindings:
    """The findings that follow from what was seen. Pure."""
    checks = [_flag_check(seen)]
    if not seen.device_there:
        mend = "modprobe kvm_intel or kvm_amd; in a container: pass /dev/kvm into it"
        checks.append(Check("device", "failed", f"{seen.device_text}", mend))
        return KvmFindings(Verdict.ABSENT, tuple(checks))
    checks.append(Check("device", "ok", seen.device_text))
    opens = _open_checks(seen)
    checks += opens
    refused = [code for code in (seen.open_by_qemu, seen.open_by_us) if code]
    if refused:
        gone = all(code in {errno.ENOENT, errno.ENODEV, errno.ENXIO} for code in refused)
        return KvmFindings(Verdict.ABSENT if gone else Verdict.PERMISSION, tuple(checks))
    if seen.create_vm:
        busy = seen.create_vm == errno.EBUSY
        mend = "stop the other hypervisor that holds VT-x/AMD-V (VirtualBox, VMware)" if busy else "see dmesg"
        checks.append(Check("create-vm", "failed", f"KVM_CREATE_VM: {_error(seen.create_vm)}", mend))
        return KvmFindings(Verdict.BUSY if busy else Verdict.FAILS, tuple(checks))
    checks.append(Check("create-vm", "ok", "KVM_CREATE_VM succeeds, which by itself proves little"))
    if seen.probe is None:
        checks.append(Check("guest-probe", "skipped", "not run"))
        return KvmFindings(Verdict.FAILS, tuple(checks))
    verdict, check = probe_check(seen.probe)
    return KvmFindings(verdict, (*checks, check))


_WHY = {
    Verdict.WORKS: "KVM runs guests at native speed",
    Verdict.INTERPRETED: "this kernel's KVM interprets its guests, at a thousandth of native speed",
    Verdict.HANGS: "a guest under KVM hangs",
    Verdict.FAILS: "a guest under KVM fails",
    Verdict.PERMISSION: "KVM is there, but may not be opened",
    Verdict.BUSY: "another hypervisor holds the CPU's virtualization",
    Verdict.ABSENT: "there is no KVM here",
}


def choose(requested: AccelChoice, findings: KvmFindings) -> Decision:
    """The accelerator to use. Raises Unsupported when KVM is required but not proven, or asked for and not there."""
    why, verdict = _WHY[findings.verdict], findings.verdict
    if requested is AccelChoice.TCG:
        return Decision(Accel.TCG, requested, "asked for", "", findings)
    if verdict is Verdict.WORKS:
        return Decision(Accel.KVM, requested, why, "", findings)
    impossible = verdict in {Verdict.ABSENT, Verdict.PERMISSION, Verdict.BUSY}
    if requested is AccelChoice.REQUIRE_KVM or (requested is AccelChoice.KVM and impossible):
        raise Unsupported(
            f"cannot use KVM: {why} ({verdict})", hint=findings.mend or "vmctl host info shows the evidence"
        )
    chosen = Accel.KVM if requested is AccelChoice.KVM else Accel.TCG
    return Decision(chosen, requested, why, findings.mend, findings)


# Effects below: look at the machine, remember what was found.


def observe(*, qemu_user: str | None, qemu_binary: Path, device: Path = DEVICE) -> Observations:
    """Look, each step only where the one before went well."""
    there, text = kvm_device.device_text(device)
    by_qemu = kvm_device.open_as_qemu(qemu_user, device) if there and qemu_user is not None else None
    by_us = kvm_device.open_errno(device) if there else None
    create = kvm_device.create_vm(device) if by_us == 0 and not by_qemu else None
    probe = run_probe(qemu_binary, Accel.KVM) if create == 0 else None
    return Observations(kvm_device.cpu_flag(), there, text, qemu_user, by_qemu, by_us, create, probe)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _cache_key(qemu_user: str | None, qemu_binary: Path, device: Path) -> str:
    """A digest of all that could change the findings."""
    cpu = [line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith(("microcode", "model name"))]
    nested = [_read(path) for path in sorted(_MODULES.glob("kvm*/parameters/nested"))]
    modules = sorted(path.name for path in _MODULES.glob("kvm*"))
    uname = os.uname()
    try:
        info, qemu = device.stat(), qemu_binary.stat()
        files: list[int] = [info.st_rdev, info.st_uid, info.st_gid, info.st_mode, qemu.st_mtime_ns, qemu.st_size]
    except OSError:
        files = []
    guest = baremetal_guest("probe")
    probe = hashlib.sha256(guest.read_bytes()).hexdigest() if guest.exists() else ""
    who = [os.geteuid(), sorted(os.getgroups()), qemu_user]
    parts = [uname.release, uname.version, cpu[:2], nested, modules, str(qemu_binary), str(device), files, probe, who]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load(path: Path, key: str) -> KvmFindings | None:
    """Findings that were stored under the same key; None when there are none."""
    try:
        kept = json.loads(path.read_text())
        if kept["key"] != key:
            return None
        return KvmFindings(Verdict(kept["verdict"]), tuple(Check(**check) for check in kept["evidence"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or not ours, or of another version: found out anew


def store(path: Path, key: str, findings: KvmFindings) -> None:
    """Keep findings under a key that changes with whatever could change them."""
    kept = {"key": key, "verdict": findings.verdict, "evidence": [asdict(check) for check in findings.evidence]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".accel-")
        with os.fdopen(handle, "w") as file:
            json.dump(kept, file)
        Path(name).replace(path)
    except OSError:
        return  # a cache that cannot be written costs time, nothing else


def examine(
    *,
    qemu_user: str | None,
    qemu_binary: Path,
    cache_dir: Path,
    device: Path = DEVICE,
    refresh: bool = False,
) -> KvmFindings:
    """What KVM is worth here, from the cache where nothing that matters has changed.

    ``qemu_user`` is the user QEMU will run as, None for our own. Raises VmctlError when the probe guest is missing.
    """
    if not baremetal_guest("probe").exists():
        raise VmctlError(
            "cannot examine KVM: the probe guest was not compiled", hint="install the package again; it needs gcc"
        )
    key = _cache_key(qemu_user, qemu_binary, device)
    # A file for each QEMU user: system and session connections take turns on one machine.
    path = cache_dir / f"accel-{qemu_user or 'self'}.json"
    if not refresh and (kept := load(path, key)):
        return kept
    findings = judge(observe(qemu_user=qemu_user, qemu_binary=qemu_binary, device=device))
    if findings.verdict in LASTING:
        store(path, key, findings)
    return findings


def capability_trap(*, qemu_user: str | None, device: Path = DEVICE) -> Check:
    """Whether libvirt will probe QEMU anew at each start.

    libvirtd, as root, probes QEMU with KVM; then it finds that QEMU's own user cannot open the device, calls its
    capability cache invalid, and probes again, at every start: 55 to 68 s measured against 0.4 s.
    """
    name = "capability-cache"
    there, text = kvm_device.device_text(device)
    if not there:
        return Check(name, "ok", f"{text}: libvirt does not probe QEMU with KVM")
    if qemu_user is None:
        return Check(name, "ok", "QEMU runs as we do: libvirt's cache stays valid")
    if qemu_user == "root" or kvm_device.open_as_qemu(qemu_user, device) == 0:
        return Check(name, "ok", f"{qemu_user} can open {device}: libvirt's cache of QEMU's capabilities stays valid")
    return Check(
        name,
        "failed",
        f"root can open {device} and QEMU's user {qemu_user} cannot ({text}): libvirt takes its cache of QEMU's "
        "capabilities for invalid and probes QEMU again at each start, about a minute each time",
        f"vmctl doctor --fix, or as root: chgrp {GROUP} {device} && chmod 660 {device}",
    )
