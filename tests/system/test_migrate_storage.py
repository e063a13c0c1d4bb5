"""VMs that move between two hosts that share nothing: disks and base images go along, and are gone from there."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.phases import Hold, Phase, install
from tests.hosts import Machine
from tests.hosts.machine import sh
from tests.system.conftest import Shell
from tests.system.migrating import Pair, guest, pair_fixture, until
from tests.system.test_list import calls
from tests.system.test_session import USER, Person
from vmctl import record
from vmctl.wait import pause

pytestmark = pytest.mark.system


pair = pair_fixture()


@pytest.fixture(scope="module")
def vm(pair: Pair) -> Iterator[str]:
    with guest(pair) as name:
        yield name


@pytest.fixture(autouse=True)
def home(pair: Pair, vm: str) -> Iterator[None]:
    yield
    pair.bed.limit(None)
    if pair.where(vm).get("h2"):
        pair.vmctl("-c", "h2", "migrate", vm, "--to", "h1", "--copy-storage", "overlay", check=None)
    assert pair.where(vm) == {"h1": "running"}


def of(vm: str, names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(f"{vm}-")}


def written(pair: Pair, host: str, vm: str) -> str:
    """Write something new to the guest's disk; its digest."""
    script = "head -c 3000000 /dev/urandom >/root/data; sync; md5sum </root/data"
    return pair.vmctl("-c", host, "exec", "--via", "agent", vm, "--", "sh", "-c", script).stdout


def read(pair: Pair, host: str, vm: str) -> str:
    """The same digest again, of what is on the disk and not in the guest's memory."""
    script = "echo 3 >/proc/sys/vm/drop_caches; md5sum </root/data"
    return pair.vmctl("-c", host, "exec", "--via", "agent", vm, "--", "sh", "-c", script).stdout


def test_it_is_refused_without_and_says_which_files(pair: Pair, vm: str) -> None:
    said = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", check=11).stderr
    for file in ("disk vda", "read-only disk vdb", "base image", "kernel", "initrd"):
        assert f"{file} (" in said
    assert said.count("h2 does not see the same file") == 5 and "--copy-storage" in said
    assert pair.files("h2") == set() and pair.where(vm) == {"h1": "running"}


# What the client has already, or keeps to itself.
_LOCAL = re.compile(
    r"virEvent|vir\w+(Free|GetName)$|virConnect(IsAlive|SetKeepAlive|Close)|virStream(New|Free)|virStorageVolGetKey"
)


def test_a_check_asks_each_thing_once(pair: Pair, vm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is a way there and back. There were twice as many of them."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(pair.config))
    second = pair.machine("h2")
    for folders, most in (False, 70), (True, 108):
        if folders:
            second.run("mkdir", "-p", "/var/lib/libvirt/vmctl/vmctl", "/var/lib/libvirt/vmctl/vmctl-images")
        _, said = calls("-c", "h1", "migrate", vm, "--to", "h2", "--check", "--copy-storage", "overlay")
        made = ast.literal_eval(said.splitlines()[-1].partition(" ")[2])
        far = {name: count for name, count in made.items() if not _LOCAL.match(name)}
        assert sum(far.values()) <= most, far


def test_live_with_what_lies_above_the_base(pair: Pair, vm: str) -> None:
    digest = written(pair, "h1", vm)
    files = of(vm, pair.files("h1"))
    pair.bed.limit("80mbit")
    try:
        (moved,) = pair.json("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay")
    finally:
        pair.bed.limit(None)
    assert moved["copied"] and pair.where(vm) == {"h2": "running"}
    whole = pair.machine("h2").run("du", "-cB1", *moved["copied"]).stdout.split()[-2]
    assert moved["time_s"] > 0.9 * (int(whole) + moved["data"]) / 10e6, "base images are copied in that time, too"
    assert of(vm, pair.files("h1")) == set(), "its disks are gone from where it was"
    assert of(vm, pair.files("h2")) == files
    assert read(pair, "h2", vm) == digest
    top = pair.machine("h2").virsh("domblklist", vm).splitlines()[0].split()[1]
    chain = pair.machine("h2").run("qemu-img", "info", "-U", "--backing-chain", top).stdout
    assert chain.count("image: ") == 2, "still an overlay on its base image"
    again = pair.json("-c", "h2", "migrate", vm, "--to", "h1", "--copy-storage", "overlay")[0]
    assert not any("vmctl-images" in path for path in again["copied"]), (
        "the base image is there, and known by its digest"
    )
    assert read(pair, "h1", vm) == digest


def test_a_file_that_arrives_changed_is_not_taken(pair: Pair, vm: str) -> None:
    """A base image of the same name and size with one other byte: not the same file, whatever its name says."""
    second = pair.machine("h2")
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay")
    pair.vmctl("-c", "h2", "migrate", vm, "--to", "h1", "--copy-storage", "overlay")
    (image,) = second.images.glob("micro-*.qcow2")
    kept = image.read_bytes()
    image.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        said = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay", check=11).stderr
        assert "base image would be" in said and "another file is" in said
    finally:
        image.write_bytes(kept)


def test_live_with_whole_disks(pair: Pair, vm: str) -> None:
    digest = written(pair, "h1", vm)
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "full")
    top = pair.machine("h2").virsh("domblklist", vm).splitlines()[0].split()[1]
    chain = pair.machine("h2").run("qemu-img", "info", "-U", "--backing-chain", top).stdout
    assert chain.count("image: ") == 1, "based on nothing"
    assert read(pair, "h2", vm) == digest


def test_one_that_stayed_with_disks_of_its_own_does_not_start_beside(pair: Pair, vm: str) -> None:
    """Its disks are copies, which no lock of QEMU's keeps it from; and no recovery gives them up unasked."""
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay", "--keep-source")
    told = pair.vmctl("-c", "h1", "start", vm, check=5).stderr
    assert f"cannot start VM {vm}: it runs on h2" in told and f"vmctl -c h2 stop {vm}" in told
    told = pair.vmctl("-c", "h2", "migrate", vm, "--to", "h1", "--recover", check=12).stderr
    assert "on h1 it is stopped, with a disk that is not the one on h2" in told
    assert pair.where(vm) == {"h1": "shut off", "h2": "running"}
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--recover")
    assert pair.where(vm) == {"h2": "running"} and not of(vm, pair.files("h1"))


