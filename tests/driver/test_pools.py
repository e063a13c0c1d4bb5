"""Every kind of pool, and every kind of disk, against libvirt's own schemas, by its test driver."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.driver.test_domains import define
from tests.unit.test_disks import POOLS
from vmctl import disk_find, disk_plug, disk_xml, disks, pools
from vmctl.choices import Aio, Bus, Cache
from vmctl.disk_spec import Attachment, IoLimits
from vmctl.errors import Conflict, NotFound, SpecError
from vmctl.events import silent
from vmctl.hosts import Host
from vmctl.hypervisor import domain, storage
from vmctl.pools import NewPool

SCHEMAS = Path("/usr/share/libvirt/schemas")


@pytest.mark.parametrize("wanted", POOLS, ids=lambda pool: str(pool.type))
def test_each_kind_of_pool_is_defined_listed_and_forgotten(host: Host, wanted: NewPool, tmp_path: Path) -> None:
    text = pools.definition(wanted)
    (tmp_path / "pool.xml").write_text(text)
    done = subprocess.run(
        ["xmllint", "--noout", "--relaxng", str(SCHEMAS / "storagepool.rng"), str(tmp_path / "pool.xml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr + text
    made = pools.create(host, wanted, silent, start=False)
    assert made.name in {one.name for one in pools.list_pools(host)} and not made.active
    with pytest.raises(Conflict):
        pools.create(host, wanted, silent, start=False)
    pools.delete(host, wanted.name, silent)
    with pytest.raises(NotFound):
        pools.show(host, wanted.name)


@pytest.mark.parametrize("ending", ["stopped", "undefined"])
def test_a_pool_that_ends_while_all_are_looked_into_hides_no_other(
    host: Host, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    look = storage._refresh
    made = {}
    for name in ("passing", "staying"):
        text = f"<pool type='dir'><name>{name}</name><target><path>/{name}</path></target></pool>"
        made[name] = host.conn.handle.storagePoolDefineXML(text)
        made[name].create()
    made["staying"].createXML("<volume><name>disk</name><capacity>1</capacity></volume>")
    before = {volume.path for volume in storage.all_volumes(host.conn)}

    def end(pool: Any, name: str) -> None:
        look(pool, name)
        if name == "passing":
            pool.destroy()
            if ending == "undefined":
                pool.undefine()

    monkeypatch.setattr(storage, "_refresh", end)
    assert {volume.path for volume in storage.all_volumes(host.conn)} == before != set()


def test_vmctls_own_pools_are_not_deleted(host: Host) -> None:
    with pytest.raises(Conflict, match="vmctl's own"):
        pools.delete(host, "vmctl", silent)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("/dev/vg0/data", Attachment(cache=Cache.NONE, aio=Aio.IO_URING)),
        ("nbd://[::1]/data", Attachment(limits=IoLimits(iops=100, bps=1 << 20))),
        ("nbd+unix:///a%20b?socket=/run/x.sock", Attachment()),
        ("iscsi://san/iqn.2024-01.org.example:x/1", Attachment(bus=Bus.SCSI)),
        ("rbd://mon/rbd/image", Attachment(readonly=True)),
    ],
)
def test_each_kind_of_disk_fits_the_schema(host: Host, source: str, wanted: Attachment) -> None:
    """The test driver cannot attach: so the disk is put into a definition, which it checks whole."""
    define(host.conn, "web1")
    done = disk_plug.attach(host, "web1", source, wanted, silent, dry=True)
    assert done.there == "its next start"
    text = domain.xml(host.conn, "web1", inactive=True)
    xml = disk_plug.preview(host, "web1", source, wanted)
    domain.define(host.conn, text.replace("<disk ", f"{xml}<disk ", 1), name="web1")
    (disk,) = [d for d in disk_xml.read(domain.xml(host.conn, "web1")) if d.target == done.target]
    assert disk.source == done.source and disk.limits == {k: v for k, v in wanted.limits.given().items() if v}


def test_a_pool_that_is_not_there_is_told_once_with_the_one_meant(host: Host) -> None:
    for ask in (lambda: pools.show(host, "vmctk"), lambda: storage.volume_names(host.conn, "vmctk")):
        with pytest.raises(NotFound) as told:
            ask()
        assert told.value.message == f"cannot find storage pool vmctk: {host.conn.uri} has none of that name"
        assert told.value.hint == "did you mean vmctl?"


def test_a_disk_that_is_not_there_is_looked_for_in_its_own_pool(host: Host) -> None:
    text = "<pool type='dir'><name>fast</name><target><path>/fast</path></target></pool>"
    host.conn.handle.storagePoolDefineXML(text).create()
    for name, hint in (("fast/w", "vmctl disk list --pool fast shows all disks"), ("w", "vmctl disk list shows all")):
        with pytest.raises(NotFound) as told:
            disk_find.locate(host, name)
        assert told.value.hint.startswith(hint)


def test_no_disk_is_made_or_moved_among_the_images(host: Host) -> None:
    """Who tidies images up would take it for a part of one."""
    images = host.settings.image_pool
    with pytest.raises(SpecError, match="images are in it"):
        disks.plan_create(host, f"{images}/mine", 1 << 20, None, "")
    with pytest.raises(SpecError, match="images are in it"):
        disks.pool_folder(host, images)
    assert disks.pool_folder(host, host.settings.pool)
