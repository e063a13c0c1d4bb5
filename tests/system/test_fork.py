"""Forks of running VMs: who they are, what they share with the one they come from, what is left of them."""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.system import pattern
from tests.system.conftest import REPO, VMCTL, Shell, held_mib, volumes
from tests.system.test_clone import checked, who
from vmctl.wait import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

POOL = Path("/var/lib/libvirt/vmctl/vmctl")
# A process that counts in memory only, and a file written before: both have to be there in each fork.
LIFE = "echo before >/run/before; (i=0; while :; do i=$((i+1)); echo $i >/run/count; sleep 1; done) >/dev/null 2>&1 &"


def warmed(shell: Shell, name: str, *options: str) -> None:
    """A running VM with a life of its own."""
    shell.run("create", name, "--image", "micro", "--wait", "agent", *options, timeout=240)
    pattern.write(name, "/root/data", pattern.blocks("base", 64))
    shell.run("exec", name, "--", "sh", "-c", LIFE)


def count(shell: Shell, vm: str) -> int:
    """How far the guest's process has counted."""
    # Empty for the moment in which it is written.
    return int(
        wait_until(lambda: shell.run("exec", vm, "--", "cat", "/run/count").stdout or None, what="", timeout_s=30)
    )


def test_forks_run_on_and_are_machines_of_their_own(shell: Shell, name: str, several: str) -> None:
    before = volumes(shell)
    warmed(shell, name)
    booted = shell.run("exec", name, "--", "cat", "/proc/sys/kernel/random/boot_id").stdout
    pattern.write(name, "/root/data", pattern.blocks("late", 8), at=8)
    reached = count(shell, name)
    done = shell.json("fork", name, several, "--count", "3")
    forks = [one["name"] for one in done]
    assert forks == [f"{several}-{n}" for n in (1, 2, 3)] and len({one["address"] for one in done}) == 3
    told = {one: who(shell, one) for one in (name, *forks)}
    for one, (kernel, file, *_) in told.items():
        assert (kernel, file) == (one, one)
    for which in range(2, 5):  # machine-id, MAC, host key
        assert len({each[which] for each in told.values()}) == 4, told
    random = [shell.run("exec", one, "--", "od", "-An", "-tx8", "-N16", "/dev/urandom").stdout for one in told]
    assert len(set(random)) == 4
    for one in told:
        assert shell.run("exec", one, "--", "cat", "/proc/sys/kernel/random/boot_id").stdout == booted  # none booted
        assert count(shell, one) >= reached
        assert pattern.holds(shell, one, "/root/data", pattern.blocks("late", 8), at=8)
        earliest = time.time()
        clock = float(shell.run("exec", one, "--", "date", "+%s").stdout)
        # date cuts the second off; and what sets the clock takes its time on a busy machine.
        assert earliest - 4 < clock < time.time() + 1
        pattern.write(one, "/root/data", pattern.blocks(one, 8), at=16)
    for one in told:
        assert pattern.holds(shell, one, "/root/data", pattern.blocks(one, 8), at=16)
    for one in forks:  # and they stay who they are
        shell.run("reboot", one)
    for one in forks:
        shell.run("wait", one, "--for", "ssh", "--timeout", "200", timeout=240)
        assert who(shell, one) == told[one]
    assert not list(POOL.glob(".vmctl-*"))
    for one in told:
        shell.run("stop", one, "--force")
    checked()
    shell.run("delete", name, forks[1], "--yes")
    shell.run("start", forks[0])
    shell.run("wait", forks[0], "--for", "ssh", "--timeout", "200", timeout=240)
    assert pattern.holds(shell, forks[0], "/root/data", pattern.blocks(forks[0], 8), at=16)
    shell.run("delete", forks[0], forks[2], "--yes")
    assert volumes(shell) == before


