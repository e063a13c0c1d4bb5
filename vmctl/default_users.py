"""Whom an image of a distribution lets in: the user that its cloud-init gives the SSH keys to. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# By the ID of /etc/os-release: what the distributions' own cloud images have in /etc/cloud/cloud.cfg.
OF_SYSTEM: Mapping[str, str] = MappingProxyType(
    {
        "almalinux": "almalinux",
        "alpine": "alpine",
        "amzn": "ec2-user",
        "arch": "arch",
        "centos": "cloud-user",
        "cirros": "cirros",
        "debian": "debian",
        "fedora": "fedora",
        "flatcar": "core",
        "freebsd": "freebsd",
        "gentoo": "gentoo",
        "kali": "kali",
        "openeuler": "openEuler",
        "opensuse": "opensuse",
        "opensuse-leap": "opensuse",
        "opensuse-tumbleweed": "opensuse",
        "rhel": "cloud-user",
        "rocky": "rocky",
        "ubuntu": "ubuntu",
    }
)
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
# What files are called, the first that fits; the rest of a word may be a version.
_NAMES = tuple(
    (re.compile(rf"(?<![a-z])(?:{pattern})(?![a-z])"), user)
    for pattern, user in (
        ("coreos|flatcar|fcos|rhcos", "core"),
        ("ubuntu|jammy|noble|focal|resolute", "ubuntu"),
        ("debian|bullseye|bookworm|trixie", "debian"),
        ("fedora", "fedora"),
        ("almalinux|alma", "almalinux"),
        ("rocky(?:linux)?", "rocky"),
        ("centos|rhel", "cloud-user"),
        ("opensuse|leap|tumbleweed", "opensuse"),
        ("arch|archlinux", "arch"),
        ("alpine(?:linux)?", "alpine"),
        ("amzn|al2023", "ec2-user"),
        ("cirros", "cirros"),
        ("kali", "kali"),
        ("freebsd", "freebsd"),
        ("gentoo", "gentoo"),
    )
)
_DEFAULT_USER = re.compile(
    r"^(?P<in> *)default_user:[^\n]*\n(?P<body>(?:(?P=in) +[^\n]*\n|[ \t]*(?:#[^\n]*)?\n)*)", re.M
)
_NAME = re.compile(r"^ +name:\s*(['\"]?)(?P<name>[A-Za-z0-9_.-]+)\1\s*(?:#.*)?$", re.M)


@dataclass(frozen=True, slots=True)
class Inside:
    """What an image's own files say: ID and VERSION_ID of its os-release, and its cloud.cfg; "" for one not there.

    ``seeded``: something reads a seed on the first boot. ``software`` is versions by package, as its package manager
    keeps them.
    """

    system: str = ""
    version: str = ""
    cloud_cfg: str = ""
    seeded: bool = False
    software: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Login:
    """Whom it lets in, and how that is known: "told", "catalogue", "box", "inside", "os", "name" or "nothing"."""

    user: str
    by: str
    why: str


def os_release(text: str) -> dict[str, str]:
    """The variables of an os-release file; quotes taken off."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}


def of_cloud_cfg(text: str) -> str:
    """The default user that a cloud.cfg names; "" for none that can be read."""
    found = _DEFAULT_USER.search(text + "\n")
    name = _NAME.search(found["body"]) if found else None
    return name["name"] if name and _USER.fullmatch(name["name"]) else ""


def of_name(name: str) -> str:
    """The user by what a file is called; "" when it tells nothing."""
    low = name.lower().replace("_", "-")
    return next((user for pattern, user in _NAMES if pattern.search(low)), "")


def guess(inside: Inside | None, *, system: str, osinfo: str, file: str, name: str = "") -> Login:
    """The login of an image whose user nobody told. ``inside`` None: it could not be read."""
    if inside is not None and (user := of_cloud_cfg(inside.cloud_cfg)):
        return Login(user, "inside", "its cloud-init says so")
    if inside is not None and inside.system:
        if inside.seeded or inside.system == "flatcar":
            user = OF_SYSTEM.get(inside.system, "root")
            return Login(user, "inside", f"its os-release says that it is {inside.system}")
        return Login("root", "inside", "nothing in it reads a seed on the first boot")
    if user := OF_SYSTEM.get(system) or of_name(system):
        return Login(user, "os", f"it is {system}")
    if user := of_name(osinfo):
        return Login(user, "os", f"it is {osinfo}")
    for one in (file, name):
        if user := of_name(one):
            return Login(user, "name", f"by the name {one}")
    return Login("root", "nothing", "nothing tells")
