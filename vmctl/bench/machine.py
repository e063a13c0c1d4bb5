"""A guest of image bench straight under QEMU: started, asked through its agent, and gone with this process.

Not through libvirt: it has no null-co, no NVMe before 10, no choice of ioeventfd, and lets nobody turn QEMU's trace
events on; and what stands between would be measured with it.
"""

from __future__ import annotations

import base64
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vmctl.bench.wire import Asker, Gone, Lines
from vmctl.choices import Accel
from vmctl.errors import GuestCommandFailed, VmctlError, WaitTimeout, reason
from vmctl.wait import wait_until

MEMORY_MIB, VCPUS = 512, 2
MARKS = "/dev/virtio-ports/vmctl.marks"
# Before a command: it is ended by the kernel when the one who started it ends, however that is.
DYING_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
_END = "vmctl-end"
_START_S, _ASK_S, _BOOT_S, _END_S = 20.0, 20.0, 120.0, 10.0
_PORTS = (
    ("agent", "org.qemu.guest_agent.0"),
    ("marks", "vmctl.marks"),
)


@dataclass(frozen=True, slots=True)
class Board:
    """What every such guest is made of. ``folder`` takes its console's log and QEMU's own words.

    ``within`` are the words that run a command in another network namespace.
    """

    qemu: Path
    accel: Accel
    kernel: str
    initrd: str
    cmdline: str
    disk: str
    folder: Path
    within: tuple[str, ...] = ()


class Refused(VmctlError):
    """QEMU did not start; ``said`` is what it gave as its reason."""

    def __init__(self, said: str) -> None:
        lines = [line for line in said.splitlines() if "warning:" not in line and line.strip()]
        self.said = lines[0].strip() if lines else "it said nothing"
        super().__init__(f"cannot start QEMU: {self.said}")

    def of(self, arguments: Sequence[str]) -> tuple[str, str]:
        """The argument that QEMU would not have, and why; "" for none of these."""
        for option, value in zip(arguments, arguments[1:], strict=False):
            if f"{option} {value}: " in self.said:
                return value, self.said.partition(f"{option} {value}: ")[2]
        return "", self.said


class Clock(NamedTuple):
    """What QEMU's process has used and waited for until now, in ns: CPU time, and time it was ready and not run."""

    wall: int
    cpu: int
    waited: int


def argv(board: Board, arguments: Sequence[str], handles: dict[str, int]) -> list[str]:
    """QEMU's command line; ``handles`` are the numbers of the sockets it inherits. Machine pc has all the buses."""
    cpu = "host" if board.accel is Accel.KVM else "max"
    base = ["-machine", "pc", "-accel", board.accel, "-cpu", cpu, "-smp", str(VCPUS), "-m", str(MEMORY_MIB)]
    base += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-name", "vmctl-bench"]
    base += ["-serial", f"file:{board.folder / 'console'}", "-kernel", board.kernel, "-initrd", board.initrd]
    base += ["-append", board.cmdline, "-device", "virtio-serial-pci"]
    # Thrown away with the process: the file behind it has no name.
    base += ["-drive", f"file={board.disk},format=qcow2,if=virtio,snapshot=on"]
    for name, port in _PORTS:
        base += [
            "-chardev",
            f"socket,id={name},fd={handles[name]}",
            "-device",
            f"virtserialport,chardev={name},name={port}",
        ]
    base += ["-chardev", f"socket,id=monitor,fd={handles['monitor']}", "-mon", "chardev=monitor,mode=control"]
    return [*board.within, *DYING_WITH_US, str(board.qemu), *base, *arguments]


