"""What keeps hosts from being used, and from sending each other VMs: everything `vmctl host check` tells."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from vmctl import fleet, host_ssh, unreached
from vmctl.config import HostEntry
from vmctl.errors import VmctlError
from vmctl.fleet import Fleet, called
from vmctl.hosts import Host
from vmctl.hypervisor import connection, network, storage

_ASK_S = 15.0
_SKEW_S = 2.0
_SCARCE = 1 << 30


@dataclass(frozen=True, slots=True)
class HostFinding:
    """One thing looked at on a host: ``result`` is ok, note or failed."""

    host: str
    name: str
    result: str
    detail: str
    mend: str = ""


def check(asked: Fleet, names: Sequence[str] = (), *, timeout_s: float) -> tuple[HostFinding, ...]:
    """Look at all hosts, or those of ``names``, at once; each also whether it reaches the others."""
    entries = asked.entries(names)
    known: dict[str, list[_Found]] = {called(entry): [] for entry in entries}
    found: list[HostFinding] = []
    for name, answer in fleet.each(entries, lambda entry: _look(asked, entry, entries, known), timeout_s):
        if isinstance(answer, VmctlError):  # or late: what was found until then stays
            what = "all of it" if known[name] else "reachable"
            known[name].append(_failed(what, answer))
        found += [HostFinding(name, *one) for one in known[name]]
    return tuple(found)


_Found = tuple[str, str, str, str]


def _look(asked: Fleet, entry: HostEntry, entries: Sequence[HostEntry], known: Mapping[str, list[_Found]]) -> None:
    """Look at one host, and tell each thing once it is known."""
    tell = known[called(entry)].append
    began = time.monotonic()
    with asked.open(entry) as host:
        took = time.monotonic() - began
        tell(("reachable", "ok", f"{entry.uri} answers in {took:.2f} s", ""))
        tell(_trust(entry))
        tell(_software(host))
        for one in _pools(host):
            tell(one)
        tell(_network(host))
    if host_ssh.by_ssh(entry.uri):
        try:
            tell(_clock(asked, entry))
        except VmctlError as error:
            tell(_failed("clock", error))
    others = [other for other in entries if other is not entry]
    # All at once: some may not answer, and each such would take its time.
    for name, answer in fleet.each(others, lambda other: _peer(asked, entry, other), 2 * _ASK_S):
        tell(_failed(f"reaches {name}", answer) if isinstance(answer, VmctlError) else answer)


def _failed(what: str, error: VmctlError) -> _Found:
    return what, "failed", error.message, "" if error.hint == fleet.SAYS_MORE else error.hint


def _trust(entry: HostEntry) -> _Found:
    scheme = urlsplit(entry.uri).scheme
    if scheme == "qemu+tcp":
        return "trust", "note", "qemu+tcp: neither encrypted nor authenticated", "qemu+ssh or qemu+tls"
    if not host_ssh.by_ssh(entry.uri):
        return "trust", "ok", "by certificate" if scheme == "qemu+tls" else "no network on the way", ""
    if entry.host_key:
        return "trust", "ok", f"SSH host key {host_ssh.fingerprint(entry.host_key)}", ""
    mend = "vmctl host remove, and add it again" if entry.name else "vmctl host add NAME URI"
    return "trust", "note", "its SSH host key is not pinned: your known_hosts decides", mend


def _software(host: Host) -> _Found:
    versions = connection.versions(host.conn)
    kvm = "KVM is offered" if "kvm" in host.facts.domain_types else "no KVM: guests run on TCG"
    return "software", "ok", f"libvirt {versions.libvirt}, QEMU {versions.hypervisor}; {kvm}", ""


def _pools(host: Host) -> list[_Found]:
    found: list[_Found] = []
    for pool in (host.settings.pool, host.settings.image_pool):
        if not storage.pool_exists(host.conn, pool):
            found.append(("pool", "note", f"no pool {pool} yet: it is made when it is needed", ""))
            continue
        storage.refresh(host.conn, pool)
        free = storage.pool_space(host.conn, pool).available
        scarce = free < _SCARCE
        text = f"pool {pool}: {free / (1 << 30):.1f} GiB free"
        found.append(("pool", "note" if scarce else "ok", text, "make room" if scarce else ""))
    return found


def _network(host: Host) -> _Found:
    name = host.settings.network
    there = any(net.name == name for net in network.all_networks(host.conn))
    return "network", "ok" if there else "note", f"network {name}" + ("" if there else ": not made yet"), ""


def _clock(asked: Fleet, entry: HostEntry) -> _Found:
    skew = clock_skew_s(asked, entry)
    if abs(skew) > _SKEW_S:
        return "clock", "failed", f"its clock is {skew:+.1f} s off this machine's", "run NTP on both"
    return "clock", "ok", f"within {_SKEW_S:g} s of this machine's", ""


def clock_skew_s(asked: Fleet, entry: HostEntry) -> float:
    """How far its clock is ahead of this machine's, by SSH; the way there and back is allowed for."""
    before = time.time()
    said = host_ssh.run(entry, asked.folders.runtime, "date", "+%s.%N", timeout_s=_ASK_S).out
    after = time.time()
    try:
        there = float(said)
    except ValueError as error:
        raise VmctlError(f"cannot ask host {called(entry)} for its time: it says {said.strip()[:40]!r}") from error
    return 0.0 if before <= there <= after else there - (after if there > after else before)


