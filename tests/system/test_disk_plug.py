"""Disks plugged into guests and out of them, as their guests see it."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.system import pattern
from tests.system.conftest import REPO, VMCTL, Shell, volumes
from vmctl import disk_guard, disk_guest, disk_plug, disk_xml
from vmctl.choices import Bus
from vmctl.disk_spec import Attachment
from vmctl.events import Event, Warned
from vmctl.hosts import open_host
from vmctl.hypervisor import disks
from vmctl.wait import wait_until

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def vm() -> Iterator[str]:
    """A running guest that tests plug disks into."""
    shell, chosen = Shell(), f"plug-{os.getpid()}"
    shell.guest(chosen)
    yield chosen
    shell.run("delete", chosen, "--yes")


def seen(shell: Shell, vm: str) -> dict[str, int]:
    """The guest's disks and their sizes in bytes."""
    script = 'for d in /sys/block/[vs]d*; do echo "${d##*/} $(cat $d/size)"; done'
    lines = shell.run("exec", vm, "--", "sh", "-c", script).stdout.splitlines()
    return {line.split()[0]: int(line.split()[1]) * 512 for line in lines if "*" not in line}


def targets(shell: Shell, vm: str, *flags: str) -> set[str]:
    return {disk.target for disk in disk_xml.read(shell.virsh("dumpxml", vm, *flags))}


@pytest.mark.parametrize("bus", ["virtio", "scsi"])
def test_a_disk_is_plugged_in_written_taken_out_and_back_with_what_was_written(shell: Shell, vm: str, bus: str) -> None:
    if bus == "scsi":
        shell.run("exec", vm, "--", "modprobe", "-a", "virtio_scsi", "sd_mod")
    before = targets(shell, vm)
    words = ("disk", "attach", vm, "32M", "--bus", bus, "--serial", f"data-{bus}")
    assert ("would add SCSI controller to VM" in shell.run(*words, "--dry-run").stdout) == (bus == "scsi")
    done = shell.json(*words)
    assert done["there"] == "now" and done["guest"], done
    assert seen(shell, vm)[done["guest"]] == 32 << 20
    assert targets(shell, vm) == targets(shell, vm, "--inactive") == before | {done["target"]}
    data = pattern.blocks(bus, 512)
    pattern.write(vm, f"/dev/{done['guest']}", data, at=100)
    out = shell.json("disk", "detach", f"{vm}:data-{bus}")
    assert out["when"] == "now" and Path(out["source"]).exists()
    assert done["guest"] not in seen(shell, vm)
    assert targets(shell, vm) == targets(shell, vm, "--inactive") == before
    again = shell.json("disk", "attach", vm, done["made"], "--bus", bus)
    assert pattern.holds(shell, vm, f"/dev/{again['guest']}", data, at=100)
    shell.run("disk", "detach", f"{vm}:{again['target']}", "--delete", "--yes")
    assert not Path(out["source"]).exists()


def test_a_guest_that_does_not_show_the_disk_is_told_of(shell: Shell, vm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_guest, "SEE_S", 1.0)
    heard: list[Event] = []
    shell.run("exec", vm, "--", "sh", "-c", "modprobe -a virtio_scsi sd_mod; rmmod sd_mod")
    with open_host(None) as host:
        done = disk_plug.attach(host, vm, "1M", Attachment(Bus.SCSI, serial="unseen"), heard.append, dry=False)
    assert done.there == "now" and not done.guest
    assert Warned(f"{vm}'s guest does not show disk {done.target} within 1 s", "has it a driver for scsi?") in heard
    shell.run("exec", vm, "--", "modprobe", "sd_mod")
    shell.run("disk", "detach", f"{vm}:unseen", "--delete", "--yes")


