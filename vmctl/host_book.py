"""The hosts in the config file: adding and taking away a table, with all else in the file left to the letter."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from vmctl import config
from vmctl.config import Folders, HostEntry, Settings
from vmctl.errors import Conflict, NotFound, SpecError, VmctlError, reason
from vmctl.locks import held

_LOCK_S = 10.0
_HEADER = re.compile(r"^[ \t]*\[")


def path(folders: Folders) -> Path:
    """The config file."""
    return folders.config / "config.toml"


def add(folders: Folders, entry: HostEntry) -> None:
    """Write a host into the config file. Raises Conflict for a name that is there."""
    with held(folders.runtime, "the config file", timeout_s=_LOCK_S):
        before = config.load(path(folders))
        if entry.name in before.hosts:
            raise Conflict(
                f"cannot add host {entry.name}: the config file has it already, at {before.hosts[entry.name].uri}",
                hint=f"vmctl host remove {entry.name}",
            )
        text = _text(folders)
        _write(
            folders,
            (text.rstrip("\n") + "\n\n" if text.strip() else "") + table(entry),
            {**before.hosts, entry.name: entry},
            f"write [host.{entry.name}] with {', '.join(table(entry).splitlines()[1:])}",
        )


def remove(folders: Folders, name: str) -> HostEntry:
    """Take a host out of the config file. Raises NotFound."""
    with held(folders.runtime, "the config file", timeout_s=_LOCK_S):
        before = config.load(path(folders))
        gone = config.entry(name, before)
        if not gone.name:
            raise NotFound(f"cannot remove host {name}: that is no name of a host")
        left = {k: v for k, v in before.hosts.items() if k != name}
        _write(folders, without(_text(folders), name), left, f"take [host.{name}] out")
    return gone


def table(entry: HostEntry) -> str:
    """A host as TOML."""
    values = {key: value for key, value in entry._asdict().items() if key != "name"}
    lines = [f"{key} = {_quoted(value)}" for key, value in values.items() if value]
    return "\n".join([f"[host.{entry.name}]", *lines, ""])


def _quoted(value: str) -> str:
    import json

    return json.dumps(value)  # a JSON string is a basic string of TOML


def without(text: str, name: str) -> str:
    """A config file's text without the table of a host, from its header to the next."""
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        if _HEADER.match(line):
            inside = (
                re.match(rf"[ \t]*\[[ \t]*host[ \t]*\.[ \t]*[\"\']?{re.escape(name)}[\"\']?[ \t]*\]", line) is not None
            )
        if not inside:
            kept.append(line)
    return "".join(kept)


def _text(folders: Folders) -> str:
    found = path(folders)
    return found.read_bytes().decode() if found.exists() else ""  # its line ends, too, are left as they are


def _write(folders: Folders, text: str, hosts: dict[str, HostEntry], by_hand: str) -> None:
    """Replace the file, once what stands in the new one is what was meant, which else can be done ``by_hand``."""
    import tomllib

    target = path(folders).resolve()
    try:
        now: Settings | None = config.read(tomllib.loads(text), target)
    except (SpecError, tomllib.TOMLDecodeError):
        now = None
    if now is None or dict(now.hosts) != hosts:
        raise SpecError(
            f"cannot change config file {target}: its hosts are written in a way of their own", hint="edit it"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".config-", delete=False) as file:
            try:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
                if target.exists():
                    os.fchmod(file.fileno(), target.stat().st_mode & 0o777)
                Path(file.name).rename(target)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise VmctlError(
            f"cannot write config file {target}: {reason(error)}",
            hint=f"make it writable, or {by_hand} where it is made",
        ) from error
