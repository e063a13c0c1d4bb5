"""What each verb's --dry-run tells beside what the verb then does to files and definitions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import Shell

pytestmark = pytest.mark.system

LIBVIRT = Path("/var/lib/libvirt")
SECOND = LIBVIRT / "dry-second"
KEPT = LIBVIRT / "dry-backups"
FOLDERS = (LIBVIRT / "vmctl", SECOND, KEPT, LIBVIRT / "qemu/nvram", LIBVIRT / "qemu/save")
BEGINS = re.compile(
    r"(?:would )?(?P<verb>make|new volume|delete|volume) (?!snapshot )(?P<what>[^\s,]+)(?P<time>, or )?"
)

OFF = [
    "disk create VM-spare 8M",
    "disk attach VM 4M --serial one",
    "disk attach VM VM-spare --serial two",
    "disk limit VM:one --iops 100",
    "disk resize VM:one +1M",
    "disk resize VM:one 4M --shrink",
    "disk move VM:one --pool dry-second",
    "disk move VM:one --pool vmctl",
    "disk convert VM:one --format raw",
    "disk convert VM:one --format qcow2",
    "disk compact VM:one",
    "disk check VM:one --repair",
    "disk create VM-top --backing VM-bottom",
    "disk rebase VM-top --onto VM-lower",
    "disk flatten VM-top",
    "disk delete VM-top --yes",
    "disk detach VM:two",
    "disk detach VM:one --delete --yes",
    "snapshot create VM.one",
    "snapshot create VM.two",
    "snapshot create VM.three",
    "snapshot create VM.three --reuse",
    "snapshot revert VM.two --yes",
    "snapshot delete VM.two --yes",
    "snapshot create VM.four",
    "snapshot revert VM.one --safety --yes",
    "snapshot revert VM.three --yes",
    "snapshot delete VM.one --yes",
    "snapshot delete VM.three VM.four --yes",
    "snapshot create VM.last --max 1",
    "snapshot delete VM.last --yes",
    "clone VM VM-linked --count 2",
    "clone VM VM-full --full",
    "delete VM-linked-1 --yes",
    "delete VM-linked-2 VM-full --yes",
    "backup create VM",
    "backup create VM",
    "backup create VM --keep 1",
    "backup restore VM --yes",
    "backup restore VM --as VM-back",
    "backup restore VM --as VM-other --new-identity",
    "backup create VM --full",
    "backup prune VM --keep 1 --yes",
    "delete VM-back VM-other --yes",
]
ON = [
    "disk attach VM 4M --serial hot",
    "disk move VM:hot --pool dry-second",
    "disk detach VM:hot --delete --yes",
    "snapshot create VM.live",
    "snapshot create VM.disks --no-memory",
    "snapshot revert VM.live --yes",
    "snapshot delete VM.live VM.disks --yes",
    "fork VM VM-forked --count 2",
    "backup create VM",
    "disk flatten VM:vda",
    "delete VM-forked-1 VM-forked-2 --yes",
    "image warm micro --memory 128M",
    "create VM-warm --image micro --memory 128M --warm",
    "delete VM-warm --yes",
    "image warm micro --remove",
    "delete VM --yes",
]


def files() -> dict[str, str]:
    """Every file there is, with a digest of what is in it; of a log, which is written to at any time, that it is."""
    found = [path for folder in FOLDERS if folder.exists() for path in folder.rglob("*") if path.is_file()]
    return {str(one): "" if one.suffix == ".log" else digest(one) for one in found}


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def definitions(shell: Shell) -> dict[str, str]:
    names = shell.virsh("list", "--all", "--name").split()
    return {name: shell.virsh("dumpxml", name, "--inactive") for name in names}


def untold(said: str, was: dict[str, str], now: dict[str, str], *, busy: set[str]) -> Iterator[str]:
    """The differences between what was said and what was done to files; ``busy``: those that a running VM writes to."""
    lines = [line for line in said.splitlines() if not line.startswith(("read ", "would read "))]
    verbs = {(one["verb"], Path(one["what"]).name) for one in map(BEGINS.match, lines) if one and not one["time"]}
    made, gone = now.keys() - was.keys(), was.keys() - now.keys()
    for path in sorted(made | gone | {path for path in was.keys() & now.keys() if was[path] != now[path]} - busy):
        how = "made" if path in made else "gone" if path in gone else "changed"
        if not any(name and name in line for line in lines for name in names(path)):
            yield f"{how}, untold: {path}"
    briefly = {name for verb, name in verbs if verb == "make"} & {name for verb, name in verbs if verb == "delete"}
    for verb, name in sorted(one for one in verbs if one[1] not in briefly):
        there = {one for path in (gone if verb in {"delete", "volume"} else made) for one in names(path)}
        if name not in there:
            yield f"told, and not done: {verb} {name}"


def names(path: str) -> set[str]:
    """Those by which a file may be told of: its own; or that of the backup that it is in, which may be the time."""
    backup = path.startswith(str(KEPT))
    return {Path(path).name, *([Path(path).parent.name, f"make {Path(path).parent.parent}/"] if backup else [])}


@pytest.fixture
def machine(shell: Shell, name: str) -> Iterator[str]:
    shell.cold()  # what is warmed below is not replaced, but new
    shell.run("disk", "pool", "create", "dry-second", "--path", str(SECOND))
    for one, words in (("bottom", ()), ("lower", ())):
        shell.run("disk", "create", f"{name}-{one}", "8M", *words)
    shell.run("create", name, "--image", "micro", "--no-start")
    yield name
    for one in ("bottom", "lower", "spare"):
        shell.run("disk", "delete", f"{name}-{one}", "--yes", check=None)
    shell.run("disk", "pool", "delete", "dry-second", "--yes")


def test_what_is_told_is_what_is_done(shell: Shell, machine: str) -> None:
    wrong = []
    for line in (*OFF, f"start {machine}", *ON):
        words = [word.replace("VM", machine) for word in line.split()]
        if words[0] == "start":
            shell.run("start", machine)
            shell.run("wait", machine, "--for", "agent")
            continue
        if words[0] == "backup":
            words += ["--folder", str(KEPT)]
        before, defined = files(), definitions(shell)
        busy = set()
        for vm in shell.virsh("list", "--name").split():
            busy |= set(re.findall(r"(?:file|source)='(/[^']+)'", shell.virsh("dumpxml", vm)))
        dry = [word for word in words if word != "--yes"]
        said = shell.run(*dry, "--dry-run").stdout
        after = files()
        wrong += [f"{line}: the dry run itself: {one}" for one in untold("", before, after, busy=busy)]
        if definitions(shell) != defined:
            wrong.append(f"{line}: the dry run itself changed a definition")
        shell.run(*words, timeout=240)
        wrong += [f"{line}: {one}\n{said}" for one in untold(said, after, files(), busy=busy)]
        done = definitions(shell)
        for vm in done.keys() | defined.keys():
            if done.get(vm) != defined.get(vm) and not re.search(rf"\bVM {re.escape(vm)}\b|\b{re.escape(vm)}\b", said):
                wrong.append(f"{line}: definition of {vm}, untold\n{said}")
    assert not wrong, "\n".join(wrong)
