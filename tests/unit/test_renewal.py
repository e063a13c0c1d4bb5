"""What a fork is told, and the XML of a copy."""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from vmctl import domain_copy, record, renewal, seed
from vmctl.domain_copy import File, Identity
from vmctl.errors import VmctlError
from vmctl.renewal import Renewal

NEW = Renewal("web-2", "ab" * 16, "", "ssh-ed25519 AAAA", b"\0\1'\xff" * 16, 1700000000.25, {"52:54:00:00:00:01": "x"})


def renewed() -> Renewal:
    """A renewal with a real key."""
    key = seed.new_host_key("test")
    return replace(NEW, host_key_private=key.private, host_key_public=key.public)


def test_the_key_in_dropbears_form_is_the_same_key() -> None:
    key = seed.new_host_key("test")
    made = renewal.dropbear_key(key.private)
    assert made[:19] == b"\0\0\0\x0bssh-ed25519\0\0\0\x40" and len(made) == 83
    import base64

    assert made[51:] == base64.b64decode(key.public.split()[1])[-32:]


@pytest.mark.parametrize("text", ["", "nothing", "-----BEGIN-----\nb3BlbnNzaC1rZXktdjEA\n-----END-----", "!!"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(VmctlError, match="host key"):
        renewal.dropbear_key(text)


def test_the_script_is_a_shells_and_has_no_mark_left(tmp_path: Path) -> None:
    text = renewal.script(renewed())
    assert "@" not in text.replace("-s @1700000000.250", "").replace("ssh@", "")
    script = tmp_path / "script"
    script.write_text(text)
    for shell in ("sh", "bash"):
        subprocess.run([shell, "-n", str(script)], check=True, timeout=20)


def test_the_script_gives_a_card_its_address_for_a_dhcp_client_that_does_not_ask_anew() -> None:
    macs = {"52:54:00:00:00:01": "52:54:00:00:00:02", "52:54:00:00:00:03": "52:54:00:00:00:04"}
    addresses = {"52:54:00:00:00:02": ("10.1.2.3/24", "10.1.2.1")}
    lines = renewal.script(replace(renewed(), macs=macs, addresses=addresses)).splitlines()
    assert "card 52:54:00:00:00:01 52:54:00:00:00:02 10.1.2.3/24 10.1.2.1" in lines
    assert "card 52:54:00:00:00:03 52:54:00:00:00:04" in lines
    assert any('ip addr add "$3"' in line for line in lines)
    assert any('ip route replace default via "$4"' in line for line in lines)


def test_the_program_is_told_the_same() -> None:
    lines = renewal.told(renewed()).splitlines()
    assert "hostname web-2" in lines and f"machine-id {'ab' * 16}" in lines and "clock 1700000000.250000" in lines
    assert lines.index("private") < lines.index("-----BEGIN OPENSSH PRIVATE KEY-----")
    assert lines[-1] == "-----END OPENSSH PRIVATE KEY-----"


def test_what_is_told_at_the_port_says_where_it_begins_and_ends_and_nothing_of_the_time() -> None:
    message = renewal.framed(renewal.identity(renewed()))
    assert message.startswith(b"\x01entropy ") and message.endswith(b"-----END OPENSSH PRIVATE KEY-----\n\0")
    assert message.count(b"\0") == message.count(b"\x01") == 1 and b"clock" not in message


XML = f"""<domain type='qemu' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>one</name>
  <uuid>11111111-1111-1111-1111-111111111111</uuid>
  <genid>22222222-2222-2222-2222-222222222222</genid>
  <metadata>
    <other:thing xmlns:other="http://example.org/other">kept</other:thing>
    <vmctl:vm xmlns:vmctl="{record.NAMESPACE}" schema="1" image="micro"><vmctl:label key="a" value="b"/></vmctl:vm>
    <vmctl-homes:homes xmlns:vmctl-homes="{record.HOMES}" vm="11111111-1111-1111-1111-111111111111">
      <vmctl-homes:home host="h" name="big" uri="qemu+ssh://big/system"/>
    </vmctl-homes:homes>
  </metadata>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><nvram template='/x'>/nv/one_VARS.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/a.raw' index='2'/>
      <backingStore/><target dev='vda' bus='virtio'/><alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x0'/></disk>
    <disk type='file' device='disk'><source file='/seed.iso'/><target dev='vdb'/><readonly/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='vmctl' portid='p' bridge='b'/>
      <target dev='vnet3'/></interface>
    <serial type='pty'><source path='/dev/pts/3'/><log file='/one.log' append='on'/></serial>
    <channel type='unix'><source mode='bind' path='/var/lib/libvirt/qemu/channel/target/domain-7-one/a'/>
      <target type='virtio' name='a'/></channel>
  </devices>
  <seclabel type='dynamic' model='dac'><label>+1:+1</label></seclabel>
  <qemu:commandline>
    <qemu:arg value='user,id=vmctl0,hostfwd=tcp:127.0.0.1:4000-:22'/>
    <qemu:arg value='virtio-net-pci,netdev=vmctl0,mac=52:54:00:00:00:09,bus=pcie.0'/>
  </qemu:commandline>
</domain>"""


def copy(**changes: object) -> str:
    """The XML of a copy."""
    new = Identity(
        "two",
        "33333333-3333-3333-3333-333333333333",
        "<vmctl:vm new='yes'/>",
        macs={"52:54:00:00:00:01": "52:54:00:00:00:02", "52:54:00:00:00:09": "52:54:00:00:00:08"},
        disks={"vda": File("/two.qcow2", "qcow2")},
        gone=frozenset({"vdb"}),
        log="/two.log",
        nvram="/nv/two_VARS.fd",
        forward=(4000, 4001),
    )
    return domain_copy.copied(XML, replace(new, **changes))  # type: ignore[arg-type]


def test_nothing_of_the_first_is_left_in_the_copy() -> None:
    text = copy()
    for old in (
        "one",
        "1111",
        "2222",
        "a.raw",
        "seed",
        ":01",
        ":09",
        "4000",
        "vnet3",
        "portid",
        "/dev/pts",
        "domain-7",
    ):
        assert old not in text, old
    for kept in ("kept", "<vmctl:vm new='yes'/>", 'slot="0x02"', 'template="/x"', "52:54:00:00:00:08", "4001-:22"):
        assert kept in text, kept
    assert "vmctl:label" not in text and "seclabel" not in text and "homes" not in text
    assert record.homes(XML) == (record.Home("h", "big", "qemu+ssh://big/system"),)


def test_the_copy_is_well_formed_but_for_the_records_namespace() -> None:
    root = ET.fromstring(copy(record=""))
    assert root.findtext("name") == "two" and root.find("genid") is not None
    (disk,) = root.findall("devices/disk")
    assert [child.tag for child in disk][:2] == ["driver", "source"] and disk.find("backingStore") is None


def test_a_seed_is_put_behind_the_disks() -> None:
    root = ET.fromstring(copy(record="", seed="<disk><target dev='vdc'/></disk>"))
    assert [t.get("dev") for t in root.iterfind("devices/disk/target")] == ["vda", "vdc"]


def test_a_domain_without_metadata_gets_a_record() -> None:
    bare = "<domain><name>a</name><uuid>b</uuid><devices/></domain>"
    made = domain_copy.copied(bare, Identity("c", "d", "<r/>"))
    assert "<uuid>d</uuid>\n  <metadata><r/></metadata>" in made


@pytest.mark.parametrize(
    ("device", "why"),
    [("<tpm/>", "TPM"), ("<filesystem/>", "shared folders"), ("<hostdev/>", "devices of its host")],
)
def test_what_forbids_a_fork(device: str, why: str) -> None:
    (found,) = domain_copy.obstacles(f"<domain><devices>{device}</devices></domain>")
    assert why in found
