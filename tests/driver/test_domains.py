"""What needs libvirt but no guest: definitions against the schema, states, error classes, selection."""

from __future__ import annotations

import uuid
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmctl import (
    copies,
    creation,
    domain_job,
    homes,
    hosts,
    identity,
    lifecycle,
    listing,
    networks,
    render,
    resolve,
    snapshot_plan,
)
from vmctl.cli import options
from vmctl.config import HostEntry
from vmctl.domain_xml import with_shared_memory
from vmctl.errors import Conflict, HostUnreachable, HypervisorError, NotFound, SpecError, VmctlError, WrongState
from vmctl.events import silent
from vmctl.hosts import Host, holding
from vmctl.hypervisor import devices, domain, migration, network
from vmctl.hypervisor.connection import Connection, connect
from vmctl.hypervisor.domain import State
from vmctl.hypervisor.network import NetworkFacts
from vmctl.record import Home, Record
from vmctl.spec import VM, Accel, Disk, Firmware, Graphics, Machine, Nic, NicModel, Share, ShareDriver, parse_disk

GOLDEN = Path(__file__).parents[1] / "golden"
PLACEMENT = resolve.Placement(
    root="/pool/NAME.qcow2",
    seed="/pool/NAME-seed.iso",
    new_disks=("/pool/NAME-disk1.qcow2",),
    console_log="/pool/NAME-console.log",
    nvram="/nvram/NAME_VARS.fd",
    kernel="/images/micro.kernel",
    initrd="/images/micro.initrd",
    cmdline="console=ttyS0 quiet",
    network="vmctl",
    forward_port=None,
)
NOTHING: Any = (None, None)  # an accelerator and an image, where neither is asked for
RECORD = Record("micro", "0123456789ab", "feedc0de", "KVM works", labels={"role": "web"})


def xml_of(vm: VM, accel: Accel = Accel.TCG, **changes: object) -> str:
    placement = replace(PLACEMENT, **changes)  # type: ignore[arg-type]
    ident = resolve.identity("golden", vm.name, ())
    record = replace(RECORD, labels=dict(vm.labels))
    return render.domain(resolve.resolve(vm, vm_uuid=ident, accel=accel, placement=placement, record=record))


def define(conn: Connection, name: str, **fields: object) -> None:
    domain.define(conn, xml_of(VM(name, "micro", **fields)), name=name)  # type: ignore[arg-type]


def test_a_note_of_its_hosts_is_a_vms_own_and_goes_with_the_last_other_one(host: Host) -> None:
    define(host.conn, "web1")

    def found() -> domain.Domain:
        return domain.find(host.conn, "web1")

    here, there = Home(host.facts.uuid, "here", ""), Home("another", "a&b", "qemu+ssh://b/system")
    homes.learn(host, found(), [there.uuid])
    homes.write(host, found(), (here, there))
    assert homes.noted(host, found()) == (here, there) and homes.others(host, found()) == (there,)
    assert found().facts.record == replace(RECORD, labels={}), "beside what vmctl remembers"
    with pytest.raises(
        Conflict, match="a&b has it too, and cannot be asked whether it runs there: the config file has"
    ):
        lifecycle.start(host, "web1", silent)
    with pytest.raises(Conflict, match="cannot set autostart of VM web1: a&b has it too"):
        lifecycle.autostart(host, "web1", silent, on=True)
    lifecycle.autostart(host, "web1", silent, on=False)
    lifecycle.start(host, "web1", silent, take_over=True)
    assert homes.noted(host, found()) == () and "homes" not in found().xml


def test_no_vm_is_given_the_mac_of_one_that_went_to_another_host(host: Host) -> None:
    """It may come back, and other hosts know it by that."""
    define(host.conn, "web1")
    vm, text = domain.find(host.conn, "web1"), domain.xml(host.conn, "web1", inactive=True)
    (new,) = copies.newcomers(host, vm, ["web2"], ["vda"], (), seeded=False)
    known = networks.macs(host.conn.host, "vmctl")
    first = uuid.UUID(new.uuid).int % len(known)
    plan = creation.Plan(VM("web2", "micro"), new.uuid, *NOTHING, PLACEMENT, RECORD)
    assert [nic.mac for nic in creation.addressed(host, plan)] == [known[first]]
    identity.note_moving(host, str(uuid.UUID(int=first)))
    assert [nic.mac for nic in creation.addressed(host, plan)] == [known[(first + 1) % len(known)]]
    (made,) = copies.define(host, vm, text, [new], silent)
    assert list((made.card_macs or {}).values()) == [known[(first + 1) % len(known)]]
    identity.forget_moving(host, str(uuid.UUID(int=first)))
    identity.note_moving(host, new.uuid)
    assert [nic.mac for nic in creation.addressed(host, plan)] == [known[first]], "its own, when it is restored"


