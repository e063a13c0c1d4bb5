"""A user's own image as a base and steps, each step's result known by a digest of all that led to it.

A recipe is TOML:

    [image]
    name = "web"
    base = "debian-12"
    memory = "1G"                                  # of the guest the steps run in

    [[step]]
    name = "server"
    packages = ["nginx"]                           # by the guest's own package manager
    files = [{ from = "site.conf", to = "/etc/nginx/sites-enabled/site.conf", mode = "0644" }]
    run = ["systemctl enable nginx"]               # by sh, as root; a step does packages, files, run in this order
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmctl.errors import SpecError, reason
from vmctl.manifest import NAME
from vmctl.spec import parse_size_mib

_PACKAGE = r"[A-Za-z0-9][A-Za-z0-9.+_:=~-]*"
_MODE = r"0?[0-7]{3,4}"


@dataclass(frozen=True, slots=True)
class File:
    """A file (or folder, with all in it) of the user's and where it goes in the image. ``mode`` "": as it is."""

    source: Path
    target: str
    mode: str = ""


@dataclass(frozen=True, slots=True)
class BuildStep:
    """One step; ``commands`` are lines for sh."""

    name: str
    packages: tuple[str, ...] = ()
    files: tuple[File, ...] = ()
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayeredRecipe:
    """A base image and the steps on it."""

    name: str
    base: str
    memory_mib: int
    vcpus: int
    steps: tuple[BuildStep, ...]


def load(path: Path) -> LayeredRecipe:
    """Read a recipe; files are relative to it. Raises SpecError with every problem."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"cannot read recipe {path}: {reason(error)}") from error
    found: list[str] = []
    image = _table(values, "image", {"name", "base", "memory", "vcpus"}, "the recipe", found)
    found += [f"unknown part {key!r}" for key in values if key not in {"image", "step"}]
    for key, pattern in (("name", NAME), ("base", r"[a-z0-9][a-z0-9.-]*")):
        value = image.get(key, "")
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            found.append(f"image.{key} {value!r} is no image name")
    memory, vcpus = 1024, image.get("vcpus", 1)
    try:
        memory = parse_size_mib(str(image.get("memory", "1G")))
    except SpecError as error:
        found.append(error.message)
    if not isinstance(vcpus, int) or not 1 <= vcpus <= 64:
        found.append("image.vcpus is not between 1 and 64")
    steps = values.get("step")
    if not isinstance(steps, list) or not steps:
        found.append("it has no [[step]]")
        steps = []
    name = str(image.get("name", ""))
    if len(steps) > 1 and re.fullmatch(NAME, name) and not re.fullmatch(NAME, step_name(name, len(steps) - 1)):
        found.append("image.name is too long for the names of its steps")
    parsed = tuple(_step(number, one, path.parent, found) for number, one in enumerate(steps, 1))
    if found:
        raise SpecError(f"cannot use recipe {path}", problems=found, hint="the README shows one whole")
    return LayeredRecipe(image["name"], image["base"], memory, vcpus, parsed)


def step_name(name: str, number: int) -> str:
    """What the image after step ``number`` (from 1) on the way to image ``name`` is called."""
    return f"{name}.step{number}"


def _table(values: dict[str, Any], key: str, known: set[str], where: str, found: list[str]) -> dict[str, Any]:
    table = values.get(key)
    if not isinstance(table, dict):
        found.append(f"{where} has no [{key}]")
        return {}
    found += [f"{key}: unknown key {one!r}" for one in table if one not in known]
    return table


def _texts(value: Any, what: str, found: list[str]) -> tuple[str, ...]:
    if not isinstance(value, list) or any(not isinstance(one, str) or not one.strip() for one in value):
        found.append(f"{what} is no list of texts")
        return ()
    return tuple(value)


def _step(number: int, values: Any, folder: Path, found: list[str]) -> BuildStep:
    what = f"step {number}"
    if not isinstance(values, dict):
        found.append(f"{what} is no table")
        return BuildStep(what)
    found += [f"{what}: unknown key {key!r}" for key in values if key not in {"name", "packages", "files", "run"}]
    packages = _texts(values.get("packages", []), f"{what}: packages", found)
    found += [f"{what}: {one!r} is no package" for one in packages if not re.fullmatch(_PACKAGE, one)]
    files = values.get("files", [])
    if not isinstance(files, list):
        found.append(f"{what}: files is no list")
        files = []
    step = BuildStep(
        str(values.get("name", what)),
        packages,
        tuple(_file(what, one, folder, found) for one in files),
        _texts(values.get("run", []), f"{what}: run", found),
    )
    if not (step.packages or step.files or step.commands):
        found.append(f"{what} does nothing: it has no packages, files or run")
    return step


def _file(what: str, values: Any, folder: Path, found: list[str]) -> File:
    if not isinstance(values, dict) or not isinstance(values.get("from"), str) or not isinstance(values.get("to"), str):
        found.append(f"{what}: a file is not {{ from = …, to = … }}")
        return File(folder, "")
    found += [f"{what}: unknown key {key!r} of a file" for key in values if key not in {"from", "to", "mode"}]
    source = folder / values["from"]
    if source.name == "..":
        source = source.resolve()  # it needs a name in the guest
    file = File(source, values["to"], str(values.get("mode", "")))
    if not file.source.exists():
        found.append(f"{what}: there is no file {file.source}")
    if not file.target.startswith("/") or ".." in file.target.split("/") or "\n" in file.target:
        found.append(f"{what}: {file.target!r} is not an absolute path without '..'")
    if file.mode and not re.fullmatch(_MODE, file.mode):
        found.append(f"{what}: {file.mode!r} is no mode such as 0644")
    return file


def keys(recipe: LayeredRecipe, base_digest: str) -> tuple[str, ...]:
    """A digest for the result of each step: of the base, of all steps so far, and of what their files hold."""
    found, so_far = [], base_digest
    for step in recipe.steps:
        files = [[file.target, file.mode, _content(file.source)] for file in step.files]
        parts = [so_far, step.packages, files, step.commands]
        so_far = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        found.append(so_far)
    return tuple(found)


def _content(path: Path) -> str:
    summed = hashlib.sha256()
    for name, file in _walk(path):
        mode = file.lstat().st_mode
        body = str(file.readlink()).encode() if file.is_symlink() else file.read_bytes() if file.is_file() else b""
        summed.update(f"{name}\0{mode & 0o7777}\0{len(body)}\0".encode() + body)
    return summed.hexdigest()


def _walk(path: Path) -> Iterator[tuple[str, Path]]:
    yield "", path
    if path.is_dir() and not path.is_symlink():
        for below in sorted(path.rglob("*")):
            yield below.relative_to(path).as_posix(), below


def first_missing(wanted: Sequence[str], present: frozenset[str]) -> int:
    """From which step on work is to be done: after the last whose result is there."""
    return max((number for number, key in enumerate(wanted, 1) if key in present), default=0)