def test_what_stayed_is_known_for_that_when_libvirt_has_forgotten_it(pair: Pair, vm: str) -> None:
    """libvirt, begun anew, says of what it sent away no more than that it is off; and it was started on both hosts."""
    first, second = pair.machine("h1"), pair.machine("h2")
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay", "--keep-source")
    _begun_anew(first)
    told = pair.vmctl("-c", "h1", "start", vm, check=5).stderr
    assert f"cannot start VM {vm}: it runs on h2, and must not be on two hosts at once" in told
    told = pair.vmctl("-c", "h1", "autostart", vm, check=5).stderr
    assert f"cannot set autostart of VM {vm}: it runs on h2" in told
    assert pair.where(vm) == {"h1": "shut off", "h2": "running"}

    second.kill("libvirtd")
    told = pair.vmctl("-c", "h1", "start", vm, check=5).stderr
    assert f"cannot start VM {vm}: h2 has it too, and cannot be asked whether it runs there" in told
    assert f"if it is gone for good: vmctl -c h1 start {vm} --take-over" in told
    pair.vmctl("host", "remove", "h2")
    told = pair.vmctl("-c", "h1", "start", vm, check=5).stderr
    assert "the config file has no such host" in told and f"vmctl host add h2 {shlex.quote(second.ssh_uri)}" in told
    second.start("libvirtd")
    pair.vmctl("host", "add", "h2", second.ssh_uri, "--host-key", second.host_key)

    pair.vmctl("-c", "h2", "stop", vm, "--force")
    pair.vmctl("-c", "h1", "start", vm)  # it is off there
    _begun_anew(second)
    told = pair.vmctl("-c", "h2", "start", vm, check=5).stderr
    assert f"cannot start VM {vm}: it runs on h1" in told
    pair.vmctl("-c", "h1", "stop", vm, "--force")
    pair.vmctl("-c", "h1", "snapshot", "create", f"{vm}.off")
    pair.vmctl("-c", "h2", "start", vm)
    told = pair.vmctl("-c", "h1", "snapshot", "revert", f"{vm}.off", "--start", "--yes", check=5).stderr
    assert f"cannot revert to snapshot {vm}.off and start VM {vm}: it runs on h2" in told
    assert pair.where(vm) == {"h1": "shut off", "h2": "running"}
    pair.vmctl("-c", "h1", "snapshot", "revert", f"{vm}.off", "--yes")
    pair.vmctl("-c", "h1", "start", vm, check=5)
    pair.vmctl("-c", "h1", "snapshot", "delete", f"{vm}.off", "--yes")

    pair.vmctl("-c", "h2", "stop", vm, "--force")
    second.kill("libvirtd")
    pair.vmctl("-c", "h1", "start", vm, "--take-over")
    second.start("libvirtd")
    assert "vmctl-homes" not in first.virsh("dumpxml", "--inactive", vm), "it asks h2 no more"
    pair.vmctl("-c", "h1", "delete", vm, "--yes")
    assert "vmctl-homes" in second.virsh("dumpxml", "--inactive", vm)
    pair.vmctl("-c", "h2", "start", vm)
    assert "vmctl-homes" not in second.virsh("dumpxml", "--inactive", vm), "h1 has it no more"
    pair.vmctl("-c", "h2", "wait", vm, "--for", "agent")


def _begun_anew(machine: Machine) -> None:
    machine.kill("libvirtd")
    machine.start("libvirtd")


def test_what_stayed_of_one_that_was_off(pair: Pair, vm: str) -> None:
    name = f"{vm}-off"
    pair.vmctl("-c", "h1", "create", name, "--image", "micro", "--memory", "128M", "--network", "lan", "--no-start")
    try:
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--copy-storage", "overlay", "--keep-source")
        pair.vmctl("-c", "h2", "start", name)
        told = pair.vmctl("-c", "h1", "start", name, check=5).stderr
        assert f"cannot start VM {name}: it runs on h2" in told
        pair.vmctl("-c", "h2", "stop", name, "--force")
        pair.vmctl("-c", "h1", "delete", name, "--yes")
        pair.vmctl("-c", "h2", "migrate", name, "--to", "h1", "--copy-storage", "overlay")
        assert "vmctl-homes" not in pair.machine("h1").virsh("dumpxml", name), "it is there alone again"
    finally:
        for host in ("h1", "h2"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)


def test_what_stayed_hears_where_it_went_from_there(pair: Pair, vm: str) -> None:
    """It asked the host that it had gone to, which had none of it any more, and was started beside it on a third."""
    first, name, third = pair.machine("h1"), f"{vm}-on", ("-c", "third")
    pair.vmctl("host", "add", "third", "qemu:///system")
    start = ("-c", "h1", "start", name)
    pair.vmctl("-c", "h1", "create", name, "--image", "micro", "--memory", "128M", "--network", "lan", "--no-start")
    first.virsh("detach-interface", name, "network", "--config")  # which the third one has not
    try:
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--copy-storage", "overlay", "--keep-source")
        pair.vmctl("-c", "h2", "migrate", name, "--to", "third", "--copy-storage", "overlay")
        pair.vmctl(*third, "start", name)
        pair.vmctl("host", "remove", "third")
        told = pair.vmctl(*start, check=5).stderr
        assert f"cannot start VM {name}: it runs on qemu:///system, and must not be on two hosts at once" in told
        pair.vmctl("host", "add", "third", "qemu:///system")
        pair.vmctl(*third, "stop", name, "--force")

        first.kill("libvirtd")
        try:
            told = pair.vmctl(*third, "migrate", name, "--to", "h2", "--copy-storage", "overlay").stderr
        finally:
            first.start("libvirtd")
        assert f"h1, which has a definition of {name} too, was not told that it is on h2 now" in told
        pair.vmctl(*start)  # it is off there, which h1 hears now
        pair.vmctl("-c", "h1", "stop", name, "--force")
        pair.vmctl("-c", "h2", "start", name)
        told = pair.vmctl(*start, check=5).stderr
        assert f"cannot start VM {name}: it runs on h2" in told
        pair.vmctl("-c", "h2", "stop", name, "--force")
    finally:
        for host in ("third", "h2", "h1"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)
        pair.vmctl("host", "remove", "third", check=None)


def test_what_stayed_on_this_machine_is_asked_for_though_no_config_file_names_it(pair: Pair, vm: str) -> None:
    """The note of a host without a URI was taken for one of another machine's, which cannot be asked."""
    here, name = ("-c", "qemu:///system"), f"{vm}-here"
    migrate = ("migrate", name, "--copy-storage", "overlay", "--to")
    pair.vmctl(*here, "create", name, "--image", "micro", "--memory", "128M", "--no-start")
    Shell().virsh("detach-interface", name, "network", "--config")  # which the others have not
    try:
        pair.vmctl(*here, *migrate, "h2", "--keep-source")
        pair.vmctl("-c", "h2", "start", name)  # it is off here
        told = pair.vmctl(*here, "start", name, check=5).stderr
        assert f"cannot start VM {name}: it runs on h2" in told
        pair.vmctl("-c", "h2", "stop", name, "--force")
        pair.vmctl(*here, "start", name)
        told = pair.vmctl("-c", "h2", "start", name, check=5).stderr
        assert f"cannot start VM {name}: it runs on qemu:///system" in told
        assert f"vmctl -c qemu:///system stop {name}" in told
        told = pair.vmctl("-c", "h2", *migrate, "h1", check=11).stderr
        assert "qemu:///system" in told
        pair.vmctl(*here, "stop", name, "--force")

        told = pair.vmctl("-c", "h2", *migrate, "h1").stderr
        assert "was not told" not in told
        pair.vmctl("-c", "h1", "start", name)
        told = pair.vmctl(*here, "start", name, check=5).stderr
        assert f"cannot start VM {name}: it runs on h1" in told

        pair.vmctl("-c", "h1", "stop", name, "--force")
        pair.vmctl(*here, "delete", name, "--yes")
        pair.vmctl("-c", "h1", "start", name)
        assert "vmctl-homes" not in pair.machine("h1").virsh("dumpxml", "--inactive", name), "it is there alone"
    finally:
        for host in ("h1", "h2", "qemu:///system"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)