CASES = {
    "plain-tcg": (VM("web1", "micro"), Accel.TCG, {}),
    "plain-kvm": (VM("web1", "micro"), Accel.KVM, {}),
    "everything": (
        VM(
            "web1",
            "micro",
            vcpus=4,
            memory_mib=2048,
            disks=(parse_disk("1G"), parse_disk("/srv/a&b.raw,bus=scsi"), parse_disk("/srv/c.qcow2,bus=sata")),
            nics=(Nic(), Nic("default", NicModel.E1000E), Nic("lab", mac="52:54:00:aa:bb:cc")),
            graphics=Graphics.VNC,
            shares=(
                Share("/srv/a&b 'c'", "/mnt/a"),
                Share("/srv/ro", "/mnt/ro", readonly=True),
                Share("/srv/kept", "/mnt/kept", readonly=True),
            ),
            labels={"role": "<web>", "tier": ""},
            description='says "hello" & <bye>\nsecond line',
        ),
        Accel.TCG,
        {
            "share_ways": (
                resolve.ShareWay(ShareDriver.VIRTIOFS),
                resolve.ShareWay(ShareDriver.P9),
                resolve.ShareWay(ShareDriver.VIRTIOFS, "/opt/vmctl/virtiofsd-readonly"),
            )
        },
    ),
    "bare": (
        VM("web1", "micro", console=False, rng=False, balloon=False, agent=False, nics=()),
        Accel.TCG,
        {"console_log": ""},
    ),
    "uefi": (VM("web1", "micro", firmware=Firmware.UEFI), Accel.TCG, {"kernel": "", "initrd": "", "cmdline": ""}),
    "pc": (VM("web1", "micro", machine=Machine.PC, cpu="kvm64"), Accel.KVM, {}),
    "session": (VM("web1", "micro"), Accel.TCG, {"forward_port": 2201}),
}


@pytest.mark.parametrize("case", CASES)
def test_golden_and_schema(case: str, conn: Connection, request: pytest.FixtureRequest) -> None:
    vm, accel, changes = CASES[case]
    text = xml_of(vm, accel, **changes)
    # The test driver knows no QEMU namespace, but checks everything else against libvirt's schema.
    domain.define(conn, text, name=vm.name)
    path = GOLDEN / f"domain-{case}.xml"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert path.exists(), f"{path.name} is missing: run with --update-golden and look at it"
    assert text == path.read_text()


def test_the_schema_refuses_what_it_does_not_know(conn: Connection) -> None:
    text = xml_of(VM("web1", "micro")).replace("<acpi/>", "<acpi/><teleport/>")
    with pytest.raises(SpecError):
        domain.define(conn, text, name="web1")
    assert domain.find_or_none(conn, "web1") is None


def test_a_taken_name_is_a_conflict(conn: Connection) -> None:
    define(conn, "web1")
    other = xml_of(VM("web1", "micro")).replace(resolve.identity("golden", "web1", ()), resolve.identity("x", "y", ()))
    with pytest.raises(Conflict):
        domain.define(conn, other, name="web1")


def test_absence_is_not_found_and_nothing_else(conn: Connection) -> None:
    with pytest.raises(NotFound):
        domain.find(conn, "nope")
    conn.close()
    with pytest.raises(VmctlError) as caught:
        domain.find(conn, "nope")
    assert not isinstance(caught.value, NotFound)


def test_an_unreachable_host_is_told_apart() -> None:
    with pytest.raises(HostUnreachable):
        connect("qemu+tcp://127.0.0.1:1/system")


def test_found_by_uuid_too(conn: Connection) -> None:
    define(conn, "web1")
    ident = domain.find(conn, "web1").uuid
    assert domain.find(conn, ident).name == "web1"


def test_what_failed_is_told_where_libvirt_is_gone_too(host: Host) -> None:
    """Nobody can tell then whether the VM has ended."""
    define(host.conn, "web1")
    domain.start(host.conn, "web1")
    vm = domain.find(host.conn, "web1")
    with (
        pytest.raises(HypervisorError, match="cannot take it: the connection broke"),
        domain_job.telling_end(host, vm, "take it", ""),
    ):
        host.conn.close()
        raise HypervisorError("cannot take it: the connection broke", code=1, domain=1)