def _peer(asked: Fleet, entry: HostEntry, other: HostEntry) -> _Found:
    name = f"reaches {called(other)}"
    if not host_ssh.by_ssh(entry.uri):
        return name, "note", "cannot be asked from here: it is not reached by SSH", ""
    uri = host_ssh.elsewhere(other)
    why = seen_from(asked, entry, uri).problem
    if why:
        return name, "failed", f"{uri}: {why}", peer_mend(other, why)
    return name, "ok", uri, ""


def peer_mend(other: HostEntry | None, why: str) -> str:
    """What makes a libvirt that does not reach that host reach it."""
    return unreached.peer_mend(why, ssh=other is None or host_ssh.by_ssh(host_ssh.elsewhere(other)))


class SeenFrom(NamedTuple):
    """What a host says: why libvirt there does not reach another, how far its clock is ahead of this machine's,
    whether programs of others than root may handle page faults themselves (None: not said), which certificates QEMU
    lacks there, and its network interfaces."""

    problem: str
    skew_s: float
    userfaults: bool | None = None
    certificates: tuple[str, ...] = ()
    cards: tuple[str, ...] = ()


def seen_from(asked: Fleet, entry: HostEntry, uri: str) -> SeenFrom:
    """Ask it over one SSH session, as root where that may be: its libvirtd is root. Raises HostUnreachable."""
    seconds = f"{_ASK_S - 3:.0f}"
    before = time.time()
    argv = ("sh", "-c", _AS_ROOT, "sh", _LOOK, seconds, uri)
    answer = host_ssh.run(entry, asked.folders.runtime, *argv, timeout_s=_ASK_S)
    after = time.time()
    clock, faults, lacking, cards, *_ = [*answer.out.splitlines(), "", "", "", ""]
    skew = 0.0
    if clock.replace(".", "").isdigit() and not before <= float(clock) <= after:
        skew = float(clock) - (after if float(clock) > after else before)
    problem = ""
    if answer.code:
        words = [line.removeprefix("error: ") for line in answer.err.splitlines() if line.strip()]
        problem = words[-1] if words else f"no answer within {seconds} s"
    userfaults = None if not faults.strip() else faults.strip() != "0"
    return SeenFrom(problem, skew, userfaults, tuple(lacking.split()), tuple(cards.split()))


_AS_ROOT = """script=$1; shift
[ "$(id -u)" = 0 ] || ! sudo -n true 2>/dev/null || exec sudo -n -H sh -c "$script" sh "$@"
exec sh -c "$script" sh "$@"
"""
_LOOK = """date +%s.%N
cat /proc/sys/vm/unprivileged_userfaultfd 2>/dev/null || echo
conf=/etc/libvirt/qemu.conf
folder=$(sed -n 's/^ *[md][a-z]*_tls_x509_cert_dir *= *"\\([^"]*\\)".*/\\1/p' $conf 2>/dev/null | tail -n 1)
for file in ca-cert server-cert server-key; do
    [ -e $conf ] && [ ! -r $conf ] || [ -e "${folder:-/etc/pki/qemu}/$file.pem" ] || printf '%s.pem ' $file
done
echo
cd /sys/class/net 2>/dev/null && echo * || echo
exec timeout "$1" virsh -q -c "$2" uri"""
