"""New VMs after the likeness of one that is there: what its disks become, who the new ones are, their definitions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from vmctl import disk_chain, disk_find, domain_copy, identity, images, networks, qemu_img, render, resolve, seed, spec
from vmctl.at_once import at_once
from vmctl.disk_xml import DiskDevice
from vmctl.domain_copy import File, Identity
from vmctl.errors import Conflict, SpecError, Unsupported, quietly
from vmctl.events import Reporter
from vmctl.guest import private_key
from vmctl.hosts import Host, holding
from vmctl.hypervisor import disks, domain, pools, storage
from vmctl.hypervisor.domain import Domain
from vmctl.locks import held
from vmctl.record import Owned, Record, SshAccess
from vmctl.render import VolumeView
from vmctl.seed import KeyPair
from vmctl.snapshot_plan import OURS

_LOCK_TIMEOUT_S = 60.0
MOST = 200


@dataclass(frozen=True, slots=True)
class Layer:
    """A disk that is going to be shared: ``base`` is written to no more, its VM goes on in the volume ``above``.

    ``above`` None: it does so already, and has written nothing there. ``below`` are the volumes that ``base`` is made
    of, itself the first, as far as they were made for the VM. ``size`` in bytes as the guest sees it.
    """

    target: str
    serial: str
    base: File
    size: int
    above: Owned | None
    below: tuple[Owned, ...]


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A new VM. ``disks`` are its own volumes by target; ``card_macs`` its MACs by the old ones, once defined."""

    name: str
    uuid: str
    disks: Mapping[str, Owned]
    seed: Owned | None
    key: KeyPair
    record: Record
    nvram: str
    forward: tuple[int, int] | None = None
    card_macs: Mapping[str, str] | None = None

    @property
    def own(self) -> tuple[Owned, ...]:
        """The volumes that are its alone."""
        log = (self.record.console_log,) if self.record.console_log else ()
        return (*self.disks.values(), *((self.seed,) if self.seed else ()), *log)


def numbered(new: str, count: int | None) -> tuple[str, ...]:
    """NEW, or NEW-1 to NEW-N. Raises SpecError with every problem."""
    names = (new,) if count is None else tuple(f"{new}-{number}" for number in range(1, count + 1))
    problems = [] if count is None or 1 <= count <= MOST else [f"{count} of them are not between 1 and {MOST}"]
    problems += spec.name_problems(names[-1]) if names else []
    if problems:
        raise SpecError(f"cannot make VM {new}", problems=problems)
    return names


@contextmanager
def held_names(host: Host, vm: str, names: Sequence[str], doing: str) -> Iterator[None]:
    """Nobody else works on the VM or on the new names within the block. Raises Conflict for a name that is taken."""
    with ExitStack() as locks:
        for one in sorted({vm, *names}):
            locks.enter_context(holding(host, one))
        require_free(host, vm, names, doing)
        yield


def require_free(host: Host, vm: str, names: Sequence[str], doing: str) -> None:
    """Raise Conflict that tells all the names that are taken."""
    known = {name for name, _ in domain.identities(host.conn)}
    if taken := [one for one in names if one in known]:
        verb = "exists" if len(taken) == 1 else "exist"
        raise Conflict(f"cannot {doing} VM {vm}: {', '.join(taken)} {verb} already", hint="choose another name")


def require_local(host: Host, vm: str, doing: str) -> None:
    """Raise Unsupported where the files of the VM are not this machine's."""
    if not host.conn.local:
        raise Unsupported(f"cannot {doing} VM {vm}: its host is another machine", hint="run vmctl there")


def writable(found: Iterable[DiskDevice]) -> tuple[DiskDevice, ...]:
    """The disks that one VM alone writes to. The others can be had by several as they are."""
    return tuple(d for d in found if d.device == "disk" and d.source and not d.readonly and not d.shareable)


