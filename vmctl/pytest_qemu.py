"""The pytest plugin: real virtual machines as fixtures.

``make_vm`` makes VMs that are gone after the test; ``shared_vm`` is one booted guest for the whole run.
Options: --vm-connect URI, --vm-image NAME, --vm-accel auto|kvm|tcg|require-kvm, --vm-timeout SECONDS.
"""

from __future__ import annotations

import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

# Only the standard library and pytest here: every pytest run on the machine loads this file.
if TYPE_CHECKING:
    from vmctl.hosts import Host


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plugin's options."""
    group = parser.getgroup("virtual machines")
    group.addoption("--vm-connect", default=None, metavar="URI", help="libvirt URI for VM fixtures")
    group.addoption("--vm-image", default="micro", metavar="NAME", help="image for VM fixtures")
    group.addoption("--vm-accel", default="auto", metavar="ACCEL", help="accelerator: auto, kvm, tcg or require-kvm")
    group.addoption("--vm-timeout", default=120.0, type=float, metavar="SECONDS", help="longest wait for a guest's SSH")


@dataclass(frozen=True, slots=True)
class GuestVM:
    """A VM in a test's hands."""

    host: Host
    name: str

    def run(self, *argv: str, data: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Run a command in the guest with ``data`` as its input.

        Raises subprocess.CalledProcessError when it fails and ``check`` is set.
        """
        from vmctl import guest

        out, err = bytearray(), bytearray()
        with tempfile.TemporaryFile() as given:
            given.write(data)
            given.seek(0)
            code = guest.execute(self.host, self.name, list(argv), stdin=given.fileno(), out=out.extend, err=err.extend)
        done = subprocess.CompletedProcess(list(argv), code, bytes(out), bytes(err))
        if check:
            done.check_returncode()
        return done


def _create(host: Host, config: pytest.Config, name: str, **fields: Any) -> GuestVM:
    from vmctl import creation, readiness
    from vmctl.events import silent
    from vmctl.spec import VM, AccelChoice

    goal = readiness.Goal(fields.pop("wait", "ssh"))
    values = {"image": config.getoption("--vm-image"), "accel": AccelChoice(config.getoption("--vm-accel"))}
    made = creation.create(host, VM(name, **values | fields), silent)
    readiness.wait_for(host, made.vm, goal, timeout_s=config.getoption("--vm-timeout"), report=silent)
    return GuestVM(host, name)


def _delete(host: Host, name: str) -> None:
    from vmctl import deletion
    from vmctl.errors import NotFound
    from vmctl.events import silent

    try:
        deletion.delete(host, name, silent)
    except NotFound:
        return  # the test deleted it, or its creation undid itself


@pytest.fixture(scope="session")
def vm_host(pytestconfig: pytest.Config) -> Iterator[Host]:
    """The host that VM fixtures run on."""
    from vmctl.hosts import open_host

    with open_host(pytestconfig.getoption("--vm-connect")) as host:
        yield host


@pytest.fixture
def make_vm(vm_host: Host, pytestconfig: pytest.Config) -> Iterator[Callable[..., GuestVM]]:
    """A function that makes a VM and waits for it (``wait="ssh"``); keywords are spec.VM's. All are gone afterwards."""
    with ExitStack() as stack:

        def make(name: str | None = None, **fields: Any) -> GuestVM:
            chosen = name or f"test-{secrets.token_hex(4)}"
            stack.callback(_delete, vm_host, chosen)
            return _create(vm_host, pytestconfig, chosen, **fields)

        yield make


@pytest.fixture(scope="session")
def shared_vm(vm_host: Host, pytestconfig: pytest.Config) -> Iterator[GuestVM]:
    """One running guest for tests that leave it as they found it."""
    name = f"shared-{secrets.token_hex(4)}"
    try:
        yield _create(vm_host, pytestconfig, name)
    finally:
        _delete(vm_host, name)
