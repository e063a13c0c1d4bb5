"""The guest agent's verbs: run a command, freeze and thaw, trim, set a password, set the clock; what it tells.

Each question to the agent has a deadline (vmctl.hypervisor.agent), so a hung one costs seconds, never more.
"""

from __future__ import annotations

import base64
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmctl import ending
from vmctl.errors import GuestCommandFailed, Interrupted, SpecError, VmctlError, WaitTimeout, quietly
from vmctl.hosts import Host
from vmctl.hypervisor import agent
from vmctl.hypervisor.agent import AgentState
from vmctl.hypervisor.domain import Domain, State
from vmctl.wait import wait_until

_ASK_S = 8.0  # libvirt itself spends 5 s on an agent that does not answer
_GLANCE_S = 1.0
_TIDY_S = 2.0
_FREEZE_S = 30.0
_TRIM_S = 300.0
_POLL_S = 0.05
_UNKNOWN = 255
# An answer beyond 4 MiB cannot pass libvirt's protocol; one beyond 10 MiB makes libvirt give up the agent until the
# guest restarts (9.0). So nothing is asked for in one piece: files in the guest hold what goes in and comes out.
_CHUNK = 1 << 20
_MOST_PIECES = 8  # of a stream, before the clock is looked at again
_PIECE = 1 << 16  # what is written at once: some agents stop answering at requests of half a MiB
_USER = r"[A-Za-z_][A-Za-z0-9_.@-]{0,63}"
_START = 'd=$1; shift; exec "$@" <"$d/in" >"$d/out" 2>"$d/err"'


class _Asked:
    """One guest's agent, asked for one purpose."""

    def __init__(self, host: Host, name: str, doing: str) -> None:
        self.host, self.name, self.doing = host, name, doing
        self.silent = False  # it left a question unanswered
        agent.require(host.conn, name, doing)
        self._line = agent.Line(host.conn, name, doing)

    def __call__(self, command: str, *, deadline_s: float = _ASK_S, **arguments: object) -> Any:
        words = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return self._line.ask(command, words, deadline_s=deadline_s)
        except WaitTimeout:
            self.silent = True
            raise
        except GuestCommandFailed as error:
            if not command.startswith("guest-fsfreeze") and self._frozen():
                error.hint = f"vmctl thaw {self.name}"
            raise

    def _frozen(self) -> bool:
        try:
            return bool(self("guest-fsfreeze-status") == "frozen")
        except VmctlError:
            return False

    def tidy(self, command: str, **arguments: object) -> None:
        """Clear up behind what was asked, as far as an agent does that still answers."""
        if not self.silent:
            quietly(lambda: self(command, deadline_s=_TIDY_S, **arguments))

    def quick(self, *argv: str) -> str:
        """What a short command printed. Raises GuestCommandFailed when it fails."""
        started = self("guest-exec", path=argv[0], arg=list(argv[1:]), capture_output=True)

        def ended() -> Mapping[str, Any] | None:
            status: Mapping[str, Any] = self("guest-exec-status", pid=started["pid"])
            return status if status["exited"] else None

        status = wait_until(
            ended, what=f"cannot {self.doing} VM {self.name}: {argv[0]}", timeout_s=_ASK_S, interval_s=0.02
        )
        if status.get("exitcode") != 0:
            words = base64.b64decode(status.get("err-data", "")).decode("utf-8", "replace").strip()
            raise GuestCommandFailed(f"cannot {self.doing} VM {self.name}: {argv[0]} failed in the guest: {words}")
        return base64.b64decode(status.get("out-data", "")).decode().strip()


def feed(
    host: Host, name: str, argv: Sequence[str], data: Callable[[], bytes], doing: str, *, timeout_s: float = 60.0
) -> None:
    """Run a command in the guest with some kilobytes on its standard input, asked for when the agent listens.

    Raises GuestCommandFailed when it fails.
    """
    ask = _Asked(host, name, doing)
    ask("guest-ping")  # what the guest wakes up for; it answers the next at once
    text = base64.b64encode(data()).decode()
    started = ask("guest-exec", path=argv[0], arg=list(argv[1:]), input_data=text, capture_output=True)

    def ended() -> Mapping[str, Any] | None:
        status: Mapping[str, Any] = ask("guest-exec-status", pid=started["pid"])
        return status if status["exited"] else None

    # Each look costs an emulated guest some of the time that the command needs.
    status = wait_until(
        ended, what=f"cannot {doing} VM {name}: {argv[0]}", timeout_s=timeout_s, interval_s=0.04, growth=1.2
    )
    if status.get("exitcode") != 0:
        words = base64.b64decode(status.get("err-data", "")).decode("utf-8", "replace").strip()
        raise GuestCommandFailed(f"cannot {doing} VM {name}: {argv[0]} failed in the guest: {words}")


