"""From two bare Debian machines to a drained host, as the README has it: python -m tests.hosts.bare

Each machine is a minimal Debian with an SSH server, in namespaces of its own. There is no network in there: apt gets
all from a folder, in which lies what a real one would fetch, and which is filled before. What is typed, and what comes
of it, is printed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.hosts import files
from tests.hosts.machine import Machine, sh
from tests.hosts.testbed import bridged
from vmctl.builder import debs
from vmctl.host_setup import PACKAGES

_ROOT = Path(__file__).parents[2]
_MARKER = Path("/run/vmctl-test-host")
_NAMES = ("big", "far")


class Bare(Machine):
    """A machine with nothing but SSH."""

    furnish = "bare.sh"


def _cache() -> Path:
    return debs.cache_folder() / "bare"


def prepare() -> None:
    """A minimal Debian, and what setting it up installs with all it needs, fetched once."""
    cache = _cache()
    if (cache / "done").exists() and (cache / "done").read_text() == repr(PACKAGES):
        return
    shutil.rmtree(cache, ignore_errors=True)
    (cache / "debs").mkdir(parents=True)
    fetch = shlex.join(["apt-get", "-q", "-y", "--no-install-recommends", "--download-only", "install", *PACKAGES])
    subprocess.run(
        [
            *("mmdebstrap", "--variant=minbase", "--include=openssh-server"),
            f'--customize-hook=APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" {fetch}',
            f"--customize-hook=copy-out /var/cache/apt/archives {cache}",
            *("bookworm", str(cache / "root.tar")),
        ],
        check=True,
    )
    for path in (cache / "archives").glob("*.deb"):
        path.rename(cache / "debs" / path.name)
    with (cache / "debs/Packages").open("w") as file:
        subprocess.run(["dpkg-scanpackages", "-m", "."], check=True, stdout=file, cwd=cache / "debs")
    (cache / "done").write_text(repr(PACKAGES))


def boot(folder: Path, number: int, bridge: str, stack: ExitStack) -> list[Bare]:
    """Two of them, each with a file system in memory."""
    key = folder / "key"
    files.key_pair(key, "bare")
    machines = []
    for at, name in enumerate(_NAMES, 11):
        machine = Bare(folder / name, name, f"10.98.{number}.{at}", bridge, key)
        root = machine.folder / "root"
        root.mkdir(parents=True)
        (machine.folder / "log").mkdir()
        sh("mount", "-t", "tmpfs", "-o", "size=3G,mode=0755", "tmpfs", str(root))
        sh("tar", "-C", str(root), "-xf", str(_cache() / "root.tar"), timeout=300)
        sh("chroot", str(root), "sh", "-c", "rm -f /etc/ssh/ssh_host_*; ssh-keygen -A")
        shutil.copytree(_cache() / "debs", root / "var/debs")
        (root / "etc/apt/sources.list").write_text("deb [trusted=yes] file:/var/debs ./\n")
        (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{machine.address} {name}\n")
        (root / "etc/hostname").write_text(f"{name}\n")
        (root / "root/.ssh").mkdir(mode=0o700)
        shutil.copy(key.with_suffix(".pub"), root / "root/.ssh/authorized_keys")
        stack.callback(machine.lose_power)
        machine.boot()
        machine.wait_until_up()
        machines.append(machine)
    return machines


def walk(machines: list[Bare], config: Path) -> None:
    """As a user would, and told as to one."""
    env = {**os.environ, "XDG_CONFIG_HOME": str(config)}

    def vmctl(line: str, *hidden: str, check: bool = True) -> None:
        print(f"$ vmctl {line}", flush=True)
        began = time.monotonic()
        words = [sys.executable, "-m", "vmctl", *line.split(), *hidden]
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            cwd=_ROOT,
        )
        print(f"{done.stdout}# {done.returncode} after {time.monotonic() - began:.1f} s", flush=True)
        assert not check or done.returncode == 0

    for machine, more in zip(machines, ("", " --peers"), strict=True):
        line = f"host setup root@{machine.address} --name {machine.name} --tls{more}"
        host_key = (machine.folder / "root/etc/ssh/ssh_host_ed25519_key.pub").read_text()
        hidden = ("--keyfile", str(machine.key), "--host-key", host_key, "--yes")
        vmctl(line, *hidden)
        vmctl(line, *hidden)  # changes nothing
    vmctl("-c big image build micro")
    vmctl("-c big create web1 --image micro --wait agent")
    vmctl("host check")
    vmctl("-c big migrate web1 --to far --copy-storage overlay --tls")
    vmctl("-c far migrate web1 --to big --copy-storage overlay --tls")
    vmctl("host drain big --copy-storage overlay --yes")
    vmctl("list --all-hosts")


def main() -> None:
    if not _MARKER.exists():
        prepare()
        os.execv(_ROOT / "tests/run", ["tests/run", "--run", sys.executable, "-m", "tests.hosts.bare"])
    with bridged() as (number, folder, bridge), ExitStack() as stack, TemporaryDirectory() as config:
        walk(boot(folder, number, bridge, stack), Path(config))


if __name__ == "__main__":
    main()
