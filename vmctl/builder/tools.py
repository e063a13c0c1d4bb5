"""Runs the host programs a build needs, and says in one place which Debian package each comes from."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmctl.errors import ImageError

PACKAGE_OF = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "debugfs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "e2fsck": "e2fsprogs",
    "gcc": "gcc",
    "lz4": "lz4",
    "mke2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
}
# An ordinary user's PATH leaves these out, and mke2fs and debugfs are there.
_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_STDERR_TAIL = 300


def search_path(env: Mapping[str, str] = os.environ) -> str:
    """PATH with the system folders behind it."""
    return os.pathsep.join([env.get("PATH", "/usr/bin:/bin"), *_SYSTEM_FOLDERS])


def require(names: Sequence[str], what: str) -> None:
    """Raise one ImageError that names every missing program and the packages to install."""
    missing = [name for name in names if shutil.which(name, path=search_path()) is None]
    if missing:
        packages = sorted({PACKAGE_OF[name] for name in missing})
        raise ImageError(f"cannot {what}: {', '.join(missing)} missing", hint=f"apt-get install {' '.join(packages)}")


def run(
    command: Sequence[str | Path],
    *,
    what: str,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    cwd: Path | None = None,
) -> bytes:
    """Run ``command`` and return its standard output. Every failure becomes ``cannot WHAT: REASON``.

    The locale is C and the umask 022 whatever the caller's are: both leak into what tools write.
    """
    words = [str(word) for word in command]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LC_") and key != "LANGUAGE"}
    environment = clean | {"LC_ALL": "C", "PATH": search_path()} | dict(env or {})
    try:
        done = subprocess.run(
            words,
            input=stdin,
            capture_output=True,
            check=True,
            timeout=timeout_s,
            env=environment,
            cwd=cwd,
            umask=0o022,
        )
    except FileNotFoundError as error:
        hint = f"apt-get install {PACKAGE_OF[words[0]]}" if words[0] in PACKAGE_OF else ""
        raise ImageError(f"cannot {what}: {words[0]} is missing", hint=hint) from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"cannot {what}: {words[0]} did not end in {timeout_s:.0f} s") from error
    except subprocess.CalledProcessError as error:
        tail = error.stderr.decode(errors="replace").strip()[-_STDERR_TAIL:] or f"exit status {error.returncode}"
        raise ImageError(f"cannot {what}: {words[0]}: {tail}") from error
    return done.stdout
