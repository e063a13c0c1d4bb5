"""What is sent over a link, by which command, and what the commands say of it. Pure.

iperf3 for streams and floods, sockperf for one request after the other. A second each: iperf3 knows no shorter time.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmctl.bench.links import PING_PORT, TCP_PORT
from vmctl.bench.wire import telling
from vmctl.errors import GuestCommandFailed

PARALLEL = 4
_SMALL, _REQUEST = 64, 64
_PAUSES_S = "0.3 0.3 0.3 0.5 1 2 4 6"  # a server may be long at the end of a client that went without a word
_PERCENTILE = re.compile(r"percentile (\d+\.\d+) =\s+(\d+\.\d+)")
_TOTAL = re.compile(r"\[Total Run\].* SentMessages=(\d+)")


@dataclass(frozen=True, slots=True)
class Figure:
    """What came of it: the figure, how many packets or requests were sent (0: not counted), and what else is told."""

    value: float
    count: int
    details: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Flow:
    """One thing that is sent: what is measured, in which unit, which way is better, and the client's words for it."""

    name: str
    title: str
    unit: str
    better: str
    words: Callable[[str, int], tuple[str, ...]]
    read: Callable[[str], Figure]


def _iperf(*more: str) -> Callable[[str, int], tuple[str, ...]]:
    return lambda to, seconds: ("iperf3", "-J", "-c", to, "-p", str(TCP_PORT), "-t", str(seconds), *more)


def _sockperf(to: str, seconds: int) -> tuple[str, ...]:
    return (
        "sockperf", "pp", "--tcp", "-i", to, "-p", str(PING_PORT), "-t", str(seconds), "-m", str(_REQUEST),
        "--full-rtt",
    )  # fmt: skip


def _json(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text[text.index("{") :])
    if "error" in found:
        raise GuestCommandFailed(f"cannot measure: iperf3: {found['error']}")
    return found


def _stream(text: str) -> Figure:
    end = _json(text)["end"]
    received = end["sum_received"]
    details = {"retransmits": float(end["sum_sent"].get("retransmits", 0))}
    return Figure(received["bits_per_second"] / 8, 0, details)


def _flood(text: str) -> Figure:
    total = _json(text)["end"]["sum"]
    arrived = int(total["packets"]) - int(total["lost_packets"])
    details = {
        "lost_percent": round(float(total["lost_percent"]), 2),
        "sent_per_s": total["packets"] / total["seconds"],
    }
    return Figure(arrived / total["seconds"], int(total["packets"]), details)


def _round_trips(text: str) -> Figure:
    percentiles = {float(match[1]): float(match[2]) * 1000 for match in _PERCENTILE.finditer(text)}
    total = _TOTAL.search(text)
    if total is None:
        raise ValueError("no observations")
    return Figure(percentiles[50.0], int(total[1]), {"median_ns": percentiles[50.0], "p99_ns": percentiles[99.0]})


FLOWS = (
    Flow("send", "one TCP stream to the host", "B/s", "higher", _iperf(), _stream),
    Flow("receive", "one TCP stream from the host", "B/s", "higher", _iperf("-R"), _stream),
    Flow("send-parallel", f"{PARALLEL} TCP streams to the host", "B/s", "higher", _iperf("-P", str(PARALLEL)), _stream),
    Flow(
        "small-packets", f"UDP with {_SMALL} bytes, as fast as it goes: packets that arrive", "1/s", "higher",
        _iperf("-u", "-b", "0", "-l", str(_SMALL)), _flood,
    ),
    Flow(
        "round-trip", f"{_REQUEST} bytes there and back, by TCP, one at a time; median", "ns", "lower", _sockperf,
        _round_trips,
    ),
)  # fmt: skip
BY_NAME = {flow.name: flow for flow in FLOWS}


def script(flow: Flow, to: str, seconds: int, marks: str = "") -> str:
    """A shell script that runs a flow's client, again while the server is not ready, and prints what it says."""
    begin, end = (f"{telling(f'{word} {flow.name}', marks)}; " if marks else "" for word in ("begin", "end"))
    # iperf3 3.12 that is asked for JSON ends with 0 when its server is busy with another one.
    well = f"{shlex.join(flow.words(to, seconds))} > found 2>&1 && ! grep -q '\"error\":' found"
    return (
        f"for pause in {_PAUSES_S}; do {begin}if {well}; then {end}cat found; exit 0; fi; "
        "sleep $pause; done; "
        "cat found >&2; exit 1"
    )


def read(flow: Flow, text: str) -> Figure:
    """What a client said. Raises GuestCommandFailed when it cannot be read, or nothing arrived."""
    try:
        found = flow.read(text)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        tail = text.strip().splitlines()[-5:]
        raise GuestCommandFailed("cannot measure: the client's answer cannot be read", evidence=tail) from error
    if found.value <= 0:
        raise GuestCommandFailed("cannot measure: nothing arrived")
    return found