def test_what_stayed_in_a_session_is_told_from_what_the_system_has(pair: Pair) -> None:
    """A user's libvirt draws another UUID of its host at each start, or has that of the system's, which knows no VM of
    its: neither was the session taken for itself again, nor asked by others.
    """
    user, second, name, here = Person(), pair.machine("h2"), "m-session", ("-c", "qemu:///session")
    home = Path(user.entry.pw_dir)
    (key := home / "key").write_text(pair.bed.key.read_text())
    key.chmod(0o600)
    shutil.chown(key, USER)
    user.run("mkdir", "-p", str(folder := home / ".config/libvirt"))
    devices = "<os><type machine='q35'>hvm</type></os>"
    (xml := home / "d.xml").write_text(
        f"<domain type='qemu'><name>{name}</name><memory>16384</memory>{devices}</domain>"
    )
    shown = Shell().virsh("capabilities").partition("<uuid>")[2].partition("</uuid>")[0]
    try:
        user.vmctl("host", "add", "h2", f"{second.peer_uri}?keyfile={key}", "--host-key", second.host_key)
        for same in (False, True):
            if same:
                (folder / "libvirtd.conf").write_text(f'host_uuid = "{shown}"\n')
            _end_session(user)
            user.run("virsh", "-q", *here, "define", str(xml))
            user.vmctl(*here, "migrate", name, "--to", "h2", "--keep-source")
            _end_session(user)
            user.vmctl(*here, "start", name)
            told = user.vmctl("-c", "h2", "start", name, check=5).stderr
            assert f"cannot start VM {name}: it runs on qemu:///session" in told
            user.run("virsh", "-q", *here, "destroy", name)
            user.vmctl("-c", "h2", "start", name)
            told = user.vmctl(*here, "start", name, check=5).stderr
            assert f"cannot start VM {name}: it runs on h2" in told
            user.vmctl("-c", "h2", "stop", name, "--force", "--timeout", "0")
            for host in (("-c", "h2"), here):
                user.vmctl(*host, "delete", name, "--yes")
    finally:
        second.virsh("destroy", name, check=False)
        second.virsh("undefine", name, check=False)
        user.run("virsh", "-q", *here, "destroy", name, check=None)
        user.run("virsh", "-q", *here, "undefine", name, check=None)
        (folder / "libvirtd.conf").unlink(missing_ok=True)
        _end_session(user)
        user.vmctl("host", "remove", "h2", check=None)


def _end_session(user: Person) -> None:
    """End the user's libvirtd; the next connection starts another one."""
    file = Path(f"/run/user/{user.entry.pw_uid}/libvirt/libvirtd.pid")
    if file.exists() and (own := Path(f"/proc/{(pid := file.read_text().strip())}")).exists():
        user.run("kill", pid)
        until(lambda: not own.exists(), "it ends")


def test_a_machine_without_libvirt_is_not_missed_when_all_noted_hosts_were_asked(pair: Pair, vm: str) -> None:
    """A host noted by itself is in the config file by another name: before it answers it may be this machine."""
    name = f"{vm}-laptop"
    pair.vmctl("-c", "h1", "create", name, "--image", "micro", "--memory", "128M", "--network", "lan", "--no-start")
    try:
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--copy-storage", "overlay", "--keep-source")
        second = pair.machine("h2")
        (first,) = (one for one in record.homes(second.virsh("dumpxml", name)) if one.name == "h1")
        uuid = second.virsh("domuuid", name).strip()
        note = f'<homes vm="{uuid}"><home host="{first.uuid}" name="of-old" uri=""/></homes>'
        second.virsh("metadata", name, record.HOMES, "--key", record.HOMES_PREFIX, "--set", note, "--config")
        hidden = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run/libvirt && exec "$@"', "sh")
        assert "not asked" not in pair.vmctl_within(hidden, "-c", "h2", "start", name).stderr
    finally:
        for host in ("h1", "h2"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)


def test_of_two_starts_at_once_one_starts_it(pair: Pair, vm: str) -> None:
    """Each asked before the other had started it, and there were two."""
    name = f"{vm}-twice"
    pair.vmctl("-c", "h1", "create", name, "--image", "micro", "--memory", "128M", "--network", "lan", "--no-start")
    try:
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--copy-storage", "overlay", "--keep-source")
        for _ in range(4):
            both = [pair.begin("-c", host, "start", name) for host in ("h1", "h2")]
            said = [one.communicate(timeout=120)[1] for one in both]
            assert sorted(one.returncode for one in both) == [0, 5], said
            assert sorted(pair.where(name).values()) == ["running", "shut off"]
            for host in ("h1", "h2"):
                pair.vmctl("-c", host, "stop", name, "--force")
    finally:
        for host in ("h1", "h2"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)


def test_one_restored_where_it_was_is_another_one(pair: Pair, vm: str, tmp_path: Path, network: None) -> None:
    """As one made anew is: with its UUID and MAC there were two on one Ethernet."""
    name, place = f"{vm}-back", ("--folder", str(tmp_path))
    pair.vmctl("-c", "qemu:///system", "create", name, "--image", "micro", "--memory", "128M", "--no-start")
    try:
        pair.vmctl("-c", "qemu:///system", "backup", "create", name, *place)
        moving = ("-c", "qemu:///system", "migrate", name, "--to", "h2", "--copy-storage", "overlay")
        uuid = pair.json("-c", "qemu:///system", "show", name)["uuid"]
        pair.vmctl(*moving)
        told = pair.vmctl("-c", "qemu:///system", "backup", "restore", name, *place).stderr
        assert f"{name} is on h2: it is restored as another VM, with a UUID and MACs of its own" in told
        new, moved = (pair.json("-c", host, "show", name) for host in ("qemu:///system", "h2"))
        assert new["uuid"] != moved["uuid"] == uuid and new["nics"][0]["mac"] != moved["nics"][0]["mac"]
        for host in ("qemu:///system", "h2"):
            pair.vmctl("-c", host, "delete", name, "--yes")
        pair.vmctl("-c", "qemu:///system", "backup", "restore", name, *place)
        assert pair.json("-c", "qemu:///system", "show", name)["uuid"] == uuid, "nobody else has it any more"
    finally:
        for host in ("qemu:///system", "h2"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)


