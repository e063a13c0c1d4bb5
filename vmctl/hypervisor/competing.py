"""Domains that compete for a CPU, and what each of them gets of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import libvirt

from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.wait import pause

_STEP_S = 0.5


def cpu_times(
    conn: Connection, texts: Sequence[str], *, warm_s: float, window_s: float, tell: Callable[[float], None]
) -> tuple[float, tuple[float, ...]]:
    """Start a transient domain of each definition, let them run, and end them.

    Returns the length of the window that was measured, after ``warm_s``, and the CPU seconds each had in it. ``tell``
    hears how much of the window is over. Raises what libvirt says when one cannot be started, or no weights be given.
    """
    flags = libvirt.VIR_DOMAIN_START_AUTODESTROY | libvirt.VIR_DOMAIN_START_VALIDATE
    with calling("run guests that compete"), ExitStack() as undo:
        domains = []
        for text in texts:
            domains.append(conn.handle.createXML(text, flags))
            undo.callback(partial(_end, domains[-1]))
        domains[0].schedulerParameters()  # without cgroups libvirt starts them, and forgets their weights
        pause(warm_s)
        began, before = time.monotonic(), [_used_s(dom) for dom in domains]
        while (spent := time.monotonic() - began) < window_s:
            tell(spent)
            pause(min(_STEP_S, window_s - spent))
        after = [_used_s(dom) for dom in domains]
        return time.monotonic() - began, tuple(b - a for a, b in zip(before, after, strict=True))


def _end(dom: Any) -> None:
    with suppress(libvirt.libvirtError):
        dom.destroy()


def _used_s(dom: Any) -> float:
    return float(dom.info()[4] / 1e9)
