"""Warmed images: a running guest's memory and disk kept beside its image, and VMs that go on from there."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from vmctl import (
    copies,
    creation,
    deletion,
    disk_xml,
    domain_xml,
    forking,
    hosts,
    image_users,
    images,
    qemu_img,
    readiness,
    saved_memory,
)
from vmctl.at_once import at_once
from vmctl.copies import Newcomer
from vmctl.disk_replace import PREFIX
from vmctl.domain_copy import File
from vmctl.errors import Conflict, NotFound, SpecError, Unsupported, WaitTimeout, quietly
from vmctl.events import Reporter, Step
from vmctl.forking import Forked
from vmctl.guest import private_key
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain, saved, storage
from vmctl.hypervisor.connection import versions
from vmctl.hypervisor.domain import Domain, State
from vmctl.images import Image
from vmctl.locks import held
from vmctl.manifest import Manifest, Warm
from vmctl.memory_pipe import SavedMemory
from vmctl.readiness import Goal
from vmctl.seed import public_key
from vmctl.seed_disk import WENT_ON
from vmctl.spec import VM
from vmctl.wait import wait_until
from vmctl.workspace import workspace

_LOCK_TIMEOUT_S = 30.0
# Emulated, an idle micro or Debian uses 0.01 s in a second, and micro's second sshd, begun late, 0.05.
_LOOK_S, _CALM, _CALM_LOOKS = 1.0, 0.03, 3
_REST_TIMEOUT_S = 60.0
_LABEL = "vmctl/warming"  # of the VM that is booted for it: it is nobody's once its maker is dead


def paths(host: Host, manifest: Manifest) -> tuple[Path, Path]:
    """Disk and memory of a warmed image."""
    folder = Path(images.pool_path(host, host.settings.image_pool))
    return folder / f"{manifest.stem}.warm", folder / f"{manifest.stem}.memory"


def warm(host: Host, name: str, report: Reporter, *, memory_mib: int = 512, vcpus: int = 1) -> Manifest:
    """Boot a guest from an image until its system is through, and keep its state beside the image.

    Raises Conflict while VMs are based on an older such state. What was kept before stays until the new one is there.
    """
    copies.require_local(host, name, "warm")
    image = images.find(host, name)
    _require_unused(host, image.manifest, report)
    stem = image.manifest.stem
    labels = {_LABEL: stem}
    vm = VM(name=f"warm-{secrets.token_hex(4)}", image=stem, memory_mib=memory_mib, vcpus=vcpus, labels=labels)
    with ExitStack() as undo:
        undo.enter_context(_warming(host, stem))
        for left in _labelled(host, stem):
            _discard(host, left, report)
        undo.callback(quietly, lambda: _discard(host, vm.name, report))
        made = creation.create(host, vm, report).vm
        goal = Goal.CLOUD_INIT if image.manifest.first_boot == "cloud-init" else Goal.SSH
        for one in (goal, Goal.AGENT):
            budget = 3 * readiness.default_timeout_s(made, one)
            readiness.wait_for(host, made, one, timeout_s=budget, report=report)
        _let_rest(host, vm.name, report)
        with images.changing(host, image.manifest.name, timeout_s=_LOCK_TIMEOUT_S):
            return _keep(host, image, domain.find(host.conn, vm.name), report)


def _let_rest(host: Host, name: str, report: Reporter) -> None:
    """Let a guest end what it does after it answers: each VM that goes on from its state would have to do it first."""
    looks: list[float] = []

    def rests() -> bool:
        looks.append(domain.used_s(host.conn, name))
        return at_rest(looks)

    try:
        wait_until(rests, what=f"VM {name} to be at rest", timeout_s=_REST_TIMEOUT_S, interval_s=_LOOK_S)
    except WaitTimeout:
        report(Step(f"{name} does not come to rest: its state is taken as it is"))


def at_rest(looks: Sequence[float]) -> bool:
    """Whether a guest did next to nothing of late, by its processor seconds at each look, a second apart."""
    late = looks[-_CALM_LOOKS - 1 :]
    return len(late) > _CALM_LOOKS and all(b - a < _CALM * _LOOK_S for a, b in pairwise(late))


def preview(host: Host, name: str, report: Reporter, *, memory_mib: int, vcpus: int) -> list[str]:
    """What warming an image would touch. Raises as warm() does before it changes anything."""
    copies.require_local(host, name, "warm")
    manifest = images.find(host, name).manifest
    _require_unused(host, manifest, report)
    creation.plan(host, VM(name="warm", image=manifest.stem, memory_mib=memory_mib, vcpus=vcpus))
    disk, memory = paths(host, manifest)
    return [
        f"new VM warm-… with {memory_mib} MiB and {vcpus} vCPU, deleted afterwards",
        f"{'replaced' if disk.exists() else 'new'} file {disk}",
        f"{'replaced' if memory.exists() else 'new'} file {memory}",
        _manifest_of(host, manifest),
    ]


def _warming(host: Host, stem: str) -> AbstractContextManager[None]:
    """Raises Conflict while another vmctl warms the image."""
    return held(host.folders.runtime, f"warming of {stem} on {host.lock_scope}")


def _labelled(host: Host, stem: str = "") -> list[str]:
    found = []
    for facts in domain.all_facts(host.conn):
        label = facts.record.labels.get(_LABEL) if facts.record else None
        if label and label in {stem or label}:
            found.append(facts.name)
    return found


def abandoned(host: Host) -> tuple[str, ...]:
    """VMs that were booted to warm an image and whose maker is dead."""
    found = []
    for name in _labelled(host):
        record = domain.find(host.conn, name).facts.record
        try:
            with _warming(host, record.labels[_LABEL] if record else ""):
                found.append(name)
        except Conflict:
            continue  # it is at it
    return tuple(found)


def _discard(host: Host, name: str, report: Reporter) -> None:
    if domain.find_or_none(host.conn, name) is not None:
        deletion.delete(host, name, report)


def _require_unused(host: Host, manifest: Manifest, report: Reporter) -> None:
    disk, _ = paths(host, manifest)
    if users := image_users.needed(host).by(str(disk)):
        raise Conflict(
            f"cannot warm image {manifest.stem}: {', '.join(users)} need its warmed state",
            hint="delete those VMs first",
        )
    if host.others:
        from vmctl import elsewhere  # late: most know one host

        elsewhere.require_unused(host, f"image {manifest.stem}", [str(disk)], "replace the warmed state of", report)


def _keep(host: Host, image: Image, vm: Domain, report: Reporter) -> Manifest:
    """Take a running guest's state, which ends it, and put it into the store; the manifest, changed last, has it."""
    manifest = images.find(host, image.manifest.stem).manifest
    disk, memory = paths(host, manifest)
    (own,) = copies.writable(disks.disks(host.conn, vm.name, inactive=False))
    seed_size = _seed_size(host, vm)
    with workspace(disk.parent, PREFIX) as folder:
        aside = folder / "memory"
        saved.save_and_end(host.conn, vm.name, str(aside))
        head = SavedMemory(aside).head()
        report(Step(f"memory of {vm.name}: {aside.stat().st_size >> 20} MiB"))
        facts = domain_xml.parse(head.xml)
        copy = folder / "disk"
        qemu_img.copy_known(
            Path(own.source), own.format, copy, "qcow2",
            what=f"keep the disk of {vm.name}", backing=Path(image.disk), backing_format="qcow2",
        )  # fmt: skip
        copy.chmod(0o644)
        aside.chmod(0o600)
        kept = Warm(
            disk_sha256=_sha256(copy),
            memory_sha256=_sha256(aside),
            size=copy.stat().st_size + aside.stat().st_size,
            memory_mib=facts.memory_mib,
            vcpus=facts.vcpus,
            accel=str(facts.accel),
            machine=facts.machine,
            cpu=_cpu(host, head.xml),
            hypervisor=versions(host.conn).hypervisor,
            seed_size=seed_size,
            client_key=_client_key(host),
        )
        images.rewrite(host, replace(manifest, warm=None))  # neither file alone is of any use
        for made, place in ((copy, disk), (aside, memory)):
            made.replace(place)
    storage.refresh(host.conn, host.settings.image_pool)
    warmed = replace(manifest, warm=kept)
    images.rewrite(host, warmed)
    report(Step(f"image {manifest.stem} is warm"))
    return warmed


