"""A QEMU that libvirtd, killed at a bad moment, does not know of any more: found, named, and nobody else's disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.system import libvirtd
from tests.system.conftest import REPO, VMCTL, Shell
from tests.system.test_interrupted import interrupted
from vmctl import disk_journal, disk_xml, durable, render, snapshot_journal, switch_over
from vmctl.hosts import open_host
from vmctl.hypervisor import domain
from vmctl.record import Owned
from vmctl.wait import wait_until

pytestmark = pytest.mark.system


JOURNAL = Path.home() / ".local/share/vmctl/snapshot-journal"
SECOND = "for d in /sys/block/vd*; do [ $(cat $d/size) = 16384 ] && d=/dev/${d##*/} && break; done"  # that of 8M


def forget(shell: Shell, vm: str) -> int:
    """Restart libvirtd as it is after a kill in the moment of a switch-over; the process it does not know of then."""
    status = Path(f"/run/libvirt/qemu/{vm}.xml")
    daemon, qemu = (int(Path(f"/run/libvirt{name}").read_text()) for name in ("d.pid", f"/qemu/{vm}.pid"))
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{daemon}").exists(), what="end of libvirtd", timeout_s=30)
    text = status.read_text()
    status.write_text(text.replace("<target dev='vda'", "<mirror type='file' job=''/>\n<target dev='vda'", 1))
    libvirtd.begin()
    return qemu


def told(shell: Shell, *words: str) -> list[dict[str, str]]:
    """What doctor says."""
    found: list[dict[str, str]] = json.loads(shell.run("doctor", *words, "-o", "json", check=None).stdout)
    return found


def choices(shell: Shell, *words: str) -> list[dict[str, str]]:
    """What doctor says of files of which the user has to choose one."""
    return [one for one in told(shell, *words) if one["name"] == "choices"]


def chosen(shell: Shell, keep: str, left: str) -> None:
    """Let the VM have the one file: the other stays, and doctor, who is asked again, has nothing more to say of it."""
    (found,) = choices(shell, "--fix", "--keep", keep)
    assert found["result"] == "mended" and keep in found["detail"], found
    assert not choices(shell, "--fix") and Path(keep).exists() and Path(left).exists()


def processes(shell: Shell) -> list[dict[str, str]]:
    """What doctor says of processes."""
    return [one for one in told(shell) if one["name"] == "processes"]


def test_a_vm_that_libvirt_forgot_is_found_and_left_alone(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro")
    assert [one["result"] for one in processes(shell)] == ["ok"]
    qemu = forget(shell, name)
    assert shell.virsh("domstate", name) == "shut off" and Path(f"/proc/{qemu}").exists()
    (found,) = processes(shell)
    assert found["result"] == "failed" and name in found["detail"] and f"kill {qemu}" in found["mend"]
    for words in (
        ("start", name),
        ("delete", name, "--yes"),
        ("clone", name, f"{name}-new"),
        ("disk", "resize", f"{name}:vda", "+1G"),
        ("disk", "compact", f"{name}:vda"),
        ("snapshot", "create", f"{name}.one"),
        ("backup", "create", name, "--folder", "/var/tmp/forgotten"),
    ):
        refused = shell.run(*words, check=5).stderr
        assert re.search(rf"runs, in process {qemu}, and libvirt has forgotten it\nhint: .*kill {qemu}", refused), (
            refused
        )
    os.kill(qemu, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{qemu}").exists(), what="end of QEMU", timeout_s=30)
    assert [one["result"] for one in processes(shell)] == ["ok"]
    shell.run("start", name)


@pytest.mark.parametrize("switched", [False, True])
def test_what_a_forgotten_vm_writes_to_is_not_deleted(
    shell: Shell, name: str, tmp_path: Path, pool: Path, switched: bool
) -> None:
    """libvirt dies as the disk is switched over, the definition not written; vmctl has heard of the switch or not."""
    shell.run("create", name, "--image", "micro", "--disk", "8M", "--wait", "agent")
    (old,) = [d.source for d in disk_xml.read(shell.virsh("dumpxml", name)) if d.target == "vdc"]
    new = str(pool / Path(old).name)
    _, steps = interrupted(tmp_path, "SIGKILL", 3, "disk", "move", f"{name}:vdc", "--pool", pool.name)
    assert steps[-1] == "disks.copy_and_switch" and new in shell.virsh("dumpxml", name)
    (tmp_path / "old.xml").write_text(shell.virsh("dumpxml", name, "--inactive").replace(new, old))
    if switched:
        with open_host() as host:
            ((_, entry),) = disk_journal.entries(host)
            disk_journal.note(host, entry, replace(entry, switched=True))
    shell.run("exec", name, "--", "sh", "-c", f"{SECOND}; echo later | dd of=$d conv=fsync,notrunc")
    qemu = forget(shell, name)
    shell.virsh("define", str(tmp_path / "old.xml"))
    for words in (("doctor", "--fix"), ("disk", "compact", f"{name}:vdc")):
        done = shell.run(*words, check=None)
        assert done.returncode and f"kill {qemu}" in done.stdout + done.stderr
        assert Path(old).exists() and Path(new).exists()
    os.kill(qemu, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{qemu}").exists(), what="end of QEMU", timeout_s=30)
    found = choices(shell, "--fix")
    assert bool(found) != switched and Path(new).exists() and Path(old).exists() != switched, found
    if not switched:
        assert old in found[0]["detail"] and new in found[0]["detail"] and "takes" in found[0]["detail"]
        chosen(shell, new, old)
    (now,) = [d.source for d in disk_xml.read(shell.virsh("dumpxml", name)) if d.target == "vdc"]
    assert now == new
    Path(old).unlink(missing_ok=True)
    shell.run("delete", name, "--yes")


def went_on(shell: Shell, vm: str, base: str, overlay: str) -> None:
    """Bring a VM's vda to a new layer, as libvirt does, which is killed before it has noted that it did."""

    def qmp(command: str, **arguments: object) -> object:
        text = json.dumps({"execute": command, "arguments": arguments})
        done = json.loads(shell.virsh("qemu-monitor-command", vm, text))
        assert "return" in done, done
        return done["return"]

    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, overlay]
    subprocess.run(words, check=True, timeout=60)
    shutil.chown(overlay, Path(base).stat().st_uid, Path(base).stat().st_gid)
    blocks = qmp("query-block")
    assert isinstance(blocks, list)
    (node,) = [b["inserted"]["node-name"] for b in blocks if b.get("inserted", {}).get("file") == base]
    file = {"driver": "file", "filename": overlay, "node-name": "later-storage"}
    qmp("blockdev-add", **{"driver": "qcow2", "node-name": "later", "file": file, "backing": None, "discard": "unmap"})
    qmp("blockdev-snapshot", node=node, overlay="later")