class _Stream:
    """A file in the guest that grows while a command writes to it."""

    def __init__(self, ask: _Asked, path: str, sink: Callable[[bytes], object]) -> None:
        self._ask, self._sink = ask, sink
        self.handle: int = ask("guest-file-open", path=path, mode="r")

    def drain(self) -> bool:
        """Hand over what has come since; whether that is all, for what prints faster than it is read has no end."""
        for _ in range(_MOST_PIECES):
            got = self._ask("guest-file-read", handle=self.handle, count=_CHUNK)
            if not got["count"]:
                return True
            self._sink(base64.b64decode(got["buf-b64"]))
        return False


def execute(
    host: Host,
    name: str,
    argv: Sequence[str],
    *,
    stdin: int | None,
    out: Callable[[bytes], object],
    err: Callable[[bytes], object],
    timeout_s: float,
) -> int:
    """Run a command in the guest by its agent, and return its exit code, as a shell tells it.

    The whole of ``stdin`` (a file descriptor) is taken before the command begins; output comes as it is made. Needs
    /bin/sh in the guest. Raises WaitTimeout when the command still runs after ``timeout_s``; it goes on.
    """
    ask = _Asked(host, name, "run a command by the agent of")
    folder = ask.quick("/bin/sh", "-c", "umask 077; d=$(mktemp -d) && cd $d && : >in && : >out && : >err && echo $d")
    handles: list[int] = []
    started: Mapping[str, Any] = {}
    try:
        if stdin is not None:
            _feed(ask, f"{folder}/in", stdin)
        started = ask("guest-exec", path="/bin/sh", arg=["-c", _START, "sh", folder, *argv])
        streams = []
        for part, sink in (("out", out), ("err", err)):
            streams.append(_Stream(ask, f"{folder}/{part}", sink))
            handles.append(streams[-1].handle)
        return _followed(ask, started["pid"], streams, argv[0], timeout_s)
    except (KeyboardInterrupt, Interrupted, BrokenPipeError):
        if started:
            ask.tidy("guest-exec", path="/bin/sh", arg=["-c", ending.SCRIPT, "sh", str(started["pid"])])
        raise
    except WaitTimeout as error:
        if started and ask.silent:
            error.hint = f"{argv[0]} goes on as process {started['pid']} of the guest; the agent hangs, or is kept busy"
        raise
    finally:
        for handle in handles:
            ask.tidy("guest-file-close", handle=handle)
        ask.tidy("guest-exec", path="/bin/rm", arg=["-rf", folder])


def _feed(ask: _Asked, path: str, source: int) -> None:
    handle = ask("guest-file-open", path=path, mode="w")
    try:
        while data := os.read(source, _PIECE):
            ask("guest-file-write", handle=handle, buf_b64=base64.b64encode(data).decode())
    finally:
        ask("guest-file-close", handle=handle)


def _followed(ask: _Asked, pid: int, streams: Sequence[_Stream], word: str, timeout_s: float) -> int:
    def ended() -> Mapping[str, Any] | None:
        status: Mapping[str, Any] = ask("guest-exec-status", pid=pid)
        all_read = [stream.drain() for stream in streams]  # after the status: what was written before the end is there
        return status if status["exited"] and all(all_read) else None

    try:
        status = wait_until(ended, what="", timeout_s=timeout_s, interval_s=_POLL_S)
    except WaitTimeout as error:
        if error.what:
            raise
        raise WaitTimeout(
            f"cannot wait for {word} in VM {ask.name} any longer",
            after_s=error.after_s,
            hint=f"it goes on as process {pid} of the guest; --timeout SECONDS waits longer",
        ) from error
    return 128 + int(status["signal"]) if "signal" in status else int(status.get("exitcode", _UNKNOWN))


def freeze(host: Host, name: str) -> int:
    """Stop all writing to the guest's file systems; returns how many. They stay so until thawed.

    One that is not frozen in time is thawed again: a half-frozen guest is worse than none.
    """
    ask = _Asked(host, name, "freeze the file systems of")
    if ask("guest-fsfreeze-status") == "frozen":
        return 0
    try:
        return int(ask("guest-fsfreeze-freeze", deadline_s=_FREEZE_S))
    except (VmctlError, KeyboardInterrupt, Interrupted) as error:
        try:
            ask("guest-fsfreeze-thaw")
        except WaitTimeout:
            if isinstance(error, VmctlError):  # it hangs in the middle, and whoever lets it go on lets it freeze
                error.hint = f"they may freeze yet, once it goes on: vmctl thaw {name}"
        except VmctlError:
            pass
        raise


