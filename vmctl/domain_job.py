"""A call that libvirt works on as a job of the domain: told of while it lasts, and cancelled when it is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmctl import hosts
from vmctl.errors import (
    HostUnreachable,
    HypervisorError,
    NotFound,
    Unsupported,
    VmctlError,
    WrongState,
    quietly,
)
from vmctl.events import Progress, Reporter
from vmctl.hosts import Host
from vmctl.hypervisor import domain
from vmctl.hypervisor.domain import Domain
from vmctl.nbd import Broken
from vmctl.wait import Worker, wait_until

_CANCEL_TIMEOUT_S = 30.0
_BACK_S = 30.0
_ENDING_S = 1.0


def blocking(host: Host, name: str, work: Callable[[], None], report: Reporter, doing: str) -> None:
    """Do ``work``, a blocking call on the domain ``name``. An interrupt cancels it, and the VM runs on."""
    failure: list[VmctlError] = []

    def run() -> None:
        try:
            work()
        except VmctlError as error:
            failure.append(error)

    worker = Worker(run, doing)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(0.1)
            _report(host, name, report, doing)
    except BaseException:
        quietly(lambda: domain.abort_job(host.conn.apart(), name))
        worker.join(_CANCEL_TIMEOUT_S)
        raise
    if failure:
        raise failure[0]


def _report(host: Host, name: str, report: Reporter, doing: str) -> None:
    try:
        progress = domain.job_progress(host.conn.apart(), name)
    except VmctlError:
        return  # the job, and the process with it, has just ended
    if progress is not None and progress.total:
        report(Progress(doing, progress.done, progress.total))


@contextmanager
def telling_end(host: Host, vm: Domain, doing: str, hint: str) -> Iterator[None]:
    """A block that works on a VM; where that ran and has ended, so says the error, and not what libvirt said of it.

    libvirt has many words for it: of a monitor that is gone, of an inactive domain, of what that does not support.
    """
    try:
        yield
    except (HypervisorError, WrongState, NotFound, Unsupported, Broken) as error:
        # libvirt may hear of its end a moment later than who speaks with its QEMU.
        late = _ENDING_S if isinstance(error, (HypervisorError, Broken)) else 0.0
        if not vm.active or not _ended(host, vm, late):
            raise
        now = domain.find_or_none(host.conn, vm.name)
        state = f"it is {now.state}" if now else "it is gone"
        raise WrongState(f"cannot {doing}: VM {vm.name} ended meanwhile; {state}", hint=hint) from error


def _ended(host: Host, vm: Domain, within_s: float) -> bool:
    """Whether a VM is not the one that ran before, or will not be in a moment; not where libvirt cannot say."""

    def gone() -> bool:
        now = domain.find_or_none(host.conn, vm.name)
        return now is None or now.id != vm.id

    try:
        wait_until(gone, what="", timeout_s=within_s, interval_s=0.05)
    except VmctlError:  # it stays; or libvirt is gone itself, and what failed tells more than that
        return False
    return True


@contextmanager
def running_on(host: Host, name: str) -> Iterator[None]:
    """A block in which libvirt holds a running domain; where it fails, the domain runs on all the same.

    A libvirtd that dies between holding it and noting why finds a domain that somebody paused when it is back, and
    leaves it so. It is waited for, for it is begun again by what watches over it.
    """
    try:
        yield
    except BaseException:
        quietly(lambda: _resume(host, name))
        raise


def _resume(host: Host, name: str) -> None:
    def back() -> Host | None:
        try:
            return hosts.another(host)
        except HostUnreachable:
            return None

    with wait_until(back, what="libvirt", timeout_s=_BACK_S) as own:
        domain.resume(own.conn, name)  # refused for one that runs; not asked, for it waits for who still settles it
