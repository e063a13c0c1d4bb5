"""Making a host known: what is asked of its URI, and which SSH key it is trusted by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from vmctl import homes, host_book, host_ssh, spec
from vmctl.config import AUTO, HostEntry, is_address, of_qemu, readable
from vmctl.errors import Conflict, HostUnreachable, SpecError, VmctlError
from vmctl.fleet import DEADLINE_S, Fleet, each
from vmctl.hosts import Host
from vmctl.hypervisor import connection

_CHECK_S = 30.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for; "" where nothing was."""

    name: str
    uri: str
    host_key: str = ""
    fingerprint: str = ""
    peer: str = ""
    address: str = ""
    insecure: bool = False
    check: bool = True


class Trust(NamedTuple):
    """A key that a host shows and nobody vouches for yet."""

    host: str
    kind: str
    fingerprint: str


def fingerprint(entry: HostEntry) -> str:
    """Of the key pinned for it."""
    return host_ssh.fingerprint(entry.host_key)


def problems(wish: Wish) -> list[str]:
    """What is wrong with a wish, all of it."""
    found = list(spec.name_problems(wish.name))
    if wish.name == AUTO:
        found.append(f"{AUTO} is what `vmctl migrate --to` calls no host in particular")
    for uri in filter(None, (wish.uri, wish.peer)):
        if not of_qemu(uri):
            found.append(f"{uri!r} is no URI of a libvirt host, such as qemu+ssh://root@host/system")
        elif urlsplit(uri).scheme == "qemu+tcp" and not wish.insecure:
            found.append(f"{uri} is neither encrypted nor authenticated; in a test network, --insecure lets it be")
    if wish.address and not is_address(wish.address):
        found.append(f"--address {wish.address!r} is no address")
    if (wish.host_key or wish.fingerprint) and readable(wish.uri) and not host_ssh.by_ssh(wish.uri):
        found.append("an SSH host key is for qemu+ssh only")
    if wish.fingerprint and not wish.fingerprint.startswith("SHA256:"):
        found.append(f"{wish.fingerprint!r} is no fingerprint: it begins with SHA256:")
    return found


def add(fleet: Fleet, wish: Wish, trusts: Callable[[Trust], bool]) -> HostEntry:
    """Add a host to the config file once it answers; ``trusts`` judges a key that nobody vouched for.

    Raises SpecError with all that is wrong, Conflict for a name that is taken and for a host that has one,
    HostUnreachable.
    """
    if wish.name in fleet.settings.hosts:
        raise Conflict(
            f"cannot add host {wish.name}: the config file has it already, at {fleet.settings.hosts[wish.name].uri}",
            hint=f"vmctl host remove {wish.name}",
        )
    refuse_same_uri(fleet, wish.name, wish.uri)
    made = entry(wish, trusts)
    if wish.check:
        try:
            with fleet.open(made) as host:
                connection.versions(host.conn)
                refuse_same_host(fleet, host)
        except HostUnreachable as error:
            hint = host_ssh.other_key(made._replace(name=""), error.message) or "--no-check adds it all the same"
            raise HostUnreachable(f"cannot add host {wish.name}: {error.message}", hint=hint) from error
    host_book.add(fleet.folders, made)
    return made


def refuse_same_uri(fleet: Fleet, name: str, uri: str) -> None:
    """Raise Conflict where the config file has a host of that URI by another name: its VMs would be there twice."""
    for one in fleet.settings.hosts.values():
        if one.uri == uri and one.name != name:
            raise _known(name, one.name, f"at {uri}")


def refuse_same_host(fleet: Fleet, host: Host) -> None:
    """Raise Conflict where one of the other hosts that answer is this one by another way."""
    mine = homes.known_by(host)

    def ask(one: HostEntry) -> str:
        with fleet.open(one) as other:
            return homes.known_by(other)

    others = [one for one in fleet.settings.hosts.values() if one.name != host.name]
    for name, uuid in each(others, ask, DEADLINE_S):
        if uuid == mine:
            mend = "; if they are two: give one another host_uuid in /etc/libvirt/libvirtd.conf"
            raise _known(host.name, name, f"with host UUID {mine}", mend=mend)


def _known(name: str, other: str, by: str, *, mend: str = "") -> Conflict:
    hint = f"it is -c {other}; to call it {name}, or reach it by another URI, first vmctl host remove {other}"
    return Conflict(f"cannot add host {name}: the config file has it already as {other}, {by}", hint=hint + mend)


def entry(wish: Wish, trusts: Callable[[Trust], bool]) -> HostEntry:
    """The host that is wished for, with the key it is trusted by. Raises SpecError with all that is wrong."""
    if found := problems(wish):
        raise SpecError(f"cannot add host {wish.name}", problems=found)
    made = HostEntry(wish.name, wish.uri, "", wish.peer, wish.address)
    return made._replace(host_key=_key(wish, trusts)) if host_ssh.by_ssh(wish.uri) else made


def _key(wish: Wish, trusts: Callable[[Trust], bool]) -> str:
    """The key to pin. Nothing is taken for true because it was seen first."""
    there = host_ssh.place(wish.uri)
    if wish.host_key:
        key = host_ssh.checked_key(wish.host_key)
        if wish.fingerprint and host_ssh.fingerprint(key) != wish.fingerprint:
            raise SpecError(f"cannot add host {wish.name}: --host-key has the fingerprint {host_ssh.fingerprint(key)}")
        return key
    if wish.fingerprint:
        shown = host_ssh.offered(there)
        for key in shown:
            if host_ssh.fingerprint(key) == wish.fingerprint:
                return key
        seen = ", ".join(host_ssh.fingerprint(key) for key in shown)
        raise HostUnreachable(f"cannot trust {there.host}: it shows other SSH host keys than that: {seen}")
    if vouched := host_ssh.known(there):
        return vouched
    key = host_ssh.offered(there)[0]
    if not trusts(Trust(there.host, key.split()[0], host_ssh.fingerprint(key))):
        raise VmctlError(f"cannot add host {wish.name}: its SSH host key is not trusted")
    return key