def test_one_made_anew_where_it_was_is_another_one(pair: Pair, vm: str) -> None:
    """With the UUID of the one that moved, which names and MACs come from, both were on one Ethernet with one MAC."""
    name = f"{vm}-anew"
    made = ("-c", "h1", "create", name, "--image", "micro", "--memory", "128M", "--network", "lan", "--no-start")
    pair.vmctl(*made)
    try:
        pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--copy-storage", "overlay")
        pair.vmctl(*made)
        new, moved = (pair.json("-c", host, "show", name) for host in ("h1", "h2"))
        assert new["uuid"] != moved["uuid"] and new["nics"][0]["mac"] != moved["nics"][0]["mac"]
    finally:
        for host in ("h1", "h2"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)


def test_what_a_vm_of_a_third_host_needs_stays(pair: Pair, vm: str, tmp_path: Path) -> None:
    """That host sees the folder, and the target does not: it is asked before what was copied is deleted."""
    first, second, shell = pair.machine("h1"), pair.machine("h2"), pair.shell
    name, other, folder, given = f"{vm}-third", f"{vm}-other", tmp_path / "both", first.folder / "disk/both"
    disk = f"{folder}/data.qcow2"
    create = ("-c", "h1", "create", name, "--image", "micro", "--memory", "128M", "--network", "lan", "--no-start")
    with ExitStack() as undo:
        for path in (given, folder):
            path.mkdir()
            path.chmod(0o755)
        sh("mount", "--bind", str(given), str(folder))
        undo.callback(sh, "umount", str(folder))
        for machine in (first, second):
            machine.run("mkdir", "-p", str(folder))
        first.run("mount", "--bind", "/var/lib/libvirt/both", str(folder))
        undo.callback(first.run, "umount", str(folder))
        first.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "1M")
        pair.vmctl("host", "add", "third", "qemu:///system")
        undo.callback(pair.vmctl, "host", "remove", "third")
        for host in ("h1", "h2"):
            undo.callback(pair.vmctl, "-c", host, "delete", name, "--yes", "--missing-ok", check=None)
        pair.vmctl(*create)
        first.virsh("attach-disk", name, disk, "vdz", "--driver", "qemu", "--subdriver", "qcow2", "--config")
        define = tmp_path / "other.xml"
        define.write_text(
            f"<domain type='qemu'><name>{other}</name><memory unit='MiB'>32</memory><os><type>hvm</type></os><devices>"
            f"<disk type='file'><driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda'/></disk>"
            "</devices></domain>"
        )
        shell.virsh("define", str(define))
        undo.callback(shell.virsh, "undefine", other)
        said = pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--copy-storage", "overlay").stderr
        assert f"kept {disk} on h1: {other} on third needs it, on storage that both see" in said
        assert (folder / "data.qcow2").exists() and pair.where(name) == {"h2": "shut off"}
        second.run("qemu-img", "info", disk)
        assert not of(name, pair.files("h1")), "what is its own alone is gone from there"


def test_what_is_asked_of_one_that_is_off(pair: Pair, vm: str) -> None:
    """Its files came as fast as they could, whatever --bandwidth said; with --transient it would be nowhere."""
    name, second = f"{vm}-slow", pair.machine("h2")
    words = ("-c", "h1", "migrate", name, "--to", "h2", "--copy-storage", "full")
    pair.vmctl("-c", "h1", "create", name, "--image", "micro", "--memory", "128M", "--network", "lan", "--no-start")
    try:
        told = pair.vmctl(*words, "--transient", check=11).stderr
        assert f"{name} is stopped: with --transient its target would have nothing of it" in told
        assert pair.where(name) == {"h1": "shut off"} and not of(name, pair.files("h2"))
        told = pair.vmctl(*words, "--check", "--timeout", "5", "--downtime", "7").stdout
        assert f"note     {name}: {name} is stopped, and has no memory to send: nothing is done for --downtime," in told
        (moved,) = pair.json(*words, "--bandwidth", "4M")
        sizes = second.run("stat", "-c", "%s", *moved["copied"]).stdout.split()
        assert moved["time_s"] > 0.9 * sum(map(int, sizes)) / (4 << 20)
    finally:
        for host in ("h1", "h2"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)


def test_recovery_the_wrong_way_round_ends_nothing_that_comes_or_was_used(pair: Pair, vm: str) -> None:
    """What was on its way here, from where it still ran, was taken for the rest of one that had gone there."""
    first, back = pair.machine("h1"), ("-c", "h2", "migrate", vm, "--to", "h1", "--recover")
    pair.bed.limit("20mbit")
    process = pair.begin(
        "-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay", "--keep-source", "--live"
    )
    until(lambda: "Outgoing" in first.virsh("domjobinfo", vm, check=False), "the migration sends")
    process.kill()
    process.communicate(timeout=60)
    told = pair.vmctl(*back, check=12).stderr
    assert f"cannot recover VM {vm}: it is on its way from h1 to h2" in told
    assert f"vmctl -c h1 migrate {vm} --to h2 --recover" in told
    for verb in "start", "stop":
        told = pair.vmctl("-c", "h2", verb, vm, check=6).stderr
        assert f"cannot {verb} VM {vm}: it is paused (migration)" in told
        assert f"vmctl -c SOURCE migrate {vm} --to TARGET --recover asks both" in told and "resume" not in told
    pair.bed.limit(None)
    until(lambda: pair.where(vm) == {"h1": "shut off", "h2": "running"}, "libvirt has moved it")

    first.virsh("start", vm)  # what stayed, beside it
    first.virsh("suspend", vm)
    told = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--recover", check=12).stderr
    assert f"cannot end VM {vm} on h1, as one that has moved to h2: it is paused (asked), as no" in told
    assert f"vmctl -c h1 stop {vm} --force" in told
    assert pair.where(vm) == {"h1": "paused", "h2": "running"}
    pair.vmctl("-c", "h1", "stop", vm, "--force")
    pair.vmctl("-c", "h1", "delete", vm, "--yes")


