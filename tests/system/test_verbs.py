"""Every verb on a real guest, and virsh's view of the same VM."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.conftest import REPO, VMCTL, Shell, environment, reservations, volumes
from vmctl.wait import wait_until

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def vm() -> Iterator[str]:
    """One guest for the tests that leave it running."""
    shell = Shell()
    chosen = f"shared-{os.getpid()}"
    shell.run(
        "create",
        chosen,
        "--image",
        "micro",
        "--description",
        'a <shared> & "quoted" guest',
        "--label",
        "role=test",
        "--wait",
        "ssh",
    )
    yield chosen
    shell.run("delete", chosen, "--yes")


def test_create_shows_stages_and_says_why_not_kvm(shell: Shell, name: str) -> None:
    done = shell.run("create", name, "--image", "micro", "--memory", "256M", "--vcpus", "2", "--wait", "ssh")
    for stage in ("running", "ip", "ssh"):
        assert re.search(rf"^  {stage} +[0-9.]+ s", done.stderr, re.MULTILINE), done.stderr
    chosen = shell.json("host", "info")["accel"]["chosen"]
    assert ("running on TCG: " in done.stderr) == (chosen == "tcg")
    assert done.stdout == f"{name}\n"
    facts = ET.fromstring(shell.virsh("dumpxml", name))
    assert facts.findtext("vcpu") == "2" and facts.findtext("memory") == str(256 * 1024)
    assert facts.get("type") == {"tcg": "qemu", "kvm": "kvm"}[chosen]


def test_the_guest_is_what_the_seed_says(shell: Shell, vm: str) -> None:
    assert shell.run("exec", vm, "--", "hostname").stdout == f"{vm}\n"


def test_exec_passes_everything_through(shell: Shell, vm: str) -> None:
    data = bytes(range(256)) * 2000
    done = subprocess.run(
        [*VMCTL, "exec", vm, "--", "sh", "-c", "cat; echo to-stderr >&2; exit 37"],
        input=data,
        capture_output=True,
        timeout=60,
        cwd=REPO,
    )
    assert done.returncode == 37
    assert done.stdout == data
    assert done.stderr == b"to-stderr\n"


def test_exec_keeps_words_apart(shell: Shell, vm: str) -> None:
    assert (
        shell.run("exec", vm, "--", "printf", "[%s]", "a b", "$HOME", "'", "*", "-n").stdout == "[a b][$HOME]['][*][-n]"
    )


def test_exec_takes_words_that_are_no_text(shell: Shell, vm: str) -> None:
    """A file's name need not be UTF-8."""
    count = 'printf %s "$1" | od -An -tx1'
    assert shell.run("exec", vm, "--", "sh", "-c", count, "sh", os.fsdecode(b"\xff")).stdout == " ff\n"


def test_exec_without_a_reader_does_not_hang(shell: Shell, vm: str) -> None:
    done = shell.run("exec", vm, "--", "true", stdin=subprocess.PIPE, timeout=30)
    assert done.stdout == ""


def test_exec_with_a_terminal(vm: str) -> None:
    assert (
        "/dev/pts/"
        in Shell().run("exec", "-t", vm, "--", "sh", "-c", "test -t 0 && tty", stdin=subprocess.DEVNULL).stdout
    )


