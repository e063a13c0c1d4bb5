"""What a host's folder holds before it boots: its identity, keys, users, and libvirt's configuration."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from pathlib import Path

LAN = """<network>
  <name>lan</name>
  <uuid>{uuid}</uuid>
  <forward mode='bridge'/>
  <bridge name='lan0'/>
</network>
"""
LIBVIRTD = """host_uuid = "{uuid}"
unix_sock_group = "libvirt"
auth_unix_rw = "none"
listen_tcp = 1
listen_tls = {tls}
auth_tcp = "none"
auth_tls = "none"
listen_addr = "{address}"
keepalive_interval = 5
keepalive_count = 5
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"""
# No folders in the machine's cgroups, no AppArmor profiles in its kernel: both would outlive a killed host.
QEMU = """cgroup_controllers = []
security_driver = "none"
migration_host = "{address}"
migration_address = "{address}"
keepalive_interval = 5
keepalive_count = 5
"""
# Post-copy needs page faults handled by QEMU, which many kernels let root alone do.
ROOT = """user = "root"
group = "root"
clear_emulator_capabilities = 0
"""
# The exchange of keys that OpenSSH prefers since 9.0, sntrup761, costs each client 60 ms of a processor, this one 5: in
# a testbed, several hosts and all their clients share the processors of one machine, and nobody listens.
SSHD = """Port 22
KexAlgorithms curve25519-sha256
ListenAddress {address}
HostKey /run/testbed/host_key
AuthorizedKeysFile /run/testbed/authorized_keys .ssh/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
MaxSessions 100
PidFile /run/sshd.pid
Subsystem sftp /run/testbed/sftp-server
"""


def key_pair(path: Path, comment: str) -> None:
    """A new SSH key."""
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)


def furnish(folder: Path, name: str, address: str, sshd: Path, *, qemu_root: bool) -> None:
    """Make the folder of one host, all but what needs the others' keys; those come with ``introduce``."""
    for part in ("etc-libvirt/qemu/networks/autostart", "etc-libvirt/hooks", "log", "own", "root/.ssh", "disk"):
        (folder / part).mkdir(parents=True)
    tls = (folder / "pki").exists()
    # By its address, one of a kind in a test host: what vmctl found out about KVM there, in 3 s of a processor,
    # holds for the host of that address in the next testbed.
    values = {"uuid": uuid.uuid5(uuid.NAMESPACE_DNS, address), "address": address, "tls": int(tls)}
    libvirt = folder / "etc-libvirt"
    (libvirt / "libvirtd.conf").write_text(LIBVIRTD.format(**values))
    (libvirt / "qemu.conf").write_text(QEMU.format(**values) + (ROOT if qemu_root else ""))
    (libvirt / "qemu/networks/lan.xml").write_text(LAN.format(uuid=uuid.uuid4()))
    (libvirt / "qemu/networks/autostart/lan.xml").symlink_to("/etc/libvirt/qemu/networks/lan.xml")
    if Path("/usr/share/libvirt/nwfilter").exists():
        shutil.copytree("/usr/share/libvirt/nwfilter", libvirt / "nwfilter")
    (folder / "machine-id").write_text(secrets.token_hex(16) + "\n")
    _users(folder)
    shutil.copytree(sshd, folder / "own", dirs_exist_ok=True)
    shutil.copy(Path(__file__).with_name("daemon"), folder / "own/daemon")
    (folder / "own/sshd_config").write_text(SSHD.format(address=address))
    key_pair(folder / "own/host_key", f"root@{name}")


def _users(folder: Path) -> None:
    """The machine's users, with the one that sshd wants, and root with no password instead of a lock."""
    for file in ("passwd", "group", "shadow"):
        text = Path("/etc", file).read_text()
        if file == "passwd" and "\nsshd:" not in text:
            text += "sshd:x:64222:65534::/run/sshd:/usr/sbin/nologin\n"
        if file == "shadow":
            text = "".join(
                f"root:*:{line.split(':', 2)[2]}\n" if line[:5] == "root:" else f"{line}\n"
                for line in text.splitlines()
            )
        (folder / file).write_text(text)


def introduce(folder: Path, own: str, addresses: Mapping[str, str], keys: Mapping[str, str], client: Path) -> None:
    """Tell a host of all hosts' names and SSH keys; each may log in to each other, and ``client``'s holder to all."""
    lines = ["127.0.0.1 localhost", "::1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    home = folder / "root/.ssh"
    (home / "known_hosts").write_text("".join(f"{name},{addresses[name]} {key}\n" for name, key in keys.items()))
    shutil.copy(client, home / "id_ed25519")
    shutil.copy(client.with_suffix(".pub"), folder / "own/authorized_keys")
    for path, mode in ((folder / "root", 0o700), (home, 0o700), (home / "id_ed25519", 0o600)):
        path.chmod(mode)
