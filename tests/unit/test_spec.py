"""Specs: what is refused, that every problem is told at once, and that hostile text cannot get through unescaped."""

from __future__ import annotations

import re
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl import render, resolve, share, spec
from vmctl.choices import ShareDriver
from vmctl.domain_xml import parse
from vmctl.errors import SpecError
from vmctl.record import Owned, Record, SshAccess
from vmctl.spec import VM, Accel, Bus, Disk, DiskFormat, Firmware, Machine, Nic

PLACEMENT = resolve.Placement(
    root="/pool/web1-12345678.qcow2",
    seed="/pool/web1-12345678-seed.iso",
    new_disks=("/pool/d1.qcow2", "/pool/d2.qcow2"),
    console_log="/pool/web1-12345678-console.log",
    nvram="/nvram/web1_VARS.fd",
    kernel="/images/k",
    initrd="/images/i",
    cmdline="console=ttyS0 quiet",
    network="vmctl",
    forward_port=None,
)
RECORD = Record(image="micro", image_digest="abc", spec_digest="def", accel_reason="because")
UUID = "6f3b6b1c-6a0e-5a5e-9d0e-0c1f2b3c4d5e"


def view(vm: VM, accel: Accel = Accel.TCG, record: Record = RECORD, **changes: object) -> resolve.DomainView:
    placement = replace(PLACEMENT, **changes)  # type: ignore[arg-type]
    return resolve.resolve(vm, vm_uuid=UUID, accel=accel, placement=placement, record=record)


def test_defaults_are_valid() -> None:
    assert spec.problems(VM("web1", "micro")) == ()


def test_all_problems_at_once() -> None:
    vm = VM(
        "a b",
        "",
        vcpus=0,
        memory_mib=1,
        disks=(Disk(), Disk(path="../x"), Disk(size_mib=1, path="/x")),
        nics=(Nic(mac="53:54:00:00:00:01"), Nic(network="a/b")),
        firmware=Firmware.UEFI,
        machine=Machine.PC,
        cpu="no such!",
        labels={"": "x", "k": "line\nline"},
        description="\x00",
        ssh_keys=("rubbish",),
        runcmd=(" ",),
    )
    with pytest.raises(SpecError) as caught:
        spec.validate(vm)
    # Of disks four, of NICs two, of labels two, and one each of the others.
    assert len(caught.value.problems) == 17
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["a", "A1", "web-1", "x" * 63, "0"])
def test_good_names(name: str) -> None:
    assert spec.name_problems(name) == []


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "a b", "a_b", "a.b", "..", "a/b", "x" * 64, "é", "🐧", "a\n", "<a>", "a&b"]
)
def test_bad_names(name: str) -> None:
    assert spec.name_problems(name)


@pytest.mark.parametrize(
    ("text", "mib"), [("512", 512), ("512M", 512), ("2g", 2048), ("1GiB", 1024), ("1T", 1048576), ("3MB", 3)]
)
def test_sizes(text: str, mib: int) -> None:
    assert spec.parse_size_mib(text) == mib


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5G", "G", "1K", "1 000", "99999999999G", "0x10", "1e3"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(SpecError):
        spec.parse_size_mib(text)


def test_disk_words() -> None:
    assert spec.parse_disk("10G") == Disk(size_mib=10240)
    assert spec.parse_disk("/a/b.img,bus=scsi") == Disk(path="/a/b.img", bus=Bus.SCSI, format=DiskFormat.RAW)
    for bad in ("10G,bus=floppy", "10G,colour=red", "10G,format=vmdk", "relative.qcow2"):
        with pytest.raises(SpecError):
            spec.parse_disk(bad)


@given(st.text())
def test_a_name_is_refused_or_plain(name: str) -> None:
    """No accepted name needs escaping, in XML, a path, a shell or DNS."""
    if not spec.name_problems(name):
        assert name.isascii() and all(c.isalnum() or c == "-" for c in name) and 0 < len(name) <= 63