def test_a_guest_that_does_not_let_go_keeps_the_disk_and_the_wait_is_bounded(shell: Shell, vm: str, name: str) -> None:
    """A paused guest answers nobody: the disk stays, in the definition too; let run on, the same command ends well."""
    done = shell.json("disk", "attach", vm, "8M", "--serial", "stuck")
    shell.run("pause", vm)
    told = shell.run("disk", "detach", f"{vm}:stuck", "--timeout", "1", check=7)
    assert "has not let go of it" in told.stderr
    assert done["target"] in targets(shell, vm, "--inactive")
    shell.run("resume", vm)
    shell.run("disk", "detach", f"{vm}:stuck", "--delete", "--yes")
    assert done["target"] not in targets(shell, vm) | targets(shell, vm, "--inactive")
    with open_host() as host:  # as where the guest let go of it between two looks of that command
        assert disks.job(host.conn, vm, done["target"]) is None


def test_what_a_disk_may_do_is_limited_and_freed_while_its_guest_runs(shell: Shell, vm: str) -> None:
    done = shell.json(
        "disk", "attach", vm, "8M", "--iops", "500", "--cache", "none", "--aio", "native", "--iothread", "1"
    )
    where = f"{vm}:{done['target']}"
    (disk,) = [d for d in disk_xml.read(shell.virsh("dumpxml", vm)) if d.target == done["target"]]
    assert (disk.limits, disk.cache, disk.aio, disk.iothread) == ({"total_iops_sec": 500}, "none", "native", 1)
    shell.run("disk", "limit", where, "--iops", "0", "--read-bps", "1M")
    for flags in ((), ("--inactive",)):
        (disk,) = [d for d in disk_xml.read(shell.virsh("dumpxml", vm, *flags)) if d.target == done["target"]]
        assert disk.limits == {"read_bytes_sec": 1 << 20}
    assert shell.json("disk", "limit", where) == {"read_bytes_sec": 1 << 20}
    script = f"time -p dd if=/dev/{done['guest']} of=/dev/null bs=64k count=48 2>&1"
    took = shell.run("exec", vm, "--", "sh", "-c", f"echo 3 >/proc/sys/vm/drop_caches; {script}").stdout
    assert float(took.split("real")[1].split()[0]) > 1.0  # 3 MiB at 1 MiB a second, after a burst
    shell.run("disk", "limit", where, "--iops", "5", "--read-iops", "5", check=2)
    for dry, word in (["--dry-run"], "would go"), ([], "is gone"):
        told = shell.run("disk", "detach", where, "--delete", "--yes", *dry).stdout
        assert f"I/O thread 1 {word} with it" in told
    assert not disk_xml.iothreads(shell.virsh("dumpxml", vm)) | disk_xml.iothreads(
        shell.virsh("dumpxml", vm, "--inactive")
    )


def test_a_thread_that_two_disks_use_goes_with_the_second(shell: Shell, vm: str) -> None:
    for serial in ("left", "right"):
        shell.run("disk", "attach", vm, "1M", "--serial", serial, "--iothread", "2", "--next-start")
    assert "I/O thread" not in shell.run("disk", "detach", f"{vm}:left", "--delete", "--yes").stdout
    assert disk_xml.iothreads(shell.virsh("dumpxml", vm, "--inactive")) == {2}
    assert "I/O thread 2 is gone" in shell.run("disk", "detach", f"{vm}:right", "--delete", "--yes").stdout
    assert not disk_xml.iothreads(shell.virsh("dumpxml", vm, "--inactive"))


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("/etc", 2, "it is a folder"),
        ("/dev/null", 2, "no block device"),
        ("/dev/nope", 4, "No such file"),
        ("nbd://127.0.0.1:9/x", 10, "hint: does its server run"),
        ("4000T", 2, "no disk is larger"),
    ],
)
def test_what_cannot_be_a_disk_is_told_in_words_of_its_own(
    shell: Shell, vm: str, source: str, code: int, words: str
) -> None:
    xml, there = shell.virsh("dumpxml", vm, "--inactive"), volumes(shell)
    assert words in shell.run("disk", "attach", vm, source, check=code).stderr
    assert (shell.virsh("dumpxml", vm, "--inactive"), volumes(shell)) == (xml, there)


def test_a_machine_whose_ports_are_all_taken_says_so_before(shell: Shell, vm: str) -> None:
    made = []
    while not disk_xml.without_free_port(shell.virsh("dumpxml", vm)):
        made.append(shell.json("disk", "attach", vm, "1M")["target"])
        assert len(made) < 10
    there = volumes(shell)
    for dry in (["--dry-run"], []):
        told = shell.run("disk", "attach", vm, "1M", *dry, check=6).stderr
        assert "no PCIe port" in told and "--next-start" in told
    assert volumes(shell) == there
    for target in made:
        shell.run("disk", "detach", f"{vm}:{target}", "--delete", "--yes")


