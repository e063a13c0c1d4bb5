"""A call that libvirt works on as a job of the domain: told of while it lasts, and cancelled when it is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmctl.errors import VmctlError, quietly
from vmctl.events import Progress, Reporter
from vmctl.hosts import Host
from vmctl.hypervisor import domain

_CANCEL_TIMEOUT_S = 30.0


def blocking(host: Host, name: str, work: Callable[[], None], report: Reporter, doing: str) -> None:
    """Do ``work``, a blocking call on the domain ``name``. An interrupt cancels it, and the VM runs on."""
    failure: list[VmctlError] = []

    def run() -> None:
        try:
            work()
        except VmctlError as error:
            failure.append(error)

    worker = threading.Thread(target=run, name=doing, daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(0.1)
            _report(host, name, report, doing)
    except BaseException:
        quietly(lambda: domain.abort_job(host.conn, name))
        worker.join(_CANCEL_TIMEOUT_S)
        raise
    if failure:
        raise failure[0]


def _report(host: Host, name: str, report: Reporter, doing: str) -> None:
    try:
        progress = domain.job_progress(host.conn, name)
    except VmctlError:
        return  # the job, and the process with it, has just ended
    if progress is not None and progress.total:
        report(Progress(doing, progress.done, progress.total))
