"""VMs that move between two hosts that share their storage, for real: live, stopped, interrupted."""

from __future__ import annotations

import ipaddress
import itertools
import json
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.hosts import Testbed
from tests.hosts.machine import sh
from tests.system.conftest import REPO, Shell
from tests.system.migrating import Pair, busy, guest, pair_fixture, until
from vmctl import disk_xml, resolve
from vmctl.networks import ADDRESSES

pytestmark = pytest.mark.system


pair = pair_fixture(shared=True)


@pytest.fixture(scope="module")
def vm(pair: Pair) -> Iterator[str]:
    """A guest that the tests of this module hand to each other; each begins with it on h1."""
    with guest(pair) as name:
        yield name


@pytest.fixture(autouse=True)
def home(pair: Pair, vm: str) -> Iterator[None]:
    yield
    pair.bed.limit(None)
    if pair.where(vm).get("h2"):
        pair.vmctl("-c", "h2", "migrate", vm, "--to", "h1", check=None)
    if "shut off" in pair.where(vm).get("h1", ""):
        pair.vmctl("-c", "h1", "start", vm)
        pair.vmctl("-c", "h1", "wait", vm, "--for", "agent")
    assert pair.where(vm) == {"h1": "running"}, pair.vmctl("-c", "h1", "logs", vm, "-n", "30", check=None).stdout


def test_live_with_its_memory_address_and_connections(pair: Pair, vm: str) -> None:
    files = pair.files("h1")
    pair.vmctl("-c", "h1", "exec", vm, "--", "sh", "-c", "echo in memory >/run/kept; echo on disk >/root/kept; sync")
    before = pair.json("-c", "h1", "show", vm)
    line = pair.begin("-c", "h1", "exec", vm, "--", "cat")  # its host is asked after it, and does not know it any more
    assert line.stdin is not None and line.stdout is not None
    line.stdin.write("before\n")
    line.stdin.flush()
    assert line.stdout.readline() == "before\n"

    (moved,) = pair.json("-c", "h1", "migrate", vm, "--to", "h2")
    assert pair.where(vm) == {"h2": "running"}, "nothing of it is left where it was"
    assert moved["mode"] == "held" and moved["source"] == "h1" and moved["target"] == "h2" and not moved["copied"]
    assert moved["data"] > 10_000_000 and moved["passes"] >= 1
    assert 0 < moved["outage_ms"] < 5000, "seen from outside"

    line.stdin.write("after\n")
    line.stdin.close()
    assert line.stdout.readline() == "after\n", "a TCP connection through the guest survives"
    assert line.wait(30) == 0
    kept = pair.vmctl("-c", "h2", "exec", vm, "--", "cat", "/run/kept", "/root/kept").stdout
    assert kept == "in memory\non disk\n"
    after = pair.json("-c", "h2", "show", vm)
    for key in ("uuid", "nics", "ssh_host_key", "labels", "image", "persistent", "disks"):
        left, right = before[key], after[key]
        if key == "nics":
            left, right = [one["mac"] for one in left], [one["mac"] for one in right]
        assert left == right, key
    assert [one["address"] for one in after["addresses"]] == [one["address"] for one in before["addresses"]]
    (mark,) = pair.files("h1") - files
    assert mark.startswith(f"{vm}-") and mark.endswith(".moved"), "it tells whose they are"
    assert pair.files("h1") == files | {mark}
    assert after["address"] == before["address"] != "", "by its agent: here no libvirt gives addresses"

    said = pair.vmctl("-c", "h2", "migrate", vm, "--to", "h1", "--direct")
    assert f"{vm}: h2 -> h1 in " in said.stdout and "held" in said.stdout and f"{vm} runs emulated" in said.stderr
    assert pair.where(vm) == {"h1": "running"}
    assert pair.vmctl("-c", "h1", "exec", vm, "--", "cat", "/run/kept").stdout == "in memory\n"


@pytest.mark.parametrize("way", [["--tunnelled"], ["--parallel", "2"], ["--compress"]])
def test_other_ways(pair: Pair, vm: str, way: list[str]) -> None:
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", *way)
    assert pair.where(vm) == {"h2": "running"}


def test_a_stopped_one(pair: Pair, vm: str) -> None:
    pair.vmctl("-c", "h1", "stop", vm, "--force")
    pair.vmctl("-c", "h1", "autostart", vm)
    said = pair.json("-c", "h1", "migrate", vm, "--to", "h2")
    assert said[0]["mode"] == "stopped" and said[0]["downtime_ms"] is None
    assert pair.where(vm) == {"h2": "shut off"}
    assert pair.json("-c", "h2", "show", vm)["autostart"] is True
    pair.vmctl("-c", "h2", "autostart", vm, "--off")
    pair.vmctl("-c", "h2", "migrate", vm, "--to", "h1")
    assert pair.where(vm) == {"h1": "shut off"}
    pair.vmctl("-c", "h1", "start", vm)
    pair.vmctl("-c", "h1", "wait", vm, "--for", "agent")
    assert pair.vmctl("-c", "h1", "exec", vm, "--", "cat", "/root/kept").stdout == "on disk\n"


def test_a_definition_that_lags_behind_does_not_go_along(pair: Pair) -> None:
    """libvirtd died as a snapshot was taken, after it knew and before the definition said so."""
    with guest(pair) as name:
        here = pair.machine("h1")
        was = here.virsh("dumpxml", name, "--inactive")
        (old,) = [disk.source for disk in disk_xml.read(was) if disk.target == "vda"]
        new = old.replace(".qcow2", "-vda.snap-1.qcow2")
        taken = ("snapshot-create-as", name, "--disk-only", "--no-metadata", "--diskspec")
        here.virsh(*taken, f"vda,file={new}", *("--diskspec", "vdb,snapshot=no"))
        here.run("sh", "-c", "cat >/tmp/was.xml; virsh define /tmp/was.xml", input=was)
        refused = pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", check=5).stderr
        assert f"vda in {new}, and its definition, which would go along, says {old}" in refused
        assert pair.where(name) == {"h1": "running"}
        here.run("sh", "-c", "cat >/tmp/now.xml; virsh define /tmp/now.xml", input=was.replace(old, new))
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2")
        assert pair.where(name) == {"h2": "running"}
        assert new in pair.machine("h2").virsh("dumpxml", name, "--inactive")


def test_its_files_are_nobodys_to_clear_away_where_it_was(pair: Pair) -> None:
    """They lie on shared storage, and no VM of its old host has them: as if a creation there had been killed."""
    with guest(pair) as name:
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2")
        folder = pair.machine("h1").images.parent / "vmctl"
        (disk,) = folder.glob(f"{name}-????????.qcow2")
        was = disk.stat().st_ino
        assert f"cannot find VM {name}" in pair.vmctl("-c", "h1", "delete", name, "--yes", check=4).stderr
        assert "went to another host" in pair.vmctl("-c", "h1", "disk", "delete", f"vmctl/{disk.name}", check=5).stderr
        assert name not in pair.vmctl("-c", "h1", "doctor", check=None).stdout
        pair.vmctl("-c", "h1", "create", name, "--image", "micro", "--network", "lan", "--no-start")
        assert disk.stat().st_ino == was, "a new VM of that name has another disk"
        pair.vmctl("-c", "h1", "delete", name, "--yes")
        assert disk.stat().st_ino == was
        pair.vmctl("-c", "h2", "exec", "--via", "agent", name, "true")
        pair.vmctl("-c", "h2", "delete", name, "--yes")
        assert not list(folder.glob(f"{name}-*")), "the mark is gone, too"