def test_a_fork_takes_no_more_memory_than_is_in_use(shell: Shell, name: str, several: str) -> None:
    warmed(shell, name, "--memory", "1G")
    shell.run("fork", name, several, timeout=240)
    assert held_mib(several) < 400, held_mib(several)
    assert count(shell, several) > 0 and pattern.holds(shell, several, "/root/data", pattern.blocks("base", 64))
    shell.run("snapshot", "create", f"{several}.then", "--memory")
    shell.run("snapshot", "revert", f"{several}.then", "--yes")
    assert held_mib(several) < 400, held_mib(several)
    assert count(shell, several) > 0
    shell.run("snapshot", "delete", f"{several}.then", "--yes")
    # It is a machine like any other all the same.
    shell.run("save", several)
    shell.run("start", several)
    assert count(shell, several) > 0
    assert "memfd" in shell.virsh("dumpxml", several) and "memfd" not in shell.virsh("dumpxml", several, "--inactive")


def test_a_fork_of_a_fork_with_a_second_disk(shell: Shell, name: str, several: str) -> None:
    before = volumes(shell)
    warmed(shell, name, "--disk", "16M")
    pattern.write(name, "/dev/vdc", pattern.blocks("disk", 256))
    shell.run("fork", name, f"{several}-1")
    pattern.write(name, "/dev/vdc", pattern.blocks("parent", 256))
    shell.run("fork", f"{several}-1", f"{several}-2")
    pattern.write(f"{several}-1", "/dev/vdc", pattern.blocks("one", 8))
    assert pattern.holds(shell, f"{several}-2", "/dev/vdc", pattern.blocks("disk", 256))
    assert pattern.holds(shell, name, "/dev/vdc", pattern.blocks("parent", 256))
    assert who(shell, f"{several}-2")[0] == f"{several}-2"
    shell.run("delete", name, f"{several}-1", f"{several}-2", "--yes")
    assert volumes(shell) == before


def test_what_cannot_be_forked_is_refused_before_anything_changes(shell: Shell, name: str, several: str) -> None:
    shell.guest(name)
    before, xml = volumes(shell), shell.virsh("dumpxml", name)
    said = shell.run("fork", name, several, "--count", "2", "--dry-run").stdout
    assert f"new running VM {several}-2" in said and "is written to no more" in said
    assert "exists already" in shell.run("fork", name, name, check=5).stderr
    assert (volumes(shell), shell.virsh("dumpxml", name)) == (before, xml)
    shell.run("pause", name)
    assert "is paused" in shell.run("fork", name, several, check=6).stderr
    shell.run("resume", name)
    shell.run("stop", name, "--force")
    stopped = shell.run("fork", name, several, check=6).stderr
    assert "is stopped" in stopped and "vmctl clone" in stopped
    assert volumes(shell) == before


def test_the_disk_of_a_vm_called_layer_is_none(shell: Shell, several: str) -> None:
    """It was taken in, and no more the VM's own from its first fork on."""
    shell.guest(vm := f"{several}-layer")
    assert "takes in" not in shell.run("fork", vm, several, "--dry-run").stdout


def test_two_forks_of_one_vm_at_once(shell: Shell, name: str, several: str) -> None:
    warmed(shell, name)
    both = [
        subprocess.Popen([*VMCTL, "fork", name, f"{several}-{n}"], stderr=subprocess.PIPE, text=True, cwd=REPO)
        for n in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 5], [0, 0]), errors
    made = [one for one in shell.virsh("list", "--name").split() if one.startswith(several)]
    assert len(made) == codes.count(0)
    assert count(shell, name) > 0


def test_a_guest_with_the_agent_alone_is_renewed_by_its_shell(shell: Shell, name: str, several: str) -> None:
    warmed(shell, name)
    shell.run("exec", name, "--", "sh", "-c", "rm /usr/sbin/vmctl-renew; killall vmctl-renew")
    shell.run("fork", name, several, timeout=240)
    told = [who(shell, one) for one in (name, several)]
    assert told[1][:2] == [several, several]
    assert all(one != other for one, other in zip(told[0][:5], told[1][:5], strict=True))


