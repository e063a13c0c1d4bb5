"""What happens to the VMs of all hosts as it happens; a host that was lost is told as such, and looked for again."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from vmctl.config import HostEntry, by_name
from vmctl.errors import NotFound, VmctlError
from vmctl.fleet import DEADLINE_S, Fleet, called, each
from vmctl.hypervisor import domain, events
from vmctl.hypervisor.events import DomainEvent

LOST, BACK = "unreachable", "reachable"
_AGAIN_S = 5.0
_IDLE_S = 1.0


@dataclass(frozen=True, slots=True)
class HostEvent:
    """Something happened at ``time`` (UTC) to a VM of a host, or, with no ``name``, to the host: lost, or back."""

    time: datetime
    host: str
    name: str
    uuid: str
    event: str
    detail: str

    @classmethod
    def of(cls, host: str, one: DomainEvent) -> HostEvent:
        """An event that was heard on a host."""
        return cls(one.time, host, one.name, one.uuid, one.event, one.detail)


class _Begun(NamedTuple):
    """A host is being watched: from now on nothing of it is missed."""

    host: str


class _Lost(NamedTuple):
    """A host could not be asked, or went away."""

    host: str
    why: str


class _Over(Exception):
    """Nobody listens any more."""


def known(fleet: Fleet, names: Collection[str], timeout_s: float = DEADLINE_S) -> frozenset[str]:
    """What VMs that are named, or given by UUID, are called on the hosts that have them.

    Raises NotFound where all hosts have answered and none has one; a host that has not may be the one that does.
    """

    def ask(entry: HostEntry) -> dict[str, str | NotFound]:
        found: dict[str, str | NotFound] = {}
        with fleet.open(entry) as host:
            for name in names:
                try:
                    found[name] = domain.find(host.conn, name).name
                except NotFound as error:
                    found[name] = error
        return found

    entries = fleet.entries()
    answers = [answer for _, answer in each(entries, ask, timeout_s)] if names else []
    there = [answer for answer in answers if not isinstance(answer, VmctlError)]
    called_so = {answer[name] for answer in there for name in names}
    for name in names if len(there) == len(entries) else ():
        if not any(isinstance(answer[name], str) for answer in there):
            hints = [error.hint for answer in there if isinstance(error := answer[name], NotFound) and error.hint]
            raise NotFound(f"cannot find VM {name} on any of {len(entries)} hosts", hint=next(iter(hints), ""))
    return frozenset(names) | {name for name in called_so if isinstance(name, str)}


def watch(
    fleet: Fleet,
    ready: Callable[[], None] = lambda: None,
    idle: Callable[[], None] = lambda: None,
    *,
    timeout_s: float = DEADLINE_S,
) -> Iterator[HostEvent]:
    """Events of all VMs of all hosts from now on, until the consumer stops, in the order in which they are heard.

    A host that does not answer within ``timeout_s``, or is lost, is an event of its own, and so is its coming back;
    what happened meanwhile is not known. ``ready`` is called once when each host is watched or was told as
    unreachable, ``idle`` each second in which nothing happens. libvirt's event loop must run.
    """
    entries = fleet.entries()
    heard: queue.SimpleQueue[HostEvent | _Begun | _Lost | BaseException] = queue.SimpleQueue()
    over = threading.Event()
    for entry in entries:
        threading.Thread(target=_follow, args=(fleet, entry, heard, over), name="events", daemon=True).start()
    try:
        yield from _told([called(entry) for entry in entries], heard, ready, idle, timeout_s)
    finally:
        over.set()  # each leaves within the second; none is waited for: it may be in a call that lasts


def _told(
    hosts: Sequence[str],
    heard: queue.SimpleQueue[HostEvent | _Begun | _Lost | BaseException],
    ready: Callable[[], None],
    idle: Callable[[], None],
    timeout_s: float,
) -> Iterator[HostEvent]:
    """What is heard, with a host that is lost told once."""
    deadline = time.monotonic() + timeout_s
    unheard, lost = set(hosts), set[str]()
    while True:
        wait_s = max(0.0, min(_IDLE_S, deadline - time.monotonic())) if unheard else _IDLE_S
        try:
            one = heard.get(timeout=wait_s)
        except queue.Empty:
            idle()
            if not unheard or time.monotonic() < deadline:
                continue
            for host in sorted(unheard):
                yield _host_event(host, LOST, f"cannot watch host {host}: no answer within {timeout_s:g} s")
            lost |= unheard
            unheard.clear()
            ready()
            continue
        if isinstance(one, BaseException):
            raise one
        if isinstance(one, HostEvent):
            yield one
            continue
        if isinstance(one, _Begun) and one.host in lost:
            yield _host_event(one.host, BACK, "what happened meanwhile is not known")
            lost.discard(one.host)
        if isinstance(one, _Lost) and one.host not in lost:
            yield _host_event(one.host, LOST, one.why)
            lost.add(one.host)
        if one.host in unheard:
            unheard.discard(one.host)
            if not unheard:
                ready()


def _host_event(host: str, event: str, detail: str) -> HostEvent:
    return HostEvent(datetime.now(UTC), host, "", "", event, detail)


def _follow(
    fleet: Fleet,
    entry: HostEntry,
    heard: queue.SimpleQueue[HostEvent | _Begun | _Lost | BaseException],
    over: threading.Event,
) -> None:
    """Watch one host until it is over, by a connection that is opened anew when it broke."""
    name = called(entry)

    def leave() -> None:
        if over.is_set():
            raise _Over

    while not over.is_set():
        try:
            with fleet.open(entry) as host:
                for event in events.watch(host.conn, ready=lambda: heard.put(_Begun(name)), idle=leave):
                    heard.put(HostEvent.of(name, event))
                    leave()
        except _Over:
            return
        except VmctlError as error:
            heard.put(_Lost(name, by_name(error.message, entry)))
        except BaseException as error:  # noqa: BLE001  raised again where it is seen
            heard.put(error)
            return
        over.wait(_AGAIN_S)