def test_cp_both_ways(shell: Shell, vm: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub dir").mkdir(parents=True)
    (tree / "sub dir" / "blob").write_bytes(os.urandom(300_000))
    (tree / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (tree / "run.sh").chmod(0o755)
    shell.run("cp", str(tree), f"{vm}:/root/")
    assert shell.run("exec", vm, "--", "/root/tree/run.sh").stdout == "ran\n"
    shell.run("cp", f"{vm}:/root/tree", str(tmp_path / "back"))
    assert (tmp_path / "back" / "sub dir" / "blob").read_bytes() == (tree / "sub dir" / "blob").read_bytes()
    assert os.access(tmp_path / "back" / "run.sh", os.X_OK)
    shell.run("cp", f"{vm}:/no/such", str(tmp_path), check=4)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    shell.run("cp", str(tmp_path / "nope"), f"{vm}:/", check=4)
    shell.run("cp", str(tree), str(tmp_path / "x"), check=2)


def test_cp_edges(shell: Shell, vm: str, tmp_path: Path) -> None:
    tree = tmp_path / "t r$e'e"
    (tree / ("long" * 40) / ("name" * 40)).mkdir(parents=True)
    deep = tree / ("long" * 40) / ("name" * 40) / "-f ile\nx"
    deep.write_bytes(b"deep")
    (tree / "empty").touch()
    (tree / "link").symlink_to("empty")
    (tree / "none").mkdir(mode=0o700)
    shell.run("cp", str(tree), f"{vm}:/root/edges")  # no folder there: the copy gets that name
    shell.run("cp", str(tree), f"{vm}:/root/edges/")  # a folder there: the copy goes into it
    (tree / "empty").write_text("second")
    shell.run("cp", str(tree), f"{vm}:/root/edges/")  # and again: merged
    back = tmp_path / "back"
    shell.run("cp", f"{vm}:/root/edges", str(back))
    inner = back / tree.name
    assert (inner / deep.relative_to(tree)).read_bytes() == b"deep" == (back / deep.relative_to(tree)).read_bytes()
    assert (inner / "empty").read_text() == "second" and (back / "empty").read_text() == ""
    assert (back / "none").stat().st_mode & 0o777 == 0o700 and not (back / "link").is_symlink()
    assert ".vmctl-" not in shell.run("exec", vm, "--", "ls", "-a", "/root", "/root/edges").stdout
    shell.run("exec", vm, "--", "sh", "-c", "mkdir -p /root/h && echo h >/root/h/a && ln /root/h/a /root/h/b")
    shell.run("cp", f"{vm}:/root/h/.", str(tmp_path / "hard"))
    assert (tmp_path / "hard" / "a").read_text() == (tmp_path / "hard" / "b").read_text() == "h\n"
    (tree / "loop").symlink_to(tree)
    assert "leads back to itself" in shell.run("cp", str(tree), f"{vm}:/root/looped", check=2).stderr
    shell.run("cp", str(tree / "empty"), f"{vm}:/no/such/folder/x", check=4)


def test_cp_of_what_does_not_tell_its_size(shell: Shell, vm: str, tmp_path: Path) -> None:
    """The kernel's own files are empty or 4096 bytes by their size; a pipe and a device are no files at all."""
    assert Path("/proc/version").stat().st_size == 0 < len(Path("/proc/version").read_bytes())
    shell.run("cp", "/proc/version", f"{vm}:/root/lone")
    shell.run("cp", "/proc/version", "/proc/filesystems", f"{vm}:/root/")
    for name, origin in (("lone", "version"), ("version", "version"), ("filesystems", "filesystems")):
        assert shell.run("exec", vm, "--", "cat", f"/root/{name}").stdout == Path("/proc", origin).read_text()
    shell.run("cp", f"{vm}:/proc/version", f"{vm}:/sys/kernel/profiling", str(tmp_path))
    assert (tmp_path / "version").read_text() == shell.run("exec", vm, "--", "cat", "/proc/version").stdout
    told = shell.run("exec", vm, "--", "cat", "/sys/kernel/profiling").stdout
    assert (tmp_path / "profiling").read_text() == told
    assert shell.run("cp", f"{vm}:/proc/version", "/dev/stdout").stdout == (tmp_path / "version").read_text()
    ill = shell.run("cp", f"{vm}:/dev/null", str(tmp_path / "null"), check=9).stderr
    assert ill == f"cannot copy /dev/null from VM {vm}: it is neither file nor folder\n"
    (tmp_path / "link").symlink_to("nowhere")
    ill = shell.run("cp", str(tmp_path), f"{vm}:/root/links", check=2).stderr
    assert ill == f"cannot copy {tmp_path / 'link'}: its link leads nowhere\n"


def test_a_copy_cut_off_leaves_nothing_under_its_name(shell: Shell, vm: str, tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(4 << 30)
    running = subprocess.Popen(
        [*VMCTL, "cp", str(tmp_path / "big"), f"{vm}:/tmp/big"], cwd=REPO, stderr=subprocess.DEVNULL
    )
    arriving = "ls -d /tmp/.vmctl-* 2>/dev/null"
    wait_until(
        lambda: shell.run("exec", vm, "--", "sh", "-c", arriving, check=None).stdout,
        what="the copy's begin",
        timeout_s=30,
    )
    running.send_signal(signal.SIGINT)
    assert running.wait(30) == 130
    wait_until(
        lambda: not shell.run("exec", vm, "--", "sh", "-c", arriving, check=None).stdout,
        what="its remains to go",
        timeout_s=30,
    )
    shell.run("exec", vm, "--", "test", "!", "-e", "/tmp/big")


def test_cp_without_tar_in_the_guest_goes_by_sftp(shell: Shell, vm: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("by sftp\n")
    shell.run("exec", vm, "--", "mv", "/bin/tar", "/bin/tar.away")
    try:
        shell.run("cp", str(tmp_path / "f"), f"{vm}:/root/sftp")
        shell.run("cp", f"{vm}:/root/sftp", str(tmp_path / "g"))
        assert (tmp_path / "g").read_text() == "by sftp\n"
        shell.run("cp", f"{vm}:/no/such", str(tmp_path), check=4)
        # As cp does: into devices, and through links.
        shell.run("exec", vm, "--", "sh", "-c", "cd /root; mknod -m 640 null c 1 3; ln -s to from")
        subprocess.run(["mknod", str(tmp_path / "null"), "c", "1", "3"], check=True)
        (tmp_path / "link").symlink_to("g")
        for name in ("null", "from"):
            shell.run("cp", str(tmp_path / "f"), f"{vm}:/root/{name}")
        told = shell.run("exec", vm, "--", "sh", "-c", "cd /root; stat -c '%F %a' null; test -L from && cat to").stdout
        assert told == "character special file 640\nby sftp\n"
        (tmp_path / "g").write_text("old")
        for name in ("null", "link"):
            shell.run("cp", f"{vm}:/root/to", str(tmp_path / name))
        assert (tmp_path / "null").is_char_device() and (tmp_path / "link").is_symlink()
        assert (tmp_path / "g").read_text() == "by sftp\n"
    finally:
        shell.run("exec", vm, "--", "mv", "/bin/tar.away", "/bin/tar")


def test_ssh_trusts_only_the_planted_key(shell: Shell, vm: str) -> None:
    done = subprocess.run(
        [*VMCTL, "ssh", vm, "echo", "over ssh"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPO,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout == "over ssh\n", done.stderr
    text = shell.virsh("dumpxml", vm)
    (planted,) = re.findall(r'host-key="([^"]*)"', text)
    found = re.search(r"<vmctl:vm.*?</vmctl:vm>", text, re.DOTALL)
    assert found is not None
    # libvirt takes the element without its namespace and puts it in itself.
    original = re.sub(r' xmlns:vmctl="[^"]*"', "", found[0]).replace("vmctl:", "")
    changed = original.replace(planted, "ssh-ed25519 " + planted.split()[1][:-8] + "AAAAAAAA")
    uri = "https://vmctl.dev/xmlns/vm/1"
    shell.virsh("metadata", vm, uri, "--key", "vmctl", "--set", changed, "--live")
    try:
        refused = shell.run("exec", vm, "--", "true", check=3)
        assert "another host key" in refused.stderr
        assert subprocess.run([*VMCTL, "ssh", vm, "true"], capture_output=True, timeout=60, cwd=REPO).returncode == 255
    finally:
        shell.virsh("metadata", vm, uri, "--key", "vmctl", "--set", original, "--live")
    assert shell.run("exec", vm, "--", "echo", "ok").stdout == "ok\n"


def test_show_and_list(shell: Shell, vm: str) -> None:
    shown = shell.json("show", vm)
    assert shown["description"] == 'a <shared> & "quoted" guest'
    assert shown["labels"] == {"role": "test"} and shown["state"] == "running" and shown["image"] == "micro"
    assert shown["accel"]["chosen"] in {"kvm", "tcg"} and shown["accel"]["host"]["kvm"]["evidence"]
    assert shown["uuid"] == shell.virsh("domuuid", vm)
    (row,) = [row for row in shell.json("list") if row["name"] == vm]
    assert row["address"] == shown["address"] and re.fullmatch(r"10\.\d+\.\d+\.\d+", row["address"])
    assert row["uptime_s"] > 0 and row["state"] == "running"
    table = shell.run("list").stdout.splitlines()
    assert table[0].split() == ["NAME", "STATE", "ACCEL", "VCPUS", "MEMORY", "ADDRESS", "HOST", "IMAGE", "UPTIME"]
    assert vm in shell.run("list", "--label", "role=test", "-o", "name").stdout.split()
    assert vm not in shell.run("list", "--label", "role=other", "-o", "name").stdout.split()
    assert vm not in shell.run("list", "--state", "stopped", "-o", "name").stdout.split()
    assert f"name: {vm}" in shell.run("list", "-o", "yaml").stdout
    text = shell.run("show", vm).stdout
    assert 'description  a <shared> & "quoted" guest' in text


def test_logs(shell: Shell, vm: str) -> None:
    text = shell.run("logs", vm).stdout
    assert "vmctl-micro" in text and "\x1b" not in text
    assert len(shell.run("logs", vm, "-n", "2").stdout.splitlines()) == 2


def test_logs_are_followed_until_ctrl_c(shell: Shell, vm: str) -> None:
    words = [*VMCTL, "logs", vm, "-f", "-n", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=REPO, stdout=pipe, stderr=pipe, text=True) as running:
        assert running.stdout is not None and running.stdout.readline()
        shell.run("exec", vm, "--", "sh", "-c", "echo it goes on >/dev/console")
        while "it goes on" not in (line := running.stdout.readline()):
            assert line, "it ended"
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=20)[1]
    assert (running.returncode, said) == (0, "")


def test_a_wait_shows_on_a_terminal_that_it_goes_on(shell: Shell, vm: str) -> None:
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    words = [*VMCTL, "wait", vm, "--for", "stopped", "--timeout", "60"]
    with subprocess.Popen(words, cwd=REPO, stdin=side, stdout=side, stderr=side) as running:
        os.close(side)
        said = ""
        while len(set(re.findall(r"stopped +… +([0-9.]+) s so far", said))) < 3:
            assert running.poll() is None and select.select([main], [], [], 20)[0], said
            said += os.read(main, 4096).decode(errors="replace")
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 130
    os.close(main)


def test_pause_and_resume_seen_by_both(shell: Shell, vm: str) -> None:
    shell.run("pause", vm)
    assert shell.virsh("domstate", vm) == "paused"
    shell.run("exec", vm, "--", "true", check=6)
    assert "paused already" in shell.run("pause", vm).stdout
    shell.virsh("resume", vm)
    assert shell.json("show", vm)["state"] == "running"
    shell.virsh("suspend", vm)
    shell.run("resume", vm)
    assert shell.virsh("domstate", vm) == "running"


def test_agent(shell: Shell, vm: str) -> None:
    shell.run("wait", vm, "--for", "agent")
    assert json.loads(shell.virsh("qemu-agent-command", vm, '{"execute":"guest-ping"}')) == {"return": {}}


def test_a_private_key_is_nowhere_to_be_seen(shell: Shell, vm: str) -> None:
    assert "PRIVATE KEY" not in shell.virsh("dumpxml", vm, "--security-info")
    for path in [*Path("/var/log/libvirt").rglob("*"), *Path("/etc/libvirt/qemu").rglob("*.xml")]:
        if path.is_file():
            assert b"PRIVATE KEY" not in path.read_bytes(), path
    assert "PRIVATE KEY" not in subprocess.run(["ps", "axww"], capture_output=True, text=True).stdout
    seeds = [v for v in volumes(shell) if v.startswith(f"{vm}-") and v.endswith("seed.iso")]
    path = Path(shell.virsh("vol-path", "--pool", "vmctl", seeds[0]))
    assert b"PRIVATE KEY" in path.read_bytes() and path.stat().st_mode & 0o077 == 0


def test_stop_start_save_restore_reboot(shell: Shell, name: str) -> None:
    shell.guest(name)
    shell.run("exec", name, "--", "sh", "-c", "echo kept >/root/kept; echo in-memory >/tmp/memory; sync")
    address = shell.json("show", name)["address"]

    assert "running already" in shell.run("start", name).stdout
    assert "(ACPI)" in shell.run("stop", name).stdout
    assert shell.virsh("domstate", name) == "shut off"
    assert "stopped already" in shell.run("stop", name).stdout
    shell.run("pause", name, check=6)

    told = shell.run("start", name, "--wait", "ssh")
    assert told.stdout == f"{name}: booted; ssh at {address}\n" and f"{name}: ip" in told.stderr
    assert shell.run("exec", name, "--", "cat", "/root/kept").stdout == "kept\n"
    assert shell.json("show", name)["address"] == address

    shell.run("exec", name, "--", "sh", "-c", "echo in-memory >/run/memory")
    assert "saved" in shell.run("save", name).stdout
    assert shell.json("show", name)["state"] == "saved"
    assert "saved memory" in shell.run("start", name, "--wait", "ssh").stdout
    assert shell.run("exec", name, "--", "cat", "/run/memory").stdout == "in-memory\n"

    boot_id = ["exec", name, "--", "cat", "/proc/sys/kernel/random/boot_id"]
    for verb in ("reboot", "reset"):
        boot = shell.run(*boot_id).stdout
        shell.run(verb, name)
        shell.run("wait", name, "--for", "ssh")  # no system but the new one answers
        assert shell.run(*boot_id).stdout != boot


def test_stop_by_force_and_without(shell: Shell, name: str, tmp_path: Path) -> None:
    """A machine with nothing to boot: it hears neither the button nor an agent."""
    xml = tmp_path / "d.xml"
    xml.write_text(
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><os><type>hvm</type></os>"
        "<features><acpi/></features></domain>"
    )
    shell.virsh("define", str(xml))
    shell.run("start", name)
    done = shell.run("stop", name, "--timeout", "1", check=7)
    assert "--force" in done.stderr
    assert shell.virsh("domstate", name) == "running"
    assert "by force" in shell.run("stop", name, "--timeout", "1", "--force").stdout
    assert shell.virsh("domstate", name) == "shut off"


def test_rename(shell: Shell, name: str, names: Callable[[], str]) -> None:
    new = names()
    shell.run("create", name, "--image", "micro", "--no-start")
    ident = shell.virsh("domuuid", name)
    shell.run("rename", name, new)
    assert shell.virsh("domuuid", new) == ident
    # The old name is free, and the new VM of that name shares nothing with the renamed one.
    shell.run("create", name, "--image", "micro", "--no-start")
    assert shell.virsh("domuuid", name) != ident
    disks = [re.findall(r"source file='([^']*)'", shell.virsh("dumpxml", n)) for n in (name, new)]
    assert not set(disks[0]) & set(disks[1])
    shell.run("delete", name, "--yes")
    shell.run("start", new)
    shell.run("wait", new, "--for", "ssh")


def test_autostart(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--no-start", "--autostart")
    assert re.search(r"Autostart: +enable", shell.virsh("dominfo", name))
    shell.run("autostart", name, "--off")
    assert shell.json("show", name)["autostart"] is False


def test_delete_takes_its_own_and_nothing_else(shell: Shell, name: str, tmp_path: Path) -> None:
    before, images = volumes(shell), volumes(shell, "vmctl-images")
    foreign = Path("/var/lib/libvirt/images/foreign.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(foreign), "10M"], check=True)
    shell.run("create", name, "--image", "micro", "--disk", "64M", "--disk", str(foreign), "--no-start")
    assert len(volumes(shell) - before) == 4  # root, seed, console log, new disk
    told = shell.run("delete", name, "--dry-run").stdout
    assert f"VM {name}" in told and "foreign" not in told
    shell.run("delete", name, check=2, stdin=subprocess.DEVNULL)
    assert shell.virsh("domstate", name) == "shut off"
    shell.run("delete", name, "--yes")
    assert volumes(shell) == before and volumes(shell, "vmctl-images") == images and foreign.exists()
    shell.run("delete", name, "--yes", check=4)
    foreign.unlink()


def test_delete_spares_a_disk_someone_else_uses(shell: Shell, name: str, names: Callable[[], str]) -> None:
    other = names()
    shell.run("create", name, "--image", "micro", "--disk", "64M", "--no-start")
    (disk,) = [v for v in volumes(shell) if v.startswith(f"{name}-") and "disk1" in v]
    path = shell.virsh("vol-path", "--pool", "vmctl", disk)
    shell.run("create", other, "--image", "micro", "--disk", path, "--no-start")
    assert "kept volume" in shell.run("delete", name, "--yes").stderr
    assert disk in volumes(shell)
    shell.run("delete", other, "--yes")
    shell.virsh("vol-delete", "--pool", "vmctl", disk)


def test_a_domain_defined_by_virsh_is_seen_and_deleted_by_vmctl(shell: Shell, name: str, tmp_path: Path) -> None:
    xml = tmp_path / "d.xml"
    xml.write_text(
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><os><type>hvm</type></os></domain>"
    )
    shell.virsh("define", str(xml))
    (row,) = [row for row in shell.json("list") if row["name"] == name]
    assert (row["state"], row["memory_mib"], row["image"]) == ("stopped", 64, "")
    shell.run("start", name)
    assert shell.virsh("domstate", name) == "running"
    shell.run("ssh", name, check=4)
    shell.virsh("destroy", name)
    assert shell.json("show", name)["state"] == "stopped"
    shell.run("delete", name, "--yes")
    assert name not in shell.virsh("list", "--all", "--name").split()


def test_print_xml_changes_nothing(shell: Shell, name: str) -> None:
    before = (volumes(shell), shell.virsh("list", "--all", "--name"), reservations(shell))
    text = shell.run("create", name, "--image", "micro", "--print-xml").stdout
    assert ET.fromstring(text).findtext("name") == name
    assert (volumes(shell), shell.virsh("list", "--all", "--name"), reservations(shell)) == before
    done = subprocess.run(["virt-xml-validate", "-", "domain"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_exist_ok_and_conflict(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    assert "exists already" in shell.run("create", name, "--image", "micro", check=5).stderr
    assert shell.json("create", name, "--image", "micro", "--exist-ok")["existed"] is True


@pytest.mark.parametrize("bad", ["a b", "../x", "-x-", "ü", "x" * 64, "a\nb", "<a>"])
def test_bad_names_are_exit_2_and_leave_nothing(shell: Shell, bad: str) -> None:
    before = volumes(shell)
    done = shell.run("create", "--image", "micro", "--", bad, check=2)
    assert done.stderr.startswith("cannot create VM: ") and "Traceback" not in done.stderr
    assert volumes(shell) == before


def test_other_bad_input(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "nope", check=4)
    shell.run("create", name, "--image", "micro", "--memory", "lots", check=2)
    shell.run("create", name, "--image", "micro", "--wait", "godot", check=2)
    shell.run("create", name, check=2)
    shell.run("create", name, "--image", "micro", "--disk", "/no/such/file.qcow2", check=None)
    assert name not in shell.virsh("list", "--all", "--name").split()
    assert not [v for v in volumes(shell) if v.startswith(name)]
    shell.run("-c", "qemu+tcp://127.0.0.1:1/system", "list", check=3)
    shell.run("frobnicate", check=2)
    shell.run("start", "no-such-vm", check=4)
    shell.run("start", "no-such-vm", "--wait", "stopped", check=2)


def test_a_start_that_fails_is_undone(shell: Shell, name: str, tmp_path: Path) -> None:
    before = volumes(shell)
    (tmp_path / "folder.raw").mkdir()
    done = shell.run("create", name, "--image", "micro", "--disk", str(tmp_path / "folder.raw"), check=None)
    assert done.returncode and "nothing is left of it" in done.stderr
    assert name not in shell.virsh("list", "--all", "--name").split()
    assert volumes(shell) == before


def test_wait_timeout_tells_stage_and_evidence(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    done = shell.run("wait", name, "--for", "running", "--timeout", "0.5", check=7)
    assert "stage running" in done.stderr and "state: stopped" in done.stderr
    shell.run("start", name)
    done = shell.run("wait", name, "--for", "agent", "--timeout", "0", check=7)
    assert "stage agent" in done.stderr and "stage running:" in done.stderr and "console" in done.stderr
    assert shell.virsh("domstate", name) == "running"
    shell.run("wait", name, "--for", "ssh")


def test_wait_says_at_once_that_the_vm_stopped(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("start", name)
    waiting = subprocess.Popen(
        [*VMCTL, "wait", name, "--for", "agent", "--timeout", "100"], stderr=subprocess.PIPE, text=True, cwd=REPO
    )
    assert waiting.stderr is not None
    while "running" not in waiting.stderr.readline():
        pass
    shell.virsh("destroy", name)
    assert waiting.wait(20) == 6


def test_several_names_and_globs(shell: Shell, names: Callable[[], str]) -> None:
    one, two = names(), names()
    for n in (one, two):
        shell.run("create", n, "--image", "micro", "--no-start")
    late = shell.run("start", one, "--wait", "ssh", "--timeout", "0.1", check=7)
    assert one in late.stderr and "stage" in late.stderr, late.stderr
    done = shell.run("start", one, "no-such-vm", two, "--wait", "running", check=14)
    assert "no-such-vm" in done.stderr and one in done.stdout and two in done.stdout
    assert shell.virsh("domstate", one) == shell.virsh("domstate", two) == "running"
    stem = os.path.commonprefix([one, two])
    assert set(shell.run("list", "-o", "name").stdout.split()) >= {one, two}
    shell.run("stop", f"{one[:-1]}?", f"{two[:-1]}?", "--force", "--timeout", "0")
    assert shell.virsh("domstate", one) == shell.virsh("domstate", two) == "shut off"
    assert stem


def test_events(shell: Shell, name: str) -> None:
    watcher = subprocess.Popen(
        [*VMCTL, "events", f"{name}*", "--count", "3", "-o", "json"],  # a glob, for there is no VM of that name yet
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    try:
        assert watcher.stderr is not None and "watching" in watcher.stderr.readline()
        shell.run("create", name, "--image", "micro")
        out, _ = watcher.communicate(timeout=30)
    finally:
        watcher.kill()
    seen = [json.loads(line) for line in out.splitlines()]
    assert [e["event"] for e in seen][0] == "defined" and "started" in [e["event"] for e in seen]
    assert all(e["name"] == name for e in seen)


def test_events_tell_of_a_reset(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro")
    watcher = subprocess.Popen(
        [*VMCTL, "events", name, "--count", "1", "-o", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    try:
        assert watcher.stderr is not None and "watching" in watcher.stderr.readline()
        shell.run("reset", name)
        out, _ = watcher.communicate(timeout=30)
    finally:
        watcher.kill()
    assert json.loads(out)["event"] == "rebooted"


def test_list_watch_shows_changes(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--no-start", "--label", f"watched={name}")
    watcher = subprocess.Popen(
        [*VMCTL, "list", "-w", "-o", "json", "-l", f"watched={name}"], stdout=subprocess.PIPE, cwd=REPO
    )
    try:
        assert watcher.stdout is not None
        os.set_blocking(watcher.stdout.fileno(), False)
        seen = b""

        def shows(state: str) -> bool:
            nonlocal seen
            seen += watcher.stdout.read() or b"" if watcher.stdout else b""
            return f'"state": "{state}"'.encode() in seen

        wait_until(lambda: shows("stopped"), what="the VM in the watched list", timeout_s=10)
        shell.run("start", name)
        wait_until(lambda: shows("running"), what="the change in the watched list", timeout_s=10)
    finally:
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(10) == 0


def test_console_on_a_terminal(shell: Shell, vm: str) -> None:
    """Typed at, answered, and left with Ctrl-], on a real pseudo-terminal."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(REPO)
        os.execvp(VMCTL[0], [*VMCTL, "console", vm])
    seen = b""

    began = time.monotonic()

    def read_for(timeout_s: float) -> None:
        nonlocal seen
        assert time.monotonic() - began < 60, seen
        if select.select([fd], [], [], timeout_s)[0]:
            seen += os.read(fd, 65536)

    def read_until(want: bytes) -> None:
        while want not in seen:
            read_for(0.2)

    read_until(b"Ctrl-] leaves")
    while f"{vm}:".encode() not in seen:  # until a prompt answers: a console shell may just be starting anew
        os.write(fd, b"\r")
        read_for(1.0)
    os.write(fd, b"echo con$((20+3))sole\r")
    read_until(b"con23sole")
    os.write(fd, b"\x1d")
    read_until(b"left the console")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_console_through_tmux(shell: Shell, vm: str, tmp_path: Path) -> None:
    tmux = ["tmux", "-S", str(tmp_path / "tmux")]
    command = " ".join([*VMCTL, "console", vm])
    subprocess.run(
        [
            *tmux,
            "new-session",
            "-d",
            "-s",
            "c",
            "-x",
            "100",
            "-y",
            "30",
            "-c",
            str(REPO),
            f"{command}; echo left=$?; sleep 60",
        ],
        check=True,
    )
    try:

        def screen() -> str:
            return subprocess.run([*tmux, "capture-pane", "-p", "-t", "c"], capture_output=True, text=True).stdout

        wait_until(
            lambda: "Ctrl-] leaves" in screen(), what="console in tmux", timeout_s=20, evidence=lambda: [screen()]
        )

        def prompt() -> bool:
            subprocess.run([*tmux, "send-keys", "-t", "c", "Enter"], check=True)
            return f"{vm}:" in screen()

        wait_until(prompt, what="a prompt", timeout_s=20, interval_s=1.0, evidence=lambda: [screen()])
        subprocess.run([*tmux, "send-keys", "-t", "c", "echo tm$((40+2))ux", "Enter"], check=True)
        wait_until(lambda: "tm42ux" in screen(), what="an answer in tmux", timeout_s=20, evidence=lambda: [screen()])
        subprocess.run([*tmux, "send-keys", "-t", "c", "C-]"], check=True)
        wait_until(lambda: "left=0" in screen(), what="the end in tmux", timeout_s=10, evidence=lambda: [screen()])
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def test_runcmd_and_further_keys(shell: Shell, name: str, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    commands = ['echo "quotes \' & <tags>" >/root/one', "hostname >/root/two"]
    shell.run(
        "create",
        name,
        "--image",
        "micro",
        "--ssh-key",
        f"{key}.pub",
        *[w for c in commands for w in ("--runcmd", c)],
        "--wait",
        "ssh",
    )
    wait_until(
        lambda: (
            shell.run("exec", name, "--", "cat", "/root/one", "/root/two", check=None).stdout
            == f"quotes ' & <tags>\n{name}\n"
        ),
        what="first-boot commands",
        timeout_s=30,
    )
    address = shell.json("show", name)["address"]
    done = subprocess.run(
        [
            "ssh",
            "-i",
            str(key),
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "StrictHostKeyChecking=accept-new",
            "-o",
            f"UserKnownHostsFile={tmp_path}/k",
            f"root@{address}",
            "echo in",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "in\n", done.stderr


def test_graphics_only_on_loopback(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--graphics", "vnc")
    assert re.match(r"127\.0\.0\.1:\d", shell.virsh("vncdisplay", name))


def test_show_tells_of_a_tpm(shell: Shell, name: str, tmp_path: Path) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    assert shell.json("show", name)["tpm"] is None and "tpm" not in shell.run("show", name).stdout
    for model, version in (("tpm-crb", "2.0"), ("tpm-tis", "1.2")):
        tpm = f"<tpm model='{model}'><backend type='emulator' version='{version}'/></tpm></devices>"
        text = re.sub(r"<tpm.*</tpm>", "", shell.virsh("dumpxml", name), flags=re.S)
        (tmp_path / "xml").write_text(text.replace("</devices>", tpm))
        shell.virsh("define", str(tmp_path / "xml"))
        assert shell.json("show", name)["tpm"] == {"version": version, "model": model, "backend": "emulator"}
        assert re.search(rf"^tpm +{version}, {model} \(swtpm\)$", shell.run("show", name).stdout, re.M)


def test_what_an_image_cannot_do_is_refused_before_anything_is_made(shell: Shell, name: str) -> None:
    """micro has a kernel to be started directly, no boot loader, no signatures, and no cloud-init."""
    wrong = ["--firmware", "uefi-secure", "--user", "bob", "--network", ",address=10.1.2.3/24"]
    done = shell.run("create", name, "--image", "micro", *wrong, check=2)
    for word in ("does not boot by uefi-secure", "a user needs cloud-init", "a static address"):
        assert word in done.stderr
    assert "beside a TPM" in shell.run("create", name, "--image", "micro", "--tpm", check=2).stderr
    shell.run("show", name, check=4)


def test_user_data_is_merged_and_filled_in(shell: Shell, name: str, tmp_path: Path) -> None:
    plain, template, ignition = tmp_path / "a.yaml", tmp_path / "b.yaml.j2", tmp_path / "c.ign"
    plain.write_text("#cloud-config\nruncmd:\n  - echo one >> /root/ran\n")
    template.write_text('#cloud-config\nruncmd:\n  - [sh, -c, "echo {{ who }} on {{ name }} >> /root/ran"]\n')
    ignition.write_text('{"ignition": {"version": "3.3.0"}, "text": "<&>"}')
    given = [
        "--user-data",
        str(plain),
        "--user-data",
        str(template),
        "--var",
        "who=you",
        "--runcmd",
        "echo zero > /root/ran",
    ]
    shell.run("create", name, "--image", "micro", *given, "--ignition", str(ignition), "--wait", "ssh")
    done = "while [ ! -e /run/vmctl/seed-done ]; do sleep 0.1; done; cat /root/ran"
    assert shell.run("exec", name, "--", "sh", "-c", done).stdout == f"zero\none\nyou on {name}\n"
    config = "modprobe qemu_fw_cfg; cat /sys/firmware/qemu_fw_cfg/by_name/opt/com.coreos/config/raw"
    assert shell.run("exec", name, "--", "sh", "-c", config).stdout == ignition.read_text()
    missing = shell.run("create", f"{name}x", "--image", "micro", "--user-data", str(template), check=2)
    assert "'who' is undefined" in missing.stderr


def test_image_store(shell: Shell, name: str) -> None:
    before = shell.json("image", "list")
    (image,) = [one for one in before if one["name"] == "micro"]
    assert re.fullmatch("[0-9a-f]{64}", image["digest"])
    assert shell.json("image", "show", "micro")["software"]
    shell.run("image", "show", "nope", check=4)
    shell.run("create", name, "--image", "micro", "--no-start")
    done = shell.run("image", "delete", "micro", "--yes", check=5)
    assert name in done.stderr
    assert shell.json("image", "list") == before


def test_precedence_of_connections(shell: Shell) -> None:
    test = "test:///default"
    assert "test" in shell.run("list", "-o", "name", env=environment(VMCTL_CONNECT=test)).stdout
    assert "test" in shell.run("list", "-o", "name", env=environment(LIBVIRT_DEFAULT_URI=test)).stdout
    assert (
        "test"
        in shell.run(
            "list", "-o", "name", env=environment(LIBVIRT_DEFAULT_URI="qemu:///system", VMCTL_CONNECT=test)
        ).stdout
    )
    assert "test" in shell.run("list", "-c", test, "-o", "name", env=environment(VMCTL_CONNECT="qemu:///system")).stdout


def test_demo(shell: Shell) -> None:
    env = environment(VMCTL_SHELL="sh vmctl/bootstrap.sh bash")
    done = shell.run("demo", "--name", f"demo-{os.getpid()}", timeout=300, env=env)
    for word in ("create", "exec", "show", "pause", "resume", "delete"):
        assert f"$ vmctl {word}" in done.stderr
    assert "What to type next:\n  sh vmctl/bootstrap.sh bash  " in done.stdout and "hello from" in done.stdout
    assert f"demo-{os.getpid()}" not in shell.virsh("list", "--all", "--name")
