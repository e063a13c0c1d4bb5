"""A host that is drained: what can move does, what cannot stays and is told of, and a second run goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.hosts import Testbed
from tests.system.migrating import Pair, guest, known_pair

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def trio(make_testbed: Callable[..., Testbed], tmp_path_factory: pytest.TempPathFactory, micro_image: None) -> Pair:
    return known_pair(make_testbed(3, shared=True), tmp_path_factory.mktemp("config"))


def test_drain(trio: Pair) -> None:
    first, second, third = trio.bed.machines
    with ExitStack() as stack:
        running = [stack.enter_context(guest(trio)) for _ in range(2)]
        off = stack.enter_context(guest(trio))
        trio.vmctl("-c", "h1", "stop", off, "--force")
        planned = {row["vm"]: row["to"] for row in trio.json("host", "drain", "h1", "--dry-run")}
        assert set(planned) == {*running, off} and set(planned.values()) == {"h2", "h3"}
        # One that has a twin's name on both others cannot go anywhere.
        xml = f"<domain type='qemu'><name>{off}</name><memory>8192</memory><os><type>hvm</type></os></domain>"
        for machine in (second, third):
            machine.run("sh", "-c", "cat >/tmp/d.xml; virsh define /tmp/d.xml", input=xml)
        said = trio.vmctl("host", "drain", "h1", check=14)
        assert "cannot move 1 of 3 VMs" in said.stderr and "no host can take it" in said.stderr
        assert said.stdout.count("held") == 2
        for vm in running:
            (at,) = trio.where(vm).items()
            assert at[0] in {"h2", "h3"} and at[1] == "running"
        assert first.virsh("list", "--all", "--name").split() == [off]
        for machine in (second, third):
            machine.virsh("undefine", off)
        third.lose_power()
        again = trio.vmctl("host", "drain", "h1")
        assert f"{off}: h1 -> h2" in again.stdout and "h3 takes no VMs" in again.stderr
        assert first.virsh("list", "--all", "--name").split() == []
        assert "h1 has no VMs" in trio.vmctl("host", "drain", "h1").stderr
