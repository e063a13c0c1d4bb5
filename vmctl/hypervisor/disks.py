"""Disks of a running domain and of its definition: plug, unplug, resize, limit, and the jobs that copy them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf

import libvirt

from vmctl import disk_xml
from vmctl.disk_xml import DiskDevice
from vmctl.errors import HypervisorError, NotFound, VmctlError, WaitTimeout, WrongState
from vmctl.hypervisor import domain
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling, translated
from vmctl.wait import pause, wait_until

_POLL_S = 0.05
_JOB_POLL_S = 0.2
_JOB_TIMEOUT_S = 7 * 86400.0  # a bound, not a guess: what ends it is the job, the guest or Ctrl-C
_GONE = {libvirt.VIR_ERR_DEVICE_MISSING, libvirt.VIR_ERR_INVALID_ARG, libvirt.VIR_ERR_OPERATION_FAILED}


def disks(conn: Connection, name: str, *, inactive: bool) -> tuple[DiskDevice, ...]:
    """The disks of a domain: as it runs, or as it is defined."""
    return disk_xml.read(domain.xml(conn, name, inactive=inactive))


def all_disks(conn: Connection, *, active_only: bool = False) -> tuple[tuple[str, bool, tuple[DiskDevice, ...]], ...]:
    """Name, whether it runs, and disks of every domain; a running one's as it runs, and then those of its next start.

    ``active_only``: of running ones, and only as they run.
    """
    found = []
    with calling("read all VMs"):
        for dom in conn.handle.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE if active_only else 0):
            try:
                here, running = disk_xml.read(dom.XMLDesc()), bool(dom.isActive())
                if running and not active_only and dom.isPersistent():
                    now = {one.source for one in here}
                    later = disk_xml.read(dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
                    here += tuple(one for one in later if one.source not in now)
                found.append((dom.name(), running, here))
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # deleted since the list was made
                    raise
    return tuple(found)


def has_snapshots(conn: Connection, name: str) -> bool:
    """Whether libvirt knows of snapshots of the domain, which name its files."""
    with calling(f"look for snapshots of VM {name}"):
        try:
            return bool(domain.handle(conn, name).snapshotNum())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
                return False
            raise


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Of a disk as its guest sees it (``capacity``) and of its file on the host (``allocation``), in bytes."""

    capacity: int
    allocation: int


def sizes(conn: Connection, name: str, target: str) -> BlockSizes:
    """The sizes of a disk, also of one that vmctl cannot reach itself."""
    with calling(f"ask for the size of disk {target} of VM {name}"):
        capacity, allocation, _physical = domain.handle(conn, name).blockInfo(target)
    return BlockSizes(int(capacity), int(allocation))


def resize(conn: Connection, name: str, target: str, size: int) -> None:
    """Give a disk of a running domain ``size`` bytes; its guest is told."""
    with calling(f"resize disk {target} of VM {name}"):
        domain.handle(conn, name).blockResize(target, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)


def limit(conn: Connection, name: str, target: str, values: Mapping[str, int], *, live: bool) -> None:
    """Set limits by libvirt's names: in the definition, and live where it runs."""
    flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG | (libvirt.VIR_DOMAIN_AFFECT_LIVE if live else 0)
    with calling(f"limit disk {target} of VM {name}"):
        domain.handle(conn, name).setBlockIoTune(target, dict(values), flags)


def add_iothread(conn: Connection, name: str, number: int, *, live: bool) -> None:
    """Give the domain an I/O thread of that number."""
    flags = libvirt.VIR_DOMAIN_AFFECT_LIVE if live else libvirt.VIR_DOMAIN_AFFECT_CONFIG
    with calling(f"add I/O thread {number} to VM {name}"):
        domain.handle(conn, name).addIOThread(number, flags)


def drop_iothread(conn: Connection, name: str, number: int, *, live: bool) -> None:
    """Take an I/O thread back that no disk uses."""
    flags = libvirt.VIR_DOMAIN_AFFECT_LIVE if live else libvirt.VIR_DOMAIN_AFFECT_CONFIG
    with calling(f"take I/O thread {number} from VM {name}"):
        domain.handle(conn, name).delIOThread(number, flags)


