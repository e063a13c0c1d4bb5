"""The guest of the fault runs, and what it says of itself. See witness.S."""

from __future__ import annotations

import base64
import re
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from tests.hosts import Machine
from tests.hosts.machine import CommandFailed

_MAGIC = 0x4E544957
_WRONG = {
    1: "a page's first word",
    2: "a page's last word",
    3: "a sector",
    4: "a sector's last word",
    5: "the disk reports an error",
}
SHARED, OWN = "/var/lib/libvirt/vmctl", "/var/lib/libvirt/images"


class Said(NamedTuple):
    """What it has found: ``wrong`` "" as long as all is as it wrote it; ``torn``: memory does not fit memory."""

    passes: int
    sectors: int
    wrong: str
    torn: bool


@cache
def _assembled() -> bytes:
    with TemporaryDirectory() as folder:
        thing, flat = f"{folder}/witness.o", f"{folder}/witness.bin"
        subprocess.run(["as", "--32", "-o", thing, str(Path(__file__).with_name("witness.S"))], check=True)
        words = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", flat, thing]
        subprocess.run(words, check=True)
        return Path(flat).read_bytes()


def make(machine: Machine, name: str, folder: str, *, ballast_mib: int = 0) -> None:
    """Define it on a host and start it, with its disk in ``folder``; ``ballast_mib`` of what cannot be left out."""
    path = f"{folder}/{name}.img"
    script = f"base64 -d >{path}; truncate -s 2M {path}; head -c {ballast_mib}M /dev/urandom >>{path}"
    machine.run("sh", "-c", script, input=base64.b64encode(_assembled()).decode())
    xml = f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory>
        <os><type machine='pc'>hvm</type></os>
        <devices><disk type='file'><driver name='qemu' type='raw'/><source file='{path}'/>
        <target dev='hda' bus='ide'/></disk></devices></domain>"""
    machine.run("sh", "-c", "cat >/tmp/d.xml; virsh define /tmp/d.xml", input=xml)
    machine.virsh("start", name)


def forget(machine: Machine, name: str, folder: str) -> None:
    """Take it away from a host."""
    machine.virsh("destroy", name, check=False)
    machine.virsh("undefine", name, check=False)
    machine.run("rm", "-f", f"{folder}/{name}.img")


def said(machine: Machine, name: str) -> Said | None:
    """What it says; None as long as it has not begun, or nobody can ask it."""
    try:
        text = machine.virsh("qemu-monitor-command", name, "--hmp", "xp /7xw 0x9000")
    except (CommandFailed, subprocess.TimeoutExpired):
        return None
    words = [int(word, 16) for word in re.findall(r"0x([0-9a-f]{8})\b", text)]
    if len(words) != 7 or words[0] != _MAGIC:
        return None
    _, passes, code, where, expected, found, sectors = words
    wrong = f"{_WRONG.get(code, code)} at {where:#x}: {found:#x}, not {expected:#x}" if code else ""
    return Said(passes, sectors, wrong, code in {1, 2})
