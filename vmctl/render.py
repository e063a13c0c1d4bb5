"""Templates to text: XML of domains, networks, pools, volumes; cloud-init files. The only jinja2; decides nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from vmctl import record
from vmctl.errors import SpecError, reason
from vmctl.reservation import Reservation
from vmctl.resources import templates_dir

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

    from vmctl.record import Home, Record
    from vmctl.resolve import DomainView, ShareView


@dataclass(frozen=True, slots=True)
class NetworkView:
    """Everything network.xml.j2 prints: a NAT network with DHCP from ``first`` to ``last`` and addresses for MACs."""

    name: str
    bridge: str
    domain: str
    gateway: str
    prefix: int
    first: str
    last: str
    reservations: tuple[Reservation, ...] = ()


@dataclass(frozen=True, slots=True)
class VolumeView:
    """Everything volume.xml.j2 prints. ``capacity`` in bytes; ``mode`` in octal digits; ``owner`` a user's number."""

    name: str
    capacity: int
    format: str
    mode: str = "0600"
    backing: str = ""
    backing_format: str = "qcow2"
    owner: str = ""


@dataclass(frozen=True, slots=True)
class AttachedView:
    """Everything disk.xml.j2 prints: one disk as it is plugged in. "" and 0 are left to libvirt."""

    type: str
    format: str
    target: str
    bus: str
    serial: str
    path: str = ""
    protocol: str = ""
    name: str = ""
    host: str = ""
    port: int = 0
    socket: str = ""
    cache: str = ""
    aio: str = ""
    discard: str = ""
    iothread: int = 0
    readonly: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)
    user: str = ""
    secret: str = ""


@dataclass(frozen=True, slots=True)
class PoolView:
    """Everything storage-pool.xml.j2 prints: a pool of libvirt's, by its own words for each part."""

    name: str
    type: str
    path: str = ""
    host: str = ""
    port: int = 0
    dir: str = ""
    devices: tuple[str, ...] = ()
    source_name: str = ""
    format: str = ""
    initiator: str = ""
    auth: str = ""
    user: str = ""
    secret: str = ""

    @property
    def has_source(self) -> bool:
        """Whether the content is anywhere but in the folder itself."""
        return bool(self.host or self.dir or self.devices or self.source_name)


@dataclass(frozen=True, slots=True)
class ProbeView:
    """Everything probe.xml.j2 prints: a bare-metal guest that says on its serial line what it found out.

    ``words`` are its command line, ``arguments`` further ones of QEMU's; ``cpu`` is a model's name for mode custom, and
    ``cpu_features`` are what it is to have beside; of those that KVM has not, QEMU says so in its log.
    ``cpuset`` names the host's CPUs it may use, ``weight`` its share of them against others; "" and 0: not limited.
    """

    name: str
    accel: str
    cpu: str
    emulator: str
    kernel: str
    memory_mib: int = 32
    cpu_mode: str = "custom"
    vcpus: int = 1
    words: str = ""
    arguments: tuple[str, ...] = ()
    initrd: str = ""
    cpuset: str = ""
    weight: int = 0
    cpu_features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ContainerView:
    """Everything container.xml.j2 prints: a container of libvirt's LXC driver whose first process is ``init``."""

    name: str
    root: str
    init: str
    arguments: tuple[str, ...]
    memory_mib: int


@dataclass(frozen=True, slots=True)
class ReportView:
    """Everything report.html.j2 prints. ``raw`` are names with JSON that is safe inside of a script element.

    ``sections`` have ``title``, ``facts``, ``pictures`` (SVG), ``notes`` and ``tables``.
    """

    title: str
    made: str
    sections: Sequence[object]
    raw: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class SnapshotDiskView:
    """A disk in snapshot.xml.j2: ``kind`` is internal, external (with its new file) or no."""

    target: str
    kind: str
    overlay: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotView:
    """Everything snapshot.xml.j2 prints."""

    name: str
    description: str
    memory: str
    memory_file: str
    disks: tuple[SnapshotDiskView, ...]


@dataclass(frozen=True, slots=True)
class BackedUpView:
    """One disk in backup.xml.j2: where what it overwrites goes ("": it is left out), and what it counts from."""

    target: str
    scratch: str = ""
    since: str = ""
    bitmap: str = ""


@dataclass(frozen=True, slots=True)
class BackupView:
    """Everything backup.xml.j2 prints."""

    socket: str
    disks: tuple[BackedUpView, ...]


@dataclass(frozen=True, slots=True)
class CheckpointView:
    """Everything checkpoint.xml.j2 prints. ``created``: when, in seconds, for one that is there already; else 0."""

    name: str
    description: str
    marked: tuple[str, ...]
    unmarked: tuple[str, ...] = ()
    created: int = 0
    parent: str = ""


@dataclass(frozen=True, slots=True)
class SeedView:
    """What the guest is told at its first boot. ``machine_id``: for a disk that has been another machine's."""

    instance_id: str
    hostname: str
    ssh_keys: tuple[str, ...] = ()
    host_key_private: str = ""
    host_key_public: str = ""
    runcmd: tuple[str, ...] = ()
    user: str = ""
    password_hash: str = ""
    machine_id: str = ""


