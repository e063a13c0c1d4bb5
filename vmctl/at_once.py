"""Several pieces of work side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from vmctl.wait import Worker

T = TypeVar("T")
_AT_ONCE = 4


@contextmanager
def beside(work: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Do ``work`` beside the block, which does not end before it has, interrupted or not.

    What is yielded waits for it, and has its result.
    Its error is raised there, and lost where the block fails before.
    """
    found: list[T] = []
    failure: list[BaseException] = []

    def do() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001  raised by who asks for the result
            failure.append(error)

    thread = Worker(do, "beside")

    def result() -> T:
        thread.join()
        if failure:
            raise failure[0]
        return found[0]

    thread.start()
    try:
        yield result
    finally:
        thread.join()


def at_once(works: Sequence[Callable[[], object]], most: int = _AT_ONCE) -> None:
    """Do all of ``works``, some at a time; the first error is raised when all that was begun has ended.

    Of one that fails or is interrupted, what was not yet begun is left.
    """
    if len(works) == 1:
        works[0]()
        return
    from concurrent.futures import ThreadPoolExecutor  # late: it brings logging with it

    with ThreadPoolExecutor(max_workers=most) as pool:
        futures = [pool.submit(work) for work in works]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
