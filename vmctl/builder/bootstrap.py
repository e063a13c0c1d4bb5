"""A Debian system as a tar archive: mmdebstrap over packages that are here already.

mmdebstrap gets a repository of one folder, of exactly the packages that were chosen and checked: what it installs
depends on nothing else, needs no network, and is read with no host's apt configuration.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vmctl.builder.debs import Deb
from vmctl.builder.tools import HUNG_S, run, running
from vmctl.errors import ImageError
from vmctl.events import Progress, Reporter, Step

_TIMEOUT_S = 1800
_AR_MAGIC = b"!<arch>\n"
# As root mmdebstrap mounts the host's /dev, /proc and /sys into the new system. Nobody who clears its folder away after
# a kill may find them there. Without root it is in namespaces of its own anyway.
_OWN_MOUNTS = (sys.executable, str(Path(__file__).with_name("own_mounts.py")))
_ROOTLESS_HINT = "without root, mmdebstrap needs user namespaces and newuidmap: apt-get install uidmap"


def built_at(paths: Sequence[Path]) -> int:
    """When the youngest of the packages was built, in seconds since 1970: the time stamp of all that is made of them.

    Not the time of this build, or no two were equal; nor anything earlier, for byte-compiled Python names its
    source's time stamp. From the header of the archive's first member, which dpkg-deb gives the changelog's date.
    """
    return max(_built_at(path) for path in paths)


def _built_at(path: Path) -> int:
    with path.open("rb") as file:
        head = file.read(36)
    if not head.startswith(_AR_MAGIC):
        raise ImageError(f"cannot use package {path.name}: it is no Debian package")
    return int(head[24:36])


def make(
    debs: Sequence[Deb],
    paths: Sequence[Path],
    out: Path,
    report: Reporter,
    *,
    suite: str,
    architecture: str,
    overlay: Path,
    finish: str,
    epoch: int,
) -> None:
    """Install the packages into a new system and write it as the tar archive ``out``.

    ``overlay`` (a tar archive) is laid over it before the packages beside the essential ones are unpacked; ``finish``
    is a shell script that runs at last, with the system's root as $1. Raises ImageError.
    """
    with tempfile.TemporaryDirectory(prefix="packages-", dir=out.parent) as folder:
        repository = Path(folder)
        repository.chmod(0o755)
        _index(debs, paths, repository, report)
        report(Step("installing the packages"))
        command = [
            *(_OWN_MOUNTS if os.geteuid() == 0 else ()),
            "mmdebstrap",
            "--variant=apt",
            "--format=tar",
            f"--architectures={architecture}",
            f"--include={','.join(deb.name for deb in debs)}",
            f"--essential-hook=tar-in {overlay} /",
            f"--customize-hook={finish}",
            "--skip=check/empty",
            suite,
            str(out),
            f"deb [trusted=yes] copy://{repository} ./",
        ]
        # PYTHONHASHSEED, or byte-compiled sets have another order each time.
        env = {"SOURCE_DATE_EPOCH": str(epoch), "PYTHONHASHSEED": "0", "TZ": "UTC", "TMPDIR": str(out.parent)}
        total, done = len(debs), 0
        hint = "" if os.geteuid() == 0 else _ROOTLESS_HINT
        for line in running(command, what="install Debian packages", timeout_s=_TIMEOUT_S, env=env, hint=hint):
            if line.startswith("Setting up "):
                done = min(done + 1, total)
                report(Progress("installing", done, total, "packages"))


def _index(debs: Sequence[Deb], paths: Sequence[Path], repository: Path, report: Reporter) -> None:
    """A folder with the packages, under names that need no escape, and the index apt reads."""
    records = []
    for deb, path in zip(debs, paths, strict=True):
        name = f"{deb.sha256}.deb"
        (repository / name).symlink_to(path)
        control = run(["dpkg-deb", "-f", path], what=f"read package {deb.name}", timeout_s=HUNG_S)
        place = f"Filename: ./{name}\nSize: {deb.size}\nSHA256: {deb.sha256}\n"
        records.append(control.decode().rstrip("\n") + "\n" + place)
    (repository / "Packages").write_text("\n".join(records))
    report(Step(f"{len(debs)} packages are at hand"))
