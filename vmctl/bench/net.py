"""Measures what a network link costs: guests' cards, containers' veth and loopback, in network namespaces of our own.

What the guest talks to is the kernel's stack in such a namespace, at the other end of its tap; there is no bridge, no
filter and nobody else's traffic. A round is one look at every row.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmctl.bench import links, machine, store, traffic
from vmctl.bench.ground import Window, prepared
from vmctl.bench.links import Card, Link, Way
from vmctl.bench.machine import Board, Guest, Refused
from vmctl.bench.measured import Gathering, Measured, Sample
from vmctl.bench.namespaces import Namespace, two_namespaces
from vmctl.bench.result import Head
from vmctl.bench.traffic import Flow
from vmctl.bench.wire import Gone
from vmctl.choices import AccelChoice
from vmctl.errors import GuestCommandFailed, SpecError, Unsupported, WaitTimeout
from vmctl.events import Progress, Reporter, Step
from vmctl.hosts import Host

METHOD = 1  # counted up when a figure would mean something else
_PROGRAMS = ("iperf3", "sockperf")
_SLACK_S = 60.0
_VHOST = Path("/dev/vhost-net")
_TUN = Path("/dev/net/tun")
_SERVERS = {
    links.TCP_PORT: ("iperf3", "-s", "-p", str(links.TCP_PORT)),
    links.PING_PORT: ("sockperf", "sr", "--tcp", "-i", "0.0.0.0", "-p", str(links.PING_PORT)),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, in how many rounds, and how long each flow goes on, in whole seconds."""

    links: tuple[Link, ...]
    rounds: int = 5
    length_s: int = 1


def plan(rows: tuple[Link, ...], *, quick: bool, rounds: int | None, length_s: int | None) -> Plan:
    """What to do for what was asked. Raises SpecError where that leaves nothing to measure."""
    if quick:
        rows = tuple(link for link in rows if link.card is not Card.E1000E)
    if not rows:
        there = ", ".join(link.name for link in links.ALL)
        raise SpecError("cannot measure: no row is of that path and that card", hint=f"rows: {there}")
    return Plan(rows, rounds or (1 if quick else 5), length_s or 1)


def run(host: Host, wanted: Plan, choice: AccelChoice, report: Reporter) -> Measured:
    """Measure, and keep the result after each row. Raises as ground.prepared does, and Unsupported."""
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        raise Unsupported(
            f"cannot measure the network: {' and '.join(missing)} missing, which answer the guest",
            hint=f"apt-get install {' '.join(missing)}",
        )
    paths = ",".join(path for path in Way if any(link.path is path for link in wanted.links))
    own = {"method": METHOD, "length_s": wanted.length_s, "paths": paths}
    with prepared(host, "net", choice, None, own, report) as (board, head, place), two_namespaces() as (far, near):
        board = replace(board, within=far.within)
        return _Measuring(board, far, near, wanted, report, head, place).all()


