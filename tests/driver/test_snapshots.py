"""Snapshots as libvirt's test driver has them: found, listed, drawn, completed, refused."""

from __future__ import annotations

import pytest

from tests.driver.test_domains import define
from vmctl import snapshot_create, snapshot_delete, snapshot_diff, snapshots
from vmctl.errors import Conflict, NotFound, SpecError, Unsupported, VmctlError
from vmctl.events import silent
from vmctl.hosts import Host
from vmctl.hypervisor import snapshots as known


@pytest.fixture
def vm(host: Host) -> str:
    """A VM with two snapshots, one from the other."""
    define(host.conn, "web1")
    handle = host.conn.handle.lookupByName("web1")
    for name in ("one", "two.b"):
        handle.snapshotCreateXML(f"<domainsnapshot><name>{name}</name><description>x</description></domainsnapshot>")
    return "web1"


def test_they_are_found_listed_and_drawn(host: Host, vm: str) -> None:
    assert set(known.names(host.conn)) == {"web1.one", "web1.two.b"}
    rows = snapshots.list_all(host, ())
    assert [(row.name, row.parent, row.current, row.ours) for row in rows] == [
        ("one", "", False, False),
        ("two.b", "one", True, False),
    ]
    assert snapshots.list_all(host, ["we*"]) == rows
    leaves = snapshots.tree(host, vm)
    assert [leaf.name for leaf in leaves] == ["one", "two.b", ""] and leaves[-1].line.endswith("* you are here")
    assert snapshots.show(host, "web1.one").children == ("two.b",)


def test_what_is_not_there_is_named(host: Host, vm: str) -> None:
    for text in ("web1.no", "no.one"):
        with pytest.raises(NotFound):
            snapshots.show(host, text)
    with pytest.raises(NotFound):
        snapshots.list_all(host, ["no*"])
    with pytest.raises(SpecError, match="that is a VM"):
        snapshots.show(host, vm)
    with pytest.raises(SpecError, match="two VMs"):
        define(host.conn, "web2")
        snapshot_diff.diff(host, "web1.one", "web2")


def test_what_cannot_be_taken_changes_nothing(host: Host, vm: str) -> None:
    before = known.names(host.conn)
    for text, error in (("web1.one", Conflict), ("web1.-x", SpecError), ("web1.new", VmctlError)):
        with pytest.raises(error):
            snapshot_create.create(host, text, snapshot_create.Order(), silent)
    with pytest.raises(Unsupported, match="of one moment"):
        snapshot_create.create(host, "web1.live", snapshot_create.Order(live=True), silent)
    assert known.names(host.conn) == before
    assert snapshot_delete.delete_expired(host, (), silent) == ()


def test_names_are_completed(host: Host, vm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmctl import hosts
    from vmctl.cli import snapshot

    monkeypatch.setattr(hosts, "open_host", lambda _connect: host)
    assert set(snapshot._complete_snapshot("web1.")) == {"web1.one", "web1.two.b"}
