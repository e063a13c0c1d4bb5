"""A recipe file, read and checked."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmctl.errors import ImageError, reason

_LIBRARIES = "usr/lib/x86_64-linux-gnu/*.so.*"


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
    sources: Path  # of the guest's init and of files as they are: the recipe's own folder, or its base's


def kind(path: Path) -> str:
    """Which builder a recipe is for. Raises ImageError."""
    try:
        return str(tomllib.loads(path.read_text())["kind"])
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"cannot read recipe {path}: {reason(error)}") from error


def _packages(values: Mapping[str, Any]) -> list[Package]:
    named = [
        Package(one["name"], tuple(one["files"]), one.get("depends", ""), one.get("kernel", False))
        for one in values.get("package", [])
    ]
    return named + [Package(name, (_LIBRARIES,)) for name in values.get("libraries", {}).get("packages", [])]


def _joined(base: Sequence[Package], own: Sequence[Package]) -> tuple[Package, ...]:
    """Packages of a recipe and its base: a kernel replaces the base's, of a package that both name all is taken."""
    kernel = any(package.kernel for package in own)
    found = {package.name: package for package in base if not (kernel and package.kernel)}
    for package in own:
        earlier = found.get(package.name)
        found[package.name] = replace(package, globs=(*earlier.globs, *package.globs)) if earlier else package
    return tuple(found.values())


def load(path: Path) -> Recipe:
    """Read a recipe, with what it has of its base. Raises ImageError for one that is not whole."""
    try:
        own = tomllib.loads(path.read_text())
        base, sources = dict[str, Any](), path.parent
        if "base" in own:
            sources = path.parent.parent / own["base"]
            base = tomllib.loads((sources / path.name).read_text())
        modules: dict[str, tuple[str, ...]] = {}
        for lists in (base.get("modules", {}), own.get("modules", {})):
            modules |= {moment: (*modules.get(moment, ()), *names) for moment, names in lists.items()}
        return Recipe(
            **{**base.get("image", {}), **own["image"]},
            packages=_joined(_packages(base), _packages(own)),
            modules=ModuleLists(**modules),
            cmdline=" ".join({**base, **own}["kernel"]["cmdline"]),
            sources=sources,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImageError(f"cannot read recipe {path}: {reason(error)}") from error