def test_recovery_keeps_what_it_wrote_where_it_went(pair: Pair, vm: str) -> None:
    """vmctl was killed, and libvirt went on: the copies have marks yet, and by now are newer than what stayed here."""
    pair.bed.limit("20mbit")
    process = pair.begin("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay", "--keep-source")
    until(lambda: "Outgoing" in pair.machine("h1").virsh("domjobinfo", vm, check=False), "the migration sends")
    process.kill()
    process.communicate(timeout=60)
    pair.bed.limit(None)
    until(lambda: pair.where(vm) == {"h1": "shut off", "h2": "running"}, "libvirt has moved it")
    digest = written(pair, "h2", vm)
    pair.vmctl("-c", "h2", "stop", vm, "--force")
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--recover")
    assert pair.where(vm) == {"h2": "shut off"} and not of(vm, pair.files("h1"))
    pair.vmctl("-c", "h2", "start", vm)
    pair.vmctl("-c", "h2", "wait", vm, "--for", "agent")
    assert read(pair, "h2", vm) == digest


@pytest.mark.parametrize("way", ["overlay", "full"])
def test_a_disk_in_a_folder_that_is_no_pool(pair: Pair, vm: str, way: str) -> None:
    first, second = pair.machine("h1"), pair.machine("h2")
    for machine in (first, second):
        machine.run("mkdir", "-p", "/var/lib/libvirt/loose")
    first.run("qemu-img", "create", "-q", "-f", "qcow2", "/var/lib/libvirt/loose/base.qcow2", "16M")
    base = ("-b", "/var/lib/libvirt/loose/base.qcow2", "-F", "qcow2")
    first.run("qemu-img", "create", "-q", "-f", "qcow2", *base, "/var/lib/libvirt/loose/top.qcow2")
    disk = ("/var/lib/libvirt/loose/top.qcow2", "vdz", "--driver", "qemu", "--subdriver", "qcow2")
    first.virsh("attach-disk", vm, *disk, "--persistent", "--live")
    script = "d=/dev/$(ls -t /sys/block | grep ^vd | sort | tail -n 1); "
    keep = script + "head -c 3000000 /dev/urandom | dd of=$d conv=fsync 2>/dev/null; head -c 3000000 $d | md5sum"
    digest = pair.vmctl("-c", "h1", "exec", "--via", "agent", vm, "--", "sh", "-c", keep).stdout
    try:
        pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", way)
        again = script + "echo 3 >/proc/sys/vm/drop_caches; head -c 3000000 $d | md5sum"
        assert pair.vmctl("-c", "h2", "exec", "--via", "agent", vm, "--", "sh", "-c", again).stdout == digest
        assert not [pool for pool in first.virsh("pool-list", "--all", "--name").split() if "look" in pool]
    finally:
        where = "h2" if pair.where(vm).get("h2") else "h1"
        pair.machine(where).virsh("detach-disk", vm, "vdz", "--persistent", "--live")
        for machine in (first, second):
            machine.run("rm", "-rf", "/var/lib/libvirt/loose")


@pytest.mark.parametrize("way", ["overlay", "full"])
def test_a_disk_that_it_gets_at_its_next_start(pair: Pair, vm: str, way: str) -> None:
    """Its definition names it and its QEMU does not have it: libvirt sends nothing of it."""
    first, second = pair.machine("h1"), pair.machine("h2")
    folder = "/var/lib/libvirt/vmctl/vmctl"
    base, top = f"{folder}/{vm}-later-base.qcow2", f"{folder}/{vm}-later.qcow2"
    first.run("qemu-img", "create", "-q", "-f", "qcow2", base, "16M")
    first.run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 1M", base)
    first.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    first.run("qemu-io", "-f", "qcow2", "-c", "write -q -P 8 1M 1M", top)
    first.virsh("attach-disk", vm, top, "vdz", "--driver", "qemu", "--subdriver", "qcow2", "--config")
    try:
        pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", way)
        second.run("qemu-io", "-r", "-f", "qcow2", "-c", "read -q -P 7 0 1M", "-c", "read -q -P 8 1M 1M", top)
        assert "vdz" in second.virsh("domblklist", vm, "--inactive")
        assert first.run("test", "-e", top, check=False).returncode, "and is gone from where it was"
        second.virsh("detach-disk", vm, "vdz", "--config")
    finally:
        if pair.where(vm).get("h1"):
            first.virsh("detach-disk", vm, "vdz", "--config")
        for machine in (first, second):
            machine.run("rm", "-f", base, top)


@pytest.fixture
def network(pair: Pair) -> Iterator[None]:
    """The second host has the network that VMs of the machine itself are in."""
    second, text = pair.machine("h2"), pair.shell.virsh("net-dumpxml", "vmctl")
    second.run("sh", "-c", "cat >/tmp/n.xml; virsh net-create /tmp/n.xml", input=text)
    yield
    second.virsh("net-destroy", "vmctl")


def test_a_disk_in_a_pool_that_the_target_lacks(pair: Pair, vm: str, name: str, network: None) -> None:
    """A VM's own disks are known by pool and name: without the pool, nobody could delete them there, nor the VM."""
    second, other = pair.machine("h2"), "/var/lib/libvirt/other"
    pair.vmctl("disk", "pool", "create", "other", "--path", other)
    words = ("migrate", name, "--to", "h2", "--copy-storage", "overlay")
    try:
        pair.vmctl("create", name, "--image", "micro", "--no-start")
        pair.vmctl("disk", "attach", name, "16M")
        pair.vmctl("disk", "move", f"{name}:vdc", "--pool", "other")
        said = pair.vmctl(*words, check=11).stderr
        assert f"disks of its own in storage pool other ({other}), and h2 has no such pool" in said
        assert f"mend: vmctl -c h2 disk pool create other --path {other}" in said and "mkdir" not in said
        pair.vmctl("-c", "h2", "disk", "pool", "create", "other", "--path", other)
        (file,) = Path(other).iterdir()
        file.rename("/var/lib/libvirt/away")
        assert f"{file}) is not there on " in pair.vmctl(*words, check=11).stderr
        Path("/var/lib/libvirt/away").rename(file)
        pair.vmctl(*words)
        assert not list(Path(other).iterdir())
        second.virsh("pool-destroy", "other")
        assert "no storage pool other runs here" in pair.vmctl("-c", "h2", "delete", name, "--yes").stderr
        assert pair.where(name) == {} and second.run("ls", other).stdout == f"{file.name}\n"
    finally:
        pair.vmctl("delete", name, "--yes", "--missing-ok", check=None)
        pair.shell.virsh("pool-destroy", "other")
        pair.shell.virsh("pool-undefine", "other")
        second.virsh("pool-destroy", "other", check=False)
        second.virsh("pool-undefine", "other", check=False)
        second.run("rm", "-rf", other)


