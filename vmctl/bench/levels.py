"""Measures the same work on each level of virtualization that this machine has, each against a plain process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from vmctl import __version__, bare_guest, images, render
from vmctl.accel import Decision, Verdict
from vmctl.bench import environment, guests, places, shares, store
from vmctl.bench.levels_result import BY_NAME, NATIVE, Level, LevelsResult
from vmctl.bench.levels_words import Said
from vmctl.bench.places import Heard, Order
from vmctl.bench.result import Head
from vmctl.choices import AccelChoice
from vmctl.errors import NotFound, SpecError, Unsupported, VmctlError
from vmctl.events import Progress, Reporter, Step
from vmctl.hosts import Host, decide_accel, pool_folder
from vmctl.hypervisor import storage
from vmctl.images import Image
from vmctl.render import ProbeView
from vmctl.spec import Accel

METHOD = 1
_NAME = "vmctl-bench-levels"
_IMAGE = "micro"  # whose kernel the guests boot
_SILENT_S = 60.0
_INTERPRETED_S = 20.0  # a KVM that interprets its guests does not come to a kernel's first line, however long one waits
_NESTED_S = 400.0  # an emulated QEMU is at it for minutes before its guest says a word
LEVELS = {
    NATIVE: "process of this machine",
    "container": "container of libvirt's LXC driver",
    "qemu-user": "process of qemu-user's",
    "tcg": "guest, emulated (TCG)",
    "kvm": "guest on KVM",
    "nested": "guest within a guest",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure where, and how thoroughly. Rounds are processes, fresh for each look at all rows."""

    order: Order
    levels: tuple[str, ...]
    window_s: float


def plan(levels: Sequence[str], rows: Sequence[str], *, quick: bool) -> Plan:
    """What to do for what was asked; the native level is always measured: all others are told against it."""
    unknown = [f"no level is called {name}" for name in levels if name not in LEVELS and name != "shares"]
    unknown += [f"no row is called {name}" for name in rows if name not in BY_NAME]
    if unknown:
        hint = f"levels: {', '.join(LEVELS)}, shares; rows: {', '.join(BY_NAME)}"
        raise SpecError("cannot measure levels", problems=unknown, hint=hint)
    chosen = tuple(name for name in BY_NAME if not rows or name in rows)
    order = Order(3, 5, 2000, chosen) if quick else Order(5, 20, 5000, chosen)
    wanted = tuple(name for name in LEVELS if not levels or name in levels or name == NATIVE)
    return Plan(order, wanted, (3.0 if quick else 10.0) if not levels or "shares" in levels else 0.0)


def run(host: Host, wanted: Plan, report: Reporter) -> LevelsResult:
    """Measure, and keep the result after each level.

    Raises Unsupported where the host is not this machine, whose processes are the measure of all; Conflict while
    another measures there.
    """
    if not (host.conn.qemu and host.conn.local):
        raise Unsupported(
            f"cannot measure levels at {host.conn.uri}: a process there cannot be started from here",
            hint="run it on that host",
        )
    places.program()
    decision = decide_accel(host, AccelChoice.AUTO)
    place, made = store.folder(host.folders.data), datetime.now(UTC).isoformat(timespec="seconds")
    with guests.on(host, _NAME, places.initrd()) as initrd:
        env = environment.capture(host, decision)
        dimensions = {
            "unit": "ns",
            "method": METHOD,
            "accelerator": str(decision.chosen),
            "interpreted": decision.kvm.verdict is Verdict.INTERPRETED,
            "host_cpu": env.get("cpu") or env["cpu_model"],
            "parts": wanted.order.parts,
            "part_us": wanted.order.part_us,
        }
        name = store.new_id(place, "levels", made)
        head = Head(name, "levels", made, __version__, False, dimensions, env)
        return _Measuring(host, wanted, decision, initrd, report, place).all(head)


