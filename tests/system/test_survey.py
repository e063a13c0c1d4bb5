"""Looking at a host whose guests hang, and at one that is not there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.system


def test_a_hung_guest_holds_nothing_up(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmctl import survey
    from vmctl.cli.options import fleet_of_config
    from vmctl.hypervisor import connection

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "vmctl").mkdir()
    hosts = '[host.here]\nuri = "qemu:///system"\n[host.gone]\nuri = "qemu+unix:///system?socket=/nowhere"\n'
    (tmp_path / "vmctl/config.toml").write_text(hosts)
    names = [f"{name}-{number}" for number in range(3)]
    with connection.connect("qemu:///system") as conn:
        for one in names:
            conn.handle.createXML(
                f"<domain type='qemu'><name>{one}</name><memory unit='MiB'>32</memory><vcpu>2</vcpu>"
                "<os><type arch='x86_64'>hvm</type></os></domain>"
            )
    hung = [int(Path(f"/run/libvirt/qemu/{one}.pid").read_text()) for one in names[:2]]
    try:
        for stopped in ((), hung[:1], hung):
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            found = survey.survey(fleet_of_config(), timeout_s=30)
            assert time.monotonic() - began < 25
            here, gone = found.census.hosts
            assert gone.problem and any(note.startswith("gone: ") for note in found.notes)
            assert here.cpus and 0 < here.available_mib <= here.memory_mib and 0 <= here.load <= here.cpus
            assert {"x86_64"} == {here.arch} and here.machines and here.accels
            seen = {vm.name: vm for vm in found.census.vms if vm.name in names}
            silent = [vm.name for vm in seen.values() if vm.pinned == "its QEMU does not answer"]
            assert silent == names[: len(stopped)]
            assert all((vm.running, vm.vcpus, vm.memory_mib) == (True, 2, 32) for vm in seen.values())
            assert all(vm.resident_mib > 0 for vm in seen.values() if vm.name not in silent)
    finally:
        for pid in hung:
            os.kill(pid, signal.SIGCONT)
        with connection.connect("qemu:///system") as conn:
            for one in names:
                conn.handle.lookupByName(one).destroy()