def test_clones_that_leave_one_after_the_other_leave_nothing(pair: Pair, vm: str, name: str, network: None) -> None:
    """What they share goes with the last of them, and is for no other eyes on the target than it was here."""
    pair.vmctl("create", name, "--image", "micro", "--memory", "128M", "--wait", "agent")
    pair.vmctl("stop", name, "--force")
    pair.vmctl("clone", name, f"{name}-twin")
    here = Path("/var/lib/libvirt/vmctl/vmctl")
    (log,) = here.glob(f"{name}-????????-console.log")
    log.with_name(f"{log.name}.0").write_text("what the log daemon puts aside\n")
    (base,) = here.glob(f"{name}-????????.qcow2")
    second, words = pair.machine("h2"), ("--to", "h2", "--copy-storage", "overlay")
    try:
        pair.vmctl("migrate", name, *words)
        assert base.exists(), "its twin needs it"
        assert not log.with_name(f"{log.name}.0").exists()
        pair.vmctl("migrate", f"{name}-twin", *words)
        assert not list(here.glob(f"{name}-*"))
        mode = second.run("stat", "-c", "%a", str(base)).stdout
        assert mode == "600\n", "it holds what a VM had written"
        for one in (name, f"{name}-twin"):
            pair.vmctl("-c", "h2", "start", one)
    finally:
        for one in (name, f"{name}-twin"):
            pair.vmctl("-c", "h2", "delete", one, "--yes", "--missing-ok", check=None)
            pair.vmctl("delete", one, "--yes", "--missing-ok", check=None)
    assert not of(name, pair.files("h2"))


def test_layers_go_when_a_whole_move_was_cut_off_at_its_end(pair: Pair, vm: str, name: str, network: None) -> None:
    """vmctl was killed when its VM had arrived, with disks of one file each: nothing there tells what lies below."""
    clones = [f"{name}-twin", f"{name}-third"]
    here = Path("/var/lib/libvirt/vmctl/vmctl")

    def left() -> list[str]:
        return sorted(path.name for path in here.glob(f"{name}-*"))

    try:
        pair.vmctl("create", name, "--image", "micro", "--memory", "128M", "--wait", "agent")
        pair.vmctl("stop", name, "--force")
        for one in clones:
            pair.vmctl("clone", name, one)
        (shared,) = here.glob(f"{name}-????????.qcow2")
        pair.vmctl("delete", name, "--yes")
        assert shared.exists(), "its clones need it"
        for one in clones:
            pair.vmctl("start", one, "--wait", "agent")
            words = ("migrate", one, "--to", "h2")
            pair.vmctl(*words, "--copy-storage", "full", "--direct", "--keep-source")
            pair.shell.virsh("undefine", one)
            said = pair.vmctl(*words, check=4).stderr
            assert f"vmctl -c qemu:///system migrate {one} --to h2 --recover" in said, "what a plain second run names"
            pair.vmctl(*words, "--recover")
            pair.vmctl("-c", "h2", "exec", "--via", "agent", one, "true")
            if one is clones[0]:
                assert shared.name in left() and not [leaf for leaf in left() if "-twin-" in leaf]
        assert left() == [], "it was the last of them"
    finally:
        for one in (name, *clones):
            pair.vmctl("-c", "h2", "delete", one, "--yes", "--missing-ok", check=None)
            pair.vmctl("delete", one, "--yes", "--missing-ok", check=None)
    assert not of(name, pair.files("h2"))


def test_stopped(pair: Pair, vm: str) -> None:
    digest = written(pair, "h1", vm)
    pair.vmctl("-c", "h1", "stop", vm, "--force")
    files = of(vm, pair.files("h1"))
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay")
    assert pair.where(vm) == {"h2": "shut off"} and of(vm, pair.files("h1")) == set()
    assert files - of(vm, pair.files("h2")) <= {name for name in files if name.endswith("console.log")}
    pair.vmctl("-c", "h2", "start", vm)
    pair.vmctl("-c", "h2", "wait", vm, "--for", "agent")
    assert read(pair, "h2", vm) == digest


def test_a_stopped_one_cut_off_at_its_end(pair: Pair, vm: str, two: tuple[str, str]) -> None:
    """vmctl was killed when only the target had its definition: the marks stand there, and the files here."""
    first, second, name = pair.machine("h1"), pair.machine("h2"), two[0]
    before = of(name, pair.files("h1"))
    words = ("-c", "h1", "migrate", name, "--to", "h2")
    pair.vmctl(*words, "--copy-storage", "overlay", "--keep-source")
    first.virsh("undefine", name)
    for file in of(name, pair.files("h2")):
        second.run("touch", f"/var/lib/libvirt/vmctl/vmctl/{file}.migrating")
    assert f"a move of {name} to h2 was begun before: its end is seen to first" in pair.vmctl(*words, "--check").stdout
    assert of(name, pair.files("h1")) == before, "it has only looked"
    assert f"{name}: a move from h1 to h2 was begun before: seeing to its end" in pair.vmctl(*words).stderr
    assert of(name, pair.files("h1")) == set() and pair.where(name) == {"h2": "shut off"}
    assert before - of(name, pair.files("h2")) <= {file for file in before if file.endswith("console.log")}
    assert not [file for file in pair.files("h2") if "migrating" in file]
    said = pair.vmctl(*words)
    assert said.stdout == f"{name}: on h2 already\n"
    assert f"{name} is on h2 already, stopped, and h1 has nothing of it" in said.stderr
    assert [one["mode"] for one in pair.json(*words)] == ["already"]
    assert f"{name} is on h2 already" in pair.vmctl(*words, "--check").stdout


def test_the_same_again_keeps_what_was_asked_to_stay(pair: Pair, vm: str) -> None:
    """Nor is a definition given up that no move left, or one that may have been sent elsewhere."""
    words = ("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay")
    pair.vmctl(*words, "--keep-source")
    files = of(vm, pair.files("h1"))
    said = pair.vmctl(*words, check=11).stderr
    assert "h2 has a VM of the same UUID already" in said, "this time it was not asked to stay"
    said = pair.vmctl(*words, "--keep-source")
    assert said.stdout == f"{vm}: on h2 already\n"
    assert f"{vm} is on h2 already, running, and what was to stay of it is on h1" in said.stderr
    assert pair.where(vm) == {"h1": "shut off", "h2": "running"} and of(vm, pair.files("h1")) == files
    first = pair.machine("h1")
    first.virsh("undefine", vm)
    said = pair.vmctl(*words, check=4).stderr
    assert f"vmctl -c h1 migrate {vm} --to h2 --recover" in said, "no mark says that its files there are of that move"
    assert of(vm, pair.files("h1")) == files
    pair.vmctl(*words, "--recover")
    assert not of(vm, pair.files("h1"))
    assert pair.vmctl(*words).stdout == f"{vm}: on h2 already\n"


