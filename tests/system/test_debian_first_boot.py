"""Debian's cloud-init with what users give it, under Secure Boot with a TPM."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import Shell

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def name(debian_image: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A guest with everything asked of its first boot."""
    folder, shell, chosen = tmp_path_factory.mktemp("first-boot"), Shell(), f"t-good-{secrets.token_hex(3)}"
    given = {
        "a.sh": "#!/bin/sh\necho by script > /var/local/script\n",
        "b.yaml.j2": "#cloud-config\nwrite_files:\n  - path: /var/local/file\n    content: for {{ who }}\n",
        "vendor": "#cloud-config\nruncmd:\n  - echo by vendor > /var/local/vendor\n",
    }
    for file, text in given.items():
        (folder / file).write_text(text)
    files = {file: str(folder / file) for file in given}
    asked = ["--user-data", files["a.sh"], "--user-data", files["b.yaml.j2"], "--var", "who=bob", "--user", "bob"]
    asked += ["--vendor-data", files["vendor"], "--password", "--network", "", "--network", ",address=10.99.7.5/24"]
    debian = ["--image", "debian-12", "--memory", "1G", "--firmware", "uefi-secure", "--tpm"]
    try:
        shell.run("create", chosen, *debian, *asked, input="a secret\n")
        yield chosen
    finally:
        shell.run("delete", chosen, "--yes", "--missing-ok", check=None)


def test_everything_asked_for_is_there(shell: Shell, name: str) -> None:
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


def test_its_secrets_are_nowhere_on_the_host(shell: Shell, name: str) -> None:
    assert "$6$" not in shell.virsh("dumpxml", "--security-info", name)
    for path in Path("/var/log/libvirt").rglob(f"*{name}*"):
        assert b"$6$" not in path.read_bytes() and b"a secret" not in path.read_bytes()


def test_what_its_tpm_said_is_gone_with_the_test_host(name: str) -> None:
    """libvirt keeps the logs of TPMs beside its own folder of logs."""
    assert list(Path("/var/log/swtpm/libvirt/qemu").glob(f"{name}*.log"))
    assert os.path.ismount("/var/log")


def test_nvram_goes_with_its_vm(shell: Shell, name: str) -> None:
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