@pytest.mark.parametrize("kept", ["layer", "base"])
def test_what_a_vm_went_on_in_for_a_fork_is_told_when_it_has_stopped(shell: Shell, name: str, kept: str) -> None:
    shell.guest(name)
    (base,) = [d.source for d in disk_xml.read(shell.virsh("dumpxml", name)) if d.target == "vda"]
    layer = base.replace(".qcow2", "-layer1.qcow2")
    with open_host() as host:
        record = domain.find(host.conn, name).facts.record
        assert record is not None
        owned = (*record.owned, Owned("vmctl", Path(layer).name))
        domain.set_record(host.conn, name, render.metadata(replace(record, owned=owned)))
    went_on(shell, name, base, layer)
    shell.run("exec", name, "--", "sh", "-c", "echo later >/root/later; sync")
    shell.virsh("destroy", name)  # vmctl stop would see to the definition first
    (found,) = [one for one in told(shell, "--fix") if one["name"] == "layers"]
    assert found["result"] == "warning" and f"{layer} may be newer than {base}" in found["detail"]
    shell.run(*found["mend"].partition(";")[0].removeprefix("look at both: vmctl ").split())
    assert Path(layer).exists() and f"doctor --fix --keep {layer}" in found["mend"]
    chosen(shell, *((layer, base) if kept == "layer" else (base, layer)))
    assert [one["result"] for one in told(shell) if one["name"] == "layers"] == ["ok"]
    shell.run("start", name)
    shell.run("wait", name, "--for", "agent")
    later = shell.run("exec", name, "--", "cat", "/root/later", check=None).stdout
    assert later == ("later\n" if kept == "layer" else "")
    shell.run("delete", name, "--yes")
    assert Path(layer).exists() == (kept == "base")
    Path(layer).unlink(missing_ok=True)


