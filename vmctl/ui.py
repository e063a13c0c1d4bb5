"""What is printed at the end: results to stdout, errors to stderr. Progress on the way is told by progress.py."""

from __future__ import annotations

import dataclasses
import os
import select
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import PurePath
from typing import IO, Any

from vmctl.errors import GuestCommandFailed, Interrupted, PartialFailure, PreflightFailed, VmctlError, WaitTimeout
from vmctl.events import bytes_in_words


class Output(StrEnum):
    """How a result is printed."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


class Verbosity(StrEnum):
    """How much progress is told."""

    QUIET = "quiet"
    NORMAL = "normal"
    VERBOSE = "verbose"


def _colored(stream: IO[str]) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, code: str, stream: IO[str]) -> str:
    """``text`` in an ANSI style where the stream is a terminal that wants it."""
    return f"\x1b[{code}m{text}\x1b[0m" if _colored(stream) else text


def visible(text: str) -> str:
    """Text from elsewhere (guests, other tools) made safe for one line of a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


size = bytes_in_words


def duration(seconds: float | None) -> str:
    """A time span for people; "" for None."""
    if seconds is None:
        return ""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def memory(mib: int) -> str:
    """MiB for people."""
    return f"{mib // 1024}G" if mib >= 1024 and mib % 1024 == 0 else f"{mib}M"


def jsonable(value: Any) -> Any:
    """Plain lists, dicts, strings and numbers of a result."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "to_json"):
            return value.to_json()
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):  # a NamedTuple
        return jsonable(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, StrEnum | PurePath):
        return str(value)
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [jsonable(item) for item in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value


def emit(value: Any, output: Output, table: Callable[[], str], names: Callable[[], Iterable[str]]) -> None:
    """Print a result in the form asked for."""
    if output is Output.JSON:
        import json

        print(json.dumps(jsonable(value), indent=2, ensure_ascii=False))
    elif output is Output.YAML:
        import yaml

        print(yaml.safe_dump(jsonable(value), sort_keys=False, allow_unicode=True), end="")
    elif output is Output.NAME:
        for name in names():
            print(name)
    else:
        print(table())


def say(text: str) -> None:
    """One line of result."""
    print(text)


def write(text: str) -> None:
    """Result text as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """One line for people, beside the result."""
    print(text, file=sys.stderr, flush=True)


def heading(text: str) -> str:
    """Text that stands out on stderr."""
    return paint(text, "1", sys.stderr)


def clear_or_blank(*, first: bool = False) -> None:
    """Begin a new picture of something watched: on a clean screen, or but for the ``first`` after a blank line."""
    write("\x1b[H\x1b[2J" if sys.stdout.isatty() else "" if first else "\n")


def emit_again(value: Any, output: Output, table: Callable[[], str], names: Callable[[], Iterable[str]]) -> None:
    """Print one of many results that come one after the other; JSON on one line, so that a reader knows its end."""
    if output is Output.JSON:
        import json

        print(json.dumps(jsonable(value), ensure_ascii=False))
    else:
        if output is Output.YAML:
            print("---")
        emit(value, output, table, names)
    sys.stdout.flush()


def require_reader() -> None:
    """Raise BrokenPipeError when nobody reads our output any more, which otherwise shows at the next line only."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return  # not a file of the system's
    if any(events & select.POLLERR for _, events in poll.poll(0)):
        raise BrokenPipeError


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An aligned table; the last column is not padded."""
    lines = [list(header), *([visible(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def fields(pairs: Iterable[tuple[str, str]]) -> str:
    """Name and value, a line each; further lines of a value are indented below its first."""
    kept = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in kept), default=0)
    lines = []
    for name, value in kept:
        first, *rest = value.splitlines() or [""]
        lines.append(f"{name.ljust(width)}  {visible(first)}")
        lines += [" " * (width + 2) + visible(line) for line in rest]
    return "\n".join(lines)


def tell_error(error: VmctlError | Interrupted) -> None:
    """The error and its hint on stderr, with the evidence of a wait and the parts of a partial failure."""
    print(paint(visible(error.message), "31", sys.stderr), file=sys.stderr)
    if isinstance(error, WaitTimeout | GuestCommandFailed):
        for line in error.evidence:
            print(f"  {visible(line)}", file=sys.stderr)
    _tell_problems(error, "  ")
    if isinstance(error, PartialFailure):
        for name, cause in error.failures.items():
            print(f"  {name}: {visible(cause.message)}", file=sys.stderr)
            _tell_problems(cause, "    ")
            if cause.hint:
                print(f"    hint: {visible(cause.hint)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {visible(error.hint)}", file=sys.stderr)


def _tell_problems(error: VmctlError | Interrupted, margin: str) -> None:
    """Everything that was found against it, each with its mend."""
    if isinstance(error, PreflightFailed):
        for what, mend in error.problems:
            print(f"{margin}{visible(what)}" + (f"\n{margin}  mend: {visible(mend)}" if mend else ""), file=sys.stderr)


def confirm(question: str) -> bool:
    """Ask on the terminal; no answer is no."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def interactive() -> bool:
    """Whether there is a person to ask."""
    return sys.stdin.isatty() and sys.stderr.isatty()