def preview_drop(host: Host, name: str, report: Reporter) -> list[str]:
    """What deleting the state kept beside an image would touch. Raises as drop() does."""
    manifest = _droppable(host, name, report)
    return [*(f"deleted file {path}" for path in paths(host, manifest)), _manifest_of(host, manifest)]


def _manifest_of(host: Host, manifest: Manifest) -> str:
    return f"changed manifest {paths(host, manifest)[0].parent / manifest.stem}.json"


def _droppable(host: Host, name: str, report: Reporter) -> Manifest:
    manifest = images.find(host, name).manifest
    if manifest.warm is None:
        raise NotFound(f"cannot drop the warmed state of image {manifest.stem}: it has none")
    _require_unused(host, manifest, report)
    return manifest


def drop(host: Host, name: str, report: Reporter) -> Manifest:
    """Delete the state kept beside an image. Raises Conflict while VMs are based on it, NotFound when there is none."""
    with images.changing(host, images.find(host, name).manifest.name, timeout_s=_LOCK_TIMEOUT_S):
        manifest = _droppable(host, name, report)
        cold = replace(manifest, warm=None)
        images.rewrite(host, cold)
        for path in paths(host, manifest):
            storage.delete_volume(host.conn, host.settings.image_pool, path.name)
    report(Step(f"image {manifest.stem} is no longer warm"))
    return cold


def _seed_size(host: Host, vm: Domain) -> int:
    record = vm.facts.record
    for one in record.owned if record else ():
        if one.volume.endswith("-seed.iso"):
            return storage.volume(host.conn, one.pool, one.volume).capacity
    return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _client_key(host: Host) -> str:
    """A digest of the key that the guest lets in."""
    return hashlib.sha256(public_key(private_key(host)).encode()).hexdigest()[:16]


