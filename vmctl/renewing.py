"""Telling a guest that goes on from another one's memory who it is, and one that was held what time it is.

By the port that the program of our images waits at, where there is one: nothing has to be started in the guest for it.
Else by the agent, which starts that program, or in any other Linux guest a shell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from vmctl import agent, renewal
from vmctl.errors import GuestCommandFailed, VmctlError, WrongState
from vmctl.hosts import Host
from vmctl.hypervisor import channel, domain
from vmctl.hypervisor.agent import AgentState
from vmctl.hypervisor.agent import state as agent_state
from vmctl.hypervisor.channel import Channel
from vmctl.renewal import Renewal
from vmctl.wait import wait_until

_CONNECTED_S = 60.0
_ANSWER_S = 20.0
_CLOCK_S = 10.0
_RENEWING, _SETTING = "renew the identity of", "set the clock of"


def renew(host: Host, name: str, new: Renewal) -> bool:
    """Tell a running guest who it is. Whether its clock is right then. Raises GuestCommandFailed, WrongState."""

    def connected() -> str | None:
        state, why = domain.state(host.conn, name)
        if state not in domain.ACTIVE:
            raise WrongState(f"cannot {_RENEWING} VM {name}: it is {domain.told(state, why)}")
        if channel.connected(domain.xml(host.conn, name), renewal.CHANNEL):
            return renewal.CHANNEL
        return "agent" if agent_state(host.conn, name) is AgentState.CONNECTED else None

    found = wait_until(connected, what=f"agent of VM {name}", timeout_s=_CONNECTED_S, interval_s=0.005)
    if found == renewal.CHANNEL:
        with suppress(VmctlError):  # who listened there has ended, or cannot do all of it
            _by_channel(host, name, [lambda: renewal.identity(new), _clock], _RENEWING)
            return True

    def timed() -> Renewal:
        return replace(new, now=time.time())

    try:
        agent.feed(host, name, [renewal.PROGRAM], lambda: renewal.told(timed()).encode(), _RENEWING)
    except GuestCommandFailed:  # an image without it
        agent.feed(host, name, ["/bin/sh", "-s"], lambda: renewal.script(timed()).encode(), _RENEWING)
        return False
    return True


def correct_clock(host: Host, name: str) -> None:
    """Set the clock of one that was held for a moment, and its clock with it."""
    if channel.connected(domain.xml(host.conn, name), renewal.CHANNEL):
        with suppress(VmctlError):
            _by_channel(host, name, [_clock], _SETTING, deadline_s=_CLOCK_S)
            return
    try:
        agent.feed(host, name, [renewal.PROGRAM], lambda: _clock().encode(), _SETTING, timeout_s=_CLOCK_S)
    except GuestCommandFailed:  # an image without it
        agent.sync_time(host, name)


def _clock() -> str:
    return renewal.clock(time.time())


def _by_channel(
    host: Host, name: str, told: Sequence[Callable[[], str]], doing: str, *, deadline_s: float = _ANSWER_S
) -> None:
    with Channel(host.conn, name, renewal.CHANNEL, doing) as opened:
        for one in told:
            answer = opened.ask(renewal.framed(one()), deadline_s=deadline_s)
            if answer != renewal.DONE:
                raise GuestCommandFailed(f"cannot {doing} VM {name}: its guest says: {answer or 'nothing'}")
