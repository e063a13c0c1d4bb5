"""What keeps VMs from running well on a host: found, explained, and mended where that is safe."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from vmctl import (
    accel,
    backup_list,
    config,
    deletion,
    disk_journal,
    disk_replace,
    elsewhere,
    forgotten,
    hosts,
    identity,
    image_users,
    images,
    kvm_device,
    layer_check,
    migrate_cards,
    snapshot_journal,
    snapshot_layers,
    unclear,
    unstarted,
    warming,
)
from vmctl.accel import Check
from vmctl.errors import Conflict, HostUnreachable, VmctlError, reason
from vmctl.events import Reporter, Step
from vmctl.hosts import Host, open_host
from vmctl.hypervisor import domain, network, storage
from vmctl.spec import AccelChoice
from vmctl.wait import wait_until
from vmctl.workspace import MEASURING

_DEVICE = Path("/dev/kvm")
_BACK_S = 60.0
_TOOLS = {"ssh-keygen": "openssh-client", "ssh": "openssh-client", "qemu-img": "qemu-utils"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: ``result`` is ok, warning, failed, mended or skipped."""

    name: str
    result: str
    detail: str
    mend: str = ""


def _from_check(check: Check) -> Finding:
    return Finding(check.name, check.result, check.detail, check.mend)


def _tools() -> list[Finding]:
    missing = {tool: package for tool, package in _TOOLS.items() if shutil.which(tool) is None}
    if not missing:
        return [Finding("tools", "ok", ", ".join(_TOOLS) + " are installed")]
    return [
        Finding("tools", "failed", f"{tool} is missing", f"apt-get install {package}")
        for tool, package in missing.items()
    ]


def _accelerator(host: Host) -> list[Finding]:
    decision = hosts.decide_accel(host, AccelChoice.AUTO, refresh=True)
    result = "ok" if decision.kvm.verdict == "works" else "warning"
    head = Finding("accelerator", result, f"{decision.chosen}: {decision.reason}", decision.mend)
    # Of the evidence only what is not well: without KVM everything works, slowly, so nothing is broken.
    rest = [
        Finding(f"kvm {check.name}", "warning", check.detail, check.mend)
        for check in decision.kvm.evidence
        if check.result in {"failed", "warning"}
    ]
    return [head, *rest]


def _capability_cache(host: Host, *, fix: bool, report: Reporter) -> list[Finding]:
    if not host.conn.local or not host.conn.qemu:
        return []
    user = hosts.qemu_user_name(host.facts.qemu_user)
    check = accel.capability_trap(qemu_user=user, device=_DEVICE)
    if check.result != "failed" or not fix:
        return [_from_check(check)]
    report(Step(kvm_device.mend(_DEVICE)))
    after = accel.capability_trap(qemu_user=user, device=_DEVICE)
    return [Finding(after.name, "mended" if after.result == "ok" else after.result, after.detail, after.mend)]


def stale_bridges(host: Host) -> list[str]:
    """Bridges of this machine that belong to a defined network which is not running: a crashed daemon left them."""
    if not host.conn.local:
        return []
    return [
        net.bridge
        for net in network.all_networks(host.conn)
        if not net.active and net.bridge and Path(f"/sys/class/net/{net.bridge}").is_dir()
    ]


