"""Talking to a guest's agent through libvirt, each call with a deadline that holds whatever the guest does.

libvirt has calls of its own for most of this (fsFreeze, setUserPassword, setTime …), which wait for ever unless
agentSetResponseTimeout was called: that changes the domain for every client and cannot be read back. So all goes
through qemuAgentCommand, whose timeout is the call's own. Even that does not bound the call: libvirt first asks the
agent to synchronise, 5 s at most, and before that waits up to 30 s for its turn while another client's command has
the domain's one agent job. Hence the thread, on a connection apart: who asks waits for the deadline and no longer. A
call given up ends in the daemon by itself, and needs none of the domain's other jobs: no other command waits for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import libvirt

from vmctl.domain_xml import DomainFacts, parse
from vmctl.errors import GuestCommandFailed, Unsupported, VmctlError, WaitTimeout, WrongState
from vmctl.hypervisor import answers, domain
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.errors import calling, translated
from vmctl.hypervisor.states import state_of
from vmctl.hypervisor.waiting import Waiting
from vmctl.wait import wait_until

# QEMU tells of a channel that a guest opens once a second at most, and libvirt notes it when its job is over: of a VM
# that has just been resumed from memory, the agent is there before it is known.
_KNOWN_S = 2.0
_SILENT = {libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_AGENT_UNSYNCED, libvirt.VIR_ERR_OPERATION_TIMEOUT}


class AgentState(StrEnum):
    """What is known of an agent without asking it."""

    NONE = "no channel"
    DISCONNECTED = "not connected"
    CONNECTED = "connected"


def state(conn: Connection, name: str) -> AgentState:
    """Whether the guest has opened the agent's channel. Needs nothing from the guest."""
    return state_in(parse(domain.xml(conn, name)))


def state_in(facts: DomainFacts) -> AgentState:
    """The same, of a domain that has been read."""
    if not facts.agent:
        return AgentState.NONE
    return AgentState.CONNECTED if facts.agent_connected else AgentState.DISCONNECTED


def require(conn: Connection, name: str, doing: str) -> None:
    """Raise WrongState, Unsupported or, after two seconds, GuestCommandFailed unless there is an agent to ask."""
    with calling(f"look up VM {name}"):
        dom = domain.handle(conn, name)
        now, why = state_of(*dom.state())
    if now is not domain.State.RUNNING:
        raise WrongState(f"cannot {doing} VM {name}: it is {domain.told(now, why)}", hint=domain.remedy(name, now, why))

    def connected() -> bool:
        with calling(f"read the XML of VM {name}"):
            found = state_in(parse(dom.XMLDesc()))
        if found is AgentState.NONE:
            raise Unsupported(
                f"cannot {doing} VM {name}: it has no guest agent channel",
                hint="`vmctl create` makes one, unless --no-agent",
            )
        return found is AgentState.CONNECTED

    try:
        wait_until(connected, what="agent", timeout_s=_KNOWN_S, interval_s=0.05)
    except WaitTimeout:
        raise GuestCommandFailed(
            f"cannot {doing} VM {name}: its guest agent is not connected",
            hint=f"is qemu-guest-agent running in the guest? vmctl wait {name} --for agent",
        ) from None


