"""What a report, and a terminal, show of results: facts, pictures, and the tables behind them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmctl.bench.chart import Chart


@dataclass(frozen=True, slots=True)
class Table:
    """The figures behind a picture, as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """One kind of measurement, of one result or of several that are seen together."""

    title: str
    facts: tuple[tuple[str, str], ...]
    charts: tuple[Chart, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """One row as a CI system counts it: it has a figure, or was skipped, or failed, with the reason."""

    name: str
    figure: str = ""
    skipped: str = ""
    failed: str = ""


def facts(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What every result tells of itself and of the host."""
    env, shape = values["environment"], values["dimensions"]
    kvm = ", interpreted by the kernel: not a CPU's figures" if shape["interpreted"] else ""
    load = env.get("load") or []
    return (
        ("result", values["id"] + ("" if values["complete"] else " (incomplete)")),
        ("made", values["made"]),
        ("accelerator", f"{shape['accelerator']}{kvm if 'kvm' in shape['accelerator'] else ''}"),
        ("host", f"{env.get('cpus', '?')} CPUs, {shape.get('host_cpu', '')}"),
        (
            "software",
            f"QEMU {env.get('qemu', '?')}, libvirt {env.get('libvirt', '?')}, {env.get('kernel', '')}".rstrip(", "),
        ),
        ("load before", " ".join(f"{one:.2f}" for one in load)),
    )
