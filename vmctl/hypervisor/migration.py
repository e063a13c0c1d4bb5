"""libvirt's migration of one domain: the blocking call, what it says meanwhile, and what can be done to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import libvirt

from vmctl.errors import VmctlError, WaitTimeout
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.domain import Domain, handle
from vmctl.hypervisor.errors import calling
from vmctl.hypervisor.waiting import Patient
from vmctl.migrate_policy import Sample
from vmctl.wait import pause

_MIB = 1 << 20
_THROTTLE_STEP = 20  # per cent; by 10, as QEMU would, a guest over a slow link takes two minutes to be slow enough
_LET_GO_S, _AGAIN_S = 60.0, 0.5
_SOON_OVER = frozenset({libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_RPC})


# QEMU 7.2 sends the last of the memory with its main lock held: over a link that is cut it hears nobody until TCP gives
# up, a quarter of an hour later, and libvirt waits for it.
_PATIENT = Patient(2.0)


class Way(StrEnum):
    """Who speaks with whom: the source's libvirt with the target's, or vmctl with both. Tunnelled: data too."""

    PEER = "peer-to-peer"
    DIRECT = "direct"
    TUNNELLED = "tunnelled"


class Copying(StrEnum):
    """Which storage goes along: none, whole disks, or what lies above their base images."""

    NONE = "none"
    FULL = "full"
    OVERLAY = "overlay"


@dataclass(frozen=True, slots=True)
class Orders:
    """One migration as it is given to libvirt. ``peer``: the target's URI there; bandwidth in bytes a second."""

    way: Way
    peer: str
    data_address: str
    live: bool
    persist: bool
    undefine: bool
    unsafe: bool
    copying: Copying = Copying.NONE
    disks: tuple[str, ...] = ()
    auto_converge: bool = True
    postcopy: bool = False
    compress: bool = False
    parallel: int = 0
    tls: bool = False
    bandwidth: int = 0

    @property
    def throttles(self) -> bool:
        """Whether QEMU may slow the VM down."""
        return self.auto_converge and self.live


def flags(orders: Orders) -> int:
    """The flags for libvirt."""
    chosen: Mapping[int, bool] = {
        libvirt.VIR_MIGRATE_LIVE: orders.live,
        libvirt.VIR_MIGRATE_ABORT_ON_ERROR: True,
        libvirt.VIR_MIGRATE_PEER2PEER: orders.way is not Way.DIRECT,
        libvirt.VIR_MIGRATE_TUNNELLED: orders.way is Way.TUNNELLED,
        libvirt.VIR_MIGRATE_PERSIST_DEST: orders.persist,
        libvirt.VIR_MIGRATE_UNDEFINE_SOURCE: orders.undefine,
        libvirt.VIR_MIGRATE_UNSAFE: orders.unsafe,
        libvirt.VIR_MIGRATE_NON_SHARED_DISK: orders.copying is Copying.FULL,
        libvirt.VIR_MIGRATE_NON_SHARED_INC: orders.copying is Copying.OVERLAY,
        libvirt.VIR_MIGRATE_AUTO_CONVERGE: orders.throttles,
        libvirt.VIR_MIGRATE_POSTCOPY: orders.postcopy,
        libvirt.VIR_MIGRATE_COMPRESSED: orders.compress,
        libvirt.VIR_MIGRATE_PARALLEL: orders.parallel > 0,
        libvirt.VIR_MIGRATE_TLS: orders.tls,
    }
    return sum(flag for flag, on in chosen.items() if on)