def test_none_is_saved_while_another_vmctl_works_on_it(host: Host) -> None:
    """A save lets the definition follow the disks, which the other may be changing."""
    define(host.conn, "web1")
    domain.start(host.conn, "web1")
    with holding(host, "web1"), pytest.raises(Conflict):
        lifecycle.save(host, "web1", silent)
    assert domain.find(host.conn, "web1").state is State.RUNNING
    assert lifecycle.save(host, "web1", silent) is True


def test_states(host: Host) -> None:
    define(host.conn, "web1")
    assert domain.find(host.conn, "web1").state is State.STOPPED
    with pytest.raises(WrongState):
        lifecycle.pause(host, "web1")
    domain.start(host.conn, "web1")
    assert lifecycle.pause(host, "web1") is True
    assert lifecycle.pause(host, "web1") is False
    with pytest.raises(WrongState):
        lifecycle.start(host, "web1", silent)
    assert lifecycle.resume(host, "web1") is True
    assert lifecycle.resume(host, "web1") is False
    assert lifecycle.start(host, "web1", silent) is lifecycle.Started.ALREADY
    with pytest.raises(WrongState):
        lifecycle.rename(host, "web1", "web2", silent)


def test_list_filters(host: Host) -> None:
    for name, labels in (("web1", {"role": "web"}), ("web2", {"role": "web", "tier": "1"}), ("db1", {"role": "db"})):
        define(host.conn, name, labels=labels)
    domain.start(host.conn, "web2")
    assert [r.name for r in listing.rows(host)] == ["db1", "web1", "web2"]
    assert [r.name for r in listing.rows(host, states={State.RUNNING})] == ["web2"]
    assert [r.name for r in listing.rows(host, labels={"role": "web"})] == ["web1", "web2"]
    assert [r.name for r in listing.rows(host, labels={"tier": None})] == ["web2"]
    assert [r.name for r in listing.rows(host, labels={"role": "web", "tier": "2"})] == []
    row = listing.rows(host, labels={"role": "db"})[0]
    assert (row.image, row.accel, row.vcpus, row.memory_mib) == ("micro", "tcg", 1, 512)


def test_names_with_numbers_are_listed_in_the_order_of_these(host: Host) -> None:
    for name in ("web10", "web9", "web100"):
        define(host.conn, name)
    assert [row.name for row in listing.rows(host)] == ["web9", "web10", "web100"]
    assert listing.matching(host, ["web*"]) == ("web9", "web10", "web100")


def test_all_names_that_are_taken_are_told(host: Host) -> None:
    for name in ("web-1", "web-3"):
        define(host.conn, name)
    for count, said in (
        (2, "cannot fork VM web: web-1 exists already"),
        (3, "cannot fork VM web: web-1, web-3 exist already"),
    ):
        with pytest.raises(Conflict) as taken:
            copies.require_free(host, "web", copies.numbered("web", count), "fork")
        assert (taken.value.message, taken.value.hint) == (said, "choose another name")


def test_names_and_globs(host: Host) -> None:
    for name in ("web1", "web2", "db1"):
        define(host.conn, name)
    assert listing.matching(host, ["web*", "web1", "db?"]) == ("web1", "web2", "db1")
    assert listing.matching(host, ["plain"]) == ("plain",)
    with pytest.raises(NotFound):
        listing.matching(host, ["x*"])


def test_rename_keeps_the_record(host: Host) -> None:
    define(host.conn, "web1", labels={"role": "web"})
    before = domain.find(host.conn, "web1")
    domain.rename(host.conn, "web1", "web2")
    after = domain.find(host.conn, "web2")
    assert after.uuid == before.uuid and after.facts.record == before.facts.record


def test_record_can_be_replaced(conn: Connection) -> None:
    define(conn, "web1")
    domain.set_record(conn, "web1", render.metadata(replace(RECORD, labels={"new": "yes"})))
    record = domain.find(conn, "web1").facts.record
    assert record is not None and record.labels == {"new": "yes"}


def test_a_foreign_domain_is_listed_and_shown(host: Host) -> None:
    text = "<domain type='test'><name>f_1.x</name><memory>65536</memory><vcpu current='3'>8</vcpu>"
    text += "<os><type>hvm</type></os></domain>"
    domain.define(host.conn, text, name="f_1.x")
    (row,) = listing.rows(host)
    assert (row.name, row.image, row.memory_mib, row.vcpus) == ("f_1.x", "", 64, 3), "3 of 8 vCPUs are plugged in"
    facts = domain.find(host.conn, "f_1.x").facts
    assert facts.record is None and facts.vcpus == 3


