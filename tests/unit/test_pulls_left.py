"""What becomes of a pull that was left in its middle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmctl import pull_journal
from vmctl.pull_journal import End, Found, decide


@pytest.mark.parametrize(
    ("found", "end"),
    [
        (Found(there=False, running=True, changed=True), End.FORGET),  # another file has its name
        (Found(there=True, based=True), End.FORGET),
        (Found(there=True, based=True, running=True), End.FORGET),
        (Found(there=True, based=True, running=True, since=True), End.FORGET),
        (Found(there=True, based=True, changed=True), End.FORGET),
        (Found(there=True, saved=True), End.FORGET),
        (Found(there=True, running=True), End.FLUSH),
        (Found(there=True, running=True, changed=True), End.FLUSH),  # what it needs is in its memory
        (Found(there=True, running=True, since=True), End.STARTED),
        (Found(there=True, running=True, since=True, changed=True), End.STARTED),
        (Found(there=True), End.PUT_BACK),
        (Found(there=True, since=True), End.PUT_BACK),  # its VM runs, without the disk
        (Found(there=True, changed=True), End.CHANGED),
    ],
)
def test_what_is_seen_decides(found: Found, end: End) -> None:
    assert decide(found) is end


def test_a_file_that_was_written_to_replaced_or_removed_is_not_as_it_was(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    was = [pull_journal.stamp(str(path)) for path in (one, other)]
    assert pull_journal.changed(was) == ()
    os.utime(one, ns=(0, was[0].changed_ns + 1))
    assert pull_journal.changed(was) == (str(one),)
    os.utime(one, ns=(0, was[0].changed_ns))
    assert pull_journal.changed(was) == ()
    twin = tmp_path / "twin"
    twin.write_bytes(b"2")
    os.utime(twin, ns=(0, was[1].changed_ns))
    twin.replace(other)
    assert pull_journal.changed(was) == (str(other),)
    one.unlink()
    assert pull_journal.changed(was) == (str(one), str(other))
