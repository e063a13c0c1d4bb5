"""The phases of a migration, and how one of them is held open until something has broken in it.

libvirt has no switch for that, but what it does in some places waits for others:

- a hook script is run, and waited for, when the target prepares (`migrate begin`), and when the source has ended its
  QEMU (`stopped end`);
- each new phase is noted in a status file, NAME.xml.new at first: where that is a FIFO, libvirtd waits in open() until
  somebody reads. What it wrote is lost then, which it does not take amiss: the next note says the same.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from tests.hosts import Machine
from vmctl.wait import pause

_HOOK = """#!/bin/sh
# VM OPERATION SUB-OPERATION …: waits as long as the file `hold` has this operation in it.
here=/run/testbed
[ "$(cat $here/hold 2>/dev/null)" = "$2 $3" ] || exit 0
: >$here/held
tries=0
while [ -e $here/hold ] && [ $tries -lt 2400 ]; do
    sleep 0.05
    tries=$((tries + 1))
done
"""


class Phase(StrEnum):
    """When it breaks."""

    LOOKING = "looking"  # vmctl looks at both hosts, and has changed nothing yet
    BEGIN = "begin"  # the source has taken the job
    PREPARE = "prepare"  # the target is told of it, and has not yet begun a QEMU
    PERFORM = "perform"  # memory is on its way
    DISKS = "disks"  # the same, with disks that go along
    DONE = "done"  # all of it is there, and the target has not been told to run it
    FINISH = "finish"  # the target has been told, and does not run it yet
    CONFIRM = "confirm"  # it runs there, and what the source has of it is being taken away
    POSTCOPY = "post-copy"  # it runs there with some of its memory still on the source


def root(machine: Machine) -> Path:
    """The host's own file tree."""
    return Path(f"/proc/{machine.init}/root")


def install(machine: Machine) -> None:
    """Give a host the hook; its libvirtd sees that there is one only when it starts."""
    hook = machine.folder / "etc-libvirt/hooks/qemu"
    hook.write_text(_HOOK)
    hook.chmod(0o755)


def status(machine: Machine, vm: str) -> str:
    """libvirt's own notes of a running VM, "" for none."""
    with suppress(OSError):
        return (root(machine) / f"run/libvirt/qemu/{vm}.xml").read_text()
    return ""


def job_phase(machine: Machine, vm: str) -> str:
    """The phase of its migration as a host has noted it."""
    found = re.search(r"<job type='[^']*' async='migration (?:out|in)' phase='([^']*)'", status(machine, vm))
    return found[1] if found else ""


class Hold:
    """Keeps a migration in its phase from where ``entered`` says so, to ``release``."""

    def __init__(self, phase: Phase, source: Machine, target: Machine, vm: str) -> None:
        self.phase, self.source, self.target, self.vm = phase, source, target, vm
        self._fifo: tuple[Machine, Path] | None = None
        self._file: Machine | None = None
        if phase is Phase.BEGIN:
            self._wait_at(source)
        elif phase is Phase.PREPARE:
            self._hook(target, "migrate begin")
        elif phase is Phase.CONFIRM:
            self._hook(source, "stopped end")

    def _hook(self, machine: Machine, operation: str) -> None:
        (machine.folder / "own/held").unlink(missing_ok=True)
        (machine.folder / "own/hold").write_text(f"{operation}\n")
        self._file = machine

    def _wait_at(self, machine: Machine) -> None:
        path = root(machine) / f"run/libvirt/qemu/{self.vm}.xml.new"
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        self._fifo = machine, path

    def enter(self, over: Callable[[], bool], seconds: float, limit_s: float = 60) -> bool:
        """Wait until the phase has begun, and ``seconds`` more where it is not held; False: it was over before."""
        until = time.monotonic() + limit_s
        if self.phase is Phase.LOOKING:
            return self._spend(seconds, over)
        if self.phase in {Phase.DONE, Phase.FINISH}:
            if not self._seen(lambda: job_phase(self.source, self.vm) == "perform3", over, until):
                return False
            self._wait_at(self.source if self.phase is Phase.DONE else self.target)
        begun: dict[Phase, Callable[[], bool]] = {
            Phase.PERFORM: lambda: job_phase(self.source, self.vm) == "perform3",
            Phase.DISKS: lambda: job_phase(self.source, self.vm) == "perform3",
            Phase.POSTCOPY: lambda: "reason='post-copy'" in status(self.source, self.vm),
        }
        if self.phase in begun:
            return self._seen(begun[self.phase], over, until) and self._spend(seconds, over)
        return self._seen(self._held, over, until)

    @staticmethod
    def _seen(what: Callable[[], bool], over: Callable[[], bool], until: float) -> bool:
        while not what():
            if over() or time.monotonic() > until:
                return False
            pause(0.01)
        return True

    @staticmethod
    def _spend(seconds: float, over: Callable[[], bool]) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not over():
            pause(0.01)
        return not over()

    def _held(self) -> bool:
        if self._file is not None:
            return (self._file.folder / "own/held").exists()
        assert self._fifo is not None
        proc = root(self._fifo[0])
        with suppress(OSError):
            pid = (proc / "run/libvirtd.pid").read_text().strip()
            return any(_waits(one) for one in (proc / f"proc/{pid}/task").iterdir())
        return False

    def release(self) -> None:
        """Let it go on. Twice is no error."""
        if self._file is not None:
            (self._file.folder / "own/hold").unlink(missing_ok=True)
        if self._fifo is not None:
            _, path = self._fifo
            self._fifo = None
            with suppress(OSError):
                reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                path.unlink(missing_ok=True)
                _drain(reader)


def _waits(task: Path) -> bool:
    with suppress(OSError):
        return (task / "wchan").read_text() == "wait_for_partner"
    return False


def _drain(reader: int) -> None:
    """Read until the other side has closed it, or has never been there."""
    until = time.monotonic() + 2
    try:
        while time.monotonic() < until:
            try:
                if not os.read(reader, 1 << 16):
                    return
            except BlockingIOError:
                pause(0.01)
    finally:
        os.close(reader)
