"""Care of the store: further names for images, a look for damage, and taking away what nobody needs."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vmctl import digest, image_users, images, pulls
from vmctl.errors import Conflict, ImageError, NotFound, SpecError, VmctlError
from vmctl.events import Progress, Reporter, Step, Warned
from vmctl.hosts import Host
from vmctl.hypervisor import storage
from vmctl.image_users import Needed
from vmctl.images import Image
from vmctl.manifest import NAME, Manifest, content_digest

_LOCK_TIMEOUT_S = 30.0
DOWNLOADS_IDLE_S = 7 * 86400.0  # long enough for a laptop that was away for some days
_UNFINISHED = timedelta(days=1)
_LIKE_DIGEST = re.compile(r"(?:.*-)?[0-9a-f]{12}")


def tag(host: Host, name: str, new: str, report: Reporter) -> Manifest:
    """Give an image a further name; another image that has it loses it. Raises NotFound, SpecError, Conflict."""
    if not re.fullmatch(NAME, new) or _LIKE_DIGEST.fullmatch(new):
        raise SpecError(
            f"cannot tag image {name}: {new!r} is no tag",
            hint="lower-case letters, digits, inner dots and hyphens, and not like a digest",
        )
    with images.changing(host, "tags", timeout_s=_LOCK_TIMEOUT_S):
        known = images.list_images(host)
        if any(m.name == new for m in known):
            raise Conflict(f"cannot tag image {name}: {new} is an image's own name")
        chosen = images.find(host, name).manifest
        # The new one first: cut off between the two, the tag still means an image.
        for m in (chosen, *(m for m in known if m != chosen)):
            tags = {*m.tags, new} if m == chosen else {*m.tags} - {new}
            if tags != {*m.tags}:
                _retag(host, m, tags)
                report(Step(f"image {m.stem} is {'' if m == chosen else 'no longer '}{new}"))
    return replace(chosen, tags=tuple(sorted({*chosen.tags, new})))


def untag(host: Host, name: str, old: str, report: Reporter) -> Manifest:
    """Take a further name from an image. Raises NotFound."""
    with images.changing(host, "tags", timeout_s=_LOCK_TIMEOUT_S):
        chosen = images.find(host, name).manifest
        if old not in chosen.tags:
            known = ", ".join(chosen.tags) or "it has none"
            raise NotFound(f"cannot find tag {old} of image {chosen.stem}", hint=f"its tags: {known}")
        kept = {*chosen.tags} - {old}
        _retag(host, chosen, kept)
    report(Step(f"image {chosen.stem} is no longer {old}"))
    return replace(chosen, tags=tuple(sorted(kept)))


def _retag(host: Host, manifest: Manifest, tags: Collection[str]) -> None:
    with images.changing(host, manifest.name, timeout_s=_LOCK_TIMEOUT_S):
        images.rewrite(host, replace(manifest, tags=tuple(sorted(tags))))


def verify(host: Host, names: Sequence[str], report: Reporter) -> tuple[Manifest, ...]:
    """Read every file of the images again and compare it with the manifest; no name: all images.

    Raises NotFound, and ImageError that names all that differs.
    """
    known = [images.find(host, name).manifest for name in names] if names else images.list_images(host)
    chosen = tuple({m.stem: m for m in known}.values())
    different: list[str] = []
    for manifest in chosen:
        found = _differences(host, manifest, report)
        different += found
        report(Step(f"image {manifest.stem} is {'damaged' if found else 'what it was when it was stored'}"))
    if different:
        raise ImageError(
            f"cannot trust the store: {'; '.join(different)}",
            hint="build, pull or import it again, after deleting it or the VMs on it",
        )
    return chosen


def _differences(host: Host, manifest: Manifest, report: Reporter) -> list[str]:
    told = {f"{manifest.stem}.{suffix}": digits for suffix, digits in manifest.sums().items()}
    if kept := manifest.warm:
        told |= {f"{manifest.stem}.warm": kept.disk_sha256, f"{manifest.stem}.memory": kept.memory_sha256}
    different = []
    for volume, digits in told.items():
        if digits:
            try:
                if _digest(host, volume, digits, report) != digits:
                    different.append(f"{volume} is not what it was")
            except NotFound:
                different.append(f"{volume} is missing")
    if content_digest(manifest.sums(), manifest.cmdline) != manifest.digest:
        different.append(f"{manifest.stem}.json is not what it was")
    return different


def _digest(host: Host, volume: str, like: str, report: Reporter) -> str:
    """The digest of a volume, of the kind that ``like`` is of. Raises NotFound."""
    pool = host.settings.image_pool
    facts = storage.volume(host.conn, pool, volume)
    size = facts.allocation

    def moved(done: int) -> None:
        report(Progress(volume, done, max(size, done)))

    path = Path(facts.path)
    try:
        if host.conn.local and host.conn.qemu and os.access(path, os.R_OK):
            return digest.of_file(path, like, moved)
    except FileNotFoundError as error:
        raise NotFound(f"cannot read volume {volume}: it is not there") from error
    except OSError as error:
        raise ImageError(f"cannot read volume {volume}: {error.strerror}") from error
    found = digest.Digest(like)
    storage.read(host.conn, pool, volume, found.update, moved)
    return str(found)


def find_unused(host: Host, name: str, report: Reporter) -> Image:
    """An image that may be deleted. Raises Conflict, naming who, when a disk is based on it or a VM starts from it.

    Also a VM of another host that sees the store; warns of hosts that cannot be asked.
    """
    image = images.find(host, name)
    needed = image_users.needed(host)
    if users := needed.by(*images.needed_files(image), but=(_warmed(image),)):
        raise Conflict(
            f"cannot delete image {image.manifest.stem}: {', '.join(users)} need it",
            hint="delete those VMs first",
        )
    if host.others:
        from vmctl import elsewhere  # late: most know one host

        # A warmed state that was put there from another host is the image's own.
        storage.refresh(host.conn, host.settings.image_pool)
        elsewhere.require_unused(host, f"image {image.manifest.stem}", images.needed_files(image), "delete", report)
    return image


def _warmed(image: Image) -> str:
    """The disk of the state that is kept beside an image, which is its own."""
    return str(Path(image.disk).with_name(f"{image.manifest.stem}.warm"))


def delete(host: Host, name: str, report: Reporter) -> Manifest:
    """Delete an image that nothing needs. Raises as find_unused()."""
    with images.changing(host, images.find(host, name).manifest.name):
        image = find_unused(host, name, report)
        for volume in image.manifest.volumes():
            try:
                storage.delete_volume(host.conn, host.settings.image_pool, volume)
            except VmctlError:
                storage.refresh(host.conn, host.settings.image_pool)
                raise
    report(Step(f"image {image.manifest.stem} deleted"))
    return image.manifest


@dataclass(frozen=True, slots=True)
class Prunable:
    """What a prune takes away. ``freed`` in bytes.

    Images; files that killed imports and builds left; and downloads, by image name, that nobody has gone on with.
    """

    images: tuple[str, ...]
    leftovers: tuple[str, ...]
    freed: int
    downloads: tuple[str, ...] = ()


def outdated(known: Sequence[Manifest], kept_each: int) -> tuple[Manifest, ...]:
    """Those behind the newest ``kept_each`` of their names, untagged; ``known`` is in ``list_images``' order. Pure.

    One that is a step on the way to a newer one stays. For what is nothing but a step see idle_steps().
    """
    seen: dict[str, int] = {}
    found = []
    for manifest in known:
        if manifest.step_of:
            continue
        seen[manifest.name] = seen.get(manifest.name, 0) + 1
        if seen[manifest.name] > kept_each and not manifest.tags:
            found.append(manifest)
    led = {key for m in known if m not in found and not m.step_of for key in m.built_on}
    return tuple(m for m in found if m.layer not in led)


def idle_steps(remaining: Sequence[Manifest], now: datetime) -> tuple[Manifest, ...]:
    """The untagged steps of recipes that led to no image that remains. Pure.

    Those of the latest build of a recipe count for a day, when it has not come to its end: its next run goes on there.
    """
    led = {key for m in remaining if not m.step_of for key in m.built_on}
    latest: dict[str, Manifest] = {}
    for m in sorted(remaining, key=lambda m: m.built):
        if m.layer:
            latest[m.step_of or m.name] = m
    fresh = (now - _UNFINISHED).isoformat()
    for m in latest.values():
        if m.step_of and m.built >= fresh:
            led |= {m.layer, *m.built_on}
    return tuple(m for m in remaining if m.step_of and m.layer not in led and not m.tags)


def prunable(host: Host, report: Reporter, *, kept_each: int = 1, idle_s: float = DOWNLOADS_IDLE_S) -> Prunable:
    """What nobody needs: older images of a name on which no disk of any VM or pool is based, even indirectly.

    And steps of recipes that led to no image that is left.
    While a disk is there whose chain cannot be followed, no image is. And downloads idle for ``idle_s`` seconds.
    """
    given_up = pulls.stale(host, idle_s)
    found = _prunable_images(host, report, kept_each)
    freed = found.freed + sum(one.size for one in given_up)
    return replace(found, downloads=tuple(one.name for one in given_up), freed=freed)


def _prunable_images(host: Host, report: Reporter, kept_each: int) -> Prunable:
    pool = host.settings.image_pool
    if not storage.pool_exists(host.conn, pool):
        return Prunable((), (), 0)
    storage.refresh(host.conn, pool)
    known = images.list_images(host)
    old = outdated(known, kept_each)
    needed = image_users.needed(host) if old or any(m.step_of for m in known) else Needed({})
    free: list[Manifest] = []
    if needed.unknown:
        text = f"no image is pruned: what {', '.join(needed.unknown[:4])} is based on cannot be read from here"
        report(Warned(text, hint="run it on the host itself, as root"))
    else:
        free = _unneeded(host, old, needed, report)
        free += _unneeded(host, idle_steps([m for m in known if m not in free], datetime.now(UTC)), needed, report)
    left = (*(volume for volume, _ in images.half_stored(host)), *images.half_warmed(host))
    volumes = (*(volume for manifest in free for volume in manifest.volumes()), *left)
    freed = sum(facts.allocation for facts in storage.volumes(host.conn, pool) if facts.name in volumes)
    return Prunable(tuple(m.stem for m in free), left, freed)


def _unneeded(host: Host, old: Sequence[Manifest], needed: Needed, report: Reporter) -> list[Manifest]:
    free = []
    for manifest in old:
        image = images.with_paths(host, manifest)
        if users := needed.by(*images.needed_files(image), but=(_warmed(image),)):
            report(Step(f"image {manifest.stem} stays: {', '.join(users)} need it"))
        else:
            free.append(manifest)
    return _unneeded_elsewhere(host, free, report) if free and host.others else free


def _unneeded_elsewhere(host: Host, free: Sequence[Manifest], report: Reporter) -> list[Manifest]:
    """Those that no VM of another host needs, where both see the store; none while one of the hosts cannot be asked."""
    from vmctl import elsewhere  # late: most know one host

    files = [(one, images.needed_files(images.with_paths(host, one))) for one in free]
    found = elsewhere.look(host, [path for _, paths in files for path in paths])
    if found.unasked:
        silent = ", ".join(found.unasked)
        text = f"no image is pruned: {silent} may see the store, and cannot be asked who needs them"
        report(Warned(text, hint=f"vmctl host remove {next(iter(found.unasked))}, if it is no more"))
        return []
    for manifest, paths in files:
        if told := next((found.told(path) for path in paths if path in found.users), ""):
            report(Step(f"image {manifest.stem} stays: {told} need it"))
    return [manifest for manifest, paths in files if not found.users.keys() & {*paths}]


def prune(host: Host, what: Prunable, report: Reporter, *, idle_s: float = DOWNLOADS_IDLE_S) -> None:
    """Take it away. An image that somebody has come to need meanwhile stays, and so does what is being made."""
    for stem in what.images:
        try:
            delete(host, stem, report)
        except (Conflict, NotFound) as error:
            report(Warned(error.message))
    for volume in what.leftovers:
        try:
            _remove_leftover(host, volume)
        except Conflict as error:
            report(Warned(error.message))
    for name in what.downloads:
        try:
            if not pulls.discard(host, name, idle_s):
                report(Warned(f"the download of {name} stays: it has been gone on with"))
        except Conflict as error:
            report(Warned(error.message))
        except OSError as error:
            raise ImageError(f"cannot remove the download of {name}: {error.strerror}") from error


def _remove_leftover(host: Host, volume: str) -> None:
    names = dict(images.half_stored(host)) | images.half_warmed(host)
    if volume in names:
        with images.changing(host, names[volume]):
            if volume in dict(images.half_stored(host)) | images.half_warmed(host):
                storage.delete_volume(host.conn, host.settings.image_pool, volume)