@dataclass(frozen=True, slots=True)
class CardView:
    """One card in the network-config; without addresses it asks DHCP."""

    mac: str
    addresses: tuple[str, ...] = ()
    gateway: str = ""
    nameservers: tuple[str, ...] = ()

    @property
    def everywhere(self) -> str:
        """The destination of its default route."""
        return "::/0" if ":" in self.gateway else "0.0.0.0/0"


def _tojson(value: object) -> Markup:
    """A double-quoted YAML scalar: JSON's string, but for letters beyond 16 bits, as YAML pairs no surrogates."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False)
    return Markup("".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text))


@cache
def _environment(*, xml: bool) -> jinja2.Environment:
    import jinja2  # late: many commands describe nothing to libvirt

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_dir()),
        undefined=jinja2.StrictUndefined,
        autoescape=xml,
        keep_trailing_newline=True,
    )
    environment.filters["tojson"] = _tojson
    return environment


def _xml(template: str, /, **values: object) -> str:
    return _environment(xml=True).get_template(f"{template}.xml.j2").render(**values)


def metadata(value: Record) -> str:
    """A record as libvirt takes it when it is set on its own: libvirt puts it into the namespace."""
    return _xml("metadata", record=value, namespace="", prefix="")


def record_element(value: Record) -> str:
    """A record as it stands in a domain's XML."""
    return _xml("metadata", record=value, namespace=record.NAMESPACE, prefix=f"{record.PREFIX}:")


def homes(vm: str, found: Sequence[Home]) -> str:
    """A note of the hosts that have the VM of that UUID, as libvirt takes it."""
    return _xml("homes", vm=vm, homes=found)


def domain(view: DomainView) -> str:
    """The XML of a domain."""
    from markupsafe import Markup

    return _xml("domain", vm=view, metadata=Markup(record_element(view.record)))


def filesystem(view: ShareView) -> str:
    """The XML of one shared folder."""
    return _xml("filesystem", share=view)


def network(view: NetworkView) -> str:
    """The XML of a network."""
    return _xml("network", net=view)


def probe(view: ProbeView) -> str:
    """The XML of the accelerator's probe."""
    return _xml("probe", probe=view)


def container(view: ContainerView) -> str:
    """Libvirt XML of a container that lives to talk."""
    return _xml("container", container=view)


def junit(suites: Sequence[object]) -> str:
    """JUnit's XML of test suites: each with ``name``, ``made``, ``failures``, ``skipped`` and ``cases``."""
    return _xml("junit", suites=suites)


def report(view: ReportView) -> str:
    """A page of HTML that needs no other file."""
    return _environment(xml=True).get_template("report.html.j2").render(report=view)


def pool(name: str, path: str) -> str:
    """The XML of a directory pool."""
    return _xml("pool", name=name, path=path)


def storage_pool(view: PoolView) -> str:
    """The XML of a pool of any kind."""
    return _xml("storage-pool", pool=view)


def attached_disk(view: AttachedView) -> str:
    """The XML of one disk, to be plugged in."""
    return _xml("disk", disk=view)


def mirror(path: str, form: str) -> str:
    """The XML of the file that a running disk is copied to."""
    return _xml("mirror", path=path, format=form)


def snapshot(view: SnapshotView) -> str:
    """The XML of a snapshot to be taken."""
    return _xml("snapshot", snapshot=view)


def backup(view: BackupView) -> str:
    """The XML of a backup job."""
    return _xml("backup", backup=view)


def checkpoint(view: CheckpointView) -> str:
    """The XML of a checkpoint."""
    return _xml("checkpoint", checkpoint=view)


def volume(view: VolumeView) -> str:
    """The XML of a volume."""
    return _xml("volume", volume=view)


def user_data(view: SeedView) -> str:
    """NoCloud's user-data."""
    return _environment(xml=False).get_template("cloud-init/user-data.j2").render(seed=view)


def network_config(cards: Sequence[CardView]) -> str:
    """NoCloud's network-config, version 2."""
    return _environment(xml=False).get_template("cloud-init/network-config.j2").render(cards=cards)


def user_template(text: str, variables: Mapping[str, str], *, what: str) -> str:
    """A user's own template, ``what`` by name, with their variables. Raises SpecError for all that goes wrong in it."""
    import jinja2
    from jinja2.sandbox import SandboxedEnvironment  # late: few VMs are made with one

    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(text).render(variables)
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # An expression in it fails as Python's do; an include, for want of a folder to look in, is a TypeError.
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise SpecError(
            f"cannot fill in {what}{where}: {reason(error)}", hint="variables are given with --var NAME=VALUE"
        ) from error


def meta_data(view: SeedView) -> str:
    """NoCloud's meta-data."""
    return _environment(xml=False).get_template("cloud-init/meta-data.j2").render(seed=view)