@pytest.mark.parametrize("stopped", ["", "base", "overlay"])
def test_what_a_vm_went_on_in_is_not_deleted(shell: Shell, name: str, tmp_path: Path, stopped: str) -> None:
    """libvirt dies as a snapshot is taken: QEMU writes to the new layer, and libvirt knows of the old one alone."""
    shell.guest(name)
    if stopped:
        shell.run("snapshot", "create", f"{name}.zero", "--no-memory")
    (base,) = [d.source for d in disk_xml.read(shell.virsh("dumpxml", name)) if d.target == "vda"]
    _, steps = interrupted(tmp_path, "SIGKILL", 1, "snapshot", "create", f"{name}.one", "--no-memory")
    assert steps == ["snapshot_journal.begin"]
    with open_host() as host:
        ((_, entry),) = snapshot_journal.entries(host)
    (overlay,) = entry.files
    went_on(shell, name, base, overlay)
    shell.run("exec", name, "--", "sh", "-c", "echo later >/root/later; sync")
    if stopped:
        shell.virsh("destroy", name)
        refused = shell.run("start", name, check=5).stderr  # else what is in the layer would be true no more
        assert f"vda is {base}" in refused and f"gone on in {overlay}" in refused, refused
        for words in (
            ("rename", name, f"{name}-new"),
            ("clone", name, f"{name}-new"),
            ("clone", name, f"{name}-new", "--full"),
            ("disk", "detach", f"{name}:vda"),
            ("disk", "convert", f"{name}:vda", "--format", "raw"),
            ("snapshot", "create", f"{name}.two"),
            ("snapshot", "revert", f"{name}.zero", "--yes"),
            ("snapshot", "revert", f"{name}.zero", "--dry-run"),
            ("backup", "create", name, "--folder", str(tmp_path / "backups")),
        ):
            refused = shell.run(*words, check=5).stderr  # after these nobody would know whose the layer is
            assert f"gone on in {overlay}" in refused and Path(overlay).exists(), (words, refused)
        (found,) = choices(shell, "--fix")
        assert base in found["detail"] and overlay in found["detail"]
        chosen(shell, *((base, overlay) if stopped == "base" else (overlay, base)))
        shell.run("start", name)
        shell.run("wait", name, "--for", "agent")
        later = shell.run("exec", name, "--", "cat", "/root/later", check=None).stdout
        assert later == ("" if stopped == "base" else "later\n")
        shell.run("delete", name, "--yes")
        Path(overlay).unlink(missing_ok=True)
        return
    for words in (
        ("fork", name, f"{name}-new"),
        ("snapshot", "create", f"{name}.two"),
        ("disk", "resize", f"{name}:vda", "+1G"),
        ("disk", "move", f"{name}:vda", "--pool", "vmctl"),
        ("backup", "create", name, "--folder", str(tmp_path / "backups")),
        ("save", name),
    ):
        refused = shell.run(*words, check=None)
        assert refused.returncode == 5, (words, refused.stdout, refused.stderr)
        assert f"vda in {overlay}" in refused.stderr and f"then vmctl stop {name}" in refused.stderr, refused.stderr
    (found,) = [one for one in told(shell, "--fix") if one["name"] == "layers"]
    assert found["result"] == "mended" and overlay in found["detail"]
    assert Path(overlay).exists()
    shell.run("stop", name)
    shell.run("start", name)
    shell.run("wait", name, "--for", "ssh", "--timeout", "200", timeout=240)
    assert shell.run("exec", name, "--", "cat", "/root/later").stdout == "later\n"
    shell.run("snapshot", "create", f"{name}.two")


