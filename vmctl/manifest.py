"""What an image is: its manifest, as kept beside its files, and a new one on its way into the store. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

NAME = r"[a-z0-9](?:[a-z0-9.-]{0,46}[a-z0-9])?"
_FILE = re.compile(rf"(?P<name>{NAME})-(?P<digest>[0-9a-f]{{12}})\.json")
_SHORT = 12


@dataclass(frozen=True, slots=True)
class Warm:
    """A running guest's state kept beside an image, and what it needs. ``size`` in bytes of disk and memory.

    ``accel`` is "kvm" or "tcg"; ``cpu`` the model, on KVM the host's own. ``client_key`` is a digest of the key that
    the guest lets in; ``seed_size`` that of its seed disk, 0 for none.
    """

    disk_sha256: str
    memory_sha256: str
    size: int
    memory_mib: int
    vcpus: int
    accel: str
    machine: str
    cpu: str
    hypervisor: str
    seed_size: int
    client_key: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image is. Sizes in bytes; ``digest`` covers disk, kernel, initrd and command line.

    ``checksum`` is what its source was checked against, "sha256:…" or "sha512:…"; "" for one made here.
    ``verified`` is False for one that was taken without a checksum, and stays so. ``boots`` names the ways it can
    start: direct, bios, uefi. ``first_boot`` names what reads the seed inside: cloud-init, ignition, or micro's init.
    ``layer`` is the digest of the steps that led to it, ``built_on`` those of the steps before its last; ``step_of``
    names the image that it is but a step of. ``disk_digest`` is as vmctl.digest writes it.
    ``bzimage_sha256`` is of the kernel as firmware starts it, where that is another file. ``default_user_by`` is how
    its user is known: told, catalogue, box, inside (its own files), os, name (a guess by it), nothing (root then); ""
    for one made here.
    """

    name: str
    digest: str
    format: str
    os: str
    os_version: str
    architecture: str
    default_user: str
    virtual_size: int
    size: int
    disk_digest: str
    kernel_sha256: str
    initrd_sha256: str
    cmdline: str
    software: dict[str, str]
    source: str
    built: str
    boots: tuple[str, ...] = ("direct",)
    osinfo: str = ""
    checksum: str = ""
    verified: bool = True
    tags: tuple[str, ...] = ()
    first_boot: str = "cloud-init"
    bzimage_sha256: str = ""
    layer: str = ""
    built_on: tuple[str, ...] = ()
    step_of: str = ""
    default_user_by: str = ""
    warm: Warm | None = None

    @property
    def built_at(self) -> str:
        """When it was made, to the second; ``built`` tells two of one second apart."""
        return f"{self.built[:19]}Z"

    @property
    def short(self) -> str:
        """The digest as people type it."""
        return self.digest[:_SHORT]

    @property
    def stem(self) -> str:
        """What the names of its volumes begin with."""
        return f"{self.name}-{self.short}"

    def sums(self) -> dict[str, str]:
        """The digests of its files by suffix, sha256 but for the disk's; "" for those it does not have."""
        return {
            "qcow2": self.disk_digest,
            "kernel": self.kernel_sha256,
            "initrd": self.initrd_sha256,
            "bzimage": self.bzimage_sha256,
        }

    def volumes(self) -> tuple[str, ...]:
        """Names of its volumes, the manifest first: deleting it first makes the image gone at once.

        Among them those of a warmed state, also one whose making was killed.
        """
        suffixes = [suffix for suffix, digits in self.sums().items() if digits]
        return (f"{self.stem}.json", *(f"{self.stem}.{suffix}" for suffix in (*suffixes, "warm", "memory")))

    def to_bytes(self) -> bytes:
        """The text that is kept."""
        return json.dumps(asdict(self), indent=1).encode()


def content_digest(sums: Mapping[str, str], cmdline: str) -> str:
    """The digest of an image from those of its files by suffix ("": there is none) and its command line."""
    parts = [sums.get(suffix, "") for suffix in ("qcow2", "kernel", "initrd")]
    if bzimage := sums.get("bzimage", ""):  # came later: images without one keep their digests
        parts.append(bzimage)
    return hashlib.sha256("\n".join([*parts, cmdline]).encode()).hexdigest()


def name_taken(new: Manifest, known: Sequence[Manifest]) -> list[str]:
    """What to tell of images that the name of ``new`` has meant up to now; ``known`` has the newest of a name first.

    A later version of what the name meant, from where that came from, is nothing to tell.
    """
    found = [f"{m.stem}, which is so tagged" for m in known if new.name in m.tags and m.name != new.name]
    before = next((m for m in known if m.name == new.name), new)
    if before.digest != new.digest and _origin(before.source) != _origin(new.source):
        found.append(f"{before.stem}, which came from elsewhere and stays until it is pruned")
    return [f"{new.name} means this image from now on, and no longer {one}" for one in found]


def _origin(source: str) -> str:
    """Where an image came from, whatever its version: a file, a URL, a recipe of ours, or steps."""
    if source.startswith("recipe "):
        return " ".join(source.split()[:2])
    return "steps" if source.endswith(", by steps") else source.rpartition(" (")[0] or source


def is_manifest(volume: str) -> bool:
    """Whether a volume of that name is a manifest."""
    return _FILE.fullmatch(volume) is not None


def parse(data: bytes) -> Manifest | None:
    """A manifest from its JSON; None for one cut short or of another shape, which makes the image not exist."""
    try:
        values = json.loads(data)
        if "disk_sha256" in values:  # its name while it was one
            values["disk_digest"] = values["disk_sha256"]
        kept: dict[str, Any] = {}
        for one in fields(Manifest):
            if one.name in values or (one.default is MISSING and one.default_factory is MISSING):
                kept[one.name] = values[one.name]
        for name in ("boots", "tags", "built_on"):
            if name in kept:
                kept[name] = tuple(kept[name])
        if kept.get("warm") is not None:
            kept["warm"] = Warm(**{one.name: kept["warm"][one.name] for one in fields(Warm)})
        return Manifest(**kept)
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image on its way into the store: its files, which the store may take for its own, and what they are.

    ``disk`` is qcow2 without a backing file; ``disk_digest`` that of its content where it is known, else "". Sizes in
    bytes.
    """

    name: str
    disk: Path
    virtual_size: int
    os_name: str
    os_version: str
    architecture: str
    default_user: str
    source: str
    kernel: Path | None = None
    bzimage: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    boots: tuple[str, ...] = ("bios",)
    osinfo: str = ""
    checksum: str = ""
    verified: bool = True
    software: dict[str, str] = field(default_factory=dict)
    format: str = "qcow2"
    first_boot: str = "cloud-init"
    layer: str = ""
    built_on: tuple[str, ...] = ()
    step_of: str = ""
    default_user_by: str = ""
    disk_digest: str = ""

    def files(self) -> dict[str, Path]:
        """Its files by the suffix they get in the store."""
        found = {"qcow2": self.disk, "kernel": self.kernel, "bzimage": self.bzimage, "initrd": self.initrd}
        return {suffix: path for suffix, path in found.items() if path is not None}
