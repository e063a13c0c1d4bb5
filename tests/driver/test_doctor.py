"""What doctor clears away of creations that were cut off, and of none that goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.driver.test_domains import RECORD, define
from vmctl import doctor, render, warming
from vmctl.events import silent
from vmctl.hosts import Host, holding
from vmctl.hypervisor import domain


def half_made(host: Host, name: str) -> None:
    define(host.conn, name)
    domain.set_record(host.conn, name, render.metadata(replace(RECORD, creating=True)))


def test_a_creation_that_goes_on_is_left_alone_and_keeps_no_other(host: Host) -> None:
    for name in ("web1", "web2"):
        half_made(host, name)
    with holding(host, "web1"):
        found = doctor._cut_off(host, fix=True, report=silent)
    told = {one.result: one.detail for one in found}
    assert len(found) == 2 and "creation of web2" in told["mended"] and "another vmctl is at it" in told["failed"]
    assert [domain.find_or_none(host.conn, name) is None for name in ("web1", "web2")] == [False, True]


def test_what_has_become_whole_meanwhile_is_not_deleted(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """doctor had seen that it was being created; its creator let go of it, and it was deleted."""
    half_made(host, "web1")

    def looked_for(_: Host) -> tuple[str, ...]:
        domain.set_record(host.conn, "web1", render.metadata(RECORD))
        return ()

    monkeypatch.setattr(warming, "abandoned", looked_for)
    found = doctor._cut_off(host, fix=True, report=silent)
    assert [one.result for one in found] == ["ok"]
    assert domain.find(host.conn, "web1").facts.record == RECORD