def test_what_libvirt_says_of_a_pool_comes_with_the_way_out(shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    shell.run("disk", "pool", "create", "gone", "--path", str(folder))
    assert "folder of pool gone" in shell.run("disk", "pool", "create", "two", "--path", f"{folder}/", check=5).stderr
    (tmp_path / "file").touch()
    for dry in (["--dry-run"], []):
        told = shell.run("disk", "pool", "create", "two", "--path", str(tmp_path / "file"), *dry, check=2).stderr
        assert "is no folder" in told
    words = ("--type", "fs", "--device", "/dev/nope", "--path", str(tmp_path / "mounted"))
    assert "hint: is the device there" in shell.run("disk", "pool", "create", "two", *words, check=13).stderr
    assert not (tmp_path / "mounted").exists()
    folder.rmdir()
    assert "inactive" in shell.run("disk", "pool", "show", "gone").stdout
    shell.run("disk", "pool", "delete", "gone", "--yes")
    assert "hint" not in shell.run("disk", "list", "--pool", "gone", check=4).stdout


def test_a_pool_that_is_not_active_is_not_forgotten_while_a_vm_has_a_disk_there(
    shell: Shell, vm: str, tmp_path: Path
) -> None:
    shell.run("disk", "pool", "create", "asleep", "--path", str(tmp_path / "asleep"))
    shell.run("disk", "create", "asleep/one", "1M")
    shell.run("disk", "attach", vm, "asleep/one", "--serial", "asleep", "--next-start")
    shell.virsh("pool-destroy", "asleep")
    assert f"disks of {vm} are there" in shell.run("disk", "pool", "delete", "asleep", "--yes", check=5).stderr
    shell.run("disk", "detach", f"{vm}:asleep")
    shell.run("disk", "pool", "delete", "asleep", "--yes")


def test_a_pool_with_what_a_stopped_vms_disk_is_based_on_is_not_forgotten(
    shell: Shell, name: str, tmp_path: Path
) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("disk", "pool", "create", "below", "--path", str(tmp_path / "below"))
    shell.run("disk", "create", "below/base", "1M")
    shell.run("disk", "create", "above", "--backing", "below/base")
    shell.run("disk", "attach", name, "above", "--serial", "above")
    assert f"disks of {name} are there" in shell.run("disk", "pool", "delete", "below", "--yes", check=5).stderr
    shell.run("disk", "detach", f"{name}:above", "--delete", "--yes")
    shell.run("disk", "pool", "delete", "below", "--yes")


def test_what_a_vm_writes_to_is_nothing_to_base_a_disk_on(shell: Shell, name: str) -> None:
    """Nor while it is stopped: once it is started the new disk would read what was never on one disk."""
    shell.run("create", name, "--image", "micro", "--no-start")
    there = volumes(shell)
    for dry in (["--dry-run"], []):
        refused = shell.run("disk", "create", "child", "--backing", f"{name}:root", *dry, check=2).stderr
        assert f"VM {name} writes to {name}:root" in refused
    assert volumes(shell) == there


def test_a_disk_of_the_next_start_is_its_vms_already(shell: Shell, vm: str) -> None:
    shell.run("disk", "create", "later", "1M")
    where = f"{vm}:later"
    target = shell.json("disk", "attach", vm, "later", "--serial", "later", "--next-start")["target"]
    assert [one["vm"] for one in shell.json("disk", "list") if one["source"].endswith("/later.qcow2")] == [vm]
    assert shell.json("disk", "show", "later")["vm"] == vm
    assert f"VM {vm} has it as {target}" in shell.run("disk", "delete", "later", "--yes", check=5).stderr
    for words in (["resize", where, "+1M"], ["flatten", "later"], ["convert", where, "--format", "raw"]):
        for dry in (["--dry-run"], []):
            assert "at its next start only" in shell.run("disk", *words, *dry, check=6).stderr
    shell.run("disk", "limit", where, "--iops", "7")
    (disk,) = [d for d in disk_xml.read(shell.virsh("dumpxml", vm, "--inactive")) if d.serial == "later"]
    assert disk.limits == {"total_iops_sec": 7}
    shell.run("disk", "detach", where, "--delete", "--yes")


def test_a_dry_run_tells_and_touches_nothing(shell: Shell, vm: str) -> None:
    xml, there = shell.virsh("dumpxml", vm, "--inactive"), volumes(shell)
    told = shell.run("disk", "attach", vm, "1G", "--dry-run").stdout
    assert f"would be {vm}:vd" in told and "would make volume vmctl/" in told
    attached = shell.run("disk", "attach", vm, "1M", "--iothread", "7", "--dry-run").stdout
    assert f"would add I/O thread 7 to VM {vm}" in attached
    assert "would be total_iops_sec 9" in shell.run("disk", "limit", f"{vm}:vda", "--iops", "9", "--dry-run").stdout
    for dry in (["--dry-run"], []):
        told = shell.run("disk", "detach", f"{vm}:vda", *dry, check=6).stderr
        assert "its machine lets no disk go" in told and "--next-start" in told
    assert "would be detached" in shell.run("disk", "detach", f"{vm}:vda", "--next-start", "--dry-run").stdout
    assert shell.run("disk", "create", "new", "1G", "--dry-run").stdout == "would make vmctl/new.qcow2\n"
    assert (shell.virsh("dumpxml", vm, "--inactive"), volumes(shell)) == (xml, there)


def test_a_disk_that_cannot_be_deleted_is_not_detached_either(shell: Shell, vm: str) -> None:
    loose = Path("/tmp/loose.qcow2")  # where QEMU's own user reaches it
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(loose), "1M"], check=True, timeout=30)
    inside = shell.json("disk", "attach", vm, "8M")["target"]
    shell.run("snapshot", "create", f"{vm}.one", "--internal")
    outside = shell.json("disk", "attach", vm, str(loose))["target"]
    for target, code, text in ((outside, 4, "it is in no storage pool"), (inside, 5, f"snapshot {vm}.one needs it")):
        for how in (["--dry-run"], ["--yes"], []):
            told = shell.run("disk", "detach", f"{vm}:{target}", "--delete", *how, check=code)
            assert text in told.stderr and "waiting for" not in told.stderr
        assert target in targets(shell, vm) & targets(shell, vm, "--inactive")
    shell.run("snapshot", "delete", f"{vm}.one", "--yes")
    shell.run("disk", "detach", f"{vm}:{inside}", "--delete", "--yes")
    shell.run("disk", "detach", f"{vm}:{outside}")
    assert loose.exists()
    loose.unlink()


