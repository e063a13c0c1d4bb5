"""Where vmctl's own data files are: templates/, images/ and the bare-metal guests.

In a checkout (and an editable install) they stand beside the package; in a wheel they are inside it.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _data(name: str) -> Path:
    bundled = _PACKAGE / "_data" / name
    return bundled if bundled.is_dir() else _PACKAGE.parent / name


def templates_dir() -> Path:
    """The folder with the Jinja templates."""
    return _data("templates")


def image_recipes_dir() -> Path:
    """The folder with one sub-folder per image recipe."""
    return _data("images")


def baremetal_guest(name: str) -> Path:
    """The compiled bare-metal guest ``name``; the build hook makes it when the package is built."""
    return _PACKAGE / "baremetal" / f"{name}.elf"


def readonly_virtiofsd() -> Path:
    """The script that libvirt starts in virtiofsd's place for a folder that is to be read-only."""
    return _PACKAGE / "virtiofsd-readonly"


def recipe_source(name: str) -> str:
    """What the manifest of an image says it was built by: one of vmctl's recipes, in the version it has now."""
    import hashlib
    import tomllib

    folder, digest = image_recipes_dir() / name, hashlib.sha256()
    base = tomllib.loads((folder / "recipe.toml").read_text()).get("base", "")
    for place in (folder, *([image_recipes_dir() / base] if base else ())):
        for path in sorted(place.rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(place)}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return f"recipe {name} {digest.hexdigest()[:12]}"
