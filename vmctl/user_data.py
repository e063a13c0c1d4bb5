"""What users add to a guest's first boot: user-data parts merged with ours, network-config, Ignition. Pure.

Kinds of user-data and the words that begin them are cloud-init's ("User data formats" in its documentation).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

CLOUD_CONFIG = "#cloud-config"
_LIMIT = 1 << 20  # bytes of one part; the micro image reads no more
_TYPES = {
    "#!": "x-shellscript",
    "#cloud-boothook": "cloud-boothook",
    "#include-once": "x-include-once-url",
    "#include": "x-include-url",
    "#part-handler": "part-handler",
    "#cloud-config-archive": "cloud-config-archive",
    "#cloud-config-jsonp": "cloud-config-jsonp",
    "## template: jinja": "jinja2",
}
_IGNITION_MAJOR = ("2.", "3.")


def _subtype(part: str) -> str | None:
    """The MIME subtype of a part that is no cloud-config; None for one that is, "" for one of no known kind."""
    first = part.lstrip("\ufeff").split("\n", 1)[0].strip()
    if first == CLOUD_CONFIG or first.startswith(CLOUD_CONFIG + " "):
        return None
    # Longest first: "#include-once" begins with "#include".
    return next((_TYPES[start] for start in sorted(_TYPES, key=len, reverse=True) if first.startswith(start)), "")


def _mapping(text: str) -> dict[str, Any]:
    """A YAML mapping. Raises ValueError, with the place of the fault where YAML names one."""
    import yaml  # late: most VMs are made without

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"is no YAML{where}: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError("is no mapping of keys to values")
    return found


def user_data_problems(what: str, part: str) -> list[str]:
    """Why a part cannot be user-data; ``what`` names it."""
    if len(part.encode(errors="replace")) > _LIMIT:
        return [f"{what} has more than {_LIMIT >> 20} MiB"]
    kind = _subtype(part)
    if kind == "":
        return [f"{what} begins with none of {CLOUD_CONFIG}, #! and the other words of cloud-init"]
    if kind is not None:
        return []
    try:
        values = _mapping(part)
    except ValueError as error:
        return [f"{what} {error}"]
    # The first login is verified by the host key vmctl plants: another one would look like an attack.
    return [f"{what} sets {key!r}, which vmctl does itself" for key in ("ssh_keys", "ssh_deletekeys") if key in values]


def network_config_problems(text: str) -> list[str]:
    """Why this cannot be a network-config of version 1 or 2."""
    try:
        values = _mapping(text)
    except ValueError as error:
        return [f"the network-config {error}"]
    inner = values.get("network", values)
    if not isinstance(inner, dict) or inner.get("version") not in (1, 2):
        return ["the network-config has no `version: 2` (or 1)"]
    if inner["version"] == 2 and not any(key in inner for key in ("ethernets", "bonds", "bridges", "vlans")):
        return ["the network-config of version 2 has no ethernets, bonds, bridges or vlans"]
    return []


def ignition_problems(text: str) -> list[str]:
    """Why this cannot be an Ignition config."""
    try:
        values = json.loads(text)
    except ValueError as error:
        return [f"the Ignition config is no JSON: {error}"]
    except RecursionError:
        return ["the Ignition config is nested too deeply"]
    about = values.get("ignition") if isinstance(values, dict) else None
    version = about.get("version", "") if isinstance(about, dict) else ""
    if not str(version).startswith(_IGNITION_MAJOR):
        return ["the Ignition config has no ignition.version of 2.x or 3.x (Butane YAML must be transpiled first)"]
    return []


def _merge(into: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged, lists appended, of anything else the later one counts."""
    for key, value in more.items():
        have = into.get(key)
        if isinstance(have, dict) and isinstance(value, dict):
            into[key] = _merge(have, value)
        elif isinstance(have, list) and isinstance(value, list):
            into[key] = [*have, *value]
        else:
            into[key] = value
    return into


def _dumped(values: dict[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """One that keeps texts of several lines readable: keys and scripts."""

    def text(dumper: yaml.SafeDumper, value: str) -> Any:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    body = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)
    return f"{CLOUD_CONFIG}\n{body}"


def combined(ours: str, parts: Sequence[str]) -> str:
    """Our cloud-config with the user's parts: one cloud-config, or multipart MIME where a part is something else."""
    if not parts:
        return ours
    values = _mapping(ours)
    others = []
    for part in parts:
        kind = _subtype(part)
        if kind is None:
            _merge(values, _mapping(part))
        else:
            others.append((kind, part))
    config = _dumped(values)
    return _multipart(config, others) if others else config


def needs_cloud_init(parts: Sequence[str]) -> bool:
    """Whether a part is something only cloud-init itself can act on."""
    return any(_subtype(part) is not None for part in parts)


def _multipart(config: str, others: Sequence[tuple[str, str]]) -> str:
    from email.mime.multipart import MIMEMultipart
    from email.mime.text import MIMEText

    # A boundary of its own, not a random one: equal specs give equal seeds. No line of user-data can be it by chance.
    message = MIMEMultipart("mixed", boundary="==vmctl-user-data-part==")
    for number, (kind, text) in enumerate([("cloud-config", config), *others], 1):
        part = MIMEText(text, kind, "utf-8")
        part.add_header("Content-Disposition", "attachment", filename=f"part-{number:03d}")
        message.attach(part)
    return message.as_string()