def _dnsmasq_of(bridge: str) -> list[int]:
    """Process ids of libvirt's dnsmasq for the network on ``bridge``, found by its own configuration file."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if not words[0].endswith(b"dnsmasq"):
            continue
        for word in words[1:]:
            if word.startswith(b"--conf-file=/var/lib/libvirt/dnsmasq/"):
                try:
                    text = Path(os.fsdecode(word.partition(b"=")[2])).read_text()
                except OSError:
                    continue
                if f"interface={bridge}\n" in text:
                    found.append(int(path.parent.name))
    return found


def _networks(host: Host, *, fix: bool, report: Reporter) -> list[Finding]:
    stale = stale_bridges(host)
    if not stale:
        return [Finding("networks", "ok", "no network is held up by what a crash left")]
    found = []
    for bridge in stale:
        busy = sorted(port.name for port in Path(f"/sys/class/net/{bridge}/brif").glob("*"))
        detail = f"bridge {bridge} is there although its network is down: a daemon lost its state"
        if busy:
            found.append(
                Finding("networks", "failed", f"{detail}; {', '.join(busy)} still use it", "stop those guests first")
            )
        elif not fix:
            found.append(Finding("networks", "failed", detail, "vmctl doctor --fix removes the bridge and its dnsmasq"))
        else:
            found.append(_remove_bridge(bridge, detail, report))
    return found


def _remove_bridge(bridge: str, detail: str, report: Reporter) -> Finding:
    import subprocess

    for pid in _dnsmasq_of(bridge):
        report(Step(f"ending dnsmasq {pid} of {bridge}"))
        os.kill(pid, signal.SIGTERM)
    try:
        subprocess.run(["ip", "link", "delete", bridge], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(
            "networks",
            "failed",
            f"{detail}; it cannot be removed: {reason(error)}",
            f"as root: ip link delete {bridge}",
        )
    return Finding("networks", "mended", f"{detail}; removed")


def _cut_off(host: Host, *, fix: bool, report: Reporter) -> list[Finding]:
    """VMs whose creation was killed, and volumes no VM knows of."""
    facts = domain.all_facts(host.conn)
    halves = [f.name for f in facts if f.record is not None and f.record.creating]
    findings = []
    half_made = {name: f"the creation of {name} was cut off" for name in halves}
    half_made |= {
        name: f"{name} was booted to warm an image, and its maker is dead" for name in warming.abandoned(host)
    }
    for name, detail in half_made.items():
        if not fix:
            findings.append(Finding("creations", "failed", detail, f"vmctl delete {name}"))
            continue
        try:
            if name not in halves:
                deletion.delete(host, name, report)
            elif not deletion.clear(host, name, report):
                continue
            findings.append(Finding("creations", "mended", f"{detail}; deleted"))
        except Conflict as error:  # another vmctl is at it, or its process runs on: that must not keep the others
            findings.append(Finding("creations", "failed", error.message, error.hint))
    if not storage.pool_exists(host.conn, host.settings.pool):
        return findings or [Finding("creations", "ok", "no creation was cut off")]
    known = {o.volume for f in facts if f.record for o in f.record.owned}
    attached = image_users.needed(host).users  # the layers below disks and snapshots too
    folder = images.pool_path(host, host.settings.pool)
    storage.refresh(host.conn, host.settings.pool)
    names = storage.volume_names(host.conn, host.settings.pool)
    moved = identity.moved(names)
    orphans = [
        v
        for v in names
        if v not in moved
        and not any(v == k or v.startswith(f"{k}.") for k in known)
        and not {f"{folder}/{v}", os.path.realpath(f"{folder}/{v}")} & attached.keys()
        and not v.startswith((disk_replace.PREFIX, MEASURING))  # folders that work is done in: checks of their own
    ]
    # Of other hosts, on storage that both see.
    theirs = elsewhere.look(host, [f"{folder}/{one}" for one in orphans])
    orphans = [one for one in orphans if f"{folder}/{one}" not in theirs.users]
    if orphans:
        named = [f"{host.settings.pool}/{volume}" for volume in orphans]
        unasked = f", and not asked: {', '.join(theirs.unasked)}" if theirs.unasked else ""
        findings.append(
            Finding(
                "volumes",
                "warning",
                f"no VM knows of {', '.join(orphans)} in pool {host.settings.pool}{unasked}",
                f"look at each, then: {'; '.join(f'vmctl disk delete {shlex.quote(one)}' for one in named[:3])}",
            )
        )
    return findings or [Finding("creations", "ok", "no creation was cut off, no volume is orphaned")]


def _unclear(host: Host, *, fix: bool) -> list[Finding]:
    """Disks of which nobody can tell which of two files is the VM's: the user has to choose."""
    return [Finding("choices", "failed", unclear.told(one), one.mend) for one in unclear.find(host, fix=fix)]


