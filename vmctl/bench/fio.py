"""The jobs that fio does, as fio is told of them, and what it says of each. Pure.

The same in the guest and on the host. Latency of one call at a time is that of a system call, as a program has it
(psync); many in flight need libaio. Offsets are random and differ from sample to sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmctl.bench.wire import telling
from vmctl.errors import GuestCommandFailed

BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Job:
    """One job: what is measured, in which unit, which way is better, and fio's words for it."""

    name: str
    title: str
    unit: str
    better: str
    words: tuple[str, ...]


_QD1 = ("ioengine=psync", "iodepth=1", f"bs={BLOCK}")
_QD32 = ("ioengine=libaio", "iodepth=32", f"bs={BLOCK}")
# Reads come first: what a later job writes to the top of a backing chain would not be read from below any more.
JOBS = (
    Job("read-latency", "4 KiB, random, one at a time; median", "ns", "lower", (*_QD1, "rw=randread")),
    Job("read-iops", "4 KiB, random, 32 in flight", "1/s", "higher", (*_QD32, "rw=randread")),
    Job(
        "read-bandwidth", "256 KiB, in order, 8 in flight", "B/s", "higher",
        ("ioengine=libaio", "iodepth=8", "bs=262144", "rw=read"),
    ),
    Job("write-latency", "4 KiB, random, one at a time; median", "ns", "lower", (*_QD1, "rw=randwrite")),
    Job("write-iops", "4 KiB, random, 32 in flight", "1/s", "higher", (*_QD32, "rw=randwrite")),
    Job(
        "sync-write", "4 KiB, random, and fdatasync: until it is safe; mean", "ns", "lower",
        (*_QD1, "rw=randwrite", "fdatasync=1"),
    ),
)  # fmt: skip
BY_NAME = {job.name: job for job in JOBS}
_MARKED = (("pre", "begin"), ("post", "end"))


def job_file(path: str, *, length_ms: int, seed: int, direct: bool, marks: str = "") -> str:
    """What fio is told: every job on that disk or file, one after the other.

    Each tells at ``marks`` when it begins and when it has ended.
    """
    lines = [*_common(path, seed, direct=direct), "time_based", f"runtime={length_ms}ms"]
    for job in JOBS:
        lines += [f"[{job.name}]", *job.words]
        if marks:
            lines += [f"exec_{when}run={telling(f'{word} {job.name}', marks)}" for when, word in _MARKED]
    return "\n".join(lines) + "\n"


def counted_file(path: str, ios: int) -> str:
    """What fio is told to do exactly so many reads, one at a time."""
    return "\n".join(
        [*_common(path, 1, direct=True), f"number_ios={ios}", "[counted]", *BY_NAME["read-latency"].words, ""]
    )


def _common(path: str, seed: int, *, direct: bool) -> list[str]:
    return [
        "[global]", f"filename={path}", f"direct={int(direct)}", "thread", "stonewall", f"randseed={seed}",
        "allrandrepeat=0", "norandommap", "clocksource=clock_gettime", "percentile_list=50:99",
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Figure:
    """What came of a job: its figure in the job's unit, and what else fio tells of it."""

    value: float
    ios: int
    details: Mapping[str, float]


def read(text: str) -> dict[str, Figure]:
    """What fio's JSON says, by job. Raises GuestCommandFailed when it says that a job failed, or nothing readable."""
    try:
        found = json.loads(text[text.index("{") :])
        failed = [f"{one['jobname']}: error {one['error']}" for one in found["jobs"] if one["error"]]
        if failed:
            raise GuestCommandFailed("cannot measure: fio failed", evidence=failed)
        return {one["jobname"]: _figure(BY_NAME[one["jobname"]], one) for one in found["jobs"]}
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise GuestCommandFailed(
            "cannot measure: fio's answer cannot be read", evidence=text.splitlines()[-5:]
        ) from error


def _figure(job: Job, said: Mapping[str, Any]) -> Figure:
    one = max((said["read"], said["write"]), key=lambda side: int(side["total_ios"]))
    ios, seconds = int(one["total_ios"]), int(one["runtime"]) / 1000
    latency = one["clat_ns"]
    percentiles = latency.get("percentile", {})
    median = float(percentiles.get("50.000000", latency["mean"]))
    if job.unit == "1/s":
        value = ios / seconds
    elif job.unit == "B/s":
        value = int(one["io_bytes"]) / seconds
    elif "fdatasync=1" in job.words:
        value = 1e9 * seconds / ios
    else:
        value = median
    details = {
        "iops": ios / seconds,
        "median_ns": median,
        "p99_ns": float(percentiles.get("99.000000", latency["max"])),
        "process_cpu_ns_per_io": (said["usr_cpu"] + said["sys_cpu"]) / 100 * seconds * 1e9 / ios,
    }
    return Figure(value, ios, {name: round(number, 1) for name, number in details.items()})
