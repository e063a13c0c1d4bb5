"""The image store: a pool of volumes on the host, each image with a manifest beside its files.

An image NAME of content digest D is the volumes NAME-D.qcow2, NAME-D.kernel, NAME-D.initrd and, written last,
NAME-D.json: an image exists once its manifest can be read, so a store cut off half-way never looks complete.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO

from vmctl import digest
from vmctl.durable import written_out
from vmctl.errors import ImageError, NotFound, VmctlError, quietly
from vmctl.events import Progress, Reporter, Step, Warned
from vmctl.hosts import Host, pool_folder
from vmctl.hypervisor import storage
from vmctl.locks import held
from vmctl.manifest import NAME, Manifest, NewImage, content_digest, is_manifest, name_taken, parse
from vmctl.order import natural
from vmctl.resources import image_recipes_dir, recipe_source
from vmctl.workspace import clear_leftovers, workspace

_LOCK_TIMEOUT_S = 900
_ROOM_FOR_TAGS = 4096
_MAKING = ".making-"
_CLOSE = 0.75  # of difflib
_FILE_OF_IMAGE = re.compile(rf"(?P<stem>(?P<name>{NAME})-[0-9a-f]{{12}})\.(?:qcow2|kernel|initrd|bzimage|warm|memory)")


@dataclass(frozen=True, slots=True)
class Image:
    """An image in the store with the host paths of its files ("" for a kernel it does not have).

    ``bzimage`` is the kernel with its real-mode part, which asks the firmware for the screen; ``kernel`` starts faster.
    """

    manifest: Manifest
    disk: str
    kernel: str
    initrd: str
    bzimage: str = ""


def pool_path(host: Host, leaf: str) -> str:
    """The folder of a pool of vmctl's: of the pool that is there, or the one it would be made with."""
    return storage.running_path(host.conn, leaf) or pool_folder(host, leaf)


def ensure_pools(host: Host) -> None:
    """Make sure the pools for images and for disks are there and run."""
    for name in (host.settings.image_pool, host.settings.pool):
        storage.ensure_pool(host.conn, name, partial(_pool_xml, host, name))


def _pool_xml(host: Host, name: str) -> str:
    from vmctl import render  # late: the pools are there, most of the time

    return render.pool(name, pool_path(host, name))


def list_images(host: Host, *, anew: bool = False) -> tuple[Manifest, ...]:
    """All images, by name and then newest first.

    What another host put into a store that both see is among them where its folder can be looked into from here;
    elsewhere with ``anew``, for which libvirt looks at every file there.
    """
    pool = host.settings.image_pool
    if not storage.pool_exists(host.conn, pool):
        return ()
    if _has_unseen(host, pool, otherwise=anew):
        quietly(lambda: storage.refresh(host.conn, pool, timeout_s=0))  # or as it is, while a file is made there
    try:
        read = _manifests(host, pool)
    except VmctlError:  # another host that sees the store took one away: libvirt here does not know yet
        storage.refresh(host.conn, pool)
        read = _manifests(host, pool)
    found = [manifest for manifest in read if manifest is not None]
    found.sort(key=lambda manifest: manifest.built, reverse=True)
    return tuple(sorted(found, key=lambda manifest: natural(manifest.name)))


def _has_unseen(host: Host, pool: str, *, otherwise: bool) -> bool:
    """Whether there are images in the store that libvirt does not know of; ``otherwise`` where nobody here can tell."""
    if not (host.conn.local and host.conn.qemu):
        return otherwise
    try:
        there = {one.name for one in Path(storage.pool_path(host.conn, pool)).iterdir() if is_manifest(one.name)}
    except OSError:
        return otherwise
    return not there <= {*storage.volume_names(host.conn, pool)}


def _manifests(host: Host, pool: str) -> list[Manifest | None]:
    names = [volume for volume in storage.volume_names(host.conn, pool) if is_manifest(volume)]
    return [parse(storage.download(host.conn, pool, name)) for name in names]


