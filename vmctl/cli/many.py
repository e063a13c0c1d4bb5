"""One piece of work on several VMs at once: results in the order given, failures together, and an end by Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from vmctl.errors import Interrupted, PartialFailure, VmctlError

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
_PARALLEL = 8
_LOOK_S = 0.2
_UNSEEN = "its end was not waited for"
_UNDO_S = 10.0  # for what was cut off to take itself back; a second Ctrl-C does not wait for it


def each(
    names: Sequence[str],
    work: Callable[[str], T],
    done: Callable[[str, T], None],
    doing: str,
    *,
    most: int = _PARALLEL,
    undo_s: float = _UNDO_S,
    waits: Callable[[], None] = lambda: None,
) -> None:
    """Do ``work`` for each name, ``most`` at a time, telling each result in the order given.

    With one name its error is the error; with several, the failed ones are reported together at the end. An interrupt
    reaches every worker as it would reach this thread, and has ``undo_s`` to take back what it was at, or until the
    next interrupt, before which ``waits`` is called; Interrupted says what was done and what was not.
    """
    if len(names) == 1:
        done(names[0], work(names[0]))
        return
    from concurrent.futures import ThreadPoolExecutor, wait  # late: it brings logging with it

    hands = _Hands()
    pool = ThreadPoolExecutor(max_workers=most)
    futures: dict[str, Future[T]] = {}
    failures: dict[str, VmctlError] = {}
    told: set[str] = set()

    def tell(name: str) -> None:
        told.add(name)
        try:
            result = futures[name].result()
        except VmctlError as error:
            failures[name] = error
        else:
            done(name, result)

    try:
        for name in names:
            futures[name] = pool.submit(hands.at, name, work)
        for name in names:
            # A signal that comes just before a lock is waited for is heard only after it: so never for long.
            while not futures[name].done():
                wait([futures[name]], timeout=_LOOK_S)
            tell(name)
    except (KeyboardInterrupt, Interrupted) as early:
        pool.shutdown(wait=False, cancel_futures=True)
        with suppress(KeyboardInterrupt, Interrupted):  # one more: no more waiting, and all the same a word on each
            waits()
            hands.interrupt(futures, undo_s)
        for name in [name for name, future in futures.items() if name not in told and _has_result(future)]:
            tell(name)
        cut = {name: why for name, future in futures.items() if (why := _cut_off(future))}
        raise Interrupted(
            _left(names, futures, hands.begun, failures, cut, f"{early}" or "interrupted", doing)
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        raise PartialFailure(f"cannot {doing} {len(failures)} of {len(names)} VMs", failures=failures)


class _Hands:
    """The threads at work, by what each is working on."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._busy: dict[str, int] = {}
        self.begun: set[str] = set()

    def at(self, name: str, work: Callable[[str], T]) -> T:
        """Do one piece."""
        with self._gate:
            self._busy[name] = threading.get_ident()
            self.begun.add(name)
        try:
            return work(name)
        finally:
            with self._gate:  # an interrupt meant for this piece must not come after it
                del self._busy[name]

    def interrupt(self, futures: Mapping[str, Future[T]], timeout_s: float) -> None:
        """Raise KeyboardInterrupt in each thread at work, and wait, bounded, until they have taken back what they must.

        Python gives Ctrl-C to the main thread alone. This is the interpreter's own way to give it to another.
        """
        import ctypes
        from concurrent.futures import wait

        with self._gate:
            for ident in self._busy.values():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(KeyboardInterrupt))
        left, until = [one for one in futures.values() if not one.cancelled()], time.monotonic() + timeout_s
        while time.monotonic() < until and wait(left, timeout=_LOOK_S).not_done:
            continue  # a further signal is heard between two looks, as above


def _has_result(future: Future[T]) -> bool:
    if not future.done() or future.cancelled():
        return False
    return not isinstance(future.exception(), KeyboardInterrupt | Interrupted)


def _cut_off(future: Future[T]) -> str:
    """What a piece says of itself that was cut off, and knows what came of it: where a VM is now, for one."""
    cause = future.exception() if future.done() and not future.cancelled() else None
    return cause.message if isinstance(cause, Interrupted) else ""


def _left(
    names: Sequence[str],
    futures: Mapping[str, Future[T]],
    begun: Collection[str],
    failures: Mapping[str, VmctlError],
    cut: Mapping[str, str],
    why: str,
    doing: str,
) -> str:
    """One line that says of each name how far it came."""
    ways: dict[str, list[str]] = {"done": [], "failed": [], "cut off": [], "not begun": []}
    for name in names:
        if name in failures:
            ways["failed"].append(f"{name} ({failures[name].message})")
        elif name not in begun:
            ways["not begun"].append(name)
        elif name not in futures:  # the interrupt came just as it was begun
            ways["cut off"].append(f"{name} ({_UNSEEN})")
        else:
            why_so = cut.get(name) or ("" if futures[name].done() else _UNSEEN)
            said = f"{name} ({why_so})" if why_so else name
            ways["done" if _has_result(futures[name]) else "cut off"].append(said)
    parts = [f"{way}: {', '.join(found)}" for way, found in ways.items() if found]
    return f"cannot {doing} all {len(names)} VMs: {why}; {'; '.join(parts)}"
