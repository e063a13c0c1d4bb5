"""Single domains: look up, define, change state, undefine. Each function is one step; verbs compose them."""

from __future__ import annotations

import os
import signal
import xml.etree.ElementTree as ET
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt

from vmctl import domain_xml, record
from vmctl.domain_xml import DomainFacts
from vmctl.errors import Conflict, NotFound, Unsupported, VmctlError, WaitTimeout, WrongState, close_to
from vmctl.hypervisor.connection import Connection
from vmctl.hypervisor.errors import calling
from vmctl.hypervisor.states import ACTIVE, PANICKED, State, remedy, state_of, told
from vmctl.wait import wait_until

__all__ = ["ACTIVE", "PANICKED", "State", "remedy", "told"]

_KILLED_S = 10.0


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain as found: identity, state, and what its XML says. Memory and vCPUs: see ``facts``.

    ``xml`` is what ``facts`` are read from; ``handle`` is libvirt's, of the connection it was found by, and stays
    inside this room.
    """

    name: str
    uuid: str
    state: State
    why: str
    id: int | None
    persistent: bool
    autostart: bool
    facts: DomainFacts
    xml: str = field(default="", compare=False, repr=False)
    handle: Any = field(default=None, compare=False, repr=False)

    @property
    def active(self) -> bool:
        """Whether a QEMU process runs for it."""
        return self.id is not None

    @property
    def panicked(self) -> bool:
        """Whether its guest's kernel panicked, and QEMU keeps what there is of it."""
        return self.why == PANICKED


def handle(conn: Connection, name: str) -> Any:
    """libvirt's own object, for this room only. Raises NotFound."""
    try:
        return conn.handle.lookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            with calling(f"look up VM {name}"):
                raise
    try:
        return conn.handle.lookupByUUIDString(name)
    except (libvirt.libvirtError, ValueError):
        raise absent(conn, name) from None


def absent(conn: Connection, name: str) -> NotFound:
    """The error for a VM that is not there, with the name that may have been meant."""
    with calling("list VMs"):
        names = [dom.name() for dom in conn.handle.listAllDomains()]
    message = f"cannot find VM {name}: {conn.uri} has none of that name"
    return NotFound(message, missing="VM", meant=close_to(name, names), hint="see `vmctl list`")


def _describe(dom: Any) -> Domain:
    code, reason = dom.state()
    active, persistent = dom.ID() != -1, bool(dom.isPersistent())
    saved = not active and bool(dom.hasManagedSaveImage())  # of one that runs it says nothing
    state, why = state_of(code, reason, saved=saved)
    text = str(dom.XMLDesc())
    return Domain(
        name=dom.name(),
        uuid=dom.UUIDString(),
        state=state,
        why=why,
        id=dom.ID() if active else None,
        persistent=persistent,
        autostart=persistent and bool(dom.autostart()),
        facts=domain_xml.parse(text),
        xml=text,
        handle=dom,
    )


def find(conn: Connection, name: str) -> Domain:
    """The domain called ``name`` (or with that UUID). Raises NotFound."""
    with calling(f"look up VM {name}"):
        return _describe(handle(conn, name))


def find_or_none(conn: Connection, name: str) -> Domain | None:
    """The domain called ``name``; None only when libvirt says there is none."""
    try:
        return find(conn, name)
    except NotFound:
        return None


def identities(conn: Connection) -> tuple[tuple[str, str], ...]:
    """Name and UUID of every domain; one call."""
    with calling("list VMs"):
        return tuple((dom.name(), dom.UUIDString()) for dom in conn.handle.listAllDomains())


def all_facts(conn: Connection) -> tuple[DomainFacts, ...]:
    """The XML facts of every domain: one call for the list and one each."""
    found = []
    with calling("read all VMs"):
        for dom in conn.handle.listAllDomains():
            try:
                found.append(domain_xml.parse(dom.XMLDesc()))
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # deleted since the list was made
                    raise
    return tuple(found)


def state(conn: Connection, name: str) -> tuple[State, str]:
    """State and reason of ``name``, cheaply. Raises NotFound."""
    with calling(f"ask for the state of VM {name}"):
        dom = handle(conn, name)
        code, reason = dom.state()
        return state_of(code, reason)


def used_s(conn: Connection, name: str) -> float:
    """Processor seconds that a running domain has had. Raises NotFound."""
    dom = handle(conn, name)
    with calling(f"ask what VM {name} uses"):
        return float(dom.info()[4] / 1e9)


