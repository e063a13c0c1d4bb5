"""Making a bare Debian machine a host: looked at over SSH, what is missing worked out (pure), shown, and done."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from vmctl import host_ssh, images, networks
from vmctl.config import HostEntry
from vmctl.errors import SpecError, Unsupported, VmctlError
from vmctl.events import Reporter, Step, Warned, silent
from vmctl.fleet import Fleet, called
from vmctl.hypervisor import network, storage

PACKAGES = (
    "qemu-system-x86",
    "qemu-utils",
    "qemu-block-extra",
    "libvirt-daemon-system",
    "libvirt-clients",
    "dnsmasq-base",
    "iptables",
    "nftables",
    "iproute2",
    "ovmf",
    "swtpm",
    "swtpm-tools",
    "openssh-client",
    "openssl",
)
_LOOK_S, _INSTALL_S, _STEP_S = 30.0, 1800.0, 120.0
_LOOK = r"""
echo "uid=$(id -u)"
echo "user=$(id -un)"
echo "groups=$(id -Gn)"
root=no sudo=
if [ "$(id -u)" = 0 ]; then root=yes; elif sudo -n true 2>/dev/null; then root=yes sudo='sudo -n'; fi
echo "root=$root"
echo "os=$(. /etc/os-release 2>/dev/null; echo "$ID ${ID_LIKE-}")"
for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || echo "missing=$package"
done
echo "systemd=$([ -d /run/systemd/system ] && echo yes || echo no)"
# A daemon that was killed leaves its socket.
echo "libvirt=$($sudo timeout 10 virsh -q -c qemu:///system uri </dev/null >/dev/null 2>&1 && echo yes || echo no)"
[ ! -c /dev/kvm ] || echo "kvm=$(stat -c '%G %a' /dev/kvm)"
"""
_AS_ROOT = '[ "$(id -u)" = 0 ] && exec sh -c "$1"; exec sudo -n -H sh -c "$1"'
_PEER_LOOK = r"""
ssh-keygen -y -f ~/.ssh/id_ed25519 </dev/null 2>/dev/null || echo none
cat "$(getent passwd "$user" | cut -d : -f 6)/.ssh/authorized_keys" 2>/dev/null; echo ---
cat ~/.ssh/known_hosts 2>/dev/null; :
"""
_LET_IN = r"""
umask 077; folder=$(getent passwd "$user" | cut -d : -f 6)/.ssh; file=$folder/authorized_keys; mkdir -p "$folder"
[ -z "$(tail -c 1 "$file" 2>/dev/null)" ] || echo >>"$file"
printf '%s\n' "$key" >>"$file"; chown "$user:" "$folder" "$file"
"""


_WHERE = re.compile(
    r"(?P<user>[A-Za-z_][A-Za-z0-9_.-]*)@(?P<machine>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)(:[0-9]{1,5})?"
)


class Login(NamedTuple):
    """A machine to set up: the URI that its libvirt will have, and what it is called where nobody says."""

    uri: str
    name: str


def login(where: str, keyfile: str) -> Login:
    """What USER@MACHINE, or USER@MACHINE:PORT, means, with the private key to log in with. Raises SpecError."""
    found = _WHERE.fullmatch(where)
    if found is None:
        hint = "vmctl host setup root@big.example; an IPv6 address stands in brackets"
        raise SpecError(f"cannot set up {where!r}: it is no USER@MACHINE", hint=hint)
    key = ""
    if keyfile:
        path = Path(keyfile).expanduser().absolute()  # the config file is read from everywhere
        if not path.is_file():
            raise SpecError(f"cannot set up {where}: there is no private key {keyfile}", hint="--keyfile")
        key = f"?keyfile={quote(str(path))}"
    machine = found["machine"]
    return Login(f"qemu+ssh://{where}/system{key}", _name(machine.strip("[]")))


def _name(machine: str) -> str:
    try:
        ipaddress.ip_address(machine)
    except ValueError:
        return machine.partition(".")[0]
    return re.sub("[.:]+", "-", machine).strip("-")


def meant(entry: HostEntry, wanted: Login, host_key: str, fingerprint: str) -> None:
    """Whether a known host of that name is the machine that is meant, with the key that is given. Raises SpecError."""
    same = host_ssh.by_ssh(entry.uri) and host_ssh.place(entry.uri)[:3] == host_ssh.place(wanted.uri)[:3]
    keyfile = host_ssh.place(wanted.uri).keyfile
    if not same or keyfile not in {"", host_ssh.place(entry.uri).keyfile}:
        raise SpecError(f"cannot set up {wanted.uri} as {entry.name}: that host is {entry.uri}", hint="--name")
    pinned = host_ssh.fingerprint(entry.host_key) if entry.host_key else ""
    given = host_ssh.fingerprint(host_ssh.checked_key(host_key)) if host_key else fingerprint
    if given and given != pinned:
        raise SpecError(
            f"cannot set up {entry.name}: the SSH host key that is given is not {pinned or 'pinned'}",
            hint=f"if its key has changed: vmctl host remove {entry.name}",
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine said of itself. ``kvm``: group and mode of /dev/kvm, "" where there is none."""

    uid: str
    user: str
    groups: tuple[str, ...]
    root: bool
    os: tuple[str, ...]
    missing: tuple[str, ...]
    systemd: bool
    libvirt: bool
    kvm: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not yet as it should be: what to call it, and the script that does it, as root there.

    ``doing`` is what that is called where it does more than the one thing, ``hint`` what to do when it fails.
    """

    what: str
    script: str
    timeout_s: float = field(default=_STEP_S, compare=False)
    doing: str = field(default="", compare=False)
    hint: str = field(default="", compare=False)


def read(text: str) -> Machine:
    """The answers of the first look."""
    pairs = [line.partition("=") for line in text.splitlines()]
    values: Mapping[str, str] = {key: value for key, _, value in pairs}
    return Machine(
        uid=values.get("uid", ""),
        user=values.get("user", ""),
        groups=tuple(values.get("groups", "").split()),
        root=values.get("root") == "yes",
        os=tuple(values.get("os", "").split()),
        missing=tuple(value for key, _, value in pairs if key == "missing"),
        systemd=values.get("systemd") == "yes",
        libvirt=values.get("libvirt") == "yes",
        kvm=values.get("kvm", ""),
    )


def changes(machine: Machine) -> tuple[Change, ...]:
    """What must be done to it, in this order; nothing for one that is as it should be. Pure."""
    found = []
    if machine.missing:
        # What a setup before this one left: an apt that still runs is waited for, what it was torn out of is ended.
        apt = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=600", "install", "--no-install-recommends"]
        install = shlex.join([*apt, *machine.missing])
        again = f"{{ dpkg --configure -a; {install}; }}"
        script = f"export DEBIAN_FRONTEND=noninteractive; apt-get -q update; {install} || {again}"
        found += [Change(f"package {name}", "") for name in machine.missing[:-1]]
        many = f"{len(machine.missing)} packages" if machine.missing[1:] else ""
        hint = "does `apt-get update` there reach its mirror, and `dpkg --configure -a` end well? then this again"
        found.append(Change(f"package {machine.missing[-1]}", script, _INSTALL_S, many, hint))
    if machine.kvm and machine.kvm.split()[0] != "kvm":
        found.append(Change(f"/dev/kvm: group kvm instead of {machine.kvm}", "chgrp kvm /dev/kvm; chmod 660 /dev/kvm"))
    if not machine.libvirt or machine.missing:
        start = "systemctl enable --now virtlogd.socket libvirtd.socket libvirtd.service"
        # Either may run by now, and says so then.
        by_hand = "virtlogd -d || :; libvirtd -d || timeout 10 virsh -q -c qemu:///system uri"
        found.append(Change("libvirtd running", start if machine.systemd else by_hand))
    if machine.uid != "0":
        lacking = [group for group in ("libvirt", "kvm") if group not in machine.groups]
        user = shlex.quote(machine.user)
        found += [Change(f"user {machine.user} in group {group}", f"usermod -a -G {group} {user}") for group in lacking]
    return tuple(found)


def look(fleet: Fleet, entry: HostEntry) -> Machine:
    """Ask a machine over SSH. Raises HostUnreachable, Unsupported for one that is no Debian or lets nobody be root."""
    said = host_ssh.run(entry, fleet.folders.runtime, "sh", "-c", _LOOK, "sh", *PACKAGES, timeout_s=_LOOK_S)
    found = read(said.out)
    if "debian" not in found.os:
        kind = found.os[0] if found.os else "an unknown system"
        raise Unsupported(
            f"cannot set up {called(entry)}: it runs {kind}, not Debian",
            hint=f"install there what these packages of Debian's hold: {' '.join(PACKAGES)}; then vmctl host add",
        )
    if not found.root:
        raise Unsupported(
            f"cannot set up {called(entry)}: {found.user} is not root there, nor becomes it by sudo without a password",
            hint="log in as root, or let the user sudo without a password",
        )
    return found


def apply(fleet: Fleet, entry: HostEntry, machine: Machine, wanted: Sequence[Change], report: Reporter) -> None:
    """Do it. Raises VmctlError with the machine's own words for what fails; what was done before stays."""
    prefix = [] if machine.uid == "0" else ["sudo", "-n", "-H"]
    for change in wanted:
        if not change.script:
            continue  # done with the ones after it
        doing = change.doing or change.what
        report(Step(f"{called(entry)}: {doing}"))
        argv = [*prefix, "sh", "-e", "-c", change.script]
        done = host_ssh.run(entry, fleet.folders.runtime, *argv, timeout_s=change.timeout_s)
        if done.code:
            words = [line for line in (done.err or done.out).splitlines() if line.strip()]
            why = f"cannot set up {called(entry)}: {doing}: {words[-1] if words else done.code}"
            raise VmctlError(why, hint=change.hint)


