"""The demonstration: vmctl's main job as the commands a user would type, each printed before it runs."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable

from vmctl import ui
from vmctl.errors import NotFound, VmctlError
from vmctl.hosts import open_host
from vmctl.images import find, outdated

_IMAGE = "micro"


def _image_there(connect: str | None) -> bool:
    with open_host(connect) as host:
        try:
            return not outdated(find(host, _IMAGE).manifest, as_named=_IMAGE)
        except NotFound:
            return False


def commands(name: str, connect: str | None, *, build: bool) -> list[list[str]]:
    """The command lines of the demonstration, without the leading ``vmctl``."""
    at = ["-c", connect] if connect else []
    lines = [
        [
            "create",
            name,
            "--image",
            _IMAGE,
            "--description",
            "made by vmctl demo",
            "--label",
            "demo=yes",
            "--wait",
            "ssh",
        ],
        ["exec", name, "--", "sh", "-c", "echo hello from $(hostname); uname -sr"],
        ["show", name],
        ["list"],
        ["pause", name],
        ["resume", name],
        ["stop", name],
        ["delete", name, "--yes"],
    ]
    if build:
        lines.insert(0, ["image", "build", _IMAGE])
    return [[*at, *line] for line in lines]


_NEXT = """\
Done. What to type next:{shell}
  vmctl create web1 --image micro --wait ssh   a VM that stays
  vmctl ssh web1                               a shell in it
  vmctl console web1                           its serial console; Ctrl-] leaves
  vmctl stop web1 && vmctl delete web1         and it is gone
  vmctl doctor                                 what could run better on this host
  vmctl --help                                 everything else"""


def run(name: str, connect: str | None, vmctl: Callable[[list[str]], int]) -> None:
    """Play it; a failing command ends it, after the VM has been cleared away. Raises VmctlError."""
    began = time.monotonic()
    made = False
    for line in commands(name, connect, build=not _image_there(connect)):
        ui.note(ui.heading(f"$ vmctl {shlex.join(line)}"))
        # Cleared away also when its creation is cut short, but never a VM that was there before.
        code = vmctl(line)
        if code:
            if made:
                vmctl([*(["-c", connect] if connect else []), "delete", name, "--yes"])
            raise VmctlError(
                f"cannot finish the demonstration: the last command ended with {code}",
                hint="`vmctl doctor` may know why",
            )
        made = made or "create" in line
        made = made and "delete" not in line
    ui.note(f"({time.monotonic() - began:.1f} s in all)\n")
    # The set-up had vmctl on the path for this command only.
    shell = os.environ.get("VMCTL_SHELL", "")
    ui.say(_NEXT.format(shell=f"\n  {shell:<44} a shell with vmctl on its path" if shell else ""))