def unplug(conn: Connection, name: str, disk: DiskDevice, *, timeout_s: float) -> None:
    """Unplug a disk and wait for the guest to let go of it. Raises WaitTimeout; then the guest still has it.

    The connection must have been opened after start_loop(). libvirt answers when it has asked the guest; that the
    guest has let go is told by an event. The domain's XML is looked at too, for one that came before we listened.
    """
    over, refused = threading.Event(), threading.Event()
    with _heard(conn, name, disk.alias, over, refused):
        with calling(f"detach disk {disk.target} of VM {name}"):
            try:
                domain.handle(conn, name).detachDeviceFlags(disk.xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            except libvirt.libvirtError as error:
                # An unplug asked for before is still pending: QEMU has no second question for the guest.
                if error.get_error_code() not in _GONE or disk.alias == "":
                    raise

        def gone() -> bool:
            if refused.is_set():
                raise WrongState(
                    f"cannot detach disk {disk.target} of VM {name}: its guest refused to let go of it",
                    hint="unmount it in the guest first",
                )
            return over.is_set() or disk.target not in {one.target for one in disks(conn, name, inactive=False)}

        try:
            wait_until(gone, what="", timeout_s=timeout_s, interval_s=_POLL_S)
        except WaitTimeout as error:
            raise WaitTimeout(
                f"cannot detach disk {disk.target} of VM {name}: its guest has not let go of it",
                after_s=error.after_s,
                hint="is its system up, and does it use the disk? the same command again goes on waiting",
            ) from error


@contextmanager
def _heard(conn: Connection, name: str, alias: str, over: threading.Event, refused: threading.Event) -> Iterator[None]:
    register, ids = conn.handle.domainEventRegisterAny, []
    handle = domain.handle(conn, name)

    def setting(event: threading.Event) -> Callable[..., None]:
        return lambda _conn, _dom, device, _opaque: event.set() if device == alias else None

    with calling(f"watch VM {name}"):
        for kind, event in (
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, over),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, refused),
        ):
            ids.append(register(handle, kind, setting(event), None))
    try:
        yield
    finally:
        for one in ids:
            with suppress(libvirt.libvirtError):
                conn.handle.domainEventDeregisterAny(one)


@dataclass(frozen=True, slots=True)
class Job:
    """A block job: bytes done of its present total."""

    done: int
    total: int


def job(conn: Connection, name: str, target: str) -> Job | None:
    """The job on a disk; None when there is none, as on one that the guest has let go of just now."""
    with calling(f"ask for the job on disk {target} of VM {name}"):
        try:
            info = domain.handle(conn, name).blockJobInfo(target, 0)
        except libvirt.libvirtError as error:
            gone = error.get_error_code() == libvirt.VIR_ERR_INVALID_ARG
            if not gone or target in {one.target for one in disks(conn, name, inactive=False)}:
                raise
            return None
    return Job(int(info["cur"]), int(info["end"])) if info else None


def require_no_job(conn: Connection, name: str, found: Iterable[DiskDevice], doing: str) -> None:
    """Raise WrongState where a job works on one of a running domain's disks, or libvirt has the mark of a lost one."""
    for disk in found:
        if disk.source and (disk.mirror or job(conn, name, disk.target) is not None):
            raise WrongState(
                f"cannot {doing}: a job works on disk {disk.target} of VM {name}",
                hint=f"wait for its end, or end it: virsh blockjob {name} {disk.target} --abort",
            )


_MIRRORED = (libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY, libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT)


def _known_job(conn: Connection, name: str, target: str) -> bool:
    """Whether libvirt knows where the job on a disk leads. It may not after it was killed while one was switched over.

    libvirt 9.0 dies itself (a null pointer in qemuBlockJobUpdate) when it is asked to end such a job.
    """
    info = domain.handle(conn, name).blockJobInfo(target, 0) or {}
    return info.get("type") not in _MIRRORED or bool(find(conn, name, target, inactive=False).mirror)


def abort_job(conn: Connection, name: str, target: str) -> None:
    """End the job on a disk, the disk as it was; none is no error."""
    with suppress(libvirt.libvirtError, VmctlError):
        if _known_job(conn, name, target):
            domain.handle(conn, name).blockJobAbort(target, 0)


def copy_and_switch(
    conn: Connection,
    name: str,
    target: str,
    destination: str,
    moved: Callable[[Job], None],
    switching: Callable[[], None],
    *,
    shallow: bool,
    bandwidth: int = 0,
) -> None:
    """Copy a disk of a running domain to ``destination`` (the XML of a <disk>) and let the domain go on there.

    Undone, but for the new file, when anything ends it before the switch. ``switching`` is called right before that.
    ``shallow``: its backing file stays. ``bandwidth`` in bytes a second, 0 for all there is.
    """
    parameters = {libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: bandwidth} if bandwidth else {}
    flags = libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB | libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
    flags |= libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW if shallow else 0
    doing = f"copy disk {target} of VM {name}"
    dom = domain.handle(conn, name)
    with calling(doing):
        dom.blockCopy(target, destination, parameters, flags)
    try:
        _until(conn, name, target, doing, moved, ready=True)
        switching()
        with calling(doing):
            dom.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    except BaseException:
        abort_job(conn, name, target)
        raise


