"""A testbed: its bridge, its machines, and clearing away what a killed one left."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import certificates, files, sshd
from tests.hosts.machine import Machine, sh, tied

_ROOT = Path("/run/vmctl-hosts")
_MARKER = Path("/run/vmctl-test-host")
_MOST = 200


@dataclass(frozen=True)
class Testbed:
    """Hosts that run, on one Ethernet with this process."""

    number: int
    folder: Path
    bridge: str
    key: Path
    machines: tuple[Machine, ...]

    __test__ = False  # pytest: no test class

    @property
    def known_hosts(self) -> Path:
        """All hosts' SSH keys, by address and by name."""
        return self.folder / "known_hosts"

    def guest_address(self, mac: str) -> str:
        """The address that DHCP gave the guest with that MAC; "" for none yet."""
        for line in (self.folder / "leases").read_text().splitlines():
            if line.split()[1] == mac:
                return line.split()[2]
        return ""

    def limit(self, rate: str | None) -> None:
        """At most ``rate`` on each host's cable."""
        for machine in self.machines:
            machine.limit(rate)


def _clear(folder: Path, bridge: str) -> None:
    """Take away what a testbed of that number has, or left."""
    sh("ip", "link", "del", bridge, check=False)
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if line.split()[1].startswith(f"{folder}/"):
            sh("umount", "-l", line.split()[1])
    shutil.rmtree(folder, ignore_errors=True)


def _take(number: int) -> int | None:
    """A handle on a number, None while another testbed has it."""
    handle = os.open(_ROOT / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _at(number: int) -> tuple[Path, str]:
    """The folder and the bridge of a number."""
    return _ROOT / str(number), f"vmctl-bed{number:03}"


def _clear_killed() -> None:
    """Take away what testbeds left that are no more."""
    for path in _ROOT.glob("*.lock"):
        number = int(path.stem)
        if _at(number)[0].exists() and (handle := _take(number)) is not None:
            _clear(*_at(number))
            os.close(handle)


@contextmanager
def _number() -> Iterator[int]:
    """A number that no other testbed has while this process lives."""
    _ROOT.mkdir(exist_ok=True)
    _clear_killed()
    for number in range(_MOST):
        if (handle := _take(number)) is not None:
            try:
                yield number
            finally:
                os.close(handle)
            return
    raise AssertionError(f"{_MOST} testbeds run already")


@contextmanager
def bridged() -> Iterator[tuple[int, Path, str]]:
    """A number, an empty folder, and an Ethernet: a bridge with the tests' side on it. All is gone afterwards."""
    with _number() as number, ExitStack() as stack:
        folder, bridge = _at(number)
        _clear(folder, bridge)
        stack.callback(_clear, folder, bridge)
        folder.mkdir(mode=0o755)
        sh("ip", "link", "add", bridge, "type", "bridge", "stp_state", "0", "forward_delay", "0")
        sh("ip", "addr", "add", f"10.98.{number}.1/24", "dev", bridge)
        sh("ip", "link", "set", bridge, "up")
        yield number, folder, bridge


@contextmanager
def booted(
    count: int = 2, *, shared: bool = False, tls: bool = False, disk: str = "2G", qemu_root: bool = False
) -> Iterator[Testbed]:
    """Boot ``count`` hosts; ``disk`` is the size of each one's /var/lib/libvirt. Only in a test host (tests/run).

    ``qemu_root``: QEMU runs as root, which post-copy needs where the kernel lets root alone handle page faults.
    """
    assert _MARKER.exists(), "a testbed is made only inside a test host: tests/run, or python -m tests.hosts up"
    assert 1 <= count <= 5
    with bridged() as (number, folder, bridge), ExitStack() as stack:
        bed = _furnish(number, folder, bridge, count, shared=shared, tls=tls, disk=disk, qemu_root=qemu_root)
        for machine in bed.machines:
            stack.callback(machine.lose_power)
        stack.callback(_end, _dhcp(bed))
        for machine in bed.machines:
            machine.boot()
        for machine in bed.machines:
            machine.wait_until_up()
        yield bed


def _dhcp(bed: Testbed) -> subprocess.Popen[bytes]:
    """A DHCP server on the bridge, for guests."""
    (bed.folder / "leases").touch()
    net = f"10.98.{bed.number}"
    argv = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--user=root", "--bind-interfaces"]
    argv += [f"--interface={bed.bridge}", f"--dhcp-range={net}.100,{net}.199,infinite", "--dhcp-authoritative"]
    argv += [f"--dhcp-leasefile={bed.folder}/leases", f"--pid-file={bed.folder}/dnsmasq.pid", "--no-ping"]
    with (bed.folder / "dnsmasq.log").open("w") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log, preexec_fn=tied, start_new_session=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _furnish(
    number: int, folder: Path, bridge: str, count: int, *, shared: bool, tls: bool, disk: str, qemu_root: bool
) -> Testbed:
    key = folder / "key"
    files.key_pair(key, "testbed")
    machines = tuple(
        Machine(folder / f"h{i}", f"h{i}", f"10.98.{number}.{10 + i}", bridge, key) for i in range(1, count + 1)
    )
    if shared:
        (folder / "shared").mkdir()
    if tls:
        certificates.authority(folder / "ca")
        certificates.client(folder / "ca", folder / "client", {machine.name: machine.address for machine in machines})
    for machine in machines:
        if tls:
            certificates.host(folder / "ca", machine.folder / "pki", machine.name, machine.address)
        files.furnish(machine.folder, machine.name, machine.address, sshd.folder(), qemu_root=qemu_root)
        sh("mount", "-t", "tmpfs", "-o", f"size={disk},mode=0755", "tmpfs", str(machine.folder / "disk"))
        (machine.folder / "disk/images").mkdir()
        if shared:
            (machine.folder / "shared").mkdir()
            sh("mount", "--bind", str(folder / "shared"), str(machine.folder / "shared"))
    addresses = {machine.name: machine.address for machine in machines}
    keys = {machine.name: machine.host_key for machine in machines}
    for machine in machines:
        files.introduce(machine.folder, machine.name, addresses, keys, key)
    lines = "".join(f"{name},{addresses[name]} {host_key}\n" for name, host_key in keys.items())
    (folder / "known_hosts").write_text(lines)
    return Testbed(number, folder, bridge, key, machines)
