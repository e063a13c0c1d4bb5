"""Debian packages without root: apt with folders of its own, on the system's sources and keys.

An ordinary user can neither refresh /var/lib/apt/lists nor rely on it (containers ship without). So the lists are
kept in the user's cache, and the packages beside them under name, version and hash.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vmctl.builder.recipe import Package
from vmctl.builder.tools import HUNG_S, ToolFailed, run
from vmctl.errors import ImageError
from vmctl.events import Progress, Reporter, Step, Warned

_LISTS_FRESH_S = 24 * 3600
_UPDATE_TIMEOUT_S = 300
_DOWNLOAD_TIMEOUT_S = 600
_URI_LINE = re.compile(r"'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})")
_PACKAGE_URI = re.compile(r"^'[^']+' ([^_\s]+)_", re.MULTILINE)
_BATCH = 16
_UNFETCHED = re.compile(r"Failed to fetch (?P<uri>\S+)[ \t]+(?P<why>.+)")
_NETWORK_HINT = "is the network up? mirrors are those of apt's sources, a proxy that of http_proxy or apt's settings"
_SOURCES_HINT = "is the network up, and is Debian 12 (main) among apt's sources?"
_ALIASED = ("bin/", "sbin/", "lib/", "lib32/", "lib64/", "libx32/")


@dataclass(frozen=True, slots=True)
class Deb:
    """One exact package, as the signed lists describe it."""

    name: str
    version: str
    sha256: str
    size: int

    @property
    def filename(self) -> str:
        """Its name in the cache."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.sha256}.deb"


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/vmctl, where lists and packages are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "vmctl"


class Apt:
    """apt with private state under ``folder``."""

    def __init__(self, folder: Path, architecture: str) -> None:
        self._folder = folder
        self._lists = folder / "lists"
        self._stamp = folder / "updated"
        for part in (self._lists / "partial", folder / "archives/partial"):
            part.mkdir(parents=True, exist_ok=True)
        # What the host has installed must not sway which version is the candidate.
        if not (status := folder / "status").exists():  # its time is one of those by which apt knows its cache as good
            status.touch()
        settings = {
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Update::Error-Mode": "any",  # a mirror that is not reached is but a warning else
            "APT::Sandbox::User": "",  # root's apt would fetch as _apt, who cannot write into the user's cache
            "Acquire::Languages": "none",
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled": "false",
            "Acquire::Retries": "2",
            "Dir::Cache": str(folder),
            "Dir::Cache::pkgcache": "pkgcache.bin",  # images of containers do without, and read all lists each time
            "Dir::Cache::srcpkgcache": "",
            "Dir::Etc::PkgList": "/dev/null",
            "Dir::State": str(folder),
            "Dir::State::lists": str(self._lists),
            "Dir::State::status": str(status),
        }
        self._options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]

    def _query(self, tool: str, *words: str) -> str:
        command = [tool, *self._options, *words]
        return run(command, what="find Debian packages", timeout_s=HUNG_S, cwd=self._folder).decode()

    def refresh(self, report: Reporter, *, now: Callable[[], float] = time.time) -> None:
        """Bring the package lists up to date when they are a day old.

        A source that cannot be reached is no error yet: the packages may all come from another, or be known from
        the last time; ``candidates`` raises if not. Raises ImageError when nothing is known of any package.
        """
        if self._stamp.exists() and 0 <= now() - self._stamp.stat().st_mtime < _LISTS_FRESH_S:
            return
        report(Step("fetching Debian's package lists"))
        try:
            command = ["apt-get", *self._options, "-q", "update"]
            run(command, what="fetch package lists", timeout_s=_UPDATE_TIMEOUT_S, cwd=self._folder)
        except ImageError as error:
            clearer = _unreached(error, "fetch Debian's package lists")
            if not any(self._lists.glob("*Packages*")):
                raise clearer from error
            report(Warned(clearer.message, hint="going on with the lists at hand"))
        self._stamp.touch()
        os.utime(self._stamp)

    def first_dependency(self, name: str, pattern: str) -> str:
        """The dependency of ``name`` that matches the glob."""
        shown = self._query("apt-cache", "depends", "--important", name)
        for line in shown.splitlines():
            relation, _, needed = line.strip().partition(": ")
            if relation == "Depends" and fnmatch(needed, pattern):
                return needed
        raise ImageError(f"cannot find Debian packages: {name} depends on nothing like {pattern}")

    def candidates(self, names: Sequence[str]) -> list[Deb]:
        """The versions apt would install, with their hashes, in the order asked for."""
        try:
            shown = self._query("apt-get", "download", "--print-uris", *names)
        except ImageError as error:
            raise ImageError(error.message, hint=_SOURCES_HINT) from error
        found: dict[str, Deb] = {}
        for match in _URI_LINE.finditer(shown):
            name, version, _ = unquote(match["file"]).removesuffix(".deb").split("_", 2)
            found[name] = Deb(name, version, match["sha256"], int(match["size"]))
        if absent := [name for name in names if name not in found]:
            raise ImageError(f"cannot find Debian packages: {', '.join(absent)} without a download or a SHA-256")
        return [found[name] for name in names]

    def installed_for(self, names: Sequence[str]) -> list[str]:
        """Names of all packages a system has that is made of the essential ones and these, in apt's order.

        Recommended packages stay out.
        """
        words = ("install", "--print-uris", "-qq", "--no-install-recommends", "?essential", *names)
        try:
            shown = self._query("apt-get", *words)
        except ImageError as error:
            raise ImageError(error.message, hint=_SOURCES_HINT) from error
        return [match[1] for match in _PACKAGE_URI.finditer(shown)]

    def download(self, debs: Sequence[Deb], into: Path) -> list[Path]:
        """Fetch packages into the folder ``into``; apt checks them against the signed lists, the caller once more."""
        command = ["apt-get", *self._options, "-q", "download", *(f"{deb.name}={deb.version}" for deb in debs)]
        what = f"fetch package {', '.join(deb.name for deb in debs)}"
        try:
            run(command, what=what, timeout_s=_DOWNLOAD_TIMEOUT_S, cwd=into)
        except ImageError as error:
            # The lists may name what the mirror has replaced: the next run asks again.
            self._stamp.unlink(missing_ok=True)
            raise _unreached(error, what) from error
        return [next(into.glob(f"{deb.name}_*.deb")) for deb in debs]


