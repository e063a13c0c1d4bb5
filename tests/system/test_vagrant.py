"""A box vmctl made, in the hands of Vagrant itself with its libvirt provider."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import Shell

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]

VAGRANTFILE = """
Vagrant.configure("2") do |config|
  config.vm.box = "vmctl-test/debian-12"
  config.vm.hostname = "boxed"
  config.vm.boot_timeout = 600
  config.vm.provider :libvirt do |libvirt|
    libvirt.driver = "%s"
    libvirt.memory = 1024
    libvirt.cpus = 1
    libvirt.cpu_mode = "%s"
    libvirt.default_prefix = "t-vagrant-"
  end
end
"""


@pytest.fixture
def project(debian_image: None, tmp_path: Path) -> Iterator[Path]:
    """A folder with a Vagrantfile, destroyed as Vagrant does it."""
    accel = Shell().json("host", "info")["accel"]["chosen"]
    driver, cpu = ("kvm", "host-passthrough") if accel == "kvm" else ("qemu", "maximum")
    (tmp_path / "Vagrantfile").write_text(VAGRANTFILE % (driver, cpu))
    yield tmp_path
    vagrant(tmp_path, "destroy", "-f", check=False)


def vagrant(project: Path, *words: str, check: bool = True) -> str:
    """What Vagrant says, with a home of its own."""
    env = os.environ | {
        "VAGRANT_HOME": str(project / "home"),
        "VAGRANT_NO_COLOR": "1",
        "VAGRANT_CHECKPOINT_DISABLE": "1",
    }
    done = subprocess.run(
        ["vagrant", *words], cwd=project, env=env, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_add_up_ssh_destroy(project: Path) -> None:
    shell, box = Shell(), project / "debian-12.box"
    shell.run("image", "export", "debian-12", str(box), timeout=600)
    vagrant(project, "box", "add", "--name", "vmctl-test/debian-12", str(box))
    try:
        vagrant(project, "up", "--provider=libvirt")
        assert vagrant(project, "ssh", "-c", "hostname; whoami; sudo id -u").split() == ["boxed", "vagrant", "0"]
        (row,) = [row for row in shell.json("list") if row["name"].startswith("t-vagrant-")]
        assert row["state"] == "running"
        vagrant(project, "destroy", "-f")
        assert not [row for row in shell.json("list") if row["name"].startswith("t-vagrant-")]
    finally:
        for volume in shell.virsh("vol-list", "default", check=False).split():
            if volume.startswith("vmctl-test-VAGRANTSLASH"):
                shell.virsh("vol-delete", volume, "default", check=False)