def test_a_disk_that_is_not_there_is_told_in_our_words(shell: Shell, vm: str) -> None:
    for words in (("show", "nosuch"), ("resize", "nosuch", "+1G"), ("delete", "nosuch", "--yes")):
        told = shell.run("disk", *words, check=4).stderr
        assert told.startswith("cannot find disk nosuch: pool vmctl has no volume nosuch\nhint: vmctl disk list"), told
    told = shell.run("disk", "resize", vm, "+1G", check=4).stderr
    assert f"hint: the disks of VM {vm}: {vm}:vda" in told, told


def test_buses_that_take_no_disk_hot_are_told_and_wait_for_the_next_start(shell: Shell, vm: str, name: str) -> None:
    told = shell.run("disk", "attach", vm, "8M", "--bus", "sata", check=6)
    assert "takes no disk while the VM runs" in told.stderr
    assert shell.run("disk", "attach", vm, "8M", "--bus", "ide", check=6)
    for machine, bus in (("q35", "sata"), ("pc", "ide")):
        shell.run("create", name, "--image", "micro", "--machine", machine, "--no-start")
        assert "has no bus nvme" in shell.run("disk", "attach", name, "8M", "--bus", "nvme", check=8).stderr
        done = shell.json("disk", "attach", name, "8M", "--bus", bus, "--serial", "cold")
        assert done["there"] == "its next start"
        shell.run("start", name)
        assert done["target"] in targets(shell, name)
        assert "lets no disk go" in shell.run("disk", "detach", f"{name}:cold", check=6).stderr
        assert shell.json("disk", "detach", f"{name}:cold", "--next-start")["when"] == "its next stop and start"
        shell.run("delete", name, "--yes")


