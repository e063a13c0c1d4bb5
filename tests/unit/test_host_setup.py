"""What a machine lacks to be a host."""

from __future__ import annotations

from pathlib import Path

from vmctl.host_setup import PACKAGES, changes, read

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
    assert scripts[0] == "" and scripts[1].endswith("install --no-install-recommends qemu-utils ovmf")
    assert "systemctl enable --now" in scripts[3] and scripts[4] == "usermod -a -G libvirt me"
    without = changes(read(BARE.replace("systemd=yes", "systemd=no")))
    assert "|| virtlogd -d; libvirtd -d" in without[3].script


def test_its_packages_are_among_those_that_vmctl_says_it_needs() -> None:
    text = (REPO / "vmctl/packages.debian").read_text().partition("\n[run]\n")[2].partition("\n[test]\n")[0]
    assert set(PACKAGES) <= {line.split()[0] for line in text.splitlines() if line.strip()}