def as_root(fleet: Fleet, entry: HostEntry, script: str, *, timeout_s: float) -> host_ssh.Answer:
    """What a script of sh's says there, as root. Raises HostUnreachable."""
    return host_ssh.run(entry, fleet.folders.runtime, "sh", "-c", _AS_ROOT, "sh", script, timeout_s=timeout_s)


def furnishings(fleet: Fleet, entry: HostEntry) -> tuple[str, ...]:
    """Of what vmctl keeps on a host by libvirt, what is not there yet."""
    with fleet.open(entry) as host:
        pools = (host.settings.pool, host.settings.image_pool)
        found = [f"storage pool {name}" for name in pools if not storage.pool_exists(host.conn, name)]
        there = network.find(host.conn, host.settings.network)
        return (*found, *([] if there is not None and there.active else [f"network {host.settings.network}"]))


def furnish(fleet: Fleet, entry: HostEntry, report: Reporter) -> None:
    """Make the pools and the network there."""
    with fleet.open(entry) as host:
        images.ensure_pools(host)
        networks.ensure(host, report)


# --- who may log in to whom ------------------------------------------------------------------------------------


def peers(fleet: Fleet, entry: HostEntry, report: Reporter = silent) -> tuple[tuple[HostEntry, Change], ...]:
    """What lets its root reach the other known hosts by their peer URIs, and theirs it: a change and where it is made.

    Hosts that are not reached by SSH, or do not answer, are left out, and told.
    """
    others = [one for one in fleet.settings.hosts.values() if called(one) != called(entry)]
    homes: dict[str, _Home] = {}
    for one in (entry, *others):
        try:
            homes[called(one)] = _home(fleet, one)
        except VmctlError as error:
            report(Warned(f"{called(one)} is left out of --peers: {error.message}"))
    if called(entry) not in homes:
        return ()
    found: list[tuple[HostEntry, Change]] = []
    for one in (entry, *others):
        if called(one) in homes and homes[called(one)].key == "none":
            make = "mkdir -p -m 700 ~/.ssh; ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519"
            found.append((one, Change(f"an SSH key of root's on {called(one)}", make)))
    for other in others:
        if called(other) in homes:
            found += _introduce(entry, other, homes[called(entry)], homes[called(other)])
            found += _introduce(other, entry, homes[called(other)], homes[called(entry)])
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Home:
    """Root's key, "none" without; whom the user lets in that others log in as; and whom root knows."""

    key: str
    user: str
    lets_in: str
    knows: str


