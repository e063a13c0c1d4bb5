"""Post-copy, where what breaks is said beforehand, and encrypted migration: where hosts must be set up for it."""

from __future__ import annotations

import json

import pytest

from tests.system.migrating import Pair, busy, pair_fixture, until

pytestmark = pytest.mark.system


pair = pair_fixture(shared=True, tls=True, qemu_root=True)


def test_only_when_asked_for(pair: Pair) -> None:
    pair.bed.limit("50mbit")
    with busy(pair) as name:
        words = ("migrate", name, "--to", "h2", "--postcopy", "--no-auto-converge", "--timeout", "3", "-o", "json")
        done = pair.vmctl("-c", "h1", *words)
        assert json.loads(done.stdout)[0]["postcopy"] is True and "is lost with what it did" in done.stderr
        assert pair.where(name) == {"h2": "running"}


# Of two libvirts one gives the other up; of vmctl, which reaches both, none does, and TCP takes a quarter of an hour.
@pytest.mark.parametrize("way", [[], ["--direct", "--stall-timeout", "10"]], ids=["peer-to-peer", "direct"])
def test_cut_off_in_its_second_half_it_is_said_and_recovered(pair: Pair, way: list[str]) -> None:
    pair.bed.limit("10mbit")
    first, second = pair.bed.machines
    with busy(pair) as name:
        words = ("migrate", name, "--to", "h2", "--postcopy", "--no-auto-converge", "--timeout", "2", *way)
        process = pair.begin("-c", "h1", *words)
        until(lambda: "post-copy" in first.virsh("domstate", name, "--reason", check=False), "post-copy has begun")
        # Before it runs there, the target's libvirt ends it with the connection.
        until(lambda: "running" in second.virsh("domstate", name, check=False), "it runs there")
        first.cut_from(second)
        _, said = process.communicate(timeout=170)
        assert process.returncode == 12, said
        assert "in post-copy, which was cut off" in said and "--recover" in said, said
        first.mend_from(second)
        pair.bed.limit(None)
        recovered = pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--recover")
        assert f"{name}: h1 -> h2" in recovered.stdout
        assert pair.where(name) == {"h2": "running"}


def test_nothing_waits_in_the_socket_when_it_goes_over(pair: Pair) -> None:
    """The state of the devices would come after it. Until that is there it runs nowhere; cut off then, it is lost."""
    pair.bed.limit("24mbit")
    first = pair.machine("h1")
    waiting: list[int] = []

    def gone_over() -> bool:
        told = first.run("ss", "-tnH", "dst", pair.machine("h2").address, "dport", ">=", ":49152").stdout
        waiting.append(sum(int(line.split()[2]) for line in told.splitlines()))
        return "post-copy" in first.virsh("domstate", name, "--reason", check=False)

    with busy(pair) as name:
        process = pair.begin(
            "-c", "h1", "migrate", name, "--to", "h2", "--postcopy", "--no-auto-converge", "--timeout", "2"
        )
        until(gone_over, "post-copy has begun")
        pair.bed.limit(None)
        _, said = process.communicate(timeout=170)
        assert process.returncode == 0, said
    assert max(waiting) > 300_000, "which waited before"
    assert min(waiting[-4:]) < 60_000, waiting


def test_encrypted(pair: Pair) -> None:
    with busy(pair) as name:
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--tls")
        assert pair.where(name) == {"h2": "running"}
        # By a certificate that another authority signed, nothing is sent.
        first = pair.machine("h1")
        first.run("sh", "-c", "cd /etc/pki/qemu && cp ca-cert.pem good.pem && cp server-cert.pem ca-cert.pem")
        try:
            said = pair.vmctl("-c", "h2", "migrate", name, "--to", "h1", "--tls", check=12).stderr
            assert f"{name} runs on h2 as before" in said
        finally:
            first.run("sh", "-c", "cd /etc/pki/qemu && mv good.pem ca-cert.pem")
        assert pair.where(name) == {"h2": "running"}
