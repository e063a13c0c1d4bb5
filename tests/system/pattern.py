"""Blocks that know their place, written and read by the guest itself: what moved, got lost or stale is told apart."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
from pathlib import Path

from tests import warm
from tests.system.conftest import Shell

BLOCK = 4096


def blocks(seed: str, count: int, *, first: int = 0) -> bytes:
    """``count`` blocks of 4 KiB from number ``first`` on, each made of its own digest."""
    found = (hashlib.sha256(f"{seed}/{n}".encode()).digest() for n in range(first, first + count))
    return b"".join(one * (BLOCK // len(one)) for one in found)


def write(vm: str, path: str, data: bytes, *, at: int = 0) -> None:
    """Have the guest write ``data`` to a device or file at block ``at``, down to its disk.

    ``path`` is a word of its shell's. What it unpacks costs an emulated guest less than what it decrypts.
    """
    script = f"set -o pipefail; gunzip | dd of={path} bs={BLOCK} seek={at} conv=notrunc,fsync 2>/dev/null"
    packed = gzip.compress(data, 1)
    done = warm.run_bytes(["-m", "vmctl", "exec", vm, "--", "sh", "-c", script], input=packed, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def digest(shell: Shell, vm: str, path: str, count: int, *, at: int = 0) -> str:
    """SHA-256 of ``count`` blocks as the guest reads them from its disk, not from its memory."""
    script = (
        "set -o pipefail; echo 3 >/proc/sys/vm/drop_caches; "
        f"dd if={path} bs={BLOCK} skip={at} count={count} 2>/dev/null | sha256sum"
    )
    return shell.run("exec", vm, "--", "sh", "-c", script).stdout.split()[0]


def holds(shell: Shell, vm: str, path: str, data: bytes, *, at: int = 0) -> bool:
    """Whether the guest reads ``data`` there."""
    return digest(shell, vm, path, len(data) // BLOCK, at=at) == hashlib.sha256(data).hexdigest()


def turned(vm: str, path: str, data: bytes, new: bytes, *, at: int) -> bool:
    """Whether the guest reads ``data`` from block 0 on; then it writes ``new`` at block ``at``. All in one session."""
    script = (
        "set -o pipefail; echo 3 >/proc/sys/vm/drop_caches; "
        f"dd if={path} bs={BLOCK} count={len(data) // BLOCK} 2>/dev/null | sha256sum && "
        f"dd of={path} bs={BLOCK} seek={at} conv=notrunc,fsync 2>/dev/null"
    )
    done = warm.run_bytes(["-m", "vmctl", "exec", vm, "--", "sh", "-c", script], input=new, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def whole(path: Path | str) -> bool:
    """Whether nothing is wrong in a qcow2 but for clusters that nothing leads to, which a killed QEMU may leave."""
    return subprocess.run(["qemu-img", "check", "-q", str(path)], check=False, timeout=60).returncode in {0, 3}
