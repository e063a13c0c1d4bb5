"""The image debian-12: built from Debian's packages, started in each way it can be, set up by cloud-init.

A first boot costs a core most of a minute, so that one guest serves for several matters: that of the one with UEFI is
plain and ends well, that of the one with BIOS is asked for nonsense and followed by a power cut, the direct one's
fails.
"""

from __future__ import annotations

import re
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.system.conftest import REPO, VMCTL, Shell, held_mib, volumes
from vmctl.wait import wait_until

# Full systems, emulated, three at a time on two processors.
pytestmark = [pytest.mark.system, pytest.mark.timeout(3000)]
WAYS = {"direct": (), "bios": ("--boot", "disk"), "uefi": ("--firmware", "uefi")}
ROOT_GIB = 6
TIME_S = "900"
TOLD = ["--runcmd", "echo as asked > /var/local/told"]
CARDS = """\
version: 2
ethernets:
  first: {match: {macaddress: "52:54:00:99:08:07"}, dhcp4: true, addresses: [10.99.8.7/24]}
"""


@dataclass(frozen=True)
class Guests:
    """A guest for each way to start, by its way."""

    shell: Shell
    names: dict[str, str]
    identity: list[str] = field(default_factory=list)
    set_up: dict[str, str] = field(default_factory=dict)

    def run(self, way: str, *words: str) -> str:
        """What a command in a guest says, root's, by its agent: a login costs the guest 2 s of a processor."""
        self.settle(way)
        return self.shell.run("exec", "--via", "agent", self.names[way], "--", *words, timeout=300).stdout.strip()

    def login(self, way: str, script: str) -> list[str]:
        """The lines of a script in a guest, by SSH as the user."""
        return self.shell.run("exec", self.names[way], "--", "sh", "-c", script, timeout=300).stdout.splitlines()

    def told(self, way: str, script: str) -> list[str]:
        """The lines of a script in a guest, by its agent."""
        return self.run(way, "sh", "-c", script).splitlines()

    def settle(self, way: str) -> str:
        """Wait until cloud-init is through and the agent there, once. What the wait for cloud-init said."""
        if way not in self.set_up:
            waited = ("wait", self.names[way], "--for", "cloud-init", "--timeout", TIME_S)
            done = self.shell.run(*waited, timeout=920, check=9 if way == "direct" else 0)
            self.shell.run("wait", self.names[way], "--for", "agent", "--timeout", "300", timeout=320)
            self.set_up[way] = done.stderr
        return self.set_up[way]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder of the host that QEMU's user may look into."""
    with tempfile.TemporaryDirectory(dir="/srv" if Path("/srv").is_dir() else "/tmp") as name:
        made = Path(name)
        made.chmod(0o755)
        (made / "from host").write_text("by the host\n")
        yield made


@pytest.fixture(scope="module")
def guests(debian_image: None, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guests]:
    """The guests, just started."""
    shell = Shell()
    names = {way: f"t-{way}-{secrets.token_hex(3)}" for way in WAYS}
    cards, odd = (tmp_path_factory.mktemp("given") / kind for kind in ("cards", "odd"))
    cards.write_text(CARDS)
    odd.write_text("#cloud-config\npreserve_hostname: nonsense\n")
    share = ["--share", f"{folder}:/srv/by 9p:ro"]
    failing = ["--runcmd", "echo no such luck >&2; exit 3", "--network-config", str(cards)]
    asked = {
        "direct": [*TOLD, *failing, "--network", ",mac=52:54:00:99:08:07"],
        # A power cut follows: that scripts were begun is on the disk, and what they did only if somebody sees to it.
        "bios": ["--runcmd", "sync; mount -o remount,commit=900 /", *TOLD, "--user-data", str(odd), *share],
        "uefi": TOLD,
    }
    try:
        for way, options in WAYS.items():
            create = ["create", names[way], "--image", "debian-12", "--memory", "1G", "--root-size", f"{ROOT_GIB}G"]
            shell.run(*create, *options, *asked[way])
        yield Guests(shell, names)
    finally:
        for name in names.values():
            shell.run("delete", name, "--yes", "--missing-ok", check=None)


