"""The image debian-12: built from Debian's packages, started in each way it can be."""

from __future__ import annotations

import subprocess

import pytest

from tests.system.conftest import REPO, VMCTL, Shell

pytestmark = pytest.mark.system


@pytest.fixture(scope="module", autouse=True)
def debian_image() -> None:
    """The image in the store; tests/prepare has built it into the cache."""
    done = subprocess.run(
        [*VMCTL, "image", "build", "debian-12"], capture_output=True, text=True, timeout=900, check=False, cwd=REPO
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_first(shell: Shell, name: str) -> None:
    print(shell.run("create", name, "--image", "debian-12", "--memory", "1G", "--wait", "ssh", timeout=200))
    print(shell.run("exec", name, "--", "cloud-init", "status", "--wait", "--long", check=None, timeout=200))
