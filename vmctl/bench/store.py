"""Where results are kept: one JSON file each, put there whole; checked against the published schema when read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmctl import json_schema
from vmctl.errors import NotFound, SpecError, VmctlError, reason

_NOT_READ = (OSError, ValueError, RecursionError)  # JSON can be nested deeper than its reader goes
_MOST, _LEAST = 1e30, 1e-30  # of any unit: arithmetic goes wrong with larger and smaller ones
_SCHEMA = Path(__file__).with_name("result.schema.json")
LATEST = "latest"


def schema() -> dict[str, Any]:
    """The published JSON Schema of results."""
    found: dict[str, Any] = json.loads(_SCHEMA.read_text())
    return found


@dataclass(frozen=True, slots=True)
class Kept:
    """A result in the folder, as a list tells of it; ``problem`` says why one cannot be read."""

    id: str
    workload: str = ""
    made: str = ""
    accelerator: str = ""
    complete: bool = False
    problem: str = ""


def folder(data: Path) -> Path:
    """The folder of results among vmctl's own data."""
    return data / "bench"


def new_id(place: Path, workload: str, made: str) -> str:
    """A name for a result made at that time (ISO 8601), which no other has."""
    stem = f"{workload}-{made[:19].replace('-', '').replace(':', '').replace('T', '-')}"
    names = (stem if not n else f"{stem}-{n + 1}" for n in range(1000))
    return next(name for name in names if not (place / f"{name}.json").exists())


def write(place: Path, values: Mapping[str, Any], what: str = "result") -> Path:
    """Keep a result, or a run of many, in place of an earlier state of it. Raises VmctlError."""
    path = place / f"{values['id']}.json"
    with suppress(OSError):  # which is told of below
        place.mkdir(parents=True, exist_ok=True)
    put(path, json.dumps(values).encode(), f"keep the {what}")
    return path


def put(path: Path, data: bytes, doing: str, *, mode: int = 0o600) -> None:
    """Write a file whole, in the place of another. Raises VmctlError, of it NotFound and SpecError about folders."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(handle, mode)
                file.write(data)
            Path(name).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        if path.is_dir():
            raise SpecError(f"cannot {doing}: it is a folder", hint=f"{path}/FILE") from error
        if not path.parent.exists():
            what = f"there is no folder {path.parent}"
            raise NotFound(f"cannot {doing}: {what}", hint=f"mkdir -p {path.parent}") from error
        raise VmctlError(f"cannot {doing}: {reason(error, path=True)}", hint=f"is {path.parent} writable?") from error


def files(place: Path) -> Iterator[Path]:
    """What may be results and runs, there; a pipe of such a name would be waited for."""
    return (path for path in place.glob("*.json") if not path.is_fifo())


def kept(place: Path) -> tuple[Kept, ...]:
    """All results of the folder, oldest first."""
    found = [_brief(path) for path in files(place)]
    return tuple(sorted(found, key=lambda one: (one.made, one.id)))


def _brief(path: Path) -> Kept:
    try:
        values = json.loads(path.read_text())
        return Kept(
            path.stem,
            str(values["workload"]),
            str(values["made"]),
            str(values["dimensions"].get("accelerator", "")),
            bool(values["complete"]),
        )
    except (*_NOT_READ, KeyError, TypeError, AttributeError) as error:
        return Kept(path.stem, problem=f"cannot be read: {reason(error)}")


def read(path: Path) -> Any:
    """What a file of JSON holds, with no number that could not be one of a measurement.

    Raises OSError, ValueError, RecursionError.
    """
    return json.loads(path.read_text(), parse_int=_whole, parse_float=_number, parse_constant=_number)


def _whole(text: str) -> int:
    _number(text)
    return int(text)


def _number(text: str) -> float:
    found = float(text)
    if not (found == 0 or _LEAST <= abs(found) <= _MOST):  # so that NaN is refused, too
        raise ValueError(f"{text[:30]} is no figure of a measurement")
    return found


def find(place: Path, named: str) -> dict[str, Any]:
    """The result of that id, of that file, or the latest. Raises NotFound, or SpecError for what is none."""
    if named == LATEST:
        readable = [one for one in kept(place) if not one.problem]
        if not readable:
            raise NotFound(
                "cannot find a result: none is kept yet", hint="vmctl bench trap makes one, or vmctl bench io"
            )
        named = readable[-1].id
    path = Path(named) if "/" in named or named.endswith(".json") else place / f"{named}.json"
    try:
        values = read(path)
    except FileNotFoundError:
        hint = f"a run: `vmctl bench report {named}`" if named.startswith("run-") else "see `vmctl bench list`"
        raise NotFound(f"cannot find result {named}: there is none", hint=hint) from None
    except _NOT_READ as error:
        raise SpecError(
            f"cannot read result {named}: {reason(error)}", hint="is it a result of vmctl bench?"
        ) from error
    problems = [f"{error.where or 'it'}: {error.message}" for error in json_schema.errors(schema(), values)]
    if problems:
        raise SpecError(f"cannot use result {named}", problems=problems[:5], hint="was it made by another vmctl?")
    found: dict[str, Any] = values
    return found