def pull(conn: Connection, name: str, target: str, base: str, moved: Callable[[Job], None]) -> None:
    """Bring all data between a running domain's disk and ``base`` ("": all there is) into the disk's own file.

    Ended in its middle it leaves a disk of the same content on the same backing chain.
    """
    doing = f"flatten disk {target} of VM {name}"
    dom, before = domain.handle(conn, name), find(conn, name, target, inactive=False)
    pulling = _Pulling(dom, target, moved, _flushing(dom, before, doing))
    with calling(doing):
        if base:
            dom.blockRebase(target, base, _SLOWEST_B_S, libvirt.VIR_DOMAIN_BLOCK_REBASE_BANDWIDTH_BYTES)
        else:
            dom.blockPull(target, _SLOWEST_B_S, libvirt.VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES)
    try:
        _until(conn, name, target, doing, pulling.seen, ready=False, sleep=pulling.sleep)
    except BaseException:
        abort_job(conn, name, target)
        raise
    with suppress(VmctlError):
        pulling.flush()  # before anything else
    if find(conn, name, target, inactive=False).backing == before.backing != ():  # a job that failed is over, too
        raise _failed(doing)
    pulling.flush()


_AHEAD_S = 0.2  # twice as long as QEMU lets pass before it counts anew what a job has done
_SLOWEST_B_S = 4 << 20  # a tenth of a second of it is less than QEMU pulls in one go
_NEAR_S, _NEAR_POLL_S = 1.0, 0.005


class _Pulling:
    """A pull that is watched, so that little is at stake at its end.

    At its end QEMU (7.2) names the lower base in the file, or none, and may know in its memory alone where in the file
    is what it pulled: killed before a flush, it takes with it what had been on the disk for years, and the disk must be
    put back on its old base (pull_settle.py). That shall seldom be needed. So it is told to flush while it pulls, and
    looked at ever more often, and slowed down, so that its end is noticed at once, and comes right after a flush. Of
    256 MiB, pulled in 0.3 s, a kill in that moment lost all, and a flush came 35 to 206 ms after it; it is 0.6 s now,
    11 to 28 ms, and at most 1 MiB in 19 of 20 tries, 51 in one on a busy machine.
    """

    def __init__(self, dom: libvirt.virDomain, target: str, moved: Callable[[Job], None], flush: Callable[[], None]):
        self.flush = flush
        self._dom, self._target, self._moved = dom, target, moved
        self._speed, self._interval, self._flush_at = _SLOWEST_B_S, _NEAR_POLL_S, 0.0
        self._at, self._done, self._rate = time.monotonic(), 0, inf  # nobody knows yet how fast it is

    def seen(self, job: Job) -> None:
        """How far it is: flush, and set how fast it may go on."""
        self._moved(job)
        now, left = time.monotonic(), job.total - job.done
        if now - self._at >= _JOB_POLL_S:
            self._rate = (job.done - self._done) / (now - self._at)
            self._at, self._done = now, job.done
        near = left <= self._rate * _NEAR_S
        self._interval = _NEAR_POLL_S if near else _JOB_POLL_S
        if near or now >= self._flush_at:
            with suppress(VmctlError):  # said at the end, if it is so then
                self.flush()
            took = time.monotonic() - now
            self._flush_at = now + max(_NEAR_S, 10 * took)  # else it might do little else
        # At most half of what is left till the next look, be that late.
        speed = max(_SLOWEST_B_S, int(left / max(2 * self._interval, _AHEAD_S)))
        if not self._speed / 2 < speed < self._speed * 2 or speed == _SLOWEST_B_S != self._speed:
            with suppress(libvirt.libvirtError):  # it has just ended
                self._dom.blockJobSetSpeed(self._target, speed, libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES)
                self._speed = speed

    def sleep(self, _seconds: float) -> None:
        """Until the next look."""
        pause(self._interval)


def flush(conn: Connection, name: str, target: str, doing: str) -> None:
    """Have QEMU write down where the data of a running domain's disk lie."""
    _flushing(domain.handle(conn, name), find(conn, name, target, inactive=False), doing)()


def end_pull(conn: Connection, name: str, target: str, doing: str) -> None:
    """End the pull into a running domain's disk, if there is one; what it has brought stays. Not any other job."""

    def pulls() -> bool:
        with calling(doing):
            info = domain.handle(conn, name).blockJobInfo(target, 0) or {}
        return bool(info.get("type") == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL)

    if pulls():
        abort_job(conn, name, target)
        if pulls():
            raise WrongState(f"cannot {doing}: its job does not end", hint=f"virsh blockjob {name} {target}")