def behind(shell: Shell, tmp_path: Path, vm: str, at: int, *words: str) -> list[str]:
    """Kill vmctl after a change; the definition is as if libvirt had died before it wrote it. The changes."""
    (tmp_path / "old.xml").write_text(shell.virsh("dumpxml", vm, "--inactive"))
    _, steps = interrupted(tmp_path, "SIGKILL", at, *words)
    shell.virsh("define", str(tmp_path / "old.xml"))
    shell.run("exec", vm, "--", "sh", "-c", "echo later >/root/later; sync")
    return steps


def lagging(shell: Shell, name: str, tmp_path: Path, pool: Path, change: str) -> Callable[..., str]:
    """A VM that went on in another file than its definition says, for libvirt died; what tells its disk's file."""
    shell.guest(name)
    if change == "create":
        steps = behind(shell, tmp_path, name, 2, "snapshot", "create", f"{name}.one", "--no-memory")
        assert steps[-1] == "snapshots.take", steps
    elif change == "delete":
        shell.run("snapshot", "create", f"{name}.one", "--no-memory")
        shell.run("exec", name, "--", "sh", "-c", "echo sooner >/root/later; sync")  # in what is merged
        steps = behind(shell, tmp_path, name, 5, "snapshot", "delete", f"{name}.one", "--yes")
        assert steps[-1] == "disks.commit", steps
    else:
        steps = behind(shell, tmp_path, name, 3, "disk", "move", f"{name}:vda", "--pool", pool.name)
        assert steps[-1] == "disks.copy_and_switch", steps

    def now(*words: str) -> str:
        return next(d.source for d in disk_xml.read(shell.virsh("dumpxml", name, *words)) if d.target == "vda")

    return now


@pytest.mark.parametrize("mend", ["stop", "doctor", "save"])
@pytest.mark.parametrize("change", ["create", "delete", "move"])
def test_a_definition_that_libvirt_did_not_come_to_write(
    shell: Shell, name: str, tmp_path: Path, pool: Path, change: str, mend: str
) -> None:
    """libvirt knows of the switch, and dies before it writes the definition, which the VM starts by."""
    now = lagging(shell, name, tmp_path, pool, change)
    live = now()
    assert now("--inactive") != live
    if mend == "doctor":
        assert [one["result"] for one in told(shell) if one["name"] in {"layers", "disks"}].count("failed")
        shell.run("doctor", "--fix", check=None)
        shell.virsh("destroy", name)
    elif mend == "save":
        shell.run("save", name)
        shell.run("start", name)
        shell.virsh("destroy", name)
    else:
        shell.run("stop", name)
    assert now("--inactive") == live
    shell.run("start", name)
    shell.run("wait", name, "--for", "agent")
    assert shell.run("exec", name, "--", "cat", "/root/later").stdout == "later\n"
    shell.run("delete", name, "--yes")


@pytest.mark.parametrize(("step", "change"), [("snapshots.take", "create"), ("snapshot_journal.begin", "revert")])
def test_what_a_vm_wrote_to_stays_when_virsh_undefines_it(
    shell: Shell, name: str, tmp_path: Path, step: str, change: str
) -> None:
    """As virsh leaves disks: a change of a snapshot that was cut off names them, and nobody else does any more."""
    shell.run("create", name, "--image", "micro", "--no-start")
    yes = ("--yes",) if change == "revert" else ()
    if change == "revert":
        shell.run("snapshot", "create", f"{name}.one")
    _, steps = interrupted(tmp_path, "SIGKILL", 2 - len(yes), "snapshot", change, f"{name}.one", *yes)
    assert steps[-1] == step, steps
    (disk,) = [d.source for d in disk_xml.read(shell.virsh("dumpxml", name)) if d.target == "vda"]
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 64k", disk], check=True, timeout=60)
    xml = tmp_path / "defined.xml"
    xml.write_text(shell.virsh("dumpxml", name))
    shell.virsh("undefine", name, "--snapshots-metadata")
    told = shell.run("doctor", "--fix", check=None).stderr
    assert f"{disk} stays: VM {name}, which is not there any more, wrote to it" in told, told
    assert Path(disk).exists() and not list(JOURNAL.glob("*.json"))
    shell.virsh("define", str(xml))
    shell.run("start", name)
    shell.run("delete", name, "--yes")