def _home(fleet: Fleet, entry: HostEntry) -> _Home:
    """Raises VmctlError for one that others do not reach by SSH, or whose key is not pinned, HostUnreachable."""
    if not entry.host_key or not host_ssh.by_ssh(host_ssh.elsewhere(entry)):
        why = "its SSH host key is not pinned" if host_ssh.by_ssh(entry.uri) else "it is not reached by SSH"
        raise VmctlError(why)
    user = host_ssh.place(host_ssh.elsewhere(entry)).user or "root"
    said = as_root(fleet, entry, f"user={shlex.quote(user)}{_PEER_LOOK}", timeout_s=_LOOK_S).out
    key, _, rest = said.partition("\n")
    lets_in, _, knows = rest.partition("---\n")
    return _Home(key.strip(), user, lets_in, knows)


def _introduce(one: HostEntry, other: HostEntry, mine: _Home, theirs: _Home) -> list[tuple[HostEntry, Change]]:
    """What is missing for ``one`` to log in to ``other``. A key that is yet to be made is let in at the next look."""
    found = []
    address = host_ssh.known_as(host_ssh.place(host_ssh.elsewhere(other)))
    line = f"{address} {other.host_key}"
    if line not in mine.knows and not (address in mine.knows and other.host_key in mine.knows):
        script = f"mkdir -p -m 700 ~/.ssh; echo {shlex.quote(line)} >>~/.ssh/known_hosts"
        found.append((one, Change(f"{called(one)} knows the host key of {called(other)}", script)))
    what = f"{called(other)} lets root of {called(one)} in" + (f", as {theirs.user}" if theirs.user != "root" else "")
    if mine.key == "none":
        found.append((other, Change(what, "")))
    elif " ".join(mine.key.split()[:2]) not in theirs.lets_in:
        script = f"user={shlex.quote(theirs.user)}; key={shlex.quote(mine.key)}{_LET_IN}"
        found.append((other, Change(what, script)))
    return found
