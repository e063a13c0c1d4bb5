"""An interrupt that comes while libvirt is at a call that fails."""

from __future__ import annotations

import signal

import libvirt
import pytest

from vmctl.errors import NotFound
from vmctl.hypervisor import connection, domain


def test_it_is_an_interrupt_still() -> None:
    armed = False

    def interrupt(_number: int, _frame: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGVTALRM, interrupt)
    interrupted = 0
    try:
        with connection.connect("test:///default") as conn:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.002, 0.002)
            while interrupted < 100:
                try:
                    armed = True
                    while True:
                        conn.handle.networkLookupByName("nope")
                except KeyboardInterrupt:
                    armed = False
                    interrupted += 1
                except libvirt.libvirtError:
                    armed = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            with pytest.raises(NotFound):
                domain.find(conn, "nope")
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