def test_a_merge_of_which_nobody_can_tell_whether_it_was_ended_is_not_made(
    shell: Shell, name: str, tmp_path: Path
) -> None:
    """libvirt was asked to end it, and the VM did not go on below: what it wrote last is in the upper file alone."""
    shell.guest(name)
    shell.run("snapshot", "create", f"{name}.one", "--no-memory")
    _, steps = interrupted(tmp_path, "SIGKILL", 4, "snapshot", "delete", f"{name}.one", "--yes")
    assert steps[-1] == "snapshot_journal.begin", steps
    with open_host() as host:
        for path, entry in snapshot_journal.entries(host):
            if entry.doing == "merge":
                durable.write(path, asdict(replace(entry, unsure=True)))
    shell.run("exec", name, "--", "sh", "-c", "echo later >/root/later; sync")
    shell.virsh("destroy", name)
    (top,) = [d.source for d in disk_xml.read(shell.virsh("dumpxml", name)) if d.target == "vda"]
    assert "--keep FILE" in shell.run("start", name, check=5).stderr
    with open_host() as host:
        below = switch_over.below(host, top)
        assert below is not None
    os.utime(below[0])  # as any look at it by QEMU may: when it was changed says nothing
    (found,) = choices(shell, "--fix")
    assert top in found["detail"] and below[0] in found["detail"] and found["result"] == "failed"
    chosen(shell, top, below[0])
    assert top in shell.virsh("dumpxml", name) and Path(top).exists()
    shell.run("start", name)
    shell.run("wait", name, "--for", "agent")
    assert shell.run("exec", name, "--", "cat", "/root/later").stdout == "later\n"
    shell.run("delete", name, "--yes")
    assert not Path(top).exists()


def test_a_merge_that_was_cut_off_holds_nobody_up(shell: Shell, name: str) -> None:
    """vmctl dies before it asks for the switch: the job, which libvirt goes on with, is given up, and begun anew."""
    shell.guest(name)
    shell.run("snapshot", "create", f"{name}.one", "--no-memory")
    shell.run("exec", name, "--", "sh", "-c", "echo sooner >/root/later; sync")
    cut_off = (
        "import os, sys; from vmctl.hypervisor import disks; from vmctl.cli import run; commit = disks.commit\n"
        "def die(switching): switching(); os.kill(os.getpid(), 9)\n"
        "disks.commit = lambda *words, switching: commit(*words, switching=lambda: die(switching))\n"
        "run(sys.argv[1:])"
    )
    words = [sys.executable, "-c", cut_off, "snapshot", "delete", f"{name}.one", "--yes"]
    assert subprocess.run(words, cwd=REPO, timeout=120, check=False).returncode == -signal.SIGKILL
    assert "<mirror" in shell.virsh("dumpxml", name)
    shell.run("exec", name, "--", "sh", "-c", "echo later >/root/later; sync")
    shell.run("disk", "resize", f"{name}:vda", "+16M")
    assert "<mirror" not in shell.virsh("dumpxml", name)
    shell.run("doctor", "--fix", check=None)
    assert ".snap-" not in shell.virsh("dumpxml", name)
    assert shell.run("exec", name, "--", "cat", "/root/later").stdout == "later\n"
    shell.run("delete", name, "--yes")