@pytest.fixture(params=sorted(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    """Each way to start."""
    return str(request.param)


def test_a_power_cut_right_after_the_first_boot_loses_nothing(guests: Guests) -> None:
    """What was asked for is on the disk when cloud-init says that it is through; the last of its own is not: the seed
    stays."""
    shell, guest = guests.shell, guests.names["bios"]

    def finished() -> bool:
        return "finished at" in shell.run("logs", guest).stdout

    wait_until(finished, what="cloud-init's last line", timeout_s=900, interval_s=0.5)
    shell.virsh("destroy", guest)
    assert "needs its seed" not in shell.run("start", guest).stderr
    first = shell.run("wait", guest, "--for", "cloud-init", "--timeout", TIME_S, timeout=920).stderr
    kept = shell.run("exec", guest, "--", "sh", "-c", "sudo hostname; cat /var/local/told", timeout=120).stdout
    assert kept == f"{guest}\nas asked\n"
    shell.run("stop", guest, "--timeout", "600", timeout=620)
    assert "no longer needs its seed" in shell.run("start", guest).stderr
    # Which now finds cloud-init without a seed: what is told is how it went when there was one.
    again = guests.settle("bios")
    assert "degraded" in first and first.splitlines()[-1] == again.splitlines()[-1]
    assert shell.run("exec", guest, "--", "hostname", timeout=120).stdout == f"{guest}\n"


def test_each_way_is_the_way_asked_for(guests: Guests, way: str) -> None:
    guests.settle(way)
    xml = guests.shell.virsh("dumpxml", guests.names[way])
    assert ("<kernel>" in xml) == (way == "direct")
    assert ("pflash" in xml) == (way == "uefi")
    efi, line = guests.login(way, "test -d /sys/firmware/efi && echo efi || echo none; cat /proc/cmdline")
    assert (efi == "efi") == (way == "uefi")
    # GRUB's kernel line finds the root by its UUID, vmctl's by its place.
    assert ("BOOT_IMAGE=/boot/vmlinuz" in line) == (way != "direct")


def test_cloud_init_did_what_was_asked(guests: Guests, way: str) -> None:
    failed = ["cloud-final.service"] if way == "direct" else []
    lines = guests.told(way, "cat /var/local/told; hostname; systemctl --failed --plain --no-legend")
    assert [line.split()[0] for line in lines[2:]] == failed and lines[:2] == ["as asked", guests.names[way]]


def test_how_a_first_boot_ended_is_told_with_cloud_inits_own_lines(guests: Guests) -> None:
    good, degraded, failed = (guests.settle(way) for way in ("uefi", "bios", "direct"))
    assert good.splitlines()[-1].split()[-1] == "done", good
    assert "cloud-init is done, but degraded: " in degraded and "Invalid cloud-config provided" in degraded
    assert "cloud-init failed in it" in failed and "scripts-user" in failed.replace("_", "-")


def test_a_network_config_and_a_mac_are_taken_as_given(guests: Guests) -> None:
    cards, name = guests.run("direct", "ip", "-4", "-o", "address", "show", "scope", "global"), guests.names["direct"]
    address = guests.shell.json("show", name)["address"]
    assert "10.99.8.7/24" in cards, "as the network-config says"
    assert address and f" {address}/" in cards, "the lease of a MAC that the user chose"
    assert next(row["address"] for row in guests.shell.json("list") if row["name"] == name) == address


def test_what_was_planted_early_is_what_cloud_init_would_make(guests: Guests) -> None:
    guests.settle("uefi")
    script = "whoami; sudo id -u; sudo grep -c NOPASSWD /etc/sudoers.d/90-cloud-init-users; cd; id -nG"
    script += "; sudo passwd -S debian; stat -c '%U %a' .ssh .ssh/authorized_keys; cat .ssh/authorized_keys"
    name, root, rules, groups, account, folder, file, *keys = guests.login("uefi", script)
    assert [name, root, rules, folder, file] == ["debian", "0", "1", "debian 700", "debian 600"]
    assert len(keys) == len(set(keys)) > 0
    assert {"debian", "adm", "sudo", "netdev", "plugdev"} <= set(groups.split())
    assert account.split()[1] == "L"


def test_ssh_answers_before_cloud_init_is_through(guests: Guests) -> None:
    asked = "systemctl show --value --property ActiveEnterTimestampMonotonic"
    ssh, first = (int(line) for line in guests.told("uefi", f"{asked} ssh.service; {asked} cloud-init-local.service"))
    assert 0 < ssh < first


def test_cloud_init_was_loaded_once_for_its_stages(guests: Guests) -> None:
    """By what each unit's processes took; and a stage that is asked for later is a cloud-init of its own."""
    units = ["vmctl-cloud-init", "cloud-init-local", "cloud-init", "cloud-config", "cloud-final"]
    asked = ("systemctl", "show", "--value", "--property", "CPUUsageNSec", *(f"{unit}.service" for unit in units))
    whole, *stages = (int(line) for line in guests.run("uefi", *asked).split())
    assert sum(stages) < whole / 4
    again = ("/usr/lib/systemd/system-generators/vmctl-first-boot", "stage", "--version")
    assert guests.run("uefi", *again).startswith("/usr/bin/cloud-init 22.")


def test_a_users_manager_outlives_the_login(guests: Guests) -> None:
    """Starting it is the larger part of what a command over SSH costs; 10 seconds are what logind gives it else."""
    since = "systemctl show --value --property ActiveEnterTimestampMonotonic user@1000.service"
    first, ended = int(*guests.login("uefi", since)), time.monotonic()
    wait_until(lambda: time.monotonic() > ended + 15, what="logind's own delay to pass", timeout_s=20, interval_s=1)
    assert 0 < first == int(*guests.login("uefi", since))


def test_the_host_key_is_the_planted_one(guests: Guests, way: str) -> None:
    key = guests.run(way, "cut", "-d ", "-f2", "/etc/ssh/ssh_host_ed25519_key.pub")
    assert key
    assert key in guests.shell.virsh("dumpxml", guests.names[way])


def test_networkd_meets_cards_that_have_their_names(guests: Guests, way: str) -> None:
    """One that is renamed under its hands it may set up twice, and give up."""
    said = guests.told(way, "journalctl -b -o cat -u systemd-networkd; ls /sys/class/net")
    assert "Enumeration completed" in said and not [line for line in said if "renamed" in line or "busy" in line], said
    assert [line for line in said if line.startswith("en")], "its name is one that does not depend on the order"


def test_the_root_fills_its_disk(guests: Guests, way: str) -> None:
    size = int(guests.run(way, "df", "--output=size", "--block-size=1", "/").splitlines()[-1])
    assert size > (ROOT_GIB - 0.5) * 2**30


def test_the_agent_answers(guests: Guests, way: str) -> None:
    assert guests.run(way, "id", "-u") == "0"


def test_no_two_machines_share_an_identity(guests: Guests) -> None:
    each = [guests.told(way, "cat /etc/machine-id; cat /etc/ssh/ssh_host_ed25519_key.pub") for way in WAYS]
    assert len({told[0] for told in each}) == len({told[1] for told in each}) == len(WAYS)


def test_a_read_only_share_is_there_and_can_be_taken_away(guests: Guests, folder: Path) -> None:
    """By 9p where virtiofs cannot be read-only; its user is no root there."""
    shell, name = guests.shell, guests.names["bios"]
    there = guests.run("bios", "grep", "by.0409p", "/proc/mounts")
    virtiofs = "virtiofs" in shell.virsh("dumpxml", name)
    assert there.split()[2] == ("virtiofs" if virtiofs else "9p")
    assert guests.run("bios", "cat", "/srv/by 9p/from host") == "by the host"
    refused = shell.run("exec", name, "--", "sudo", "touch", "/srv/by 9p/new", check=1)
    assert "Read-only" in refused.stderr and not (folder / "new").exists()
    told = shell.json("unshare", name, "/srv/by 9p")
    assert told["done"] and (virtiofs or told["gone"] == "its next stop and start")
    assert "by\\040" not in guests.run("bios", "cat", "/proc/mounts", "/etc/fstab")
    assert "<filesystem" not in shell.virsh("dumpxml", "--inactive", name)


def test_the_root_partition_grows_with_its_disk_while_the_guest_runs(guests: Guests) -> None:
    name = guests.names["bios"]
    size = ("sh", "-c", "df -k --output=size / | tail -n 1")
    before = int(guests.run("bios", *size))
    done = guests.shell.json("disk", "resize", f"{name}:root", f"{ROOT_GIB + 1}G", "--grow-fs")
    assert done["after"] == (ROOT_GIB + 1) << 30 and done["grown"].startswith("ext4 on /dev/vda")
    assert int(guests.run("bios", *size)) > before + 900 * 1024


def test_packages_come_from_the_public_mirror(guests: Guests) -> None:
    listed = guests.run("direct", "sh", "-c", "cat /etc/apt/sources.list.d/* /etc/apt/sources.list 2>/dev/null || true")
    assert {line.split()[1] for line in listed.splitlines() if line.startswith("URIs:")} == {
        "http://deb.debian.org/debian", "http://deb.debian.org/debian-security",
    }  # fmt: skip
    assert "copy:" not in listed


IDENTITY = "hostname; cat /etc/machine-id /sys/class/net/e*/address; sudo sha256sum /etc/ssh/ssh_host_ed25519_key"


def own_machine(guests: Guests, one: str) -> None:
    """One that came from the UEFI guest has its disk, and is another machine, with variables of its own."""
    shell, first = guests.shell, guests.names["uefi"]
    told = shell.run("exec", one, "--", "sh", "-c", IDENTITY, timeout=300).stdout.split()
    assert told[0] == one and not set(told[1:4]) & set(guests.identity)
    assert shell.run("exec", one, "--", "cat", "/var/local/told").stdout == "as asked\n"
    nvram = [re.search(r"<nvram[^>]*>([^<]*)<", shell.virsh("dumpxml", vm)) for vm in (first, one)]
    assert nvram[0] and nvram[1] and nvram[0][1] != nvram[1][1] and Path(nvram[1][1]).is_file()


def test_a_fork_of_one_with_uefi_is_a_machine_of_its_own(guests: Guests, several: str) -> None:
    shell, name = guests.shell, guests.names["uefi"]
    guests.identity.extend(guests.run("uefi", "sh", "-c", IDENTITY).split()[1:4])
    booted = guests.run("uefi", "cat", "/proc/sys/kernel/random/boot_id")
    fork = f"{several}-1"
    shell.run("fork", name, fork, timeout=300)
    try:
        # For five seconds sshd goes before its like, but not before the kernel's threads, which it waits for.
        weight = shell.run("exec", fork, "--", "cat", "/sys/fs/cgroup/system.slice/cpu.weight", timeout=300).stdout
        assert weight == "100\n"
        assert held_mib(fork) < 700, "of 1 GiB, all of which it held in huge pages"
        own_machine(guests, fork)
        script = "cat /proc/sys/kernel/random/boot_id; sudo sh -c 'logger its own; journalctl --sync; journalctl -ocat'"
        boot, *journal = shell.run("exec", fork, "--", "sh", "-c", script, timeout=300).stdout.splitlines()
        assert boot == booted
        assert journal[0].startswith("Linux version") and "its own" in journal, journal[-5:]
    finally:
        shell.run("delete", fork, "--yes")


def test_a_login_makes_no_message_of_its_own_and_shows_the_one_there_is(guests: Guests) -> None:
    guests.login("direct", "true")
    script = "grep -h '^[^#].*pam_motd' /etc/pam.d/sshd; ls /run/motd.dynamic 2>/dev/null"
    (shown,) = guests.told("direct", f"{script}; true")
    assert shown.split() == ["session", "optional", "pam_motd.so", "noupdate"]


def test_auditing_is_there_and_off(guests: Guests) -> None:
    """A kernel without it runs modprobe for each who asks; with it on, journald writes each login down twice."""
    guests.login("direct", "sudo true")
    asked = "import socket; print(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9) and 'there')"
    script = f'python3 -c "{asked}"; journalctl -q -b -ocat _TRANSPORT=audit | tail -n 3'
    assert guests.told("direct", script) == ["there"]


def test_dhcp_knows_it_by_one_identifier_whichever_file_is_in_force(guests: Guests) -> None:
    shell, guest = guests.shell, guests.names["bios"]
    script = """
    cd /etc/systemd/network
    lease() {
        systemctl stop systemd-networkd; rm -f /run/systemd/netif/leases/*; systemctl start systemd-networkd; n=0
        until grep -hs CLIENTID /run/systemd/netif/leases/*; do n=$((n + 1)); [ $n -lt 300 ] || exit 1; sleep 0.2; done
    }
    ls 10-cloud-init-*.network >/dev/null || exit 2
    lease; mkdir /run/away && mv 10-cloud-init-*.network /run/away/; lease; mv /run/away/* .; lease
    """
    done = shell.run("exec", guest, "--", "sudo", "sh", "-c", script, timeout=400)
    (mac,) = [nic["mac"] for nic in shell.json("show", guest)["nics"]]
    first, early, last = done.stdout.splitlines()
    assert first == early == last and first.endswith(f"00030001{mac.replace(':', '')}")


@pytest.mark.parametrize("options", [[], ["-t"]])
@pytest.mark.parametrize("command", ["sleep 4000 & sleep 4001", "trap '' INT TERM HUP; sudo sleep 4000"])
def test_ctrl_c_ends_the_command_in_the_guest(guests: Guests, options: list[str], command: str) -> None:
    """Root's processes too, where the user may become root."""
    running = subprocess.Popen(
        [*VMCTL, "exec", *options, guests.names["bios"], "--", "sh", "-c", f"echo up; {command}"],
        text=True, cwd=REPO, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout is not None and running.stdout.readline().strip() == "up"

    def look() -> str:
        return guests.run("bios", "sh", "-c", "pgrep -f '^[s]leep 400' || true")

    wait_until(look, what="the command in the guest", timeout_s=120)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted" in err
    wait_until(lambda: not look(), what="its end", timeout_s=60)


def test_its_panic_is_seen(guests: Guests) -> None:
    """udev loads the driver."""
    shell, guest = guests.shell, guests.names["bios"]
    shell.run("exec", guest, "--", "sh", "-c", "(sleep 2; echo c | sudo tee /proc/sysrq-trigger) >/dev/null 2>&1 &")
    wait_until(lambda: shell.json("show", guest)["state"] == "crashed", what="the panic", timeout_s=120)
    assert "guest panicked" in shell.run("exec", guest, "--", "true", check=6).stderr


@pytest.mark.parametrize("way", ["direct", "uefi"])
def test_the_power_button_ends_it(guests: Guests, way: str) -> None:
    """The guests are off for what comes after."""
    guests.shell.virsh("shutdown", guests.names[way], "--mode", "acpi")
    wait_until(
        lambda: guests.shell.virsh("domstate", guests.names[way]) == "shut off",
        what="the guest to go off", timeout_s=120, interval_s=0.5,
    )  # fmt: skip


def test_a_clone_of_one_with_uefi_boots_as_a_machine_of_its_own(guests: Guests, several: str) -> None:
    clone = f"{several}-2"
    guests.shell.run("clone", guests.names["uefi"], clone, "--start")
    try:
        guests.shell.run("wait", clone, "--for", "ssh", "--timeout", "800", timeout=820)
        own_machine(guests, clone)
    finally:
        guests.shell.run("delete", clone, "--yes")


def test_an_equal_build_is_taken_from_the_cache_and_gives_the_same_image(shell: Shell, debian_image: None) -> None:
    before = volumes(shell, "vmctl-images")
    again = shell.run("image", "build", "debian-12", timeout=120)
    assert "last build" in again.stderr
    assert volumes(shell, "vmctl-images") == before
    shown = shell.json("image", "show", "debian-12")
    assert {"direct", "bios", "uefi"} <= set(shown["boots"])
    assert shown["default_user"] == "debian" and "cloud-init" in shown["software"]


def test_the_disk_is_refused_where_the_image_has_none_that_starts(shell: Shell, name: str) -> None:
    refused = shell.run("create", name, "--image", "micro", "--boot", "disk", check=2)
    assert "does not boot by bios from its disk" in refused.stderr
    assert name not in shell.virsh("list", "--all", "--name")
