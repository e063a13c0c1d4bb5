"""A bare-metal guest of vmctl's run through libvirt, on any host: uploaded, started, heard over its console, gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from vmctl import render
from vmctl.errors import quietly
from vmctl.hypervisor import console, storage
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.console import Transcript
from vmctl.render import ProbeView


@contextmanager
def uploaded(conn: Connection, pool: str, pool_xml: Callable[[], str], name: str, guest: bytes) -> Iterator[str]:
    """Put the guest into a pool, made by ``pool_xml`` where it is not there yet; its path on that host.

    A volume of that name which a killed run left is replaced.
    """
    storage.ensure_pool(conn, pool, pool_xml)
    volume = render.VolumeView(f"{name}.elf", len(guest), "raw", mode="0644")
    storage.delete_volume(conn, pool, volume.name)
    try:
        path = storage.create_volume(conn, pool, render.volume(volume), name=volume.name)
        storage.upload_bytes(conn, pool, volume.name, guest)
        yield path
    finally:
        quietly(lambda: storage.delete_volume(conn, pool, volume.name))


def hear(
    conn: Connection,
    view: ProbeView,
    *,
    until: Callable[[bytes], bool],
    timeout_s: float,
    waited: Callable[[float | None], None] | None = None,
    goodbye: bytes = b"",
) -> Transcript:
    """Run the guest until it has said enough, stops, or the time is over. See console.transcript."""
    xml = render.probe(view)
    return console.transcript(conn, xml, until=until, timeout_s=timeout_s, waited=waited, goodbye=goodbye)


def without_devices(view: ProbeView) -> ProbeView:
    """The same guest where that QEMU lacks a device it would like to have."""
    return replace(view, arguments=())
