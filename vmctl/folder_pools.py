"""A look into any folder of a host, by a pool that is there as long as a vmctl of this user looks into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vmctl import render
from vmctl.hosts import Host
from vmctl.hypervisor import folders
from vmctl.locks import shared

_BUSY_S = 60.0  # another one is just taking the pool away


@contextmanager
def shown(host: Host, folder: str) -> Iterator[str]:
    """The name of a pool that shows a folder: the one that is there, else one for the time of the block.

    Several may look at once, also from other processes: the last takes the pool away, and one that a killed process
    left, too. Raises NotFound where there is no such folder.
    """
    with shared(host.folders.runtime, f"folder {folder} on {host.lock_scope}", timeout_s=_BUSY_S) as is_last:
        name = folders.pool_of(host.conn, folder)
        name = name or folders.show(host.conn, folder, lambda name: render.pool(name, folder))
        try:
            yield name
        finally:
            if name.startswith(folders.PASSING) and is_last():
                folders.hide(host.conn, name)
