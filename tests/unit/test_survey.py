"""What a VM's definition and state make of it for plans."""

from __future__ import annotations

import pytest

from vmctl import host_add, survey
from vmctl.census import Accel, Cpu, HostSeen
from vmctl.hypervisor.population import Guest, Measure
from vmctl.hypervisor.states import State

HOST = HostSeen("h1", cpu_model="Skylake", cpu_flags=frozenset({"avx"}))


def guest(
    more: str = "",
    labels: str = "",
    *,
    state: State = State.RUNNING,
    why: str = "",
    kind: str = "kvm",
    snapshots: bool = False,
) -> Guest:
    record = "<vmctl:vm xmlns:vmctl='https://vmctl.dev/xmlns/vm/1' schema='1' image='x'>" + labels + "</vmctl:vm>"
    number = " id='3'" if state not in {State.STOPPED, State.SAVED} else ""
    xml = (
        f"<domain type='{kind}'{number}><name>a</name><uuid>u</uuid><metadata>{record}</metadata>"
        "<memory unit='GiB'>2</memory><vcpu current='2'>4</vcpu>"
        f"<os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>{more}</domain>"
    )
    return Guest("a", "u", state, why, xml, snapshots)


def label(key: str, value: str) -> str:
    return f"<vmctl:label key='{key}' value='{value}'/>"


def test_all_of_it() -> None:
    labels = label("anti-affinity", "db") + label("priority", "-3") + label("role", "x")
    nics = "<interface type='network'><source network='lan'/></interface><interface type='user'/>"
    more = f"<cpu mode='host-passthrough'/><devices>{nics}</devices>"
    vm, note = survey.vm_seen(guest(more, labels), HOST, Measure(5, 700), 0.25)
    assert not note
    assert vm == survey.VmSeen(
        "a",
        "h1",
        2,
        2048,
        700,
        0.25,
        priority=-3,
        apart="db",
        arch="x86_64",
        accel=Accel.KVM,
        machine="pc-q35-7.2",
        cpu=Cpu("Skylake", frozenset({"avx"}), exact=True),
        networks=frozenset({"lan"}),
    )


def test_a_priority_that_is_no_number_is_told() -> None:
    vm, note = survey.vm_seen(guest(labels=label("priority", "high")), HOST, None, 0.0)
    assert vm.priority == 0 and note == "h1: label priority=high of a is no whole number: taken for 0"


@pytest.mark.parametrize(
    ("cpu", "kind", "needs"),
    [
        ("<cpu mode='custom'><model fallback='forbid'>EPYC</model></cpu>", "kvm", Cpu("EPYC")),
        ("<cpu mode='maximum'/>", "kvm", Cpu("Skylake", frozenset({"avx"}), exact=True)),
        ("<cpu mode='host-model'/>", "kvm", Cpu()),
        ("", "kvm", Cpu()),
        ("<cpu mode='maximum'/>", "qemu", Cpu()),  # TCG's is the same on all hosts
    ],
)
def test_the_processor_it_needs(cpu: str, kind: str, needs: Cpu) -> None:
    assert survey.vm_seen(guest(cpu, kind=kind), HOST, None, 0.0)[0].cpu == needs


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (guest(), ""),
        (guest(state=State.PAUSED, why="asked"), ""),
        (guest(state=State.STOPPED), ""),
        (guest(labels=label("pinned", "")), "it is labelled pinned"),
        (guest(labels=label("pinned", "dongle")), "it is labelled pinned: dongle"),
        (guest(state=State.SAVED), "its saved memory lies there"),
        (guest(state=State.PAUSED, why="I/O error"), "it is paused (I/O error)"),
        (guest(state=State.CRASHED, why="guest panicked"), "it is crashed (guest panicked)"),
        (guest(snapshots=True), "it has snapshots, which libvirt does not move: vmctl snapshot list a"),
        (guest("<devices><hostdev type='pci'/></devices>"), "it has a device of its host"),
        (guest("<devices><interface type='hostdev'/></devices>"), "it has a device of its host"),
        (guest("<devices><filesystem/></devices>"), "it has a folder of its host mounted"),
        (guest("<devices><filesystem/></devices>", state=State.STOPPED), ""),
        (guest("<devices><hostdev/></devices>", state=State.STOPPED), "it has a device of its host"),
    ],
)
def test_what_keeps_it_where_it_is(seen: Guest, why: str) -> None:
    assert survey.vm_seen(seen, HOST, None, 0.0)[0].pinned == why


def test_one_whose_qemu_died_is_off() -> None:
    seen = guest(state=State.CRASHED)
    vm, _ = survey.vm_seen(seen._replace(xml=seen.xml.replace(" id='3'", "")), HOST, None, 0.0)
    assert not vm.running and not vm.pinned


def test_what_has_a_qemu_takes_room() -> None:
    running = {state: survey.vm_seen(guest(state=state), HOST, None, 0.0)[0].running for state in State}
    assert {state for state, is_on in running.items() if not is_on} >= {State.STOPPED, State.SAVED}
    assert all(running[state] for state in (State.RUNNING, State.PAUSED, State.CRASHED, State.SUSPENDED))


def test_no_host_is_called_as_none_in_particular() -> None:
    found = host_add.problems(host_add.Wish("auto", "qemu:///system"))
    assert found == ["auto is what `vmctl migrate --to` calls no host in particular"]
