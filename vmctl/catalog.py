"""The image catalogue: which images can be pulled by name.

The one that comes with vmctl is images/catalog.toml; users' own stand in catalog.d/ of the configuration folder and are
read in the order of their names, later ones replacing images of the same name. images/catalog.schema.json, published
for editors, is what they are checked against.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmctl import json_schema
from vmctl.errors import NotFound, SpecError, reason
from vmctl.json_schema import Problem
from vmctl.order import natural
from vmctl.resources import image_recipes_dir

_CLOSE = 0.6


@dataclass(frozen=True, slots=True)
class Entry:
    """An image that can be pulled. Either ``checksum`` is given, or the file it is in and its kind.

    ``max_size`` is what the download may come to, such as 8G.
    """

    name: str
    os: str
    os_version: str
    architecture: str
    url: str
    default_user: str
    boots: tuple[str, ...]
    checksum: str = ""
    checksum_url: str = ""
    checksum_kind: str = ""
    osinfo: str = ""
    max_size: str = "8G"
    aliases: tuple[str, ...] = ()
    catalogue: str = ""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All entries, and which entry each alias means."""

    entries: tuple[Entry, ...]
    aliases: Mapping[str, str]


def schema() -> dict[str, Any]:
    """The published JSON Schema."""
    found: dict[str, Any] = json.loads((image_recipes_dir() / "catalog.schema.json").read_text())
    return found


def load(users: Path) -> Catalogue:
    """The whole catalogue, with the ``*.toml`` of the folder ``users``, if there is one.

    Raises SpecError that names the file and every problem in it. vmctl's own is not checked here: a test does.
    """
    own = image_recipes_dir() / "catalog.toml"
    entries = {entry.name: entry for entry in _entries(own, _read(own))}
    aliases = {alias: entry.name for entry in entries.values() for alias in entry.aliases}
    for path in sorted(users.glob("*.toml")):
        values = _read(path)
        if problems := check(values):
            raise SpecError(f"cannot use catalogue {path}", problems=problems, hint="mend it, or move it away")
        for entry in _entries(path, values):
            entries[entry.name] = entry
            aliases |= dict.fromkeys(entry.aliases, entry.name)
    for entry in entries.values():
        aliases.pop(entry.name, None)  # a name goes before an alias
    kept = tuple(sorted(entries.values(), key=lambda entry: natural(entry.name)))
    return Catalogue(kept, {alias: name for alias, name in aliases.items() if alias in entries[name].aliases})


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"cannot use catalogue {path}: {reason(error)}", hint="mend it, or move it away") from error


def _entries(path: Path, values: Mapping[str, Any]) -> Iterable[Entry]:
    for one in values["image"]:
        lists = {key: tuple(one.get(key, ())) for key in ("boots", "aliases")}
        yield Entry(**{**one, **lists, "catalogue": str(path)})


def check(values: Mapping[str, Any]) -> list[str]:
    """Every problem of a catalogue as read from its file; none when it can be used."""
    problems = [_told(values, error) for error in json_schema.errors(schema(), values)]
    return problems or _clashes([(one["name"], one.get("aliases", [])) for one in values["image"]])


def _told(values: Mapping[str, Any], error: Problem) -> str:
    path = error.path
    either = "give either checksum, or checksum_url with checksum_kind"
    what = either if error.keyword == "oneOf" else error.message
    if len(path) < 2:
        return f"{path[0]}: {what}" if path else what
    one = values["image"][path[1]]
    name = one.get("name") if isinstance(one, dict) else None
    where = f"image {name}" if isinstance(name, str) else f"image number {int(path[1]) + 1}"
    return f"{where}: {path[2]}: {what}" if len(path) > 2 else f"{where}: {what}"


def _clashes(named: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    owners: dict[str, list[str]] = {}
    for name, aliases in named:
        for one in (name, *aliases):
            owners.setdefault(one, []).append(name)
    return [f"{one} stands for {' and '.join(names)}" for one, names in owners.items() if len(names) > 1]


def find(catalogue: Catalogue, name: str) -> Entry:
    """The entry of that name or alias. Raises NotFound."""
    wanted = catalogue.aliases.get(name, name)
    for entry in catalogue.entries:
        if entry.name == wanted:
            return entry
    from difflib import get_close_matches

    known = [*catalogue.aliases, *(entry.name for entry in catalogue.entries)]
    close = ", ".join(get_close_matches(name, known, cutoff=_CLOSE))
    hint = f"did you mean {close}?" if close else "see `vmctl image search`"
    raise NotFound(f"cannot find image {name}: no catalogue has it", hint=hint)


def search(catalogue: Catalogue, term: str) -> tuple[Entry, ...]:
    """The entries with ``term`` in name, alias or operating system; all for ""."""
    low = term.lower()
    return tuple(
        entry for entry in catalogue.entries if any(low in text for text in (entry.name, entry.os, *entry.aliases))
    )
