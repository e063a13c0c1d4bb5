"""KVM of a host that is not this machine, by the same guest: a transient domain there, heard over its console."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from vmctl import bare_guest
from vmctl.accel import LASTING, NATIVE_NOPS_CYCLES, Check, KvmFindings, Verdict, load, probe_check, store
from vmctl.accel_probe import End, ProbeRun, lines_of
from vmctl.errors import VmctlError
from vmctl.hypervisor import capabilities
from vmctl.hypervisor.connection import Connection
from vmctl.render import ProbeView
from vmctl.resources import baremetal_guest

# libvirt offers no machine without firmware, and a kernel that interprets its guests takes 3 s for that alone.
_TIMEOUT_S = 30.0
_DAY_S = 86400.0
_PREFIX = "vmctl-probe"


def examine(
    conn: Connection, *, pool: str, pool_xml: Callable[[], str], cache_dir: Path, refresh: bool = False
) -> KvmFindings:
    """What KVM is worth there; from the cache for a day, unless the host's capabilities or the probe have changed.

    ``pool`` takes the guest while it runs, and is made by ``pool_xml`` where it is not there yet.
    """
    guest = baremetal_guest("probe")
    if not guest.exists():
        raise VmctlError(
            "cannot examine KVM: the probe guest was not compiled", hint="install the package again; it needs gcc"
        )
    path, data = _place(conn, cache_dir), guest.read_bytes()
    if not refresh and (kept := _kept(conn, path, data)):
        return kept
    findings = judge(capabilities.host_facts(conn).domain_types, lambda: _run(conn, data, pool, pool_xml))
    if findings.verdict in LASTING:
        store(path, _key(conn, data), findings)
    return findings


def known(conn: Connection, *, cache_dir: Path) -> KvmFindings | None:
    """What KVM is worth there, as far as that is known without a guest; None where it takes one to find out."""
    guest = baremetal_guest("probe")
    if guest.exists() and (kept := _kept(conn, _place(conn, cache_dir), guest.read_bytes())):
        return kept
    offered = capabilities.host_facts(conn).domain_types
    return None if "kvm" in offered else _absent()


def _place(conn: Connection, cache_dir: Path) -> Path:
    return cache_dir / f"accel-at-{hashlib.sha256(conn.uri.encode()).hexdigest()[:16]}.json"


def _kept(conn: Connection, path: Path, guest: bytes) -> KvmFindings | None:
    return load(path, _key(conn, guest)) if _fresh(path) else None


def _absent() -> KvmFindings:
    mend = "on that host: modprobe kvm_intel or kvm_amd; `vmctl host info` there says more"
    return KvmFindings(Verdict.ABSENT, (Check("device", "failed", "libvirt there offers no KVM", mend),))


def judge(offered: tuple[str, ...], run: Callable[[], ProbeRun]) -> KvmFindings:
    """The findings that follow from what libvirt offers there and from the run, made only where it offers KVM."""
    if "kvm" not in offered:
        return _absent()
    device = Check("device", "ok", "libvirt there offers KVM, which by itself proves little")
    try:
        verdict, check = probe_check(run())
    except VmctlError as error:
        mend = error.hint or "`vmctl host info` on that host says more"
        return KvmFindings(Verdict.FAILS, (device, Check("guest-probe", "failed", error.message, mend)))
    return KvmFindings(verdict, (device, check))


def _key(conn: Connection, guest: bytes) -> str:
    """A digest of what could change the findings, as far as it can be seen from here: not the kernel, hence the day."""
    parts = [capabilities.text(conn), hashlib.sha256(guest).hexdigest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _fresh(path: Path) -> bool:
    try:
        return 0 <= time.time() - path.stat().st_mtime < _DAY_S
    except OSError:
        return False


def _enough(said: bytes) -> bool:
    """Whether no further word could change the verdict."""
    whole = lines_of(said[: said.rfind(b"\n") + 1])
    cycles = ProbeRun(End.TIMEOUT, -1, whole, "").nops_cycles
    return "done" in whole or (cycles is not None and cycles > NATIVE_NOPS_CYCLES)


def _run(conn: Connection, guest: bytes, pool: str, pool_xml: Callable[[], str]) -> ProbeRun:
    name = f"{_PREFIX}-{secrets.token_hex(6)}"
    facts = capabilities.host_facts(conn)
    with bare_guest.uploaded(conn, pool, pool_xml, name, guest) as path:
        view = ProbeView(name, "kvm", "kvm64", str(facts.emulator), path)
        heard = bare_guest.hear(conn, view, until=_enough, timeout_s=_TIMEOUT_S)
    lines = lines_of(heard.said)
    if heard.timed_out:
        return ProbeRun(End.TIMEOUT, -1, lines, "")
    # Without isa-debug-exit, which libvirt does not know, its last word is its end.
    return ProbeRun(End.EXIT if heard.stopped else End.DONE, 0, lines, "KVM internal error" if heard.stopped else "")