def switched_unseen(shell: Shell, vm: str, function: str, *words: str) -> None:
    """Begin a change; libvirtd and vmctl are killed at the switch, which QEMU makes; its job is over when one is back.

    So it is when libvirt dies between what it tells QEMU at the end of a job and its own note of that.
    """
    die = (
        "import os, pathlib, sys; from vmctl.hypervisor import disks; from vmctl.cli import run\n"
        f"change = disks.{function}\n"
        "def die(switching):\n"
        "    switching(); os.kill(int(pathlib.Path('/run/libvirtd.pid').read_text()), 9); os.kill(os.getpid(), 9)\n"
        "def wrapped(*words, switching=None, **options):\n"
        "    *words, switching = (*words, switching) if switching else words\n"
        "    return change(*words, switching=lambda: die(switching), **options)\n"
        f"disks.{function} = wrapped\n"
        "run(sys.argv[1:])"
    )
    daemon = Path(f"/proc/{Path('/run/libvirtd.pid').read_text().strip()}")
    done = subprocess.run([sys.executable, "-c", die, *words], cwd=REPO, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not daemon.exists(), what="end of libvirtd", timeout_s=30)
    (monitor,) = Path("/var/lib/libvirt/qemu").glob(f"domain-*-{vm}/monitor.sock")
    with socket.socket(socket.AF_UNIX) as connected:
        connected.connect(str(monitor))
        stream = connected.makefile("rw")

        def qmp(command: str, **arguments: object) -> Any:
            stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            stream.flush()
            return next(answer["return"] for answer in map(json.loads, stream) if "return" in answer)

        qmp("qmp_capabilities")
        (job,) = qmp("query-jobs")
        qmp("job-complete", id=job["id"])
        wait_until(lambda: qmp("query-jobs")[0]["status"] == "concluded", what="the switch", timeout_s=30)
        qmp("job-dismiss", id=job["id"])
    libvirtd.begin()


@pytest.mark.parametrize("change", ["delete", "move"])
def test_a_switch_that_libvirt_lost_sight_of(shell: Shell, name: str, pool: Path, change: str) -> None:
    """The running VM writes to a file of which libvirt does not know: it stays, and is told of when the VM ends."""
    target, more = ("vda", []) if change == "delete" else ("vdc", ["--disk", "8M"])
    shell.run("create", name, "--image", "micro", *more, "--wait", "agent")
    if change == "delete":
        shell.run("snapshot", "create", f"{name}.one", "--no-memory")
        shell.run("exec", name, "--", "sh", "-c", "echo sooner >/root/later; sync")  # in what is merged
        switched_unseen(shell, name, "commit", "snapshot", "delete", f"{name}.one", "--yes")
    else:
        switched_unseen(shell, name, "copy_and_switch", "disk", "move", f"{name}:vdc", "--pool", pool.name)
    (old,) = [d.source for d in disk_xml.read(shell.virsh("dumpxml", name)) if d.target == target]
    with open_host() as host:
        if change == "delete":
            below = switch_over.below(host, old)
            assert below is not None
            new = below[0]
        else:
            ((_, entry),) = disk_journal.entries(host)
            new = entry.new
    write, read = ("dd of=$d conv=notrunc", "head -c 6 $d") if more else ("cat >/root/later", "cat /root/later")
    shell.run("exec", name, "--", "sh", "-c", f"{SECOND}; echo later | {write}; sync")
    for words in (("doctor", "--fix"), ("disk", "resize", f"{name}:{target}", "+16M"), ("doctor", "--fix")):
        assert shell.run(*words, check=None).returncode, words
        assert Path(old).exists() and Path(new).exists(), words
    shell.run("stop", name, "--force")
    refused = shell.run("start", name, check=5).stderr
    assert f"{target} is {old}" in refused and f"gone on in {new}" in refused, refused
    shell.run("doctor", "--fix", check=None)
    assert Path(old).exists() and Path(new).exists()
    assert "in doubt" in shell.run("doctor", "--fix", "--keep", "/etc/passwd", check=4).stderr
    assert "cannot keep both" in shell.run("doctor", "--fix", "--keep", old, "--keep", new, check=2).stderr
    assert choices(shell)
    chosen(shell, new, old)
    shell.run("start", name)
    shell.run("wait", name, "--for", "agent")
    assert shell.run("exec", name, "--", "sh", "-c", f"{SECOND}; {read}").stdout == "later\n"
    shell.run("delete", name, "--yes")
    for path in (old, new):
        Path(path).unlink(missing_ok=True)