def thaw(host: Host, name: str) -> int:
    """Let the guest's file systems be written to again; returns how many were frozen."""
    ask = _Asked(host, name, "thaw the file systems of")
    frozen = ask("guest-fsfreeze-status") == "frozen"
    count = int(ask("guest-fsfreeze-thaw", deadline_s=_FREEZE_S))
    # The agent counts what it thaws, and counts nothing when it was restarted while frozen.
    return max(count, int(frozen))


@dataclass(frozen=True, slots=True)
class Trimmed:
    """One file system given back its free blocks. ``trimmed`` in bytes; ``error`` "" when it went well."""

    path: str
    trimmed: int
    error: str


def trim(host: Host, name: str) -> tuple[Trimmed, ...]:
    """Tell the disks which blocks the guest's file systems no longer use."""
    found = _Asked(host, name, "trim the file systems of")("guest-fstrim", deadline_s=_TRIM_S)
    return tuple(Trimmed(p.get("path", ""), int(p.get("trimmed", 0)), p.get("error", "")) for p in found["paths"])


def set_password(host: Host, name: str, user: str, password: str) -> None:
    """Set a user's password in the guest. Raises SpecError for one that cannot be."""
    if re.fullmatch(_USER, user) is None:
        raise SpecError(f"cannot set a password: {user!r} is no user name")
    if not password or re.search("[\x00-\x1f\x7f]", password) or len(password) > 256:
        raise SpecError("cannot set a password: it is empty, longer than 256 characters, or has control characters")
    ask = _Asked(host, name, f"set the password of {user} in")
    coded = base64.b64encode(password.encode()).decode()
    try:
        ask("guest-set-user-password", username=user, password=coded, crypted=False)
    except GuestCommandFailed as error:  # the agent says no more than that chpasswd failed
        error.hint = error.hint or f"does the guest have that user? vmctl exec --via agent {name} -- id {user}"
        raise


def sync_time(host: Host, name: str) -> float:
    """Set the guest's clock by ours; returns by how many seconds it was ahead."""
    ask = _Asked(host, name, "set the clock of")
    before = time.time()
    theirs = int(ask("guest-get-time")) / 1e9
    ahead = theirs - (before + time.time()) / 2
    ask("guest-set-time", time=time.time_ns())
    return ahead


@dataclass(frozen=True, slots=True)
class GuestAddress:
    """An address of the guest's, on the interface it gives that name."""

    interface: str
    mac: str
    address: str


SILENT = "silent"


@dataclass(frozen=True, slots=True)
class Glance:
    """What an agent tells at once. ``state`` is "answers", "frozen", SILENT, or why it could not be asked."""

    state: str
    addresses: tuple[GuestAddress, ...] = ()

    def reachable(self, macs: Collection[str]) -> tuple[str, str]:
        """The first IPv4 address others may reach it at, of a card with one of those MACs, and that MAC; or "", ""."""
        for one in self.addresses:
            plain = one.address.partition("/")[0]
            if one.mac.lower() in macs and "." in plain and not plain.startswith("169.254."):
                return plain, one.mac.lower()
        return "", ""


def glance(host: Host, vm: Domain, *, last: bool = False) -> Glance:
    """The agent's state and addresses, in a second at most.

    ``last``: the VM has just been found, and nothing is asked of the host by that connection afterwards.
    """
    known = agent.state_in(vm.facts) if last else agent.state(host.conn, vm.name)
    if known is not AgentState.CONNECTED or vm.state is not State.RUNNING:
        return Glance(str(known))
    began = time.monotonic()
    line = agent.Line(host.conn, vm.name, "look into", last=vm if last else None)

    def ask(command: str) -> Any:
        return line.ask(command, deadline_s=max(0.1, began + _GLANCE_S - time.monotonic()))

    try:
        if ask("guest-fsfreeze-status") == "frozen":
            return Glance("frozen")
        return Glance("answers", addresses(ask("guest-network-get-interfaces")))
    except WaitTimeout:
        return Glance(SILENT)
    except GuestCommandFailed:
        return Glance("answers")  # it refuses, as an administrator may have told it to


def addresses(interfaces: Sequence[Mapping[str, Any]]) -> tuple[GuestAddress, ...]:
    """The addresses that reach further than the guest's own loopback."""
    return tuple(
        GuestAddress(
            str(one.get("name", "")), str(one.get("hardware-address", "")), f"{ip['ip-address']}/{ip['prefix']}"
        )
        for one in interfaces
        for ip in one.get("ip-addresses", ())
        if not str(ip["ip-address"]).startswith("127.") and ip["ip-address"] != "::1"
    )
