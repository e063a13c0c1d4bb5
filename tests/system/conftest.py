"""Real guests, driven as a user would: by the command line, seen also through virsh."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import warm

LIBVIRT_LOG = Path("/var/log/libvirt/libvirtd.log")
VMCTL = [sys.executable, "-m", "vmctl"]
REPO = Path(__file__).parents[2]
STORE = Path("/var/lib/libvirt/vmctl/vmctl-images")


@dataclass(frozen=True)
class Shell:
    """Runs vmctl and virsh as a user at a prompt, with text in and out."""

    uri: str = ""

    def run(
        self, *words: str, check: int | None = 0, timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run vmctl; ``check`` is the exit code it must end with, None for any. ``options`` as warm.run has them."""
        at = ["-c", self.uri] if self.uri else []
        done = warm.run(["-m", "vmctl", *at, *words], timeout=timeout, **options)
        if check is not None:
            assert done.returncode == check, (
                f"vmctl {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done

    def guest(self, name: str, *options: str) -> None:
        """A running micro of 128 MiB that answers by SSH and by its agent: it goes on from the image's warmed state.

        That is a fifth of the work of a boot. Tests of what a boot does, or an option, create theirs themselves.
        """
        if not any(STORE.glob("micro-*.memory")):
            self.run("image", "warm", "micro", "--memory", "128M", timeout=300)
        self.run("create", name, "--image", "micro", "--warm", "--wait", "agent", *options, timeout=240)

    def cold(self) -> None:
        """Take the micro image's warmed state away, if there is one."""
        if any(STORE.glob("micro-*.memory")):
            self.run("image", "warm", "micro", "--remove")

    def json(self, *words: str) -> Any:
        """Run vmctl with -o json and read its answer."""
        return json.loads(self.run(*words, "-o", "json").stdout)

    def virsh(self, *words: str, check: bool = True) -> str:
        """Run virsh on the same host."""
        done = subprocess.run(
            ["virsh", "-q", "-c", self.uri or "qemu:///system", *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()


def held_mib(name: str) -> int:
    """How much of the host's memory the VM's QEMU holds."""
    pid = int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
    words = Path(f"/proc/{pid}/status").read_text().split()
    return int(words[words.index("VmRSS:") + 1]) >> 10


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Beside a failure stands what the test host's libvirt said last: its log goes with it."""
    report = yield
    if report.failed and LIBVIRT_LOG.exists():
        last = LIBVIRT_LOG.read_text(errors="replace").splitlines()[-25:]
        report.sections.append((f"end of {LIBVIRT_LOG} at {report.when}", "\n".join(last)))
    return report


@pytest.fixture(scope="session", autouse=True)
def micro_image() -> None:
    """The micro image in the store: built once for the run, from packages fetched before the test host was entered."""
    done = subprocess.run(
        [*VMCTL, "image", "build", "micro"], capture_output=True, text=True, timeout=600, check=False, cwd=REPO
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # The network is made on first use and stays: made now, so that tests can compare before and after.
    shell = Shell()
    shell.run("create", "first", "--image", "micro", "--no-start")
    shell.run("delete", "first", "--yes")


@pytest.fixture(scope="session")
def debian_image() -> None:
    """The image in the store; tests/prepare has built it into the cache."""
    done = subprocess.run(
        [*VMCTL, "image", "build", "debian-12"], capture_output=True, text=True, timeout=800, check=False, cwd=REPO
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def shell() -> Shell:
    """vmctl and virsh on qemu:///system."""
    return Shell()


@pytest.fixture
def name(shell: Shell) -> Iterator[str]:
    """A name for a VM of this test, which is gone afterwards."""
    chosen = f"t-{secrets.token_hex(4)}"
    yield chosen
    shell.run("delete", chosen, "--yes", "--missing-ok", check=None)


@pytest.fixture
def names(shell: Shell) -> Iterator[Callable[[], str]]:
    """A function for further names; all of them are gone afterwards."""
    made: list[str] = []

    def new() -> str:
        made.append(f"t-{secrets.token_hex(4)}")
        return made[-1]

    yield new
    for one in made:
        shell.run("delete", one, "--yes", "--missing-ok", check=None)


@pytest.fixture
def several(shell: Shell, name: str) -> Iterator[str]:
    """What names of further VMs begin with; all of them are gone afterwards."""
    yield f"{name}-of"
    for one in shell.virsh("list", "--all", "--name").split():
        if one.startswith(f"{name}-of"):
            shell.run("delete", one, "--yes", check=None)


def volumes(shell: Shell, pool: str = "vmctl") -> set[str]:
    """Names of the volumes in a pool, as virsh sees them after a fresh look."""
    shell.virsh("pool-refresh", pool, check=False)
    return {line.split()[0] for line in shell.virsh("vol-list", pool, check=False).splitlines() if line.strip()}


def reservations(shell: Shell) -> str:
    """The network's definition."""
    return shell.virsh("net-dumpxml", "vmctl", "--inactive", check=False)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with some changes."""
    return {**os.environ, **changes}
