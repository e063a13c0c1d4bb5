"""Hatch's build hook: compiles the bare-metal guests, and puts templates/ and images/ into wheels.

By hand, to compile only: ``python vmctl/baremetal/build_hook.py``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_FOUNDATIONS = ("start.S", "machine.c")
GUESTS = {
    "probe": (*_FOUNDATIONS, "probe.c"),
    "traps": (*_FOUNDATIONS, "board.c", "clock.c", "apic.c", "smp.S", "rows.c", "traps.c"),
    "popek": (*_FOUNDATIONS, "board.c", "apic.c", "smp.S", "workload.c", "sensitive.c", "popek.c"),
    "process": ("process.c", "workload.c"),  # the same work in a process of the host
    "levels": ("levels.c", "sheet.c"),  # Linux's program, the same wherever there is a Linux
}
_PROCESSES = {"process", "levels"}
_LINUX_FLAGS = "-std=gnu11 -O2 -Wall -Wextra -Werror -static -Wl,--build-id=none -Wl,-s".split()
_FLAGS = (
    # No red zone, for traps come on the same stack; no SSE, for nothing has switched it on. No symbols (-s): among
    # them are gcc's temporary names, which differ from build to build.
    "-std=gnu11 -O2 -Wall -Wextra -Werror -ffreestanding -nostdlib -static -fno-pic -fno-pie -no-pie -mno-red-zone "
    "-mno-sse -mgeneral-regs-only -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables "
    "-Wl,--build-id=none -Wl,-s"
).split()
_GUEST_FLAGS = "-Wl,-n -Wl,-T,link.ld -Wl,--no-warn-rwx-segments".split()
_TIMEOUT_S = 900  # as builder/tools.py has it for a program that hung


def compile_guests(folder: Path) -> None:
    """Compile each guest to NAME.elf beside its sources in ``folder``. Raises RuntimeError in gcc's words."""
    for name, sources in GUESTS.items():
        # Into a temporary name first: a build that is cut off must not leave half a guest to be run.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            out = Path(temporary) / f"{name}.elf"
            flags = _LINUX_FLAGS if name == "levels" else [*_FLAGS, *([] if name in _PROCESSES else _GUEST_FLAGS)]
            try:
                subprocess.run(
                    ["gcc", *flags, "-o", str(out), *sources],
                    cwd=folder,
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=_TIMEOUT_S,
                )
            except FileNotFoundError as error:
                raise RuntimeError("cannot compile vmctl's guests: gcc is missing; install gcc") from error
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"cannot compile vmctl's guest {name}: {error.stderr.strip()}") from error
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"cannot compile vmctl's guest {name}: gcc took over {_TIMEOUT_S} s") from error
            out.chmod(0o755 if name in _PROCESSES else 0o644)
            out.replace(folder / f"{name}.elf")


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, where hatchling need not be
    pass
else:

    class GuestsHook(BuildHookInterface):  # type: ignore[type-arg, misc]
        """What hatch calls before it packs."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Compile; for a real wheel, add the data folders. An editable install reads those from the checkout."""
            root = Path(self.root)
            if self.target_name != "wheel":
                return
            try:
                compile_guests(root / "vmctl/baremetal")
            except RuntimeError as error:
                self.app.abort(str(error))  # one line, where a traceback would bury it
            if version == "standard":
                for name in ("templates", "images"):
                    build_data["force_include"][str(root / name)] = f"vmctl/_data/{name}"


if __name__ == "__main__":
    try:
        compile_guests(Path(__file__).resolve().parent)
    except RuntimeError as failure:
        sys.exit(str(failure))
