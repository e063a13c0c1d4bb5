"""Debian's cloud-init with what users give it, under Secure Boot with a TPM; one that fails, one degraded."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.conftest import Shell

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]


CARDS = """\
version: 2
ethernets:
  first: {match: {macaddress: "52:54:00:99:08:07"}, dhcp4: true, addresses: [10.99.8.7/24]}
"""


@dataclass(frozen=True)
class Trio:
    """Three guests by what becomes of their first boot."""

    shell: Shell
    good: str
    bad: str
    odd: str


@pytest.fixture(scope="module")
def trio(debian_image: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """One with everything asked of its first boot, one whose command fails, one with a key of a wrong type."""
    folder, shell = tmp_path_factory.mktemp("first-boot"), Shell()
    good, bad, odd = (f"t-{kind}-{secrets.token_hex(3)}" for kind in ("good", "bad", "odd"))
    given = {
        "a.sh": "#!/bin/sh\necho by script > /var/local/script\n",
        "b.yaml.j2": "#cloud-config\nwrite_files:\n  - path: /var/local/file\n    content: for {{ who }}\n",
        "vendor": "#cloud-config\nruncmd:\n  - echo by vendor > /var/local/vendor\n",
        "odd": "#cloud-config\npreserve_hostname: nonsense\n",
        "cards": CARDS,
    }
    for name, text in given.items():
        (folder / name).write_text(text)
    files = {name: str(folder / name) for name in given}
    asked = ["--user-data", files["a.sh"], "--user-data", files["b.yaml.j2"], "--var", "who=bob", "--user", "bob"]
    asked += ["--vendor-data", files["vendor"], "--password", "--network", "", "--network", ",address=10.99.7.5/24"]
    try:
        debian = ["--image", "debian-12", "--memory", "1G"]
        shell.run("create", good, *debian, "--firmware", "uefi-secure", "--tpm", *asked, input="a secret\n")
        failing = ["--runcmd", "echo no such luck >&2; exit 3", "--network-config", files["cards"]]
        failing += ["--network", ",mac=52:54:00:99:08:07"]
        shell.run("create", bad, *debian, *failing)
        shell.run("create", odd, *debian, "--user-data", files["odd"])
        yield Trio(shell, good, bad, odd)
    finally:
        for name in (good, bad, odd):
            shell.run("delete", name, "--yes", "--missing-ok", check=None)


def test_everything_asked_for_is_there(trio: Trio) -> None:
    shell, name = trio.shell, trio.good
    told = shell.run("wait", name, "--for", "cloud-init", "--timeout", "600", timeout=620)
    assert "cloud-init at" in told.stdout and told.stderr.splitlines()[-1].split()[-1] == "done", told.stderr

    def guest(*words: str) -> str:
        return shell.run("exec", name, "--", *words, timeout=120).stdout

    assert guest("whoami") == "bob\n"
    look = (
        "cat /var/local/script /var/local/vendor /var/local/file; echo;"
        " od -An -tu1 -j4 /sys/firmware/efi/efivars/SecureBoot-*;"
        " ls /dev/tpm0; ip -4 -o address show to 10.99.7.5; ip -4 route show default; sudo -n getent shadow bob"
    )
    lines = guest("sh", "-c", look).splitlines()
    assert lines[:3] == ["by script", "by vendor", "for bob"] and lines[3].strip() == "1" and lines[4] == "/dev/tpm0"
    assert "10.99.7.5/24" in lines[5] and lines[6].startswith("default via") and lines[7].startswith("bob:$6$")


def test_its_secrets_are_nowhere_on_the_host(trio: Trio) -> None:
    shell, name = trio.shell, trio.good
    assert "$6$" not in shell.virsh("dumpxml", "--security-info", name)
    for path in Path("/var/log/libvirt").rglob(f"*{name}*"):
        assert b"$6$" not in path.read_bytes() and b"a secret" not in path.read_bytes()


def test_a_failed_first_boot_is_told_with_cloud_inits_own_lines(trio: Trio) -> None:
    shell, name = trio.shell, trio.bad
    done = shell.run("wait", name, "--for", "cloud-init", "--timeout", "600", timeout=620, check=9)
    assert "cloud-init failed in it" in done.stderr and "scripts-user" in done.stderr.replace("_", "-")
    cards = shell.run("exec", name, "--", "ip", "-4", "-o", "address", "show", "scope", "global", timeout=120).stdout
    address = shell.json("show", name)["address"]
    assert "10.99.8.7/24" in cards, "as the network-config says"
    assert address and f" {address}/" in cards, "the lease of a MAC that the user chose"
    assert next(row["address"] for row in shell.json("list") if row["name"] == name) == address


def test_a_degraded_first_boot_is_told_with_cloud_inits_own_lines(trio: Trio) -> None:
    done = trio.shell.run("wait", trio.odd, "--for", "cloud-init", "--timeout", "600", timeout=620)
    assert "cloud-init is done, but degraded: " in done.stderr and "Invalid cloud-config provided" in done.stderr
    assert "cloud-init at" in done.stdout


def test_nvram_goes_with_its_vm(trio: Trio) -> None:
    shell, name = trio.shell, trio.good
    text = shell.virsh("dumpxml", name)
    nvram = Path(text.partition("<nvram")[2].partition(">")[2].partition("<")[0])
    tpm = Path("/var/lib/libvirt/swtpm") / shell.json("show", name)["uuid"]
    assert nvram.exists() and tpm.exists()
    assert shell.json("show", name)["tpm"] == {"version": "2.0", "model": "tpm-tis", "backend": "emulator"}
    shell.run("stop", name, "--force", "--timeout", "0")
    shell.run("rename", name, f"{name}x")
    shell.run("start", f"{name}x")
    assert shell.json("show", f"{name}x")["firmware"] == "uefi-secure"
    shell.run("delete", f"{name}x", "--yes")
    assert not nvram.exists() and not tpm.exists()
