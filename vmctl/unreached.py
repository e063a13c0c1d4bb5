"""Why a host was not reached, by what OpenSSH, the system or libvirt says of it, and what mends that. Pure."""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """How far the way there leads."""

    NAME = "name"
    ROUTE = "route"
    SILENCE = "silence"
    REFUSED = "refused"
    HOST_KEY = "host key"
    LOGIN = "login"
    SHELL = "shell"
    RIGHTS = "rights"
    CERTIFICATE = "certificate"
    LIBVIRT = "libvirt"
    OTHER = "other"


# OpenSSH gives all of its failures one exit code, and libvirt passes on its words. The first that is found counts:
# libvirt adds that the client went away, and a daemon that is off refuses a connection as well.
_WORDS = (
    (Cause.HOST_KEY, ("host key verification failed",)),
    (Cause.RIGHTS, ("-sock': permission denied", "polkit", "denied by policy")),
    (Cause.LOGIN, ("permission denied", "too many authentication failures", "authentication failed")),
    (Cause.SHELL, ("received from server too large",)),
    (Cause.CERTIFICATE, ("certificate", "/pki/")),
    (Cause.LIBVIRT, ("libvirt-sock", "virtqemud-sock")),
    (Cause.NAME, ("could not resolve", "name or service not known", "name resolution", "unable to resolve")),
    (Cause.ROUTE, ("no route to host", "network is unreachable", "host is down")),
    (Cause.REFUSED, ("connection refused",)),
    (Cause.SILENCE, ("timed out", "timeout", "no answer within")),
)
_ANYWHERE = {
    Cause.NAME: "no name server and no hosts file knows that name",
    Cause.ROUTE: "is it on, and does a way lead to its network? `ip route get ADDRESS` tells which is taken",
    Cause.SILENCE: "is it on? if it is, a firewall may drop what is sent to it",
    Cause.SHELL: "the account there prints text, or may run nothing: `ssh USER@HOST true` must print nothing",
    Cause.RIGHTS: "it lets that user in, and its libvirt does not: there, as root: adduser USER libvirt",
    Cause.CERTIFICATE: "by TLS both sides need certificates of one authority, in /etc/pki/CA and /etc/pki/libvirt",
    Cause.LIBVIRT: "the way there leads to the machine, and its libvirtd does not answer: start it there",
}
_FROM_HERE = {
    **_ANYWHERE,
    Cause.HOST_KEY: "your known_hosts has no such key of it: `vmctl host add NAME URI` pins one",
    Cause.LOGIN: "it does not let you in: give it your key by ssh-copy-id, or the URI another by ?keyfile=PATH",
}
_DIRECT = "or migrate with --direct"
_FROM_PEER = {
    **_ANYWHERE,
    Cause.HOST_KEY: f"give its root the other's SSH host key, as `vmctl host setup --peers` does; {_DIRECT}",
    Cause.LOGIN: f"give its root an SSH key that the other lets in, as `vmctl host setup --peers` does; {_DIRECT}",
    Cause.OTHER: f"give its root an SSH key that the other lets in, and the other's host key; {_DIRECT}",
}


def cause(said: str) -> Cause:
    """Which it is, by what was said of it."""
    words = said.lower()
    return next((one for one, signs in _WORDS if any(sign in words for sign in signs)), Cause.OTHER)


def _refused(*, ssh: bool) -> str:
    if ssh:
        return "the machine is on, and no SSH server listens there: start it, or name another port in the URI"
    return "the machine is on, and no libvirt listens there: start libvirtd-tls.socket, or that of the URI's transport"


def mend(said: str, *, ssh: bool) -> str:
    """What mends it, seen from this machine; "" where that is not known."""
    found = cause(said)
    return _refused(ssh=ssh) if found is Cause.REFUSED else _FROM_HERE.get(found, "")


def peer_mend(said: str, *, ssh: bool) -> str:
    """What mends it where one host's libvirt does not reach another's."""
    found = cause(said)
    return _refused(ssh=ssh) if found is Cause.REFUSED else _FROM_PEER[found]