def _disk_changes(host: Host, *, fix: bool, report: Reporter) -> list[Finding]:
    """Changes of disks that were killed in their middle, but of VMs for which there is a choice to be made."""
    but = {one.vm for one in unclear.find(host, fix=fix)}
    begun = disk_journal.unsettled(host, but=but)
    leftover = disk_replace.leftovers(host, disk_replace.PREFIX, clear=fix)
    if not begun and not leftover:
        return [Finding("disks", "ok", "no change of a disk was cut off")]
    if fix:
        disk_journal.settle_all(host, report, but=but)
    detail = "; ".join([*begun, *leftover])
    return [
        Finding(
            "disks",
            "mended" if fix else "failed",
            f"a change of a disk was cut off: {detail}",
            "" if fix else "vmctl doctor --fix: each disk is the file that its VM names, on all it needs; others go",
        )
    ]


def _measurements(host: Host, *, fix: bool) -> list[Finding]:
    """Folders of measurements that were killed."""
    if not (left := disk_replace.leftovers(host, MEASURING, clear=fix)):
        return []
    mend = "" if fix else "vmctl doctor --fix, or the next measurement, removes it"
    detail = f"a measurement was killed, and left {', '.join(left)}"
    return [Finding("measurements", "mended" if fix else "warning", detail, mend)]


def _snapshot_changes(host: Host, *, fix: bool, report: Reporter) -> list[Finding]:
    """Changes of snapshots that were cut off, and their files that nobody needs, but of VMs as above."""
    but = {one.vm for one in unclear.find(host, fix=fix)}
    begun = snapshot_journal.unsettled(host, but=but)
    if not begun:
        return [Finding("snapshots", "ok", "no change of a snapshot was cut off")]
    if fix:
        snapshot_layers.settle_all(host, report, but=but)
        begun = snapshot_journal.unsettled(host, but=but) or begun
    mended = fix and not snapshot_journal.unsettled(host, but=but)
    mend = "" if mended else "vmctl doctor --fix removes what nobody needs and merges what can be one"
    detail = f"a change of a snapshot was cut off: {'; '.join(begun)}"
    return [Finding("snapshots", "mended" if mended else "failed", detail, mend)]


def _astray(host: Host, *, fix: bool) -> list[Finding]:
    """Running VMs that write to other files than libvirt names, which the next start would not take."""
    found = []
    for one in layer_check.find(host):
        mended = fix and _named(host, one)
        detail = f"{one.vm} writes its disk {one.target} to {one.real}, and libvirt names {one.told}"
        busy = "when no other vmctl works on it: " if fix else ""
        mend = f"then: vmctl stop {one.vm}, and start it" if mended else f"{busy}vmctl doctor --fix, before it stops"
        found.append(Finding("layers", "mended" if mended else "failed", detail, mend))
    for path, (vm, base) in layer_check.newer_than_stopped(host).items():
        detail = f"a disk of {vm}, which is stopped, is {base}; {path} may be newer than {base}"
        look = f"look at both: vmctl disk map {shlex.quote(path)}"
        choose = f"vmctl doctor --fix --keep {shlex.quote(path)} lets it start from that"
        found.append(Finding("layers", "warning", detail, f"{look}; {choose}"))
    return found or [Finding("layers", "ok", "running VMs write to the files that libvirt names")]


