"""sshd for the hosts, unpacked beside the cached packages: installed, it would serve the machine itself."""

from __future__ import annotations

import os
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from vmctl.builder import debs
from vmctl.builder.recipe import Package

# Of each package: what is taken, and what it is called in the folder.
_WANTED = {
    "openssh-server": ("usr/sbin/sshd", "sshd"),
    "openssh-sftp-server": ("usr/lib/openssh/sftp-server", "sftp-server"),
    "libwrap0": ("usr/lib/*/libwrap.so.0.*", "lib/libwrap.so.0"),
}


def folder() -> Path:
    """Where it lies."""
    return debs.cache_folder() / "sshd"


def unpack() -> None:
    """Fetch what is not in the cache and unpack it. Raises ImageError."""
    cache = debs.cache_folder()
    architecture = os.uname().machine.replace("x86_64", "amd64").replace("aarch64", "arm64")
    apt = debs.Apt(cache / "apt", architecture)
    apt.refresh(lambda event: None)
    paths = debs.fetch(apt, apt.candidates(list(_WANTED)), cache / "debs", lambda event: None)
    for (name, (glob, target)), path in zip(_WANTED.items(), paths, strict=True):
        for file, _, data in debs.members(path, Package(name, (glob,))):
            if data and fnmatch(file, glob):
                _put(folder() / target, data)


def _put(path: Path, data: bytes) -> None:
    """Whole or not at all: another run may be using it."""
    if path.exists() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
        os.fchmod(file.fileno(), 0o755)
    Path(file.name).rename(path)


if __name__ == "__main__":
    unpack()
