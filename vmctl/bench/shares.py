"""Fair shares: busy vCPUs with weights compete for one CPU of the host; what each gets, against what was promised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vmctl import bare_guest, render
from vmctl.bench import guests
from vmctl.bench.levels_result import Share, Shares
from vmctl.errors import VmctlError
from vmctl.hosts import Host, pool_folder
from vmctl.hypervisor import competing
from vmctl.render import ProbeView

WEIGHTS = (1, 2, 4)
_UNIT = 256  # of libvirt's <shares> for a weight of 1; the kernel takes 2 at least
_CPU = "0"
_WARM_S = 1.5
_BUSY = "tries=none spin=1"  # the guest forbids interrupts and loops for ever: it wants all it can get


def measure(
    host: Host, machine: ProbeView, window_s: float, tell: Callable[[float], None], weights: Sequence[int] = WEIGHTS
) -> Shares:
    """Guests of those weights, each with one busy vCPU, all on one CPU of the host. What hinders it is the result."""
    pool = host.settings.pool
    try:
        with bare_guest.uploaded(
            host.conn,
            pool,
            lambda: render.pool(pool, pool_folder(host, pool)),
            "vmctl-bench-shares",
            guests.compiled("popek"),
        ) as kernel:
            busy = replace(machine, kernel=kernel, words=_BUSY, vcpus=1, cpuset=_CPU)
            texts = [
                render.probe(replace(busy, name=guests.own_name("vmctl-bench-shares"), weight=_UNIT * weight))
                for weight in weights
            ]
            length, used = competing.cpu_times(host.conn, texts, warm_s=_WARM_S, window_s=window_s, tell=tell)
    except VmctlError as error:
        return Shares(skipped=error.message)
    return Shares(length, tuple(Share(weight, round(s, 3)) for weight, s in zip(weights, used, strict=True)))