def test_what_cannot_be_attached_is_one_error_and_leaves_nothing(
    shell: Shell, vm: str, name: str, tmp_path: Path
) -> None:
    xml, there = shell.virsh("dumpxml", vm, "--inactive"), volumes(shell)
    evil = tmp_path / "evil.qcow2"
    words = ["create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", str(evil), "1M"]
    subprocess.run(["qemu-img", *words], check=True, timeout=30)
    for words, code, text in (
        ([str(evil)], 10, "/etc/passwd is in no storage pool"),
        (["1G", "--serial", "much too long to be a serial"], 2, "serial"),
        (["1G", "--aio", "native"], 2, "cache none or directsync"),
        (["1G", "--target", "sda"], 2, "not one of bus virtio"),
        (["1G", "--target", "vda"], 5, "target vda is taken"),
        (["1G", "--serial", "root"], 5, "serial root is taken"),
        (["nope"], 4, "nope"),
        (["nbd://127.0.0.1:1/x"], 10, "onnect"),
    ):
        assert text in shell.run("disk", "attach", vm, *words, check=code).stderr
    told = shell.run("create", name, "--image", "micro", "--disk", str(evil), check=2)
    assert "/etc/passwd is in no storage pool" in told.stderr
    assert (shell.virsh("dumpxml", vm, "--inactive"), volumes(shell)) == (xml, there)


def test_two_running_vms_never_write_one_disk(shell: Shell, vm: str, name: str) -> None:
    shell.run("disk", "create", "shared", "8M", "--format", "raw")
    path = shell.json("disk", "show", "shared.raw")["path"]
    shell.run("disk", "attach", vm, "shared.raw")
    shell.run("create", name, "--image", "micro", "--no-start")
    assert f"VM {vm} has it" in shell.run("disk", "attach", name, "shared.raw", check=5).stderr
    # Past us: defined by another tool, by another name of the same file.
    link = Path(path).with_name("other-name.raw")
    link.hardlink_to(path)
    shell.virsh("attach-disk", name, str(link), "vdz", "--config", "--driver", "qemu", "--subdriver", "raw")
    told = shell.run("start", name, check=5)
    assert f"running VM {vm} writes it" in told.stderr
    shell.run("disk", "detach", f"{vm}:{path}")
    shell.run("start", name)
    assert f"VM {name} has it" in shell.run("disk", "attach", vm, "shared.raw", check=5).stderr
    shell.run("stop", name, "--force", "--timeout", "0")
    shell.virsh("detach-disk", name, "vdz", "--config")
    first = shell.json("disk", "attach", vm, "shared.raw", "--readonly")
    shell.run("disk", "attach", name, "shared.raw", "--readonly")
    shell.run("start", name)
    shell.run("disk", "detach", f"{vm}:{first['target']}")
    shell.run("delete", name, "--yes")
    assert Path(path).exists()  # it was never that VM's own
    link.unlink()
    shell.run("disk", "delete", "shared.raw", "--yes")
    assert not Path(path).exists()


def test_whatever_doctor_says_can_be_deleted_is(shell: Shell, vm: str) -> None:
    """A seed without its VM is no disk that can be worked on."""
    pool = Path("/var/lib/libvirt/vmctl/vmctl")
    (seed,) = pool.glob(f"{vm}-*-seed.iso")
    stray = pool / "stray-seed.iso"
    stray.write_bytes(seed.read_bytes())
    told = shell.run("doctor", check=None).stdout
    assert "vmctl disk delete vmctl/stray-seed.iso" in told, told
    shell.run("disk", "delete", "vmctl/stray-seed.iso", "--yes")
    assert not stray.exists()


