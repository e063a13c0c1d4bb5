"""What breaks under a migration: a selection of the runs that `python -m tests.faults` does by the hundred."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from tests.faults.bench import Bench
from tests.faults.phases import Phase
from tests.faults.series import Run
from tests.faults.strikes import Fault
from tests.hosts import Testbed

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def bench(make_testbed: Callable[..., Testbed], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(make_testbed(2, shared=True, qemu_root=True), tmp_path_factory.mktemp("config"))


@pytest.mark.parametrize(
    ("fault", "phase", "direct", "outcome"),
    [
        (Fault.VMCTL_KILLED, Phase.CONFIRM, False, "kept"),
        (Fault.SOURCE_LIBVIRTD, Phase.PERFORM, True, "kept"),
        (Fault.SOURCE_LIBVIRTD, Phase.DONE, False, "kept"),
        (Fault.TARGET_LIBVIRTD, Phase.PREPARE, False, "kept"),
        (Fault.TARGET_LIBVIRTD, Phase.FINISH, False, "kept"),
        (Fault.TARGET_LIBVIRTD_STOPPED, Phase.PERFORM, True, "kept"),
        (Fault.SOURCE_QEMU, Phase.PERFORM, False, "lost"),
        (Fault.TARGET_QEMU, Phase.FINISH, False, "kept"),
        (Fault.TARGET_QEMU_STOPPED, Phase.PERFORM, False, "kept"),
        (Fault.TARGET_POWER, Phase.PERFORM, False, "kept"),
        (Fault.CUT_SHORT, Phase.POSTCOPY, False, "kept"),
        (Fault.DISK_FULL, Phase.DISKS, False, "kept"),
    ],
)
def test_fault(bench: Bench, fault: Fault, phase: Phase, direct: bool, outcome: str) -> None:
    record = bench.do(Run(0, fault, phase, Random(1), direct))
    assert record["outcome"] == outcome, record