def _cpu(host: Host, xml: str) -> str:
    """What the guest's processor is: a model, or with KVM the host's own."""
    facts = domain_xml.parse(xml)
    return host.facts.cpu_model if facts.accel == "kvm" and facts.cpu.startswith("host") else facts.cpu


def problems(host: Host, manifest: Manifest, vm: VM) -> list[str]:
    """Why a VM as asked for cannot go on from the warmed image on this host as it is now."""
    kept = manifest.warm
    assert kept is not None
    plain = VM(name=vm.name, image=vm.image)
    found = []
    if (now := versions(host.conn).hypervisor) != kept.hypervisor:
        found.append(f"it was made by QEMU {kept.hypervisor}, here is {now}")
    chosen = hosts.decide_accel(host, vm.accel).chosen
    if chosen != kept.accel:
        found.append(f"it runs on {kept.accel}, here VMs run on {chosen}")
    if kept.accel == "kvm" and kept.cpu != host.facts.cpu_model:
        found.append(f"it needs the processor {kept.cpu}, here is {host.facts.cpu_model}")
    if kept.client_key != _client_key(host):
        found.append("it lets in another user's key")
    for what, asked, default, has in (
        ("MiB of memory", vm.memory_mib, plain.memory_mib, kept.memory_mib),
        ("vCPUs", vm.vcpus, plain.vcpus, kept.vcpus),
    ):
        if asked not in {default, has}:
            found.append(f"it has {has} {what}, not {asked}")
    same = replace(vm, memory_mib=512, vcpus=1, labels={}, description="", accel=plain.accel)
    if same != replace(plain, labels={}):
        found.append("it is as it is: beside name, labels and description nothing can be asked of it")
    return found


def _usable(host: Host, vm: VM) -> Image:
    """The warmed image that a VM can go on from. Raises NotFound, Unsupported with all that is in its way."""
    copies.require_local(host, vm.name, "create")
    copies.require_free(host, vm.name, [vm.name], "create")
    image = images.find(host, vm.image)
    if image.manifest.warm is None:
        raise NotFound(
            f"cannot create VM {vm.name}: image {image.manifest.stem} is not warm",
            hint=f"vmctl image warm {image.manifest.name}",
        )
    if found := problems(host, image.manifest, vm):
        raise Unsupported(
            f"cannot create VM {vm.name} from warmed image {image.manifest.stem}: {'; '.join(found)}",
            hint=f"warm it again: vmctl image warm {image.manifest.name}; or create it without --warm",
        )
    return image


def plan(host: Host, vm: VM) -> list[str]:
    """What creating one would touch; touches nothing."""
    image = _usable(host, vm)
    disk, memory = paths(host, image.manifest)
    new, target, _, _ = _newcomer(host, image, vm)
    lines = [f"new running VM {new.name} ({new.uuid}), from {memory}"]
    lines += [f"new volume {new.disks[target].volume} on {disk}"]
    return [*lines, *(f"new volume {one.volume}" for one in new.own if one not in new.disks.values())]


def _newcomer(host: Host, image: Image, vm: VM) -> tuple[Newcomer, str, Domain, saved_memory.Head]:
    """The VM to make, the target of its disk, and what it is made after."""
    head = SavedMemory(paths(host, image.manifest)[1]).head()
    model = _model(head, vm)
    assert image.manifest.warm is not None
    (target,) = (d.target for d in copies.writable(disk_xml.read(head.xml)))
    seeded = image.manifest.warm.seed_size > 0
    (new,) = copies.newcomers(host, model, [vm.name], [target], (), seeded=seeded)
    return new, target, model, head


def create(host: Host, vm: VM, report: Reporter) -> Forked:
    """Make a VM that goes on from its image's warmed state, and see it answer. Undone when it fails."""
    image = _usable(host, vm)
    assert image.manifest.warm is not None
    disk, memory = paths(host, image.manifest)
    with copies.held_names(host, vm.name, [vm.name], "create"), ExitStack() as undo:
        images.ensure_pools(host)
        new, target, model, head = _newcomer(host, image, vm)
        undo.callback(quietly, lambda: copies.discard(host, new))
        (new,) = copies.define(host, model, head.xml, [new], report)
        base = File(str(disk), "qcow2")
        seed_size = image.manifest.warm.seed_size
        at_once(
            [
                lambda: copies.make_overlay(host, new.disks[target], base, image.manifest.virtual_size),
                lambda: copies.make_log(host, new, WENT_ON),
                lambda: copies.make_seed(host, model, new, size=seed_size),
            ]
        )
        (made,) = forking.go_on(host, model, [new], SavedMemory(memory), report)
        undo.pop_all()
    return made


def _model(head: saved_memory.Head, vm: VM) -> Domain:
    """The VM that was saved, with what of its record is the new one's."""
    facts = domain_xml.parse(head.xml)
    if facts.record is None:
        raise SpecError("cannot use the warmed image: it does not say whose it was")
    record = replace(facts.record, labels=dict(vm.labels), image=vm.image)
    facts = replace(facts, record=record, description=vm.description)
    return Domain(facts.name, facts.uuid, State.RUNNING, "", 0, True, False, facts)
