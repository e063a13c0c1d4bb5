"""Pulling images: from the catalogue or a URL, downloaded, checked, and only then taken into the store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vmctl import catalog, checksums, disk_header, download, image_import, images, pulls, spec, web
from vmctl.catalog import Entry
from vmctl.checksums import Checksum
from vmctl.download import Bounds, Patience
from vmctl.errors import Conflict, ImageError, NoRoom, NotFound, SpecError
from vmctl.events import Progress, Reporter, Step, Warned
from vmctl.hosts import Host
from vmctl.manifest import NAME, Manifest

# Longer than any sensible download; whoever waits may press Ctrl-C.
_WAIT_FOR_ANOTHER_S = 24 * 3600.0
_PATIENCE = Patience()
_LARGEST_OF_A_URL = "64G"
_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Found:
    """A catalogue's image, and whether the store has one from there; None when the store could not be asked."""

    image: Entry
    in_store: bool | None


def search(host: Host | None, users: Path, term: str) -> tuple[Found, ...]:
    """What the catalogues have under ``term``. ``users`` is the folder of the user's own."""
    have = {manifest.source for manifest in images.list_images(host)} if host else None
    known = catalog.search(catalog.load(users), term)
    return tuple(Found(entry, None if have is None else web.told(entry.url) in have) for entry in known)


def pull(
    host: Host,
    what: str,
    report: Reporter,
    *,
    name: str = "",
    checksum: str = "",
    verify: bool = True,
    patience: Patience = _PATIENCE,
    told: Mapping[str, str | tuple[str, ...]] = _NOTHING,
    max_size: str = "",
) -> Manifest:
    """Get the image ``what``, a name in the catalogue or a URL, into the store as ``name``.

    ``checksum`` is "sha256:…", "sha512:…" or the URL of a checksum file, and goes before the catalogue's. Without
    ``verify`` nothing is checked, and the manifest says so for ever. ``told`` is what the user knows of the image, by
    the names of Entry's fields, and goes before the catalogue's, as does ``max_size``.
    Raises SpecError, NotFound, ImageError.
    """
    known: dict[str, Any] = dict(told)
    entry = replace(_entry(host, what, name), **known)
    user_by = "told" if "default_user" in known else "catalogue"
    if "default_user" in known:
        known["default_user_by"] = user_by  # from here on of the manifest
    if found := image_import.problems(_wish(Path(entry.name), entry, None, user_by)):
        raise SpecError(f"cannot pull {what}", problems=found)
    if checksum and not verify:
        raise SpecError("cannot both check the checksum and not", hint="either --checksum or --no-verify")
    bounds = Bounds(spec.parse_size_mib(max_size or entry.max_size) << 20, plausible)
    expected = _expected(entry, checksum, report, patience) if verify else None
    before = {manifest.stem for manifest in images.list_images(host)}
    if present := _present(host, entry, expected, before):
        return _again(host, replace(present, **known), report)
    with _alone(host, entry.name, report) as waited:
        if waited and (present := _present(host, entry, expected, before)):
            return _again(host, replace(present, **known), report)
        partial = pulls.partial(host, entry.name)
        _make(partial.parent)
        download.fetch(entry.url, partial, entry.name, report, patience, bounds)
        if expected is None:
            report(Warned(f"image {entry.name} is taken without having been checked against anything"))
        else:
            _check(entry, partial, expected, report)
        try:
            manifest = image_import.import_image(host, _wish(partial, entry, expected, user_by), report)
        except NoRoom:
            raise
        except ImageError as error:
            download.discard(partial)  # or the next pull would take the same for whole and ask nobody
            ours = error.hint and "--format" not in error.hint  # which is import's
            error.hint = f"it was removed; {error.hint if ours else 'does that lead to a whole disk image?'}"
            raise
        download.discard(partial)
    if expected is not None:
        _remind(manifest, report)
    return manifest


def plausible(partial: Path) -> int | None:
    """How large an image can be, by its header in the beginning of its file: see ``disk_header.largest_file``."""
    with partial.open("rb") as file:
        return disk_header.largest_file(disk_header.Window(file.fileno(), os.fstat(file.fileno()).st_size))


