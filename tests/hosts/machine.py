"""One host of a testbed: booting it, what is done to it, and what is done in it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

_HERE = Path(__file__).parent
_ENTER = _HERE.parent / "testhost/enter.py"
_PR_SET_PDEATHSIG = 1
_BOOT_S = 60.0
_libc = ctypes.CDLL(None, use_errno=True)
_PID_FILES = {"libvirtd": "/run/libvirtd.pid", "virtlogd": "/run/virtlogd.pid", "sshd": "/run/sshd.pid"}
_DAEMON = "/run/testbed/daemon"


class CommandFailed(AssertionError):
    """A command on a host, or on this machine for it, ended with an error; its words are the message."""


def sh(*argv: str, check: bool = True, timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it said."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False, **options)
    if check and done.returncode:
        raise CommandFailed(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def tied() -> None:
    """In a new child: end when this process does."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Machine:
    """A libvirt host in namespaces of its own. See the package's docstring."""

    furnish = "furnish.sh"

    def __init__(self, folder: Path, name: str, address: str, bridge: str, key: Path) -> None:
        self.folder, self.name, self.address, self.key = folder, name, address, key
        self._bridge = bridge
        self._port = f"{bridge[-3:]}-{name}"
        self._process: subprocess.Popen[str] | None = None
        self._relay: subprocess.Popen[bytes] | None = None
        self._rate: str | None = None
        self._pid = 0

    # --- how it is reached ----------------------------------------------------------------------------------------

    @property
    def ssh_uri(self) -> str:
        """By ssh, with the testbed's key; who pins the host key is up to the caller (`host_key`)."""
        return f"qemu+ssh://root@{self.address}/system?keyfile={self.key}"

    @property
    def peer_uri(self) -> str:
        """By ssh as the other hosts reach it: root's own key there, host keys pinned in root's known_hosts."""
        return f"qemu+ssh://root@{self.address}/system"

    @property
    def tcp_uri(self) -> str:
        """Without authentication."""
        return f"qemu+tcp://{self.address}/system"

    @property
    def tls_uri(self) -> str:
        """By TLS, for the tests' side; hosts need no ``pkipath``."""
        return f"qemu+tls://{self.address}/system?pkipath={self.folder.parent / 'client'}"

    @property
    def host_key(self) -> str:
        """Its SSH host key, as a line of known_hosts has it: kind and key."""
        return " ".join((self.folder / "own/host_key.pub").read_text().split()[:2])

    @property
    def images(self) -> Path:
        """Its pool of images, seen from here."""
        shared = self.folder / "shared"
        return (shared if shared.exists() else self.folder / "disk/vmctl") / "vmctl-images"

    # --- in it ----------------------------------------------------------------------------------------------------

    def run(self, *argv: str, check: bool = True, timeout: float = 60, **options: Any) -> Any:
        """Run a command in the host as root; text in and out. Raises CommandFailed."""
        return sh(*self._inside(*argv), check=check, timeout=timeout, **options)

    def popen(self, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        """Begin a command in the host; it ends with this process at the latest."""
        return subprocess.Popen(self._inside(*argv), preexec_fn=tied, **options)

    def virsh(self, *words: str, check: bool = True) -> str:
        """What virsh says in the host."""
        return str(self.run("virsh", "-q", *words, check=check).stdout.strip())

    def _inside(self, *argv: str) -> list[str]:
        return ["nsenter", "-t", str(self._pid), "-m", "-u", "-i", "-n", "-p", "-r", "-w", *argv]

    @property
    def init(self) -> int:
        """The process id, outside, of its first process; 0 without power."""
        return self._pid

    def pid_of(self, daemon: str) -> str:
        """The process id, inside, of libvirtd, virtlogd, sshd or `qemu:VM`."""
        path = f"/run/libvirt/qemu/{daemon[5:]}.pid" if daemon.startswith("qemu:") else _PID_FILES[daemon]
        return str(self.run("cat", path).stdout.strip())

    def kill(self, daemon: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to libvirtd, virtlogd, sshd or `qemu:VM`."""
        self.run("kill", f"-{int(number)}", self.pid_of(daemon))

    def start(self, daemon: str) -> None:
        """Start libvirtd, virtlogd or sshd again, and wait until libvirtd answers."""
        self.run(_DAEMON, daemon)

    # --- power ----------------------------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        """Whether it has power."""
        return self._process is not None and self._process.poll() is None

    def boot(self) -> None:
        """Power on, and wait until its libvirt answers. Raises CommandFailed with its last words."""
        log = (self.folder / "log/furnish.log").open("a")
        process = subprocess.Popen(
            [sys.executable, str(_ENTER), str(_HERE / self.furnish), str(self.folder), self.name, f"{self.address}/24"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            preexec_fn=tied,
            start_new_session=True,  # a Ctrl-C at the terminal is not for the hosts
        )
        log.close()
        self._process = process
        self._hear(process.stdout, "entered")
        sh("ip", "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        sh("ip", "link", "set", self._port, "master", self._bridge, "up")
        assert process.stdin is not None
        process.stdin.write("wired\n")
        process.stdin.flush()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._pid = int(children[0])

    def wait_until_up(self) -> None:
        """The end of ``boot``, for several that boot side by side."""
        assert self._process is not None
        self._hear(self._process.stdout, "up")
        if self._rate:
            self.limit(self._rate)

    def _hear(self, stream: IO[str] | None, word: str) -> None:
        assert stream is not None
        said = stream.readline().strip()
        if said != word:
            words = (self.folder / "log/furnish.log").read_text().splitlines()[-12:]
            raise CommandFailed(f"host {self.name} did not come up ({said or 'it ended'}):\n" + "\n".join(words))

    def lose_power(self) -> None:
        """Pull its plug: all that runs in it ends at once, all it had in memory is lost. Its disk stays."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.kill(self._pid or self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if self._relay is not None:
            self.slow()
        # The kernel takes its cable away a moment after its last process.
        sh("ip", "link", "del", self._port, check=False)
        self._process, self._pid = None, 0

    # --- its cable and its disk -----------------------------------------------------------------------------------

    def limit(self, rate: str | None) -> None:
        """At most ``rate`` (tc's words, such as 50mbit) in each direction; None lifts it."""
        self._rate = rate
        sh("tc", "qdisc", "del", "dev", self._port, "root", check=False)
        self.run("tc", "qdisc", "del", "dev", "eth0", "root", check=False)
        if rate:
            words = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "100ms")
            sh("tc", "qdisc", "add", "dev", self._port, *words)
            self.run("tc", "qdisc", "add", "dev", "eth0", *words)

    def cut(self) -> None:
        """Pull its cable."""
        sh("ip", "link", "set", self._port, "nomaster")

    def mend(self) -> None:
        """Plug its cable in again."""
        sh("ip", "link", "set", self._port, "master", self._bridge)

    def cut_from(self, other: Machine) -> None:
        """Drop all that goes between the two hosts themselves (not their guests' packets)."""
        rule = "add table inet cut; add chain inet cut in { type filter hook input priority 0; }; "
        self.run("nft", f"{rule} add rule inet cut in ip saddr {other.address} drop")
        other.run("nft", f"{rule} add rule inet cut in ip saddr {self.address} drop")

    def mend_from(self, other: Machine) -> None:
        """Undo ``cut_from``; other cuts of the two are undone too."""
        for one in (self, other):
            one.run("nft", "delete table inet cut", check=False)

    def resize_disk(self, size: str) -> None:
        """Give the file system below /var/lib/libvirt another size, as 200M."""
        sh("mount", "-o", f"remount,size={size}", str(self.folder / "disk"))

    def slow(self, *, delay_ms: float = 0, loss_percent: float = 0) -> None:
        """Delay each packet, each way, and lose some; without arguments as before."""
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
            self._relay = None
            sh("ip", "link", "del", f"{self._port}a")
            self.mend()
        if not (delay_ms or loss_percent):
            return
        near, far = f"{self._port}a", f"{self._port}b"
        sh("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        for dev in (near, far):
            sh("ip", "link", "set", dev, "up")
        relay = str(_HERE / "relay.py")
        sh(sys.executable, relay, "--plain", far)
        sh("nsenter", "-t", str(self._pid), "-n", sys.executable, relay, "--plain", "eth0")
        self.cut()
        sh("ip", "link", "set", far, "master", self._bridge)
        argv = [sys.executable, relay, self._port, near, str(delay_ms), str(loss_percent)]
        self._relay = subprocess.Popen(argv, stdout=subprocess.PIPE, preexec_fn=tied, start_new_session=True)
        assert self._relay.stdout is not None and self._relay.stdout.readline() == b"ready\n"