def _unreached(error: ImageError, doing: str) -> ImageError:
    """The same failure of apt's by its causes: which mirrors could not be reached, and why, each once."""
    causes: dict[str, str] = {}
    for match in _UNFETCHED.finditer(error.said if isinstance(error, ToolFailed) else ""):
        causes.setdefault(urlsplit(match["uri"]).hostname or match["uri"], match["why"].strip())
    if not causes:
        return error
    text = "; ".join(f"from {mirror}: {why}" for mirror, why in causes.items())
    return ImageError(f"cannot {doing} {text}", hint=_NETWORK_HINT)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(apt: Apt, debs: Sequence[Deb], store: Path, report: Reporter) -> list[Path]:
    """Paths of the packages in the cache ``store``, each verified; what is not there is downloaded."""
    store.mkdir(parents=True, exist_ok=True)
    total = sum(deb.size for deb in debs)
    missing = [deb for deb in debs if not (store / deb.filename).exists()]
    done = total - sum(deb.size for deb in missing)
    # In batches: each call of apt reads all its lists, and only between the calls is there progress to tell.
    for batch in (missing[at : at + _BATCH] for at in range(0, len(missing), _BATCH)):
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=store) as folder:
            for deb, fetched in zip(batch, apt.download(batch, Path(folder)), strict=True):
                _verify(deb, fetched)
                fetched.rename(store / deb.filename)
        done += sum(deb.size for deb in batch)
        report(Progress("packages", done, total))
    report(Progress("packages", total, total))
    return [_kept(apt, deb, store) for deb in debs]


def _verify(deb: Deb, path: Path) -> None:
    if _sha256(path) != deb.sha256:
        raise ImageError(f"cannot fetch package {deb.name}: its SHA-256 is not {deb.sha256}")


def _kept(apt: Apt, deb: Deb, store: Path) -> Path:
    """A package of the cache, fetched anew if it has suffered there."""
    path = store / deb.filename
    if _sha256(path) != deb.sha256:
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=store) as folder:
            (fetched,) = apt.download([deb], Path(folder))
            _verify(deb, fetched)
            fetched.rename(path)
    return path


def merged(name: str) -> str:
    """A path inside a package, as on a system where /bin, /sbin and /lib are links into /usr."""
    path = name.removeprefix("./").rstrip("/")
    return f"usr/{path}" if path.startswith(_ALIASED) else path


def members(path: Path, package: Package) -> Iterator[tuple[str, tarfile.TarInfo, bytes]]:
    """The files and links of a package that its recipe entry asks for, with their content.

    Read from dpkg-deb's tar stream: nothing is unpacked to disk, so owners, modes and umask of the builder
    cannot come in, nor can a member's path lead outside.
    """
    stream = run(["dpkg-deb", "--fsys-tarfile", path], what=f"unpack package {package.name}", timeout_s=HUNG_S)
    unused = set(package.globs)
    with tarfile.open(fileobj=io.BytesIO(stream)) as archive:
        for member in archive:
            name = merged(member.name)
            used = {glob for glob in package.globs if fnmatch(name, glob)}
            unused -= used
            if used and member.isfile():
                file = archive.extractfile(member)
                yield name, member, file.read() if file else b""
            elif used and (member.issym() or member.islnk()):
                yield name, member, b""
    if unused:
        raise ImageError(f"cannot use package {package.name}: it has no {', '.join(sorted(unused))}")