def test_files_of_one_that_was_renamed_are_marked_too(pair: Pair, vm: str) -> None:
    """They have the name it was made with: as if a creation of that one had been killed."""
    old, new = f"{vm}-old", f"{vm}-new"
    pair.vmctl("-c", "h1", "create", old, "--image", "micro", "--network", "lan", "--no-start")
    try:
        pair.vmctl("-c", "h1", "rename", old, new)
        pair.vmctl("-c", "h1", "migrate", new, "--to", "h2")
        files = {one for one in pair.files("h2") if one.startswith(f"{old}-")}
        assert f"cannot find VM {old}" in pair.vmctl("-c", "h1", "delete", old, "--yes", check=4).stderr
        assert {one for one in pair.files("h2") if one.startswith(f"{old}-")} == files
    finally:
        pair.vmctl("-c", "h1", "delete", new, "--yes", "--missing-ok")
        pair.vmctl("-c", "h2", "delete", new, "--yes", "--missing-ok")
    assert not [one for one in pair.files("h2") if one.startswith((old, new))], "no mark is left"


def test_a_disk_of_a_vm_elsewhere_is_deleted_by_no_other_host(pair: Pair, vm: str) -> None:
    """It was never here, or has a disk of any name: nothing on this host's storage tells of it but the other host."""
    name, extra = f"{vm}-there", f"{vm}-extra.qcow2"
    pair.vmctl("-c", "h2", "create", name, "--image", "micro", "--network", "lan", "--no-start")
    try:
        pair.vmctl("-c", "h2", "disk", "create", f"vmctl/{extra}", "1M")
        pair.vmctl("-c", "h2", "disk", "attach", name, f"vmctl/{extra}")
        theirs = [one for one in pair.files("h2") if one.startswith(f"{name}-") and not one.endswith(".iso")]
        assert len(theirs) == 2, "its disk and the log of its console"
        for one in (extra, *theirs):
            refused = pair.vmctl("-c", "h1", "disk", "delete", f"vmctl/{one}", "--yes", check=5).stderr
            assert f"{name} on h2 needs it" in refused
        told = pair.vmctl("-c", "h1", "doctor", check=None).stdout
        assert name not in told and extra not in told, "its hint would be to delete them"
    finally:
        pair.vmctl("-c", "h2", "delete", name, "--yes")
    assert extra in pair.vmctl("-c", "h1", "doctor", check=None).stdout
    pair.vmctl("-c", "h1", "disk", "delete", f"vmctl/{extra}", "--yes")


@pytest.fixture
def both(pair: Pair, tmp_path: Path) -> Iterator[Path]:
    """A folder that h2 and the machine that the tests run on see by one name, a pool on each."""
    second, shell = pair.machine("h2"), Shell()
    folder, given = tmp_path / "both", pair.bed.folder / "shared/both"
    with ExitStack() as undo:
        for path in (given, folder):
            path.mkdir()
            path.chmod(0o755)
        undo.callback(given.rmdir)
        sh("mount", "--bind", str(given), str(folder))
        undo.callback(sh, "umount", str(folder))
        second.run("mkdir", "-p", str(folder))
        second.run("mount", "--bind", "/var/lib/libvirt/vmctl/both", str(folder))
        undo.callback(second.run, "umount", str(folder))
        for virsh in (second.virsh, shell.virsh):
            virsh("pool-create-as", "both", "dir", "--target", str(folder))
            undo.callback(virsh, "pool-destroy", "both")
        yield folder


def test_no_road_takes_a_disk_from_a_vm_elsewhere(pair: Pair, vm: str, both: Path) -> None:
    """Whatever removes or rewrites a disk asks the other hosts, also where vmctl runs on the host itself."""
    here, mine, theirs = ("-c", "qemu:///system"), f"{vm}-mine", f"{vm}-theirs"
    path = both / "data.qcow2"
    try:
        pair.vmctl(*here, "create", mine, "--image", "micro", "--no-start")
        pair.vmctl("-c", "h2", "create", theirs, "--image", "micro", "--network", "lan", "--no-start")
        pair.vmctl("-c", "h2", "disk", "create", "both/data.qcow2", "8M")
        pair.vmctl("-c", "h2", "disk", "attach", theirs, "both/data.qcow2")
        before = path.read_bytes()
        refused = {
            ("resize", "4M", "--shrink"): "shrink",
            ("resize", "+8M"): "resize",
            ("convert", "--format", "raw"): "convert",
            ("compact",): "compact",
            ("flatten",): "flatten",
            ("move", "--pool", "vmctl"): "move",
            ("check", "--repair"): "repair",
            ("delete", "--yes"): "delete",
        }
        for (word, *words), verb in refused.items():
            said = pair.vmctl(*here, "disk", word, "both/data.qcow2", *words, check=5).stderr
            assert f"cannot {verb} disk both/data.qcow2: {theirs} on h2 needs it, on storage that both hosts" in said
        pair.vmctl(*here, "disk", "convert", "both/data.qcow2", "--format", "raw", "--keep")
        pair.vmctl(*here, "disk", "delete", "both/data.raw", "--yes")
        Shell().virsh("attach-disk", mine, str(path), "vde", "--subdriver", "qcow2", "--config")
        said = pair.vmctl(*here, "disk", "detach", f"{mine}:vde", "--delete", "--yes", check=5).stderr
        assert f"cannot delete disk {mine}:vde: {theirs} on h2 needs it" in said
        assert "vde" in Shell().virsh("domblklist", mine), "told before, not when half is done"
        assert path.read_bytes() == before
        pair.vmctl(*here, "snapshot", "create", f"{mine}.s", "--internal")
        said = pair.vmctl(*here, "snapshot", "revert", f"{mine}.s", "--yes", check=5).stderr
        assert f"cannot revert disk {mine}:vde: {theirs} on h2 needs it" in said
        pair.vmctl(*here, "snapshot", "delete", f"{mine}.s", "--yes")
        Shell().virsh("detach-disk", mine, str(path), "--config")
    finally:
        pair.vmctl(*here, "delete", mine, "--yes", "--missing-ok")
        pair.vmctl("-c", "h2", "delete", theirs, "--yes", "--missing-ok")
        pair.vmctl(*here, "disk", "delete", "both/data.qcow2", "--yes", check=None)
    assert not path.exists(), "nobody needs it any more"