class _Measuring:
    """One measurement on its way."""

    def __init__(
        self, host: Host, wanted: Plan, decision: Decision, initrd: str, report: Reporter, place: Path
    ) -> None:
        self._host, self._plan, self._decision, self._initrd = host, wanted, decision, initrd
        self._report, self._place = report, place
        self._steps = len(wanted.levels) + bool(wanted.window_s)
        self._rows = len(wanted.order.rows) * wanted.order.rounds
        self._through = 0

    def all(self, head: Head) -> LevelsResult:
        """Every level, and the shares."""
        result = LevelsResult(head)
        for name in self._plan.levels:
            result = replace(result, levels=(*result.levels, self._level(name)))
            store.write(self._place, result.to_json())
            self._through += 1
        if self._plan.window_s:
            view = guests.machine(self._host, _NAME, self._decision.chosen, self._decision.kvm, "")
            found = shares.measure(self._host, view, self._plan.window_s, self._tell_share)
            if found.skipped:
                self._report(Step(f"fair shares: skipped: {found.skipped}"))
            result = replace(result, shares=found)
        result = replace(result, head=replace(head, complete=True))
        store.write(self._place, result.to_json())
        return result

    def _level(self, name: str) -> Level:
        ways: dict[str, Callable[[], tuple[Heard, str]]] = {
            NATIVE: self._native,
            "container": self._container,
            "qemu-user": self._user,
            "tcg": partial(self._guest, Accel.TCG),
            "kvm": partial(self._guest, Accel.KVM),
            "nested": self._nested,
        }
        began, level = time.monotonic(), Level(name, LEVELS[name])
        try:
            heard, detail = ways[name]()
        except VmctlError as error:
            if name == NATIVE:
                raise
            self._report(Step(f"{LEVELS[name]}: skipped: {error.message}"))
            return replace(level, skipped=error.message)
        if heard.wrong:
            self._report(Step(f"{LEVELS[name]}: {heard.wrong}"))
        took_s = time.monotonic() - began
        return replace(level, detail=detail, rows=heard.said.rows(), failed=heard.wrong, took_s=took_s)

    def _native(self) -> tuple[Heard, str]:
        return places.process(self._argv(), self._tell, _SILENT_S), ""

    def _user(self) -> tuple[Heard, str]:
        emulator = places.user_emulator()
        detail = places.version_of([emulator, "--version"])
        return places.process([emulator, *self._argv()], self._tell, _SILENT_S), detail

    def _argv(self) -> list[str]:
        return [str(places.program()), *self._plan.order.words()]

    def _container(self) -> tuple[Heard, str]:
        heard = places.container(self._host, self._plan.order, self._tell, _SILENT_S)
        return heard, "its own process numbers, mounts and network; the host's kernel"

    def _machine(self, accel: Accel, image: Image) -> ProbeView:
        return guests.machine(self._host, _NAME, accel, self._decision.kvm, image.kernel)

    def _guest(self, accel: Accel) -> tuple[Heard, str]:
        verdict, silent_s, detail = self._decision.kvm.verdict, _SILENT_S, f"{guests.VCPUS} vCPUs"
        if accel is Accel.KVM:
            if verdict not in {Verdict.WORKS, Verdict.INTERPRETED}:
                raise Unsupported(self._decision.reason or f"KVM here: {verdict}")
            if verdict is Verdict.INTERPRETED:
                silent_s, detail = _INTERPRETED_S, "this kernel's KVM interprets its guests: not a CPU's figures"
        image = self._image()
        words = places.kernel_words(image.manifest.cmdline, *self._plan.order.words())
        heard = places.guest(self._host, self._machine(accel, image), self._initrd, words, self._tell, silent_s)
        return heard, detail

    def _nested(self) -> tuple[Heard, str]:
        """The inner guest is emulated: it is so wherever the outer one has no VMX or SVM of its own."""
        image = self._image()
        kernel = storage.download(self._host.conn, self._host.settings.image_pool, Path(image.kernel).name)
        order = self._plan.order
        short = order._replace(rounds=min(order.rounds, 3), parts=min(order.parts, 5))  # minutes, as it is
        inner = places.kernel_words(image.manifest.cmdline, *short.words())
        outer = places.kernel_words(image.manifest.cmdline, "nest=1")
        archive = places.nesting_initrd(Path(self._host.facts.emulator), kernel, inner)
        pool = self._host.settings.pool
        with bare_guest.uploaded(
            self._host.conn, pool, lambda: render.pool(pool, pool_folder(self._host, pool)), f"{_NAME}-nested", archive
        ) as initrd:
            accel = self._decision.chosen if self._decision.kvm.verdict is Verdict.WORKS else Accel.TCG
            heard = places.nested(self._host, self._machine(accel, image), initrd, outer, self._tell, _NESTED_S)
        return heard, f"emulated (TCG) within {accel.upper()}"

    def _image(self) -> Image:
        try:
            return images.find(self._host, _IMAGE)
        except NotFound as error:
            raise NotFound(f"guests boot the kernel of the image {_IMAGE}: {error.hint}") from error

    def _tell(self, said: Said) -> None:
        self._say(said.ended_rows())

    def _tell_share(self, spent_s: float) -> None:
        self._say(int(self._rows * spent_s / self._plan.window_s))

    def _say(self, rows: int) -> None:
        self._report(Progress("levels", self._through * self._rows + rows, self._steps * self._rows, "rows"))
