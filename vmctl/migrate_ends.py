"""The two hosts of a migration, over connections that are opened anew when they broke."""

from __future__ import annotations

from vmctl import fleet as fleets
from vmctl.config import HostEntry
from vmctl.errors import NotFound, VmctlError
from vmctl.fleet import Fleet
from vmctl.hosts import Host
from vmctl.hypervisor import connection, domain, migration
from vmctl.migrate_outcome import Seen

_OPEN_S = 25.0


class Ends:
    """Source and target. Use as a context manager; libvirt's event loop must run."""

    def __init__(self, fleet: Fleet, source: HostEntry, target: HostEntry) -> None:
        self.fleet = fleet
        self._entries = {"source": source, "target": target}
        self._open: dict[str, Host] = {}

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
                migration.keep_alive(answer.conn)
                self._open[which] = answer
        return self._open[which]

    def seen(self, which: str, uuid: str) -> Seen:
        """The VM of that UUID on one of the hosts, asked anew."""

        def ask(_entry: HostEntry) -> Seen:
            try:
                found = domain.find(self._host(which).conn, uuid)
            except NotFound:
                return Seen(True)
            return Seen(True, found.state, found.why)

        for _, answer in fleets.each([self._entries[which]], ask, _OPEN_S):
            if not isinstance(answer, VmctlError):
                return answer
            self._open.pop(which, None)  # whatever it was, the next question goes over a new connection
        return Seen(False)
