"""Folders of the host in a guest: by virtiofs where that can be, else by 9p.

9p needs a guest whose kernel has it. Debian's cloud kernel, the micro image's too, is built without (CONFIG_NET_9P is
not set); Debian's general kernel, that of debian-12, has it as modules.

Read-only is kept by the host. libvirt tells virtiofsd so from 11.0 on; before that a script of ours in virtiofsd's
place gives it a view of the host in which the folder is mounted read-only.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import shlex
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from vmctl import guest, images, render, resolve
from vmctl.choices import ShareDriver
from vmctl.errors import Conflict, GuestCommandFailed, NotFound, SpecError, Unsupported, VmctlError
from vmctl.events import Reporter, Step, Warned
from vmctl.hosts import Host, holding, qemu_user_name
from vmctl.hypervisor import capabilities, devices, domain
from vmctl.hypervisor.devices import SharedFolder
from vmctl.hypervisor.domain import Domain, State
from vmctl.manifest import Manifest
from vmctl.resolve import ShareWay
from vmctl.resources import readonly_virtiofsd
from vmctl.spec import Share, share_problems
from vmctl.wait import wait_until

_UNPLUG_S = 10.0
_PROFILES = Path("/sys/kernel/security/apparmor/profiles")
_DAEMONS = Path("/usr/share/qemu/vhost-user")  # docs/interop/vhost-user.json in QEMU: who offers which daemon


def way(host: Host, share: Share, manifest: Manifest | None) -> ShareWay:
    """How this folder can be shared there. Raises SpecError, NotFound or Unsupported when it cannot be at all.

    ``manifest`` is of the image in the guest, None where that is not known.
    """
    if found := share_problems(share):
        raise SpecError(f"cannot share {share.folder}", problems=found)
    if host.conn.local and not Path(share.folder).is_dir():
        raise NotFound(f"cannot share {share.folder}: there is no such folder on {host.name}")
    virtiofs = host.conn.qemu and capabilities.offers_virtiofs(host.conn) and (not host.conn.local or _daemon_there())
    if virtiofs and (not share.readonly or capabilities.virtiofs_can_be_readonly(host.conn)):
        return ShareWay(ShareDriver.VIRTIOFS)
    if virtiofs and host.conn.local and not _confined():
        return ShareWay(ShareDriver.VIRTIOFS, str(readonly_virtiofsd()))
    if manifest is not None and manifest.first_boot == "micro":
        raise Unsupported(
            f"cannot share {share.folder}: there is no {'read-only ' if share.readonly else ''}virtiofs on that host,"
            f" and no 9p in the kernel of image {manifest.name}",
            hint="a guest of image debian-12 takes it by 9p",
        )
    # virtiofsd runs as root; 9p is QEMU's own, and QEMU sees what its user may see.
    user = qemu_user_name(host.facts.qemu_user) if host.conn.qemu and host.conn.local else None
    if user is not None and (barred := barred_at(Path(share.folder), user)):
        raise Unsupported(
            f"cannot share {share.folder} by 9p: QEMU runs as {user}, who may not look into {barred}",
            hint=f"chmod o+rx {shlex.quote(str(barred))}, or share another folder",
        )
    return ShareWay(ShareDriver.P9)


def _confined() -> bool:
    """Whether AppArmor keeps libvirtd from starting programs out of vmctl's folder."""
    try:
        return any("virt" in line and "(enforce)" in line for line in _PROFILES.read_text().splitlines())
    except FileNotFoundError:
        return False
    except OSError:
        return True  # AppArmor is there, and only root may look


def _daemon_there() -> bool:
    for path in sorted(_DAEMONS.glob("*.json")):
        try:
            told = json.loads(path.read_text())
            if told.get("type") == "fs" and os.access(told.get("binary", ""), os.X_OK):
                return True
        except (OSError, ValueError, AttributeError):
            continue  # another package's broken file
    return False


def barred_at(folder: Path, user: str) -> Path | None:
    """The first folder on the way that ``user`` may not pass, or read if it is the last; None when all is open."""
    entry = pwd.getpwnam(user)
    groups = {entry.pw_gid, *(g.gr_gid for g in grp.getgrall() if user in g.gr_mem)}
    if entry.pw_uid == 0:
        return None
    for path in (*reversed(folder.resolve().parents), folder.resolve()):
        found = path.stat()
        shift = 6 if found.st_uid == entry.pw_uid else 3 if found.st_gid in groups else 0
        needed = stat.S_IXOTH | (stat.S_IROTH if path == folder.resolve() else 0)
        if (found.st_mode >> shift) & needed != needed:
            return path
    return None