def test_a_fork_is_renewed_by_who_waits_for_it_and_starts_no_program(shell: Shell, name: str, several: str) -> None:
    warmed(shell, name)
    assert "vmctl.renewal' state='connected'" in shell.virsh("dumpxml", name)

    def waits() -> str | None:
        return shell.run("exec", name, "--", "cat", "/run/vmctl/next-sshd", check=None).stdout.strip() or None

    waiting = wait_until(waits, what="sshd that waits for its key", timeout_s=60, interval_s=0.5)
    shell.run("exec", name, "--", "killall", "-STOP", "qemu-ga")  # as connected as before, and answers nothing
    forks = [f"{several}-1", f"{several}-2"]
    for base, fork in zip((name, forks[0]), forks, strict=True):
        shell.run("fork", base, fork, timeout=240)
        earliest = time.time()
        assert earliest - 4 < float(shell.run("exec", fork, "--", "date", "+%s").stdout) < time.time() + 1
    told = [who(shell, one) for one in (name, *forks)]
    for which in range(5):
        assert len({each[which] for each in told}) == 3, told
    # Who waited in the first has let us into its fork: the shell's parent is the session, whose parent listens.
    listener = shell.run("exec", forks[0], "--", "sh", "-c", "cut -d ' ' -f 4 /proc/$PPID/stat").stdout.strip()
    assert listener == waiting
    for fork in forks:
        mac = shell.run("exec", fork, "--", "cat", "/sys/class/net/eth0/address").stdout.strip()
        said = shell.run("exec", fork, "--", "ip", "-6", "addr", "show", "dev", "eth0").stdout.split()
        (address,) = [after for word, after in pairwise(said) if word == "inet6"]
        assert ipaddress.ip_interface(address).packed[13:] == bytes.fromhex(mac.replace(":", ""))[3:]


@pytest.fixture
def plain_bridge(shell: Shell, name: str, tmp_path: Path) -> Iterator[str]:
    """A libvirt network on a bridge whose addresses libvirt does not give: somebody else's DHCP server does."""
    bridge, net = f"br-{name[-8:]}", f"net-{name}"
    definition = tmp_path / "net.xml"
    definition.write_text(f"<network><name>{net}</name><forward mode='bridge'/><bridge name='{bridge}'/></network>")
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    subprocess.run(["ip", "addr", "add", "198.51.100.1/24", "dev", bridge], check=True)
    subprocess.run(["ip", "link", "set", bridge, "up"], check=True)
    words = [f"--interface={bridge}", "--bind-interfaces", "--port=0", "--dhcp-range=198.51.100.10,198.51.100.250"]
    words += ["--except-interface=lo", "--conf-file=/dev/null", f"--dhcp-leasefile={tmp_path}/leases", "--pid-file"]
    server = subprocess.Popen([shutil.which("dnsmasq") or "/usr/sbin/dnsmasq", "-k", *words])
    try:
        shell.virsh("net-define", str(definition))
        shell.virsh("net-start", net)
        yield net
    finally:
        shell.run("delete", f"{name}*", "--yes", check=None)
        shell.virsh("net-destroy", net)
        shell.virsh("net-undefine", net)
        server.terminate()
        server.wait(10)
        subprocess.run(["ip", "link", "del", bridge], check=True)


def test_forks_on_a_plain_bridge_are_not_taken_for_the_one_they_come_from(
    shell: Shell, name: str, several: str, plain_bridge: str
) -> None:
    warmed(shell, name, "--network", plain_bridge)
    (address,) = (one["address"] for one in shell.json("list") if one["name"] == name)
    forks = shell.json("fork", name, several, "--count", "2")
    assert len({address, *(one["address"] for one in forks)}) == 3, (address, forks)
    assert [who(shell, one["name"])[0] for one in forks] == [one["name"] for one in forks]
    assert who(shell, name)[0] == name
