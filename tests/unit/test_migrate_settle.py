"""When it is said where a VM is that was being moved."""

from __future__ import annotations

from typing import cast

import pytest

from vmctl import migrate_settle
from vmctl.hypervisor.states import State
from vmctl.migrate_ends import Ends
from vmctl.migrate_outcome import Seen, Where


class OnSource:
    """Both hosts answer; the VM runs on the source, and the target has none of it."""

    def seen(self, uuid: str) -> tuple[Seen, Seen]:
        assert uuid == "u"
        return Seen(known=True, state=State.RUNNING), Seen(known=True)


@pytest.mark.parametrize(("busy", "where"), [(False, Where.STAYED), (True, Where.UNKNOWN)])
def test_a_vm_has_not_stayed_while_its_host_may_yet_send_it(
    monkeypatch: pytest.MonkeyPatch, busy: bool, where: Where
) -> None:
    monkeypatch.setattr(migrate_settle, "_busy", lambda *_: busy)
    monkeypatch.setattr(migrate_settle, "_SETTLE_S", 0.0)
    assert migrate_settle.settle(cast(Ends, OnSource()), "u")[0] is where
