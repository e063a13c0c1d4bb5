"""KVM's device node: who may open it, whether it makes VMs, and how to mend it."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import stat
from pathlib import Path

from vmctl.errors import VmctlError

DEVICE = Path("/dev/kvm")
GROUP = "kvm"
_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_API_VERSION = 12  # the only one since Linux 2.6.22


def cpu_flag() -> str:
    """The flag of hardware virtualization in /proc/cpuinfo; "" without one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return next((flag for flag in ("vmx", "svm") if flag in flags), "")


def device_text(device: Path) -> tuple[bool, str]:
    """Whether the device is there, and what to say of it."""
    try:
        info = device.stat()
    except OSError as error:
        return False, f"{device}: {error.strerror}"
    if not stat.S_ISCHR(info.st_mode):
        return False, f"{device} is no character device"
    return True, f"{device}: owner {info.st_uid}:{info.st_gid}, mode {stat.S_IMODE(info.st_mode):04o}"


def open_errno(device: Path) -> int:
    """The errno of opening it ourselves; 0 for none."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _open_as(user: str, device: Path) -> int:
    """The errno of opening ``device`` as ``user`` with all of the user's groups, by a child that becomes that user."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return errno.ENOENT
    child = os.fork()
    if child == 0:
        code = errno.EPERM
        try:
            os.initgroups(user, entry.pw_gid)
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
            code = open_errno(device)
        finally:
            os._exit(min(code, 255))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _allowed_by_mode(user: str, device: Path) -> int:
    """The same from owner, group and mode, where we may not become that user."""
    info = device.stat()
    try:
        entry = pwd.getpwnam(user)
        groups = os.getgrouplist(user, entry.pw_gid)
    except KeyError:
        return errno.ENOENT
    if entry.pw_uid == info.st_uid:
        wanted = stat.S_IRUSR | stat.S_IWUSR
    elif info.st_gid in groups:
        wanted = stat.S_IRGRP | stat.S_IWGRP
    else:
        wanted = stat.S_IROTH | stat.S_IWOTH
    return 0 if info.st_mode & wanted == wanted else errno.EACCES


def open_as_qemu(user: str, device: Path) -> int:
    """The errno that ``user`` meets on opening ``device``; 0 for none."""
    return _open_as(user, device) if os.geteuid() == 0 else _allowed_by_mode(user, device)


def create_vm(device: Path) -> int:
    """The errno of making an empty VM; 0 for none."""
    try:
        handle = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        if fcntl.ioctl(handle, _KVM_GET_API_VERSION, 0) != _API_VERSION:
            return errno.EPROTO
        os.close(fcntl.ioctl(handle, _KVM_CREATE_VM, 0))
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        os.close(handle)
    return 0


def mend(device: Path = DEVICE) -> str:
    """Give the device to group kvm, as udev does where it runs; returns what was done. Raises VmctlError."""
    import grp

    try:
        group = grp.getgrnam(GROUP)
    except KeyError as error:
        raise VmctlError(f"cannot mend {device}: there is no group {GROUP}", hint="install qemu-system-x86") from error
    try:
        os.chown(device, -1, group.gr_gid)
        device.chmod(0o660)
    except OSError as error:
        raise VmctlError(
            f"cannot mend {device}: {error.strerror}", hint="vmctl doctor --fix needs root for this"
        ) from error
    return f"{device} belongs to group {GROUP} now, with mode 0660"
