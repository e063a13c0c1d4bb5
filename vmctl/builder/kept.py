"""Finished builds in the user's cache, where an equal build finds them: nothing is unpacked and compiled again."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from vmctl.builder import debs
from vmctl.events import Reporter, Step

_KEPT = 3


def taken_or_made(
    name: str,
    sources: Path,
    apt: debs.Apt,
    found: Sequence[debs.Deb],
    files: Sequence[str],
    out_dir: Path,
    make: Callable[[list[Path]], None],
    report: Reporter,
) -> list[Path]:
    """The ``files`` of a build by the recipe in ``sources``, as they lie in the cache.

    Where no equal build is there, ``make`` gets the packages' files and writes them into ``out_dir``.
    """
    built = debs.cache_folder() / "built" / f"{name}-{_input_digest(sources, found)}"
    if _whole(built, files):
        report(Step("recipe and packages are those of the last build, which is taken"))
    else:
        make(debs.fetch(apt, found, debs.cache_folder() / "debs", report))
        _keep(out_dir, built, name, files)
    return [built / file for file in files]


def _input_digest(sources: Path, found: Sequence[debs.Deb]) -> str:
    """A digest of all that a build depends on: packages, recipe, and the code that puts them together."""
    digest = hashlib.sha256("\n".join(deb.filename for deb in found).encode())
    for folder in (sources, sources.parent / "micro", Path(__file__).parent):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                digest.update(f"{path.relative_to(folder)} {path.stat().st_mode & 0o100}\n".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _whole(built: Path, files: Sequence[str]) -> bool:
    return all((built / name).is_file() for name in files)


def _keep(out_dir: Path, built: Path, name: str, files: Sequence[str]) -> None:
    """Move a finished build into the cache, in one step, in place of the oldest of that name.

    A few stay, for checkouts that build differently and share the cache would else take turns at building.
    """
    built.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=built.parent) as folder:
        for file in files:
            shutil.move(out_dir / file, Path(folder) / file)
        others = sorted(built.parent.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in others[_KEPT - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
        made = Path(folder) / "whole"
        made.mkdir(mode=0o755)
        for file in files:
            (Path(folder) / file).rename(made / file)
        try:
            made.rename(built)
        except OSError:
            if not _whole(built, files):  # another build, at the same time, of the same
                raise
