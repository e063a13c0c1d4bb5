"""OVF descriptors and their manifests: what the disk of an .ova is called, and writing one of our own. Pure.

Source: DMTF DSP0243, Open Virtualization Format Specification 1.1.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from xml.parsers import expat

_OVF = "http://schemas.dmtf.org/ovf/envelope/1"
_MOST_ELEMENTS = 20_000
_CHECKSUM = re.compile(r"^(SHA1|SHA256|SHA512)\s*\(([^)\n]+)\)\s*=\s*([0-9a-fA-F]+)\s*$")
STREAM_OPTIMIZED = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"


class BadDescriptor(Exception):
    """The descriptor cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What an OVF descriptor says: the file of its one disk, and the name of its machine."""

    disk_file: str
    machine: str


def read(data: bytes) -> Descriptor:
    """Read a descriptor. Raises BadDescriptor."""
    root = _tree(data)
    files = {
        file.get(f"{{{_OVF}}}id", ""): file.get(f"{{{_OVF}}}href", "")
        for file in root.iterfind(f"{{{_OVF}}}References/{{{_OVF}}}File")
    }
    disks = root.findall(f"{{{_OVF}}}DiskSection/{{{_OVF}}}Disk")
    used = [files.get(disk.get(f"{{{_OVF}}}fileRef", ""), "") for disk in disks]
    if len(used) != 1 or not used[0]:
        raise BadDescriptor(f"its descriptor names {len(used)} disks, and vmctl takes images of exactly one")
    system = root.find(f"{{{_OVF}}}VirtualSystem")
    machine = "" if system is None else system.findtext(f"{{{_OVF}}}Name") or system.get(f"{{{_OVF}}}id") or ""
    return Descriptor(used[0], machine)


def _tree(data: bytes) -> ET.Element:
    """The descriptor's elements, none of them from an entity: those are declared in a DOCTYPE, which is refused."""
    counted = 0

    def refuse(*_: object) -> None:
        raise BadDescriptor("its descriptor declares a document type, which no OVF needs")

    def count(*_: object) -> None:
        nonlocal counted
        counted += 1
        if counted > _MOST_ELEMENTS:
            raise BadDescriptor("its descriptor is absurdly long")

    look = expat.ParserCreate("utf-8")
    look.StartDoctypeDeclHandler = refuse
    look.StartElementHandler = count
    try:
        look.Parse(data, True)
        return ET.fromstring(data, ET.XMLParser(encoding="utf-8"))
    except (expat.ExpatError, ET.ParseError, ValueError) as error:
        raise BadDescriptor(f"its descriptor is no XML ({error})") from error


def read_checksums(data: bytes) -> dict[str, tuple[str, str]]:
    """The manifest's checksums: kind ("sha256") and hex digits, by file. Raises BadDescriptor."""
    found: dict[str, tuple[str, str]] = {}
    for line in data.decode("latin-1").splitlines():
        if not line.strip():
            continue
        match = _CHECKSUM.match(line)
        if match is None or match[2] in found:
            raise BadDescriptor("its checksum manifest (.mf) cannot be read")
        found[match[2].strip()] = (match[1].lower(), match[3].lower())
    return found


def write(name: str, disk_file: str, *, virtual_size: int, file_size: int) -> bytes:
    """A descriptor for a machine of 1 CPU, 1 GiB and one SATA disk; whoever imports it may change that."""
    from xml.sax.saxutils import escape, quoteattr  # late: it brings urllib.request and all below

    rasd = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
    vssd = "http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData"
    items = "".join(
        f"<Item>{''.join(f'<rasd:{key}>{value}</rasd:{key}>' for key, value in item)}</Item>\n"
        for item in (
            (("ElementName", "1 CPU"), ("InstanceID", 1), ("ResourceType", 3), ("VirtualQuantity", 1)),
            (
                ("AllocationUnits", "byte * 2^20"),
                ("ElementName", "1024 MiB"),
                ("InstanceID", 2),
                ("ResourceType", 4),
                ("VirtualQuantity", 1024),
            ),
            (
                ("Address", 0),
                ("ElementName", "SATA"),
                ("InstanceID", 3),
                ("ResourceSubType", "AHCI"),
                ("ResourceType", 20),
            ),
            (
                ("AddressOnParent", 0),
                ("ElementName", "disk"),
                ("HostResource", "ovf:/disk/disk1"),
                ("InstanceID", 4),
                ("Parent", 3),
                ("ResourceType", 17),
            ),
        )
    )
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="{_OVF}" xmlns:ovf="{_OVF}" xmlns:rasd="{rasd}" xmlns:vssd="{vssd}" ovf:version="1.0">
<References><File ovf:id="file1" ovf:href={quoteattr(disk_file)} ovf:size="{file_size}"/></References>
<DiskSection><Info>Disks</Info>
<Disk ovf:diskId="disk1" ovf:fileRef="file1" ovf:capacity="{virtual_size}" ovf:format="{STREAM_OPTIMIZED}"/>
</DiskSection>
<VirtualSystem ovf:id={quoteattr(name)}><Info>A machine</Info><Name>{escape(name)}</Name>
<VirtualHardwareSection><Info>Hardware</Info>
<System><vssd:ElementName>Virtual Hardware Family</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID>\
<vssd:VirtualSystemType>vmx-10</vssd:VirtualSystemType></System>
{items}</VirtualHardwareSection>
</VirtualSystem>
</Envelope>
""".encode()


def write_checksums(sums: dict[str, str]) -> bytes:
    """The manifest of sha256 sums by file."""
    return "".join(f"SHA256({name})= {digits}\n" for name, digits in sums.items()).encode()