def layers(host: Host, vm: Domain, doing: str) -> tuple[Layer, ...]:
    """What becomes of the VM's disks when others are based on them. Raises Unsupported, Conflict, ImageError."""
    if disks.has_snapshots(host.conn, vm.name):
        raise Conflict(
            f"cannot {doing} VM {vm.name}: it has snapshots, which name the files of its disks",
            hint="delete its snapshots first, or make a copy: vmctl clone --full",
        )
    images.ensure_pools(host)
    storage.refresh(host.conn, host.settings.pool)
    known = set(storage.volume_names(host.conn, host.settings.pool))
    found = writable(disks.disks(host.conn, vm.name, inactive=not vm.active))
    identity.require_no_twin(host, vm, [disk.source for disk in found], f"{doing} VM {vm.name}")
    return tuple(_layer(host, vm, disk, doing, known) for disk in found)


def _layer(host: Host, vm: Domain, disk: DiskDevice, doing: str, known: set[str]) -> Layer:
    if disk.mirror:
        raise Conflict(f"cannot {doing} VM {vm.name}: disk {disk.target} is being copied")
    located = disk_find.locate(host, f"{vm.name}:{disk.target}")
    chain = disk_find.chain(host, located, doing)
    if not disk_chain.inside(chain.top.path, storage.folders(host.conn)):
        raise Unsupported(
            f"cannot {doing} VM {vm.name}: its disk {chain.top.path} is in no storage pool",
            hint="make its folder a pool (vmctl disk pool create), or make a copy: vmctl clone --full",
        )
    prefix = resolve.volume_prefix(vm.name, vm.uuid)
    fresh = not vm.active and chain.base is not None and Path(chain.top.path).name.startswith(f"{prefix}-layer")
    fresh = fresh and not any(e.depth == 0 and e.present for e in qemu_img.extents(Path(chain.top.path), "qcow2"))
    under = chain.layers[1:] if fresh else chain.layers
    own = vm.facts.record.owned if vm.facts.record else ()
    volumes = [Owned(*(pools.pool_of_path(host.conn, layer.path) or ("", layer.path))) for layer in under]
    below = _going_with(volumes, own, prefix)
    above = None if fresh else Owned(host.settings.pool, _new_layer(prefix, known))
    if above:
        known.add(above.volume)
    base = File(under[0].path, under[0].format)
    return Layer(disk.target, disk.serial, base, chain.top.virtual_size, above, below)


def _going_with(chain: Sequence[Owned], own: Collection[Owned], prefix: str) -> tuple[Owned, ...]:
    """Those of a VM's chain, from its top down, that go with the last VM that needs them. Pure.

    Its own; and what a snapshot made for a disk of its own, or that was until it was flattened, which no record names.
    """
    made = [one.pool and OURS.search(one.volume) for one in chain]
    ours = [one.volume.startswith(f"{prefix}-") or any(low in own for low in chain[n:]) for n, one in enumerate(chain)]
    return tuple(one for n, one in enumerate(chain) if one in own or (made[n] and ours[n]))


def _new_layer(prefix: str, known: set[str]) -> str:
    return next(name for n in range(1, len(known) + 2) if (name := f"{prefix}-layer{n}.qcow2") not in known)


def path_of(host: Host, volume: Owned) -> str:
    """Where a volume is, or will be."""
    return f"{images.pool_path(host, volume.pool)}/{volume.volume}"


def newcomers(
    host: Host, vm: Domain, names: Sequence[str], targets: Sequence[str], below: Sequence[Owned], *, seeded: bool
) -> tuple[Newcomer, ...]:
    """Who the new VMs are; nothing is made yet. ``below``: volumes that must stay while one of them is there."""
    uuids: dict[str, str] = {}
    for name in names:
        uuids[name] = identity.free_uuid(host, name, uuids.values())
    made: dict[str, Newcomer] = {}

    def work_out(name: str) -> None:
        made[name] = _newcomer(host, vm, name, uuids[name], targets, below, seeded=seeded)

    at_once([lambda name=name: work_out(name) for name in names])  # type: ignore[misc]
    return tuple(made[name] for name in names)


