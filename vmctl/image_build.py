"""Building images by recipe."""

from __future__ import annotations

from pathlib import Path

from vmctl import images
from vmctl.errors import ImageError, NotFound, reason
from vmctl.events import Reporter
from vmctl.hosts import Host
from vmctl.manifest import Manifest, NewImage
from vmctl.resources import image_recipes_dir


def recipes() -> tuple[str, ...]:
    """Names of the recipes that come with vmctl."""
    return tuple(sorted(path.parent.name for path in image_recipes_dir().glob("*/recipe.toml")))


def _require_known(name: str) -> None:
    if name not in recipes():
        known = ", ".join(recipes())
        raise NotFound(f"cannot build image {name}: there is no recipe of that name", hint=f"recipes: {known}")


def preview(host: Host, name: str) -> tuple[str, ...]:
    """What building an image would do. Raises as build() does before it changes anything."""
    _require_known(name)
    folder = image_recipes_dir() / name
    return (
        f"build it by {folder / 'recipe.toml'}, its packages fetched where they are not at hand",
        images.would_add(host, name),
    )


def build(host: Host, name: str, report: Reporter) -> Manifest:
    """Build image ``name`` by its recipe and put it into the store. Raises NotFound, ImageError."""
    _require_known(name)
    with images.making(host, name) as folder:
        try:
            return images.add(host, _built(name, folder, report), report)
        except OSError as error:
            raise ImageError(f"cannot build image {name}: {reason(error, path=True)}") from error


def _built(name: str, folder: Path, report: Reporter) -> NewImage:
    """The image as the builder of its recipe's kind makes it."""
    from vmctl.builder import debian, micro, recipe

    match recipe.kind(image_recipes_dir() / name / "recipe.toml"):
        case "micro":
            return micro.build(name, folder, report)
        case "debian":
            return debian.build(name, folder, report)
        case other:
            raise ImageError(f"cannot build image {name}: its recipe is of an unknown kind, {other!r}")
