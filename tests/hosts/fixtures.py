"""The testbed as a pytest fixture; a module asks for one of its own kind and shares it between its tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.hosts.testbed import Testbed, booted


@pytest.fixture(scope="module")
def make_testbed() -> Iterator[Callable[..., Testbed]]:
    """A function that boots a testbed (see tests.hosts.testbed), which ends with the module."""
    with ExitStack() as stack:
        yield lambda *args, **values: stack.enter_context(booted(*args, **values))
