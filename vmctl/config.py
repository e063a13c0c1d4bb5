"""Settings: the config file, and the folders vmctl uses, by the XDG base directory specification."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from vmctl.errors import NotFound, SpecError, reason

_HOSTS = "host"
AUTO = "auto"  # no host in particular: no host is called that
_NAME, _ADDRESS = re.compile("[A-Za-z0-9][A-Za-z0-9._-]*"), re.compile(r"[A-Za-z0-9._:%\[\]-]+")
# How a host of QEMU's guests is reached, and what else libvirt drives, which a URI may name but no host be.
_WAYS = frozenset({"", "unix", "ssh", "libssh", "libssh2", "tls", "tcp", "ext"})
_DRIVERS = frozenset(
    "qemu test lxc xen ch vz parallels bhyve vbox esx vpx gsx hyperv vmwareplayer vmwarews vmwarefusion openvz".split()
)


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


_ENTRY_KEYS = tuple(one for one in HostEntry._fields if one != "name")


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
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return Settings()
    except OSError as error:
        raise SpecError(
            f"cannot read config file {path}: {reason(error)}", hint="XDG_CONFIG_HOME names another"
        ) from error
    import tomllib  # late: most runs have no config file, and all pay for an import

    try:
        values = tomllib.loads(text.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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
        unknown = [one.endswith("]") for one in problems if one.startswith("unknown key")]  # of a host, or not
        hint = "; ".join(
            ["known keys: " + ", ".join(sorted(known))] * (False in unknown)
            + ["known keys of a host: " + ", ".join(_ENTRY_KEYS)] * (True in unknown)
        )
        raise SpecError(f"cannot use config file {path}", problems=problems, hint=hint or "edit it")
    return Settings(**plain, hosts={name: HostEntry(name, **table) for name, table in tables.items()})


def _host_problems(name: str, table: Mapping[str, Any]) -> list[str]:
    known = _ENTRY_KEYS
    where = f"[{_HOSTS}.{name}]"
    problems = [f"unknown key {key!r} in {where}" for key in table if key not in known]
    plain = {key: value for key, value in table.items() if key in known}
    problems += [f"{key} in {where} is not a string" for key, value in plain.items() if not isinstance(value, str)]
    if "uri" not in table:
        problems.append(f"no uri in {where}")
    if name == AUTO or _NAME.fullmatch(name) is None:
        problems.append(f"{name!r} in {where} is no name for a host")
    for key in ("uri", "peer"):
        if isinstance(uri := table.get(key), str) and not (key == "peer" and not uri) and not of_qemu(uri):
            problems.append(f"{key} in {where} is no URI of a libvirt host: {uri!r}")
    address = table.get("address")
    if isinstance(address, str) and address and not is_address(address):
        problems.append(f"address in {where} is none: {address!r}")
    return problems


def of_qemu(uri: str) -> bool:
    """Whether it is a URI of a libvirt that drives QEMU, which a host of vmctl's is."""
    driver, _, way = urlsplit(uri).scheme.partition("+") if readable(uri) else ("", "", "")
    return driver == "qemu" and way in _WAYS


def is_address(text: str) -> bool:
    """Whether it may be a name or an address of a machine, without a port."""
    return _ADDRESS.fullmatch(text) is not None and (":" not in text or text.count(":") > 1)


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


def chosen(flag: str | None, settings: Settings, env: Mapping[str, str] = os.environ) -> HostEntry | None:
    """The host to connect to, by precedence: flag, VMCTL_CONNECT, LIBVIRT_DEFAULT_URI, config file; None for none.

    Raises NotFound, SpecError, which say who named it where that was not the command line.
    """
    if flag:
        return entry(flag, settings)
    for variable in ("VMCTL_CONNECT", "LIBVIRT_DEFAULT_URI"):
        if text := env.get(variable):
            return entry(text, settings, by=f"{variable} names it")
    return entry(settings.connect, settings, by="`connect` in the config file names it") if settings.connect else None


def chosen_entry(flag: str | None, settings: Settings) -> HostEntry:
    """The host to connect to, by the same precedence, else this machine. Raises as ``chosen`` does."""
    return chosen(flag, settings) or HostEntry("", "qemu:///system")


def by_name(text: str, entry: HostEntry) -> str:
    """What is told of a host, which calls it by its URI, with the name that it has in the config file. Pure."""
    return re.sub(re.escape(entry.uri) + r"(?![\w/?&=%])", lambda _: entry.name, text) if entry.name else text


def entry(text: str, settings: Settings, *, by: str = "") -> HostEntry:
    """The host that a name or URI means; one by its URI has no name and no key. Raises NotFound, SpecError.

    ``by`` tells a user who did not type it where it stands.
    """
    if text in settings.hosts:
        return settings.hosts[text]
    by = f"{by}; " if by else ""
    if ":" not in text:
        hint = f"known: {', '.join(settings.hosts)}" if settings.hosts else "vmctl host add NAME URI makes one known"
        if not text:
            raise SpecError("cannot find a host by an empty name", hint=hint)
        raise NotFound(f"cannot find host {text}: the config file has none of that name", hint=by + hint)
    if not readable(text) or urlsplit(text).scheme.partition("+")[0] not in _DRIVERS:
        raise SpecError(
            f"cannot find host {text}: it is no URI" + (" of libvirt's" if readable(text) else ""),
            hint=f"{by}such as qemu+ssh://root@host/system; an IPv6 address stands in brackets",
        )
    return HostEntry("", text)