def _named(host: Host, one: layer_check.Astray) -> bool:
    """Let the definition name what is written to, but of a VM that another vmctl works on; whether it does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(hosts.holding(host, one.vm))
        except Conflict:
            return False
        layer_check.mend(host, one)
        return True


def _forgotten(host: Host) -> list[Finding]:
    """VMs that run although libvirt calls them stopped."""
    found = [
        Finding(
            "processes",
            "failed",
            f"{name} runs in process {pid}, and libvirt, which was killed at a bad moment, calls it stopped",
            f"{forgotten.mend(pid)}; then vmctl start {name}",
        )
        for name, pid in forgotten.find(host)
    ]
    return found or [Finding("processes", "ok", "libvirt knows of every VM that runs")]


def _unstarted(host: Host, *, fix: bool, report: Reporter) -> list[Finding]:
    """VMs that libvirt takes for starting, without end. Its daemon is another one when they are mended."""
    names = unstarted.find(host)
    if not names:
        return []
    detail = f"libvirt died as it began to start {', '.join(names)}, and takes them for starting ever since"
    if not fix:
        return [Finding("starts", "failed", detail, "vmctl doctor --fix restarts libvirt without them; VMs run on")]
    report(Step(f"restarting libvirt without its notes on {', '.join(names)}"))
    try:
        unstarted.forget(host, names)
    except VmctlError as error:
        return [Finding("starts", "failed", f"{detail}; {error.message}", error.hint)]
    return [Finding("starts", "mended", f"{detail}; they are stopped now")]


def _cables(host: Host, *, fix: bool) -> list[Finding]:
    """VMs without network, for who pulled their cables as they came here was killed; not those that just come."""
    findings = []
    for name, _ in domain.identities(host.conn):
        if not migrate_cards.pulled(host, name):
            continue
        with suppress(Conflict), hosts.holding(host, name):
            if not (macs := migrate_cards.pulled(host, name)):
                continue  # it has just come
            if fix:
                migrate_cards.plug_in(host, name, macs)
            detail = f"{name} has no network: its move to this host was cut off, with its cable pulled"
            mend = "" if fix else "vmctl doctor --fix plugs it in"
            findings.append(Finding("cables", "mended" if fix else "failed", detail, mend))
    return findings


def _backups(host: Host, *, fix: bool, report: Reporter) -> list[Finding]:
    """What killed backups left in VMs and in the folder of backups."""
    root = config.backup_folder(None, host.settings, host.folders)
    left = backup_list.cut_off(host, root, report, fix=fix)
    if not left:
        return [Finding("backups", "ok", "no backup was cut off")]
    mend = "" if fix else "vmctl doctor --fix, or the VM's next backup"
    return [Finding("backups", "mended" if fix else "failed", f"a backup was cut off: {'; '.join(left)}", mend)]


def _reopened(connect: str | None, report: Reporter) -> Host | None:
    try:
        return open_host(connect, report=report)
    except HostUnreachable:
        return None


def examine(connect: str | None, *, fix: bool, report: Reporter, keep: Collection[str] = ()) -> tuple[Finding, ...]:
    """All checks, on the host that ``connect`` names; without an answer from it, the ones that need none.

    ``keep``: files of which VMs may have gone on in another, and which they are to have; raises as unclear.keep.
    """
    findings = _tools()
    try:
        host = open_host(connect, report=report)
        findings += (starts := _unstarted(host, fix=fix, report=report))
        if any(one.result == "mended" for one in starts):
            host.conn.close()
            host = wait_until(lambda: _reopened(connect, report), what="libvirt does not answer", timeout_s=_BACK_S)
    except VmctlError as error:
        return (*findings, Finding("libvirt", "failed", error.message, error.hint))
    with host:
        chosen = unclear.keep(host, keep, report) if keep else ()
        findings.append(Finding("libvirt", "ok", f"{(host.entry and host.entry.name) or host.conn.uri} answers"))
        findings += [Finding("choices", "mended", line) for line in chosen]
        checks: list[tuple[str, Callable[[], list[Finding]]]] = [
            ("accelerator", lambda: _accelerator(host)),
            ("capability-cache", lambda: _capability_cache(host, fix=fix, report=report)),
            ("networks", lambda: _networks(host, fix=fix, report=report) if not host.conn.session else []),
            ("creations", lambda: _cut_off(host, fix=fix, report=report)),
            ("choices", lambda: _unclear(host, fix=fix)),
            ("disks", lambda: _disk_changes(host, fix=fix, report=report)),
            ("measurements", lambda: _measurements(host, fix=fix)),
            ("snapshots", lambda: _snapshot_changes(host, fix=fix, report=report)),
            ("processes", lambda: _forgotten(host)),
            ("layers", lambda: _astray(host, fix=fix)),
            ("cables", lambda: _cables(host, fix=fix)),
            ("backups", lambda: _backups(host, fix=fix, report=report)),
        ]
        for name, check in checks:
            try:
                findings += check()
            except VmctlError as error:  # one check that cannot be made must not hide the others
                findings.append(Finding(name, "failed", error.message, error.hint))
    return tuple(findings)