def parameters(orders: Orders) -> dict[str, Any]:
    """The typed parameters for libvirt."""
    found: dict[str, Any] = {}
    if orders.data_address and orders.way is not Way.TUNNELLED:
        address = f"[{orders.data_address}]" if ":" in orders.data_address else orders.data_address
        found[libvirt.VIR_MIGRATE_PARAM_URI] = f"tcp://{address}"
    if orders.bandwidth:
        found[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = max(1, orders.bandwidth // _MIB)
    if orders.parallel:
        found[libvirt.VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS] = orders.parallel
    if orders.throttles:
        found[libvirt.VIR_MIGRATE_PARAM_AUTO_CONVERGE_INCREMENT] = _THROTTLE_STEP
    if orders.disks:
        # Without a list libvirt copies every writable disk, also those that both hosts see.
        found[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] = list(orders.disks)
    return found


def migrate(source: Connection, target: Connection, name: str, orders: Orders) -> None:
    """Migrate; returns when it is over. Of what became of the VM, both hosts say more than an error does."""
    with calling(f"migrate VM {name}"):
        _send(handle(source, name), target, orders, flags(orders))


def _send(dom: Any, target: Connection, orders: Orders, wanted: int) -> None:
    if orders.way is Way.DIRECT:
        dom.migrate3(target.handle, parameters(orders), wanted)
    else:
        dom.migrateToURI3(orders.peer, parameters(orders), wanted)


def resume_postcopy(source: Connection, target: Connection, name: str, orders: Orders) -> None:
    """Go on with a post-copy whose connection broke. libvirt refuses it until what is left of the first is aborted."""
    with calling(f"resume the post-copy of VM {name}"):
        dom = handle(source, name)
        with suppress(libvirt.libvirtError):
            dom.abortJobFlags(libvirt.VIR_DOMAIN_ABORT_JOB_POSTCOPY)
        wanted = flags(orders) | libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_POSTCOPY
        wanted |= libvirt.VIR_MIGRATE_POSTCOPY_RESUME
        deadline = time.monotonic() + _LET_GO_S
        while True:
            try:
                _send(dom, target, orders, wanted)
                return
            except libvirt.libvirtError as error:
                # The first one's thread waits for its own connection to be given up; and the way, just mended, may not
                # carry a new one yet.
                if error.get_error_code() not in _SOON_OVER or time.monotonic() > deadline:
                    raise
            pause(_AGAIN_S)


def _job_stats(conn: Connection, name: str) -> dict[str, Any]:
    def call() -> dict[str, Any]:
        with calling(f"ask for the migration of VM {name}"):
            return dict(handle(conn, name).jobStats())

    return _PATIENT.answer(("stats", conn, name), call, f"migration of VM {name}")


def sample(source: Connection, name: str, at_s: float) -> Sample | None:
    """How far it is; None where no migration is under way, or it has not begun to send."""
    stats = _job_stats(source, name)
    if stats.get("type") not in {libvirt.VIR_DOMAIN_JOB_BOUNDED, libvirt.VIR_DOMAIN_JOB_UNBOUNDED}:
        return None
    if stats.get("operation") not in {None, libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT}:
        return None
    return _sample(stats, at_s)


def _sample(stats: Mapping[str, Any], at_s: float) -> Sample:
    def number(key: str) -> int:
        return int(stats.get(key, 0))

    return Sample(
        at_s=at_s,
        done=number("data_processed"),
        total=number("data_total"),
        remaining=number("data_remaining"),
        memory_remaining=number("memory_remaining"),
        dirty_rate=number("memory_dirty_rate") * (number("memory_page_size") or 4096),
        throughput=number("memory_bps") + number("disk_bps"),
        passes=number("memory_iteration"),
        expected_downtime_ms=number("downtime"),
        throttle_percent=number("auto_converge_throttle"),
    )


@dataclass(frozen=True, slots=True)
class Totals:
    """What a finished migration took: ms, bytes, passes over the memory."""

    time_ms: int
    downtime_ms: int
    data: int
    passes: int


def totals(target: Connection, name: str) -> Totals | None:
    """Of the last migration of a domain that came here; None where libvirt does not know."""
    try:
        flags = libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED | libvirt.VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED
        stats = handle(target, name).jobStats(flags)
    except libvirt.libvirtError:
        return None
    if not stats.get("type"):
        return None
    return Totals(
        int(stats.get("time_elapsed", 0)),
        int(stats.get("downtime", 0)),
        int(stats.get("data_processed", 0)),
        int(stats.get("memory_iteration", 0)),
    )


def abort(source: Connection, name: str) -> None:
    """Cancel it: the VM runs on where it was. None under way is no error, nor is a VM that has moved just now.

    Nor one whose QEMU does not hear it, nor a connection that is lost: where the VM is must be asked all the same.
    """

    def call() -> None:
        with suppress(libvirt.libvirtError, VmctlError):
            handle(source, name).abortJob()

    with suppress(WaitTimeout):
        _PATIENT.answer(("abort", source, name), call, f"cancel the migration of VM {name}")


def pause_postcopy(source: Connection, name: str) -> None:
    """Give up the connection of a post-copy, so that another one can be made. None of that is an error either."""

    def call() -> None:
        with suppress(libvirt.libvirtError, VmctlError):
            handle(source, name).abortJobFlags(libvirt.VIR_DOMAIN_ABORT_JOB_POSTCOPY)

    with suppress(WaitTimeout):
        _PATIENT.answer(("pause", source, name), call, f"pause the post-copy of VM {name}")


def start_postcopy(source: Connection, name: str) -> None:
    """Let the target run the VM now, and fetch from the source what is missing."""
    with calling(f"begin post-copy of VM {name}"):
        handle(source, name).migrateStartPostCopy(0)


def set_downtime(source: Connection, name: str, milliseconds: int) -> None:
    """How long the VM may stand still at the end."""
    with calling(f"set the downtime of the migration of VM {name}"):
        handle(source, name).migrateSetMaxDowntime(milliseconds, 0)


def raise_downtime(source: Connection, name: str, milliseconds: int) -> None:
    """The same, unless it may be longer already: somebody has said so meanwhile."""
    with calling(f"set the downtime of the migration of VM {name}"):
        dom = handle(source, name)
        if dom.migrateGetMaxDowntime(0) < milliseconds:
            dom.migrateSetMaxDowntime(milliseconds, 0)


def set_bandwidth(source: Connection, name: str, bytes_per_s: int) -> None:
    """At most that much, from now on."""
    with calling(f"limit the migration of VM {name}"):
        handle(source, name).migrateSetMaxSpeed(max(1, bytes_per_s // _MIB), 0)


_WAS_ENDED = frozenset({libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN, libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED})


def was_ended(vm: Domain) -> bool:
    """Whether it is off as one that had run: its guest shut down, or somebody turned it off. Not known after long."""
    with calling(f"look at VM {vm.name}"):
        state, reason = vm.handle.state()
    return state == libvirt.VIR_DOMAIN_SHUTOFF and reason in _WAS_ENDED


def busy(conn: Connection, name: str) -> bool:
    """Whether some job of the domain is under way."""

    def call() -> bool:
        with calling(f"ask for the job of VM {name}"):
            return bool(handle(conn, name).jobInfo()[0])

    return _PATIENT.answer(("job", conn, name), call, f"job of VM {name}")


def leaving(conn: Connection, name: str) -> bool:
    """Whether a migration of a domain that is there is under way from there to another host."""
    stats = _job_stats(conn, name)
    under_way = stats.get("type") != libvirt.VIR_DOMAIN_JOB_NONE
    return bool(under_way and stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)


class Standing(NamedTuple):
    """What libvirt knows of a VM beside its XML. ``cpu``: the <cpu> a target must offer a running one, "" for none."""

    snapshots: bool
    checkpoints: tuple[str, ...]
    busy: bool
    cpu: str


def standing(vm: Domain) -> Standing:
    """Ask, by the connection that the VM was found by."""
    import xml.etree.ElementTree as ET

    dom, cpu = vm.handle, None
    with calling(f"look at VM {vm.name}"):
        snapshots, checkpoints = _told(dom.snapshotNum) or 0, _told(dom.listAllCheckpoints) or ()
        if vm.active:
            cpu = ET.fromstring(dom.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)).find("cpu")
        return Standing(
            snapshots=bool(snapshots),
            checkpoints=tuple(str(one.getName()) for one in checkpoints),
            busy=vm.active and bool(dom.jobInfo()[0]),
            cpu="" if cpu is None else ET.tostring(cpu, encoding="unicode"),
        )


def _told(ask: Callable[[], Any]) -> Any:
    """The answer; None of a driver that has no such thing."""
    try:
        return ask()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
            return None
        raise


def offers_cpu(conn: Connection, cpu: str, *, arch: str, machine: str, kind: str) -> bool | None:
    """Whether a host can give a guest that processor; None where it cannot tell."""
    try:
        result = conn.handle.compareHypervisorCPU(None, arch, machine, kind, cpu, 0)
    except libvirt.libvirtError:
        return None
    return bool(result in {libvirt.VIR_CPU_COMPARE_IDENTICAL, libvirt.VIR_CPU_COMPARE_SUPERSET})


def free_huge_pages(conn: Connection, size_kib: int) -> int:
    """Free pages of that size on all nodes; 0 where there are none of it."""
    try:
        found = conn.handle.getFreePages([size_kib], 0, 64)
    except libvirt.libvirtError:
        try:
            found = conn.handle.getFreePages([size_kib], 0, 1)
        except libvirt.libvirtError:
            return 0
    return sum(int(pages) for node in found.values() for pages in node.values())
