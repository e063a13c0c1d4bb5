"""Where the levels' program runs: a process, a process of qemu-user's, a container, a guest, a guest within a guest.

All say the same on what they print to; what differs is how they begin and how they are heard.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vmctl import render
from vmctl.bench import guests, levels_words
from vmctl.bench.environment import Waiting
from vmctl.bench.levels_words import Said
from vmctl.builder import cpio
from vmctl.builder.tree import Tree
from vmctl.errors import Unsupported, VmctlError, reason
from vmctl.hosts import Host
from vmctl.hypervisor import connection, console
from vmctl.render import ContainerView, ProbeView
from vmctl.resources import baremetal_guest
from vmctl.workspace import workspace

MEMORY_MIB, OUTER_MIB = 192, 1024
_CONTAINERS = "lxc:///system"
_EPOCH = 0
# Words of the image's that would change what is measured: the kernel is to do here what Debian's does by itself.
_CHANGING = {"mitigations=off", "init_on_alloc=0"}
_FIRMWARE = ("bios-256k.bin", "pvh.bin", "kvmvapic.bin", "linuxboot_dma.bin")
_FIRMWARE_FOLDERS = (Path("/usr/share/seabios"), Path("/usr/share/qemu"), Path("/usr/share/qemu-kvm"))
_TIMEOUT_S = 20.0
_NESTED_S = 1800.0

Hear = Callable[[Said], None]


class Order(NamedTuple):
    """What is to be measured, and for how long."""

    rounds: int
    parts: int
    part_us: int
    rows: tuple[str, ...]

    def words(self) -> list[str]:
        """As the program takes it."""
        shape = [f"rounds={self.rounds}", f"parts={self.parts}", f"part={self.part_us}"]
        return [*shape, f"rows={','.join(self.rows)}"]


class Heard(NamedTuple):
    """What was said, and what was wrong about the end; "" for nothing."""

    said: Said
    wrong: str


def program() -> Path:
    """The levels' program. Raises VmctlError where it was not compiled."""
    path = baremetal_guest("levels")
    guests.read(path)
    return path


def process(argv: Sequence[str], hear: Hear, silent_s: float) -> Heard:
    """A process of this machine, ended when it is silent for so long. Raises VmctlError where it cannot be run."""
    said = bytearray()
    try:
        running = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
    except OSError as error:
        raise VmctlError(f"cannot run {argv[0]}: {reason(error)}") from error
    with running:
        try:
            assert running.stdout is not None
            while select.select([running.stdout], [], [], silent_s)[0]:
                data = os.read(running.stdout.fileno(), 65536)
                if not data:
                    return _ended(bytes(said), f"it ended with {running.wait(_TIMEOUT_S)}")
                said += data
                hear(levels_words.read(bytes(said)))
            return _ended(bytes(said), f"it said nothing for {silent_s:.0f} s")
        finally:
            running.kill()


def _ended(said: bytes, how: str) -> Heard:
    found = levels_words.read(said)
    return Heard(found, found.wrong or ("" if found.done else how))


def user_emulator() -> str:
    """QEMU's emulator of single processes. Raises Unsupported where there is none."""
    for name in ("qemu-x86_64", "qemu-x86_64-static"):
        if path := shutil.which(name):
            return path
    raise Unsupported("qemu-x86_64 is not there (Debian's package qemu-user)")


def version_of(argv: Sequence[str]) -> str:
    """The first line of what a program says of itself; "" where it says nothing."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([*argv], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        return done.stdout.partition("\n")[0].strip()
    return ""


def container(host: Host, order: Order, hear: Hear, silent_s: float) -> Heard:
    """A container of libvirt's LXC driver with nothing but the program in it. Raises what libvirt says against it."""
    with connection.connect(_CONTAINERS) as conn:
        host.folders.cache.mkdir(parents=True, exist_ok=True)
        with workspace(host.folders.cache, ".levels-") as root:
            root.chmod(0o755)
            shutil.copy(program(), root / "levels")
            for name in ("proc", "sys", "dev", "tmp"):
                (root / name).mkdir()
            name = guests.own_name("vmctl-bench-levels")
            view = ContainerView(name, str(root), "/levels", ("hold=1", *order.words()), MEMORY_MIB)
            xml = render.container(view)
            return _heard(conn, xml, hear, silent_s, paused=False, doing="run a container")


def kernel_words(cmdline: str, *words: str) -> str:
    """A kernel's command line: what the image's says to boot quickly, and the first process's words."""
    kept = [word for word in cmdline.split() if word not in _CHANGING]
    return " ".join([*kept, "panic=-1", "--", "machine=1", "hold=1", *words])


