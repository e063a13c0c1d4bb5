"""What a change of snapshots has begun: written before its first step, taken away after its last.

It names files that may be left over, never what to do with them: what is left of a killed change is settled by what
libvirt's definitions and the headers of the files say (snapshot_layers.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from uuid import uuid4

from vmctl import durable
from vmctl.hosts import Host


@dataclass(frozen=True, slots=True)
class Entry:
    """One change. ``files``: made or to be given up by it; ``layers``: those of which two may become one.

    ``frozen``: the guest's file systems are held meanwhile. ``keep``: expiry and NVRAM of ``snapshot``, which is being
    taken. ``nvram``: its copy and the file it is put back to, when ``files`` have become the VM's. ``unsure``: a VM may
    have gone on in what is below ``layers``, which libvirt was asked for; ``switched``: it has. ``process``: the mark
    of its QEMU then.
    """

    uri: str
    vm: str
    doing: str
    snapshot: str
    files: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    frozen: bool = False
    expires: str = ""
    keep: str = ""
    nvram: tuple[str, str] | tuple[()] = ()
    unsure: bool = False
    switched: bool = False
    process: str = ""


def _folder(host: Host) -> Path:
    return host.folders.data / "snapshot-journal"


def aside(host: Host, vm: str) -> Path:
    """The file in which a VM's checkpoints are noted while libvirt must not know of them."""
    digest = hashlib.sha256(host.conn.uri.encode()).hexdigest()[:8]
    return _folder(host) / f"{digest}-{vm}.checkpoints"


def _set_aside(host: Host) -> Iterator[str]:
    """The VMs whose checkpoints a killed change has left so."""
    for path in sorted(_folder(host).glob("*.checkpoints")):
        vm = path.name.partition("-")[2].removesuffix(".checkpoints")
        if path == aside(host, vm):
            yield vm


def begin(host: Host, entry: Entry) -> Path:
    """Write an entry, on the disk for good before this returns, and say where it is."""
    path = _folder(host) / f"{uuid4()}.json"
    durable.write(path, asdict(entry))
    return path


def entries(host: Host) -> Iterator[tuple[Path, Entry]]:
    """What is begun on this host and not ended."""
    for path in sorted(_folder(host).glob("*.json")):
        try:
            values = json.loads(path.read_text())
            for name in ("files", "layers", "nvram"):
                values[name] = tuple(values[name])
            entry = Entry(**values)
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if entry.uri == host.conn.uri:
            yield path, entry


def renamed(host: Host, vm: str, new: str) -> None:
    """Let what is left to be merged of a VM, which is getting another name, be that one's."""
    for path, entry in entries(host):
        if entry.vm == vm:
            durable.write(path, asdict(replace(entry, vm=new)))


def unsettled(host: Host, *, but: Collection[str] = ()) -> list[str]:
    """One line for each change that was begun and not ended, ``but`` of these VMs."""
    here = [entry for _, entry in entries(host) if entry.vm not in but]
    found = [f"{entry.doing} of snapshot {entry.vm}.{entry.snapshot}" for entry in here]
    return [*found, *(f"the checkpoints of {vm} are set aside" for vm in _set_aside(host) if vm not in but)]


def vms(host: Host) -> frozenset[str]:
    """The VMs with something to be settled."""
    return frozenset({entry.vm for _, entry in entries(host)} | set(_set_aside(host)))
