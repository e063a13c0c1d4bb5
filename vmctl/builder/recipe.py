"""A recipe file, read and checked."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmctl.errors import ImageError, reason


@dataclass(frozen=True, slots=True)
class Package:
    """A Debian package and the globs of what is taken of it; ``depends`` takes a dependency in its place."""

    name: str
    globs: tuple[str, ...]
    depends: str = ""
    kernel: bool = False


@dataclass(frozen=True, slots=True)
class ModuleLists:
    """Kernel modules by the moment they are loaded; ``extra`` are only there for modprobe."""

    bus: tuple[str, ...]
    disk: tuple[str, ...]
    net: tuple[str, ...]
    late: tuple[str, ...]
    extra: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an image is made of."""

    os_name: str
    release: str
    architecture: str
    debian_architecture: str
    default_user: str
    size_mib: int
    epoch: int
    packages: tuple[Package, ...]
    modules: ModuleLists
    cmdline: str


def kind(path: Path) -> str:
    """Which builder a recipe is for. Raises ImageError."""
    try:
        return str(tomllib.loads(path.read_text())["kind"])
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"cannot read recipe {path}: {reason(error)}") from error


def _package(values: dict[str, Any]) -> Package:
    return Package(values["name"], tuple(values["files"]), values.get("depends", ""), values.get("kernel", False))


def load(path: Path) -> Recipe:
    """Read a recipe. Raises ImageError for one that is not whole."""
    try:
        values = tomllib.loads(path.read_text())
        return Recipe(
            **values["image"],
            packages=tuple(_package(package) for package in values["package"]),
            modules=ModuleLists(**{moment: tuple(names) for moment, names in values["modules"].items()}),
            cmdline=" ".join(values["kernel"]["cmdline"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImageError(f"cannot read recipe {path}: {reason(error)}") from error