def _newcomer(
    host: Host, vm: Domain, name: str, uuid: str, targets: Sequence[str], below: Sequence[Owned], *, seeded: bool
) -> Newcomer:
    pool, prefix = host.settings.pool, resolve.volume_prefix(name, uuid)
    own = {
        target: Owned(pool, f"{prefix}.qcow2" if not number else f"{prefix}-disk{number}.qcow2")
        for number, target in enumerate(targets)
    }
    seed_volume = Owned(pool, f"{prefix}-seed.iso") if seeded else None
    log = Owned(pool, f"{prefix}-console.log") if vm.facts.serial_log else None
    record = vm.facts.record
    key = seed.new_host_key(name) if record is not None and record.ssh is not None else KeyPair("", "")
    forward, ssh = None, None
    if record is not None and record.ssh is not None:
        if record.ssh.forward_port is not None:
            from vmctl.lifecycle import free_port

            forward = (record.ssh.forward_port, free_port())
        ssh = SshAccess(record.ssh.user, key.public, forward[1] if forward else None)
    owned = [*own.values(), *((seed_volume,) if seed_volume else ()), *((log,) if log else ()), *dict.fromkeys(below)]
    plain = Record(image="", image_digest="", spec_digest="", accel_reason="")
    new = replace(record or plain, owned=tuple(owned), ssh=ssh, console_log=log, creating=True)
    nvram = str(Path(vm.facts.nvram).with_name(f"{prefix}_VARS.fd")) if vm.facts.nvram else ""
    return Newcomer(name, uuid, own, seed_volume, key, new, nvram, forward)


def seed_target(vm: Domain) -> str:
    """The target of the VM's seed; "" when it has none any more."""
    record = vm.facts.record
    names = {one.volume for one in record.owned if one.volume.endswith("-seed.iso")} if record else set()
    return next((d.target for d in vm.facts.disks if d.source.rpartition("/")[2] in names), "")


def define(host: Host, vm: Domain, text: str, new: Sequence[Newcomer], report: Reporter) -> tuple[Newcomer, ...]:
    """Define the new VMs after ``text``, marked as incomplete; their MACs are chosen and taken in one breath."""
    net = host.settings.network
    if any(nic.source == net for nic in vm.facts.nics):
        networks.ensure(host, report)
    made = []
    with held(host.folders.runtime, f"MACs on {host.lock_scope}", timeout_s=_LOCK_TIMEOUT_S):
        taken = set(networks.macs_in_use(host))
        for one in new:
            macs = _macs(host, vm, text, one, taken)
            defined = replace(one, card_macs=macs)
            domain.define(host.conn, xml_of(host, vm, text, defined), name=one.name)
            made.append(defined)
    return tuple(made)


def _macs(host: Host, vm: Domain, text: str, one: Newcomer, taken: set[str]) -> dict[str, str]:
    macs = {}
    known = networks.macs(host.conn.host, host.settings.network)
    away = identity.macs_away(host, known, one.uuid)
    for position, nic in enumerate(vm.facts.nics):
        if nic.source == host.settings.network:
            mac = networks.pick_mac(known, one.uuid, taken, away)
        else:
            mac = resolve.mac_address(one.uuid, position)
        taken.add(mac)
        macs[nic.mac.lower()] = mac
    if (forwarded := domain_copy.user_card(text)) is not None:
        macs[forwarded] = resolve.mac_address(one.uuid, 0)
    return macs


def xml_of(host: Host, vm: Domain, text: str, one: Newcomer, *, own_disks: bool = True) -> str:
    """The XML of a new VM after the XML of its model, which may be that of a saved one."""
    old_seed = seed_target(vm)
    files = {target: File(path_of(host, volume), "qcow2") for target, volume in one.disks.items()} if own_disks else {}
    added = ""
    if one.seed and old_seed:
        files[old_seed] = File(path_of(host, one.seed), "raw")
    elif one.seed:
        added = _seed_disk(host, vm, one.seed)
    new = Identity(
        name=one.name,
        uuid=one.uuid,
        record=render.record_element(one.record),
        macs=one.card_macs or {},
        disks=files,
        gone=frozenset({old_seed} - {""}) if not one.seed else frozenset(),
        log=path_of(host, one.record.console_log) if one.record.console_log else "",
        nvram=one.nvram,
        forward=one.forward,
        seed=added,
    )
    return domain_copy.copied(text, new)


