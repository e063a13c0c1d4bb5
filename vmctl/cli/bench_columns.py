"""The columns of the tables of io and net, and the blocks that their rows stand in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmctl.bench import links

if TYPE_CHECKING:
    from vmctl.bench.measured import Line, Measured, Row


@dataclass(frozen=True)
class Column:
    """A column: its head, what it is in words, and a row's cell, "" for none."""

    head: str
    what: str
    cell: Callable[[Row, Mapping[str, Line]], str]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _setting(name: str) -> Callable[[Row, Mapping[str, Line]], str]:
    return lambda row, found: row.setting.get(name, "") or "-"


def _figure(measure: str, per: float) -> Callable[[Row, Mapping[str, Line]], str]:
    def cell(_row: Row, found: Mapping[str, Line]) -> str:
        line = found.get(measure)
        if line is None:
            return ""
        spread = f" ±{100 * line.mad / line.median:.0f}%" if line.samples > 1 else ""
        return f"{_short(line.median / per)}{spread}"

    return cell


def _detail(measure: str, name: str, per: float) -> Callable[[Row, Mapping[str, Line]], str]:
    def cell(_row: Row, found: Mapping[str, Line]) -> str:
        line = found.get(measure)
        return _short(line.details[name] / per) if line and name in line.details else ""

    return cell


def _registers(row: Row, _found: Mapping[str, Line]) -> str:
    return _short(row.counted["reads"] + row.counted["writes"]) if row.counted else ""


_US, _MIB, _MBIT = 1000.0, float(1 << 20), 1e6 / 8
IO = (
    Column("DEVICE", "what the guest sees; host: a process of the host, without a guest", _setting("device")),
    Column("BACKEND", "null: null-co, which answers at once; qcow2+5: five files below its own", _setting("backend")),
    Column("CACHE", "none: past the host's page cache", _setting("cache")),
    Column("AIO", "how QEMU hands I/O to the kernel", _setting("aio")),
    Column("IOTHREAD", "whether the disk has a thread of its own in QEMU", _setting("iothread")),
    Column("READ us", "4 KiB at random places, one at a time: median time", _figure("read-latency", _US)),
    Column("WRITE us", "the same, writing", _figure("write-latency", _US)),
    Column("SYNC us", "a 4 KiB write and fdatasync: mean time until it is safe", _figure("sync-write", _US)),
    Column("READ IOPS", "4 KiB at random places, 32 in flight: reads in a second", _figure("read-iops", 1)),
    Column("CPU us", "CPU time of QEMU (of fio on the host) for one", _detail("read-iops", "host_cpu_ns_per_io", _US)),
    Column("WRITE IOPS", "the same, writing", _figure("write-iops", 1)),
    Column("MiB/s", "256 KiB in order, 8 in flight: read in a second", _figure("read-bandwidth", _MIB)),
    Column("REGISTERS", "accesses to the device's registers for one read, counted under TCG", _registers),
)  # fmt: skip
NET = (
    Column("CARD", "what the guest sees; - where there is no guest", _setting("card")),
    Column("PATH", "tap: to the host's kernel; user: to QEMU's own stack; veth: of a container", _setting("path")),
    Column("VHOST", "whether the host's kernel serves the card's queues, and not QEMU", _setting("vhost")),
    Column("SEND Mbit/s", "one TCP stream out of the guest (the container)", _figure("send", _MBIT)),
    Column("RECEIVE Mbit/s", "one TCP stream into it", _figure("receive", _MBIT)),
    Column("4 STREAMS Mbit/s", "four TCP streams out of it at once, together", _figure("send-parallel", _MBIT)),
    Column("ROUND TRIP us", "64 bytes there and back by TCP, one at a time: median time", _figure("round-trip", _US)),
    Column("CPU us", "QEMU's CPU time for one, client's start in it", _detail("round-trip", "host_cpu_ns_per_io", _US)),
    Column("PACKETS/s", "UDP with 64 bytes: packets that arrive in a second", _figure("small-packets", 1)),
    Column("CPU us/packet", "the same for one of these", _detail("small-packets", "host_cpu_ns_per_io", _US)),
)  # fmt: skip
_USER_MODE = "user mode: the figures are of slirp in QEMU, not of the card; not to be compared with the others"


def blocks(result: Measured) -> list[tuple[str, Sequence[Row]]]:
    """Rows that may be read side by side, under a title."""
    apart = [row for row in result.rows if links.apart(row.setting)]
    rest = [row for row in result.rows if row not in apart]
    return [("", rest), *([(_USER_MODE, apart)] if apart else [])]
