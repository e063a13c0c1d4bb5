"""Which files of the host a piece of libvirt's XML names: a domain's, a saved one's, a snapshot's. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET


def named(text: str) -> frozenset[str]:
    """Paths, and POOL/VOLUME for volumes, of disks, their backing chains, kernels and initial ramdisks.

    Of a snapshot: what holds its state. Neither the overlays that were made when it was taken, which may be long gone,
    nor chains as they were then: what a file is based on now, its header tells.
    """
    root = ET.fromstring(text)
    if root.tag != "domainsnapshot":
        return _named(root)
    found = {memory.get("file", "") for memory in root.iterfind("memory")}
    for part in ("domain", "inactiveDomain"):
        for domain in root.iterfind(part):
            for disk in domain.iterfind("devices/disk"):
                for below in disk.findall("backingStore"):
                    disk.remove(below)
            found |= _named(domain)
    found |= {one.get("nvram", "") for one in root.iterfind("domain/metadata/*")}
    return frozenset(found - {""})


def above(text: str) -> frozenset[str]:
    """What a domain's XML names, but for what lies below its disks."""
    root = ET.fromstring(text)
    for disk in root.iterfind("devices/disk"):
        for below in disk.findall("backingStore"):
            disk.remove(below)
    return _named(root) | {one.get("file", "") for one in root.iter("entry")}


def _named(root: ET.Element) -> frozenset[str]:
    found = set()
    for element in root.iter():
        if element.tag == "source":
            found |= {element.get("file", ""), element.get("dev", "")}
            if element.get("volume"):
                found.add(f"{element.get('pool')}/{element.get('volume')}")
        elif element.tag in {"kernel", "initrd"}:
            found.add((element.text or "").strip())
    return frozenset(found - {""})


def raw(text: str) -> frozenset[str]:
    """Those of them that are raw disks, which are based on nothing."""
    found = set()
    for disk in ET.fromstring(text).iter("disk"):
        driver, source = disk.find("driver"), disk.find("source")
        if driver is not None and source is not None and driver.get("type") == "raw":
            found |= {source.get("file", ""), source.get("dev", "")}
    return frozenset(found - {""})
