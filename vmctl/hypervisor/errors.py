"""libvirt's errors, told apart by code and domain (never by text), as vmctl's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import libvirt

from vmctl.errors import (
    Conflict,
    HostUnreachable,
    HypervisorError,
    NotFound,
    SpecError,
    Unsupported,
    VmctlError,
    WaitTimeout,
    WrongState,
)

_ABSENT = {
    libvirt.VIR_ERR_NO_DOMAIN,
    libvirt.VIR_ERR_NO_NETWORK,
    libvirt.VIR_ERR_NO_STORAGE_POOL,
    libvirt.VIR_ERR_NO_STORAGE_VOL,
    libvirt.VIR_ERR_NO_DOMAIN_METADATA,
}
_TAKEN = {
    libvirt.VIR_ERR_DOM_EXIST,
    libvirt.VIR_ERR_NETWORK_EXIST,
    libvirt.VIR_ERR_STORAGE_VOL_EXIST,
}
_UNSUPPORTED = {
    libvirt.VIR_ERR_NO_SUPPORT,
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED,
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,
}
_UNREACHABLE = {
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_AUTH_FAILED,
    libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    libvirt.VIR_ERR_AUTH_CANCELLED,
    libvirt.VIR_ERR_SSH,
    libvirt.VIR_ERR_LIBSSH,
}
_TRANSPORT = {libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE, libvirt.VIR_FROM_NET}


# What the system told libvirt, which passes its number on, and what to do about it.
_OF_THE_SYSTEM = {
    errno.ENOENT: "what it names is not there, or not any more; vmctl disk list shows the files of each VM",
    errno.ENOTDIR: "a part of that path is no folder",
    errno.EISDIR: "that is a folder",
    errno.EACCES: "libvirt, or the user that QEMU runs as, may not reach it",
    errno.EPERM: "libvirt, or the user that QEMU runs as, may not do that there",
    errno.EROFS: "that file system can only be read",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "that file system has no files so large",
    errno.EIO: "that disk is ill: dmesg, smartctl",
}


def translated(error: libvirt.libvirtError, doing: str) -> VmctlError:
    """The vmctl error for ``error``, which came while ``doing`` ("start VM web1")."""
    code, domain = error.get_error_code(), error.get_error_domain()
    reason = (error.get_error_message() or "no reason given").strip()
    text = f"cannot {doing}: {reason}".replace("\r\n", "; ")  # between what OpenSSH says
    if code in _ABSENT:
        return NotFound(text, hint="vmctl disk pool list" if code == libvirt.VIR_ERR_NO_STORAGE_POOL else "")
    if code in _TAKEN:
        return Conflict(text)
    if code == libvirt.VIR_ERR_OPERATION_INVALID:
        pool = domain == libvirt.VIR_FROM_STORAGE
        return WrongState(
            text, hint="vmctl disk pool list shows which are active; virsh pool-start starts one" if pool else ""
        )
    if code in _UNSUPPORTED:
        return Unsupported(text)
    if code in _UNREACHABLE or (
        domain in _TRANSPORT
        and code in {libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_INTERNAL_ERROR}
    ):
        return HostUnreachable(text)
    if code in {libvirt.VIR_ERR_XML_INVALID_SCHEMA, libvirt.VIR_ERR_XML_ERROR}:
        return SpecError(text)
    if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
        return WaitTimeout(text, after_s=0.0, hint="is qemu-guest-agent running in the guest?")
    held = code == libvirt.VIR_ERR_OPERATION_TIMEOUT  # of the wait for whoever works on it
    hint = "somebody works on it; if that has no end: vmctl doctor" if held else ""
    if code == libvirt.VIR_ERR_SYSTEM_ERROR:
        hint = _OF_THE_SYSTEM.get(error.get_int1() or 0, "")
    return HypervisorError(text, code=code, domain=domain, hint=hint)


@contextmanager
def calling(doing: str) -> Iterator[None]:
    """Turn a libvirt error inside the block into vmctl's, naming what was being done."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise translated(error, doing) from error
