"""How long from nothing to an SSH banner: `vmctl create --wait ssh` beside raw QEMU, turn by turn, in one run.

Raw QEMU gets the same kernel, initramfs, command line, disk format and seed, on a tap of the same bridge with an
address of the same network, and is timed from its exec to the banner. vmctl is timed from its exec to its end.

Usage, as root: python tests/perf/boot.py [ROUNDS]
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vmctl import image_build, images, networks, render, seed
from vmctl.accel import Decision
from vmctl.events import silent
from vmctl.hosts import Host, decide_accel, open_host
from vmctl.spec import Accel, AccelChoice
from vmctl.wait import wait_until

TIMEOUT_S = 60.0
VMCTL = [sys.executable, "-m", "vmctl"]


def banner(address: str) -> bool | None:
    """Whether an SSH server greets at the address."""
    try:
        with socket.create_connection((address, 22), timeout=0.15) as sock:
            sock.settimeout(5)
            return sock.recv(4) == b"SSH-" or None
    except OSError:
        return None


def raw(
    host: Host, decision: Decision, folder: Path, number: int, *, name: str = "micro", memory_mib: int = 512
) -> float:
    """Seconds from QEMU's exec to the banner."""
    image, net = images.find(host, name), networks.ensure(host, silent)
    entry = net.reservations[-1 - number]
    tap, disk, iso = f"vbench{os.getpid() % 10000}", folder / "disk.qcow2", folder / "seed.iso"
    key = seed.new_host_key("raw")
    view = render.SeedView(f"raw-{number}", "raw", ("ssh-ed25519 AAAA",), key.private, key.public)
    iso.write_bytes(seed.build_iso({"user-data": render.user_data(view), "meta-data": render.meta_data(view)}))
    backing = ["-f", "qcow2", "-b", image.disk, "-F", "qcow2"]
    subprocess.run(["qemu-img", "create", "-q", *backing, str(disk)], check=True)
    for words in (["tuntap", "add", tap, "mode", "tap"], ["link", "set", tap, "master", net.bridge, "up"]):
        subprocess.run(["ip", *words] if words[0] == "link" else ["ip", *words], check=True)
    cpu = "host" if decision.chosen is Accel.KVM else "max"
    command = [
        str(host.facts.emulator), "-M", "q35", "-accel", decision.chosen, "-cpu", cpu,
        "-smp", "1", "-m", str(memory_mib),
        "-nodefaults", "-display", "none", "-serial", "null",
        "-kernel", image.kernel, "-initrd", image.initrd, "-append", image.manifest.cmdline,
        "-drive", f"file={disk},if=virtio,format=qcow2", "-drive", f"file={iso},if=virtio,format=raw,readonly=on",
        "-netdev", f"tap,id=n,ifname={tap},script=no,downscript=no", "-device",
        f"virtio-net-pci,netdev=n,mac={entry.mac}",
    ]  # fmt: skip
    began = time.monotonic()
    process = subprocess.Popen(command)
    try:
        wait_until(lambda: banner(entry.address), what="banner", timeout_s=5 * TIMEOUT_S, interval_s=0.03)
        return time.monotonic() - began
    finally:
        process.kill()
        process.wait()
        subprocess.run(["ip", "link", "delete", tap], check=True)


def ours(number: int) -> float:
    """Seconds from vmctl's exec to its end, the VM being reachable."""
    name = f"bench-{os.getpid()}-{number}"
    began = time.monotonic()
    try:
        create = [*VMCTL, "-q", "create", name, "--image", "micro", "--wait", "ssh"]
        subprocess.run(create, check=True, capture_output=True, timeout=TIMEOUT_S)
        return time.monotonic() - began
    finally:
        subprocess.run([*VMCTL, "-q", "delete", name, "--yes"], check=False, capture_output=True)


def told(name: str, samples: list[float]) -> str:
    """One line: median, least and most."""
    return f"{name:<26} median {statistics.median(samples):.2f} s   {min(samples):.2f} to {max(samples):.2f} s"


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with open_host() as host, tempfile.TemporaryDirectory(prefix="vmctl-bench-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        image_build.build(host, "micro", silent)
        decision = decide_accel(host, AccelChoice.AUTO)
        samples: dict[str, list[float]] = {"raw": [], "vmctl": []}
        for number in range(rounds):
            samples["raw"].append(raw(host, decision, Path(folder), number))
            samples["vmctl"].append(ours(number))
    print(f"micro VM, nothing to SSH banner, {decision.chosen}, {rounds} rounds, turn by turn")
    print(told("raw QEMU", samples["raw"]))
    print(told("vmctl create --wait ssh", samples["vmctl"]))
    ratio = statistics.median(samples["vmctl"]) / statistics.median(samples["raw"])
    print(f"ratio of medians           {ratio:.2f}   (aim: at most 1.30)")


if __name__ == "__main__":
    main()
