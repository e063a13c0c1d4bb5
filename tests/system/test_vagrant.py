"""A box vmctl made, in the hands of Vagrant itself with its libvirt provider."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import REPO, Shell

pytestmark = [pytest.mark.system, pytest.mark.timeout(2400)]

BOX = "vmctl-test/debian-12"


@pytest.fixture(scope="module")
def home(debian_image: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of Vagrant's with our box in it."""
    folder, shell = tmp_path_factory.mktemp("vagrant"), Shell()
    box = folder / "debian-12.box"
    shell.run("image", "export", "debian-12", str(box), timeout=600)
    vagrant(folder, folder, "box", "add", "--name", BOX, str(box))
    box.unlink()
    yield folder
    for volume in shell.virsh("vol-list", "default", check=False).split():
        if volume.startswith("vmctl-test-VAGRANTSLASH"):
            shell.virsh("vol-delete", volume, "default", check=False)


def vagrant(home: Path, project: Path, *words: str, check: bool = True, **settings: str) -> str:
    """What Vagrant says, with a home of its own."""
    env = os.environ | {"VAGRANT_HOME": str(home), "VAGRANT_NO_COLOR": "1", "VAGRANT_CHECKPOINT_DISABLE": "1"}
    done = subprocess.run(
        ["vagrant", *words],
        cwd=project,
        env=env | settings,
        capture_output=True,
        text=True,
        timeout=2000,
        stdin=subprocess.DEVNULL,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_lab_of_this_repository(home: Path, tmp_path: Path) -> None:
    """Both hosts of the Vagrantfile at the top, all but their provisioning, which fetches packages."""
    shell = Shell()
    settings = {
        "VMCTL_BOX": BOX,
        "VMCTL_LAB_CPUS": "1",
        "VMCTL_LAB_MEMORY": "1024",
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
    }
    try:
        vagrant(home, REPO, "up", "--provider=libvirt", "--no-provision", **settings)
        for name, other in (("host1", "10.191.0.12"), ("host2", "10.191.0.11")):
            script = "hostname; whoami; sudo id -u; head -n 1 /vagrant/README.md; "
            script += f"ping -c 1 -W 20 {other} >/dev/null; echo $?"
            (row,) = [row for row in shell.json("list") if row["name"].endswith(f"_{name}")]
            assert row["state"] == "running" and row["accel"] == shell.json("host", "info")["accel"]["chosen"]
            told = vagrant(home, REPO, "ssh", name, "-c", script, **settings)
            assert told.split("\n")[:5] == [name, "vagrant", "0", "# vmctl", "0"]
        # One machine, one lease: what identifies it did not change on the way.
        macs = [line.split()[2] for line in shell.virsh("net-dhcp-leases", "vagrant-libvirt").splitlines()]
        assert len(macs) == len(set(macs)) == 2
        assert not (REPO / ".vagrant").exists()
    finally:
        vagrant(home, REPO, "destroy", "-f", check=False, **settings)
    assert not [row for row in shell.json("list") if row["name"].endswith(("_host1", "_host2"))]