def fstab_command(share: Share, how: ShareDriver) -> str:
    """A shell command for the guest that makes it mount the folder at each boot; doing it again changes nothing."""
    tag = resolve.share_tag(share.mount)
    options = "nofail" + (",ro" if share.readonly else "")
    options += ",trans=virtio,version=9p2000.L,msize=262144" if how is ShareDriver.P9 else ""
    place = "".join(f"\\{ord(c):03o}" if c in " \t\\#" else c for c in share.mount)  # fstab(5)
    line = shlex.quote(f"{tag} {place} {how} {options} 0 0")
    return f"mkdir -p {shlex.quote(share.mount)} && {_forget(tag)} && printf '%s\\n' {line} >>/etc/fstab"


def mount_command(share: Share, how: ShareDriver) -> str:
    """The same, and it is mounted at once."""
    tag = resolve.share_tag(share.mount)
    mount = f"{{ grep -q '^{tag} ' /proc/mounts || mount {shlex.quote(share.mount)}; }}"
    return f"{fstab_command(share, how)} && {mount}"


def _forget(tag: str) -> str:
    """A shell command that takes a share out of fstab, which keeps its owner and mode, and is never half written."""
    return (
        f"{{ ! grep -q '^{tag} ' /etc/fstab || {{ cp -p /etc/fstab /etc/fstab.new && "
        f"{{ grep -v '^{tag} ' /etc/fstab >/etc/fstab.new; [ $? -le 1 ]; }} && mv /etc/fstab.new /etc/fstab; }}; }}"
    )


def unmount_command(mount: str, tag: str) -> str:
    """A shell command for the guest that unmounts a share and forgets it; fails where somebody still uses it."""
    mounted = f"grep -q '^{tag} ' /proc/mounts"
    return f"{{ ! {mounted} || umount {shlex.quote(mount)}; }} && ! {mounted} && {_forget(tag)}"


@dataclass(frozen=True, slots=True)
class Shared:
    """What became of a share: ``there`` says from when the guest has it, ``command`` mounts it then.

    ``done``: that command went through in the guest, or the part of it that makes the guest do it by itself at boot.
    """

    name: str
    driver: ShareDriver
    tag: str
    there: str
    done: bool
    command: str


def share(host: Host, name: str, wanted: Share, report: Reporter) -> Shared:
    """Share a folder with a VM that exists: at once where it can be plugged in, else from its next start on."""
    with holding(host, name, timeout_s=30.0):
        vm = domain.find(host.conn, name)
        domain.require_persistent(vm, "share a folder with")
        chosen = way(host, wanted, _manifest(host, vm))
        how, view = chosen.driver, resolve.share_view(wanted, chosen)
        here = devices.shares(host.conn, name)
        if view.tag in {one.tag for one in here}:
            raise Conflict(f"cannot share {wanted.folder}: VM {name} has a share at {wanted.mount} already")
        live = vm.active and how is ShareDriver.VIRTIOFS and devices.takes_virtiofs(host.conn, name)
        xml = render.filesystem(view)
        if live:
            devices.attach(host.conn, name, xml, live=True)
        try:
            if how is ShareDriver.VIRTIOFS:
                devices.share_memory(host.conn, name)
            devices.attach(host.conn, name, xml, live=False)
            _remember(host, vm, {view.tag: wanted.mount})
        except BaseException:
            if live:
                devices.detach(host.conn, name, xml)
            raise
        report(Step(f"{wanted.folder} is shared with {name} by {how}"))
    there = "now" if live else "its next stop and start" if vm.active else "its next start"
    command = mount_command(wanted, how)
    done = _told(host, vm, command if live else fstab_command(wanted, how), report)
    return Shared(name, how, view.tag, there, done, command)


def _manifest(host: Host, vm: Domain) -> Manifest | None:
    """What the guest was made from, as far as that is still known."""
    record = vm.facts.record
    try:
        return images.find(host, f"{record.image}-{record.image_digest}").manifest if record else None
    except VmctlError:
        return None


def _remember(host: Host, vm: Domain, add: dict[str, str], forget: str = "") -> None:
    """Write into the VM's record where the guest has a share; a VM that is not vmctl's has none."""
    record = vm.facts.record
    if record is not None:
        kept = {tag: mount for tag, mount in record.mounts.items() if tag != forget}
        domain.set_record(host.conn, vm.name, render.metadata(replace(record, mounts=kept | add)))


