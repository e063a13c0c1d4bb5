"""Everything about one VM, for `show`; its JSON is this same object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmctl.agent import SILENT, Glance, GuestAddress, glance
from vmctl.choices import ShareDriver
from vmctl.domain_brief import Brief
from vmctl.domain_xml import DiskFacts, NicFacts, TpmFacts
from vmctl.errors import WrongState
from vmctl.hosts import Host, known_accel
from vmctl.hypervisor import devices, domain, inventory
from vmctl.hypervisor.domain import Domain
from vmctl.hypervisor.inventory import Entry
from vmctl.hypervisor.states import State
from vmctl.listing import addresses_of, shown_state
from vmctl.resources import readonly_virtiofsd


@dataclass(frozen=True, slots=True)
class ShareFacts:
    """One folder of the host in the guest. ``mount`` "": vmctl did not put it there; ``live``: it is plugged in now."""

    folder: str
    mount: str
    readonly: bool
    driver: ShareDriver
    live: bool


@dataclass(frozen=True, slots=True)
class Detail:
    """Everything about one VM."""

    name: str
    uuid: str
    state: State
    why: str
    uptime_s: float | None
    description: str
    labels: Mapping[str, str]
    accel: Mapping[str, object]
    vcpus: int
    memory_mib: int
    cpu: str
    machine: str
    firmware: str
    tpm: TpmFacts | None
    image: str
    image_digest: str
    address: str
    addresses: tuple[GuestAddress, ...]
    ssh_user: str
    ssh_host_key: str
    disks: tuple[DiskFacts, ...]
    nics: tuple[NicFacts, ...]
    shares: tuple[ShareFacts, ...]
    graphics: str
    agent: bool
    agent_state: str
    console_log: str
    autostart: bool
    persistent: bool
    spec_digest: str
    host: str


def details(host: Host, names: Sequence[str]) -> tuple[Detail, ...]:
    """VMs in full, the host's accelerator decision, where it is known, beside what each uses. Raises NotFound.

    Each thing is asked once, and agents last, by the same connection: to open another takes longer than all the rest.
    """
    try:
        return _look(host, names)
    except WrongState:  # one stopped or crashed while it was looked at: what it is now is the answer
        return _look(host, names)


def _look(host: Host, names: Sequence[str]) -> tuple[Detail, ...]:
    vms = [domain.find(host.conn, name) for name in names]
    entries = [_entry(vm) for vm in vms]
    known = known_accel(host)
    here = known.to_json() if known else None
    shares = [_shares(vm) for vm in vms]
    glances: dict[str, Glance] = {}
    addresses = addresses_of(host, entries, glances.__getitem__)
    ours = True
    for vm in vms:
        glances[vm.name] = glance(host, vm, last=ours)
        ours = ours and glances[vm.name].state != SILENT  # a question that was given up keeps the connection
    return tuple(
        _detail(host, vm, here, glances[vm.name], addresses(entry), its)
        for vm, entry, its in zip(vms, entries, shares, strict=True)
    )


def _entry(vm: Domain) -> Entry:
    facts = vm.facts
    pairs = tuple((nic.mac, nic.source) for nic in facts.nics)
    short = Brief(vm.uuid, facts.accel, facts.vcpus, facts.memory_mib, pairs, facts.record)
    return Entry(vm.name, vm.uuid, vm.state, facts.vcpus, facts.memory_mib, None, short)


def _detail(
    host: Host,
    vm: Domain,
    here: Mapping[str, object] | None,
    agent: Glance,
    address: str,
    shares: tuple[ShareFacts, ...],
) -> Detail:
    facts, record = vm.facts, vm.facts.record
    accel: dict[str, object] = {
        "chosen": facts.accel or "",
        "requested": record.accel_requested if record else "",
        "reason": record.accel_reason if record else "defined outside vmctl",
        "host": here,
    }
    ssh = record.ssh if record else None
    return Detail(
        name=vm.name,
        uuid=vm.uuid,
        state=shown_state(vm.state, record),
        why=vm.why,
        uptime_s=inventory.uptime_s(host.conn, vm.name) if vm.active else None,
        description=facts.description,
        labels=dict(record.labels) if record else {},
        accel=accel,
        vcpus=facts.vcpus,
        memory_mib=facts.memory_mib,
        cpu=facts.cpu,
        machine=facts.machine,
        firmware=facts.firmware,
        tpm=facts.tpm,
        image=record.image if record else "",
        image_digest=record.image_digest if record else "",
        address=address,
        addresses=agent.addresses,
        ssh_user=ssh.user if ssh else "",
        ssh_host_key=ssh.host_key if ssh else "",
        disks=facts.disks,
        nics=facts.nics,
        shares=shares,
        graphics=facts.graphics,
        agent=facts.agent,
        agent_state=agent.state,
        console_log=facts.serial_log,
        autostart=vm.autostart,
        persistent=vm.persistent,
        spec_digest=record.spec_digest if record else "",
        host=host.name,
    )


def _shares(vm: Domain) -> tuple[ShareFacts, ...]:
    """Those it has now, and those it has from its next start on."""
    now, later = ({one.tag: one for one in these} for these in devices.shares_by_now(vm))
    mounts = vm.facts.record.mounts if vm.facts.record else {}
    return tuple(
        ShareFacts(
            one.folder,
            mounts.get(tag, ""),
            one.readonly or one.guard.endswith(f"/{readonly_virtiofsd().name}"),
            ShareDriver.VIRTIOFS if one.virtiofs else ShareDriver.P9,
            tag in now,
        )
        for tag, one in (later | now).items()
    )