def find(host: Host, name: str) -> Image:
    """The image ``name`` (newest of that name), ``name-DIGEST``, ``DIGEST``, or the one so tagged; or the catalogue's.

    What the catalogue calls ``name`` besides is found under its own name. Raises NotFound.
    """
    known = list_images(host, anew=True)
    own = (manifest for manifest in known if name in {manifest.name, manifest.stem, manifest.short})
    tagged = (manifest for manifest in known if name in manifest.tags)
    for manifest in (*own, *tagged):
        return with_paths(host, manifest)
    meant = _catalogued(host, name)
    for manifest in known:
        if manifest.name == meant:
            return with_paths(host, manifest)
    hint = "see `vmctl image list`, and `vmctl image search` for what can be pulled"
    if near := _near(name, known):
        hint = f"did you mean {near}?"
    if meant:
        hint = f"get it: vmctl image pull {name}"
    if has_recipe(name):
        hint = f"make it: vmctl image build {name}"
    raise NotFound(f"cannot find image {name}: the store on {host.name} has none of that name", hint=hint)


def _near(name: str, known: tuple[Manifest, ...]) -> str:
    """Names in the store that are about the same; "" for none."""
    from difflib import get_close_matches  # late: only who mistypes asks

    names = dict.fromkeys(one for manifest in known for one in (manifest.name, *manifest.tags))
    return ", ".join(get_close_matches(name, names, cutoff=_CLOSE))


def _catalogued(host: Host, name: str) -> str:
    """The own name of what can be pulled as ``name``; "" for nothing."""
    from vmctl import catalog  # late: only who lacks an image asks

    try:
        return catalog.find(catalog.load(host.folders.config / "catalog.d"), name).name
    except VmctlError:
        return ""


def with_paths(host: Host, manifest: Manifest) -> Image:
    """An image with the paths of its files."""
    stem = f"{storage.pool_path(host.conn, host.settings.image_pool)}/{manifest.stem}"
    kernel = f"{stem}.kernel" if manifest.kernel_sha256 else ""
    initrd = f"{stem}.initrd" if manifest.initrd_sha256 else ""
    bzimage = f"{stem}.bzimage" if manifest.bzimage_sha256 else ""
    return Image(manifest, f"{stem}.qcow2", kernel, initrd, bzimage)


def half_stored(host: Host) -> tuple[tuple[str, str], ...]:
    """Volumes that are files of an image without a manifest, each with that image's name."""
    present = set(storage.volume_names(host.conn, host.settings.image_pool))
    matches = [match for volume in sorted(present) if (match := _FILE_OF_IMAGE.fullmatch(volume))]
    return tuple((match[0], match["name"]) for match in matches if f"{match['stem']}.json" not in present)


def half_warmed(host: Host) -> dict[str, str]:
    """Volumes of warmed states whose making was killed, each with its image's name."""
    known = {m.stem: m for m in list_images(host)}
    found = {}
    for volume in storage.volume_names(host.conn, host.settings.image_pool):
        stem, _, kind = volume.rpartition(".")
        if kind in {"warm", "memory"} and stem in known and known[stem].warm is None:
            found[volume] = known[stem].name
    return found


def outdated(manifest: Manifest, *, as_named: str) -> bool:
    """Whether an image was built by another version of a recipe of ours, and asked for by nothing but its name."""
    name, source = manifest.name, manifest.source
    return (
        name == as_named and has_recipe(name) and source.startswith(f"recipe {name}") and source != recipe_source(name)
    )


