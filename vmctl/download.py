"""Downloads that survive what networks and servers do: resumed, retried, and never longer or shorter than promised.

The bytes stand in a file of the caller's, ``NAME.partial``, and beside it ``NAME.partial.json`` says where they came
from. Both stay after a failure or a kill, for the next try to go on from.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from vmctl import web
from vmctl.errors import ImageError, NoRoom, NotFound
from vmctl.events import Progress, Reporter, Step, Warned, bytes_in_words
from vmctl.wait import pause
from vmctl.web import Answer, Temporary

T = TypeVar("T")
_RANGE = re.compile(r"bytes (?P<first>\d+)-\d+/(?P<total>\d+|\*)")
_UNSATISFIED = re.compile(r"bytes \*/(?P<total>\d+)")
# So many tries in a row that bring nothing go to the same mirror; then the site may choose another one.
_SAME_PLACE = 2
_LONGEST_WAIT_S = 30.0
_LARGEST_TEXT = 4 << 20
_MIB = 1 << 20
DEFAULT_MOST_BYTES = 64 << 30
# What a download leaves free of the disk it goes to, for whoever else writes there: a GiB, of a small disk a 20th.
_KEPT_FREE = 1 << 30
_KEPT_SHARE = 20
_LOOK_EVERY = _MIB


@dataclass(frozen=True, slots=True)
class Patience:
    """What a server is forgiven: ``stall_s`` without a byte, and ``tries`` in a row that bring nothing new."""

    stall_s: float = 30.0
    tries: int = 5
    pause: Callable[[float], None] = pause


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a body may grow to: ``most_bytes``, and what ``plausible`` makes of its beginning.

    That gets the file with what has come, and says how large a whole one can be; 0 where that can never be told, None
    where it cannot be so far.
    """

    most_bytes: int = DEFAULT_MOST_BYTES
    plausible: Callable[[Path], int | None] = lambda _: 0


_BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class _State:
    """Where the bytes of a partial file came from: ``url``, redirected to ``place``.

    ``validator`` is what If-Range takes, ``size`` None: not told.
    """

    url: str
    place: str
    validator: str
    size: int | None


