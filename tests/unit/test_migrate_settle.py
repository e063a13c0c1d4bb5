"""When it is said where a VM is that was being moved."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from vmctl import migrate_settle
from vmctl.hypervisor.states import State
from vmctl.migrate_ends import Ends
from vmctl.migrate_outcome import Seen, Where
from vmctl.migrate_watch import Run


class OnSource:
    """Both hosts answer; the VM runs on the source, and the target has none of it."""

    def seen(self, uuid: str) -> tuple[Seen, Seen]:
        assert uuid == "u"
        return Seen(known=True, state=State.RUNNING), Seen(known=True)


@pytest.mark.parametrize("keep", [False, True])
def test_a_recovery_that_is_to_be_typed_keeps_what_was_to_be_kept(keep: bool) -> None:
    """Without the option it deletes definition and disks on the source, as a move does."""
    ends = cast(Ends, SimpleNamespace(names=("h1", "h2")))
    seen = Seen(known=True, state=State.RUNNING), Seen(known=False)
    error = migrate_settle.failed(ends, "web", Run(failure="cut", keep=keep), Where.STAYED, seen)
    again = "vmctl -c h1 migrate web --to h2 --recover" + (" --keep-source" if keep else "")
    assert error.hint == f"{again} clears up there, later"


@pytest.mark.parametrize(("busy", "where"), [(False, Where.STAYED), (True, Where.UNKNOWN)])
def test_a_vm_has_not_stayed_while_its_host_may_yet_send_it(
    monkeypatch: pytest.MonkeyPatch, busy: bool, where: Where
) -> None:
    monkeypatch.setattr(migrate_settle, "_busy", lambda *_: busy)
    monkeypatch.setattr(migrate_settle, "_SETTLE_S", 0.0)
    assert migrate_settle.settle(cast(Ends, OnSource()), "u")[0] is where