def has_recipe(name: str) -> bool:
    """Whether an image of that name can be built from a recipe that comes with vmctl."""
    return "/" not in name and (image_recipes_dir() / name / "recipe.toml").is_file()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _manifest(new: NewImage, report: Reporter) -> Manifest:
    sums = {suffix: _sha256(path) for suffix, path in new.files().items() if suffix != "qcow2"}
    size = new.disk.stat().st_size
    sums["qcow2"] = new.disk_digest or digest.of_file(
        new.disk, moved=lambda done: report(Progress("digest", done, size))
    )
    return Manifest(
        name=new.name,
        digest=content_digest(sums, new.cmdline),
        format=new.format,
        os=new.os_name,
        os_version=new.os_version,
        architecture=new.architecture,
        default_user=new.default_user,
        virtual_size=new.virtual_size,
        size=sum(path.stat().st_size for path in new.files().values()),
        disk_digest=sums["qcow2"],
        kernel_sha256=sums.get("kernel", ""),
        initrd_sha256=sums.get("initrd", ""),
        cmdline=new.cmdline,
        software=dict(new.software),
        source=new.source,
        built=_now(),
        boots=new.boots,
        osinfo=new.osinfo,
        checksum=new.checksum,
        verified=new.verified,
        first_boot=new.first_boot,
        layer=new.layer,
        built_on=new.built_on,
        step_of=new.step_of,
        default_user_by=new.default_user_by,
        bzimage_sha256=sums.get("bzimage", ""),
    )


@contextmanager
def making(host: Host, name: str) -> Iterator[Path]:
    """Hold the right to put an image called ``name`` into the store, with an empty folder to make it in.

    The folder is in the store's own where that is ours to write, so that a finished file needs no second copy.
    """
    ensure_pools(host)
    host.folders.cache.mkdir(parents=True, exist_ok=True)
    parent = _own_folder(host) or host.folders.cache
    with (
        held(host.folders.runtime, f"image {name}", timeout_s=_LOCK_TIMEOUT_S),
        workspace(parent, _MAKING) as folder,
    ):
        clear_leftovers(host.folders.cache, _MAKING)
        _clear_half_stored(host, name)
        yield folder


def _own_folder(host: Host) -> Path | None:
    """The store's folder, where it is on this machine and ours to write."""
    if not (host.conn.local and host.conn.qemu):
        return None
    folder = Path(storage.pool_path(host.conn, host.settings.image_pool))
    return folder if folder.is_dir() and os.access(folder, os.R_OK | os.W_OK | os.X_OK) else None


def _clear_half_stored(host: Host, name: str) -> None:
    """Delete what a killed process left of an image of that name: its files, with no manifest yet. Under its lock."""
    pool = host.settings.image_pool
    if _own_folder(host):
        storage.refresh(host.conn, pool)  # files that were put there by renaming
    for volume, image in half_stored(host):
        if image == name:
            storage.delete_volume(host.conn, pool, volume)


def add(host: Host, new: NewImage, report: Reporter) -> Manifest:
    """Put an image into the store, under the lock of ``making``. One of the same content is there already: it stays."""
    with written_out(new.files().values()):
        manifest = _manifest(new, report)
    known = list_images(host)
    present = next((m for m in known if (m.name, m.digest) == (manifest.name, manifest.digest)), None)
    if present is None:
        for text in name_taken(manifest, known):
            report(Warned(text))
        _store(host, manifest, new, report)
        return manifest
    return renew(host, present, report, manifest)


def renew(host: Host, present: Manifest, report: Reporter, again: Manifest | None = None) -> Manifest:
    """Make the plain name mean this image again, under the lock of ``making``, where a newer one has taken it."""
    known = list_images(host)
    for text in name_taken(present, known):
        report(Warned(text))
    report(Step(f"image {present.stem} is in the store already, unchanged"))
    shadowed = next(m for m in known if m.name == present.name) != present
    # The plain name means this one again; and what an older vmctl did not yet write down is added. One that was taken
    # unchecked stays so, whatever was checked since; one that was checked is not doubted by a copy that was not.
    kept = replace(again or present, tags=present.tags, warm=present.warm, built=_now() if shadowed else present.built)
    if len(kept.software) > len(present.software):  # there is no room for more; see rewrite()
        kept = replace(kept, software=present.software)
    if not (present.verified and kept.verified):
        kept = replace(kept, source=present.source, checksum=present.checksum, verified=present.verified)
    if kept != present:
        rewrite(host, kept)
    return kept


