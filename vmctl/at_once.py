"""Several pieces of work side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_AT_ONCE = 4


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
