"""What keeps a VM from moving: each finding by itself, and all of them together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vmctl.hypervisor.states import State, remedy
from vmctl.migrate_problems import Cpu, DiskNeed, Facts, HostSide, PoolNeed, VmFacts, fatal, problems

VM = VmFacts("web", "u1", State.RUNNING, "", True, "kvm", "pc-q35-7.2", "/usr/bin/qemu", 1024, ("lan",))
HERE = HostSide(
    "h1", "a", "one", "9.0.0", "7.2.0", ("kvm",), frozenset({"pc-q35-7.2"}), "/usr/bin/qemu", 0, {"lan": True}
)
THERE = replace(HERE, name="h2", uuid="b", hostname="two", available_mib=4096)
FINE = Facts(VM, HERE, THERE, Cpu(True, "x"), (DiskNeed("disk vda", "/p/web.qcow2", True),), skew_s=0.1)


def test_nothing_stands_against_it() -> None:
    assert problems(FINE) == ()


def test_the_host_it_is_on() -> None:
    here = replace(FINE, target=replace(FINE.target, name=FINE.source.name, uuid=FINE.source.uuid))
    assert [one.what for one in problems(here)] == [f"{FINE.source.name} is the host it is on"]


@pytest.mark.parametrize("there", [{}, {"lan": False}])
def test_the_network_that_vmctl_makes_is_made(there: dict[str, bool]) -> None:
    found = problems(replace(FINE, target=replace(FINE.target, networks=there, own_network="lan")))
    assert not fatal(found) and [one.what for one in found] == ["network lan is made on h2"][len(there) :]


def test_one_whose_qemu_died_is_off() -> None:
    assert problems(replace(FINE, vm=replace(FINE.vm, state=State.CRASHED), live=False)) == ()


TAKEN = DiskNeed("d", "/p/x", False, in_the_way="another file is")
LARGE = DiskNeed("d", "/p/x", False, space=1 << 30)
CASES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # what is said, of the VM, of the target, of all
    ("is saved", {"state": State.SAVED}, {}, {"live": False}),
    ("web is crashed", {"state": State.CRASHED}, {}, {}),
    ("paused (I/O error)", {"state": State.PAUSED, "why": "I/O error"}, {}, {}),
    ("another job", {"busy": True}, {}, {}),
    ("a job on disk vda", {"disk_jobs": ("vda",)}, {}, {}),
    ("is transient", {"persistent": False}, {}, {"live": False}),
    ("are one host to libvirt", {}, {"uuid": "a"}, {}),
    ("both hosts are called one", {}, {"hostname": "one"}, {}),
    ("another VM called web", {}, {"vms": {"web": "u2"}}, {}),
    ("a VM of the same UUID already: old", {}, {"vms": {"old": "u1"}}, {}),
    ("runs on h3, where it went once", {"state": State.STOPPED}, {}, {"live": False, "elsewhere": {"h3": "runs"}}),
    ("runs on KVM, which h2 does not offer", {}, {"kinds": ("qemu",)}, {}),
    ("no machine type pc-q35-7.2", {}, {"machines": frozenset({"pc-q35-6.0"})}, {}),
    ("on h2 QEMU is /opt/qemu", {}, {"emulator": "/opt/qemu"}, {}),
    ("QEMU 7.1.9 on h2 is older than 7.2.0", {}, {"qemu": "7.1.9"}, {}),
    ("cannot give web its processor", {}, {}, {"cpu": Cpu(False, "host-passthrough")}),
    ("a device of its host: pci 1", {"host_devices": ("pci 1",)}, {}, {}),
    ("a folder of its host mounted: /srv", {"shares": ("/srv",)}, {}, {}),
    ("snapshots, which libvirt does not move: a, b", {"snapshots": ("a", "b")}, {}, {}),
    ("the state of web's TPM lies on h1", {"tpm": True}, {}, {"live": False}),
    ("512 MiB of memory to spare", {}, {"available_mib": 512}, {}),
    ("3 free huge pages of 2048 KiB, not 512", {"huge_pages_kib": 2048}, {"huge_pages_free": 3}, {}),
    ("h2 has no network lan", {}, {"networks": {}}, {}),
    ("network lan on h2 is down", {}, {"networks": {"lan": False}}, {}),
    ("libvirt on h1 does not reach h2: refused", {}, {}, {"peer_problem": "refused", "peer_mend": "keys"}),
    ("h2 has no bridge br9", {"bridges": ("br0", "br9")}, {}, {"cards": frozenset({"lo", "br0"})}),
    ("may not handle page faults", {}, {}, {"postcopy": True, "userfaults": False}),
    ("QEMU on h2 has no ca-cert.pem", {}, {}, {"certificates": {"h1": (), "h2": ("ca-cert.pem",)}}),
    # of storage
    ("is on h1 only", {}, {}, {"needs": (DiskNeed("disk vda", "/p/x", False),)}),
    ("cache mode unsafe", {}, {}, {"needs": (DiskNeed("disk vda", "/p/x", True, cache="unsafe"),)}),
    ("in use on h2, by running VM db", {}, {}, {"needs": (DiskNeed("disk vda", "/p/x", True, users=("db",)),)}),
    ("no folder /p", {}, {}, {"copy": True, "needs": (DiskNeed("disk", "/p/x", False, folder_missing=True),)}),
    ("where another file is", {}, {}, {"copy": True, "needs": (TAKEN,)}),
    ("is not there on h1", {}, {}, {"copy": True, "needs": (DiskNeed("disk", "/p/x", False, missing=True),)}),
    ("and h2 has no such pool", {}, {}, {"pools": (PoolNeed("fast", "/p", ""),)}),
    ("which on h2 is in /q", {}, {}, {"pools": (PoolNeed("fast", "/p", "/q"),)}),
    ("1 MiB free", {}, {"space": {"/p": 1 << 20}}, {"copy": True, "needs": (LARGE,)}),
]  # fmt: skip


@pytest.mark.parametrize(("said", "vm", "there", "both"), CASES, ids=[case[0] for case in CASES])
def test_each(said: str, vm: dict[str, Any], there: dict[str, Any], both: dict[str, Any]) -> None:
    facts = replace(FINE, vm=replace(VM, **vm), target=replace(THERE, **there), **both)
    (found,) = fatal(problems(facts))
    assert said in found.what
    assert found.mend or "same UUID" in found.what


def test_the_mend_for_snapshots_is_a_command() -> None:
    (found,) = fatal(problems(replace(FINE, vm=replace(VM, snapshots=("a", "b")))))
    assert found.mend.startswith("vmctl -c h1 snapshot delete web.a web.b, ")


def test_a_host_that_has_no_name_is_named_by_its_uri_in_what_is_to_be_typed() -> None:
    """It was by the name in its URI, which no command takes."""
    uri = "qemu+ssh://h2/system?a=1&b=2"
    there = replace(THERE, name="h2", at=uri, vms={"web": "u1"})
    paused = replace(VM, state=State.PAUSED, why="migration")
    again = f"vmctl -c h1 migrate web --to '{uri}' --recover"
    ends = f"{again}, if {uri} is where it was to go"
    for vm, told in (VM, f"{again} looks at both and ends what was cut off"), (paused, ends):
        assert told in [one.mend for one in problems(replace(FINE, vm=vm, target=there))]
    (gone, *_) = problems(replace(FINE, target=there, live=False, elsewhere={"h3": "runs"}))
    assert gone.mend == f"vmctl -c h3 migrate web --to '{uri}'"


def test_one_host_is_told_once() -> None:
    facts = replace(FINE, target=replace(THERE, uuid="a"), needs=(DiskNeed("d", "/p/x", True, users=("web",)),))
    assert len(problems(facts)) == 1


def test_a_pool_that_is_missing_is_told_and_not_its_folder_too() -> None:
    need = DiskNeed("disk vdc", "/p/x", False, folder_missing=True)
    (one,) = problems(replace(FINE, copy=True, needs=(need,), pools=(PoolNeed("fast", "/p", ""),)))
    assert one.mend == "vmctl -c h2 disk pool create fast --path /p"
    assert not problems(replace(FINE, pools=(PoolNeed("fast", "/p", "/p"),)))


def test_what_is_missing_at_the_next_start_is_a_note() -> None:
    (one,) = problems(replace(FINE, needs=(DiskNeed("disk vdc", "/p/x", False, missing=True, later=True),)))
    assert one.note and "will need it" in one.what


def test_a_base_that_is_gone_can_be_had_from_the_qemu_that_has_it_open() -> None:
    facts = replace(FINE, needs=(DiskNeed("base image", "/p/base", False, missing=True, below="vda"),))
    (one,) = fatal(problems(facts))
    assert one.what == "base image (/p/base) is not there on h1, though web needs it"
    assert "on h1, virsh blockpull web vda" in one.mend
    (one,) = fatal(problems(replace(facts, live=False)))
    assert "blockpull" not in one.mend and "put it back" in one.mend


def test_notes_keep_nobody_from_it() -> None:
    facts = replace(
        FINE,
        vm=replace(VM, checkpoints=("c1",)),
        target=replace(THERE, libvirt="8.0.0", nat=frozenset({"lan"})),
        back_problem="refused",
        unasked=True,
        skew_s=-3.0,
    )
    assert len(problems(facts)) == 6 and fatal(problems(facts)) == ()


def test_all_at_once_and_stopped_ones_ask_less() -> None:
    bad = replace(
        FINE,
        vm=replace(VM, snapshots=("one",), shares=("/srv",)),
        target=replace(THERE, kinds=("qemu",), qemu="6.0.0", available_mib=1, networks={}),
        cpu=Cpu(False, "x"),
        needs=(DiskNeed("disk vda", "/p/x", False),),
        peer_problem="refused",
    )
    assert len(fatal(problems(bad))) == 9
    off = replace(bad, vm=replace(bad.vm, state=State.STOPPED), live=False, peer_problem="")
    assert len(fatal(problems(off))) == 4
    assert "on h2 it is that one's folder" in problems(off)[-1].what


@pytest.mark.parametrize("why", ["migration", "post-copy", "post-copy failed"])
def test_what_was_cut_off_names_the_way_on(why: str) -> None:
    facts = replace(FINE, vm=replace(VM, state=State.PAUSED, why=why, busy=True))
    assert [one.mend for one in problems(facts) if "vmctl -c h1 migrate web --to h2 --recover" not in one.mend] == []


def test_a_shared_folder_is_taken_away_by_where_the_guest_has_it() -> None:
    for mounts, named in (({"/srv": "/mnt"}, "/mnt"), ({}, "GUEST")):
        (found,) = problems(replace(FINE, vm=replace(VM, shares=("/srv",), mounts=mounts)))
        assert found.mend == f"vmctl -c h1 unshare {VM.name} {named}, or stop it first"


@pytest.mark.parametrize("why", ["migration", "post-copy", "post-copy failed"])
def test_what_a_migration_has_paused_is_not_to_be_resumed_by_hand(why: str) -> None:
    told = remedy("a", State.PAUSED, why)
    assert told.startswith("vmctl -c SOURCE migrate a --to TARGET --recover ") and "resume" not in told
    assert remedy("a", State.PAUSED, "asked") == "vmctl resume a"
