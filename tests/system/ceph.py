"""A Ceph cluster of one monitor and one store in memory, on loopback: small, and what RBD needs."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vmctl.wait import wait_until

_CONFIG = """
[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{port}]
ms bind msgr2 = false
auth cluster required = {auth}
auth service required = {auth}
auth client required = {auth}
mon allow pool size one = true
mon data avail crit = 1
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 268435456
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}
keyring = {folder}/keyring
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file = {folder}/$name.pid
"""
# A race of Ceph's own with authentication off: a program may ask before it was told which cluster it is in. The store,
# started so, ends without a word.
_TOO_EARLY = ("wrong fsid", "problem getting command descriptions")
_STORE = ("ceph-osd", "-i", "0")


@dataclass(frozen=True)
class Cluster:
    """A cluster that answers. ``port`` is its monitor's."""

    folder: Path
    port: int

    def run(self, *words: str) -> str:
        """What one of Ceph's commands prints."""
        env = os.environ | {"CEPH_CONF": str(self.folder / "ceph.conf")}

        def once() -> subprocess.CompletedProcess[str] | None:
            done = subprocess.run(
                words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
            )
            early = any(word in done.stderr for word in _TOO_EARLY)
            return None if early or (done.returncode and words == _STORE) else done

        done = wait_until(once, what=f"an answer to {words}", timeout_s=60)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout


@contextmanager
def cluster(folder: Path, port: int, auth: str) -> Iterator[Cluster]:
    """Bring one up with the pool ``rbd`` in it. ``auth``: none, or cephx, by which the user admin must show a key."""
    found, store = Cluster(folder, port), f"{uuid.uuid4()}"
    fsid = f"{uuid.uuid4()}"
    (folder / "ceph.conf").write_text(_CONFIG.format(fsid=fsid, port=port, folder=folder, auth=auth))
    (folder / "mon").mkdir()
    (folder / "osd").mkdir()
    keyring, monmap = str(folder / "keyring"), str(folder / "monmap")
    found.run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
    for name in ("client.admin", "osd.0"):
        rights = ("--cap", "mon", "allow *", "--cap", "osd", "allow *")
        found.run("ceph-authtool", keyring, "-n", name, "--gen-key", *rights)
    found.run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{port}]", "--fsid", fsid, monmap)
    try:
        found.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        found.run("ceph-mon", "-i", "a")
        found.run("ceph", "osd", "new", store)
        found.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store)
        found.run(*_STORE)
        found.run("ceph", "osd", "pool", "create", "rbd", "8", "8")
        found.run("rbd", "pool", "init", "rbd")
        yield found
    finally:
        for name in ("osd.0", "mon.a"):
            with suppress(OSError, ValueError):
                _end(int((folder / f"{name}.pid").read_text()))


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)  # there is nothing to keep

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_until(gone, what="end of Ceph", timeout_s=20)