def test_stopped_with_uefi_variables_and_a_tpm(pair: Pair) -> None:
    """What the firmware has written goes along; what the TPM keeps cannot, and is not left behind unsaid."""
    first, second = pair.machine("h1"), pair.machine("h2")
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    for name, devices in (("m-tpm", tpm), ("m-uefi", "")):
        xml = f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>
            <os firmware='efi'><type machine='q35'>hvm</type></os><features><acpi/></features>
            <devices>{devices}</devices></domain>"""
        first.run("sh", "-c", "cat >/tmp/d.xml; virsh define /tmp/d.xml", input=xml)
        first.virsh("start", name)
        first.virsh("destroy", name)
    try:
        words = ("--to", "h2", "--copy-storage", "overlay")
        said = pair.vmctl("-c", "h1", "migrate", "m-tpm", *words, check=11).stderr
        assert "the state of m-tpm's TPM lies on h1" in said and "migrate it live" in said
        path = "/var/lib/libvirt/qemu/nvram/m-uefi_VARS.fd"  # which its definition does not name
        digest = first.run("sha256sum", path).stdout
        pair.vmctl("-c", "h1", "migrate", "m-uefi", *words)
        assert second.run("sha256sum", path).stdout == digest
        assert first.run("test", "-e", path, check=False).returncode, "and is gone from where it was"
        assert pair.where("m-uefi") == {"h2": "shut off"}
        second.virsh("start", "m-uefi")
        pair.vmctl("-c", "h2", "migrate", "m-uefi", "--to", "h1", "--copy-storage", "overlay")
        assert pair.where("m-uefi") == {"h1": "running"}
        assert second.run("test", "-e", path, check=False).returncode, "as it is after a live one"
    finally:
        for machine in (first, second):
            for name in ("m-tpm", "m-uefi"):
                machine.virsh("destroy", name, check=False)
                machine.virsh("undefine", name, "--nvram", check=False)


def test_no_room_and_something_in_the_way(pair: Pair, vm: str) -> None:
    second = pair.machine("h2")
    top = pair.machine("h1").virsh("domblklist", vm).splitlines()[0].split()[1]
    second.run("sh", "-c", f"mkdir -p {top.rpartition('/')[0]}; echo mine >{top}")
    words = ("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "full")
    checked = pair.vmctl(*words, "--check", check=11)
    said = checked.stdout
    assert "where another file is" in said and checked.stderr == "cannot migrate to h2: 1 problem\n"
    assert second.run("cat", top).stdout == "mine\n", "what is not ours stays"
    (mend,) = (line for line in said.splitlines() if "mend: on it, once you know whose it is: " in line)
    second.run("sh", "-c", mend.rpartition(": ")[2])
    assert second.run("cat", f"{top}.aside").stdout == "mine\n"
    second.run("rm", f"{top}.aside")
    second.resize_disk("150M")
    try:
        assert "MiB free, and" in pair.vmctl(*words, check=11).stderr
        assert of(vm, pair.files("h2")) == set()
    finally:
        second.resize_disk("2G")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_cut_off_it_stays_and_the_target_is_clean(pair: Pair, vm: str, number: signal.Signals) -> None:
    digest = written(pair, "h1", vm)
    before = of(vm, pair.files("h1"))
    pair.bed.limit("20mbit")
    process = pair.begin("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay", "--direct")

    def begun() -> bool:
        return "Outgoing migration" in pair.machine("h1").virsh("domjobinfo", vm, check=False)

    until(begun, "the migration sends")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    pair.bed.limit(None)
    if number is signal.SIGINT:
        assert process.returncode == 130 and f"{vm} runs on h1 as before" in said, said
        assert of(vm, pair.files("h2")) == set()
    until(lambda: pair.where(vm) == {"h1": "running"}, "it runs where it was")
    assert of(vm, pair.files("h1")) == before and read(pair, "h1", vm) == digest
    # A plain second run copes with whatever a kill left.
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay")
    assert read(pair, "h2", vm) == digest
    assert not [name for name in pair.files("h2") if name.endswith(".migrating")]


@pytest.fixture(params=["by name", "by URI"])
def ends(request: pytest.FixtureRequest, pair: Pair, tmp_path: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """What to call the two hosts, and the environment for it: as those of the config file, or as ones it has not."""
    if request.param == "by name":
        yield [machine.name for machine in pair.bed.machines], pair.env
        return
    known = Path.home() / ".ssh/known_hosts"
    known.parent.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(pair.bed.known_hosts, known)
    yield [machine.ssh_uri for machine in pair.bed.machines], {**pair.env, "XDG_CONFIG_HOME": str(tmp_path)}
    known.unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_with_all_that_it_started(
    pair: Pair, vm: str, ends: tuple[list[str], dict[str, str]], number: signal.Signals
) -> None:
    """As by Ctrl-C at a terminal, or by timeout: the clients of SSH, by which it takes things back, are sent it too."""
    pair.bed.limit("100mbit")
    (here, there), env = ends
    words = ("-c", here, "migrate", vm, "--to", there, "--copy-storage", "overlay", "--direct")
    process = pair.begin(*words, env=env, start_new_session=True)

    def begun() -> bool:
        return "Outgoing migration" in pair.machine("h1").virsh("domjobinfo", vm, check=False)

    until(begun, "the migration sends")
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    pair.bed.limit(None)
    assert process.returncode == 130 and "as before" in said, said
    assert of(vm, pair.files("h2")) == set()


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_while_the_target_prepares(pair: Pair, vm: str, times: int) -> None:
    """libvirt forgets what it is told then, and begins a QEMU there, whose disks must not be taken from it."""
    first, second = pair.machine("h1"), pair.machine("h2")
    install(second)
    second.kill("libvirtd")
    second.start("libvirtd")
    before = of(vm, pair.files("h1"))
    hold = Hold(Phase.PREPARE, first, second, vm)
    process = pair.begin("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay")
    try:
        assert hold.enter(lambda: process.poll() is not None, 0)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            pause(1)
        pause(3)  # longer than a look at both takes
        assert before <= of(vm, pair.files("h2"))
    finally:
        hold.release()
    _, said = process.communicate(timeout=90)
    assert process.returncode == 130, said
    if f"{vm} runs on h1 as before" in said:
        assert pair.where(vm) == {"h1": "running"} and of(vm, pair.files("h2")) == set(), said
    else:
        assert times > 1 and "no file of it was deleted" in said, said
        pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--recover", "--copy-storage", "overlay")


def test_interrupted_while_both_are_asked_where_it_is(pair: Pair, vm: str) -> None:
    """It runs on h2 already, which does not answer just then: its disks there are the only ones that it writes to."""
    first, second = pair.machine("h1"), pair.machine("h2")
    install(first)
    first.kill("libvirtd")
    first.start("libvirtd")
    before = of(vm, pair.files("h1"))
    hold = Hold(Phase.CONFIRM, first, second, vm)
    process = pair.begin("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay")
    assert hold.enter(lambda: process.poll() is not None, 0)
    second.kill("libvirtd", signal.SIGSTOP)
    try:
        hold.release()
        for _ in range(4):  # while it is sent, while that is ended, and while both are asked
            pause(1)
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        pause(1)  # whatever it does next, it asks h2
    finally:
        second.kill("libvirtd", signal.SIGCONT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "no file of it was deleted" in said and "--recover" in said, said
    until(lambda: pair.where(vm) == {"h2": "running"}, "the source has come to an end with it")
    assert before <= of(vm, pair.files("h2")) and of(vm, pair.files("h1")) == before

    # What is there no more, for whatever reason, is not deleted here, where it is all that is left.
    (top,) = [name for name in before if name.endswith(".qcow2")]
    second.run("mv", f"/var/lib/libvirt/vmctl/vmctl/{top}", "/var/lib/libvirt/vmctl/away")
    said = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--recover").stderr
    assert f"{top} on h1: h2 has no such file" in said and of(vm, pair.files("h1")) == {top}
    second.run("mv", "/var/lib/libvirt/vmctl/away", f"/var/lib/libvirt/vmctl/vmctl/{top}")
    pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--recover")
    assert of(vm, pair.files("h1")) == set()
    assert before <= of(vm, pair.files("h2")) and not [name for name in pair.files("h2") if "migrating" in name]


def test_one_that_a_migration_has_paused_is_not_resumed_beside(pair: Pair, vm: str) -> None:
    """The source's libvirtd died once the target had been told to run it, and vmctl did: nobody ends it here."""
    first, second = pair.machine("h1"), pair.machine("h2")
    hold = Hold(Phase.FINISH, first, second, vm)
    process = pair.begin("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay")
    try:
        assert hold.enter(lambda: process.poll() is not None, 0)
        first.kill("libvirtd")
        process.kill()
        process.communicate(timeout=60)
    finally:
        hold.release()
        first.start("libvirtd")
    until(lambda: pair.where(vm) == {"h1": "paused", "h2": "running"}, "it runs there, and is paused here")
    told = pair.vmctl("-c", "h1", "resume", vm, check=5).stderr
    assert f"cannot resume VM {vm}: a migration has paused it, and h2 has it too" in told and "--recover" in told
    pair.vmctl("host", "add", "third", "qemu:///system")
    try:
        told = pair.vmctl("-c", "h1", "migrate", vm, "--to", "third", "--recover", check=12).stderr
        assert f"cannot recover VM {vm}: it is running on h2, and not to come to third" in told
        assert f"hint: vmctl -c h1 migrate {vm} --to h2 --recover" in told
        told = pair.vmctl("-c", "h1", "migrate", vm, "--to", "third", check=11).stderr
        assert f"{vm} is paused (migration)" in told and "where it was to go" in told
    finally:
        pair.vmctl("host", "remove", "third")
    assert pair.where(vm) == {"h1": "paused", "h2": "running"}
    said = pair.vmctl("-c", "h1", "migrate", vm, "--to", "h2", "--copy-storage", "overlay").stderr  # the same again
    assert f"{vm}: a move from h1 to h2 was begun before: seeing to its end" in said
    assert pair.where(vm) == {"h2": "running"} and not of(vm, pair.files("h1"))


