"""What a guest that goes on from another one's memory is told about who it is now. Pure.

It is a shell script, for any Linux guest with an agent; it is the agent's child, has no network, and knows of programs
only sh and what every system has. The images made here have a program for it, which is faster and told the same.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from vmctl.errors import VmctlError

PROGRAM = "/usr/sbin/vmctl-renew"
CHANNEL = "vmctl.renewal"  # the virtio-serial port at which it waits
DONE = "done"  # its answer there


@dataclass(frozen=True, slots=True)
class Renewal:
    """Who the guest is from now on. ``macs`` from the old ones; ``addresses`` (IP/PREFIX) and gateways by new MAC.

    ``entropy`` goes into the kernel's random numbers; ``now`` is the time, in seconds since the epoch.
    """

    hostname: str
    machine_id: str
    host_key_private: str
    host_key_public: str
    entropy: bytes
    now: float
    macs: Mapping[str, str] = field(default_factory=dict)
    addresses: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def dropbear_key(private: str) -> bytes:
    """An OpenSSH ed25519 private key without a passphrase as dropbear keeps it. Raises VmctlError."""
    lines = [line for line in private.splitlines() if line and not line.startswith("-----")]
    try:
        blob = base64.b64decode("".join(lines), validate=True)
    except binascii.Error as error:
        raise VmctlError("cannot read the host key: it is not OpenSSH's") from error
    magic = b"openssh-key-v1\0"
    if not blob.startswith(magic):
        raise VmctlError("cannot read the host key: it is not OpenSSH's")
    fields = _strings(blob[len(magic) :], 3)  # cipher, key derivation, its options
    rest = fields[3][4:]
    _public, private_part, _ = _strings(rest, 2)
    kind, _, pair, _ = _strings(private_part[8:], 3)
    if fields[0] != b"none" or kind != b"ssh-ed25519" or len(pair) != 64:
        raise VmctlError("cannot read the host key: it is no plain ed25519 key")
    return struct.pack(">I", len(kind)) + kind + struct.pack(">I", len(pair)) + pair


def _strings(data: bytes, count: int) -> list[bytes]:
    """``count`` length-prefixed strings and what is behind them."""
    found = []
    for _ in range(count):
        if len(data) < 4 or len(data) < 4 + (length := struct.unpack_from(">I", data)[0]):
            raise VmctlError("cannot read the host key: it is cut off")
        found.append(data[4 : 4 + length])
        data = data[4 + length :]
    return [*found, data]


def _octal(data: bytes) -> str:
    return "".join(f"\\{byte:03o}" for byte in data)


_SCRIPT = r"""
umask 022
n='@NAME@' id=@MACHINE_ID@
printf '@ENTROPY@' >/dev/urandom 2>/dev/null
put() { [ -e "$1" ] && [ ! -L "$1" ] && printf '%s\n' "$2" >"$1"; }
[ -d /sys/bus/acpi/devices/QEMUVGID:00 ] && [ -d /sys/bus/acpi/drivers/vmgenid ] ||
  perl -e 'open(F, "+<", "/dev/urandom") && ioctl(F, 0x5207, 0)' 2>/dev/null ||
  python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "wb"), 0x5207)' 2>/dev/null
printf '%s' "$n" >/proc/sys/kernel/hostname
printf '%s\n' "$n" >/etc/hostname
if [ -w /etc/hosts ]; then
  hosts=
  while IFS= read -r line; do
    case $line in 127.0.1.1*) line="127.0.1.1	$n" ;; esac
    hosts="$hosts$line
"
  done </etc/hosts
  printf '%s' "$hosts" >/etc/hosts
fi
old=
read -r old </etc/machine-id
for dir in /run/log/journal /var/log/journal; do
  [ -z "$old" ] || [ ! -d "$dir/$old" ] || ln -s "$old" "$dir/"$id
done
chmod u+w /etc/machine-id 2>/dev/null
printf '%s\n' $id >/etc/machine-id
put /var/lib/dbus/machine-id $id
date -u -s @@NOW@ >/dev/null 2>&1
umask 077
if [ -d /etc/ssh ]; then
  for key in /etc/ssh/ssh_host_*_key; do
    case $key in *_ed25519_key | *'*'*) ;; *) rm -f "$key" "$key.pub" ;; esac
  done
  printf '%s\n' '@PRIVATE@' >/etc/ssh/ssh_host_ed25519_key
  printf '%s\n' '@PUBLIC@' >/etc/ssh/ssh_host_ed25519_key.pub
  chmod 0600 /etc/ssh/ssh_host_ed25519_key
fi
if [ -d /etc/dropbear ]; then
  rm -f /etc/dropbear/dropbear_*_host_key
  printf '@DROPBEAR@' >/etc/dropbear/dropbear_ed25519_host_key
fi
umask 022
card() {
  for dir in /sys/class/net/*; do
    read -r mac <"$dir/address" || continue
    [ "$mac" = "$1" ] && [ -e "$dir/device" ] || continue
    dev=${dir##*/}
    ip addr flush dev "$dev" scope global
    ip link set dev "$dev" address "$2" || { ip link set dev "$dev" down; ip link set dev "$dev" address "$2"; }
    ip link set dev "$dev" up
    [ -z "$3" ] || ip addr add "$3" brd + dev "$dev"
    [ -z "$4" ] || ip route replace default via "$4" dev "$dev"
  done
}
@CARDS@
for file in /run/sshd.pid /var/run/sshd.pid; do
  [ -r $file ] && read -r pid <$file && kill -HUP "$pid" && break
done
[ ! -d /etc/dropbear ] || killall dropbear 2>/dev/null
"""


def script(new: Renewal) -> str:
    """The script, for sh's standard input."""
    text = _SCRIPT
    # The address that DHCP will give it: some clients, dhclient among them, do not ask anew when the cable comes back.
    cards = [" ".join(["card", old, mac, *new.addresses.get(mac, ())]).rstrip() for old, mac in new.macs.items()]
    parts = {
        "NAME": new.hostname,
        "MACHINE_ID": new.machine_id,
        "ENTROPY": _octal(new.entropy),
        "NOW": f"{new.now:.3f}",
        "PRIVATE": new.host_key_private.rstrip("\n"),
        "PUBLIC": new.host_key_public,
        "DROPBEAR": _octal(dropbear_key(new.host_key_private)),
        "CARDS": "\n".join(cards),
    }
    for name, value in parts.items():
        text = text.replace(f"@{name}@", value)
    return text


def clock(now: float) -> str:
    """What the program of our images is told of the time alone."""
    return f"clock {now:.6f}\n"


def identity(new: Renewal) -> str:
    """The same for the program of our images, but for the time: a word and its value a line, the key last."""
    lines = [
        f"entropy {new.entropy.hex()}",
        f"hostname {new.hostname}",
        f"machine-id {new.machine_id}",
        f"public {new.host_key_public}",
        *(f"mac {old} {mac}" for old, mac in new.macs.items()),
        *(f"address {mac} {address} {gateway}" for mac, (address, gateway) in new.addresses.items()),
        "private",
        new.host_key_private.rstrip("\n"),
    ]
    return "\n".join(lines) + "\n"


def told(new: Renewal) -> str:
    """The same with the time."""
    return clock(new.now) + identity(new)


def framed(text: str) -> bytes:
    """A message as it goes through the channel: it makes void what came before, and says where it ends."""
    return b"\x01" + text.encode() + b"\0"
