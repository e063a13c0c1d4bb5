"""Which VM of a host that is drained goes where."""

from __future__ import annotations

from vmctl.drain import Load, plan


def test_the_largest_first_to_where_there_is_most_room_left() -> None:
    found = plan([Load("a", 1000), Load("b", 4000), Load("off", 0), Load("c", 3000)], {"one": 8000, "two": 6000})
    assert [(one.vm, one.hosts) for one in found] == [
        ("b", ("one", "two")),
        ("c", ("two", "one")),
        ("a", ("one", "two")),
        ("off", ("one", "two")),
    ]
    assert plan([Load("a", 1)], {})[0].hosts == ()
    assert plan([], {"one": 1}) == ()
