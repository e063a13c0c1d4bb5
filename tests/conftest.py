"""Tests marked ``system`` start guests and networks: only in the test host that tests/run makes."""

from __future__ import annotations

import signal
from pathlib import Path

import hypothesis
import pytest

# A shell's background commands ignore Ctrl-C, and so would all that the tests start and then press it on.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests are not timed: a machine that others share may be slow just then.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# tests/testhost/up.sh writes it on the host's own /run, so that it can exist nowhere else.
pytest_plugins = ["tests.hosts.fixtures"]

TEST_HOST_MARKER = Path("/run/vmctl-test-host")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("system") and not TEST_HOST_MARKER.exists():
        pytest.fail(f"a system test runs only in the test host: tests/run {item.nodeid!r}", pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew; look at the difference")
