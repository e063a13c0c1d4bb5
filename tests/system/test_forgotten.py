"""A QEMU that libvirtd, killed at a bad moment, does not know of any more: found, named, and nobody else's disk."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.system import libvirtd
from tests.system.conftest import Shell
from vmctl.wait import wait_until

pytestmark = pytest.mark.system


def forget(shell: Shell, vm: str) -> int:
    """Restart libvirtd as it is after a kill in the moment of a switch-over; the process it does not know of then."""
    status = Path(f"/run/libvirt/qemu/{vm}.xml")
    daemon, qemu = (int(Path(f"/run/libvirt{name}").read_text()) for name in ("d.pid", f"/qemu/{vm}.pid"))
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{daemon}").exists(), what="end of libvirtd", timeout_s=30)
    text = status.read_text()
    status.write_text(text.replace("<target dev='vda'", "<mirror type='file' job=''/>\n<target dev='vda'", 1))
    libvirtd.begin()
    return qemu


def processes(shell: Shell) -> list[dict[str, str]]:
    """What doctor says of processes."""
    done = shell.run("doctor", "-o", "json", check=None)
    return [one for one in json.loads(done.stdout) if one["name"] == "processes"]


def test_a_vm_that_libvirt_forgot_is_found_and_left_alone(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro")
    assert [one["result"] for one in processes(shell)] == ["ok"]
    qemu = forget(shell, name)
    assert shell.virsh("domstate", name) == "shut off" and Path(f"/proc/{qemu}").exists()
    (found,) = processes(shell)
    assert found["result"] == "failed" and name in found["detail"] and f"kill {qemu}" in found["mend"]
    for words in (
        ("start", name),
        ("delete", name, "--yes"),
        ("clone", name, f"{name}-new"),
        ("disk", "resize", f"{name}:vda", "+1G"),
        ("disk", "compact", f"{name}:vda"),
        ("snapshot", "create", f"{name}.one"),
        ("backup", "create", name, "--folder", "/var/tmp/forgotten"),
    ):
        refused = shell.run(*words, check=5).stderr
        assert re.search(rf"runs, in process {qemu}, and libvirt has forgotten it\nhint: .*kill {qemu}", refused), (
            refused
        )
    os.kill(qemu, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{qemu}").exists(), what="end of QEMU", timeout_s=30)
    assert [one["result"] for one in processes(shell)] == ["ok"]
    shell.run("start", name)
