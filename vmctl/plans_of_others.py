"""What other vmctl processes of this user are at: hosts that they empty, and moves they planned and have not made yet.

Each tells it in a file beside its locks, which counts for as long as the process lives that holds it: the kernel lets
go of it, however that one dies. libvirt has nothing to tell it by before QEMU is started where a VM is to go.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from vmctl import locks
from vmctl.census import Census, VmSeen
from vmctl.errors import PreflightFailed, VmctlError, reason
from vmctl.rebalance import Move

_WAIT_S = 60.0  # for another one that looks at all hosts, and plans
_END = ".plan"


class Coming(NamedTuple):
    """A VM that somebody moves, as it was when that was planned; ``begun``: it is on its way."""

    vm: VmSeen
    target: str
    begun: bool = False


class Others(NamedTuple):
    """The hosts that others empty, and their moves."""

    emptied: frozenset[str] = frozenset()
    moves: tuple[Coming, ...] = ()


def counted(census: Census, others: Others, emptied: Iterable[str] = ()) -> Census:
    """A census in which nothing is placed on hosts that others empty, and what they move is where it goes. Pure.

    What they move is left to them, and counts on both sides until it is gone. A move to a host of ``emptied``, which we
    empty, and that is not begun will not be: who planned it looks before it begins.
    """
    hosts = tuple(one._replace(draining=one.draining or one.name in others.emptied) for one in census.hosts)
    names = {one.name for one in hosts if not one.problem}
    seen = {(vm.name, vm.host) for vm in census.vms}
    leaving, arriving = {}, {}
    for vm, target, begun in others.moves:
        if target in emptied and not begun:
            continue
        leaving[vm.name, vm.host] = f"another vmctl moves it to {target}"
        if target in names and (vm.name, target) not in seen:
            pinned = f"it is on its way there from {vm.host}"
            arriving[vm.name, target] = vm._replace(host=target, resident_mib=0, pinned=pinned, barred=())
    vms = (vm._replace(pinned=leaving.get((vm.name, vm.host)) or vm.pinned) for vm in census.vms)
    return census._replace(hosts=hosts, vms=(*vms, *arriving.values()))


class Told:
    """What this process tells the others. Use as a context manager; ``emptied`` are the hosts that it empties."""

    def __init__(self, folder: Path, emptied: Iterable[str] = ()) -> None:
        self._folder = folder
        self._emptied = sorted(emptied)
        self._path, self._handle = folder, -1

    def __enter__(self) -> Told:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            while True:
                self._path = self._folder / f"{secrets.token_hex(8)}{_END}"
                self._handle = os.open(
                    self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
                )
                fcntl.flock(self._handle, fcntl.LOCK_EX)
                if os.fstat(self._handle).st_nlink:
                    break
                os.close(self._handle)  # one that looked between the two took it for a dead one's
        except OSError as error:
            raise VmctlError(
                f"cannot write {self._path}: {reason(error)}", hint="is XDG_RUNTIME_DIR yours and writable?"
            ) from error
        self._say(emptied=self._emptied)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._handle)

    def _say(self, **what: object) -> None:
        os.write(self._handle, json.dumps(what).encode() + b"\n")  # whole, for those who read meanwhile

    @contextmanager
    def planning(self) -> Iterator[Others]:
        """A block in which nobody else plans, with what they have planned: look, decide and tell in it.

        Raises Conflict when another one is at it for longer than a look at all hosts takes.
        """
        with locks.held(self._folder, "a plan of moves", timeout_s=_WAIT_S):
            yield others(self._folder, but=self._path)

    def plans(self, census: Census, moves: Iterable[Move], freed: Iterable[str] = ()) -> None:
        """Tell the moves to come, which take the place of those told before, and hosts that are empty then."""
        vms = {(vm.name, vm.host): vm for vm in census.vms}
        said = [_plain(vms[move.vm, move.source], move.target) for move in moves]
        self._say(emptied=sorted({*self._emptied, *freed}), moves=said)

    @contextmanager
    def making(self, move: Move) -> Iterator[None]:
        """A block in which a move is made. Raises PreflightFailed where another one has begun to empty its target."""
        self._say(begun=[move.vm, move.source])
        try:
            # Told first and then looked: of two who meet like this one sees the other, at least.
            if move.target in others(self._folder, but=self._path).emptied:
                raise PreflightFailed(
                    f"cannot migrate VM {move.vm} from {move.source} to {move.target}: nothing was changed",
                    problems=[(f"another vmctl is emptying {move.target}", "")],
                )
            yield
        finally:
            self._say(over=[move.vm, move.source])


def others(folder: Path, *, but: Path | None = None) -> Others:
    """What processes that live have told; what dead ones left is taken away."""
    emptied: set[str] = set()
    moves: list[Coming] = []
    for path in sorted(folder.glob(f"*{_END}")):
        if path != but and (text := _read(path)) is not None:
            theirs, coming = _understood(text)
            emptied |= theirs
            moves += coming
    return Others(frozenset(emptied), tuple(moves))


def _read(path: Path) -> str | None:
    """What a file says; None for that of a dead one."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None  # gone since
    with os.fdopen(handle, encoding="utf-8") as file:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            return None
        return file.read()


def _understood(text: str) -> tuple[set[str], list[Coming]]:
    emptied: set[str] = set()
    moves: dict[tuple[str, str], Coming] = {}
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # being written just now
        said = json.loads(line)
        emptied = set(said.get("emptied", emptied))
        if "moves" in said:
            moves = {(vm.name, vm.host): Coming(vm, target) for vm, target in map(_vm, said["moves"])}
        if (begun := tuple(said.get("begun", ()))) in moves:
            moves[begun] = moves[begun]._replace(begun=True)
        moves.pop(tuple(said.get("over", ())), None)
    return emptied, list(moves.values())


_COUNTS = ("name", "host", "vcpus", "memory_mib", "load", "running", "apart")


def _plain(vm: VmSeen, target: str) -> tuple[dict[str, object], str]:
    """What of a VM counts where it goes."""
    return {key: getattr(vm, key) for key in _COUNTS}, target


def _vm(said: tuple[dict[str, Any], str]) -> tuple[VmSeen, str]:
    return VmSeen(**said[0]), said[1]
