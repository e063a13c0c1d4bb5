"""Settings: the config file, and the folders vmctl uses, by the XDG base directory specification."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from vmctl.errors import NotFound, SpecError, reason

_HOSTS = "host"
AUTO = "auto"  # no host in particular: no host is called that


class HostEntry(NamedTuple):
    """A host by its name: how it is reached from here, the SSH key it must show, and how other hosts reach it.

    ``peer`` "": by ``uri`` without what concerns this machine only; ``address``, for the data of migrations, "": the
    one in ``uri``.
    """

    name: str
    uri: str
    host_key: str = ""
    peer: str = ""
    address: str = ""


class Settings(NamedTuple):
    """What the config file may set. ``connect`` "" means: choose by what answers."""

    connect: str = ""
    network: str = "vmctl"
    pool: str = "vmctl"
    image_pool: str = "vmctl-images"
    ssh_key: str = ""
    backups: str = ""
    hosts: Mapping[str, HostEntry] = MappingProxyType({})


class Folders(NamedTuple):
    """Where vmctl keeps its own few files."""

    config: Path
    data: Path
    cache: Path
    runtime: Path


def folders(env: Mapping[str, str] = os.environ) -> Folders:
    """The folders for this user; none is made here."""
    home = Path(env.get("HOME") or Path.home())

    def base(variable: str, default: str) -> Path:
        value = env.get(variable, "")
        return (Path(value) if value.startswith("/") else home / default) / "vmctl"

    runtime = env.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        run = Path(runtime) / "vmctl"
    else:
        run = Path("/run/vmctl") if os.geteuid() == 0 else base("XDG_CACHE_HOME", ".cache") / "run"
    return Folders(
        config=base("XDG_CONFIG_HOME", ".config"),
        data=base("XDG_DATA_HOME", ".local/share"),
        cache=base("XDG_CACHE_HOME", ".cache"),
        runtime=run,
    )


def load(path: Path) -> Settings:
    """Read the config file; a missing one is all defaults. Raises SpecError that names every problem."""
    if not path.exists():
        return Settings()
    import tomllib  # late: most runs have no config file, and all pay for an import

    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(
            f"cannot read config file {path}: {reason(error)}", hint='it is TOML: connect = "qemu:///system"'
        ) from error
    return read(values, path)


def read(values: Mapping[str, Any], path: Path) -> Settings:
    """The settings in a parsed config file. Raises SpecError that names every problem."""
    known = {*Settings._fields} - {"hosts"} | {_HOSTS}
    problems = [f"unknown key {key!r}" for key in values if key not in known]
    plain = {key: value for key, value in values.items() if key in known and key != _HOSTS}
    problems += [f"{key} is not a string" for key, value in plain.items() if not isinstance(value, str)]
    tables = values.get(_HOSTS, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        problems.append(f"{_HOSTS} is not made of tables such as [{_HOSTS}.one]")
        tables = {}
    for name, table in tables.items():
        problems += _host_problems(name, table)
    if problems:
        raise SpecError(
            f"cannot use config file {path}", problems=problems, hint="known keys: " + ", ".join(sorted(known))
        )
    return Settings(**plain, hosts={name: HostEntry(name, **table) for name, table in tables.items()})


def _host_problems(name: str, table: Mapping[str, Any]) -> list[str]:
    known = [one for one in HostEntry._fields if one != "name"]
    where = f"[{_HOSTS}.{name}]"
    problems = [f"unknown key {key!r} in {where}" for key in table if key not in known]
    problems += [f"{key} in {where} is not a string" for key in table if not isinstance(table[key], str)]
    if "uri" not in table:
        problems.append(f"no uri in {where}")
    for key in ("uri", "peer"):
        if isinstance(uri := table.get(key), str) and not readable(uri):
            problems.append(f"{key} in {where} is no URI: {uri}")
    return problems


def readable(uri: str) -> bool:
    """Whether a URI can be taken apart, which all that use it do; that of a bracket left open cannot."""
    try:
        urlsplit(uri)
    except ValueError:
        return False
    return True


def backup_folder(flag: Path | None, settings: Settings, own: Folders) -> Path:
    """Where backups are kept: where the flag says, or the config file, or among vmctl's own files."""
    return flag or (Path(settings.backups).expanduser() if settings.backups else own.data / "backups")


def chosen_uri(flag: str | None, env: Mapping[str, str], settings: Settings) -> str:
    """The URI to connect to, by precedence: flag, VMCTL_CONNECT, LIBVIRT_DEFAULT_URI, config file; "" for none."""
    return flag or env.get("VMCTL_CONNECT") or env.get("LIBVIRT_DEFAULT_URI") or settings.connect


def chosen_entry(flag: str | None, settings: Settings, env: Mapping[str, str] = os.environ) -> HostEntry:
    """The host to connect to, by the same precedence, else this machine. Raises NotFound."""
    uri = chosen_uri(flag, env, settings)
    return entry(uri, settings) if uri else HostEntry("", "qemu:///system")


def entry(text: str, settings: Settings) -> HostEntry:
    """The host that a name or URI means; one by its URI has no name and no key. Raises NotFound, SpecError."""
    if text in settings.hosts:
        return settings.hosts[text]
    if ":" not in text:
        hint = f"known: {', '.join(settings.hosts)}" if settings.hosts else "vmctl host add NAME URI makes one known"
        if not text:
            raise SpecError("cannot find a host by an empty name", hint=hint)
        raise NotFound(f"cannot find host {text}: the config file has none of that name", hint=hint)
    if not readable(text):
        raise SpecError(
            f"cannot find host {text}: it is no URI",
            hint="such as qemu+ssh://root@host/system; an IPv6 address stands in brackets",
        )
    return HostEntry("", text)
