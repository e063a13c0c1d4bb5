"""The numerical sheet of an instance, raw, and its lines. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmctl.bench import stats, units
from vmctl.bench.levels_result import rows_json, rows_of
from vmctl.bench.result import Head, RowResult, head_of
from vmctl.bench.table import per_call


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the sheet. ``value`` None: it could not be had, for the reason in ``note``."""

    name: str
    value: float | None
    unit: str
    note: str = ""

    def told(self) -> str:
        """The value for people."""
        if self.value is None:
            return ""
        if self.unit == "B":
            return units.binary(self.value)
        if self.unit in {"", "seconds"}:
            return f"{self.value:.0f} {'s' if self.unit else ''}".rstrip()
        return units.si(self.value, self.unit)


@dataclass(frozen=True, slots=True)
class SheetResult:
    """The sheet of one VM, raw: what it has, and rows whose ticks are nanoseconds."""

    head: Head
    vm: str
    folder: str
    has: Mapping[str, int]
    rows: tuple[RowResult, ...]

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form."""
        told = {"vm": self.vm, "folder": self.folder, "has": dict(self.has), "rows": rows_json(self.rows)}
        return {**self.head.to_json(), **told}


def sheet_of(values: Mapping[str, Any]) -> SheetResult:
    """A sheet as it was kept; the values have been checked against the schema."""
    return SheetResult(head_of(values), values["vm"], values["folder"], values["has"], rows_of(values["rows"]))


def entries(result: SheetResult) -> tuple[Entry, ...]:
    """The sheet. Rates are by the median part; the largest and the mean latency are of single reads."""
    by_name = {row.name: row for row in result.rows}

    def parts(name: str) -> tuple[list[float], str]:
        row = by_name.get(name)
        if row is None or not row.runs:
            return [], row.skipped if row else "it was not measured"
        return [ns for run in row.runs for ns in per_call(run)], ""

    def rate(title: str, name: str, unit: str, note: str) -> Entry:
        found, why = parts(name)
        return Entry(title, 1e9 / stats.median(found) if found else None, unit, why or note)

    def has(title: str, name: str, unit: str, note: str = "") -> Entry:
        value = result.has.get(name)
        return Entry(title, None if value is None else float(value), unit, note)

    latencies, why = parts("disk_latency")
    note = why or f"of {len(latencies)} random reads of 4 KiB, past the page cache"
    return (
        has("cores", "cores", ""),
        has("RAM", "ram_bytes", "B", "of it what the kernel has"),
        has("disk", "disk_bytes", "B", f"the file system of {result.folder}"),
        rate("CPU", "cpu", "FLOP/s", "double precision, SSE2, all cores together"),
        rate("RAM operations", "ram", "/s", "reads that need the one before, in 16 MiB, one core"),
        rate("disk, write", "disk_write", "B/s", "1 MiB at a time, each written out to the disk"),
        rate("disk, read", "disk_read", "B/s", "1 MiB at a time, past the page cache"),
        Entry("average latency", sum(latencies) / len(latencies) * 1e-9 if latencies else None, "s", note),
        Entry("maximal latency", max(latencies) * 1e-9 if latencies else None, "s", note),
        has("uptime", "uptime_s", "seconds"),
    )