def _state_path(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _new_state_path(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json.new")


def discard(partial: Path) -> None:
    """Remove a partial file and what is known of it."""
    # The bytes first: bytes without a state are never used, a state without bytes would say too much.
    partial.unlink(missing_ok=True)
    _state_path(partial).unlink(missing_ok=True)
    _new_state_path(partial).unlink(missing_ok=True)


def _size(partial: Path) -> int:
    return partial.stat().st_size if partial.exists() else 0


def _kept(url: str, partial: Path) -> _State | None:
    """What is known of a partial file from ``url``; None when nothing of it can be used."""
    try:
        state = _State(**json.loads(_state_path(partial).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    complete = state.size is not None and state.size == _size(partial)
    usable = state.url == url and _size(partial) > 0 and (state.validator or complete)
    return state if usable and (state.size is None or _size(partial) <= state.size) else None


def _keep(partial: Path, state: _State) -> None:
    new = _new_state_path(partial)
    new.write_text(json.dumps(asdict(state)))
    new.replace(_state_path(partial))


def fetch(url: str, partial: Path, name: str, report: Reporter, patience: Patience, bounds: Bounds = _BOUNDS) -> None:
    """Download ``url`` into ``partial``, going on from what is there of it. ``name`` is what progress is told of.

    Raises NotFound and ImageError; then what came stays for the next try, unless it is known to be wrong, or may have
    no end.
    """

    def ask(place: str) -> None:
        _ask(place, url, partial, name, report, patience.stall_s, bounds)

    def once(fruitless: int) -> None:
        _once(url, partial, name, report, ask, same_place=fruitless < _SAME_PLACE)

    try:
        _persist(url, once, lambda: _size(partial), report, patience)
    except OSError as error:
        raise ImageError(
            f"cannot download {url} to {partial}: {error.strerror}",
            hint="make room there, or set XDG_CACHE_HOME; the next pull goes on from what is there",
        ) from error


def text(url: str, report: Reporter, patience: Patience) -> str:
    """A small text file, such as one of checksums."""

    def once(_fruitless: int) -> str:
        data = b""
        with web.get(url, {}, stall_s=patience.stall_s) as answer:
            for chunk in answer.chunks:
                data += chunk
                if len(data) > _LARGEST_TEXT:
                    raise ImageError(f"cannot use {url}: it is too large to be a checksum file")
        return data.decode(errors="replace")

    return _persist(url, once, lambda: 0, report, patience)


def _persist(url: str, once: Callable[[int], T], have: Callable[[], int], report: Reporter, patience: Patience) -> T:
    best, fruitless = have(), 0
    while True:
        try:
            return once(fruitless)
        except Temporary as error:
            if have() > best:
                best, fruitless = have(), 0
            fruitless += 1
            if fruitless >= patience.tries:
                tries = f"; {fruitless} tries brought nothing more" if fruitless > 1 else ""
                hint = "try again later" + ("; what came is kept" if best else "")
                raise ImageError(f"cannot download {url}: {error.reason}{tries}", hint=hint) from error
            delay_s = min(2.0 ** (fruitless - 1), _LONGEST_WAIT_S)
            report(Warned(f"{error.reason}: trying again in {delay_s:.0f} s"))
            patience.pause(delay_s)


def _once(
    url: str, partial: Path, name: str, report: Reporter, ask: Callable[[str], None], *, same_place: bool
) -> None:
    """One try. Returns when the file is complete; raises Temporary when another try may bring more.

    It goes on at the mirror that sent what is there: another one's validator is another, and all would begin again.
    """
    kept = _kept(url, partial)
    if kept is not None and kept.size == _size(partial):
        return
    if kept is not None and kept.place != url and same_place:
        try:
            ask(kept.place)
            return
        except Temporary:
            raise
        except (NoRoom, TooLarge):
            raise
        except (ImageError, NotFound):
            report(Step(f"{name}: {kept.place} has it no longer"))
    ask(url)


def _ask(place: str, url: str, partial: Path, name: str, report: Reporter, stall_s: float, bounds: Bounds) -> None:
    """One request, at ``place``, for what is at ``url``."""
    kept, start = _kept(url, partial), _size(partial)
    headers = {}
    if kept is not None:
        headers = {"Range": f"bytes={start}-", "If-Range": kept.validator}
    with web.get(place, headers, stall_s=stall_s) as answer:
        if answer.status == 416:
            _past_the_end(url, partial, answer, kept, start)
            return
        if answer.status == 206:
            state = _continued(url, partial, answer, kept, start)
            report(Step(f"{name}: going on after the {bytes_in_words(start)} that are there"))
        else:
            if kept is not None:
                changed = kept.validator != _validator(answer)
                reason = "the file on the server is another one now" if changed else "the server does not send parts"
                report(Step(f"{name}: from the beginning, {reason}"))
            length = answer.headers.get("Content-Length", "")
            state, start = _State(url, answer.url, _validator(answer), int(length) if length.isdecimal() else None), 0
            discard(partial)
        guard = _Guard(url, partial, state.size, bounds)
        guard.begin(start)
        _keep(partial, state)
        _write(partial, answer, name, start, state, report, guard)
    got = _size(partial)
    if state.size is not None and got > state.size:
        discard(partial)
    if state.size is not None and got != state.size:
        raise Temporary(url, f"{got} bytes came of {state.size} promised")
    _keep(partial, replace(state, size=got))


def _validator(answer: Answer) -> str:
    """What tells this version of the file from another: a strong ETag, else its date, else ""."""
    etag = answer.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _past_the_end(url: str, partial: Path, answer: Answer, kept: _State | None, start: int) -> None:
    told = _UNSATISFIED.fullmatch(answer.headers.get("Content-Range", ""))
    total = int(told["total"]) if told else None
    if kept is not None and kept.size is None and total == start:
        _keep(partial, replace(kept, size=total))
        return
    discard(partial)
    if kept is None or kept.size is None or total is None:
        raise ImageError(f"cannot download {url}: the server says 416 and not why", hint="try again later")
    raise ImageError(
        f"cannot download {url}: the server promised {kept.size} bytes and has {total}",
        hint="its file is damaged or changing: try again later",
    )


def _continued(url: str, partial: Path, answer: Answer, kept: _State | None, start: int) -> _State:
    told = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    total = int(told["total"]) if told and told["total"] != "*" else None
    same = (
        kept is not None
        and told is not None
        and int(told["first"]) == start
        and (kept.size is None or total in {None, kept.size})
        and _validator(answer) in {"", kept.validator}
    )
    if kept is None or not same:
        discard(partial)
        raise Temporary(url, "the file changed on the server between two parts of it")
    return replace(kept, place=answer.url, size=kept.size if kept.size is not None else total)


class TooLarge(ImageError):
    """A download is, or goes on to be, larger than it may."""


class _Guard:
    """Keeps one body within its bounds, and some of the disk it is written to free."""

    def __init__(self, url: str, partial: Path, size: int | None, bounds: Bounds) -> None:
        self._url, self._partial, self._size, self._bounds = url, partial, size, bounds
        self._looked = 0
        self._most: int | None = None

    def begin(self, start: int) -> None:
        """Raise TooLarge or NoRoom for a body that cannot be taken, before any of it is."""
        if self._size is None:
            return
        if self._size > self._bounds.most_bytes:
            discard(self._partial)
            raise self._too_large(f"it is {self._size} bytes")
        free, kept = self._room()
        if self._size - start > free - kept:
            raise NoRoom(
                f"cannot download {self._url}: it needs {self._size - start} bytes and {self._partial.parent} has"
                f" {free} free, of which {kept} stay free",
                hint="make room there, or set XDG_CACHE_HOME",
            )

    def take(self, done: int, more: int) -> None:
        """Raise TooLarge or NoRoom, and remove what came, when ``more`` bytes after ``done`` are past any bound."""
        if done - self._looked >= _LOOK_EVERY:
            self._looked = done
            self._look(max(done, self._size or 0))
        if self._size is not None:
            return  # it has an end; whoever fills the disk meanwhile, the next pull goes on with what is there
        if done + more > self._bounds.most_bytes:
            discard(self._partial)
            raise self._too_large(f"it tells no length and goes on after {done} bytes")
        free, kept = self._room()
        if free - more < kept:
            discard(self._partial)
            raise NoRoom(
                f"cannot download {self._url}: it tells no length and goes on after {done} bytes, and"
                f" {self._partial.parent} has {free} free, of which {kept} stay free",
                hint="make room there, or set XDG_CACHE_HOME; what came was removed",
            )

    def _look(self, size: int) -> None:
        if self._most is None:
            self._most = self._bounds.plausible(self._partial)
        if self._most and size > self._most:
            discard(self._partial)
            raise TooLarge(
                f"cannot download {self._url}: it is {size} bytes or more, and by its own header an image of at most"
                f" {self._most}",
                hint="what came was removed; the server's file has something else behind the image, or no end",
            )

    def _too_large(self, what: str) -> TooLarge:
        return TooLarge(
            f"cannot download {self._url}: {what}, above the limit of {self._bounds.most_bytes}",
            hint="nothing of it was kept; where it may be larger: --max-size SIZE",
        )

    def _room(self) -> tuple[int, int]:
        """Bytes free on the disk it is written to, and how many of them are to stay so."""
        there = os.statvfs(self._partial.parent)
        return there.f_bavail * there.f_frsize, min(_KEPT_FREE, there.f_blocks * there.f_frsize // _KEPT_SHARE)


def _write(
    partial: Path, answer: Answer, name: str, start: int, state: _State, report: Reporter, guard: _Guard
) -> None:
    done = start
    with partial.open("ab", buffering=0) as file:
        report(Progress(name, done, state.size or 0))
        for chunk in answer.chunks:
            guard.take(done, len(chunk))
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
            done += len(chunk)
            report(Progress(name, done, state.size or 0))