def test_other_hosts_are_asked_only_where_they_can_see_the_disk(shell: Shell, tmp_path: Path) -> None:
    """A host that is down costs nobody anything who works on disks of this machine alone."""
    env = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config")}
    shell.run("host", "add", "gone", "qemu+tcp://127.0.0.1:1/system", "--insecure", "--no-check", env=env)
    alone, part = tmp_path / "alone", tmp_path / "part"
    with ExitStack() as undo:
        for folder, words in ((alone, ["-t", "tmpfs", "tmpfs"]), (part, ["--bind", str(alone / "below")])):
            folder.mkdir()
            subprocess.run(["mount", *words, str(folder)], check=True)
            undo.callback(subprocess.run, ["umount", str(folder)], check=True)
            folder.chmod(0o755)
            (alone / "below").mkdir(exist_ok=True)
            shell.virsh("pool-create-as", folder.name, "dir", "--target", str(folder))
            undo.callback(shell.virsh, "pool-destroy", folder.name)
        for pool, asked in (("alone", False), ("part", True)):
            shell.run("disk", "create", f"{pool}/d.qcow2", "8M")
            said = shell.run("disk", "compact", f"{pool}/d.qcow2", env=env).stderr
            said += shell.run("disk", "delete", f"{pool}/d.qcow2", "--yes", env=env).stderr
            assert said.count("not asked whether a VM of theirs has it: gone (") == (2 if asked else 0), said


@contextmanager
def meanwhile(path: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A command that has looked at a disk and waits, while the block changes it, for who works on that now."""
    with open_host() as host, disk_guard.unclaimed(host, str(path)):
        what = f"disk {disk_guard.key(str(path), local=True)} on {host.lock_scope}"
        lock = str(host.folders.runtime / (hashlib.sha256(what.encode()).hexdigest()[:24] + ".lock"))
        running = subprocess.Popen([*VMCTL, *words], stderr=subprocess.PIPE, text=True, cwd=REPO)

        def waits() -> bool:
            if running.poll() is not None:
                return True
            with suppress(OSError):
                return any(os.path.realpath(one) == lock for one in Path(f"/proc/{running.pid}/fd").iterdir())
            return False

        wait_until(waits, what="its wait", timeout_s=60)
        yield running


def test_no_disk_goes_from_under_who_has_just_got_it(shell: Shell, name: str) -> None:
    """Each of two looks first: a VM was left with a disk that is not there, and one was based on nothing."""
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("disk", "create", f"{name}-q", "1M")
    path = Path(f"/var/lib/libvirt/vmctl/vmctl/{name}-q.qcow2")
    try:
        with meanwhile(path, "disk", "delete", f"{name}-q", "--yes") as deleting:
            shell.virsh("attach-disk", name, str(path), "vdx", "--subdriver", "qcow2", "--config")
        assert f"VM {name} has it as vdx" in deleting.communicate(timeout=60)[1]
        assert deleting.returncode == 5 and path.exists()
        shell.run("disk", "detach", f"{name}:vdx")
        attaching = ["attach", name, f"{name}-q"]
        for words in (attaching, [*attaching, "--readonly"], ["create", f"{name}-top", "--backing", f"{name}-q"]):
            content = path.read_bytes()
            with meanwhile(path, "disk", *words) as other:
                path.unlink()
                shell.virsh("pool-refresh", "vmctl")
            told = other.communicate(timeout=60)[1]
            assert other.returncode == 4 and ("just been deleted" in told or "has no volume" in told), told
            assert str(path) not in shell.virsh("dumpxml", name) and not path.with_name(f"{name}-top.qcow2").exists()
            path.write_bytes(content)
            shell.virsh("pool-refresh", "vmctl")
    finally:
        shell.run("delete", name, "--yes")
        path.unlink(missing_ok=True)


def test_the_name_of_a_disk_says_its_format(shell: Shell, name: str) -> None:
    """A file NAME.raw was a qcow2, and whatever goes by its name gave a guest its headers."""
    try:
        assert shell.json("disk", "create", f"{name}.raw", "1M")["format"] == "raw"
        for words in ([f"{name}-b.raw", "--format", "qcow2"], [f"{name}-b.qcow2", "--format", "raw"]):
            assert "its name says that it is" in shell.run("disk", "create", words[0], "1M", *words[1:], check=2).stderr
    finally:
        shell.run("disk", "delete", f"{name}.raw", "--yes")
