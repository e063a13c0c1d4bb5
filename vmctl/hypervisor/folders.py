"""Folders of a host that are no pools, shown as pools for a while: libvirt looks into nothing else."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import libvirt

from vmctl.errors import NotFound
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling

PASSING = "vmctl-look-"  # what the names of these pools begin with: they are gone when their block ends


@dataclass(slots=True)
class _Showing:
    """A folder that is shown as a pool of ours, and how many blocks of this process need it; the last takes it away."""

    gate: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    name: str = ""


_showings: dict[tuple[str, str], _Showing] = {}


@contextmanager
def folder_as_pool(conn: Connection, folder: str, xml: Callable[[str], str]) -> Iterator[str]:
    """The name of a pool that shows a folder: the one that is there, else one for the time of the block.

    Raises NotFound where there is no such folder.
    """
    showing = _showings.setdefault((conn.uri, folder), _Showing())
    with showing.gate:
        name = showing.name if showing.users else _pool_of(conn, folder)
        ours = showing.users > 0 or not name
        if not name:
            name = showing.name = f"{PASSING}{os.urandom(6).hex()}"
            try:
                conn.handle.storagePoolCreateXML(xml(name), 0)
            except libvirt.libvirtError as error:
                name, ours = _pool_of(conn, folder), False  # another process was faster
                if not name:
                    raise NotFound(f"cannot look into {folder}: {error.get_error_message()}") from error
        showing.users += ours
    try:
        yield name
    finally:
        if ours:
            _hide(conn, showing)


def _hide(conn: Connection, showing: _Showing) -> None:
    with showing.gate:
        showing.users -= 1
        if not showing.users:
            with suppress(libvirt.libvirtError):
                conn.handle.storagePoolLookupByName(showing.name).destroy()


def _pool_of(conn: Connection, folder: str) -> str:
    """The name of the running pool that shows a folder; "" for none."""
    try:
        found = conn.handle.storagePoolLookupByTargetPath(folder)
        return str(found.name()) if found.isActive() else ""
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_POOL:
            return ""
        with calling(f"look up folder {folder}"):
            raise
