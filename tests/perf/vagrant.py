"""`vmctl create --wait ssh` of debian-12 beside `vagrant up` of the same disk, as a box that vmctl exported.

Turn by turn, each from its exec until the guest can be logged in to, 1 vCPU and 1 GiB each. Vagrant's first `up`, which
copies the box's disk into libvirt's pool, does not count, nor does making and adding the box. Then snapshots with
memory of both, taken and gone back to: until the command ends, and until the guest's SSH server greets again.

Usage, as root: python tests/perf/vagrant.py [ROUNDS]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from boot import VMCTL, banner, told

from vmctl import image_build
from vmctl.events import silent
from vmctl.hosts import decide_accel, open_host
from vmctl.spec import Accel, AccelChoice
from vmctl.wait import wait_until

BOX, TIMEOUT_S = "vmctl-perf/debian-12", 900
VAGRANTFILE = """
Vagrant.configure("2") do |config|
  config.vm.box = "{box}"
  config.vm.boot_timeout = 600
  config.vm.synced_folder ".", "/vagrant", disabled: true
  config.vm.provider :libvirt do |libvirt|
    libvirt.driver = "{driver}"
    libvirt.cpu_mode = "{cpu}"
    libvirt.memory = 1024
    libvirt.cpus = 1
    libvirt.default_prefix = "perf-vagrant-"
  end
end
"""


def timed(argv: list[str], **options: object) -> float:
    """Seconds of one run."""
    began = time.monotonic()
    subprocess.run(argv, check=True, capture_output=True, timeout=TIMEOUT_S, **options)  # type: ignore[call-overload]
    return time.monotonic() - began


def created(name: str) -> float:
    """Seconds of vmctl's create until SSH answers."""
    return timed([*VMCTL, "-q", "create", name, "--image", "debian-12", "--memory", "1G", "--wait", "ssh"])


def delete(name: str) -> None:
    """Delete the VM, whatever became of it."""
    subprocess.run([*VMCTL, "-q", "delete", name, "--yes"], check=False, capture_output=True)


def taken_and_reverted(take: list[str], revert: list[str], domain: str, **options: object) -> tuple[float, ...]:
    """Seconds of taking a snapshot, of going back to it, and until its SSH server greets again."""
    took = timed(take, **options)
    said = subprocess.run(["virsh", "-q", "domifaddr", domain], check=True, capture_output=True, text=True).stdout
    address = said.split()[3].partition("/")[0]
    began = time.monotonic()
    back = timed(revert, **options)
    wait_until(lambda: banner(address), what="banner", timeout_s=TIMEOUT_S, interval_s=0.03)
    return took, back, time.monotonic() - began


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with open_host() as host:
        image_build.build(host, "debian-12", silent)
        accel = decide_accel(host, AccelChoice.AUTO).chosen
    driver, cpu = ("kvm", "host-passthrough") if accel is Accel.KVM else ("qemu", "maximum")
    with tempfile.TemporaryDirectory(prefix="vmctl-bench-", dir="/var/tmp") as folder:
        Path(folder, "Vagrantfile").write_text(VAGRANTFILE.format(box=BOX, driver=driver, cpu=cpu))
        env = os.environ | {"VAGRANT_HOME": f"{folder}/home", "VAGRANT_CHECKPOINT_DISABLE": "1"}
        where: dict[str, object] = {"cwd": folder, "env": env, "stdin": subprocess.DEVNULL}
        timed([*VMCTL, "-q", "image", "export", "debian-12", f"{folder}/debian-12.box"])
        timed(["vagrant", "box", "add", "--name", BOX, f"{folder}/debian-12.box"], **where)
        theirs, own, name = [], [], f"bench-{os.getpid()}"
        snapshots: tuple[list[tuple[float, ...]], list[tuple[float, ...]]] = ([], [])
        try:
            for number in range(rounds + 1):
                theirs.append(timed(["vagrant", "up", "--provider=libvirt"], **where))
                if number == rounds:
                    for turn in range(rounds):
                        back = ["vagrant", "snapshot", "restore", "--no-provision", f"s{turn}"]
                        save = ["vagrant", "snapshot", "save", f"s{turn}"]
                        snapshots[0].append(taken_and_reverted(save, back, "perf-vagrant-default", **where))
                timed(["vagrant", "destroy", "-f"], **where)
                if number:
                    own.append(created(name))
                if number == rounds:
                    for turn in range(rounds):
                        ref = f"{name}.s{turn}"
                        back = [*VMCTL, "-q", "snapshot", "revert", ref, "--yes"]
                        snapshots[1].append(taken_and_reverted([*VMCTL, "-q", "snapshot", "create", ref], back, name))
                delete(name)
        finally:
            delete(name)
            subprocess.run(["vagrant", "destroy", "-f"], check=False, capture_output=True, **where)  # type: ignore[call-overload]
            for volume in subprocess.run(
                ["virsh", "-q", "vol-list", "default"], check=False, capture_output=True, text=True
            ).stdout.split():
                if volume.startswith("vmctl-perf-VAGRANTSLASH"):
                    subprocess.run(["virsh", "-q", "vol-delete", volume, "default"], check=False, capture_output=True)
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"debian-12, nothing to SSH, {accel}, 1 vCPU, 1 GiB, {rounds} rounds, turn by turn; load now {load}")
    print(told("vagrant up", theirs[1:]))
    print(told("vmctl create --wait ssh", own))
    print(
        f"share of vagrant's time    {statistics.median(own) / statistics.median(theirs[1:]):.2f}   (aim: at most 0.50)"
    )
    for who, verbs, found in (
        ("vagrant", ("save", "restore", "restore, to SSH"), snapshots[0]),
        ("vmctl", ("create", "revert", "revert, to SSH"), snapshots[1]),
    ):
        for verb, seconds in zip(verbs, zip(*found, strict=True), strict=True):
            print(told(f"{who} snapshot {verb}", list(seconds)))


if __name__ == "__main__":
    main()
