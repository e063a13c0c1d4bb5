"""What vmctl remembers about a VM: an element of its own namespace inside the domain's <metadata>.

There is no state file beside it. virsh and virt-manager keep the element as it is.

Beside it, in namespaces of their own, for VMs that are none of vmctl's move too: which hosts have a definition of it,
and in one that runs, which of its cables are pulled for a moment.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

NAMESPACE = "https://vmctl.dev/xmlns/vm/1"
PREFIX = "vmctl"
SCHEMA = 1
HOMES = "https://vmctl.dev/xmlns/homes/1"
HOMES_PREFIX = "vmctl-homes"
PULLED = "https://vmctl.dev/xmlns/pulled/1"
PULLED_PREFIX = "vmctl-pulled"
_NOTE = re.compile(rf"<{HOMES_PREFIX}:homes\b(?:[^>]*/>|.*?</{HOMES_PREFIX}:homes>)", re.DOTALL)
_METADATA = re.compile(r"<metadata(?P<words>\s[^<>]*?)?(?P<empty>/?)>")  # empty: the last that was in it has gone


class Owned(NamedTuple):
    """A volume that was made for this VM and goes with it."""

    pool: str
    volume: str


class SshAccess(NamedTuple):
    """How to reach the guest by SSH. ``forward_port`` is on the host's loopback; None: at its own address.

    ``address`` is a static one, known from the start; "" where the network gives one.
    """

    user: str
    host_key: str
    forward_port: int | None = None
    address: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """One VM's record. ``creating`` is set until its creation went through to the end.

    ``mounts`` has the guest's folder for each shared folder's tag, which alone the domain knows. ``restarted`` is when
    vmctl last restarted the guest in a QEMU that ran on, in seconds since 1970; 0 for never.
    """

    image: str
    image_digest: str
    spec_digest: str
    accel_reason: str
    accel_requested: str = "auto"
    labels: Mapping[str, str] = field(default_factory=dict)
    owned: tuple[Owned, ...] = ()
    ssh: SshAccess | None = None
    console_log: Owned | None = None
    creating: bool = False
    mounts: Mapping[str, str] = field(default_factory=dict)
    restarted: int = 0
    schema: int = SCHEMA


class Home(NamedTuple):
    """A host that has a definition of a VM: its own UUID, what it was called, how it was reached ("" from itself)."""

    uuid: str
    name: str
    uri: str


def homes(text: str) -> tuple[Home, ...]:
    """The hosts that have a domain, by its XML; not what that says of another one, of which it is a copy."""
    if HOMES not in text:
        return ()
    root = ET.fromstring(text)
    element = root.find(f"metadata/{{{HOMES}}}homes")
    if element is None or element.get("vm") != root.findtext("uuid"):
        return ()
    return tuple(Home(one.get("host", ""), one.get("name", ""), one.get("uri", "")) for one in element)


def with_homes_of(text: str, other: str) -> str:
    """A domain's XML with the note of its hosts that ``other`` has, or none: to be defined in the place of that one.

    As text, for ElementTree would move the namespace to the top, from where libvirt loses it. It comes before all else,
    so that it is the one that counts, whatever a definition from elsewhere may hold.
    """
    note, text = _NOTE.search(other), _NOTE.sub("", text)
    return text if note is None else with_note(text, note[0])


def with_note(text: str, note: str) -> str:
    """A domain's XML with an element first in its metadata, of whatever shape that is: of two, libvirt takes one."""
    found = _METADATA.search(text)
    if found is None:
        return re.sub(r"</(?:name|uuid)>", lambda one: f"{one[0]}<metadata>{note}</metadata>", text, count=1)
    end = "</metadata>" if found["empty"] else ""
    return f"{text[: found.start()]}<metadata{(found['words'] or '').rstrip()}>{note}{end}{text[found.end() :]}"


def moving(text: str) -> bool:
    """Whether a running domain, by its XML, has been sent away, and its cables not plugged in anew since."""
    return _pulled(text) is not None


def pulled(text: str) -> tuple[str, ...]:
    """The MACs of the cards of a running domain, by its XML, whose cables are pulled by a move that is under way."""
    element = _pulled(text)
    return () if element is None else tuple(element.get("macs", "").split())


def _pulled(text: str) -> ET.Element | None:
    return ET.fromstring(text).find(f"metadata/{{{PULLED}}}pulled") if PULLED in text else None


def _tag(name: str) -> str:
    return f"{{{NAMESPACE}}}{name}"


def parse(domain: ET.Element) -> Record | None:
    """The record in a parsed <domain>; None when it has none or one of a newer schema."""
    element = domain.find(f"metadata/{_tag('vm')}")
    return None if element is None else read(element)


def read(element: ET.Element) -> Record | None:
    """The record in its own element; None for one of a newer schema."""
    if int(element.get("schema", "0")) > SCHEMA:
        return None
    ssh = element.find(_tag("ssh"))
    log = element.find(_tag("console-log"))
    port = ssh.get("forward-port") if ssh is not None else None
    return Record(
        image=element.get("image", ""),
        image_digest=element.get("image-digest", ""),
        spec_digest=element.get("spec-digest", ""),
        accel_reason=element.get("accel-reason", ""),
        accel_requested=element.get("accel-requested", "auto"),
        labels={item.get("key", ""): item.get("value", "") for item in element.iter(_tag("label"))},
        owned=tuple(Owned(v.get("pool", ""), v.get("name", "")) for v in element.iter(_tag("volume"))),
        ssh=None
        if ssh is None
        else SshAccess(
            ssh.get("user", ""), ssh.get("host-key", ""), int(port) if port else None, ssh.get("address", "")
        ),
        console_log=None if log is None else Owned(log.get("pool", ""), log.get("name", "")),
        creating=element.get("creating") == "yes",
        mounts={item.get("tag", ""): item.get("mount", "") for item in element.iter(_tag("share"))},
        restarted=int(element.get("restarted", "0")),
        schema=int(element.get("schema", "0")),
    )
