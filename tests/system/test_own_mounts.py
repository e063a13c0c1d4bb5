"""Mounts of one's own, also where the root is a plain folder of a mount that others share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vmctl.builder import own_mounts

pytestmark = pytest.mark.system
SEEN = "mount -t tmpfs own /mnt && touch /mnt/mounted && sleep 0.2 && ls /mnt"


@pytest.mark.parametrize("chroot", [False, True], ids=["on its own root", "in a chroot"])
def test_what_it_mounts_nobody_else_sees(tmp_path: Path, chroot: bool) -> None:
    """In a mount namespace of the test's own, all of it shared, as systemd has it."""
    around = tmp_path / "around"
    root = around / "root"
    for name in ("usr", "proc", "mnt", "etc"):
        (root / name).mkdir(parents=True)
    for link in ("bin", "sbin", "lib", "lib64"):
        (root / link).symlink_to(f"usr/{link}")
    (root / "own_mounts.py").write_bytes(Path(own_mounts.__file__).read_bytes())
    run = f"/usr/bin/python3 own_mounts.py sh -c '{SEEN}'"
    script = (
        "mount --make-rshared / && mount --bind . . && mount --make-shared . && cd root"
        " && mount --rbind /usr usr && mount --rbind /etc etc && mount -t proc proc proc"
        f" && {'chroot . ' * chroot}{run} && if test -e {root}/mnt/mounted || test -e /mnt/mounted; then exit 9; fi"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script],
        cwd=around, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "mounted\n"), done.stderr


def test_a_command_that_is_not_there() -> None:
    done = subprocess.run([sys.executable, own_mounts.__file__, "no-such-command"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == (
        "cannot run no-such-command with mounts of its own: No such file or directory\n"
    )
