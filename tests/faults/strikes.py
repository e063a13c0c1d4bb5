"""What breaks: each fault, and how it is mended."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from random import Random

from tests.faults.phases import Phase, root
from tests.hosts import Machine
from tests.hosts.machine import CommandFailed, sh

_GROUPS = Path("/run/vmctl-memory-groups")
_LEAST = 1 << 20


class Fault(StrEnum):
    """What breaks."""

    VMCTL_KILLED = "vmctl killed"
    VMCTL_INTERRUPTED = "Ctrl-C"
    SOURCE_LIBVIRTD = "source's libvirtd killed"
    TARGET_LIBVIRTD = "target's libvirtd killed"
    TARGET_LIBVIRTD_STOPPED = "target's libvirtd stopped"
    SOURCE_QEMU = "source's QEMU killed"
    TARGET_QEMU = "target's QEMU killed"
    TARGET_QEMU_STOPPED = "target's QEMU stopped"
    CUT_SHORT = "link cut for 2 s"
    CUT = "link cut"
    SOURCE_POWER = "source without power"
    TARGET_POWER = "target without power"
    DISK_FULL = "target's disk full"
    MEMORY = "target's memory exhausted"


_P = Phase
_HELD = (_P.BEGIN, _P.PREPARE, _P.PERFORM, _P.DONE, _P.FINISH, _P.CONFIRM, _P.POSTCOPY)
_TARGETS = (_P.PERFORM, _P.DONE, _P.FINISH, _P.CONFIRM, _P.POSTCOPY)
PHASES: dict[Fault, tuple[Phase, ...]] = {
    Fault.VMCTL_KILLED: tuple(Phase),
    Fault.VMCTL_INTERRUPTED: tuple(Phase),
    Fault.SOURCE_LIBVIRTD: tuple(Phase),
    Fault.TARGET_LIBVIRTD: tuple(Phase),
    Fault.TARGET_LIBVIRTD_STOPPED: (_P.PERFORM, _P.FINISH),
    Fault.SOURCE_QEMU: (*(one for one in _HELD if one is not _P.CONFIRM), _P.DISKS),  # then it has ended already
    Fault.TARGET_QEMU: (*_TARGETS, _P.DISKS),
    Fault.TARGET_QEMU_STOPPED: (_P.PERFORM, _P.DONE, _P.FINISH, _P.POSTCOPY),
    Fault.CUT_SHORT: tuple(Phase),
    Fault.CUT: _HELD,
    Fault.SOURCE_POWER: _HELD,
    Fault.TARGET_POWER: _HELD,
    Fault.DISK_FULL: (_P.DISKS,),
    Fault.MEMORY: (_P.PERFORM, _P.POSTCOPY),  # later it has all of its memory
}
# What waits for a connection to be given up takes a minute: not as often.
SLOW = {Fault.TARGET_LIBVIRTD_STOPPED, Fault.TARGET_QEMU_STOPPED, Fault.CUT, Fault.SOURCE_POWER, Fault.TARGET_POWER}


@dataclass
class Strike:
    """One fault, done to one migration. ``told`` says what exactly was done."""

    fault: Fault
    source: Machine
    target: Machine
    vm: str
    vmctl: subprocess.Popen[str]
    random: Random
    told: str = ""
    _mends: list[Callable[[], object]] = field(default_factory=list)
    _timers: list[threading.Timer] = field(default_factory=list)

    def now(self) -> bool:
        """Let it happen; False where there was nothing any more that it could happen to."""
        try:
            self._now()
        except CommandFailed:
            return False
        return True

    def _now(self) -> None:
        fault, source, target = self.fault, self.source, self.target
        if fault is Fault.VMCTL_KILLED:
            self.vmctl.kill()
        elif fault is Fault.VMCTL_INTERRUPTED:
            # To all that it started, as a terminal and `timeout` do.
            os.killpg(self.vmctl.pid, self.random.choice([signal.SIGINT, signal.SIGTERM]))
        elif fault in {Fault.SOURCE_LIBVIRTD, Fault.TARGET_LIBVIRTD}:
            self._kill_libvirtd(source if fault is Fault.SOURCE_LIBVIRTD else target)
        elif fault is Fault.TARGET_LIBVIRTD_STOPPED:
            target.kill("libvirtd", signal.SIGSTOP)
            self._mends.append(lambda: target.kill("libvirtd", signal.SIGCONT))
        elif fault is Fault.SOURCE_QEMU:
            source.kill(f"qemu:{self.vm}")
        elif fault is Fault.TARGET_QEMU:
            target.kill(f"qemu:{self.vm}")
        elif fault is Fault.TARGET_QEMU_STOPPED:
            pid = target.pid_of(f"qemu:{self.vm}")
            target.run("kill", "-STOP", pid)
            self._mends.append(lambda: target.run("kill", "-CONT", pid, check=False))
        elif fault in {Fault.CUT, Fault.CUT_SHORT}:
            self._cut()
        elif fault in {Fault.SOURCE_POWER, Fault.TARGET_POWER}:
            self._lose_power(source if fault is Fault.SOURCE_POWER else target)
        elif fault is Fault.DISK_FULL:
            self._fill()
        else:
            self._exhaust()

    def _kill_libvirtd(self, machine: Machine) -> None:
        machine.kill("libvirtd")
        if self.random.random() < 0.85:
            after = self.random.uniform(0.2, 2)
            self.told = f"it is back after {after:.1f} s"
            self._later(after, lambda: machine.start("libvirtd"))
        else:
            self.told = "it is back when vmctl has ended"
            self._mends.append(lambda: machine.start("libvirtd"))

    def _cut(self) -> None:
        which = self.random.choice(["between", "source", "target"])
        if which == "between":
            self.told = "between the hosts"
            self.source.cut_from(self.target)
            mend: Callable[[], object] = lambda: self.source.mend_from(self.target)  # noqa: E731
        else:
            machine = self.source if which == "source" else self.target
            self.told = f"the {which}'s cable"
            machine.cut()
            mend = machine.mend
        if self.fault is Fault.CUT_SHORT:
            self._later(2, mend)
        else:
            self._mends.append(mend)

    def _lose_power(self, machine: Machine) -> None:
        machine.lose_power()

        def boot() -> None:
            machine.boot()
            machine.wait_until_up()

        self._mends.append(boot)

    def _fill(self) -> None:
        disk = self.target.folder / "disk"
        room = os.statvfs(disk)
        used = (room.f_blocks - room.f_bfree) * room.f_frsize
        self.target.resize_disk(str(used + _LEAST // 4))
        self._mends.append(lambda: self.target.resize_disk("2G"))

    def _exhaust(self) -> None:
        """Put the target's QEMU into a group that may have no more memory: the kernel ends it for that."""
        if not _GROUPS.is_mount():
            _GROUPS.mkdir(exist_ok=True)
            sh("mount", "-t", "cgroup", "-o", "memory", "cgroup", str(_GROUPS))
        group = _GROUPS / f"vmctl-faults-{os.getpid()}"
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(_LEAST))
        pid = self.target.pid_of(f"qemu:{self.vm}")
        # Written from inside the host's process ids.
        inside = ["nsenter", "-t", str(self.target.init), "-p", "sh", "-c"]
        sh(*inside, f"echo {pid} >{group}/cgroup.procs")
        self._mends.append(lambda: _free(group))

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        timer = threading.Timer(seconds, act)
        timer.start()
        self._timers.append(timer)

    def mend(self) -> None:
        """All is as before; what came by itself is waited for."""
        for timer in self._timers:
            timer.join()
        for act in self._mends:
            act()
        self._mends.clear()


def _free(group: Path) -> None:
    """Whoever is still in it may have memory again; the group goes."""
    with suppress(OSError):
        (group / "memory.limit_in_bytes").write_text(str(1 << 40))
        for pid in (group / "cgroup.procs").read_text().split():
            (_GROUPS / "cgroup.procs").write_text(pid)
        group.rmdir()


def running_qemus(machine: Machine) -> list[str]:
    """The VMs that have a QEMU on a host, by the processes there are."""
    found = []
    for one in (root(machine) / "proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (one / "cmdline").read_bytes().split(b"\0")
            if b"qemu-system" in words[0]:
                found.append(next((word for word in words if word.startswith(b"guest=")), b"?").decode())
    return found
