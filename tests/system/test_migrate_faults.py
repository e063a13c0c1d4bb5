"""What breaks under a migration: vmctl never hangs, and says where the VM is, which is where both hosts have it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest

from tests.system.migrating import Pair, busy, pair_fixture, until

pytestmark = pytest.mark.system


pair = pair_fixture(shared=True)


def sends(pair: Pair, vm: str) -> bool:
    said = pair.machine("h1").virsh("domjobinfo", vm, check=False)
    return "Outgoing migration" in said and "Memory remaining" in said and "Iteration" in said


def strike(pair: Pair, fault: str, vm: str) -> Callable[[], None]:
    """Let it happen; what is returned mends it."""
    first, second = pair.bed.machines
    if fault == "target's QEMU killed":
        second.kill(f"qemu:{vm}")
    elif fault == "target's QEMU stopped":
        second.kill(f"qemu:{vm}", signal.SIGSTOP)
        return lambda: second.kill(f"qemu:{vm}", signal.SIGCONT)
    elif fault == "target's libvirtd killed":
        second.kill("libvirtd")
        return lambda: second.start("libvirtd")
    elif fault == "source's libvirtd killed":
        first.kill("libvirtd")
        threading.Timer(3, first.start, ("libvirtd",)).start()
    elif fault == "target's libvirtd stopped":
        second.kill("libvirtd", signal.SIGSTOP)
        return lambda: second.kill("libvirtd", signal.SIGCONT)
    elif fault == "target without power":
        second.lose_power()

        def boot() -> None:
            second.boot()
            second.wait_until_up()

        return boot
    return lambda: None


@pytest.mark.parametrize(
    ("fault", "way"),
    [
        ("target's QEMU killed", []),
        ("target's QEMU stopped", ["--stall-timeout", "5"]),
        ("target's libvirtd killed", []),
        ("target's libvirtd stopped", ["--direct"]),
        ("source's libvirtd killed", []),
        ("source's libvirtd killed", ["--direct"]),
        ("target without power", []),
    ],
)
def test_fault(pair: Pair, fault: str, way: list[str]) -> None:
    first, second = pair.bed.machines
    with busy(pair) as vm:
        pair.bed.limit("10mbit")
        process = pair.begin("-c", "h1", "migrate", vm, "--to", "h2", "--live", *way)
        until(lambda: sends(pair, vm), "the migration sends")
        mend = strike(pair, fault, vm)
        try:
            _, said = process.communicate(timeout=200)
        finally:
            process.kill()
            mend()
            pair.bed.limit(None)
        assert process.returncode == 12, said
        assert f"{vm} runs on h1 as before" in said, said
        until(lambda: pair.where(vm) == {"h1": "running"}, f"it is on h1 alone: {pair.where(vm)}; {said}", 60)
        # A host that has booted anew is found by its neighbours only after a while.
        recover = ("-c", "h1", "migrate", vm, "--to", "h2", "--recover")
        until(lambda: not pair.vmctl(*recover, check=None).returncode, "it is recovered", 120)
        assert pair.where(vm) == {"h2": "running"}
