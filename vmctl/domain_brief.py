"""The little of a domain's XML that a list shows, picked out of hundreds of them fast. Pure."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from functools import cache
from typing import NamedTuple

from vmctl import record
from vmctl.choices import Accel

ACCEL_OF_TYPE = {"kvm": Accel.KVM, "qemu": Accel.TCG}


class Brief(NamedTuple):
    """What a list shows of a domain. ``nics`` are pairs of MAC and network or bridge."""

    uuid: str
    accel: Accel | None
    vcpus: int
    memory_mib: int
    nics: tuple[tuple[str, str], ...]
    record: record.Record | None


@cache
def _brief_patterns() -> dict[str, re.Pattern[str]]:
    tag = f"{record.PREFIX}:vm"
    texts = {
        "type": r"<domain type='(\w+)'",
        "uuid": r"<uuid>([^<]*)<",
        "kib": r"<memory unit='KiB'>(\d+)<",
        "vcpus": r"<vcpu(?: [^>]*)?>(\d+)<",
        "online": r"<vcpu [^>]*current='(\d+)'",
        "nic": r"<mac address='([^']*)'/>\s*<source (?:network|bridge|dev)='([^']*)'",
        "record": rf"(?s)<{tag} [^>]*(?:/>|[^/]>.*?</{tag}>)",
    }
    return {name: re.compile(pattern) for name, pattern in texts.items()}


def brief(text: str) -> Brief:
    """The brief of XML that libvirt printed: a definition, or the status of a running domain around one.

    Picks the few elements it needs out of the text, for a list parses hundreds of these: libvirt prints one element
    a line, with apostrophes around attributes, and no text of a user's in it without escapes.
    """

    patterns = _brief_patterns()

    def first(name: str) -> str:
        found = patterns[name].search(text)
        return found[1] if found else ""

    metadata = patterns["record"].search(text)
    return Brief(
        uuid=first("uuid"),
        accel=ACCEL_OF_TYPE.get(first("type")),
        vcpus=int(first("online") or first("vcpus") or 1),
        memory_mib=int(first("kib") or 0) // 1024,
        nics=tuple(patterns["nic"].findall(text)),
        record=record.read(ET.fromstring(metadata[0])) if metadata else None,
    )