@pytest.fixture
def two(pair: Pair) -> Iterator[tuple[str, str]]:
    """Two stopped VMs of one image."""
    names = ("m-one", "m-two")
    for name in names:
        pair.vmctl("-c", "h1", "create", name, "--image", "micro", "--memory", "128M", "--network", "lan", "--no-start")
    yield names
    for name in names:
        for host in ("h1", "h2"):
            pair.vmctl("-c", host, "delete", name, "--yes", "--missing-ok", check=None)


def test_two_of_one_image_at_once(pair: Pair, vm: str, two: tuple[str, str]) -> None:
    """Both find that its files are not there; one makes them, the other waits."""
    second = pair.machine("h2")
    second.run("sh", "-c", "rm -f /var/lib/libvirt/vmctl/vmctl-images/*; virsh pool-refresh vmctl-images || :")
    pair.bed.limit("100mbit")
    words = ("--to", "h2", "--copy-storage", "overlay")
    running = [pair.begin("-c", "h1", "migrate", name, *words) for name in two]
    until(lambda: any(".kernel" in path.name for path in second.images.iterdir()), "both have the base image")
    for one in running:
        one.send_signal(signal.SIGINT)
        one.communicate(timeout=60)
    assert [one.returncode for one in running] == [130, 130]
    assert not [*second.images.iterdir()] and pair.files("h2") == set(), "the last one takes away what they share"

    running = [pair.begin("-c", "h1", "migrate", name, *words) for name in two]
    said = [one.communicate(timeout=120) for one in running]
    assert [one.returncode for one in running] == [0, 0], said
    assert "waiting for another move" in said[0][1] + said[1][1]
    for name in two:
        assert pair.where(name) == {"h2": "shut off"}
        (top,) = [file for file in of(name, pair.files("h2")) if file.endswith(".qcow2")]
        second.run("qemu-img", "check", "-q", f"/var/lib/libvirt/vmctl/vmctl/{top}")


def test_a_base_that_others_have_stays(pair: Pair, vm: str, two: tuple[str, str]) -> None:
    """A move whose vmctl was killed, and that went on without, leaves its mark at files that the VM needs there."""
    second, name = pair.machine("h2"), two[0]
    pair.vmctl("-c", "h1", "migrate", two[1], "--to", "h2", "--copy-storage", "overlay")
    (base,) = second.images.glob("micro-*.qcow2")
    was = base.stat().st_ino

    def marked() -> None:
        base.with_name(f"{base.name}.migrating").write_text("")
        second.virsh("pool-refresh", "vmctl-images")

    marked()
    pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--copy-storage", "overlay")
    assert base.stat().st_ino == was and not base.with_name(f"{base.name}.migrating").exists()
    pair.vmctl("-c", "h2", "migrate", name, "--to", "h1", "--copy-storage", "overlay")
    marked()
    pair.vmctl("-c", "h1", "migrate", name, "--to", "h2", "--copy-storage", "overlay", "--recover")
    assert base.stat().st_ino == was and not base.with_name(f"{base.name}.migrating").exists()


def test_its_console_log_goes_along(pair: Pair) -> None:
    """It tells what the guest has printed, and that its first boot is over, which a fork waits for."""
    with guest(pair) as name:
        for stopped in (False, True):
            if stopped:
                pair.vmctl("-c", "h2", "stop", name, "--force")
            here, there = ("h2", "h1") if stopped else ("h1", "h2")
            before = pair.vmctl("-c", here, "logs", name, "-n", "1000").stdout
            assert "seed done" in before
            pair.vmctl("-c", here, "migrate", name, "--to", there, "--copy-storage", "overlay")
            assert pair.vmctl("-c", there, "logs", name, "-n", "1000").stdout == before
            assert not [file for file in pair.files(there) if file.endswith(".migrating")]
            assert not of(name, pair.files(here))
        told = pair.vmctl("-c", "h1", "start", name).stderr
        assert f"{name} no longer needs its seed" in told
