"""What others call what vmctl does: virsh, docker, multipass, incus, lima, kcli, vagrant, and hands used to them."""

from __future__ import annotations

import shlex
from collections.abc import Container

_ELSEWHERE = {
    "add": "create",
    "copy": "cp",
    "define": "create",
    "destroy": "delete, or stop --force",
    "domifaddr": "show",
    "dominfo": "show",
    "domrename": "rename",
    "domstate": "show",
    "down": "stop",
    "dumpxml": "show",
    "fsfreeze": "freeze",
    "fsthaw": "thaw",
    "fstrim": "trim",
    "halt": "stop",
    "help": "--help",
    "hibernate": "save",
    "images": "image list",
    "info": "show, or host info",
    "inspect": "show",
    "ip": "show",
    "kill": "stop --force",
    "launch": "create",
    "log": "logs",
    "ls": "list",
    "managedsave": "save",
    "monitor": "events",
    "mount": "share",
    "mv": "rename",
    "new": "create",
    "pool": "disk pool",
    "poweroff": "stop",
    "ps": "list",
    "pull": "image pull",
    "purge": "delete",
    "remove": "delete",
    "restart": "reboot",
    "restore": "snapshot revert, or backup restore, or start",
    "revert": "snapshot revert",
    "rollback": "snapshot revert",
    "rm": "delete",
    "rmi": "image delete",
    "run": "create",
    "scp": "cp",
    "set-user-password": "passwd",
    "shell": "ssh",
    "shutdown": "stop",
    "status": "list, or show",
    "suspend": "pause, or save",
    "terminate": "delete",
    "template": "image warm, or clone",
    "transfer": "cp",
    "umount": "unshare",
    "undefine": "delete",
    "unpause": "resume",
    "up": "create, or start",
    "version": "--version",
    "vncdisplay": "view",
}
_IN_GROUPS = {
    "image": {
        "add": "import",
        "create": "build",
        "fetch": "pull",
        "find": "search",
        "get": "pull",
        "load": "import",
        "make": "build",
        "new": "build",
        "save": "export",
        "update": "pull",
        "upload": "import",
    },
    "disk": {
        "add": "attach",
        "extend": "resize",
        "grow": "resize",
        "plug": "attach",
        "shrink": "resize",
        "throttle": "limit",
        "unplug": "detach",
    },
    "host": {"create": "add", "delete": "remove", "doctor": "check", "new": "add", "ping": "check", "rm": "remove"},
}


def elsewhere(at: str, word: str, known: Container[str]) -> list[str]:
    """The command lines by which vmctl does what others call ``word``, in the group ``at`` ("vmctl image").

    ``known`` are the commands of that group: what `rm` is for VMs it is for images.
    """
    group = at.removeprefix("vmctl").strip()
    meant = _IN_GROUPS.get(group, {}).get(word, "") or _ELSEWHERE.get(word, "")
    ways = meant.split(", or ") if meant else []
    if group:  # whatever holds of VMs only is left out
        ways = [way for way in ways if way in known]
    return [f"{at} {way}" for way in ways]


_JOINED = {"DISK": ":", "VM.SNAPSHOT": ".", "VM[.SNAPSHOT]": "."}


def in_one_word(at: str, args: list[str], kind: str) -> str:
    """The command line meant by one that names a disk or a snapshot in two words, as virsh would; "" for any other.

    ``at`` is the command ("vmctl disk resize"), ``kind`` what its first argument is called.
    """
    path = at.split()[1:]
    after = next((n + len(path) for n in range(len(args)) if args[n : n + len(path)] == path), 0)
    named, rest = args[after : after + 2], args[after + 2 :]
    plain = all(word[:1] != "-" and not set(word) & set(":./") for word in named)
    if kind not in _JOINED or len(named) < 2 or not plain or not after:
        return ""
    return shlex.join(["vmctl", *args[:after], _JOINED[kind].join(named), *rest])