@given(
    st.text(max_size=300),
    st.dictionaries(st.from_regex(r"[a-z][a-z0-9./_-]{0,8}[a-z]", fullmatch=True), st.text(max_size=300), max_size=4),
    st.text(max_size=300).map(lambda tail: "/srv/" + tail),
)
def test_hostile_text_is_refused_or_comes_through_unchanged(
    description: str, labels: dict[str, str], path: str
) -> None:
    vm = VM("web1", "micro", description=description, labels=labels, disks=(Disk(path=path),))
    if spec.problems(vm):
        return
    text = render.domain(view(vm, record=replace(RECORD, labels=labels)))
    facts = parse(text)
    assert facts.description == description
    assert facts.record is not None and facts.record.labels == labels
    assert facts.disks[2].source == path
    assert facts.name == "web1" and len(ET.fromstring(text).findall("devices/disk")) == 3


HOSTILE = [
    "<b>&amp;</b>",
    "a & b",
    "'\"",
    "x" * 300,
    "🐧 Pingüin",
    "]]>",
    "${HOME} {{ 7*7 }} {% raw %}",
    "%s",
    "a\tb",
    "<!--",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_description_and_label(text: str) -> None:
    labels = {} if "\t" in text or len(text) > 255 else {"note": text}
    vm = VM("web1", "micro", description=text, labels=labels)
    assert spec.problems(vm) == ()
    facts = parse(render.domain(view(vm, record=replace(RECORD, labels=labels))))
    assert facts.description == text
    assert facts.record is not None and dict(facts.record.labels) == labels


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/a\nb", "/a\x00", "/a\u2028b"])
def test_hostile_paths_are_refused(path: str) -> None:
    assert spec.problems(VM("web1", "micro", disks=(Disk(path=path),)))


def test_control_characters_are_refused() -> None:
    assert spec.problems(VM("web1", "micro", description="a\x01b"))
    assert spec.problems(VM("web1", "micro", description="lone \ud800"))
    assert spec.problems(VM("web1", "micro", labels={"k": "a\x1bb"}))


def test_record_survives_its_xml() -> None:
    record = Record(
        image="micro",
        image_digest="abc",
        spec_digest="d<e>f",
        accel_reason='KVM "works" & so on',
        accel_requested="require-kvm",
        labels={"role": "<web>", "empty": ""},
        owned=(Owned("p", "a.qcow2"), Owned("p", "b&c.iso")),
        ssh=SshAccess("root", "ssh-ed25519 AAAA", 2222),
        console_log=Owned("p", "log"),
        creating=True,
    )
    assert parse(render.domain(view(VM("web1", "micro"), record=record))).record == record


def test_a_record_of_a_newer_schema_is_left_alone() -> None:
    text = render.domain(view(VM("web1", "micro"), record=replace(RECORD, schema=99)))
    assert parse(text).record is None


def test_cpu_follows_the_accelerator() -> None:
    assert view(VM("web1", "micro"), Accel.KVM).cpu_mode == "host-passthrough"
    emulated = view(VM("web1", "micro"), Accel.TCG)
    assert emulated.cpu_mode == "maximum" and emulated.cpu_without == ("erms",), "rep movsb, byte by byte"
    assert view(VM("web1", "micro", cpu="max"), Accel.TCG).cpu_without == ()
    assert view(VM("web1", "micro"), Accel.KVM).cpu_without == ()
    assert view(VM("web1", "micro", cpu="kvm64"), Accel.KVM).cpu_model == "kvm64"


def test_defaults_of_a_careful_admin() -> None:
    root = ET.fromstring(render.domain(view(VM("web1", "micro"))))
    assert root.get("type") == "qemu"
    assert [d.find("target").get("bus") for d in root.findall("devices/disk")] == ["virtio", "virtio"]  # type: ignore[union-attr]
    assert root.find("devices/disk/driver").get("discard") == "unmap"  # type: ignore[union-attr]
    assert root.find("devices/interface/model").get("type") == "virtio"  # type: ignore[union-attr]
    assert root.find("os/type").get("machine") == "q35"  # type: ignore[union-attr]
    assert root.find("devices/rng") is not None
    assert root.find("devices/serial/log").get("file") == PLACEMENT.console_log  # type: ignore[union-attr]
    assert root.find("devices/channel/target").get("name") == "org.qemu.guest_agent.0"  # type: ignore[union-attr]
    assert root.find("devices/graphics") is None
    assert root.find("devices/memballoon").get("model") == "virtio"  # type: ignore[union-attr]


def test_what_is_switched_off_is_not_there() -> None:
    vm = VM("web1", "micro", console=False, rng=False, balloon=False, agent=False, nics=())
    root = ET.fromstring(render.domain(view(vm)))
    for path in ("devices/serial", "devices/console", "devices/rng", "devices/channel", "devices/interface"):
        assert root.find(path) is None, path
    assert root.find("devices/memballoon").get("model") == "none"  # type: ignore[union-attr]


def test_user_network_has_a_loopback_forward() -> None:
    root = ET.fromstring(render.domain(view(VM("web1", "micro"), forward_port=2201)))
    arguments = [a.get("value") for a in root.iter("{http://libvirt.org/schemas/domain/qemu/1.0}arg")]
    assert "user,id=vmctl0,hostfwd=tcp:127.0.0.1:2201-:22" in arguments
    assert root.find("devices/interface") is None


def test_identity_is_stable_and_avoids_what_is_taken() -> None:
    first = resolve.identity("host", "web1", ())
    assert first == resolve.identity("host", "web1", ())
    assert first != resolve.identity("host", "web2", ()) != resolve.identity("other", "web2", ())
    second = resolve.identity("host", "web1", {first})
    assert second != first
    assert resolve.identity("host", "web1", {first, second}) not in {first, second}


def test_macs_are_local_and_differ() -> None:
    macs = {resolve.mac_address(UUID, n) for n in range(50)}
    assert len(macs) == 50 and all(mac.startswith("52:54:00:") for mac in macs)


def test_many_disks_get_their_own_targets() -> None:
    vm = VM("web1", "micro", disks=tuple(Disk(path=f"/d{n}") for n in range(30)))
    targets = [d.target for d in view(vm).disks]
    assert len(set(targets)) == 32 and targets[:4] == ["vda", "vdb", "vdc", "vdd"] and targets[26] == "vdaa"


def test_spec_digest_follows_every_field() -> None:
    base = VM("web1", "micro")
    others = [
        replace(base, vcpus=2),
        replace(base, labels={"a": "b"}),
        replace(base, description="x"),
        replace(base, nics=()),
    ]
    assert len({resolve.spec_digest(vm) for vm in [base, *others]}) == 5
    assert resolve.spec_digest(base) == resolve.spec_digest(VM("web1", "micro"))


def test_a_share_is_read_from_the_right_so_that_only_the_host_folder_may_have_colons() -> None:
    assert spec.parse_share("/a:b c:/mnt:ro") == spec.Share("/a:b c", "/mnt", readonly=True)
    assert spec.parse_share("/a:/mnt") == spec.Share("/a", "/mnt")


@pytest.mark.parametrize(
    "text", ["", ":", "/a", "/a:", "a:/b", "/a:/", "/a:/..", "/a/../b:/c", "/a,b:/c", "/a\\b:/c", "/a\n:/c"]
)
def test_shares_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        spec.parse_share(text)


@given(st.text(alphabet=st.characters(blacklist_categories=["Cc", "Cs"]), min_size=1, max_size=40))
def test_the_guests_shell_and_fstab_read_any_place_as_it_was_meant(name: str) -> None:
    """The command, run by a real shell on a file of ours, leaves one line of six fields that names the place."""
    place = "/mnt/" + name.strip("/.") + "x"
    if spec.share_problems(spec.Share("/srv", place)) or "/etc/fstab" in place:  # which is replaced below
        return
    line = share.fstab_command(spec.Share("/srv", place), ShareDriver.VIRTIOFS).partition(" && ")[2]
    with tempfile.TemporaryDirectory() as folder:
        table = f"{folder}/fstab"
        for _ in range(2):
            subprocess.run(["sh", "-c", f": >>{table}; " + line.replace("/etc/fstab", table)], check=True)
        (fields,) = [text.split(" ") for text in Path(table).read_text().splitlines()]
    assert len(fields) == 6 and fields[2:] == ["virtiofs", "nofail", "0", "0"]
    assert re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[1]) == place
