"""What a machine lacks to be a host."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmctl.config import HostEntry
from vmctl.errors import SpecError
from vmctl.host_setup import PACKAGES, Login, changes, login, meant, read
from vmctl.host_ssh import fingerprint, place

REPO = Path(__file__).parents[2]
FINE = "uid=0\nuser=root\ngroups=root\nroot=yes\nos=debian \nsystemd=yes\nlibvirt=yes\nkvm=kvm 660\n"
BARE = (
    "uid=1000\nuser=me\ngroups=me sudo\nroot=yes\nos=ubuntu debian\n"
    "missing=qemu-utils\nmissing=ovmf\nsystemd=yes\nlibvirt=no\nkvm=root 600\n"
)


def test_one_that_is_as_it_should_be() -> None:
    assert changes(read(FINE)) == ()


def test_a_bare_one() -> None:
    found = changes(read(BARE))
    assert [one.what for one in found] == [
        "package qemu-utils",
        "package ovmf",
        "/dev/kvm: group kvm instead of root 600",
        "libvirtd running",
        "user me in group libvirt",
        "user me in group kvm",
    ]
    scripts = [one.script for one in found]
    install = "apt-get -q -y -o DPkg::Lock::Timeout=600 install --no-install-recommends qemu-utils ovmf"
    assert scripts[0] == "" and scripts[1].endswith(f"; {install} || {{ dpkg --configure -a; {install}; }}")
    assert "systemctl enable --now" in scripts[3] and scripts[4] == "usermod -a -G libvirt me"
    without = changes(read(BARE.replace("systemd=yes", "systemd=no")))
    assert without[3].script.startswith("virtlogd -d || :; libvirtd -d || ")
    assert found[1].doing == "2 packages" and "apt-get update" in found[1].hint
    assert changes(read(FINE + "missing=ovmf\n"))[0].doing == ""


def test_its_packages_are_among_those_that_vmctl_says_it_needs() -> None:
    text = (REPO / "vmctl/packages.debian").read_text().partition("\n[run]\n")[2].partition("\n[test]\n")[0]
    assert set(PACKAGES) <= {line.split()[0] for line in text.splitlines() if line.strip()}


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("root@big.example", "big"),
        ("root@big", "big"),
        ("me@10.98.0.11", "10-98-0-11"),
        ("root@[fe80::1]", "fe80-1"),
        ("root@big:2222", "big"),
    ],
)
def test_whom_a_login_means(where: str, name: str) -> None:
    assert login(where, "") == Login(f"qemu+ssh://{where}/system", name)


@pytest.mark.parametrize(
    "where",
    ["", "@", "@x", "x", "root@", "root@ x", "ro ot@x", "root@x/y", "root@x?y", "root@-x", "root@fe80::1", "a@b@c"]
    + ["root:secret@x", "ro/ot@x", "-o@x", "root@x:", "root@x:y", "root@x\n"],
)
def test_what_is_no_login(where: str) -> None:
    with pytest.raises(SpecError, match="it is no USER@MACHINE"):
        login(where, "")


def test_the_private_key_is_found_again_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a key & more"
    odd.touch()
    monkeypatch.chdir(tmp_path)
    assert place(login("root@big", odd.name).uri).keyfile == str(odd)
    with pytest.raises(SpecError, match="there is no private key nope"):
        login("root@big", "nope")


def test_a_known_host_is_set_up_again_by_its_login_alone_and_with_no_other_key(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    key, other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDfm", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ9Y"
    first = login("root@big", str(tmp_path / "key"))
    entry = HostEntry("big", first.uri, key)
    for wanted in (first, login("root@big", "")):
        meant(entry, wanted, key, "")
        meant(entry, wanted, "", fingerprint(key))
        for given in ((other, ""), ("", fingerprint(other))):
            with pytest.raises(SpecError, match="the SSH host key that is given is not SHA256:"):
                meant(entry, wanted, *given)
    for where in ("root@far", "me@big", "root@big:2222"):
        with pytest.raises(SpecError, match="that host is qemu"):
            meant(entry, login(where, ""), "", "")
