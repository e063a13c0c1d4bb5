"""The image store: a pool of volumes on the host, each image with a manifest beside its files.

An image NAME of content digest D is the volumes NAME-D.qcow2, NAME-D.kernel, NAME-D.initrd and, written last,
NAME-D.json: an image exists once its manifest can be read, so a store cut off half-way never looks complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vmctl import render
from vmctl.errors import Conflict, ImageError, NotFound, VmctlError
from vmctl.events import Progress, Reporter, Step
from vmctl.hosts import Host
from vmctl.hypervisor import domain, storage
from vmctl.locks import held

if TYPE_CHECKING:
    from vmctl.builder.micro import BuiltImage

RECIPES = ("micro",)
_MANIFEST = re.compile(r"(?P<name>[a-z0-9][a-z0-9.-]*)-(?P<digest>[0-9a-f]{12})\.json")
_BUILD_LOCK_TIMEOUT_S = 900


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image is. Sizes in bytes; ``digest`` covers disk, kernel, initrd and command line."""

    name: str
    digest: str
    format: str
    os: str
    os_version: str
    architecture: str
    default_user: str
    virtual_size: int
    size: int
    disk_sha256: str
    kernel_sha256: str
    initrd_sha256: str
    cmdline: str
    software: dict[str, str]
    source: str
    built: str

    @property
    def stem(self) -> str:
        """What the names of its volumes begin with."""
        return f"{self.name}-{self.digest[:12]}"

    def volumes(self) -> tuple[str, ...]:
        """Names of its volumes, the manifest first: deleting it first makes the image gone at once."""
        files = [f"{self.stem}.json", f"{self.stem}.qcow2"]
        if self.kernel_sha256:
            files += [f"{self.stem}.kernel", f"{self.stem}.initrd"]
        return tuple(files)


@dataclass(frozen=True, slots=True)
class Image:
    """An image in the store with the host paths of its files ("" for a kernel it does not have)."""

    manifest: Manifest
    disk: str
    kernel: str
    initrd: str


def pool_path(host: Host, leaf: str) -> str:
    """The folder of a pool of vmctl's: of the pool that is there, or the one it would be made with."""
    if storage.pool_exists(host.conn, leaf):
        return storage.pool_path(host.conn, leaf)
    return str(host.folders.data / leaf) if host.conn.session else f"/var/lib/libvirt/vmctl/{leaf}"


def ensure_pools(host: Host) -> None:
    """Make sure the pools for images and for disks are there and run."""
    for name in (host.settings.image_pool, host.settings.pool):
        storage.ensure_pool(host.conn, name, partial(_pool_xml, host, name))


def _pool_xml(host: Host, name: str) -> str:
    return render.pool(name, pool_path(host, name))


def parse_manifest(data: bytes) -> Manifest | None:
    """A manifest from its JSON; None for one cut short or of another shape, which makes the image not exist."""
    try:
        values = json.loads(data)
        return Manifest(**{field.name: values[field.name] for field in fields(Manifest)})
    except (ValueError, KeyError, TypeError):
        return None


def list_images(host: Host) -> tuple[Manifest, ...]:
    """All images, by name and then newest first."""
    pool = host.settings.image_pool
    if not storage.pool_exists(host.conn, pool):
        return ()
    names = [volume for volume in storage.volume_names(host.conn, pool) if _MANIFEST.fullmatch(volume)]
    read = [parse_manifest(storage.download(host.conn, pool, name)) for name in names]
    found = [manifest for manifest in read if manifest is not None]
    found.sort(key=lambda manifest: manifest.built, reverse=True)
    return tuple(sorted(found, key=lambda manifest: manifest.name))