def xml(conn: Connection, name: str, *, inactive: bool = False, secure: bool = False) -> str:
    """The domain's XML, security-sensitive parts (a screen's password) left out unless ``secure``."""
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0
    flags |= libvirt.VIR_DOMAIN_XML_SECURE if secure else 0
    with calling(f"read the XML of VM {name}"):
        return str(handle(conn, name).XMLDesc(flags))


def define(conn: Connection, text: str, *, name: str) -> None:
    """Define a persistent domain from XML, checked against libvirt's schema. Raises Conflict for a taken name."""
    try:
        with calling(f"define VM {name}"):
            conn.handle.defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    except VmctlError as error:
        # libvirt reports a taken name as a general failure: ask instead of reading its text.
        if not isinstance(error, Conflict) and (taken := find_or_none(conn, name)) and taken.uuid not in text:
            raise Conflict(f"cannot create VM {name}: it exists already") from error
        raise


def start(conn: Connection, name: str, *, paused: bool = False) -> None:
    """Boot it, or resume it from its saved memory."""
    flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
    with calling(f"start VM {name}"):
        handle(conn, name).createWithFlags(flags)


def shutdown_acpi(conn: Connection, name: str) -> None:
    """Press the power button."""
    with calling(f"stop VM {name}"):
        handle(conn, name).shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)


def power_off(conn: Connection, name: str) -> None:
    """Pull the plug."""
    with calling(f"power off VM {name}"):
        handle(conn, name).destroy()


def kill(conn: Connection, name: str) -> bool:
    """End the QEMU process of a domain on this machine by a signal that it cannot wait upon, and see it end.

    libvirt's own way asks it first and looks again every 0.2 s. False where that process cannot be told from here, or
    does not end at once.
    """
    if not conn.local or conn.session:
        return False
    with suppress(OSError, ValueError):
        pid = int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
        if f"guest={name},".encode() not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return False  # another process has that number by now
        os.kill(pid, signal.SIGKILL)
        with suppress(WaitTimeout):
            with calling(f"ask for VM {name}"):
                dom = handle(conn, name)
                wait_until(lambda: not dom.isActive(), what="", timeout_s=_KILLED_S, interval_s=0.005)
            return True
    return False


def reboot_acpi(conn: Connection, name: str) -> None:
    """Press the power button and start again when the guest has powered off."""
    with calling(f"reboot VM {name}"):
        handle(conn, name).reboot(libvirt.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN)


def reset(conn: Connection, name: str) -> None:
    """Press the reset button."""
    with calling(f"reset VM {name}"):
        handle(conn, name).reset()


def pause(conn: Connection, name: str) -> None:
    """Stop the vCPUs."""
    with calling(f"pause VM {name}"):
        handle(conn, name).suspend()


def resume(conn: Connection, name: str) -> None:
    """Let the vCPUs run on."""
    with calling(f"resume VM {name}"):
        handle(conn, name).resume()


def save(conn: Connection, name: str) -> None:
    """Save memory to disk and end the QEMU process; blocks until done."""
    with calling(f"save VM {name}"):
        handle(conn, name).managedSave()


def drop_saved(conn: Connection, name: str) -> None:
    """Delete its saved memory: the next start boots."""
    with calling(f"drop the saved memory of VM {name}"):
        handle(conn, name).managedSaveRemove()


def abort_job(conn: Connection, name: str) -> None:
    """Cancel a running save."""
    with calling(f"cancel the job of VM {name}"):
        handle(conn, name).abortJob()


@dataclass(frozen=True, slots=True)
class JobProgress:
    """Bytes of a running job, as libvirt counts them."""

    done: int
    total: int


def job_progress(conn: Connection, name: str) -> JobProgress | None:
    """How far a running job (save) is; None when there is none."""
    with calling(f"ask for the job of VM {name}"):
        info = handle(conn, name).jobInfo()
    return JobProgress(int(info[4]), int(info[3])) if info[0] else None


