"""Checksums: how one is written, and the files distributions publish them in. Pure but for reading what is hashed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vmctl.errors import ImageError, SpecError

_LENGTHS = {"sha256": 64, "sha512": 128}
_CHUNK = 1 << 20
# "SHA256 (name) = hash", as BSD's tools and Fedora's, CentOS's and Rocky's files write it.
_BSD = re.compile(r"(?P<kind>SHA(?:256|512)) ?\((?P<name>[^)]+)\) ?= ?(?P<hex>[0-9a-fA-F]+)")
# "hash  name", "hash *name" (sha256sum), and a hash alone.
_GNU = re.compile(r"\\?(?P<hex>[0-9a-fA-F]{64,128})(?:[ \t]+\*?(?P<name>\S.*))?")


@dataclass(frozen=True, slots=True)
class Checksum:
    """A checksum by its kind, sha256 or sha512, in lower-case hex."""

    kind: str
    hex: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.hex}"


def parse(text: str) -> Checksum:
    """Read "sha256:HEX" or "sha512:HEX". Raises SpecError."""
    kind, _, digits = text.lower().partition(":")
    if len(digits) != _LENGTHS.get(kind, -1) or not re.fullmatch("[0-9a-f]*", digits):
        raise SpecError(
            f"cannot read checksum {text!r}: it is neither sha256: with 64 nor sha512: with 128 hexadecimal digits",
            hint="--checksum sha256:HEX, sha512:HEX, or the URL of a checksum file",
        )
    return Checksum(kind, digits)


def file_name(url: str) -> str:
    """The last part of a URL's path."""
    return unquote(urlsplit(url).path).rpartition("/")[2]


def _lines(text: str) -> list[tuple[str, Checksum]]:
    """Every file name in the text, "" for a hash alone, with its checksum, whose length tells its kind."""
    kinds = {length: kind for kind, length in _LENGTHS.items()}
    found = []
    for line in text.splitlines():
        match = _BSD.fullmatch(line.strip()) or _GNU.fullmatch(line.strip())
        if match and (kind := kinds.get(len(match["hex"]))):
            found.append(((match["name"] or "").strip(), Checksum(kind, match["hex"].lower())))
    return found


def from_file(text: str, kind: str, *, image_url: str, url: str) -> Checksum:
    """The checksum of the image at ``image_url`` in the checksum file that came from ``url``; of any kind for "".

    A file that belongs to this image alone (IMAGE.sha256, or a lone hash) counts whatever name stands in it: those of
    "latest" images name the dated one. Raises ImageError when the image is not in there, or is there with two values.
    """
    wanted = file_name(image_url)
    lines = [(name.rpartition("/")[2], found) for name, found in _lines(text) if kind in {"", found.kind}]
    kind = kind or ("sha512" if any(found.kind == "sha512" for _, found in lines) else "sha256")
    lines = [(name, found) for name, found in lines if found.kind == kind]
    hits = {found for name, found in lines if name == wanted}
    everything = {found for _, found in lines}
    if not hits and len(everything) == 1 and (file_name(url).startswith(wanted) or not any(n for n, _ in lines)):
        hits = everything
    if len(hits) != 1:
        why = f"it has {len(hits)} different ones for" if hits else f"it has no {kind} for"
        raise ImageError(f"cannot find the checksum in {url}: {why} {wanted}", hint="give it: --checksum sha256:HEX")
    return hits.pop()


def of_file(path: Path, kind: str, progress: Callable[[int], None]) -> Checksum:
    """Hash a file, telling how many bytes are done. Raises OSError."""
    digest, done = hashlib.new(kind), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress(done := done + len(chunk))
    return Checksum(kind, digest.hexdigest())
