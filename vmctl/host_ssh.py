"""SSH to hosts, by OpenSSH's client: the key a host must show, libvirt's way through it, and commands there.

A host's key is pinned in the config file, and nothing else is trusted for it: no known_hosts, and no first use.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

from vmctl import unreached
from vmctl.config import HostEntry
from vmctl.errors import HostUnreachable, NotFound, SpecError, VmctlError, reason

_CONNECT_S = 10
_ALIVE_S, _ALIVE_COUNT = 5, 3
_KINDS = "ed25519,ecdsa,rsa"
_SCHEME = "qemu+ssh"
# Parameters of a URI that concern the machine it is used on.
_OURS = ("keyfile", "pkipath", "command", "known_hosts", "no_tty", "socket")


class Place(NamedTuple):
    """Where an SSH server is, and as whom and with which key to log in ("" and 0: as the client decides)."""

    host: str
    user: str
    port: int
    keyfile: str


def by_ssh(uri: str) -> bool:
    """Whether libvirt goes there by OpenSSH's client."""
    return urlsplit(uri).scheme == _SCHEME


def place(uri: str) -> Place:
    """The SSH server in a qemu+ssh URI. Raises SpecError."""
    parts = urlsplit(uri)
    try:
        port = parts.port or 0
    except ValueError as error:
        raise SpecError(f"cannot use {uri}: its port is no number") from error
    if not parts.hostname or parts.hostname.startswith("-"):  # which OpenSSH's tools would take for an option
        raise SpecError(f"cannot use {uri}: it names no host", hint="qemu+ssh://USER@HOST/system")
    return Place(parts.hostname, parts.username or "", port, parse_qs(parts.query).get("keyfile", [""])[0])


def elsewhere(entry: HostEntry) -> str:
    """The URI by which other hosts reach it."""
    if entry.peer:
        return entry.peer
    parts = urlsplit(entry.uri)
    kept = {key: values for key, values in parse_qs(parts.query).items() if key not in _OURS}
    return urlunsplit(parts._replace(query=urlencode(kept, doseq=True)))


def address(entry: HostEntry) -> str:
    """The address other hosts send migrations to."""
    return entry.address or urlsplit(elsewhere(entry)).hostname or ""


# --- keys ---------------------------------------------------------------------------------------------------


def fingerprint(key: str) -> str:
    """A key as OpenSSH shows it: SHA256:…"""
    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def checked_key(text: str) -> str:
    """A public key as it stands in a .pub file or in known_hosts, as kind and key. Raises SpecError."""
    words = text.split()
    for kind, blob in zip(words, words[1:], strict=False):
        if not kind.startswith(("ssh-", "ecdsa-sha2-")):
            continue
        try:
            base64.b64decode(blob, validate=True)
        except ValueError:
            continue
        return f"{kind} {blob}"
    raise SpecError(f"cannot use SSH host key {text[:40]!r}: it is none", hint="as in a .pub file: ssh-ed25519 AAAA…")


def known_as(there: Place) -> str:
    """What known_hosts calls it."""
    return there.host if there.port in {0, 22} else f"[{there.host}]:{there.port}"


def known(there: Place) -> str:
    """The key that the user's own known_hosts has for it; "" for none."""
    said = _said(["ssh-keygen", "-F", known_as(there)], timeout_s=_CONNECT_S)
    return next(iter(_best_first(line for line in said.splitlines() if line and line[0] not in "#@")), "")


def offered(there: Place) -> list[str]:
    """The keys that it shows now, which prove nothing yet; best first. Raises HostUnreachable."""
    argv = [
        "ssh-keyscan",
        "-T",
        str(_CONNECT_S),
        "-t",
        _KINDS,
        *(["-p", str(there.port)] if there.port else []),
        there.host,
    ]
    keys = _best_first(line for line in _said(argv, timeout_s=2 * _CONNECT_S).splitlines() if line)
    if not keys:
        why = _unanswered(there)
        mends = (unreached.mend(why, ssh=True), "--host-key tells the key of one that does not answer now")
        text = f"cannot ask {there.host} for its SSH host key: {why}"
        raise HostUnreachable(text, hint="; ".join(one for one in mends if one))
    return keys


def _unanswered(there: Place) -> str:
    """Why nothing came, which ssh-keyscan does not tell."""
    try:
        socket.create_connection((there.host, there.port or 22), timeout=_CONNECT_S).close()
    except UnicodeError:  # of a name that none can be, such as one with two dots in a row
        return "could not resolve the name"
    except OSError as error:
        return reason(error)
    return "what listens there answers no SSH client"


def _best_first(lines: Iterable[str]) -> list[str]:
    """The keys in lines of known_hosts."""
    keys = [checked_key(line.partition(" ")[2]) for line in lines]
    return sorted(keys, key=lambda key: ("ed25519" not in key, "ecdsa" not in key))


def _said(argv: Sequence[str], *, timeout_s: float) -> str:
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise NotFound(f"cannot run {argv[0]}: it is not installed", hint="Debian: openssh-client") from error
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout


# --- the way there -------------------------------------------------------------------------------------------