def _entry(host: Host, what: str, name: str) -> Entry:
    """What to pull, under the name it is to have in the store."""
    if "://" not in what:
        try:
            entry = catalog.find(catalog.load(host.folders.config / "catalog.d"), what)
        except NotFound as error:
            if Path(what).is_file():
                error.hint = f"it is a file here: vmctl image import {what}"
            elif images.has_recipe(what):
                error.hint = f"it is built, not pulled: vmctl image build {what}"
            raise
        name = name or entry.name
    else:
        web.check_url(what)
        name = name or image_import.name_for(Path(checksums.file_name(what)))
        entry = Entry(name, "unknown", "", "x86_64", what, "", ("bios",), max_size=_LARGEST_OF_A_URL)
    if not re.fullmatch(NAME, name):
        raise SpecError(
            f"cannot call an image {name!r}: a name is up to 48 of a-z, 0-9, '.' and '-'", hint="give one: --name NAME"
        )
    return replace(entry, name=name)


def _expected(entry: Entry, checksum: str, report: Reporter, patience: Patience) -> Checksum:
    if checksum and "://" not in checksum:
        return checksums.parse(checksum)
    if not checksum and entry.checksum:
        return checksums.parse(entry.checksum)
    url = checksum or entry.checksum_url
    if not url:
        raise SpecError(
            f"cannot pull {entry.url}: there is no checksum to check it against",
            hint="--checksum sha256:HEX or the URL of a checksum file; or take it unchecked: --no-verify",
        )
    web.check_url(url)
    text = download.text(url, report, patience)
    kind = "" if checksum else entry.checksum_kind
    return checksums.from_file(text, kind, image_url=entry.url, url=url)


def _present(host: Host, entry: Entry, expected: Checksum | None, before: set[str]) -> Manifest | None:
    """The image as the store has it: by its checksum, or without one, as another pull has brought it just now."""
    for manifest in images.list_images(host):
        if manifest.name != entry.name:
            continue
        if expected is not None and manifest.verified and manifest.checksum == str(expected):
            return manifest
        if expected is None and manifest.source == web.told(entry.url) and manifest.stem not in before:
            return manifest
    return None


def _remind(manifest: Manifest, report: Reporter) -> None:
    if not manifest.verified:
        report(
            Warned(
                f"the same content is in the store as {manifest.stem}, once taken unchecked, and stays marked so",
                f"vmctl image delete {manifest.stem}, and pull again",
            )
        )


def _again(host: Host, present: Manifest, report: Reporter) -> Manifest:
    """The image that is in the store already, with what the user says of it now."""
    # A pull that was killed at its very end leaves its download.
    with suppress(Conflict, OSError), pulls.alone(host, present.name):
        download.discard(pulls.partial(host, present.name))
    with images.making(host, present.name):
        return images.renew(host, images.find(host, present.stem).manifest, report, present)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"cannot keep downloads in {folder}: {error.strerror}", hint="set XDG_CACHE_HOME") from error


@contextmanager
def _alone(host: Host, name: str, report: Reporter) -> Iterator[bool]:
    """Hold the right to pull ``name``; True when another process had it first and had to be waited for."""
    with ExitStack() as stack:
        try:
            stack.enter_context(pulls.alone(host, name))
            waited = False
        except Conflict:
            report(Step(f"another vmctl is pulling {name}: waiting for it"))
            stack.enter_context(pulls.alone(host, name, timeout_s=_WAIT_FOR_ANOTHER_S))
            waited = True
        yield waited


def _check(entry: Entry, partial: Path, expected: Checksum, report: Reporter) -> None:
    """Raise ImageError, and remove the file, unless it has the checksum it should have."""
    size = partial.stat().st_size
    try:
        found = checksums.of_file(
            partial, expected.kind, lambda done: report(Progress(f"checking {expected.kind}", done, size))
        )
    except OSError as error:
        raise ImageError(f"cannot read {partial}: {error.strerror}") from error
    if found != expected:
        download.discard(partial)
        raise ImageError(
            f"cannot use image {entry.name}: the {expected.kind} of what came from {entry.url} ({size} bytes) is "
            f"{found.hex} and should be {expected.hex}",
            hint="it was removed; pull again, in case the image was being replaced just now",
        )
    report(Step(f"{entry.name}: {expected.kind} is as it should be"))


def _wish(file: Path, entry: Entry, expected: Checksum | None, user_by: str) -> image_import.Wish:
    return image_import.Wish(
        file,
        name=entry.name,
        os_name=entry.os,
        os_version=entry.os_version,
        user=entry.default_user,
        user_by=user_by,
        boots=entry.boots,
        osinfo=entry.osinfo,
        architecture=entry.architecture,
        source=web.told(entry.url),
        checked=str(expected or ""),
    )