def test_no_layer_is_put_on_a_disk_that_what_stayed_would_write_to(pair: Pair, vm: str, both: Path) -> None:
    """Nor is a disk copied from under the VM that writes to it on the other host: both were done without a word."""
    here, name, path = ("-c", "qemu:///system"), f"{vm}-twin", both / "data.qcow2"
    second = pair.machine("h2")
    backup = (*here, "backup", "create", name, "--folder", str(both / "backups"))
    pair.vmctl("host", "add", "third", "qemu:///system")
    try:
        pair.vmctl(*here, "create", name, "--image", "micro", "--memory", "128M", "--no-start")
        Shell().virsh("detach-interface", name, "network", "--config")  # which the other host has not
        pair.vmctl(*here, "disk", "create", "both/data.qcow2", "8M")
        pair.vmctl(*here, "disk", "attach", name, "both/data.qcow2")
        pair.vmctl(*here, "migrate", name, "--to", "h2", "--copy-storage", "overlay", "--keep-source")
        before = set(both.iterdir())
        layers = ("snapshot", "create", f"{name}.s", "--external"), ("clone", name, f"{name}-new")
        reads = ("snapshot", "create", f"{name}.s", "--internal"), ("clone", name, f"{name}-new", "--full")
        for state in "stopped", "saved":
            for words in (*layers, *(reads if state == "saved" else ())):
                told = pair.vmctl(*here, *words, check=5).stderr
                assert f"{path} is the disk of {name} on h2 too, which is {state}" in told
            if state == "stopped":
                pair.vmctl(*backup)
                pair.vmctl("-c", "h2", "start", name)
                pair.vmctl("-c", "h2", "save", name)
        told = pair.vmctl(*backup, check=5).stderr
        assert f"cannot back up VM {name}: {path} is the disk of {name} on h2 too, which is saved" in told
        pair.vmctl("-c", "h2", "start", name)
        pair.vmctl("-c", "h2", "stop", name, "--force")
        pair.vmctl("host", "remove", "h2")  # what the VM notes is asked, though the config file names it no more
        pair.vmctl(*here, *layers[0], "--dry-run")  # one that known_hosts has not either cannot be asked
        with known(pair.bed):
            told = pair.vmctl(*here, *layers[0], check=5).stderr
        assert f"{path} is the disk of {name} on {second.ssh_uri} too, which is stopped" in told
        pair.vmctl("host", "add", "h2", second.ssh_uri, "--host-key", second.host_key)
        assert set(both.iterdir()) - before == {both / "backups"}
        pair.vmctl("-c", "h2", "delete", name, "--yes")
        for words in (*layers[:1], *reads[1:]):
            pair.vmctl(*here, *words)
    finally:
        pair.vmctl("-c", "h2", "delete", name, "--yes", "--missing-ok", check=None)
        pair.vmctl(*here, "delete", name, f"{name}-new", "--yes", "--missing-ok", check=None)
        pair.vmctl(*here, "disk", "delete", "both/data.qcow2", "--yes", check=None)
        pair.vmctl("host", "remove", "third")
        pair.vmctl("host", "add", "h2", second.ssh_uri, "--host-key", second.host_key, check=None)
        shutil.rmtree(both / "backups", ignore_errors=True)


@contextmanager
def known(bed: Testbed) -> Iterator[None]:
    """The hosts' SSH keys in root's own known_hosts."""
    path = Path.home() / ".ssh/known_hosts"
    before = path.read_text() if path.exists() else None
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_text((before or "") + bed.known_hosts.read_text())
    try:
        yield
    finally:
        path.unlink() if before is None else path.write_text(before)


