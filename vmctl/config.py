"""Settings: the config file, and the folders vmctl uses, by the XDG base directory specification."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from vmctl.errors import SpecError, reason


@dataclass(frozen=True, slots=True)
class Settings:
    """What the config file may set. ``connect`` "" means: choose by what answers."""

    connect: str = ""
    network: str = "vmctl"
    pool: str = "vmctl"
    image_pool: str = "vmctl-images"
    ssh_key: str = ""
    backups: str = ""


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
    known = {field.name for field in fields(Settings)}
    problems = [f"unknown key {key!r}" for key in values if key not in known]
    problems += [
        f"{key} is not a string" for key, value in values.items() if key in known and not isinstance(value, str)
    ]
    if problems:
        raise SpecError(
            f"cannot use config file {path}", problems=problems, hint="known keys: " + ", ".join(sorted(known))
        )
    return Settings(**values)


def backup_folder(flag: Path | None, settings: Settings, own: Folders) -> Path:
    """Where backups are kept: where the flag says, or the config file, or among vmctl's own files."""
    return flag or (Path(settings.backups).expanduser() if settings.backups else own.data / "backups")


def chosen_uri(flag: str | None, env: Mapping[str, str], settings: Settings) -> str:
    """The URI to connect to, by precedence: flag, VMCTL_CONNECT, LIBVIRT_DEFAULT_URI, config file; "" for none."""
    return flag or env.get("VMCTL_CONNECT") or env.get("LIBVIRT_DEFAULT_URI") or settings.connect