def test_rename_to_a_bad_or_taken_name(host: Host) -> None:
    define(host.conn, "web1")
    define(host.conn, "web2")
    with pytest.raises(SpecError):
        lifecycle.rename(host, "web1", "a b", silent)
    with pytest.raises(Conflict):
        lifecycle.rename(host, "web1", "web2", silent)
    assert {name for name, _ in domain.identities(host.conn)} == {"web1", "web2"}


def test_disk_type_cannot_be_guessed() -> None:
    assert 'type="raw"' in xml_of(VM("web1", "micro", disks=(Disk(path="/x.raw", format=parse_disk("/x.raw").format),)))


HUGE = '<memoryBacking><hugepages/><source type="file"/></memoryBacking>'


@pytest.mark.parametrize("backing", ["", "<memoryBacking/>", HUGE])
def test_memory_is_opened_and_the_record_stays(host: Host, backing: str) -> None:
    """The list reads the record out of the text, which therefore keeps its form."""
    name = "web1"
    text = xml_of(VM(name, "micro")).replace("<vcpu", f"{backing}<vcpu", 1)
    domain.define(host.conn, text, name=name)
    before = domain.find(host.conn, name).facts
    devices.share_memory(host.conn, name)
    root = ET.fromstring(domain.xml(host.conn, name, inactive=True))
    (opened,) = root.findall("memoryBacking")
    assert opened.find("source[@type='memfd']") is not None and opened.find("access[@mode='shared']") is not None
    assert (opened.find("hugepages") is not None) == ("hugepages" in backing)
    assert domain.find(host.conn, name).facts == before
    assert [row.image for row in listing.rows(host)] == ["micro"]
    opened_text = domain.xml(host.conn, name, inactive=True)
    assert with_shared_memory(opened_text) == opened_text


@pytest.mark.parametrize("taken", ["route", "link"])
def test_a_network_keeps_off_what_the_host_has(host: Host, monkeypatch: pytest.MonkeyPatch, taken: str) -> None:
    def made(name: str) -> NetworkFacts:
        return networks.ensure(replace(host, settings=host.settings._replace(network=name)), silent)

    monkeypatch.setattr(networks, "_host_routes", lambda _host: ())
    monkeypatch.setattr(networks, "_host_links", lambda _host: set())
    free = made("lab")
    network.remove(host.conn, "lab")
    if taken == "route":
        monkeypatch.setattr(networks, "_host_routes", lambda _host: (free.subnet,))
    else:
        monkeypatch.setattr(networks, "_host_links", lambda _host: {free.bridge})
    now = made("lab")
    assert (now.subnet != free.subnet, now.bridge != free.bridge) == (taken == "route", taken == "link")


def test_who_asks_one_of_several_hosts_for_a_vm_that_it_has_not(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"one": HostEntry("one", host.conn.uri), "two": HostEntry("two", "qemu+ssh://two/system")}

    def open_one(*_: object, **__: object) -> Host:
        own = connect(host.conn.uri)
        define(own, "web1")
        return replace(host, conn=own, settings=host.settings._replace(hosts=known), entry=known["one"])

    monkeypatch.setattr(hosts, "open_host", open_one)
    for missed, hint in (
        (lambda host: domain.find(host.conn, "nosuch"), "see `vmctl list --all-hosts`"),
        (lambda host: listing.matching(host, ["nosuch*"]), "see `vmctl list --all-hosts`"),
        (lambda host: domain.find(host.conn, "web2"), "did you mean web1?"),
        (lambda host: snapshot_plan.address("nosuch.one", ()), "VM.SNAPSHOT names a snapshot; see `vmctl -c one list`"),
        (lambda _: _raise(NotFound("cannot find the cause", hint="see `vmctl list`")), "see `vmctl -c one list`"),
    ):
        with pytest.raises(NotFound) as caught, options.opened("one") as host:
            missed(host)
        assert caught.value.hint == hint


def _raise(error: Exception) -> None:
    raise error


def test_cancelling_over_a_connection_that_is_lost_is_no_error(conn: Connection) -> None:
    """Who cancels a migration asks both hosts next where the VM is, over connections made anew."""
    lost = connect(conn.uri)
    lost.handle.close()
    migration.abort(lost, "web1")
    migration.pause_postcopy(lost, "web1")