def find(host: Host, name: str) -> Image:
    """The image ``name`` (newest of that name) or ``name-DIGEST``. Raises NotFound."""
    pool = host.settings.image_pool
    for manifest in list_images(host):
        if name in {manifest.name, manifest.stem} or name == manifest.digest[:12]:
            folder = storage.pool_path(host.conn, pool)
            kernel = f"{folder}/{manifest.stem}.kernel" if manifest.kernel_sha256 else ""
            initrd = f"{folder}/{manifest.stem}.initrd" if manifest.initrd_sha256 else ""
            return Image(manifest, f"{folder}/{manifest.stem}.qcow2", kernel, initrd)
    hint = f"make it: vmctl image build {name}" if name in RECIPES else "see `vmctl image list`"
    raise NotFound(f"cannot find image {name}: the store on {host.conn.host} has none of that name", hint=hint)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(name: str, built: BuiltImage) -> Manifest:
    parts = [_sha256(built.disk), _sha256(built.kernel), _sha256(built.initrd)]
    digest = hashlib.sha256("\n".join([*parts, built.cmdline]).encode()).hexdigest()
    return Manifest(
        name=name,
        digest=digest,
        format=built.format,
        os=built.os_name,
        os_version=built.os_version,
        architecture=built.architecture,
        default_user=built.default_user,
        virtual_size=built.virtual_size,
        size=sum(path.stat().st_size for path in (built.disk, built.kernel, built.initrd)),
        disk_sha256=parts[0],
        kernel_sha256=parts[1],
        initrd_sha256=parts[2],
        cmdline=built.cmdline,
        software=dict(built.packages),
        source=f"recipe {name}",
        built=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def build(host: Host, name: str, report: Reporter) -> Manifest:
    """Build image ``name`` by its recipe and put it into the store. Raises NotFound, ImageError."""
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise NotFound(f"cannot build image {name}: there is no recipe of that name", hint=f"recipes: {known}")
    from vmctl.builder import micro  # late: most commands only look images up

    ensure_pools(host)
    host.folders.cache.mkdir(parents=True, exist_ok=True)
    with (
        held(host.folders.runtime, f"image {name}", timeout_s=_BUILD_LOCK_TIMEOUT_S),
        tempfile.TemporaryDirectory(prefix=f"build-{name}-", dir=host.folders.cache) as folder,
    ):
        try:
            built = micro.build(Path(folder), report)
            manifest = _manifest(name, built)
        except OSError as error:
            raise ImageError(f"cannot build image {name}: {error}") from error
        present = next((known for known in list_images(host) if known.digest == manifest.digest), None)
        if present is not None:
            report(Step(f"image {present.stem} is in the store already, unchanged"))
            if find(host, name).manifest != present:
                return _made_newest(host, replace(present, built=manifest.built))
            return present
        _store(host, manifest, built, report)
    return manifest


def _made_newest(host: Host, manifest: Manifest) -> Manifest:
    """Let the plain name mean this image again, of which a build has just proved that it is what the recipe says."""
    text = json.dumps(asdict(manifest), indent=1).encode()
    # In place: the time has one length, and for no moment is the image without its manifest.
    storage.upload_bytes(host.conn, host.settings.image_pool, f"{manifest.stem}.json", text)
    return manifest


def _store(host: Host, manifest: Manifest, built: BuiltImage, report: Reporter) -> None:
    sources = {f"{manifest.stem}.qcow2": built.disk}
    if manifest.kernel_sha256:
        sources |= {f"{manifest.stem}.kernel": built.kernel, f"{manifest.stem}.initrd": built.initrd}
    try:
        for volume, path in sources.items():
            with path.open("rb") as file:
                _put(host, volume, file, path.stat().st_size, report)
        text = json.dumps(asdict(manifest), indent=1).encode()
        _put(host, f"{manifest.stem}.json", io.BytesIO(text), len(text), report)
    except BaseException:
        # Under the build lock, and without a manifest, these can only be this run's own.
        for volume in manifest.volumes():
            storage.delete_volume(host.conn, host.settings.image_pool, volume)
        raise
    report(Step(f"image {manifest.stem} is in the store"))


def _put(host: Host, name: str, source: IO[bytes], size: int, report: Reporter) -> None:
    pool = host.settings.image_pool
    storage.delete_volume(host.conn, pool, name)  # left by a build that was killed; no manifest names it
    # Raw whatever it holds: libvirt would make a qcow2 volume of its own only to have it overwritten.
    view = render.VolumeView(name=name, capacity=size, format="raw", mode="0644")
    storage.create_volume(host.conn, pool, render.volume(view), name=name)
    storage.upload(host.conn, pool, name, source, size, lambda sent: report(Progress(name, sent, size)))


def delete(host: Host, name: str, report: Reporter) -> Manifest:
    """Delete an image. Raises Conflict, naming who, when a disk is based on it or a VM starts from it."""
    image = find(host, name)
    with held(host.folders.runtime, f"image {image.manifest.name}"):
        storage.refresh(host.conn, host.settings.image_pool)
        files = {image.disk, image.kernel, image.initrd} - {""}
        volumes = storage.disk_users(host.conn, image.disk)
        machines = [
            f.name for f in domain.all_facts(host.conn) if files & ({d.source for d in f.disks} | {f.kernel, f.initrd})
        ]
        if users := sorted({*volumes, *machines}):
            raise Conflict(
                f"cannot delete image {image.manifest.stem}: {', '.join(users)} need it",
                hint="delete those VMs first",
            )
        for volume in image.manifest.volumes():
            try:
                storage.delete_volume(host.conn, host.settings.image_pool, volume)
            except VmctlError:
                storage.refresh(host.conn, host.settings.image_pool)
                raise
    report(Step(f"image {image.manifest.stem} deleted"))
    return image.manifest