def guest(host: Host, view: ProbeView, initrd: str, words: str, hear: Hear, silent_s: float) -> Heard:
    """A guest whose first process is the program."""
    whole = replace(view, memory_mib=MEMORY_MIB, initrd=initrd, words=words)
    return _heard(host.conn, render.probe(whole), hear, silent_s)


def nested(host: Host, view: ProbeView, initrd: str, words: str, hear: Hear, silent_s: float) -> Heard:
    """A guest whose first process is a QEMU with such a guest, which speaks through it."""
    whole = replace(view, memory_mib=OUTER_MIB, initrd=initrd, words=words)
    return _heard(host.conn, render.probe(whole), hear, silent_s, timeout_s=_NESTED_S)


def _heard(
    conn: connection.Connection,
    xml: str,
    hear: Hear,
    silent_s: float,
    *,
    paused: bool = True,
    doing: str = "run a guest",
    timeout_s: float = guests.LONGEST_S,
) -> Heard:
    waiting = Waiting(time.monotonic)
    before = Said()

    def look(said: bytes) -> tuple[bool, bool]:
        nonlocal before
        found = levels_words.read(said)
        waiting.during(_at_work(before, found))
        before = found
        hear(found)
        return found.done or bool(found.wrong), True

    ear = guests.Ear(look, silent_s)
    heard = console.transcript(
        conn,
        xml,
        until=ear.enough,
        timeout_s=timeout_s,
        waited=waiting.look if paused else None,
        goodbye=guests.GOODBYE,
        paused=paused,
        doing=doing,
    )
    found = _ended(heard.said, f"it {ear.how(heard)}")
    return _as_the_host_knows(found, waiting) if paused else found


def _at_work(before: Said, now: Said) -> set[str]:
    """The rows that were measured between two looks."""
    ended = {name for name, runs in now.runs.items() if len(runs) > len(before.runs.get(name, ()))}
    return ended | ({now.begun} if now.begun else set())


def _as_the_host_knows(heard: Heard, waiting: Waiting) -> Heard:
    """How long a guest's rows waited for a CPU, as its host knows it: the guest's own kernel knows nothing of that."""
    for name, runs in heard.said.runs.items():
        heard.said.runs[name] = [replace(run, waited_percent=waiting.percent(name)) for run in runs]
    return heard


# --- what they boot from --------------------------------------------------------------------------------------


def initrd() -> bytes:
    """An initramfs with the program as the first process."""
    return cpio.archive(_small(), _EPOCH)


def _small() -> Tree:
    tree = Tree()
    tree.folder("dev")
    tree.console("dev/console")
    tree.file("init", program().read_bytes(), 0o755)
    return tree


def nesting_initrd(emulator: Path, kernel: bytes, words: str) -> bytes:
    """An initramfs with this machine's QEMU, all libraries it needs, and the guest that it is to run.

    Raises Unsupported where that QEMU is no file here.
    """
    tree = _small()
    for path in _with_libraries([emulator, *_tcg_modules(emulator)]):
        tree.file(str(path).lstrip("/"), path.read_bytes(), 0o755)
    for name in _FIRMWARE:
        found = next((folder / name for folder in _FIRMWARE_FOLDERS if (folder / name).is_file()), None)
        if found:
            tree.file(f"fw/{name}", found.read_bytes())
    tree.file("kernel", kernel)
    tree.file("inner", initrd())
    argv = [str(emulator), "-accel", "tcg", "-machine", "q35", "-cpu", "max", "-smp", str(guests.VCPUS)]
    argv += ["-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-L", "/fw"]
    argv += ["-serial", "stdio", "-kernel", "/kernel", "-initrd", "/inner", "-append", words]
    tree.file("nest", "\n".join(argv).encode())
    return cpio.archive(tree, _EPOCH)


def _tcg_modules(emulator: Path) -> list[Path]:
    """The translator, where it is a file of its own."""
    name = f"accel-{emulator.name.replace('qemu-system', 'tcg')}.so"
    return sorted(Path("/usr/lib").glob(f"*/qemu/{name}")) + sorted(Path("/usr/lib/qemu").glob(name))


def _with_libraries(programs: Sequence[Path]) -> list[Path]:
    """Programs with what the dynamic linker loads for them, by the paths it looks for them at."""
    found = dict.fromkeys(programs)
    for program_ in programs:
        try:
            done = subprocess.run(
                ["ldd", str(program_)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Unsupported(f"the libraries of {program_} cannot be found: {reason(error)}") from error
        for line in done.stdout.splitlines():
            words = line.split()
            path = words[2] if words[1:2] == ["=>"] and len(words) > 2 else words[0]
            if path.startswith("/"):
                found[Path(path)] = None
    return list(found)