def test_an_image_of_a_vm_elsewhere_stays_in_the_store(pair: Pair, vm: str, tmp_path: Path) -> None:
    """A host that has the store, and no pool that shows the disks based on it, asks those that see it, too."""
    name, image, second = f"{vm}-img", f"img-{vm[2:]}", pair.machine("h2")
    stems = []
    for size in ("4M", "5M"):
        sh("qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / f"{size}.qcow2"), size)
        words = ("import", str(tmp_path / f"{size}.qcow2"), "--name", image)
        stems.append(pair.vmctl("-c", "h1", "image", *words).stdout.strip())
    older = pair.machine("h1").images / f"{stems[0]}.qcow2"
    pair.vmctl("-c", "h1", "create", name, "--image", stems[0], "--network", "lan", "--no-start")
    try:
        for pool in ("vmctl", "vmctl-images"):
            second.virsh("pool-destroy", pool, check=False)
            second.virsh("pool-undefine", pool, check=False)
        second.virsh("pool-create-as", "vmctl-images", "dir", "--target", "/var/lib/libvirt/vmctl/vmctl-images")
        said = pair.vmctl("-c", "h2", "image", "delete", stems[0], "--yes", check=5).stderr
        assert f"cannot delete image {stems[0]}: {name} on h1 needs it, on storage that both hosts see" in said
        said = pair.vmctl("-c", "h2", "image", "prune", "--yes").stderr
        assert f"image {stems[0]} stays: {name} on h1 need it" in said
        pair.vmctl("-c", "h1", "delete", name, "--yes")
        uri, key = "qemu+ssh://root@127.0.0.1:1/system", pair.machine("h1").host_key
        pair.vmctl("host", "add", "dead", uri, "--host-key", key, "--no-check")
        said = pair.vmctl("-c", "h2", "image", "prune", "--yes").stderr
        assert "no image is pruned: dead may see the store, and cannot be asked who needs them" in said
        assert older.exists()
        pair.vmctl("host", "remove", "dead")
        assert stems[0] in pair.vmctl("-c", "h2", "image", "prune", "--yes").stdout
        assert not older.exists(), "nobody needs it any more"
        listed = pair.vmctl("-c", "h1", "image", "list").stdout
        assert image in listed and stems[0].rpartition("-")[2] not in listed, "libvirt there still knew it"
    finally:
        pair.vmctl("host", "remove", "dead", check=None)
        pair.vmctl("-c", "h1", "delete", name, "--yes", "--missing-ok")
        for stem in stems:
            pair.vmctl("-c", "h2", "image", "delete", stem, "--yes", check=None)
        second.virsh("pool-destroy", "vmctl-images")
        pair.machine("h1").virsh("pool-refresh", "vmctl-images")


def test_a_disk_of_that_name_that_another_host_made(pair: Pair, vm: str) -> None:
    """libvirt knows of it only when it looks again, which is for vmctl to see to."""
    disk = f"{vm}-taken"
    for host in ("h1", "h2"):
        pair.vmctl("-c", host, "disk", "list")
    pair.vmctl("-c", "h1", "disk", "create", disk, "1M")
    told = pair.vmctl("-c", "h2", "disk", "create", disk, "1M", check=5).stderr
    assert told == f"cannot create disk {disk}: pool vmctl has a volume {disk}.qcow2 already\n"
    pair.vmctl("-c", "h2", "disk", "delete", f"vmctl/{disk}.qcow2", "--yes")


def test_an_image_that_another_host_put_into_the_store(pair: Pair, vm: str, tmp_path: Path) -> None:
    image, name = f"seen-{vm[2:]}", f"{vm}-seen"
    sh("qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "a.qcow2"), "4M")
    sh("qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "b.qcow2"), "5M")
    pair.vmctl("-c", "h1", "image", "list")
    older = pair.vmctl("-c", "h2", "image", "import", str(tmp_path / "a.qcow2"), "--name", image).stdout.strip()
    try:
        pair.vmctl("-c", "h1", "create", name, "--image", image, "--network", "lan", "--no-start")
        newer = pair.vmctl("-c", "h2", "image", "import", str(tmp_path / "b.qcow2"), "--name", image).stdout.strip()
        assert pair.vmctl("-c", "h1", "image", "show", image, "-o", "name").stdout.strip() == newer
        assert newer.rpartition("-")[2] in pair.vmctl("-c", "h1", "image", "list").stdout
    finally:
        pair.vmctl("-c", "h1", "delete", name, "--yes", "--missing-ok")
        pair.vmctl("-c", "h2", "image", "delete", older, "--yes")
        pair.vmctl("-c", "h2", "image", "delete", image, "--yes", check=None)


def test_restoring_takes_no_disk_from_a_vm_elsewhere(pair: Pair, vm: str, both: Path, tmp_path: Path) -> None:
    """Neither the file that a VM of another host got from the same backup, nor one that it shares with the old VM."""
    here, name, place = ("-c", "qemu:///system"), f"{vm}-back", ("--folder", str(tmp_path / "backups"))
    other = f"{vm}-other"
    restore = ("backup", "restore", name, *place, "--yes")
    try:
        pair.vmctl(*here, "create", name, "--image", "micro", "--no-start")
        pair.vmctl(*here, "disk", "create", "both/data.qcow2", "1M")
        pair.vmctl(*here, "disk", "attach", name, "both/data.qcow2")
        pair.vmctl(*here, "backup", "create", name, *place)
        before = (both / "data.qcow2").stat().st_ino
        pair.vmctl("-c", "h2", "create", other, "--image", "micro", "--network", "lan", "--no-start")
        pair.machine("h2").virsh("pool-refresh", "both")
        pair.vmctl("-c", "h2", "disk", "attach", other, "both/data.qcow2")
        said = pair.vmctl(*here, *restore, check=5).stderr
        assert f"cannot overwrite disk {name}:vdc: {other} on h2 needs it, on storage that both hosts see" in said
        assert (both / "data.qcow2").stat().st_ino == before
        pair.vmctl(*here, "delete", name, "--yes")

        pair.vmctl("-c", "h2", *restore)
        files = {one for one in pair.files("h2") if one.startswith(f"{name}-")}
        pair.vmctl("-c", "h1", *restore)
        assert files <= pair.files("h1"), "what it has on h2 stays"
        disks = [pair.machine(host).virsh("domblklist", name).split() for host in ("h1", "h2")]
        assert not {*disks[0]} & {*disks[1]} - {"vda", "vdb", "vdc", "-"}, "each has files of its own"
        pair.vmctl("-c", "h1", "delete", name, "--yes")
        assert files <= pair.files("h2")
    finally:
        for host in ("h1", "h2", "qemu:///system"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)
        pair.vmctl("-c", "h2", "delete", other, "--yes", "--missing-ok")
        pair.vmctl(*here, "disk", "delete", "both/data.qcow2", "--yes", check=None)


def test_deleting_where_it_was_kept_leaves_what_it_runs_on(pair: Pair, vm: str) -> None:
    name = f"{vm}-kept"
    pair.vmctl("-c", "h1", "create", name, "--image", "micro", "--network", "lan", "--no-start")
    try:
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--keep-source")
        assert set(pair.where(name)) == {"h1", "h2"}
        files = {one for one in pair.files("h2") if one.startswith(f"{name}-") and not one.endswith(".moved")}
        assert files, "its disk is there"
        told = pair.vmctl("-c", "h1", "delete", name, "--dry-run").stdout
        assert ".qcow2" not in told, "it is not what goes"
        said = pair.vmctl("-c", "h1", "delete", name, "--yes").stderr
        assert f"{name} on h2 needs it, on storage that both hosts see" in said
        assert set(pair.where(name)) == {"h2"} and files <= pair.files("h2")
        pair.vmctl("-c", "h1", "delete", name, "--yes", "--missing-ok")
        assert files <= pair.files("h2"), "nor are they what a killed creation left"
        pair.vmctl("-c", "h2", "delete", name, "--yes")
        assert not [one for one in pair.files("h2") if one.startswith(f"{name}-")]
    finally:
        for host in ("h1", "h2"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)


def test_to_where_there_is_room(pair: Pair, vm: str) -> None:
    assert f"{vm}: h1 -> h2" in pair.vmctl("-c", "h1", "migrate", vm, "--to", "auto").stdout


def test_a_guest_behind_its_host_is_told_as_such(pair: Pair, vm: str) -> None:
    """On a network that is the host's own, as vmctl's is, it is not reached, however long it is waited for."""
    name = f"{vm}-nat"
    pair.vmctl("-c", "h1", "create", name, "--image", "micro", "--memory", "128M", "--wait", "agent")
    try:
        told = pair.vmctl("-c", "h1", "exec", name, "--", "true", check=3).stderr
        assert "at most 10 s" in told, "its agent is up: it has booted"
        assert "a network of h1's own" in told and "--via agent" in told
        assert pair.vmctl("-c", "h1", "exec", "--via", "agent", name, "--", "hostname").stdout == f"{name}\n"
        told = pair.vmctl("-c", "h1", "wait", name, "--for", "ssh", "--timeout", "1", check=7).stderr
        assert "a network of h1's own" in told
        # Of which the target has one too, as soon as a VM needs it.
        second = pair.machine("h2")
        for word in ("net-destroy", "net-undefine"):
            second.virsh(word, "vmctl", check=False)
        assert "network vmctl is made on h2" in pair.vmctl("-c", "h1", "migrate", name, "--to", "h2").stderr
        assert pair.where(name) == {"h2": "running"} and "vmctl" in second.virsh("net-list", "--name").split()
    finally:
        for host in ("h1", "h2"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok")


def test_one_host_by_two_names(pair: Pair, vm: str) -> None:
    """What is on both is there once: nothing of it is what a move left."""
    pair.vmctl("host", "add", "alias", pair.machine("h1").tcp_uri, "--insecure", "--no-check")
    off = f"{vm}-off"
    pair.vmctl("-c", "h1", "create", off, "--image", "micro", "--network", "lan", "--no-start")
    try:
        for name, words in ((off, ["--recover"]), (vm, ["--recover"]), (off, []), (vm, ["--check"])):
            done = pair.vmctl("-c", "h1", "migrate", name, "--to", "alias", *words, check=11)
            told = done.stdout if "--check" in words else done.stderr  # of a check it is the result
            assert "h1 and alias are one host to libvirt: both have host UUID" in told
        assert pair.where(off) == {"h1": "shut off"} and pair.where(vm) == {"h1": "running"}
        assert "h1 is the host it is on" in pair.vmctl("-c", "h1", "migrate", vm, "--to", "h1", check=11).stderr
        told = pair.vmctl("-c", "h1", "migrate", vm, "--to", "test:///default", check=8).stderr
        assert told == "cannot migrate to test:///default: no QEMU is there\n"
    finally:
        pair.vmctl("host", "remove", "alias")
        pair.vmctl("-c", "h1", "delete", off, "--yes")


def test_what_is_asked_to_stay(pair: Pair, vm: str) -> None:
    pair.vmctl("-c", "h1", "autostart", vm)
    told = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--transient", "--keep-source").stderr
    assert f"{vm} does not start by itself any more on h1" in told, "beside the one on h2, at the next boot"
    assert pair.json("-c", "h1", "show", vm)["autostart"] is False
    assert pair.where(vm) == {"h1": "shut off", "h2": "running"}
    assert pair.machine("h2").virsh("dominfo", vm).split("Persistent:")[1].split()[0] == "no"
    refused = pair.vmctl("-c", "h2", "migrate", vm, "--to", "h1", check=11)
    assert f"h1 has a VM of the same UUID already: {vm}" in refused.stderr
    pair.machine("h1").virsh("undefine", vm)
    pair.vmctl("-c", "h2", "migrate", vm, "--to", "h1", "--persistent")
    assert pair.json("-c", "h1", "show", vm)["persistent"] is True


def test_a_definition_that_stayed_takes_no_disk_along(pair: Pair, vm: str) -> None:
    """As one does that was asked to, or whose host died: who deletes it where nothing runs keeps the other's disk."""
    with guest(pair) as name:
        pair.vmctl("-c", "h1", "exec", name, "--", "sh", "-c", "echo kept >/root/kept; sync")
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--keep-source")
        files = pair.files("h2")
        assert any(one.endswith("-seed.iso") for one in files)
        told = pair.vmctl("-c", "h1", "start", name, check=5).stderr
        assert f"cannot start VM {name}: it runs on h2, and must not be on two hosts at once" in told
        assert f"vmctl -c h2 stop {name}" in told
        assert pair.files("h2") == files, "its seed too, which is in its drive there"
        told = pair.vmctl("-c", "h1", "delete", name, "--yes").stderr
        assert told.count(f"{name} on h2 needs it, on storage that both hosts see") >= 2, (
            "its disk, and its console log"
        )
        assert pair.files("h2") == files and pair.where(name) == {"h2": "running"}
        pair.vmctl("-c", "h2", "stop", name, "--force")
        uri, key = "qemu+ssh://root@127.0.0.1:1/system", pair.machine("h1").host_key
        pair.vmctl("host", "add", "dead", uri, "--host-key", key, "--no-check")
        told = pair.vmctl("-c", "h2", "start", name).stderr
        assert f"not asked whether {name}, which went to another host once, runs there: dead (" in told
        pair.vmctl("host", "remove", "dead")
        pair.vmctl("-c", "h2", "wait", name, "--for", "agent")
        assert pair.vmctl("-c", "h2", "exec", name, "--", "cat", "/root/kept").stdout == "kept\n"
        pair.vmctl("-c", "h2", "delete", name, "--yes")
        assert not [one for one in pair.files("h2") if one.startswith(f"{name}-")], "the last one takes all"
    pair.vmctl("host", "remove", "dead", check=None)


def test_recovery_tells_of_memory_that_is_gone(pair: Pair, vm: str) -> None:
    """The target lost power when the VM had moved there: it is off there, as one is that went as it was off."""
    second = pair.machine("h2")
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2")
    second.lose_power()
    second.boot()
    second.wait_until_up()
    told = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--recover").stderr
    assert f"{vm} is off on h2: if it ran before, its memory is gone" in told and f"vmctl -c h2 start {vm}" in told
    pair.vmctl("-c", "h2", "start", vm)
    told = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--recover").stderr
    assert "memory" not in told


def test_recovery_takes_no_disk_that_both_see(pair: Pair, vm: str) -> None:
    """It has a mark: a move from a third host, which sees none of this, was killed at its end."""
    (disk,) = [one for one in pair.files("h1") if one.startswith(f"{vm}-") and one.endswith(".qcow2")]
    mark = pair.machine("h1").images.parent / f"vmctl/{disk}.migrating"
    mark.touch()
    try:
        pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--recover")
        assert disk in pair.files("h2") and pair.where(vm) == {"h2": "running"}
        assert pair.vmctl("-c", "h2", "exec", vm, "--", "sh", "-c", "echo well >/root/well; sync; echo well").stdout
    finally:
        mark.unlink()


def test_recovery_gives_up_nothing_that_was_used_there(pair: Pair, vm: str) -> None:
    """A definition that stayed, and was started: it has a memory, and a snapshot, that no move leaves."""
    with guest(pair) as name:
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--keep-source")
        pair.vmctl("-c", "h2", "stop", name, "--force")
        pair.vmctl("-c", "h1", "start", name)
        pair.vmctl("-c", "h1", "wait", name, "--for", "agent")
        pair.vmctl("-c", "h1", "snapshot", "create", f"{name}.first")
        pair.vmctl("-c", "h1", "save", name)
        for words in (("-c", "h2", "migrate", name, "--to", "h1"), ("-c", "h1", "migrate", name, "--to", "h2")):
            told = pair.vmctl(*words, "--recover", check=None)
            assert told.returncode in {11, 12}, told.stderr
            assert "saved" in told.stderr
            assert pair.where(name)["h1"] == "shut off"
            assert pair.json("-c", "h1", "show", name)["state"] == "saved"
            assert pair.machine("h1").virsh("snapshot-list", name, "--name").split() == ["first"]


def test_recovery_gives_up_no_other_vm_of_its_uuid(pair: Pair, vm: str) -> None:
    """Somebody copied the definition and gave it a disk of its own: it is no left-over, be it off or the one on."""
    name, first, second = f"{vm}-copied", pair.machine("h1"), pair.machine("h2")
    own = f"/var/lib/libvirt/vmctl/{name}.qcow2"
    pair.vmctl("-c", "h1", "create", name, "--image", "micro", "--network", "lan", "--no-start")
    try:
        text = first.virsh("dumpxml", name)
        (disk,) = set(re.findall(r"source file='([^']*\.qcow2)'", text))
        first.run("cp", disk, own)
        second.run("sh", "-c", "cat >/tmp/d.xml; virsh define /tmp/d.xml", input=text.replace(disk, own))
        told = pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", check=11).stderr
        assert "--recover looks at both" in told, "which is what one does then"
        words = ("-c", "h1", "migrate", name, "--to", "h2", "--recover")
        told = pair.vmctl(*words, check=12).stderr
        assert "on h2 it is stopped, with a disk that is not the one on h1" in told and told.count(own) == 1
        second.virsh("start", name)
        told = pair.vmctl(*words, check=12).stderr
        assert "on h1 it is stopped, with a disk that is not the one on h2" in told and told.count(disk) == 1
        assert pair.where(name) == {"h1": "shut off", "h2": "running"}
        second.virsh("destroy", name)
        pair.vmctl("-c", "h2", "delete", name, "--yes")
        pair.vmctl(*words)
        assert pair.where(name) == {"h2": "shut off"}
    finally:
        for host in ("h1", "h2"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)
        first.run("rm", "-f", own)


def test_a_base_image_or_a_kernel_that_is_gone(pair: Pair, vm: str) -> None:
    """The preflight tells, and its mend works: QEMU still has the file."""
    image = f"img-{vm[2:]}"
    first = pair.machine("h1")
    (base,) = first.images.glob("micro-*.qcow2")
    for path in first.images.glob(f"{base.stem}.*"):
        text = path.read_bytes()
        if path.suffix == ".json":
            text = text.replace(b'"micro"', f'"{image}"'.encode())
        (first.images / f"{image}-{path.name.partition('-')[2]}").write_bytes(text)
    first.virsh("pool-refresh", "vmctl-images")
    name = f"{vm}-based"
    pair.vmctl("-c", "h1", "create", name, "--image", image, "--memory", "128M", "--network", "lan", "--wait", "agent")
    words = ("-c", "h1", "migrate", name, "--to", "h2")
    try:
        for path in first.images.glob(f"{image}-*"):
            path.unlink()
        told = pair.vmctl(*words, "--check", check=11).stdout
        assert f"base image (/var/lib/libvirt/vmctl/vmctl-images/{image}-" in told and "is not there on h1" in told
        assert f"kernel (/var/lib/libvirt/vmctl/vmctl-images/{image}-" in told
        assert f"on h1, virsh blockpull {name} vda --wait" in told
        assert "is not there on h1" in pair.vmctl(*words, check=11).stderr
        first.virsh("blockpull", name, "vda", "--wait")
        assert "base image" not in pair.vmctl(*words, check=11).stderr
    finally:
        pair.vmctl("-c", "h1", "delete", name, "--yes", "--missing-ok")
        first.virsh("pool-refresh", "vmctl-images")


def test_all_that_stands_against_it_is_told_at_once(pair: Pair, vm: str, tmp_path: Path) -> None:
    assert "ok" in pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--check").stdout
    second = pair.machine("h2")
    second.virsh("net-destroy", "lan")
    pair.machine("h1").cut_from(second)
    xml = f"<domain type='qemu'><name>{vm}</name><memory>8192</memory><os><type>hvm</type></os></domain>"
    second.run("sh", "-c", "cat >/tmp/d.xml; virsh define /tmp/d.xml", input=xml)
    try:
        done = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", check=11)
        for said in (f"another VM called {vm}", "network lan on h2 is down", "libvirt on h1 does not reach h2"):
            assert said in done.stderr
        assert done.stderr.count("mend:") == 3 and "nothing was changed" in done.stderr
        check = ("-c", "h1", "migrate", vm, "--to", "h2", "--check")
        checked = pair.vmctl(*check, "-o", "json", check=11)
        assert len([one for one in json.loads(checked.stdout) if not one["note"]]) == 3
        assert checked.stderr == "cannot migrate to h2: 3 problems\n", "the result has told them"
        report = pair.vmctl(*check, check=11)
        assert report.stdout.count("failed  ") == report.stdout.count("mend:") == 3
        assert report.stderr == checked.stderr
        names = pair.vmctl(*check, "-o", "name", check=11)
        assert names.stdout == "" and names.stderr.count("mend:") == 3, "which no name has told"
    finally:
        pair.machine("h1").mend_from(second)
        second.virsh("undefine", vm)
        second.virsh("net-start", "lan")
    unencrypted = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--tls", "--check", check=11).stdout
    assert "QEMU on h1 has no ca-cert.pem" in unencrypted and "QEMU on h2 has no ca-cert.pem, server-c" in unencrypted
    first = pair.machine("h1")
    unasked = pair.json("-c", first.tcp_uri, "migrate", vm, "--to", "h2", "--check")
    assert "is not reached by SSH" in unasked[0]["what"] and unasked[0]["note"]
    first.run("ip", "link", "add", "br9", "type", "bridge")
    first.virsh("attach-interface", vm, "bridge", "br9", "--model", "virtio", "--mac", "52:54:00:00:00:09", "--live")
    try:
        assert "h2 has no bridge br9" in pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", check=11).stderr
    finally:
        first.virsh("detach-interface", vm, "bridge", "--mac", "52:54:00:00:00:09", "--live")
        until(lambda: "br9" not in first.virsh("domiflist", vm), "it is unplugged")
        first.run("ip", "link", "del", "br9")
    assert "h1 is the host it is on" in pair.vmctl("-c", "h1", "migrate", vm, "--to", "h1", check=11).stderr
    assert pair.vmctl("-c", "h1", "migrate", "nope", "--to", "h2", check=4).stderr.startswith("cannot find VM nope")
    some = pair.vmctl("-c", "h1", "migrate", "nope", "gone", "--to", "h2", check=14).stderr
    assert "gone: cannot find VM gone: h1 has none of that name" in some and "see `vmctl list --all-hosts`" in some
    every = pair.vmctl("-c", "h1", "migrate", "nope", vm, "gone", "--to", "h2", "--check", check=11)
    assert f"ok       {vm}" in every.stdout, "one that is not there does not keep the others from being looked at"
    assert "failed   nope: cannot find VM nope" in every.stdout and "gone: cannot find VM gone" in every.stdout
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h9", check=4)
    assert "cannot find a host by an empty name" in pair.vmctl("-c", "h1", "migrate", vm, "--to", "", check=2).stderr
    assert pair.where(vm) == {"h1": "running"}


def sending(pair: Pair, vm: str) -> bool:
    said = pair.machine("h1").virsh("domjobinfo", vm, check=False)
    return "Outgoing migration" in said and "Memory processed" in said


@pytest.mark.parametrize("way", [[], ["--direct"]], ids=["peer", "direct"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_stays(pair: Pair, vm: str, way: list[str], number: signal.Signals) -> None:
    pair.bed.limit("10mbit")
    process = pair.begin("-c", "h1", "migrate", vm, "--to", "h2", *way)
    until(lambda: sending(pair, vm), "the migration sends")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert f"{vm} runs on h1 as before" in said
    assert pair.where(vm) == {"h1": "running"}
    assert pair.vmctl("-c", "h1", "exec", "--via", "agent", vm, "--", "echo", "well").stdout == "well\n"


def _alike(pair: Pair) -> tuple[str, str]:
    """Names whose VMs, one made on h1, one on h2, are given the same address by either host."""
    hosts, taken = [machine.address for machine in pair.bed.machines], dict[int, str]()
    for number in itertools.count():
        one, two = (f"m-{secrets.token_hex(4)}-{number}" for _ in range(2))
        made = zip(hosts, (one, two), strict=True)
        at = [uuid.UUID(resolve.identity(host, name, ())).int % ADDRESSES for host, name in made]
        taken[at[0]] = one
        if at[1] in taken:
            return taken[at[1]], two
    raise AssertionError


def test_on_a_network_of_each_hosts_own_it_takes_nobodys_address(pair: Pair, vm: str) -> None:
    """vmctl's own: it kept the one that it had, which another VM has there, until its DHCP client asked by itself."""
    moved, there = _alike(pair)
    second = pair.machine("h2")

    def addresses(host: str, name: str) -> list[str]:
        """By the guest itself, which needs no network for that."""
        words = ("exec", "--via", "agent", name, "--", "ip", "-4", "-o", "addr", "show", "eth0")
        return re.findall(r"inet ([0-9.]+)/", pair.vmctl("-c", host, *words).stdout)

    def beside(*words: str) -> str:
        """vmctl with h2's cables: there guests on its own networks are reached."""
        enter = ["nsenter", "-t", str(second.init), "-n"]
        return pair.vmctl_within(enter, "-c", "h2", *words).stdout.strip()

    try:
        for host, name in (("h1", moved), ("h2", there)):
            pair.vmctl("-c", host, "create", name, "--image", "micro", "--memory", "128M", "--wait", "agent")
        (clash,) = addresses("h2", there)
        assert addresses("h1", moved) == [clash]
        said = pair.vmctl("-c", "h1", "migrate", moved, "--to", "h2").stderr
        assert f"{moved} is plugged in anew to vmctl on h2, which gives it an address" in said
        until(lambda: addresses("h2", moved) not in ([], [clash]), "an address of h2's network", seconds=15)
        (found,) = addresses("h2", moved)
        assert addresses("h2", there) == [clash]
        kept = re.findall(r"<host [^>]*ip='([0-9.]+)'", second.virsh("net-dumpxml", "vmctl"))
        net = ipaddress.ip_network(f"{clash}/22", strict=False)
        assert clash in kept and found not in kept, "of the half for those that come from other hosts"
        assert ipaddress.ip_address(found) in net
        for name in (moved, there):
            assert beside("exec", name, "--", "hostname") == name
            assert beside("ssh", name, "hostname") == name
        routes = pair.vmctl("-c", "h2", "exec", "--via", "agent", moved, "--", "ip", "route").stdout
        assert routes.count("default via") == 1
        assert "link state='down'" not in second.virsh("dumpxml", moved)
    finally:
        for machine in pair.bed.machines:
            for name in (moved, there):
                pair.vmctl("-c", machine.name, "delete", name, "--yes", "--missing-ok", check=None)
            machine.virsh("net-destroy", "vmctl", check=False)
            machine.virsh("net-undefine", "vmctl", check=False)


@pytest.fixture
def wired(pair: Pair, vm: str) -> Iterator[str]:
    """A VM on h1 with two cards on its host's own network; what runs in it does not matter."""
    name = f"{vm}-wired"
    try:
        pair.vmctl("-c", "h1", "create", name, "--image", "micro", "--memory", "128M", "--no-start")
        pair.machine("h1").virsh("attach-interface", name, "network", "vmctl", "--model", "virtio", "--config")
        pair.vmctl("-c", "h1", "start", name)
        yield name
    finally:
        for machine in pair.bed.machines:
            if not machine.virsh("uri", check=False):
                machine.start("libvirtd")
            pair.vmctl("-c", machine.name, "delete", name, "--yes", "--missing-ok", check=None)
            machine.virsh("net-destroy", "vmctl", check=False)
            machine.virsh("net-undefine", "vmctl", check=False)


def links(pair: Pair, host: str, vm: str, *words: str) -> dict[str, str]:
    """Whether the cable of each of a VM's cards is plugged in, as libvirt has it."""
    cards = ET.fromstring(pair.machine(host).virsh("dumpxml", vm, *words)).iterfind("devices/interface")
    found = {}
    for card in cards:
        mac, link = card.find("mac"), card.find("link")
        assert mac is not None
        found[mac.get("address", "")] = "up" if link is None else link.get("state", "")
    return found


def pulling(pair: Pair, tmp_path: Path, which: str, *words: str) -> subprocess.Popen[str]:
    """vmctl that gives itself a signal right after it has pulled the cables."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.system.interrupting", which, "saved.set_links", *words],
        cwd=REPO,
        env={**pair.env, "CHANGES": str(tmp_path / "changes")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_with_its_cable_pulled_it_is_plugged_in_again(pair: Pair, wired: str, tmp_path: Path) -> None:
    """And what its user pulled is not."""
    one, other = links(pair, "h1", wired)
    pair.machine("h1").virsh("domif-setlink", wired, other, "down")
    process = pulling(pair, tmp_path, "SIGKILL", "-c", "h1", "migrate", wired, "--to", "h2")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and pair.where(wired) == {"h2": "running"}
    assert links(pair, "h2", wired) == {one: "down", other: "down"}
    pair.vmctl("-c", "h1", "migrate", wired, "--to", "h2")  # the same again
    assert links(pair, "h2", wired) == {one: "up", other: "down"}
    assert links(pair, "h2", wired, "--inactive") == {one: "up", other: "up"}

    process = pulling(pair, tmp_path, "SIGKILL", "-c", "h2", "migrate", wired, "--to", "h1")
    process.communicate(timeout=120)
    assert links(pair, "h1", wired) == {one: "down", other: "down"}
    told = pair.vmctl("-c", "h1", "doctor", check=None).stdout
    assert f"{wired} has no network" in told and links(pair, "h1", wired)[one] == "down"
    told = pair.vmctl("-c", "h1", "doctor", "--fix", check=None).stdout
    assert f"{wired} has no network" in told and links(pair, "h1", wired) == {one: "up", other: "down"}
    assert wired not in pair.vmctl("-c", "h1", "doctor", check=None).stdout
    assert "vmctl-pulled" not in pair.machine("h1").virsh("dumpxml", wired)

    process = pulling(pair, tmp_path, "SIGKILL", "-c", "h1", "migrate", wired, "--to", "h2")
    process.communicate(timeout=120)
    pair.vmctl("-c", "h2", "migrate", wired, "--to", "h1")  # nobody has recovered it
    assert links(pair, "h1", wired) == {one: "up", other: "down"}


def test_a_recovery_plugs_in_anew_what_no_move_has_and_nothing_else(pair: Pair, wired: str) -> None:
    """One that was cut off before the cables were pulled, too; of one that has simply moved there is nothing to do."""

    def recovered() -> subprocess.CompletedProcess[str]:
        return pair.vmctl("-c", "h1", "migrate", wired, "--to", "h2", "--recover")

    said = pair.vmctl("-c", "h1", "migrate", wired, "--to", "h2").stderr
    assert f"{wired} is plugged in anew to vmctl on h2" in said
    done = recovered()
    assert done.stdout == f"{wired}: on h2 already\n"
    assert f"nothing to recover: {wired} is on h2 already, running" in done.stderr
    assert "plugged in anew" not in done.stderr
    pair.vmctl("-c", "h2", "migrate", wired, "--to", "h1")

    pair.bed.limit("10mbit")
    process = pair.begin("-c", "h1", "migrate", wired, "--to", "h2")
    until(lambda: sending(pair, wired), "the migration sends")
    process.kill()
    process.communicate()
    pair.bed.limit(None)
    until(lambda: pair.where(wired) == {"h2": "running"}, "libvirt has sent it")
    assert {*links(pair, "h2", wired).values()} == {"up"}
    done = recovered()
    assert f"{wired} is plugged in anew to vmctl on h2" in done.stderr and " 0 B in " not in done.stdout
    assert "vmctl-pulled" not in pair.machine("h2").virsh("dumpxml", wired)
    assert "plugged in anew" not in recovered().stderr


def test_interrupted_with_its_cable_pulled_it_plugs_it_in(pair: Pair, wired: str, tmp_path: Path) -> None:
    process = pulling(pair, tmp_path, "SIGINT", "-c", "h1", "migrate", wired, "--to", "h2")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "it runs on h2, and h1 may still have files of it" in said, said
    assert {*links(pair, "h2", wired).values()} == {"up"}


def test_libvirtd_killed_with_a_cable_pulled_is_waited_for(pair: Pair, wired: str, tmp_path: Path) -> None:
    process = pulling(pair, tmp_path, "SIGSTOP", "-c", "h1", "migrate", wired, "--to", "h2")
    try:
        state = Path(f"/proc/{process.pid}/stat")
        until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "it has pulled them")
        assert {*links(pair, "h2", wired).values()} == {"down"}
        pair.machine("h2").kill("libvirtd")
        process.send_signal(signal.SIGCONT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=4)
        pair.machine("h2").start("libvirtd")
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and f"{wired} is plugged in anew to vmctl on h2" in said, said
    assert {*links(pair, "h2", wired).values()} == {"up"}


def test_interrupted_it_tells_of_those_that_have_moved(pair: Pair, vm: str) -> None:
    off = f"{vm}-off"
    pair.vmctl("-c", "h1", "create", off, "--image", "micro", "--network", "lan", "--no-start")
    pair.bed.limit("10mbit")
    try:
        process = pair.begin("-c", "h1", "migrate", off, vm, f"{vm}-none", "--to", "h2", "-o", "json")
        until(lambda: sending(pair, vm), "the second is sent")
        process.send_signal(signal.SIGINT)
        told, said = process.communicate(timeout=60)
        assert process.returncode == 130 and f"not begun: {vm}-none" in said, said
        assert [one["vm"] for one in json.loads(told)] == [off]
    finally:
        pair.vmctl("-c", "h2", "delete", off, "--yes", "--missing-ok")


def test_vmctl_is_killed_and_the_job_is_finished(pair: Pair, vm: str) -> None:
    pair.bed.limit("10mbit")
    process = pair.begin("-c", "h1", "migrate", vm, "--to", "h2")
    until(lambda: sending(pair, vm), "the migration sends")
    process.kill()
    process.wait()
    assert process.stderr is not None and process.stdout is not None
    process.stderr.close()
    process.stdout.close()
    pair.bed.limit(None)
    said = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2")  # the same again, as it still goes on, or has ended
    assert f"{vm}: h1 -> h2" in said.stdout or f"{vm}: on h2 already" in said.stdout
    said = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2")
    assert said.stdout == f"{vm}: on h2 already\n" and "running, and h1 has nothing of it" in said.stderr
    assert pair.where(vm) == {"h2": "running"}


def test_interrupted_as_it_sees_to_the_end_of_one_it_says_that_that_goes_on(pair: Pair, vm: str) -> None:
    pair.bed.limit("10mbit")
    first = pair.begin("-c", "h1", "migrate", vm, "--to", "h2")
    until(lambda: sending(pair, vm), "the migration sends")
    first.kill()
    first.communicate()
    again = pair.begin("-c", "h1", "migrate", vm, "--to", "h2")
    assert again.stderr is not None
    seen = ""
    while "under way already" not in seen:
        line = again.stderr.readline()
        assert line, seen
        seen += line
    again.send_signal(signal.SIGINT)
    _, said = again.communicate(timeout=60)
    assert again.returncode == 130, said
    assert f"cannot migrate VM {vm}: interrupted; its move from h1 to h2, begun before, goes on without vmctl" in said
    assert "--recover sees the end of that" in said
    pair.bed.limit(None)
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--recover")
    assert pair.where(vm) == {"h2": "running"}


def test_a_cable_that_is_cut_for_ever(pair: Pair, vm: str) -> None:
    pair.bed.limit("10mbit")
    process = pair.begin("-c", "h1", "migrate", vm, "--to", "h2")
    until(lambda: sending(pair, vm), "the migration sends")
    pair.machine("h2").cut()
    began = time.monotonic()
    try:
        _, said = process.communicate(timeout=170)
        assert process.returncode == 12, said
        assert time.monotonic() - began < 160
        assert f"{vm} runs on h1 as before, h2 cannot be asked" in said and "--recover" in said
        assert pair.machine("h1").virsh("domstate", vm) == "running"
    finally:
        pair.machine("h2").mend()
    pair.bed.limit(None)
    until(lambda: pair.where(vm) == {"h1": "running"}, "h2 has let go of it")
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--recover")
    assert pair.where(vm) == {"h2": "running"}


def test_sent_while_it_runs(pair: Pair) -> None:
    """A guest of its own, without a kernel: QEMU loses writes of an emulated one that is sent live, as vmctl says."""
    with busy(pair, turns=200_000) as name:
        words = ("migrate", name, "--to", "h2", "--live", "--no-auto-converge")
        said = pair.vmctl("-c", "h1", *words, "-o", "json")
        (moved,) = json.loads(said.stdout)
        assert pair.where(name) == {"h2": "running"} and moved["mode"] == "live"
        assert "QEMU may lose writes of its while it is sent live" in said.stderr


def test_a_busy_guest(pair: Pair) -> None:
    """It changes memory faster than the link takes it: left alone, it would never come to its end."""
    pair.bed.limit("100mbit")
    with busy(pair) as name:
        said = pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--live", timeout=240)
        assert pair.where(name) == {"h2": "running"}
        assert "the VM changes memory as fast as it is sent" in said.stderr
        assert "no end in sight at this rate" in said.stderr


def test_limits_that_change_on_the_way(pair: Pair) -> None:
    with busy(pair) as name:
        assert (
            "none is under way"
            in pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--adjust", "--bandwidth", "9M", check=6).stderr
        )
        process = pair.begin("-c", "h1", "migrate", name, "--to", "h2", "--bandwidth", "1M")
        until(lambda: sending(pair, name), "the migration sends")
        assert pair.machine("h1").virsh("migrate-getspeed", name) == "1"
        adjust = ("-c", "h1", "migrate", name, "--to", "h2", "--adjust", "--downtime", "700", "--bandwidth")
        (adjusted,) = pair.json(*adjust, "2M")  # while libvirt is asked it must not come to its end
        assert adjusted == {"vm": name, "bandwidth": 2 << 20, "downtime_ms": 700}
        assert pair.machine("h1").virsh("migrate-getmaxdowntime", name) == "700"
        # A QEMU that hears nobody, as one that sends the last of the memory over a link that is cut, holds up nobody.
        signal_qemu = ("sh", "-c", f"kill -$0 $(cat /run/libvirt/qemu/{name}.pid)")
        pair.machine("h1").run(*signal_qemu, "STOP")
        try:
            assert f"job of VM {name}: not after 2.0 s" in pair.vmctl(*adjust, "2M", check=7, timeout=60).stderr
        finally:
            pair.machine("h1").run(*signal_qemu, "CONT")
        assert pair.machine("h1").virsh("migrate-getspeed", name) == "2"
        pair.vmctl(*adjust, "900M")
        _, said = process.communicate(timeout=40)  # at 1 MiB/s it would take more than a minute
        assert process.returncode == 0, said
        assert pair.where(name) == {"h2": "running"}


def test_a_downtime_that_was_asked_for_stays(pair: Pair) -> None:
    """The policy, which raises it step by step, set it back to its own next step."""
    pair.bed.limit("60mbit")
    with busy(pair) as name:
        process = pair.begin("-c", "h1", "migrate", name, "--to", "h2", "--live", "--no-auto-converge")
        assert process.stderr is not None
        raised = lambda: next(line for line in process.stderr or () if "downtime up to" in line)  # noqa: E731
        raised()
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--adjust", "--downtime", "1500")
        raised()
        assert pair.machine("h1").virsh("migrate-getmaxdowntime", name) == "1500"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert pair.where(name) == {"h1": "running"}


def test_what_takes_too_long_is_given_up(pair: Pair) -> None:
    pair.bed.limit("20mbit")
    with busy(pair) as name:
        words = ("migrate", name, "--to", "h2", "--live", "--no-auto-converge", "--timeout", "6")
        said = pair.vmctl("-c", "h1", *words, check=12).stderr
        assert "did not come to its end in" in said and f"{name} runs on h1 as before" in said
        assert pair.where(name) == {"h1": "running"}


def test_ctrl_c_as_it_begins(pair: Pair, tmp_path: Path) -> None:
    """As the first downtime is set, libvirt's call being under way: vmctl ended, and the migration went on alone."""
    pair.bed.limit("20mbit")
    with busy(pair) as name:
        words = ("-c", "h1", "migrate", name, "--to", "h2", "--live", "--no-auto-converge")
        done = subprocess.run(
            [sys.executable, "-m", "tests.system.interrupting", "SIGINT", "migration.set_downtime", *words],
            cwd=REPO,
            env={**pair.env, "CHANGES": str(tmp_path / "changes")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 130 and f"{name} runs on h1 as before" in done.stderr, done.stderr
        assert not sending(pair, name) and pair.where(name) == {"h1": "running"}


def test_ctrl_c_before_it_is_sent_and_as_a_guest_stops(pair: Pair, vm: str, tmp_path: Path) -> None:
    """It was said only that it was interrupted, and of the guest nothing, which went on shutting down."""

    def cut(at: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tests.system.interrupting", "SIGINT", at, "-c", "h1", *words],
            cwd=REPO,
            env={**pair.env, "CHANGES": str(tmp_path / "changes")},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 130, done.stderr
        return done.stderr

    assert f"interrupted; {vm} runs on h1 as before" in cut("domain.note_pulled", "migrate", vm, "--to", "h2")
    assert pair.where(vm) == {"h1": "running"}
    said = cut("domain.shutdown_acpi", "stop", vm)
    assert f"cannot wait for the end of VM {vm}: interrupted; its guest has been asked to power off" in said
    until(lambda: pair.where(vm) == {"h1": "shut off"}, "it goes on shutting down")


def test_post_copy_is_refused_where_it_cannot_be(pair: Pair, vm: str) -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("this kernel lets every program handle page faults")
    said = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--postcopy", check=11).stderr
    assert "may not handle page faults" in said and "sysctl" in said
