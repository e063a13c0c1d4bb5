"""Under what conditions was measured: all that is known to move such figures, captured before the first of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmctl.accel import Decision
from vmctl.hosts import Host
from vmctl.hypervisor import connection

_CPU = Path("/sys/devices/system/cpu")


def capture(host: Host, decision: Decision) -> dict[str, Any]:
    """What is known of the host. What only the host itself can tell is there for this machine only, else ""."""
    versions = connection.versions(host.conn)
    found: dict[str, Any] = {
        "host": host.conn.host,
        "uri": host.conn.uri,
        "libvirt": versions.libvirt,
        "qemu": versions.hypervisor,
        "emulator": str(host.facts.emulator),
        "cpus": host.facts.cpus,
        "cpu_model": host.facts.cpu_model,
        "memory_mib": host.facts.memory_mib,
        "accel": decision.to_json(),
        "pinning": "none",
    }
    return found | (_of_this_machine() if host.conn.local else {})


def _of_this_machine() -> dict[str, Any]:
    cpu = _text(Path("/proc/cpuinfo"))
    return {
        "kernel": " ".join(os.uname()[i] for i in (0, 2, 3)),
        "cpu": _first(r"^model name\s*: (.*)$", cpu),
        "microcode": _first(r"^microcode\s*: (.*)$", cpu),
        "itself_a_guest": bool(re.search(r"^flags\s*:.*\bhypervisor\b", cpu, re.MULTILINE)),
        "nested": {path.parts[-3]: _text(path) for path in Path("/sys/module").glob("kvm_*/parameters/nested")},
        "mitigations": {path.name: _text(path) for path in sorted((_CPU / "vulnerabilities").glob("*"))},
        "frequency_governor": _text(_CPU / "cpu0/cpufreq/scaling_governor"),
        "transparent_hugepages": _chosen(_text(Path("/sys/kernel/mm/transparent_hugepage/enabled"))),
        "load": load(),
    }


def load() -> list[float]:
    """Load of this machine: processes that run or want to, over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match[1].strip() if match else ""


def _chosen(text: str) -> str:
    return _first(r"\[(\w+)\]", text)


class Waiting:
    """How long a vCPU waited for a CPU of the host, by stretches between two looks, laid to the rows heard in them.

    A stretch in which several rows ended counts for each of them: rather one flagged too many than one too few.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: tuple[float, float] | None = None  # when, and how long it had waited until then
        self._stretches: dict[str, list[tuple[float, float]]] = {}
        self._latest: tuple[float, float] | None = None

    def look(self, waited_s: float | None) -> None:
        """Take a reading."""
        now = self._clock()
        self._latest = None
        if waited_s is None:
            return
        if self._last:
            self._latest = (now - self._last[0], waited_s - self._last[1])
        self._last = (now, waited_s)

    def during(self, rows: set[str]) -> None:
        """Since the reading before the last one, these rows were at work."""
        if self._latest:
            for row in rows:
                self._stretches.setdefault(row, []).append(self._latest)

    def percent(self, row: str) -> float | None:
        """Of the time that the row was at work; None where the host tells nothing."""
        stretches = self._stretches.get(row, [])
        length = sum(took for took, _ in stretches)
        # Its two clocks are not read in one moment: of a short stretch, more than all may seem to have been waited.
        return round(min(100.0, 100 * sum(waited for _, waited in stretches) / length), 1) if length else None