def rewrite(host: Host, manifest: Manifest) -> None:
    """Replace what is kept of an image, in place. Raises ImageError when it no longer fits there."""
    volume = f"{manifest.stem}.json"
    text = manifest.to_bytes()
    size = storage.volume(host.conn, host.settings.image_pool, volume).capacity
    if len(text) > size:
        raise ImageError(f"cannot change the manifest of image {manifest.stem}: it has grown too long")
    storage.upload_bytes(host.conn, host.settings.image_pool, volume, text.ljust(size))


def _store(host: Host, manifest: Manifest, new: NewImage, report: Reporter) -> None:
    try:
        for suffix, path in new.files().items():
            _bring(host, f"{manifest.stem}.{suffix}", path, report)
        text = manifest.to_bytes()
        _tell(host, f"{manifest.stem}.json", text.ljust(len(text) + _ROOM_FOR_TAGS), new.disk.parent, report)
        if _own_folder(host):
            storage.refresh(host.conn, host.settings.image_pool)
    except BaseException:
        # Under the image's lock, and without a manifest, these can only be this run's own.
        if _own_folder(host):
            storage.refresh(host.conn, host.settings.image_pool)
        for volume in manifest.volumes():
            storage.delete_volume(host.conn, host.settings.image_pool, volume)
        raise
    report(Step(f"image {manifest.stem} is in the store"))


def _bring(host: Host, name: str, path: Path, report: Reporter) -> None:
    """Bring a finished file into the store: by renaming it where it was made there already, else through libvirt.

    A file that is the store's, of the image this one is made from, gets a second name instead.
    """
    folder = _own_folder(host)
    if folder is not None and folder in path.parents:
        if path.parent == folder:
            os.link(path, folder / name)
        else:
            path.chmod(0o644)
            path.rename(folder / name)
        return
    with path.open("rb") as file:
        _put(host, name, file, path.stat().st_size, report)


def _tell(host: Host, name: str, text: bytes, made_in: Path, report: Reporter) -> None:
    """Put a manifest into the store."""
    folder = _own_folder(host)
    if folder is None or folder not in made_in.parents:
        _put(host, name, io.BytesIO(text), len(text), report)
        return
    path = made_in / name
    path.write_bytes(text)
    with written_out([path]):  # before it has its name, by which the image exists
        pass
    _bring(host, name, path, report)
    # Once for all names: a file system's journal keeps their order, and each wait for it is one for all who write.
    with written_out([folder]):
        pass


def _put(host: Host, name: str, source: IO[bytes], size: int, report: Reporter) -> None:
    pool = host.settings.image_pool
    storage.delete_volume(host.conn, pool, name)  # left by a build that was killed; no manifest names it
    from vmctl import render  # late: where the store is on this machine, files come to it by their names

    # Raw whatever it holds: libvirt would make a qcow2 volume of its own only to have it overwritten.
    view = render.VolumeView(name=name, capacity=size, format="raw", mode="0644")
    storage.create_volume(host.conn, pool, render.volume(view), name=name)
    storage.upload(host.conn, pool, name, source, size, lambda sent: report(Progress(name, sent, size)))


@contextmanager
def changing(host: Host, name: str, *, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold the right to change images called ``name``. Raises Conflict when another vmctl has it."""
    with held(host.folders.runtime, f"image {name}", timeout_s=timeout_s):
        yield


def needed_files(image: Image) -> tuple[str, ...]:
    """The paths by which disks and VMs need an image."""
    return tuple(path for path in (image.disk, image.kernel, image.initrd, image.bzimage) if path)


def would_add(host: Host, name: str) -> str:
    """What a new image called ``name`` would be, in the store."""
    older = [one.stem for one in list_images(host) if one.name == name]
    pool = host.settings.image_pool
    return f"put image {name}-… into pool {pool}" + (f"; until pruned, these stay: {', '.join(older)}" if older else "")


def files(host: Host, manifest: Manifest) -> tuple[str, ...]:
    """The files of an image that are there."""
    pool = host.settings.image_pool
    folder, there = storage.pool_path(host.conn, pool), set(storage.volume_names(host.conn, pool))
    return tuple(f"{folder}/{volume}" for volume in manifest.volumes() if volume in there)
