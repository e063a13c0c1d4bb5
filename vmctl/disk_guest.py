"""What a guest makes of its disks, asked and told through its agent: which device one is, and growing what is on it."""

from __future__ import annotations

from vmctl import agent
from vmctl.errors import GuestCommandFailed, VmctlError, WaitTimeout
from vmctl.hosts import Host
from vmctl.hypervisor import agent as channel
from vmctl.hypervisor.agent import AgentState
from vmctl.wait import wait_until

_LOOK_S = 60.0  # a guest that boots under emulation on a busy host takes its time
SEE_S = 20.0
_GROW_S = 600.0

# A disk is known by the serial vmctl gave it: virtio-blk and NVMe show it in a file, SCSI and SATA in page 0x80 of the
# vital product data, behind four bytes.
_FIND = r"""
for d in /sys/block/*; do
    for s in "$(cat "$d/serial" 2>/dev/null)" "$(cat "$d/device/serial" 2>/dev/null)" \
        "$(tail -c +5 "$d/device/vpd_pg80" 2>/dev/null | tr -d ' \000')"; do
        [ "$s" != "$1" ] || { echo "${d##*/}"; exit 0; }
    done
done
"""

# The last partition of the disk, or the disk itself, and what is on it.
_LAST = r"""
export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C
dev=$1
last= end=0
for p in "/sys/block/$dev/$dev"*; do
    [ -f "$p/partition" ] || continue
    at=$(cat "$p/start")
    [ "$at" -lt "$end" ] || { end=$at last=${p##*/}; }
done
on=/dev/$dev
[ -z "$last" ] || on=/dev/$last number=$(cat "/sys/block/$dev/$last/partition")
mount=$(awk -v d="$on" '$1 == d { print $2; exit }' /proc/mounts)
type=$(awk -v d="$on" '$1 == d { print $3; exit }' /proc/mounts)
if [ -z "$mount" ] && [ "$(awk '$2 == "/" { print $1 }' /proc/mounts | tail -n 1)" = /dev/root ]; then
    [ "$(mountpoint -d / 2>/dev/null)" != "$(cat "/sys/class/block/${on#/dev/}/dev")" ] || mount=/
fi
if [ -z "$type" ] && command -v blkid >/dev/null; then
    type=$(blkid "$on" | sed -n 's/.* TYPE="\([^"]*\)".*/\1/p')
fi
[ "$type" ] || [ "$(dd if="$on" bs=1 skip=1080 count=2 2>/dev/null | od -An -tx1 | tr -d ' ')" != 53ef ] || type=ext4
case $type in
ext2 | ext3 | ext4) ;;
xfs | btrfs) [ "$mount" ] || { echo "$on has to be mounted to grow its $type" >&2; exit 1; } ;;
'') echo "no file system is known on $on" >&2; exit 1 ;;
*) echo "vmctl does not grow $type, which is on $on" >&2; exit 1 ;;
esac
if [ "$last" ] && ! command -v growpart >/dev/null && ! command -v sfdisk >/dev/null; then
    echo "neither growpart nor sfdisk is in the guest to grow partition $number of $dev" >&2; exit 1
fi
"""
_LOOK = _LAST + 'echo "$type on $on"'

# From the outside in: the kernel's size of the disk, its last partition, the file system on it.
_GROW = (
    _LAST
    + r"""
sectors=$2
i=0
while [ "$(cat "/sys/block/$dev/size")" -lt "$sectors" ]; do
    i=$((i + 1)); [ $i -lt 100 ] || { echo "the guest does not see that $dev has grown" >&2; exit 1; }
    for r in "/sys/block/$dev/device/rescan"; do [ ! -w "$r" ] || echo 1 >"$r"; done
    sleep 0.1 2>/dev/null || sleep 1
done
if [ "$last" ]; then
    if command -v growpart >/dev/null; then
        growpart "/dev/$dev" "$number" >&2 || [ $? = 1 ]
    else
        echo ', +' | sfdisk --no-reread --no-tell-kernel -q -N "$number" "/dev/$dev" >&2 && partx -u "/dev/$dev" >&2
    fi || exit 1
fi
case $type in
ext2 | ext3 | ext4)
    if [ -z "$mount" ]; then e2fsck -f -p "$on" >&2 || [ $? = 1 ] || exit 1; fi
    resize2fs "$on" >&2 || exit 1 ;;
xfs) xfs_growfs "$mount" >&2 || exit 1 ;;
btrfs) btrfs filesystem resize max "$mount" >&2 || exit 1 ;;
esac
echo "$type on $on"
"""
)


def _run(host: Host, name: str, script: str, words: tuple[str, ...], timeout_s: float) -> tuple[int, str, str]:
    out, err = bytearray(), bytearray()
    argv = ["/bin/sh", "-c", script, "sh", *words]
    code = agent.execute(host, name, argv, stdin=None, out=out.extend, err=err.extend, timeout_s=timeout_s)
    return code, out.decode("utf-8", "replace").strip(), err.decode("utf-8", "replace").strip()


def answers(host: Host, name: str) -> bool:
    """Whether there is an agent to ask."""
    return channel.state(host.conn, name) is AgentState.CONNECTED


def device(host: Host, name: str, serial: str) -> str:
    """The guest's name (``vdc``) of the disk with that serial; "" when it has none."""
    _, out, _ = _run(host, name, _FIND, (serial,), _LOOK_S)
    return out


def seen(host: Host, name: str, serial: str, *, timeout_s: float) -> str:
    """Wait until the guest has the disk, and return its name there; "" when it does not come, or cannot be asked."""
    if not serial or not answers(host, name):
        return ""
    try:
        return wait_until(
            lambda: device(host, name, serial) or None, what=f"disk {serial}", timeout_s=timeout_s, interval_s=0.2
        )
    except (VmctlError, WaitTimeout):
        return ""


def require_growable(host: Host, name: str, serial: str) -> None:
    """Raise GuestCommandFailed unless there is a file system on a disk that its guest can grow. Changes nothing."""
    _told(host, name, serial, _LOOK, (), _LOOK_S)


def grow(host: Host, name: str, serial: str, size: int) -> str:
    """Grow the last partition and the file system on a disk that has grown to ``size`` bytes; says which it was.

    Nothing is lost when it fails in the middle: each step only adds room, and doing it again goes on.
    """
    return _told(host, name, serial, _GROW, (str(size // 512),), _GROW_S)


def _told(host: Host, name: str, serial: str, script: str, words: tuple[str, ...], timeout_s: float) -> str:
    dev = device(host, name, serial)
    if not dev:
        raise GuestCommandFailed(f"cannot grow what is on disk {serial} of VM {name}: its guest does not see the disk")
    code, out, err = _run(host, name, script, (dev, *words), timeout_s)
    if code:
        said = err.splitlines() or ["no reason given"]
        raise GuestCommandFailed(f"cannot grow what is on disk {serial} of VM {name}: {said[-1]}", evidence=said)
    return out