def test_a_backup_takes_the_definition_with_what_the_vm_is_in(shell: Shell, name: str, tmp_path: Path) -> None:
    """And not the file that the definition still names as one more that the VM needs."""
    shell.guest(name)
    behind(shell, tmp_path, name, 2, "snapshot", "create", f"{name}.one", "--no-memory")
    (live,) = [d.source for d in disk_xml.read(shell.virsh("dumpxml", name)) if d.target == "vda"]
    made = json.loads(shell.run("backup", "create", name, "--folder", str(tmp_path / "to"), "-o", "json").stdout)
    made = made[0] if isinstance(made, list) else made
    folder = tmp_path / "to" / name / made["id"]
    sources = {d.target: d.source for d in disk_xml.read((folder / "domain.xml").read_text())}
    assert sources["vda"] == live
    assert not [path for path in folder.glob("volume-*") if path.stat().st_size > 1 << 20]
    shell.run("backup", "restore", name, "--as", f"{name}-new", "--folder", str(tmp_path / "to"))
    shell.run("start", f"{name}-new")
    shell.run("wait", f"{name}-new", "--for", "agent")
    assert shell.run("exec", f"{name}-new", "--", "cat", "/root/later").stdout == "later\n"
    shell.run("delete", name, f"{name}-new", "--yes")


@pytest.mark.parametrize("keep", ["old", "new", "noted"])
@pytest.mark.parametrize("change", ["delete", "move"])
def test_a_vm_that_ended_before_its_definition_was_written(
    shell: Shell, name: str, tmp_path: Path, pool: Path, change: str, keep: str
) -> None:
    """As above, and nobody sees to it before the VM ends. ``noted``: vmctl had heard that the switch was done."""
    noted = keep == "noted"
    now = lagging(shell, name, tmp_path, pool, change)
    old, new = now("--inactive"), now()
    if noted:
        with open_host() as host:
            for journal in (disk_journal, snapshot_journal):
                for path, entry in journal.entries(host):
                    if entry.unsure:
                        durable.write(path, asdict(replace(entry, switched=True)))
    shell.virsh("destroy", name)
    if noted:
        for words in (  # nobody holds its name
            ("clone", name, f"{name}-new", "--dry-run"),
            ("clone", name, f"{name}-new", "--full", "--dry-run"),
            ("backup", "create", name, "--folder", str(tmp_path / "backups"), "--dry-run"),
            ("migrate", name, "--to", "qemu:///system", "--check"),
        ):
            assert "vmctl doctor --fix" in shell.run(*words, check=5).stderr
            assert now("--inactive") == old, words
    if not noted:
        for words in (
            ("start", name),
            ("disk", "resize", f"{name}:vda", "+1G"),
            ("snapshot", "create", f"{name}.two"),
            ("backup", "create", name, "--folder", str(tmp_path / "backups")),
        ):
            refused = shell.run(*words, check=5).stderr  # else one of them would be true no more
            assert f"vda is {old}" in refused and f"gone on in {new}" in refused, refused
            assert "--keep FILE" in refused
        shell.run("doctor", "--fix", check=1)
        assert "vda is " + old in shell.run("start", name, check=5).stderr  # nor has doctor chosen
        chosen(shell, *((new, old) if keep == "new" else (old, new)))
    assert Path(old).exists() and Path(new).exists()
    shell.run("start", name)
    shell.run("wait", name, "--for", "agent")
    if keep != "old":
        assert now() == now("--inactive") == new
        assert shell.run("exec", name, "--", "cat", "/root/later").stdout == "later\n"
    else:
        assert now() == now("--inactive") == old
    if noted:
        shell.run("doctor", "--fix", check=None)
        assert not Path(old).exists()
    shell.run("delete", name, "--yes")
    for path in (old, new):
        Path(path).unlink(missing_ok=True)


