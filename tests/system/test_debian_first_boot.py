"""Debian's cloud-init with what users give it, under Secure Boot with a TPM; and one that fails."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import Shell

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def pair(debian_image: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, str, str]]:
    """One guest with everything asked of its first boot, and one whose command fails; both set up side by side."""
    folder, shell = tmp_path_factory.mktemp("first-boot"), Shell()
    good, bad = (f"t-{kind}-{secrets.token_hex(3)}" for kind in ("good", "bad"))
    script, config = folder / "a.sh", folder / "b.yaml.j2"
    script.write_text("#!/bin/sh\necho by script > /var/local/script\n")
    config.write_text("#cloud-config\nwrite_files:\n  - path: /var/local/file\n    content: for {{ who }}\n")
    given = ["--user-data", str(script), "--user-data", str(config), "--var", "who=bob", "--user", "bob", "--password"]
    cards = ["--network", "", "--network", ",address=10.99.7.5/24"]
    try:
        debian = ["--image", "debian-12", "--memory", "1G"]
        machine = ["--firmware", "uefi-secure", "--tpm"]
        shell.run("create", good, *debian, *machine, *given, *cards, input="a secret\n")
        shell.run("create", bad, *debian, "--runcmd", "echo no such luck >&2; exit 3")
        yield shell, good, bad
    finally:
        for name in (good, bad):
            shell.run("delete", name, "--yes", "--missing-ok", check=None)


def test_everything_asked_for_is_there(pair: tuple[Shell, str, str]) -> None:
    shell, name, _ = pair
    told = shell.run("wait", name, "--for", "cloud-init", "--timeout", "600", timeout=620)
    assert "cloud-init at" in told.stdout

    def guest(*words: str) -> str:
        return shell.run("exec", name, "--", *words, timeout=120).stdout

    assert guest("whoami") == "bob\n"
    look = (
        "cat /var/local/script /var/local/file; echo; od -An -tu1 -j4 /sys/firmware/efi/efivars/SecureBoot-*;"
        " ls /dev/tpm0; ip -4 -o address show to 10.99.7.5; ip -4 route show default; sudo -n getent shadow bob"
    )
    lines = guest("sh", "-c", look).splitlines()
    assert lines[:2] == ["by script", "for bob"] and lines[2].strip() == "1" and lines[3] == "/dev/tpm0"
    assert "10.99.7.5/24" in lines[4] and lines[5].startswith("default via") and lines[6].startswith("bob:$6$")


def test_its_secrets_are_nowhere_on_the_host(pair: tuple[Shell, str, str]) -> None:
    shell, name, _ = pair
    assert "$6$" not in shell.virsh("dumpxml", "--security-info", name)
    for path in Path("/var/log/libvirt").rglob(f"*{name}*"):
        assert b"$6$" not in path.read_bytes() and b"a secret" not in path.read_bytes()


def test_a_failed_first_boot_is_told_with_cloud_inits_own_lines(pair: tuple[Shell, str, str]) -> None:
    shell, _, name = pair
    done = shell.run("wait", name, "--for", "cloud-init", "--timeout", "600", timeout=620, check=9)
    assert "cloud-init failed in it" in done.stderr and "scripts-user" in done.stderr.replace("_", "-")


def test_nvram_goes_with_its_vm(pair: tuple[Shell, str, str]) -> None:
    shell, name, _ = pair
    text = shell.virsh("dumpxml", name)
    nvram = Path(text.partition("<nvram")[2].partition(">")[2].partition("<")[0])
    tpm = Path("/var/lib/libvirt/swtpm") / shell.json("show", name)["uuid"]
    assert nvram.exists() and tpm.exists()
    shell.run("stop", name, "--force", "--timeout", "0")
    shell.run("rename", name, f"{name}x")
    shell.run("start", f"{name}x")
    assert shell.json("show", f"{name}x")["firmware"] == "uefi-secure"
    shell.run("delete", f"{name}x", "--yes")
    assert not nvram.exists() and not tpm.exists()
