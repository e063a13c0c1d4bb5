"""What measuring in guests of image bench begins with: the host to oneself, the image, a folder; what QEMU spends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from vmctl import __version__, images
from vmctl.accel import Verdict
from vmctl.bench import environment, guests, machine, store
from vmctl.bench.machine import Board, Clock
from vmctl.bench.result import Head
from vmctl.choices import Accel, AccelChoice
from vmctl.errors import NotFound, Unsupported, VmctlError, reason
from vmctl.events import Reporter, Warned
from vmctl.hosts import Host, decide_accel
from vmctl.workspace import MEASURING, workspace

IMAGE = "bench"


class Ground(NamedTuple):
    """What to begin with: a guest's board, the head of the result, and the folder where results are kept."""

    board: Board
    head: Head
    place: Path


@contextmanager
def prepared(
    host: Host, workload: str, choice: AccelChoice, folder: Path | None, more: dict[str, Any], report: Reporter
) -> Iterator[Ground]:
    """The host to oneself, and a guest's board with an empty folder that is gone afterwards.

    ``more`` are the workload's own dimensions.
    Raises Unsupported where no kernel can be started, NotFound without image or folder, Conflict when not alone.
    """
    if not (host.conn.qemu and host.conn.local):
        raise Unsupported(
            f"cannot measure at {host.conn.uri}: QEMU is started and watched by vmctl itself, on its own machine",
            hint="run vmctl there",
        )
    decision = decide_accel(host, choice)
    if decision.chosen is Accel.KVM and decision.kvm.verdict is Verdict.INTERPRETED:
        raise Unsupported(
            "cannot measure with KVM: this kernel's KVM interprets its guests, and no kernel boots in one",
            hint="--accel tcg",
        )
    image = images.find(host, IMAGE)
    if decision.chosen is Accel.TCG and decision.requested is not AccelChoice.TCG:
        report(Warned(f"measuring with TCG: {decision.reason}", "vmctl host info"))
    parent = folder or _usual_folder(host)
    if not parent.is_dir():
        raise NotFound(f"cannot measure in {parent}: there is no such folder", hint="--folder names another place")
    try:
        with guests.alone(host), workspace(parent, MEASURING) as place:
            board = Board(
                host.facts.emulator,
                decision.chosen,
                image.kernel,
                image.initrd,
                image.manifest.cmdline,
                image.disk,
                place,
            )
            env = environment.capture(host, decision)
            env["image"] = image.manifest.stem
            dimensions = {
                "accelerator": str(decision.chosen),
                "interpreted": False,
                "arch": host.facts.arch,
                "vcpus": machine.VCPUS,
                "host_cpu": env.get("cpu") or env["cpu_model"],
                **more,
            }
            kept, made = store.folder(host.folders.data), datetime.now(UTC).isoformat(timespec="seconds")
            name = store.new_id(kept, workload, made)
            yield Ground(board, Head(name, workload, made, __version__, False, dimensions, env), kept)
    except OSError as error:
        raise VmctlError(
            f"cannot measure in {parent}: {reason(error, path=True)}", hint="--folder names another place"
        ) from error


def _usual_folder(host: Host) -> Path:
    """Where VMs have their disks, if we may write there."""
    pool = Path(images.pool_path(host, host.settings.pool))
    if pool.is_dir() and os.access(pool, os.W_OK | os.X_OK):
        return pool
    host.folders.cache.mkdir(parents=True, exist_ok=True)
    return host.folders.cache


def storage_of(folder: Path) -> dict[str, str]:
    """What the files are on: /proc/self/mountinfo's last mount that is above the folder."""
    best = ["", "", ""]
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4]
        if (folder == Path(point) or Path(point) in folder.parents) and len(point) >= len(best[0]):
            best = [point, *right.split()[:2]]
    return {"filesystem": best[1], "source": best[2]}


class Window:
    """What QEMU used between a job's first word and its last."""

    def __init__(self, look: Callable[[], Clock]) -> None:
        self._look = look
        self._begun: dict[str, Clock] = {}
        self.spent: dict[str, Clock] = {}

    def hear(self, line: str) -> None:
        """Take a word of the guest's: "begin JOB" or "end JOB"."""
        word, _, job = line.partition(" ")
        now = self._look()
        if word == "begin":
            self._begun[job] = now
        elif job in self._begun:
            was = self._begun[job]
            self.spent[job] = Clock(now.wall - was.wall, now.cpu - was.cpu, max(0, now.waited - was.waited))

    def host_side(self, job: str, ios: int) -> dict[str, float]:
        """What QEMU used of the host for one of so many, and how much of the time its threads waited for a CPU."""
        spent = self.spent.get(job)
        if spent is None or not spent.wall or not ios:
            return {}
        waited = min(100.0, 100 * spent.waited / spent.wall)
        return {"host_cpu_ns_per_io": round(spent.cpu / ios, 1), "waited_percent": round(waited, 1)}
