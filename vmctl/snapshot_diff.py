"""What changed between a snapshot and now, or between two: the definition, and how much of each disk."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from vmctl import disk_chain, disk_xml, qemu_img, snapshot_plan, snapshot_xml, snapshots
from vmctl.disk_chain import Chain
from vmctl.disk_find import folders
from vmctl.errors import SpecError, Unsupported
from vmctl.hosts import Host
from vmctl.hypervisor import disks, domain
from vmctl.snapshot_plan import Ref

_QUIET = re.compile(r"^\s*<(?:backingStore\b|/backingStore>|alias ).*$")


@dataclass(frozen=True, slots=True)
class DiskChange:
    """A disk of both. ``changed`` is how many bytes were written since they parted; None where that cannot be told."""

    target: str
    before: str
    after: str
    changed: int | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """``config`` is a unified diff of the definitions, line by line; disks in only one of both are in it alone."""

    before: str
    after: str
    config: tuple[str, ...]
    disks: tuple[DiskChange, ...]


@dataclass(frozen=True, slots=True)
class _Side:
    label: str
    text: str
    files: dict[str, tuple[str, str]]


def _side(host: Host, ref: Ref) -> _Side:
    if not ref.snapshot:
        vm = domain.find(host.conn, ref.vm)
        devices = disks.disks(host.conn, vm.name, inactive=not vm.active)
        text = domain.xml(host.conn, vm.name, inactive=True)
        return _Side(f"{ref} now", text, {one.target: (one.source, one.format) for one in devices if not one.readonly})
    _ref, one = snapshots.named(host, str(ref))
    text = snapshot_xml.definition(one)
    files = {disk.target: (disk.file, disk.format) for disk in one.disks if disk.kind != "no"}
    return _Side(str(ref), text, files)


def diff(host: Host, text: str, other: str = "") -> Difference:
    """The difference of a snapshot and ``other``, a snapshot or a VM; "": its own VM as it is now."""
    ref = snapshots.named(host, text)[0]
    second = snapshots.refer(host, other) if other else Ref(ref.vm, "")
    if second.vm != ref.vm:
        raise SpecError(f"cannot compare {text} with {other}: they are of two VMs")
    before, after = _side(host, ref), _side(host, second)
    lines = difflib.unified_diff(_lines(before.text), _lines(after.text), before.label, after.label, lineterm="", n=1)
    changes = tuple(
        _change(host, target, before.files[target], after.files[target])
        for target in sorted(before.files.keys() & after.files.keys())
    )
    return Difference(before.label, after.label, tuple(lines), changes)


def _lines(text: str) -> list[str]:
    """A definition without what is no part of it: aliases and chains, which libvirt writes of a running VM."""
    for disk in disk_xml.read(text):
        if disk.source.startswith("/"):
            text = disk_xml.with_source(text, disk.target, disk.source, disk.format)
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not _QUIET.match(line)]
    # Inside a snapshot's XML it stands further to the right.
    margin = " " * max(0, len(lines[1]) - len(lines[1].lstrip()) - 2) if len(lines) > 1 else ""
    lines = [line.removeprefix(margin) for line in lines]
    # vmctl's own part of it stands where it was put, until libvirt writes it anew.
    return [f"      {line.lstrip()}" if line.lstrip().startswith(("<vmctl:", "</vmctl:")) else line for line in lines]


def _change(host: Host, target: str, before: tuple[str, str], after: tuple[str, str]) -> DiskChange:
    try:
        if not host.conn.local:
            raise Unsupported("it is on another machine")
        doing = f"compare disk {target}"
        old, new = (disk_chain.read(*one, folders(host), doing=doing) for one in (before, after))
    except Unsupported as error:
        return DiskChange(target, before[0], after[0], None, error.message)
    if before[0] == after[0]:
        internal = before[1] == "qcow2" and qemu_img.info(Path(before[0]), before[1], in_use=True).snapshots
        why = "both are in one file, which does not tell them apart" if internal else ""
        return DiskChange(target, before[0], after[0], None if internal else 0, why)
    shared = _shared(old, new)
    ranges = [piece for chain in (old, new) for piece in _written(chain, shared)]
    return DiskChange(target, before[0], after[0], snapshot_plan.union(ranges))


def _shared(old: Chain, new: Chain) -> str:
    """The uppermost file that both are based on; "" for none."""
    below = {os.path.realpath(layer.path) for layer in new.layers}
    return next((path for layer in old.layers if (path := os.path.realpath(layer.path)) in below), "")


def _written(chain: Chain, shared: str) -> list[tuple[int, int]]:
    depths = [os.path.realpath(layer.path) for layer in chain.layers]
    depth = depths.index(shared) if shared else len(depths)
    if not depth:
        return []
    pieces = qemu_img.extents(Path(chain.top.path), chain.top.format)
    return [
        (one.start, one.start + one.length)
        for one in pieces
        if one.depth < depth and (one.data or one.zero) and one.present
    ]