def _flushing(dom: libvirt.virDomain, disk: DiskDevice, doing: str) -> Callable[[], None]:
    """A call that has QEMU write down where the data of a disk lie."""
    import libvirt_qemu

    with calling(doing):
        blocks = json.loads(libvirt_qemu.qemuMonitorCommand(dom, '{"execute": "query-block"}', 0))["return"]
    # By the device, not by what it is of: that may be no file.
    here = [one for one in blocks if disk.alias and disk.alias in one.get("qdev", "").split("/")]
    nodes = [one["inserted"]["node-name"] for one in here]

    def flush() -> None:
        said = [f"it has no {disk.target} open"]
        if nodes:
            hmp = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
            with calling(doing):
                said = [libvirt_qemu.qemuMonitorCommand(dom, f"qemu-io {node} flush", hmp).strip() for node in nodes]
        if any(said):
            hint = "vmctl doctor --fix has it flush again"
            raise VmctlError(f"cannot {doing}: QEMU did not flush it: {'; '.join(filter(None, said))}", hint=hint)

    return flush


_COMMITS = (libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT, libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT)


def commit(
    conn: Connection,
    name: str,
    target: str,
    base: str,
    top: str,
    moved: Callable[[Job], None],
    switching: Callable[[], None],
) -> None:
    """Bring what ``top``, a file of a running domain's disk, holds into ``base``, the one below it, and go on without.

    ``switching`` is called right before a domain that writes to ``top`` goes on in ``base``.
    Ended in its middle it leaves a disk of the same content on the same backing chain; ``base`` alone may have changed.
    """
    doing = f"commit {top} of VM {name}"
    dom = domain.handle(conn, name)
    active = find(conn, name, target, inactive=False).source == top
    try:
        with calling(doing):
            if (dom.blockJobInfo(target, 0) or {}).get("type") in _COMMITS:  # one that a killed vmctl left
                if not _known_job(conn, name, target):
                    raise HypervisorError(
                        f"cannot {doing}: another job works on it",
                        code=libvirt.VIR_ERR_BLOCK_COPY_ACTIVE,
                        domain=libvirt.VIR_FROM_QEMU,
                    )
                dom.blockJobAbort(target, 0)
            dom.blockCommit(target, base, top, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if active else 0)
    except HypervisorError as error:
        if error.code == libvirt.VIR_ERR_BLOCK_COPY_ACTIVE:
            # libvirt 9.0 that is killed while it switches a commit over drops the job when it is back, not its mark.
            error.hint = f"libvirt has lost sight of a job that was cut off: stop and start {name}, then it can be done"
        raise
    try:
        _until(conn, name, target, doing, moved, ready=active)
        if active:
            switching()
            with calling(doing):
                dom.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    except BaseException:
        abort_job(conn, name, target)
        raise
    left = find(conn, name, target, inactive=False)
    if top in {left.source, *left.backing}:  # a job that failed is over, too
        raise _failed(doing)


def _failed(doing: str) -> HypervisorError:
    return HypervisorError(
        f"cannot {doing}: the job failed",
        code=libvirt.VIR_ERR_OPERATION_FAILED,
        domain=libvirt.VIR_FROM_QEMU,
        hint="is there room for it? libvirt's log says more",
    )


def _until(
    conn: Connection,
    name: str,
    target: str,
    doing: str,
    moved: Callable[[Job], None],
    *,
    ready: bool,
    sleep: Callable[[float], None] = pause,
) -> None:
    """Wait for a job to be ready to be switched over, or to end. Raises WrongState when the domain stops meanwhile."""
    dom = domain.handle(conn, name)

    def probe() -> bool:
        try:
            info = dom.blockJobInfo(target, 0)
            text = dom.XMLDesc() if ready else ""
        except libvirt.libvirtError as error:
            raise translated(error, doing) from error
        if not info:
            if ready:
                raise _failed(doing)
            return True
        moved(Job(int(info["cur"]), int(info["end"])))
        return ready and info["cur"] == info["end"] and _ready(text, target)

    wait_until(probe, what=f"cannot {doing}", timeout_s=_JOB_TIMEOUT_S, interval_s=_JOB_POLL_S, sleep=sleep)


def _ready(text: str, target: str) -> bool:
    import xml.etree.ElementTree as ET

    for disk in ET.fromstring(text).iterfind("devices/disk"):
        found, mirror = disk.find("target"), disk.find("mirror")
        if found is not None and found.get("dev") == target and mirror is not None:
            return mirror.get("ready") == "yes"
    return False


def find(conn: Connection, name: str, wanted: str, *, inactive: bool) -> DiskDevice:
    """The disk of a domain that ``wanted`` (target, serial or source) names. Raises NotFound."""
    here = disks(conn, name, inactive=inactive)
    for disk in here:
        if disk.named(wanted):
            return disk
    known = ", ".join(f"{d.target} ({d.serial})" if d.serial else d.target for d in here)
    raise NotFound(f"cannot find disk {wanted} of VM {name}: it has {known or 'none'}", hint=f"vmctl disk list {name}")
