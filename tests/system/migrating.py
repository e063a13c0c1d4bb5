"""What the tests of migration share: a pair of hosts that vmctl knows, a guest on one of them, and where it is."""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Machine, Testbed
from tests.system.conftest import REPO, STORE, VMCTL, Shell
from vmctl.wait import wait_until


@dataclass(frozen=True)
class Pair:
    """A testbed whose hosts vmctl knows by their names, with the micro image in the store of the first."""

    bed: Testbed
    config: Path

    @property
    def shell(self) -> Shell:
        """vmctl with the config file that has the hosts."""
        return Shell()

    @property
    def env(self) -> dict[str, str]:
        """The environment with that config file."""
        return {**os.environ, "XDG_CONFIG_HOME": str(self.config)}

    def vmctl(self, *words: str, check: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.shell.run(*words, check=check, env=self.env, **options)

    def begin(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Run vmctl beside the test."""
        given = {"env": self.env, "cwd": REPO, "text": True, **options}
        pipe = subprocess.PIPE
        return subprocess.Popen([*VMCTL, *words], stdin=pipe, stdout=pipe, stderr=pipe, **given)

    def vmctl_within(self, enter: Sequence[str], *words: str) -> subprocess.CompletedProcess[str]:
        """vmctl in other namespaces, which the words before it enter. Must end with 0."""
        done = subprocess.run(
            [*enter, *VMCTL, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=REPO,
            env=self.env,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done

    def json(self, *words: str) -> Any:
        import json

        return json.loads(self.vmctl(*words, "-o", "json").stdout)

    def machine(self, name: str) -> Machine:
        return next(one for one in self.bed.machines if one.name == name)

    def where(self, vm: str) -> dict[str, str]:
        """The VM's state on each host that has it, by virsh there."""
        found = {}
        for one in self.bed.machines:
            state = one.virsh("domstate", vm, check=False)
            if state:
                found[one.name] = state
        return found

    def files(self, host: str) -> set[str]:
        """Names of the files in vmctl's pool of disks on a host."""
        folder = self.machine(host).images.parent / "vmctl"
        return {path.name for path in folder.iterdir()} if folder.exists() else set()


def known_pair(bed: Testbed, config: Path) -> Pair:
    """Make the hosts of a testbed known, and give the first the images that were built for the run."""
    pair = Pair(bed, config)
    for machine in bed.machines:
        pair.vmctl("host", "add", machine.name, machine.ssh_uri, "--host-key", machine.host_key)
    first = bed.machines[0]
    first.images.mkdir(parents=True)
    first.images.chmod(0o711)
    for path in STORE.glob("micro-*"):
        shutil.copy(path, first.images / path.name)
        (first.images / path.name).chmod(0o644)
    # As vmctl makes it with the first image that is built or pulled.
    first.virsh("pool-define-as", "vmctl-images", "dir", "--target", "/var/lib/libvirt/vmctl/vmctl-images")
    first.virsh("pool-start", "vmctl-images")
    first.virsh("pool-autostart", "vmctl-images")
    return pair


def pair_fixture(**bed: bool) -> Any:
    """The fixture ``pair`` of a module: two hosts of a testbed with these options."""

    @pytest.fixture(scope="module", name="pair")
    def made(make_testbed: Callable[..., Testbed], tmp_path_factory: pytest.TempPathFactory, micro_image: None) -> Pair:
        return known_pair(make_testbed(2, **bed), tmp_path_factory.mktemp("config"))

    return made


@contextmanager
def guest(pair: Pair, host: str = "h1", *options: str) -> Iterator[str]:
    """A guest that answers by its agent; gone afterwards, wherever it is then."""
    name = f"m-{secrets.token_hex(4)}"
    words = ("create", name, "--image", "micro", "--memory", "128M", "--network", "lan", "--wait", "agent")
    pair.vmctl("-c", host, *words, *options)
    try:
        yield name
    finally:
        for machine in pair.bed.machines:
            if machine.up:
                pair.vmctl("-c", machine.name, "delete", name, "--yes", "--missing-ok", check=None)


# Protected mode, then for ever: one word into each page from 2 to 66 MiB, and some thousand turns of a loop after each.
_DIRTIER = (
    "fa31c08ed80f0116547c0f20c00c010f22c0ea177c080066b810008ed8bf00002000"
    "ff07b9{turns}4975fd81c70010000081ff0000200472e8ebe1"
)
_TABLES = "0000000000000000ffff0000009acf00ffff00000092cf0017003c7c0000"


def dirtier(turns: int) -> bytes:
    """A boot sector that changes memory without end; the more turns, the slower."""
    code = bytes.fromhex(_DIRTIER.format(turns=turns.to_bytes(4, "little").hex()))
    return (code.ljust(0x3C, b"\0") + bytes.fromhex(_TABLES)).ljust(510, b"\0") + b"\x55\xaa"


@contextmanager
def busy(pair: Pair, host: str = "h1", *, turns: int = 20_000) -> Iterator[str]:
    """A VM of 80 MiB that does nothing but change 64 of them, over and over."""
    name = f"m-{secrets.token_hex(4)}"
    machine = pair.machine(host)
    path = f"/var/lib/libvirt/vmctl/{name}.img"
    machine.run(
        "sh", "-c", f"base64 -d >{path}; truncate -s 1M {path}", input=base64.b64encode(dirtier(turns)).decode()
    )
    xml = f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>80</memory>
        <os><type machine='q35'>hvm</type></os>
        <devices><disk type='file'><driver name='qemu' type='raw'/><source file='{path}'/>
        <target dev='vda' bus='virtio'/></disk></devices></domain>"""
    machine.run("sh", "-c", "cat >/tmp/d.xml; virsh define /tmp/d.xml", input=xml)
    machine.virsh("start", name)

    def written() -> bool:
        said = machine.virsh("qemu-monitor-command", name, "--hmp", "xp /1xw 0x41ff000")
        return int(said.split(":")[1], 16) > 0

    try:
        until(written, "it changes memory")
        yield name
    finally:
        for one in pair.bed.machines:
            if one.up:
                one.virsh("destroy", name, check=False)
                one.virsh("undefine", name, check=False)
        machine.run("rm", "-f", path)


def until(done: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait for something, looking often."""
    wait_until(lambda: bool(done()), what=what, timeout_s=seconds)
