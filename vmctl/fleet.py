"""All hosts at once: each is asked in a thread of its own, and one that does not answer in time is told as such."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vmctl import config, listing
from vmctl.config import Folders, HostEntry, Settings
from vmctl.errors import HostUnreachable, SpecError, VmctlError
from vmctl.hosts import Host, open_entry
from vmctl.hypervisor import connection, node
from vmctl.hypervisor.node import NodeLoad
from vmctl.hypervisor.states import State
from vmctl.listing import Row

T = TypeVar("T")
DEADLINE_S = 10.0
_ANEW_S = 60.0
SAYS_MORE = "vmctl host check says more"


@dataclass(frozen=True, slots=True)
class Fleet:
    """The hosts of the config file."""

    settings: Settings
    folders: Folders

    def entries(self, names: Sequence[str] = ()) -> tuple[HostEntry, ...]:
        """The hosts of those names, or all. Raises NotFound, SpecError where there is none at all."""
        if names:
            return tuple(config.entry(name, self.settings) for name in dict.fromkeys(names))
        if not self.settings.hosts:
            raise SpecError("cannot ask hosts: the config file has none", hint="vmctl host add NAME URI")
        return tuple(self.settings.hosts.values())

    def open(self, entry: HostEntry) -> Host:
        """A connection to one of them."""
        return open_entry(entry, self.settings, self.folders)


def called(entry: HostEntry) -> str:
    """What a host is called: its name, or the URI it was given by."""
    return entry.name or entry.uri


def each(
    entries: Sequence[HostEntry], work: Callable[[HostEntry], T], timeout_s: float
) -> Iterator[tuple[str, T | VmctlError]]:
    """Do ``work`` for all hosts at once; each host's result or error in the order given, ``timeout_s`` after at most.

    A thread that is late is left behind: libvirt cannot be interrupted while it opens a connection.
    """
    found: dict[str, T | VmctlError] = {}
    crashes: list[BaseException] = []

    def one(entry: HostEntry) -> None:
        try:
            found[called(entry)] = work(entry)
        except VmctlError as error:
            error.message = config.by_name(error.message, entry)
            found[called(entry)] = error
        except BaseException as error:  # noqa: BLE001  raised again below, where it is seen
            crashes.append(error)

    threads = [threading.Thread(target=one, args=(entry,), daemon=True) for entry in entries]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for entry, thread in zip(entries, threads, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        if crashes:
            raise crashes[0]
        late = HostUnreachable(f"cannot ask host {called(entry)}: no answer within {timeout_s:g} s", hint=SAYS_MORE)
        yield called(entry), found.get(called(entry), late)


def rows(
    fleet: Fleet,
    *,
    states: Collection[State] = (),
    labels: Mapping[str, str | None] | None = None,
    timeout_s: float = DEADLINE_S,
) -> tuple[tuple[Row, ...], dict[str, VmctlError]]:
    """The VMs of all hosts, with a row of state ``unreachable`` for each host that did not answer; and why not."""

    def ask(entry: HostEntry) -> tuple[Row, ...]:
        with fleet.open(entry) as host:
            return listing.rows(host, states=states, labels=labels)

    found: list[Row] = []
    failures: dict[str, VmctlError] = {}
    for name, answer in each(fleet.entries(), ask, timeout_s):
        if isinstance(answer, VmctlError):
            failures[name] = answer
            found.append(listing.no_answer(name, answer.message))
        else:
            found += answer
    return tuple(found), failures


@dataclass(frozen=True, slots=True)
class HostRow:
    """One host in a list; numbers are null where it did not answer, which ``problem`` tells of."""

    name: str
    uri: str
    state: str
    running: int | None = None
    vms: int | None = None
    cpus: int | None = None
    memory_mib: int | None = None
    available_mib: int | None = None
    libvirt: str = ""
    qemu: str = ""
    problem: str = ""


def hosts(fleet: Fleet, names: Sequence[str] = (), *, timeout_s: float = DEADLINE_S) -> tuple[HostRow, ...]:
    """What each host is and has."""
    entries = fleet.entries(names)

    def ask(entry: HostEntry) -> HostRow:
        with fleet.open(entry) as host:
            load, versions = node.load(host.conn), connection.versions(host.conn)
        return HostRow(
            called(entry),
            entry.uri,
            "up",
            load.running,
            load.vms,
            load.cpus,
            load.memory_mib,
            load.available_mib,
            versions.libvirt,
            versions.hypervisor,
        )

    uris = {called(entry): entry.uri for entry in entries}
    return tuple(
        HostRow(name, uris[name], "unreachable", problem=answer.message) if isinstance(answer, VmctlError) else answer
        for name, answer in each(entries, ask, timeout_s)
    )


@dataclass(frozen=True, slots=True)
class TopRow:
    """How busy a host is: processors in percent of all, memory in MiB; ``problem`` where it did not answer."""

    name: str
    cpu_percent: float | None = None
    cpus: int | None = None
    vcpus: int | None = None
    memory_mib: int | None = None
    available_mib: int | None = None
    given_mib: int | None = None
    running: int | None = None
    problem: str = ""


class Watch:
    """Looks at hosts again and again over connections that stay open.

    One that was late is not waited for in the looks that follow, nor asked again before it has answered, or a minute
    has gone: a question to a daemon that is stopped, and the SSH client that carries it, stay as long as it does.
    """

    def __init__(self, fleet: Fleet, names: Sequence[str], *, timeout_s: float = DEADLINE_S) -> None:
        self._fleet, self._entries, self._timeout_s = fleet, fleet.entries(names), timeout_s
        self._open: dict[str, Host] = {}
        self._before: dict[str, NodeLoad] = {}
        self._since: dict[str, float] = {}  # when a question was put that is not answered yet

    def look(self) -> tuple[TopRow, ...]:
        """Each host now; processors as busy as they were since the last look, at the first since its boot."""
        now = time.monotonic()
        late: dict[str, NodeLoad | VmctlError] = {
            name: HostUnreachable(f"cannot ask host {name}: no answer for {now - since:.0f} s", hint=SAYS_MORE)
            for name, since in self._since.copy().items()
            if now - since < _ANEW_S
        }
        for name in self._since.copy().keys() - late:
            self._open.pop(name, None)  # what still waits on it may do so
        asked = [entry for entry in self._entries if called(entry) not in late]
        found = late | dict(each(asked, self._ask, self._timeout_s))
        return tuple(self._row(called(entry), found[called(entry)]) for entry in self._entries)

    def _ask(self, entry: HostEntry) -> NodeLoad:
        name, mine = called(entry), time.monotonic()
        self._since[name] = mine
        host = self._open.get(name)
        try:
            host = host or self._fleet.open(entry)
            found = node.load(host.conn)
        except VmctlError:
            if host is not None:
                host.conn.close()  # opened anew at the next look
            if self._since.get(name) == mine:
                self._open.pop(name, None)
                del self._since[name]
            raise
        if self._since.get(name) == mine:
            self._open[name] = host
            del self._since[name]
        return found

    def _row(self, name: str, answer: NodeLoad | VmctlError) -> TopRow:
        if isinstance(answer, VmctlError):
            self._before.pop(name, None)
            return TopRow(name, problem=answer.message)
        before = self._before.get(name)
        self._before[name] = answer
        busy = answer.busy_ns - (before.busy_ns if before else 0)
        every = answer.all_ns - (before.all_ns if before else 0)
        return TopRow(
            name,
            round(100 * busy / every, 1) if every > 0 else 0.0,
            answer.cpus,
            answer.vcpus,
            answer.memory_mib,
            answer.available_mib,
            answer.given_mib,
            answer.running,
        )