class Line:
    """A way to one guest's agent, for one purpose: ``doing`` ("freeze") and the name make the errors' text."""

    def __init__(self, conn: Connection, name: str, doing: str, *, last: Domain | None = None) -> None:
        """``last``: the domain as found by this connection, of which nothing is asked any more but what is asked here.

        A connection apart, which takes a while to open, is then only taken once a call is given up.
        """
        self._conn, self._name, self._doing = conn, name, doing
        self._handle: Any = last and last.handle

    def ask(self, command: str, arguments: Mapping[str, object] | None = None, *, deadline_s: float) -> Any:
        """The agent's answer to ``command``, as parsed JSON.

        Raises WaitTimeout when the agent does not answer in time, GuestCommandFailed when it refuses, or answers what
        no agent would.
        """
        text = json.dumps({"execute": command} | ({"arguments": dict(arguments)} if arguments else {}))
        if self._handle is None:
            with calling(f"{self._doing} VM {self._name}"):
                self._handle = domain.handle(self._conn.apart(), self._name)
        handle, began = self._handle, time.monotonic()
        asked = Waiting(lambda: _ask(handle, text, deadline_s))
        try:
            answer = asked.answer(deadline_s)
        except libvirt.libvirtError as error:
            if error.get_error_code() in _SILENT:
                raise _unanswered(self._name, self._doing, time.monotonic() - began) from error
            raise _refused(error, self._name, self._doing) from error
        except BaseException:
            self._leave()
            raise
        if answer is None:
            self._leave()
            raise _unanswered(self._name, self._doing, time.monotonic() - began)
        return _read(answer, command, self._name, self._doing)

    def _leave(self) -> None:
        """Give a call up, which goes on: the next is made on another connection."""
        self._handle = None
        self._conn.leave_apart()


def _read(answer: str, command: str, name: str, doing: str) -> Any:
    """What an answer says, once it has the form it should have: whoever rules the guest may answer anything."""
    try:
        found = json.loads(answer)["return"]
        sound = answers.is_sound(command, found)
    except (ValueError, LookupError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise GuestCommandFailed(
            f"cannot {doing} VM {name}: its guest agent's answer to {command} makes no sense",
            hint="is that QEMU's guest agent? SSH and the console do not need it",
        )
    return found


def _ask(handle: Any, text: str, deadline_s: float) -> str:
    import libvirt_qemu

    return str(libvirt_qemu.qemuAgentCommand(handle, text, max(1, round(deadline_s)), 0))


class Ping:
    """Whether an agent answers, asked again and again, with never more than one question on its way.

    The daemon reads five requests of a client at once (max_client_requests): a few that wait for the agent's turn would
    hold up all else that is asked on the connection.
    """

    def __init__(self, conn: Connection, name: str) -> None:
        self._name = name
        self._asked: Waiting[str] | None = None
        self._line = conn.apart()
        conn.leave_apart()  # one of its own, on which a question may stay

    def __call__(self, deadline_s: float) -> bool:
        """Whether it has answered by then. Raises what another failure means."""
        if self._asked is None:
            with calling(f"ask the agent of VM {self._name}"):
                handle = domain.handle(self._line, self._name)
            self._asked = Waiting(lambda: _ask(handle, '{"execute":"guest-ping"}', deadline_s))
        try:
            if self._asked.answer(deadline_s) is None:
                return False
        except libvirt.libvirtError as error:
            self._asked = None
            if error.get_error_code() in _SILENT:
                return False
            raise translated(error, f"ask the agent of VM {self._name}") from error
        self._asked = None
        return True


def shutdown(conn: Connection, name: str, *, deadline_s: float) -> None:
    """Have the agent shut the guest down. Raises WaitTimeout when it does not take it up in time."""
    doing = f"stop VM {name} through its agent"
    with calling(doing):
        handle = domain.handle(conn.apart(), name)
    # libvirt's own call waits a minute for the guest's end, and before that for the agent's turn.
    asked = Waiting(lambda: str(handle.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)))
    with calling(doing):
        answer = asked.answer(deadline_s)
    if answer is None:
        conn.leave_apart()
        raise WaitTimeout(f"cannot {doing}: it does not answer", after_s=deadline_s)


def _unanswered(name: str, doing: str, after_s: float) -> VmctlError:
    return WaitTimeout(
        f"cannot {doing} VM {name}: its guest agent does not answer",
        after_s=after_s,
        hint="it hangs, or another client's command has it; SSH and the console do not need it",
    )


def _refused(error: libvirt.libvirtError, name: str, doing: str) -> VmctlError:
    if error.get_error_code() != libvirt.VIR_ERR_INTERNAL_ERROR:
        return translated(error, f"{doing} VM {name}")
    # What the agent itself answers reaches us as an internal error, its words after the command's name.
    words = (error.get_error_message() or "no reason given").rpartition("': ")[2]
    return GuestCommandFailed(f"cannot {doing} VM {name}: its guest agent says: {words}")
