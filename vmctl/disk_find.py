"""From a disk as a user names it to where it is, and what it is attached to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from vmctl import disk_chain, disk_guard, disk_journal, domain_job, forgotten, layer_check, snapshot_settle
from vmctl.choices import DiskFormat
from vmctl.disk_chain import Chain
from vmctl.disk_spec import Ref, parse_ref
from vmctl.disk_xml import DiskDevice
from vmctl.errors import Conflict, NotFound, SpecError, Unsupported, WrongState
from vmctl.events import Reporter
from vmctl.hosts import Host, holding
from vmctl.hypervisor import disks, domain, pools, storage
from vmctl.hypervisor.domain import Domain, State


@dataclass(frozen=True, slots=True)
class Located:
    """A disk that is there. ``path`` "" for one on a network; ``pool`` and ``volume`` "" outside of all pools.

    ``vm`` and ``disk``: what it is attached to, None for none.
    """

    ref: str
    path: str
    format: str
    pool: str = ""
    volume: str = ""
    vm: Domain | None = None
    disk: DiskDevice | None = None

    @property
    def live(self) -> bool:
        """Whether a running VM has it now."""
        return self.vm is not None and self.vm.active

    @property
    def owner(self) -> str:
        """The VM it is attached to, "" for none."""
        return self.vm.name if self.vm else ""

    @property
    def target(self) -> str:
        """The name its VM has it by. Only of attached disks."""
        return self.disk.target if self.disk else ""


def locate(host: Host, text: str, *, anything: bool = False) -> Located:
    """The disk that ``text`` names. Raises NotFound, SpecError; the latter not for a format that is no disk's with
    ``anything``.
    """
    ref = parse_ref(text, host.settings.pool)
    if ref.vm:
        vm = domain.find(host.conn, ref.vm)
        try:
            disk = disks.find(host.conn, vm.name, ref.disk, inactive=not vm.active)
        except NotFound:
            if not vm.active or not vm.persistent:
                raise
            disk = disks.find(host.conn, vm.name, ref.disk, inactive=True)  # waits for the next start, or was let go
        return _attached(host, vm, disk, text)
    return _by_file(host, ref, text, anything=anything)


def _attached(host: Host, vm: Domain, disk: DiskDevice, text: str) -> Located:
    path = disk.source
    pool, slash, volume = path.partition("/")
    if slash and pool and "/" not in volume and "://" not in path:
        return Located(text, storage.volume(host.conn, pool, volume).path, disk.format, pool, volume, vm, disk)
    if not path.startswith("/"):
        return Located(text, "", disk.format, vm=vm, disk=disk)
    found = pools.pool_of_path(host.conn, path) or ("", "")
    return Located(text, path, disk.format, *found, vm=vm, disk=disk)


def _by_file(host: Host, ref: Ref, text: str, *, anything: bool) -> Located:
    if ref.path:
        pool, volume = pools.pool_of_path(host.conn, ref.path) or ("", "")
        path, form = ref.path, ""
    else:
        storage.refresh(host.conn, ref.pool)
        known = storage.volume_names(host.conn, ref.pool)
        short = [f"{ref.volume}.{form}" for form in DiskFormat if f"{ref.volume}.{form}" in known]
        volume = short[0] if ref.volume not in known and len(short) == 1 else ref.volume
        pool, path, form = ref.pool, "", ""
        if volume not in known:
            raise NotFound(
                f"cannot find disk {text}: pool {pool} has no volume {volume}", hint=_meant(host, text, pool)
            )
    if volume:
        facts = storage.volume(host.conn, pool, volume)
        path, form = facts.path, facts.format
    elif host.conn.local and not Path(path).exists():
        raise NotFound(f"cannot find disk {text}: there is no such file")
    elif host.conn.local and Path(path).is_dir():
        raise SpecError(f"cannot use {text} as a disk: it is a folder")
    users = [(vm, disk) for vm, disk in _attached_to(host, path, f"{pool}/{volume}") if not disk.readonly]
    if len({vm for vm, _ in users}) == 1:
        vm, disk = users[0]
        return Located(text, path, disk.format, pool, volume, domain.find(host.conn, vm), disk)
    if users:
        raise Conflict(f"cannot work on disk {text}: {' and '.join(sorted({vm for vm, _ in users}))} have it")
    if not form:
        form = "raw" if path.endswith((".raw", ".img")) else "qcow2"
    if not anything and form not in {"qcow2", "raw"}:
        raise SpecError(f"cannot work on disk {text}: it is {form}, not qcow2 or raw")
    return Located(text, path, form, pool, volume)


def _meant(host: Host, text: str, pool: str) -> str:
    vm = domain.find_or_none(host.conn, text)
    if vm is None:  # of what no VM has, the list shows one pool
        where = "" if pool == host.settings.pool else f" --pool {pool}"
        return f"vmctl disk list{where} shows all disks"
    found = disks.disks(host.conn, vm.name, inactive=not vm.active)
    return f"the disks of VM {vm.name}: {', '.join(f'{vm.name}:{disk.target}' for disk in found)}"


def _attached_to(host: Host, path: str, volume: str) -> list[tuple[str, DiskDevice]]:
    wanted = disk_guard.key(path, local=host.conn.local)

    def same(disk: DiskDevice) -> bool:
        return disk.source == volume or disk_guard.key(disk.source, local=host.conn.local) == wanted

    everything = disks.all_disks(host.conn)
    return [(vm, disk) for vm, _, devices in everything for disk in devices if disk.source and same(disk)]


def waits(host: Host, disk: Located) -> bool:
    """Whether its VM runs without it, and gets it at its next start."""
    if disk.vm is None or disk.disk is None or not disk.vm.active:
        return False
    now = {one.target: one.source for one in disks.disks(host.conn, disk.owner, inactive=False)}
    return now.get(disk.target) != disk.disk.source


@contextmanager
def working_on(host: Host, text: str, report: Reporter, *, timeout_s: float = 30.0) -> Iterator[Located]:
    """The disk, and nobody else's to change within the block; what a killed change left of it is settled first."""
    first = locate(host, text)
    lock = holding(host, first.owner, timeout_s=timeout_s) if first.vm else disk_guard.unclaimed(host, first.path)
    with lock:
        disk_journal.settle(host, first.owner, report)
        snapshot_settle.settle(host, first.owner, report)
        # Looked at again: who had the lock before may have moved it. Of a VM's disk only the target stays the same.
        now = locate(host, f"{first.owner}:{first.target}" if first.vm else text)
        if now.owner != first.owner:
            raise Conflict(f"cannot work on disk {text}: VM {now.owner} has just got it")
        if waits(host, now):
            raise WrongState(
                f"cannot work on disk {text}: running VM {now.owner} gets it at its next start only",
                hint=f"vmctl stop {now.owner}; or detach it, and attach it again afterwards",
            )
        if now.vm is not None:
            layer_check.require_known(host, now.vm, f"work on disk {text}")
            hint = f"see what it has now: vmctl disk show {text}"
            with domain_job.telling_end(host, now.vm, f"work on disk {text}", hint):
                yield replace(now, ref=text)
        else:
            yield replace(now, ref=text)


