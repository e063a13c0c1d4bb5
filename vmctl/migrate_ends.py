"""The two hosts of a migration, over connections that are opened anew when they broke."""

from __future__ import annotations

import threading
import time

from vmctl import fleet as fleets
from vmctl.config import HostEntry
from vmctl.errors import NotFound, PreflightFailed, Unsupported, VmctlError
from vmctl.fleet import Fleet
from vmctl.hosts import Host
from vmctl.hypervisor import connection, domain, migration
from vmctl.migrate_facts import Asking
from vmctl.migrate_outcome import Seen
from vmctl.migrate_problems import one_host

_OPEN_S, _ASK_S, _VALID_S = 25.0, 15.0, 60.0


class Ends:
    """Source and target. Use as a context manager; libvirt's event loop must run."""

    def __init__(self, fleet: Fleet, source: HostEntry, target: HostEntry) -> None:
        self.fleet = fleet
        self._entries = {"source": source, "target": target, "caller": source}
        self._open: dict[str, Host] = {}
        self._asked: tuple[float, Asking] | None = None

    def open(self) -> None:
        """Open all connections at once, and ask whether the hosts reach each other. Raises HostUnreachable."""
        self.asking()
        failures: dict[str, VmctlError] = {}

        def one(which: str) -> None:
            try:
                self._host(which)
            except VmctlError as error:
                failures[which] = error

        threads = [threading.Thread(target=one, args=(which,), daemon=True) for which in self._entries]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for which in self._entries:
            if which in failures:
                raise failures[which]
            if not self._host(which).conn.qemu:
                way = "from" if which == "source" else "to"
                raise Unsupported(f"cannot migrate {way} {fleets.called(self._entries[which])}: no QEMU is there")

    def asking(self) -> Asking:
        """That question, which is not put again for the VMs that follow within the minute."""
        if self._asked is None or time.monotonic() - self._asked[0] > _VALID_S:
            asking = Asking(self.fleet, self._entries["source"], self._entries["target"])
            self._asked = time.monotonic(), asking
        return self._asked[1]

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._open.values():
            if connection.is_alive(host.conn):
                host.conn.close()

    @property
    def source(self) -> Host:
        """Where the VM was. Raises HostUnreachable."""
        return self._host("source")

    @property
    def target(self) -> Host:
        """Where it shall be. Raises HostUnreachable."""
        return self._host("target")

    @property
    def caller(self) -> Host:
        """The source once more, for the call that lasts: libvirt's client may let others on its connection wait for it.

        Raises HostUnreachable.
        """
        return self._host("caller")

    @property
    def names(self) -> tuple[str, str]:
        """What they are called."""
        return fleets.called(self._entries["source"]), fleets.called(self._entries["target"])

    def _host(self, which: str) -> Host:
        found = self._open.get(which)
        if found is None or not connection.is_alive(found.conn):
            entry = self._entries[which]
            # In a thread, with a deadline: TCP alone waits for a host that has no power for minutes.
            for _, answer in fleets.each([entry], self.fleet.open, _OPEN_S):
                if isinstance(answer, VmctlError):
                    raise answer
                connection.keep_alive(answer.conn)
                self._open[which] = answer
        return self._open[which]

    def require_two(self, doing: str) -> None:
        """Raise PreflightFailed when both answer, and are one host by two names: what is on both is there once."""
        try:
            here, there = (host.facts.uuid for host in (self.source, self.target))
        except VmctlError:
            return
        if here == there:
            raise PreflightFailed(f"cannot {doing}: nothing was changed", problems=[one_host(*self.names, here)[:2]])

    def seen(self, uuid: str) -> tuple[Seen, Seen]:
        """The VM of that UUID on source and target, asked anew, both at once."""
        found: dict[str, Seen] = {}

        def ask(which: str) -> None:
            try:
                vm = domain.find(self._host(which).conn, uuid)
                ended = migration.was_ended(vm)
            except NotFound:
                found[which] = Seen(True)
            except VmctlError:
                pass
            else:
                found[which] = Seen(True, vm.state, vm.why, ended)

        threads = {which: threading.Thread(target=ask, args=(which,), daemon=True) for which in ("source", "target")}
        deadline = time.monotonic() + _ASK_S
        for thread in threads.values():
            thread.start()
        for which, thread in threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if which not in found:
                self._open.pop(which, None)  # whatever it was, the next question goes over a new connection
        return found.get("source", Seen(False)), found.get("target", Seen(False))