def options(entry: HostEntry, runtime: Path) -> list[str]:
    """What makes OpenSSH's client trust the pinned key alone, ask nobody anything, and notice a dead host."""
    file = runtime / f"host-{entry.name}.keys"
    _put(file, f"{entry.name} {entry.host_key}\n", 0o600)
    settings = {
        "UserKnownHostsFile": file,
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "HostKeyAlias": entry.name,
        "HostKeyAlgorithms": _algorithms(entry.host_key),
        "BatchMode": "yes",
        "ConnectTimeout": _CONNECT_S,
        "ServerAliveInterval": _ALIVE_S,
        "ServerAliveCountMax": _ALIVE_COUNT,
    }
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def _algorithms(key: str) -> str:
    kind = key.split()[0]
    return "rsa-sha2-512,rsa-sha2-256" if kind == "ssh-rsa" else kind


# Ctrl-C at a terminal comes to all that was started there, what `timeout` or systemd sends to a whole group. What was
# begun on a host is taken back through this client, though. It ends when vmctl does, or closes the connection.
_OUTLAST = "trap '' INT TERM"


def through(entry: HostEntry, runtime: Path) -> str:
    """The URI to open: libvirt starts a client of ours that knows the pinned key, if any, and outlasts an interrupt."""
    parts = urlsplit(entry.uri)
    if not by_ssh(entry.uri) or "command" in parse_qs(parts.query):
        return entry.uri
    pinned = options(entry, runtime) if entry.host_key else []
    program = runtime / (f"host-{entry.name}.ssh" if pinned else "hosts.ssh")
    _put(program, f'#!/bin/sh\n{_OUTLAST}\nexec {shlex.join(["ssh", *pinned])} "$@"\n', 0o700)
    return urlunsplit(parts._replace(query="&".join(filter(None, [parts.query, f"command={program}"]))))


_PLAIN = re.compile(r"[A-Za-z0-9_.:%][A-Za-z0-9_.:%-]*")


def unattended(uri: str) -> str:
    """The URI to open a host by that nobody names now, but a note in a VM's definition; "" where that may not be.

    A definition comes from anywhere, and a URI of libvirt's may hold a command to run here. So it is OpenSSH's client,
    to a host that the user's own known_hosts has, and it asks nobody anything.
    """
    try:
        parts = urlsplit(uri)
        where = (parts.hostname or "", parts.username or "_", str(parts.port or 0))
    except ValueError:
        return ""
    query = parse_qs(parts.query, keep_blank_values=True)
    plain = all(_PLAIN.fullmatch(one) for one in where) and parts.password is None
    if not (by_ssh(uri) and plain and parts.path in {"/system", "/session"} and query.keys() <= {"keyfile"}):
        return ""
    return urlunsplit(parts._replace(query="&".join(filter(None, [parts.query, "no_tty=1"])), fragment=""))


def _put(path: Path, text: str, mode: int) -> None:
    """Write a file whole, unless it says so already."""
    try:
        if path.exists() and path.read_text() == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
        new.write_text(text)
        new.chmod(mode)
        new.rename(path)
    except OSError as error:
        raise VmctlError(f"cannot write {path}: {reason(error)}", hint="is XDG_RUNTIME_DIR yours?") from error


def argv(entry: HostEntry, runtime: Path, *command: str) -> list[str]:
    """The client's command line for a command there. Raises SpecError for a host that is not reached by SSH."""
    if not by_ssh(entry.uri):
        raise SpecError(f"cannot log in to host {entry.name or entry.uri}: it is not reached by SSH")
    there = place(entry.uri)
    login = ["-l", there.user] if there.user else []
    login += ["-p", str(there.port)] if there.port else []
    login += ["-i", there.keyfile] if there.keyfile else []
    pinned = (
        options(entry, runtime) if entry.host_key else ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}"]
    )
    return ["ssh", "-T", *pinned, *login, "--", there.host, shlex.join(command)]


def other_key(entry: HostEntry, why: str) -> str:
    """A hint for a host that cannot be reached, ``why`` OpenSSH says; "" unless its SSH host key is another."""
    if not entry.host_key or "Host key verification failed" not in why:
        return ""
    known = f"; if that is right: vmctl host remove {entry.name}, and add it anew" if entry.name else ""
    return f"it shows another SSH host key than {fingerprint(entry.host_key)}, by which it is trusted{known}"


class Answer(NamedTuple):
    """How a command there ended, and what it said."""

    code: int
    out: str
    err: str


_SSH_FAILED = 255


def run(entry: HostEntry, runtime: Path, *command: str, timeout_s: float) -> Answer:
    """Run a command there. Raises HostUnreachable, also when it is not done in time."""
    name = entry.name or entry.uri
    try:
        done = subprocess.run(
            argv(entry, runtime, *command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise HostUnreachable(f"cannot run {command[0]} on host {name}: no answer within {timeout_s:.0f} s") from error
    if done.returncode == _SSH_FAILED:
        why = (done.stderr.strip().splitlines() or ["ssh gives no reason"])[-1]
        raise HostUnreachable(
            f"cannot log in to host {name}: {why}", hint=other_key(entry, why) or unreached.mend(why, ssh=True)
        )
    return Answer(done.returncode, done.stdout, done.stderr)