def folders(host: Host) -> Callable[[], tuple[str, ...]]:
    """What asks for the folders in which a chain may lie."""
    return lambda: storage.folders(host.conn)


def chain(host: Host, disk: Located, doing: str) -> Chain:
    """The files of a disk. Raises Unsupported for one that is not on this machine."""
    require_file(host, disk, doing)
    return disk_chain.read(disk.path, disk.format, folders(host), doing=f"{doing} {disk.ref}")


def require_file(host: Host, disk: Located, doing: str) -> None:
    """Raise Unsupported unless vmctl itself can reach the disk as a file."""
    if not host.conn.local:
        raise Unsupported(f"cannot {doing} {disk.ref}: it is on another machine", hint="run vmctl there")
    if not disk.path or not Path(disk.path).is_file():
        raise Unsupported(f"cannot {doing} {disk.ref}: it is no file, but {disk.path or 'on a network'}")


def require_idle(host: Host, disk: Located, doing: str) -> None:
    """Raise WrongState while a VM runs with the disk or has saved memory, Conflict while another reads it."""
    if disk.vm is not None and (disk.vm.active or disk.vm.state is State.SAVED):
        hint = f"vmctl stop {disk.owner}" if disk.vm.active else f"vmctl start {disk.owner}, then stop it"
        raise WrongState(f"cannot {doing} {disk.ref}: VM {disk.owner} is {disk.vm.state}", hint=hint)
    if disk.vm is not None:
        forgotten.require_none(host, disk.owner, disk.vm.uuid, f"{doing} {disk.ref}")
    mine = [disk_guard.Use(disk.owner, disk_guard.key(disk.path, local=host.conn.local), disk.ref, writes=True)]
    if found := disk_guard.conflicts(mine, disk_guard.running_uses(host)):
        raise Conflict(f"cannot {doing} {disk.ref}: {'; '.join(found)}")


def require_alone(host: Host, disk: Located, doing: str) -> None:
    """Raise Conflict when snapshots, overlays or other VMs know the file by its name or place."""
    if disk.vm is not None and disks.has_snapshots(host.conn, disk.owner):
        raise Conflict(
            f"cannot {doing} {disk.ref}: VM {disk.owner} has snapshots, which name its files",
            hint="delete the snapshots first",
        )
    require_no_overlays(host, disk, doing)


def require_not_elsewhere(host: Host, disk: Located, doing: str, report: Reporter) -> None:
    """Raise Conflict while a VM of another host needs the file, on storage that both see; warn of hosts not asked."""
    if host.others:
        from vmctl import elsewhere  # late: most know one host

        elsewhere.require_unused(host, f"disk {disk.ref}", [disk.path], doing, report)


def require_no_overlays(host: Host, disk: Located, doing: str) -> None:
    """Raise Conflict when other disks are based on the file: changed, all they hold would be wrong."""
    from vmctl import image_users  # late: it reads every pool

    if others := image_users.needed(host).by(disk.path, but=(disk.owner, disk.path)):
        raise Conflict(f"cannot {doing} {disk.ref}: {', '.join(others)} needs it as it is")