def undefine(conn: Connection, name: str, *, keep_nvram: bool = False) -> None:
    """Remove the definition and what libvirt keeps for it: saved state, NVRAM, snapshot and checkpoint metadata."""
    flags = (
        libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | (libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM if keep_nvram else libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
        | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    )
    with calling(f"delete VM {name}"):
        dom = handle(conn, name)
        try:
            dom.undefineFlags(flags)
        except libvirt.libvirtError as error:
            # The test driver knows no such flags, and nothing they would remove.
            if error.get_error_code() not in {libvirt.VIR_ERR_INVALID_ARG, libvirt.VIR_ERR_NO_SUPPORT}:
                raise
            dom.undefineFlags(0)


def rename(conn: Connection, name: str, new: str) -> None:
    """Give a stopped domain another name, under which its checkpoints are kept too."""
    with calling(f"rename VM {name} to {new}"):
        dom = handle(conn, name)
        dom.rename(new, 0)
        try:
            kept = dom.listAllCheckpoints(libvirt.VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                raise
            return
        for one in kept:  # libvirt 9.0 deletes their files with the old name, and would forget them at its next start
            dom.checkpointCreateXML(one.getXMLDesc(0), libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE)


def set_autostart(conn: Connection, name: str, *, on: bool) -> None:
    """Whether it starts with its host."""
    with calling(f"set autostart of VM {name}"):
        handle(conn, name).setAutostart(int(on))


def detach_disk(conn: Connection, name: str, target: str) -> None:
    """Take the disk ``target`` out of the definition of a stopped domain."""
    with calling(f"detach disk {target} of VM {name}"):
        dom = handle(conn, name)
        for disk in ET.fromstring(dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)).iterfind("devices/disk"):
            found = disk.find("target")
            if found is not None and found.get("dev") == target:
                dom.detachDeviceFlags(ET.tostring(disk, encoding="unicode"), libvirt.VIR_DOMAIN_AFFECT_CONFIG)


def set_record(conn: Connection, name: str, element: str, *, only_live: bool = False) -> None:
    """Replace vmctl's record of the domain, in its definition and, when it runs, live."""
    with calling(f"write the record of VM {name}"):
        dom = handle(conn, name)
        flags = 0 if only_live else libvirt.VIR_DOMAIN_AFFECT_CONFIG
        if only_live or dom.isActive():
            flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
        dom.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, element, record.PREFIX, record.NAMESPACE, flags)


def set_homes(conn: Connection, name: str, element: str | None) -> None:
    """Replace the note of its hosts in the domain's definition; None takes it away."""
    with calling(f"note where VM {name} is defined"):
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
        note(handle(conn, name), element, record.HOMES_PREFIX, record.HOMES, flags)


def note_pulled(conn: Connection, name: str, macs: Collection[str] | None) -> None:
    """Note in a running domain that it moves, and which cards' cables are pulled for that, by MAC; None: no more."""
    noted = macs is not None
    element = ET.tostring(ET.Element("pulled", {"macs": " ".join(macs or ())}), encoding="unicode") if noted else None
    with calling(f"note which cables of VM {name} are pulled"):
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
        note(handle(conn, name), element, record.PULLED_PREFIX, record.PULLED, flags)


def note(dom: Any, element: str | None, prefix: str, namespace: str, flags: int) -> None:
    """Replace an element of the domain's metadata; one that is to go may be gone."""
    try:
        dom.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, element, prefix, namespace, flags)
    except libvirt.libvirtError as error:
        if element is not None or error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            raise


def require(domain: Domain, allowed: frozenset[State], doing: str, hint: str = "") -> None:
    """Raise WrongState unless the domain is in one of the ``allowed`` states."""
    if domain.state not in allowed:
        if hint.startswith("vmctl start"):
            hint = remedy(domain.name, domain.state, domain.why)
        raise WrongState(f"cannot {doing} VM {domain.name}: it is {told(domain.state, domain.why)}", hint=hint)


def require_persistent(domain: Domain, doing: str) -> None:
    """Raise Unsupported for a transient domain, which ends with its process."""
    if not domain.persistent:
        raise Unsupported(f"cannot {doing} VM {domain.name}: it is transient and ends when it stops")


def all_texts(conn: Connection) -> tuple[tuple[str, str], ...]:
    """Name and XML of every domain, as it runs, as it is defined, as it is saved, and of each of its snapshots."""
    found = []
    with calling("read all VMs"):
        for dom in conn.handle.listAllDomains():
            try:
                found += [(dom.name(), text) for text in _texts(dom)]
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # deleted since the list was made
                    raise
    return tuple(found)


def _texts(dom: Any) -> list[str]:
    texts = [dom.XMLDesc(), dom.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)]
    if dom.hasManagedSaveImage():
        texts.append(dom.managedSaveGetXMLDesc())
    return texts + [snapshot.getXMLDesc() for snapshot in dom.listAllSnapshots()]
