"""What all bare-metal guests of the benchmarks have in common: their machine, and when they have said enough."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from vmctl import bare_guest, render
from vmctl.accel import KvmFindings, Verdict
from vmctl.errors import VmctlError
from vmctl.hosts import Host, pool_folder
from vmctl.hypervisor.console import Transcript
from vmctl.locks import held
from vmctl.render import ProbeView
from vmctl.resources import baremetal_guest
from vmctl.spec import Accel

MEMORY_MIB, VCPUS = 112, 2
GOODBYE = b"q"
LONGEST_S = 600.0
SLOWLY = "slow=500"  # ms between what a guest says it is about to do, and doing it
_BESIDE = ("tsc-deadline",)  # kvm64 is a CPU of 2006, and KVM's own APIC timer is younger
_FIRMWARE_S = 60.0  # a kernel that interprets its guests needs seconds for it


def compiled(name: str) -> bytes:
    """The guest of that name. Raises VmctlError where it was not compiled."""
    return read(baremetal_guest(name))


def read(elf: Path) -> bytes:
    """A guest's file. Raises VmctlError."""
    try:
        return elf.read_bytes()
    except OSError as error:
        raise VmctlError(
            "cannot measure: the guest was not compiled", hint="install the package again; it needs gcc"
        ) from error


def alone(host: Host) -> AbstractContextManager[None]:
    """The host to oneself among vmctl's measurements. Raises Conflict."""
    return held(host.folders.runtime, f"measurements on {host.lock_scope}")


@contextmanager
def on(host: Host, name: str, elf: bytes) -> Iterator[str]:
    """The host to oneself among vmctl's measurements, with the guest's file there. Raises Conflict."""
    pool = host.settings.pool
    with (
        alone(host),
        bare_guest.uploaded(host.conn, pool, lambda: render.pool(pool, pool_folder(host, pool)), name, elf) as path,
    ):
        yield path


def machine(host: Host, name: str, accel: Accel, kvm: KvmFindings, kernel: str) -> ProbeView:
    """The guest's machine: of the CPU as much as the accelerator can give. A kernel that interprets cannot give all."""
    if accel is Accel.TCG:
        kind, mode = "qemu", "maximum"
    else:
        kind, mode = "kvm", "host-passthrough" if kvm.verdict is Verdict.WORKS else "custom"
    features = _BESIDE if mode == "custom" else ()
    emulator = str(host.facts.emulator)
    return ProbeView(own_name(name), kind, "kvm64", emulator, kernel, MEMORY_MIB, mode, VCPUS, cpu_features=features)


def own_name(name: str) -> str:
    """A name of its own: the guest of a run that was killed may be there yet, until libvirt has noticed."""
    return f"{name}-{secrets.token_hex(4)}"


class Ear:
    """Decides when a guest has said enough: ``over`` says so of what came, or it has been silent for too long.

    ``over`` is given all that was said and returns whether that is all, and whether the guest has begun to speak.
    """

    def __init__(self, over: Callable[[bytes], tuple[bool, bool]], silent_s: float) -> None:
        self._over, self._limit_s = over, silent_s
        self._length = 0
        self._heard = time.monotonic()
        self.silent_s = 0.0

    def enough(self, said: bytes) -> bool:
        """Whether to listen no longer."""
        now = time.monotonic()
        done, begun = self._over(said)
        if len(said) != self._length:
            self._length, self._heard = len(said), now
        self.silent_s = now - self._heard
        return done or self.silent_s > (self._limit_s if begun else _FIRMWARE_S)

    def how(self, heard: Transcript) -> str:
        """In words, how a guest ended that did not come to its end."""
        if heard.timed_out:
            return f"was not done after {LONGEST_S:.0f} s"
        return "ended" if heard.stopped else f"said nothing for {self.silent_s:.0f} s"
