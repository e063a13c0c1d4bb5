"""Folders of a host that are no pools, shown as pools for a while: libvirt looks into nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import libvirt

from vmctl.errors import NotFound
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling

PASSING = "vmctl-look-"  # what the names of these pools begin with


def pool_of(conn: Connection, folder: str) -> str:
    """The name of the running pool that shows a folder; "" for none."""
    try:
        found = conn.handle.storagePoolLookupByTargetPath(folder)
        return str(found.name()) if found.isActive() else ""
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_POOL:
            return ""
        with calling(f"look up folder {folder}"):
            raise


def show(conn: Connection, folder: str, xml: Callable[[str], str]) -> str:
    """Show a folder as a pool, and return its name; another's, who was faster. Raises NotFound for no such folder."""
    name = f"{PASSING}{os.urandom(6).hex()}"
    try:
        conn.handle.storagePoolCreateXML(xml(name), 0)
    except libvirt.libvirtError as error:
        if other := pool_of(conn, folder):
            return other
        raise NotFound(f"cannot look into {folder}: {error.get_error_message()}") from error
    return name


def hide(conn: Connection, name: str) -> None:
    """Take such a pool away; what is in the folder stays."""
    with suppress(libvirt.libvirtError):
        conn.handle.storagePoolLookupByName(name).destroy()
