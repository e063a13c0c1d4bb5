"""QEMU processes of VMs that libvirt calls stopped.

libvirt 9.0 that is killed in the moment in which a commit is switched over has noted the VM in a file that it cannot
read itself ("unknown mirror job type ''"): when it is back, it knows nothing of the QEMU that goes on.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from vmctl.errors import Conflict, WaitTimeout
from vmctl.hosts import Host
from vmctl.hypervisor import domain, inventory
from vmctl.wait import wait_until

_ENDING_S = 2.0  # one that has just been stopped may not be gone yet


def processes(host: Host) -> dict[str, int]:
    """Process ids of this host's QEMUs by their VMs' UUIDs, as far as they can be seen from here."""
    found: dict[str, int] = {}
    if not (host.conn.local and host.conn.qemu):
        return found
    base = Path.home() / ".config/libvirt/qemu/lib" if host.conn.session else Path("/var/lib/libvirt/qemu")
    mark = f"{base}/domain-".encode()  # in the path of its key: the host's other libvirts have other folders
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError, ValueError):
            words = path.read_bytes().split(b"\0")
            if b"-uuid" in words and any(mark in word for word in words):
                found[words[words.index(b"-uuid") + 1].decode()] = int(path.parent.name)
    return found


def opened(host: Host) -> frozenset[str]:
    """All files that this host's QEMUs have open, as far as they can be seen from here."""
    return frozenset(path for pid in processes(host).values() for path in opened_by(pid))


def opened_by(pid: int) -> frozenset[str]:
    """The files that a process has open; none where it cannot be looked into."""
    try:
        return frozenset(str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return frozenset()


def mark(host: Host, name: str) -> str:
    """What tells the QEMU of a running VM from every other that there was or will be; "" where it cannot be seen."""
    pid = inventory.process_id(host.conn, name)
    try:
        begun = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {pid} {begun}"
    except OSError:
        return ""


def started_since(host: Host, name: str, was: str) -> bool:
    """Whether a running VM's QEMU is another one than the one that had this mark; not where either is unknown."""
    now = mark(host, name) if was else ""
    return bool(now) and now != was


def find(host: Host) -> tuple[tuple[str, int], ...]:
    """Names of VMs that libvirt calls stopped and whose QEMU runs, each with its process id."""
    running = processes(host)
    named = [(name, running[uuid]) for name, uuid in domain.identities(host.conn) if uuid in running]
    found = [one for one in named if not domain.find(host.conn, one[0]).active]
    return tuple(one for one in found if _stays(host, one[0], one[1]))


def _stays(host: Host, name: str, pid: int) -> bool:
    def gone() -> bool:
        vm = domain.find_or_none(host.conn, name)
        return vm is None or vm.active or processes(host).get(vm.uuid) != pid

    try:
        wait_until(gone, what="", timeout_s=_ENDING_S, interval_s=0.05)
    except WaitTimeout:
        return True
    return False


def require_none(host: Host, name: str, uuid: str, doing: str) -> None:
    """Raise Conflict when a VM that libvirt calls stopped runs: two would write its disks."""
    pid = processes(host).get(uuid)
    if pid is not None and _stays(host, name, pid):
        raise Conflict(
            f"cannot {doing}: VM {name} runs, in process {pid}, and libvirt has forgotten it", hint=mend(pid)
        )


def mend(pid: int) -> str:
    """What to do about one."""
    return f"shut it down from inside; or, as pulling the plug would: kill {pid}"
