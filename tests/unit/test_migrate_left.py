"""What moves that were cut off left, from what each host has."""

from __future__ import annotations

from vmctl.migrate_files import File, Role, own_disks
from vmctl.migrate_left import Left, Seen, left

DISK = "/p/web.qcow2"


def seen(*volumes: str, marked: tuple[str, ...] = (), **disks: str) -> Seen:
    return Seen(frozenset(volumes), frozenset(marked), {name: frozenset({path}) for name, path in disks.items()})


def test_one_that_moved_and_was_not_cleared_up_after() -> None:
    found = left({"h1": seen(DISK), "h2": seen(DISK, marked=(DISK,), web=DISK)}, "h1")
    assert [*found] == [Left("web", "h2", "h2")] and Left("web", "h2", "h2").moved


def test_files_of_one_that_stayed_or_went_elsewhere() -> None:
    half = seen(DISK, marked=(DISK,))
    assert [*left({"h1": seen(DISK, web=DISK), "h2": half}, "h1")] == [Left("web", "h2", "h1")]
    assert [*left({"h1": seen(), "h2": half, "h3": seen(DISK, web=DISK)}, "h1")] == [Left("web", "h2", "h3")]


def test_what_is_not_told_to_be_of_a_move_from_there_stays() -> None:
    there = seen(DISK, marked=(DISK,), web=DISK)
    assert not [*left({"h1": seen(), "h2": there}, "h1")], "it came from another host"
    assert not [*left({"h1": seen(DISK, marked=(DISK,)), "h2": there}, "h1")], "it was on its way here"
    assert not [*left({"h1": seen(DISK, db=DISK), "h2": there}, "h1")], "somebody needs it here"
    assert not [*left({"h1": seen(DISK, web=DISK), "h2": there}, "h1")], "it may be on its way"
    assert not [*left({"h1": seen(), "h2": seen(DISK, marked=(DISK,))}, "h1")], "nobody knows whose it is"


def test_a_disk_that_is_another_vms_whatever_its_uuid() -> None:
    files = (File(Role.BASE, "/p/base"), File(Role.DISK, DISK), File(Role.READONLY, "/p/seed.iso"))
    assert own_disks(files, {"/p/other"}, frozenset(), {"/p"}) == (DISK,)
    assert own_disks(files, {DISK}, frozenset(), frozenset()) == (DISK,), "of that name each host has one"
    assert own_disks((File(Role.DISK, "rbd://c/p/x", network=True),), {DISK}, frozenset(), {"/p"}) == ("rbd://c/p/x",)


def test_a_disk_that_a_move_left_or_that_is_gone_is_no_other_vms() -> None:
    files = (File(Role.DISK, DISK),)
    assert not own_disks(files, {DISK, "/p/base"}, frozenset(), {"/p"}), "both see it"
    assert not own_disks(files, {"/q/moved"}, {DISK}, frozenset()), "it is marked"
    assert not own_disks((File(Role.DISK, DISK, missing=True),), {"/q/moved"}, frozenset(), frozenset())
    assert not own_disks((File(Role.DISK, "rbd://c/p/x", network=True),), {"rbd://c/p/x"}, frozenset(), frozenset())