def _told(host: Host, vm: Domain, command: str, report: Reporter) -> bool:
    """Whether the guest did as told; one that cannot be reached is no error: a person can do it there."""
    if vm.state is not State.RUNNING:
        return False
    try:
        code, words = _as_root(host, vm.name, command)
    except VmctlError as error:
        report(Warned(f"it could not be mounted in the guest: {error.message}"))
        return False
    if code:
        report(Warned(f"it could not be mounted in the guest: {words}"))
    return code == 0


def _as_root(host: Host, name: str, command: str) -> tuple[int, str]:
    """Exit code and words of a shell command in the guest, whose login may be an ordinary user's."""
    words = bytearray()
    script = '[ "$(id -u)" = 0 ] && exec sh -c "$1"; exec sudo -n sh -c "$1"'
    code = guest.execute(
        host, name, ["sh", "-c", script, "sh", command], stdin=None, out=words.extend, err=words.extend
    )
    return code, words.decode("utf-8", "replace").strip()


@dataclass(frozen=True, slots=True)
class Unshared:
    """What became of a share that was taken away: ``gone`` says from when, ``command`` makes the guest forget it.

    ``done``: that command went through in the guest.
    """

    name: str
    folder: str
    tag: str
    gone: str
    done: bool
    command: str


def unshare(host: Host, name: str, mount: str, report: Reporter) -> Unshared:
    """Take the folder that is at ``mount`` in the guest away from a VM: at once where it can be unplugged.

    Raises NotFound, and GuestCommandFailed where somebody in the guest still uses it: then nothing is changed.
    """
    with holding(host, name, timeout_s=30.0):
        vm = domain.find(host.conn, name)
        domain.require_persistent(vm, "take a share from")
        tag = resolve.share_tag(mount)
        later = [one for one in devices.shares(host.conn, name) if one.tag == tag]
        now = [one for one in devices.shares(host.conn, name, live=True) if one.tag == tag] if vm.active else []
        if not (later or now):
            raise NotFound(f"cannot unshare {mount}: VM {name} has no share there", hint=_shares_hint(host, vm))
        command = unmount_command(mount, tag)
        done = _forgotten(host, vm, mount, command, report)
        for one in later:
            devices.detach(host.conn, name, one.xml, live=False)
        _remember(host, vm, {}, forget=tag)
        # Never under a guest that may have it mounted. QEMU can unplug no 9p device.
        left = bool(now) and not (done and all(one.virtiofs and _unplugged(host, name, one, report) for one in now))
    gone = "its next stop and start" if left else "now"
    report(Step(f"{(later or now)[0].folder} is no longer shared with {name}"))
    return Unshared(name, (later or now)[0].folder, tag, gone, done, command)


def _shares_hint(host: Host, vm: Domain) -> str:
    mounts = vm.facts.record.mounts if vm.facts.record else {}  # where a VM that is not vmctl's has them, nothing tells
    found = (f"{mounts.get(one.tag, '?')} ({one.folder} here)" for one in devices.shares(host.conn, vm.name))
    folders = ", ".join(found)
    return f"it has these: {folders}" if folders else ""


def _forgotten(host: Host, vm: Domain, mount: str, command: str, report: Reporter) -> bool:
    """Whether the guest has unmounted and forgotten it. Raises GuestCommandFailed when it says no."""
    if vm.state is not State.RUNNING:
        return False
    try:
        code, words = _as_root(host, vm.name, command)
    except VmctlError as error:
        report(Warned(f"it could not be unmounted in the guest: {error.message}"))
        return False
    if code:
        raise GuestCommandFailed(
            f"cannot unshare {mount}: VM {vm.name} does not let go of it",
            evidence=words.splitlines(),
            hint="end what uses it there, or stop the VM first",
        )
    return True


def _unplugged(host: Host, name: str, one: SharedFolder, report: Reporter) -> bool:
    """Whether the guest has given the device back in time."""

    def gone() -> bool:
        return all(share.tag != one.tag for share in devices.shares(host.conn, name, live=True))

    try:
        devices.detach(host.conn, name, one.xml)
        wait_until(gone, what="the guest to give the device back", timeout_s=_UNPLUG_S, interval_s=0.1)
    except VmctlError as error:
        report(Warned(f"it stays plugged in until the next stop: {error.message}"))
        return False
    return True
