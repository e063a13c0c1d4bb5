"""What is said of a VM whose move is broken off before it is sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from vmctl import migrate
from vmctl.errors import Interrupted
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.states import State


@pytest.mark.parametrize(("state", "told"), [(State.RUNNING, "runs on h1"), (State.STOPPED, "is stopped on h1")])
def test_it_is_where_it_was(state: State, told: str) -> None:
    vm = cast(Domain, SimpleNamespace(state=state))
    with pytest.raises(Interrupted) as caught, migrate.staying("web1", vm, "h1"):
        raise KeyboardInterrupt
    assert caught.value.message == f"cannot migrate VM web1: interrupted; web1 {told} as before"
    with pytest.raises(Interrupted) as caught, migrate.staying("web1", vm, "h1"):
        raise Interrupted("stopped on request (SIGTERM)")
    assert caught.value.message.startswith("cannot migrate VM web1: stopped on request (SIGTERM); web1")


def test_what_says_where_it_is_is_left_as_it_is() -> None:
    said = Interrupted("cannot migrate VM web1: interrupted; it runs on h2")
    with pytest.raises(Interrupted) as caught, migrate.staying("web1", None, "h1"):
        raise said
    assert caught.value is said