@pytest.mark.parametrize("change", ["create", "delete", "move"])
def test_one_that_virsh_has_started_before_anybody_chose(
    shell: Shell, name: str, tmp_path: Path, pool: Path, change: str
) -> None:
    """It runs in the file that its definition names: what it wrote before, in the other one, is nobody's to delete."""
    now = lagging(shell, name, tmp_path, pool, change)
    old, new = now("--inactive"), now()
    shell.virsh("destroy", name)
    shell.virsh("start", name)
    assert now() == old
    for words in (("doctor", "--fix"), ("disk", "resize", f"{name}:vda", "+1G"), ("snapshot", "create", f"{name}.two")):
        assert shell.run(*words, check=None).returncode, words
        assert Path(old).exists() and Path(new).exists(), words
    (found,) = choices(shell)
    assert f"vmctl stop {name}" in found["mend"] and old in found["detail"] and new in found["detail"]
    assert f"vmctl stop {name}" in shell.run("doctor", "--fix", "--keep", new, check=6).stderr
    shell.virsh("destroy", name)
    chosen(shell, new, old)
    shell.run("start", name)
    assert now() == new
    shell.run("delete", name, "--yes")
    for path in (old, new):
        Path(path).unlink(missing_ok=True)


@pytest.fixture
def pool(shell: Shell) -> Iterator[Path]:
    """A pool beside the usual one."""
    place = Path(f"/var/lib/libvirt/forgotten-{os.getpid()}")
    shell.run("disk", "pool", "create", place.name, "--path", str(place))
    yield place
    shell.run("disk", "pool", "delete", place.name, "--yes")


def test_a_vm_that_libvirtd_died_upon_as_it_began_to_start_it(shell: Shell, name: str) -> None:
    """Its note says that it starts, and that there is no process: nothing gets through until doctor mends that."""
    other = f"{name}-other"
    for vm in (name, other):
        shell.run("create", vm, "--image", "micro")
    note = Path(f"/run/libvirt/qemu/{name}.xml")
    daemon, qemu = (int(Path(f"/run/libvirt{file}").read_text()) for file in ("d.pid", f"/qemu/{name}.pid"))
    for pid in (daemon, qemu):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), what="its end", timeout_s=30)
    text = re.sub(r"<domstatus [^>]*>", "<domstatus state='paused' reason='starting up' pid='0'>", note.read_text())
    note.write_text(text.replace("  <vcpus>", "  <job type='none' async='start' flags='0x0'/>\n  <vcpus>", 1))
    os.utime(note, (note.stat().st_mtime - 5,) * 2)
    libvirtd.begin()
    assert "paused (starting up)" in shell.virsh("domstate", name, "--reason")
    reset = subprocess.Popen([*VMCTL, "reset", name], stderr=subprocess.PIPE, text=True, cwd=REPO)  # 30 s
    assert "vmctl doctor" in shell.run("start", name, check=6).stderr
    (found,) = [one for one in told(shell) if one["name"] == "starts"]
    assert "hint: somebody works on it; if that has no end: vmctl doctor\n" in reset.communicate(timeout=60)[1]
    assert found["result"] == "failed" and name in found["detail"] and other not in found["detail"]
    (found,) = [one for one in told(shell, "--fix") if one["name"] == "starts"]
    assert found["result"] == "mended"
    assert not [one for one in told(shell) if one["name"] == "starts"]
    assert shell.virsh("domstate", name) == "shut off" and shell.virsh("domstate", other) == "running"
    shell.run("start", name)
    shell.run("wait", name, "--for", "agent")
    shell.run("delete", name, other, "--yes")
