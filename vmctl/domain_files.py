"""Which files of the host a piece of libvirt's XML names: a domain's, a saved one's, a snapshot's. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET


def named(text: str) -> frozenset[str]:
    """Paths, and POOL/VOLUME for volumes, of disks, their backing chains, kernels and initial ramdisks."""
    found = set()
    for element in ET.fromstring(text).iter():
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
