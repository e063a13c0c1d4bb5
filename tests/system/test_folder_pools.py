"""A folder that is no pool, looked into by several at once, and after one was killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.system.conftest import REPO, Shell
from vmctl.errors import NotFound
from vmctl.folder_pools import shown
from vmctl.hosts import open_host
from vmctl.hypervisor.folders import PASSING

pytestmark = pytest.mark.system

LOOK = """
import sys
from vmctl.folder_pools import shown
from vmctl.hosts import open_host
with open_host(None) as host, shown(host, sys.argv[1]) as pool:
    print(pool, flush=True)
    sys.stdin.read()
"""


@contextmanager
def looking(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that looks into the folder until its input ends, and the pool it does so by."""
    with subprocess.Popen(
        [sys.executable, "-c", LOOK, str(folder)],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()


def passing(shell: Shell) -> list[str]:
    return [name for name in shell.virsh("pool-list", "--name", "--all").split() if name.startswith(PASSING)]


def test_the_last_who_looks_takes_the_pool_away(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with open_host(None) as host:
        with looking(tmp_path) as (_, first):
            with shown(host, str(tmp_path)) as second, shown(host, str(tmp_path)) as third:
                assert first.startswith(PASSING) and second == third == first
            assert passing(shell) == [first], "the other process still needs it"
            with shown(host, str(tmp_path)) as second:
                assert second == first and "file" in shell.virsh("vol-list", second)
        assert passing(shell) == []
        with shown(host, "/") as root, pytest.raises(NotFound), shown(host, str(tmp_path / "none")):
            pass
        assert root.startswith(PASSING) and passing(shell) == []


def test_what_a_killed_one_left_goes_with_the_next(shell: Shell, tmp_path: Path) -> None:
    with looking(tmp_path) as (process, left):
        process.kill()
    assert passing(shell) == [left]
    with open_host(None) as host, shown(host, str(tmp_path)) as found:
        assert found == left
    assert passing(shell) == []