def _seed_disk(host: Host, vm: Domain, volume: Owned) -> str:
    used = {disk.target for disk in vm.facts.disks}
    target = next(name for letter in "bcdefghijklmnopqrstuvwxyz" if (name := f"vd{letter}") not in used)
    view = render.AttachedView("file", "raw", target, "virtio", "seed", path=path_of(host, volume), readonly=True)
    return render.attached_disk(view)


def make_log(host: Host, one: Newcomer, first: str = "") -> None:
    """A console log that begins with ``first``, so that it is a volume."""
    if one.record.console_log is not None:
        pool, name = one.record.console_log
        make_volume(host, pool, VolumeView(name, len(first), "raw"))
        if first:
            storage.upload_bytes(host.conn, pool, name, first.encode())


def make_volume(host: Host, pool: str, view: VolumeView) -> None:
    """A volume in place of one that a killed run left under the same name. The name is held."""
    try:
        storage.create_volume(host.conn, pool, render.volume(view), name=view.name)
    except Conflict:
        storage.delete_volume(host.conn, pool, view.name)
        storage.create_volume(host.conn, pool, render.volume(view), name=view.name)


def make_overlay(host: Host, volume: Owned, base: File, size: int) -> None:
    """An empty disk on a base."""
    view = VolumeView(volume.volume, size, "qcow2", backing=base.path, backing_format=base.format)
    make_volume(host, volume.pool, view)


def make_seed(host: Host, vm: Domain, one: Newcomer, *, size: int = 0) -> None:
    """What the guest is told when it next boots: who it is now. ``size``: at least as long as that."""
    if one.seed is None or one.record.ssh is None:
        return
    user = one.record.ssh.user
    view = render.SeedView(
        instance_id=one.uuid,
        hostname=one.name,
        ssh_keys=seed.authorized_keys(private_key(host), Path.home()),
        host_key_private=one.key.private,
        host_key_public=one.key.public,
        user="" if user == "root" else user,
        machine_id=machine_id(one),
    )
    files = {"user-data": render.user_data(view), "meta-data": render.meta_data(view)}
    record = vm.facts.record
    static = record is not None and record.ssh is not None and record.ssh.address
    if len(vm.facts.nics) > 1 or static:  # a static address stays with the first
        files["network-config"] = render.network_config(
            [render.CardView(mac) for mac in (one.card_macs or {}).values()]
        )
    data = seed.build_iso(files)
    data = data.ljust(size, b"\0")
    make_volume(host, one.seed.pool, VolumeView(one.seed.volume, len(data), "raw"))
    storage.upload_bytes(host.conn, one.seed.pool, one.seed.volume, data)


def machine_id(one: Newcomer) -> str:
    """What the guest writes into /etc/machine-id."""
    return one.uuid.replace("-", "")


def copy_nvram(vm: Domain, new: Sequence[Newcomer]) -> None:
    """Give each its own UEFI variables. They are not there before the first start."""
    if not vm.facts.nvram or not Path(vm.facts.nvram).exists():
        return
    from vmctl.disk_replace import copy_bytes

    for one in new:
        Path(one.nvram).unlink(missing_ok=True)
        copy_bytes(Path(vm.facts.nvram), Path(one.nvram), lambda _share: None)


def complete(host: Host, one: Newcomer) -> None:
    """Mark it as whole: from now on it is not cleared away."""
    domain.set_record(host.conn, one.name, render.metadata(replace(one.record, creating=False)))


def discard(host: Host, one: Newcomer) -> None:
    """Take away what there is of a new VM that did not come to be; nothing of anybody else's."""
    there = domain.find_or_none(host.conn, one.name)
    if there is not None and there.uuid != one.uuid:
        return
    if there is not None and there.active:
        quietly(lambda: domain.power_off(host.conn, one.name))
    for volume in one.own:
        quietly(lambda volume=volume: storage.delete_volume(host.conn, volume.pool, volume.volume))  # type: ignore[misc]
    if there is not None:
        domain.undefine(host.conn, one.name)
