"""Runs the bare-metal probe guest straight under QEMU and tells what came of it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vmctl.errors import reason
from vmctl.resources import baremetal_guest
from vmctl.spec import Accel

TIMEOUT_S = 3.0
_EXIT_STATUS = (0x31 << 1) | 1  # what isa-debug-exit makes of the guest's last word; a triple fault ends with 0
_PROOFS = ("ud", "pf", "cpl3")
# The fastest way to a PVH guest, 30 ms to its first word; then what QEMUs built without it have.
_MACHINES = ("microvm", "q35")


class End(StrEnum):
    """How the QEMU process ended."""

    DONE = "done"
    TIMEOUT = "timeout"
    EXIT = "exit"
    NOT_STARTED = "not started"


@dataclass(frozen=True, slots=True)
class ProbeRun:
    """One run: how it ended, what the guest said, and QEMU's own last words."""

    end: End
    status: int
    lines: tuple[str, ...]
    complaint: str

    @property
    def nops_cycles(self) -> int | None:
        """Cycles that 1000 NOPs took at the least; None when the guest did not get that far."""
        for line in self.lines:
            if match := re.fullmatch(r"nops_1000_cycles (\d+)", line):
                return int(match[1])
        return None

    @property
    def missing(self) -> tuple[str, ...]:
        """Proofs that were not given."""
        return tuple(proof for proof in _PROOFS if f"{proof} ok" not in self.lines)

    @property
    def stopped(self) -> bool:
        """Whether KVM gave the guest up. QEMU then lives on with the guest stopped, which is no hang."""
        return "internal error" in self.complaint

    @property
    def complete(self) -> bool:
        """Whether the guest came to its end, with the exit status only it can cause."""
        return self.end is End.DONE and "done" in self.lines


def command(qemu: Path, accel: Accel, guest: Path, machine: str = _MACHINES[0]) -> list[str]:
    """QEMU's command line.

    A plain CPU model, for a kernel that interprets its guests cannot give all of the host's.
    """
    board = ["-M", machine, "-accel", accel, "-cpu", "kvm64" if accel is Accel.KVM else "max", "-m", "32M"]
    devices = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    leave = ["-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    return [str(qemu), *board, *devices, *leave, "-kernel", str(guest)]


def lines_of(said: bytes) -> tuple[str, ...]:
    """The probe guest's words, by lines."""
    return tuple(line.strip() for line in said.decode("ascii", "replace").splitlines() if line.strip())


def run(qemu: Path, accel: Accel, *, guest: Path | None = None, timeout_s: float = TIMEOUT_S) -> ProbeRun:
    """Run the probe guest (or another) under ``accel``; the process is gone when this returns, however it ends."""
    found = ProbeRun(End.NOT_STARTED, -1, (), "no machine type to run it on")
    for machine in _MACHINES:
        found = _run(command(qemu, accel, guest or baremetal_guest("probe"), machine), timeout_s)
        if "unsupported machine type" not in found.complaint:
            break
    return found


def _run(argv: list[str], timeout_s: float) -> ProbeRun:
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except OSError as error:
        return ProbeRun(End.NOT_STARTED, -1, (), reason(error))
    with process:
        try:
            out, err = process.communicate(timeout=timeout_s)
            end = End.DONE if process.returncode == _EXIT_STATUS else End.EXIT
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            end = End.TIMEOUT
        except BaseException:
            process.kill()
            raise
    words = [line for line in err.decode(errors="replace").splitlines() if line.strip() and "warning:" not in line]
    return ProbeRun(end, process.returncode, lines_of(out), words[0].strip() if words else "")
