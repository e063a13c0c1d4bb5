"""A Debian guest whose user interrupts, pulls plugs, restarts its network and panics it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.system.conftest import REPO, VMCTL, Shell
from vmctl.wait import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(3000)]
BOOT_S = "900"


@pytest.fixture(scope="module")
def guest(debian_image: None) -> Iterator[str]:
    """One guest, whose first boot has just been told to be over."""
    shell, name = Shell(), f"t-rough-{os.getpid()}"
    shell.run("create", name, "--image", "debian-12", "--memory", "1G")
    shell.run("wait", name, "--for", "ssh", "--timeout", BOOT_S, timeout=920)
    yield name
    shell.run("delete", name, "--yes", "--missing-ok", check=None)


def test_a_power_cut_right_after_the_first_boot_loses_nothing(shell: Shell, guest: str) -> None:
    """cloud-init says that it is through half a minute before the last of it is on the disk: the seed stays."""

    def finished() -> bool:
        return "finished at" in shell.run("logs", guest).stdout

    wait_until(finished, what="cloud-init's last line", timeout_s=900, interval_s=0.5)
    shell.virsh("destroy", guest)
    assert "needs its seed" not in shell.run("start", guest).stderr
    shell.run("wait", guest, "--for", "cloud-init", "--timeout", BOOT_S, timeout=920)
    assert shell.run("exec", guest, "--", "sudo", "hostname", timeout=120).stdout == f"{guest}\n"
    shell.run("stop", guest, "--timeout", "600", timeout=620)
    assert "no longer needs its seed" in shell.run("start", guest).stderr
    shell.run("wait", guest, "--for", "ssh", "--timeout", BOOT_S, timeout=920)
    assert shell.run("exec", guest, "--", "hostname", timeout=120).stdout == f"{guest}\n"


def test_dhcp_knows_it_by_one_identifier_whichever_file_is_in_force(shell: Shell, guest: str) -> None:
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
def test_ctrl_c_ends_the_command_in_the_guest(shell: Shell, guest: str, options: list[str], command: str) -> None:
    """Root's processes too, where the user may become root."""
    running = subprocess.Popen(
        [*VMCTL, "exec", *options, guest, "--", "sh", "-c", f"echo up; {command}"],
        text=True, cwd=REPO, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert running.stdout is not None and running.stdout.readline().strip() == "up"

    def look() -> str:
        words = ["exec", guest, "--", "sh", "-c", "pgrep -f '^[s]leep 400'"]
        return shell.run(*words, check=None, timeout=300).stdout

    wait_until(look, what="the command in the guest", timeout_s=120)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and "interrupted" in err
    wait_until(lambda: not look(), what="its end", timeout_s=60)


def test_its_panic_is_seen(shell: Shell, guest: str) -> None:
    """udev loads the driver."""
    shell.run("exec", guest, "--", "sh", "-c", "(sleep 2; echo c | sudo tee /proc/sysrq-trigger) >/dev/null 2>&1 &")
    wait_until(lambda: shell.json("show", guest)["state"] == "crashed", what="the panic", timeout_s=120)
    assert "guest panicked" in shell.run("exec", guest, "--", "true", check=6).stderr