class Guest:
    """A running guest."""

    def __init__(self, process: subprocess.Popen[bytes], monitor: Asker, agent: Asker, marks: Lines) -> None:
        self.pid = process.pid
        self.monitor = monitor
        self._agent, self._marks = agent, marks
        self._cpu_clock = (~self.pid << 3) | 2  # clock_getcpuclockid(3): threads that have ended count in it, too

    def clock(self) -> Clock:
        """What has been used until now. Raises Gone."""
        waited = 0
        try:
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                waited += int((task / "schedstat").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            waited = 0  # a kernel without, or a thread that ended in this moment
        try:
            return Clock(time.monotonic_ns(), time.clock_gettime_ns(self._cpu_clock), waited)
        except OSError as error:
            raise Gone("cannot look at QEMU: it is gone") from error

    def facts(self) -> dict[str, str]:
        """What a result tells of the guest."""
        clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
        kernel, ticks = self.run(f"uname -r; cat {clock}", timeout_s=_ASK_S).splitlines()
        return {"guest_kernel": kernel, "guest_clock": ticks}

    def run(self, script: str, *, timeout_s: float, marked: Callable[[str], None] | None = None) -> str:
        """What a shell script in the guest prints; ``marked`` hears each word that it tells at MARKS (wire.telling).

        The guest goes on only then: on a busy host it might else be through with a job before it was known to begin.
        Nothing is asked of the guest while it runs. Raises GuestCommandFailed, Gone, WaitTimeout.
        """
        whole = f"({script}\n); code=$?; echo {_END} > {MARKS}; exit $code"
        pid = self._agent.ask(
            "guest-exec",
            {
                "path": "/bin/sh",
                "arg": ["-s"],
                "input-data": base64.b64encode(whole.encode()).decode(),
                "capture-output": True,
            },
        )["pid"]
        deadline = time.monotonic() + timeout_s
        while (line := self._marks.next(deadline)) != _END:
            if marked:
                marked(line)
            self._marks.send(b"\n")

        def ended() -> dict[str, Any] | None:
            status: dict[str, Any] = self._agent.ask("guest-exec-status", {"pid": pid})
            return status if status["exited"] else None

        status = wait_until(ended, what="end of a script in the guest", timeout_s=_END_S, interval_s=0.02)
        out, err = (
            base64.b64decode(str(status.get(name, ""))).decode(errors="replace") for name in ("out-data", "err-data")
        )
        if status.get("exitcode") != 0:
            raise GuestCommandFailed(
                f"cannot measure: a command in the guest ended with {status.get('exitcode', status.get('signal'))}",
                evidence=[*err.splitlines()[-5:], *out.splitlines()[-5:]],
            )
        return out


@contextmanager
def running(board: Board, arguments: Sequence[str]) -> Iterator[Guest]:
    """A guest, booted and listening; gone afterwards. Raises Refused where QEMU does not start, VmctlError."""
    monitor, agent, marks = Asker("QEMU", _ASK_S), Asker("the guest's agent", _ASK_S), Lines("the guest")
    ends = {"monitor": monitor.lines, "agent": agent.lines, "marks": marks}
    complaints = board.folder / "qemu"
    try:
        handles = {name: lines.theirs.fileno() for name, lines in ends.items()}
        with complaints.open("wb") as errors:
            process = _started(argv(board, arguments, handles), list(handles.values()), errors.fileno(), board.folder)
        try:
            for lines in ends.values():
                lines.theirs.close()
            _greet(monitor, complaints)
            _await_agent(agent, board.folder / "console")
            yield Guest(process, monitor, agent, marks)
        finally:
            process.kill()
            process.wait()
    finally:
        for lines in ends.values():
            lines.close()


def _started(words: list[str], handles: Sequence[int], errors: int, folder: Path) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=handles,
            start_new_session=True,  # Ctrl-C is for us: it is ended then, in order
            env={**os.environ, "TMPDIR": str(folder)},  # where its throw-away layer is
        )
    except OSError as error:
        raise VmctlError(f"cannot start QEMU: {reason(error, path=True)}") from error


def _greet(monitor: Asker, complaints: Path) -> None:
    try:
        monitor.answer(lambda message: "QMP" in message, _START_S)
        monitor.ask("qmp_capabilities")
    except Gone as error:
        raise Refused(complaints.read_text(errors="replace")) from error


def _await_agent(agent: Asker, console: Path) -> None:
    """The question waits in QEMU until the guest opens the port."""
    number = time.monotonic_ns() & 0xFFFFFFF
    try:
        agent.send("guest-sync", {"id": number})
        agent.answer(lambda message: message.get("return") == number, _BOOT_S)
    except (Gone, WaitTimeout) as error:
        said = console.read_text(errors="replace").splitlines() if console.exists() else []
        raise GuestCommandFailed(
            "cannot measure: the guest did not boot", evidence=said[-5:] or ["(it said nothing)"]
        ) from error