class _Measuring:
    """One measurement on its way. ``far`` is where servers are and taps end, ``near`` a container's."""

    def __init__(
        self, board: Board, far: Namespace, near: Namespace, wanted: Plan, report: Reporter, head: Head, place: Path
    ) -> None:
        self._board, self._far, self._near = board, far, near
        self._plan, self._report, self._head, self._place = wanted, report, head, place
        self._found = Gathering({link.name: link.to_json() for link in wanted.links})
        self._numbered = list(enumerate(wanted.links, 1))
        self._done = 0

    def all(self) -> Measured:
        """Every round."""
        for n, link in self._numbered:
            self._lay(n, link)
        for number in range(1, self._plan.rounds + 1):
            left = [one for one in self._numbered if not self._found.over(one[1].name)]
            self._in_guests(number, [one for one in left if one[1].path in links.GUEST_PATHS])
            for n, link in left:
                if link.path not in links.GUEST_PATHS:
                    where = self._near if link.path is Way.VETH else self._far
                    self._row(number, n, link, self._by(where))
            self._done = number * len(self._numbered) * len(traffic.FLOWS)
            self._tell()
        return self._keep(complete=True)

    def _lay(self, n: int, link: Link) -> None:
        """Make what a row needs on the host; one that cannot be made is skipped."""
        own = links.ends(n, link.path)
        try:
            if link.vhost and not _VHOST.exists():
                raise Unsupported(f"{_VHOST} is not there: the host's kernel has no vhost_net, or has not loaded it")
            if link.path is Way.TAP:
                if not os.access(_TUN, os.R_OK | os.W_OK):
                    raise Unsupported(f"this user may not open {_TUN}")
                self._far.run("ip", "tuntap", "add", "dev", own.tap, "mode", "tap")
            elif link.path is Way.VETH:
                self._far.run(
                    "ip", "link", "add", own.tap, "type", "veth", "peer", "eth0", "netns", str(self._near.pid)
                )
                self._near.run("ip", "address", "add", f"{own.near}/24", "dev", "eth0")
                self._near.run("ip", "link", "set", "eth0", "up")
            else:
                return
            self._far.run("ip", "address", "add", f"{own.far}/24", "dev", own.tap)
            self._far.run("ip", "link", "set", own.tap, "up")
        except GuestCommandFailed as error:
            self._found.skipped[link.name] = " ".join(error.evidence[:1]) or error.message
        except Unsupported as error:
            self._found.skipped[link.name] = error.message

    def _in_guests(self, number: int, rows: Sequence[tuple[int, Link]]) -> None:
        """One look at each of these rows, in a guest with all their cards, and in another one after one that ended."""
        waiting = list(rows)
        while waiting:
            looked = self._guest(number, waiting)
            waiting = [one for one in waiting if one[0] not in looked and not self._found.over(one[1].name)]

    def _guest(self, number: int, rows: Sequence[tuple[int, Link]]) -> set[int]:
        """The rows of these that were looked at."""
        own = {n: links.arguments(n, link) for n, link in rows}
        words = [word for arguments in own.values() for word in arguments]
        looked: set[int] = set()
        try:
            with machine.running(self._board, words) as guest:
                self._head = self._head.with_environment(**guest.facts())
                for n, link in rows:
                    looked.add(n)
                    if not self._row(number, n, link, self._by_guest(guest), guest):
                        break
        except Refused as refused:
            argument, why = refused.of(words)
            culprits = [link for n, link in rows if argument in own[n]]
            if not culprits:
                raise
            self._found.skipped[culprits[0].name] = why
            self._report(Step(f"{culprits[0].name}: skipped: {why}"))
        return looked

    def _attach(self, guest: Guest, n: int, link: Link) -> bool:
        """Give the guest's card its address, and wait until the other end answers: a link may take seconds.

        False for one that the guest has no driver for. Raises GuestCommandFailed where nobody answers.
        """
        own = links.ends(n, link.path)
        module = links.DRIVERS[link.card] if link.card else ""
        said = guest.run(
            f"modprobe {module} || exit 0\n"
            f"for turn in 1 2 3 4 5 6 7 8 9 10; do for card in /sys/class/net/*; do\n"
            f'  [ "$(cat $card/address)" = {own.mac} ] || continue; name=${{card##*/}}\n'
            f"  ip address add {own.near}/24 dev $name 2>/dev/null; ip link set $name up; echo up\n"
            f"  for turn in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do\n"
            f"    ping -c 1 -W 1 {own.far} > /dev/null 2>&1 && exit; sleep 0.1; done\n"
            f"  echo nobody answers at {own.far} >&2; exit 1\n"
            "done; sleep 0.2; done",
            timeout_s=_SLACK_S,
        )
        if "up" not in said:
            self._found.skipped[link.name] = f"the guest's kernel has no driver {module}, or found no card for it"
        return "up" in said

    def _by_guest(self, guest: Guest) -> Callable[[str, float, Window | None], str]:
        return lambda script, limit_s, window: guest.run(
            f"cd /tmp; {script}", timeout_s=limit_s, marked=window.hear if window else None
        )

    def _by(self, where: Namespace) -> Callable[[str, float, Window | None], str]:
        return lambda script, limit_s, _window: where.run("sh", "-c", script, timeout_s=limit_s, cwd=self._board.folder)

    def _row(
        self,
        number: int,
        n: int,
        link: Link,
        do: Callable[[str, float, Window | None], str],
        guest: Guest | None = None,
    ) -> bool:
        """Every flow over a link; False when its guest is no more."""
        try:
            if guest and not self._attach(guest, n, link):
                return True
            with self._far.serving(_SERVERS):
                for flow in traffic.FLOWS:
                    self._flow(number, n, link, flow, do, guest)
                    self._done += 1
                    self._tell()
        except (Gone, WaitTimeout) as error:
            self._fail(link, error.message)
            return False
        except GuestCommandFailed as error:
            self._fail(link, "; ".join([error.message, *error.evidence[:2]]))
        self._keep(complete=False)
        return True

    def _flow(
        self,
        number: int,
        n: int,
        link: Link,
        flow: Flow,
        do: Callable[[str, float, Window | None], str],
        guest: Guest | None,
    ) -> None:
        window = Window(guest.clock) if guest else None
        script = traffic.script(flow, links.ends(n, link.path).far, self._plan.length_s, machine.MARKS if guest else "")
        figure = traffic.read(flow, do(script, self._plan.length_s + _SLACK_S, window))
        details = {**figure.details, **(window.host_side(flow.name, figure.count) if window else {})}
        sample = Sample(number, round(figure.value, 1), details)
        self._found.take(link.name, flow.name, flow.unit, flow.better, sample)

    def _fail(self, link: Link, why: str) -> None:
        self._found.failed[link.name] = why
        self._report(Step(f"{link.name}: {why}; going on with the next"))

    def _tell(self) -> None:
        total = self._plan.rounds * len(self._numbered) * len(traffic.FLOWS)
        self._report(Progress("net", min(self._done, total), total, "flows"))

    def _keep(self, *, complete: bool) -> Measured:
        result = Measured(replace(self._head, complete=complete), self._found.rows())
        store.write(self._place, result.to_json())
        return result
