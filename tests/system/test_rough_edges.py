"""What users do at three in the morning: interrupt, mistype, pull plugs; each ends soon, with one clear word."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.system.conftest import REPO, VMCTL, Shell, volumes
from vmctl.pytest_qemu import GuestVM
from vmctl.wait import wait_until

pytestmark = pytest.mark.system


def begin(*words: str, **options: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*VMCTL, *words], text=True, cwd=REPO, **pipes)  # type: ignore[call-overload,no-any-return]


def test_exec_ends_when_the_vm_does(shell: Shell, name: str) -> None:
    shell.guest(name)
    running = begin("exec", name, "--", "sh", "-c", "echo up; sleep 1000")
    assert running.stdout is not None and running.stdout.readline() == "up\n"
    shell.virsh("destroy", name)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 6 and "it is stopped now" in err and "hint: vmctl start" in err


def test_a_reader_that_goes_away_is_not_the_guests_fault(shared_vm: GuestVM) -> None:
    script = f"{' '.join(VMCTL)} exec {shared_vm.name} -- yes | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=REPO, timeout=60)
    assert done.stdout.split() == ["y", "141"] and "cannot" not in done.stderr
    with Path("/dev/full").open("w") as full:
        to_full = subprocess.run(
            [*VMCTL, "exec", shared_vm.name, "--", "echo", "x"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
    assert to_full.returncode == 1 and "cannot write the output: No space left" in to_full.stderr


def test_a_user_who_is_not_there(shell: Shell, shared_vm: GuestVM) -> None:
    done = shell.run("exec", "-u", "nobody", shared_vm.name, "--", "true", check=3)
    assert "does nobody exist there" in done.stderr


def test_console_without_a_terminal_ends(shared_vm: GuestVM) -> None:
    done = subprocess.run([*VMCTL, "console", shared_vm.name], stdin=subprocess.DEVNULL, cwd=REPO, timeout=30)
    assert done.returncode == 0


def test_a_console_that_another_has_open(shell: Shell, shared_vm: GuestVM) -> None:
    other = begin("console", shared_vm.name, stdin=subprocess.PIPE)
    try:
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.read(1)  # the guest answers: it is open
        refused = shell.run("console", shared_vm.name, check=5)
        assert "someone else has it open" in refused.stderr and "hint: add --force" in refused.stderr
    finally:
        other.kill()
        other.wait()


def test_a_mistyped_name_is_guessed(shell: Shell, shared_vm: GuestVM) -> None:
    wrong = shared_vm.name[:-1]
    for verb in (["show", wrong], ["delete", wrong, "--yes"]):
        assert f"hint: did you mean {shared_vm.name}?" in shell.run(*verb, check=4).stderr


def test_stages_of_several_waits_name_their_vm(shell: Shell, shared_vm: GuestVM, name: str) -> None:
    shell.run("create", name, "--image", "micro")
    err = shell.run("wait", shared_vm.name, name, "--for", "running").stderr
    assert f"{name}: running" in err and f"{shared_vm.name}: running" in err


@pytest.mark.parametrize(
    "words", [["events", "--count", "9"], ["wait", "{}", "--for", "stopped"], ["exec", "{}", "--", "sleep", "99"]]
)
def test_ctrl_c_says_so(shared_vm: GuestVM, words: list[str]) -> None:
    running = begin(*(word.format(shared_vm.name) for word in words))
    fds = Path(f"/proc/{running.pid}/fd")

    def connected() -> bool:
        with suppress(FileNotFoundError):  # one that was closed while they were looked at
            return any(str(fd.readlink()).startswith("socket:") for fd in list(fds.iterdir()))
        return False

    wait_until(connected, what="a connection", timeout_s=20)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 130 and "interrupted" in err and "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_work_on_several_vms(shell: Shell, shared_vm: GuestVM, name: str, number: int) -> None:
    shell.run("create", name, "--image", "micro", "--wait", "running")
    running = begin("wait", shared_vm.name, name, "none-such", "--for", "stopped", "-v")
    assert running.stderr is not None
    seen = ""
    while seen.count("begins at") < 2:
        line = running.stderr.readline()
        assert line, seen
        seen += line
    began = time.monotonic()
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and time.monotonic() - began < 20
    last = err.splitlines()[-1]
    assert last.startswith("cannot wait for all 3 VMs: ") and f"cut off: {shared_vm.name}, {name}" in last
    assert "none-such" in last, "found missing already, looked for just then, or not begun"
    assert shell.virsh("domstate", name) == "running"


def test_ctrl_c_while_a_new_vm_boots_leaves_it_and_says_so(shell: Shell, name: str) -> None:
    running = begin("create", name, "--image", "micro", "--wait", "ssh")
    assert running.stderr is not None
    while "is running" not in (line := running.stderr.readline()):
        assert line
    wait_until(lambda: shell.virsh("domstate", name) == "running", what="the VM", timeout_s=10)
    assert running.stderr.readline()  # the first stage is over: it waits
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    assert running.returncode == 130 and f"{name} stays, and runs; go on with `vmctl wait {name} --for ssh`" in err
    assert shell.virsh("domstate", name) == "running"


def test_waiting_in_vain_is_refused_at_once(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--no-start", "--no-agent")
    assert f"hint: vmctl start {name}" in shell.run("wait", name, "--for", "ssh", check=6, timeout=10).stderr
    assert "no channel" in shell.run("wait", name, "--for", "agent", check=8, timeout=10).stderr
    shell.run("start", name)
    shell.run("pause", name)
    for verb in (["reboot", name], ["wait", name, "--for", "ip"]):
        assert f"hint: vmctl resume {name}" in shell.run(*verb, check=6, timeout=10).stderr


def test_what_the_host_lacks_is_told_all_at_once(shell: Shell, name: str) -> None:
    wrong = ["--memory", "99T", "--cpu", "nosuch", "--network", "nonet", "--disk", "/nope.qcow2", "--root-size", "1M"]
    done = shell.run("create", name, "--image", "micro", *wrong, check=2)
    for said in ("MiB of the host", "no CPU model nosuch", "no network nonet", "no file /nope.qcow2", "smaller than"):
        assert said in done.stderr
    assert "given twice" in shell.run("create", name, "--image", "micro", "-l", "a=1", "-l", "a=2", check=2).stderr
    shell.run("show", name, check=4)


def test_saved_memory_can_be_dropped(shell: Shell, name: str, names: Callable[[], str]) -> None:
    other = names()
    shell.run("create", name, "--image", "micro", "--wait", "running")
    shell.run("save", name)
    assert "--force drops" in shell.run("rename", name, other, check=6).stderr
    assert "--force drops" in shell.run("stop", name).stderr
    assert "dropped" in shell.run("stop", name, "--force").stdout
    assert shell.json("show", name)["state"] == "stopped"
    assert "that is its name" in shell.run("rename", name, name, check=2).stderr
    shell.run("rename", name, other)


def test_a_half_made_vm_is_not_started(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    text = shell.virsh("dumpxml", "--inactive", name).replace("<vmctl:vm ", '<vmctl:vm creating="yes" ')
    subprocess.run(["virsh", "-q", "define", "/dev/stdin"], input=text, text=True, check=True, timeout=30)
    assert "its creation was cut off" in shell.run("start", name, check=6).stderr
    shell.virsh("start", "--paused", name)
    assert "its creation was cut off" in shell.run("start", name, check=6).stderr
    assert shell.json("show", name)["state"] == "creating"
    assert name in [row["name"] for row in shell.json("list", "--state", "creating")]
    shell.run("create", name, "--image", "micro")


def test_delete_leaves_the_console_log_of_another(shell: Shell, name: str, names: Callable[[], str]) -> None:
    copy = names()
    shell.run("create", name, "--image", "micro", "--no-start")
    log = shell.json("show", name)["console_log"]
    text = shell.virsh("dumpxml", "--inactive", name).replace(f"<name>{name}<", f"<name>{copy}<")
    uuid = shell.json("show", name)["uuid"]
    text = text.replace(f"<uuid>{uuid}</uuid>", "")
    subprocess.run(["virsh", "-q", "define", "/dev/stdin"], input=text, text=True, check=True, timeout=30)
    shell.run("delete", copy, "--yes")
    assert Path(log).exists()
    shell.run("start", name)


def test_a_guest_deaf_to_the_button_is_stopped_by_its_agent(shell: Shell, name: str) -> None:
    shell.guest(name)
    shell.run("wait", name, "--for", "agent")
    shell.run("exec", name, "--", "rmmod", "button")
    done = shell.run("stop", name, "--timeout", "12")
    assert "(agent)" in done.stdout and "did not stop by ACPI" in done.stderr


def test_usage_errors_have_the_form_of_all_others(shell: Shell) -> None:
    for words in (["create", "x"], ["list", "-o", "xml"], ["frobnicate"], ["wait", "x", "--timeout", "-1"]):
        lines = shell.run(*words, check=2).stderr.splitlines()
        assert len(lines) == 2 and lines[0].startswith("cannot understand the command line: "), lines
        assert lines[1].startswith("hint: vmctl") and lines[1].endswith("--help")


def test_the_network_makes_no_port_wait(shell: Shell, shared_vm: GuestVM) -> None:
    bridge = shell.virsh("net-info", "vmctl").split("Bridge:")[1].split()[0]
    assert Path(f"/sys/class/net/{bridge}/bridge/stp_state").read_text().strip() == "0"
    assert Path(f"/sys/class/net/{bridge}/bridge/forward_delay").read_text().strip() == "0"


def test_the_seed_goes_when_it_has_been_used(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--wait", "running")
    shell.run("stop", name, "--force", "--timeout", "0")  # cut off: the next boot needs the seed
    assert "needs its seed" not in shell.run("start", name).stderr
    shell.run("wait", name, "--for", "ssh")
    done = "while [ ! -e /run/vmctl/seed-done ]; do sleep 0.1; done"
    shell.run("exec", name, "--", "sh", "-c", done)
    shell.run("stop", name)
    assert "no longer needs its seed" in shell.run("start", name).stderr
    assert "vdb" not in shell.virsh("domblklist", name)
    assert not [volume for volume in volumes(shell) if volume.startswith(name) and "seed" in volume]
    shell.run("wait", name, "--for", "ssh")
    assert shell.run("exec", name, "--", "hostname").stdout == f"{name}\n"
    shell.run("stop", name)
    assert "seed" not in shell.run("start", name).stderr


def test_a_power_cut_right_after_the_first_boot_loses_nothing(shell: Shell, name: str) -> None:
    """Once "seed done" is said the seed may go, and nobody could plant the host key again."""
    shell.run("create", name, "--image", "micro", "--wait", "ssh")
    wait_until(lambda: "seed done" in shell.run("logs", name).stdout, what="its first boot", timeout_s=120)
    shell.virsh("destroy", name)
    assert "no longer needs its seed" in shell.run("start", name).stderr
    shell.run("wait", name, "--for", "ssh")
    assert shell.run("exec", name, "--", "sh", "-c", "hostname; cat /var/lib/vmctl/instance-id").stdout.split() == [
        name,
        shell.json("show", name)["uuid"],
    ]


def test_cp_writes_into_devices_and_through_links(shell: Shell, shared_vm: GuestVM, tmp_path: Path) -> None:
    here, there = tmp_path / "file", f"/root/{tmp_path.name}"
    here.write_text("hello\n")
    device, link, target = tmp_path / "null", tmp_path / "link", tmp_path / "target"
    subprocess.run(["mknod", str(device), "c", "1", "3"], check=True)
    target.write_text("old")
    link.symlink_to("target")
    shell.run("exec", shared_vm.name, "--", "sh", "-c", f"mkdir {there}; cd {there}; mknod null c 1 3; ln -s to from")
    try:
        for name in ("null", "from"):
            shell.run("cp", str(here), f"{shared_vm.name}:{there}/{name}")
        said = shell.run(
            "exec", shared_vm.name, "--", "sh", "-c", f"cd {there}; test -c null && test -L from && cat to"
        )
        assert said.stdout == "hello\n"
        for path in (device, link):
            shell.run("cp", f"{shared_vm.name}:{there}/to", str(path))
        assert device.is_char_device() and link.is_symlink() and target.read_text() == "hello\n"
        (tmp_path / "folder" / "to").mkdir(parents=True)
        for bad in (tmp_path / "no" / "x", tmp_path / "folder"):
            done = shell.run("cp", f"{shared_vm.name}:{there}/to", str(bad), check=2)
            assert done.stderr.startswith("cannot write ") and "Traceback" not in done.stderr
    finally:
        shell.run("exec", shared_vm.name, "--", "rm", "-r", there)


def test_a_closed_input_is_an_empty_one(shared_vm: GuestVM) -> None:
    script = f"{' '.join(VMCTL)} exec {shared_vm.name} -- cat <&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, cwd=REPO, timeout=60)
    assert done.returncode == 0 and done.stdout == b""


def test_a_large_file_is_an_input_by_the_agent_too(shared_vm: GuestVM, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 1_500_000)
    with (tmp_path / "large").open("rb") as large:
        command = [*VMCTL, "exec", "--via", "agent", shared_vm.name, "--", "wc", "-c"]
        done = subprocess.run(command, stdin=large, capture_output=True, cwd=REPO, timeout=60, check=True)
    assert done.stdout.split() == [b"1500000"]


def test_a_full_disk_behind_the_output(shared_vm: GuestVM) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*VMCTL, "list"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPO)
    assert done.returncode == 1 and done.stderr.endswith("cannot write the output: No space left on device\n")


def test_delete_keeps_what_a_disk_elsewhere_is_based_on(shell: Shell, name: str, tmp_path: Path) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    (root,) = [disk["source"] for disk in shell.json("show", name)["disks"] if disk["target"] == "vda"]
    overlay = tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", root, str(overlay)], check=True)
    xml = (
        f"<domain type='qemu'><name>{name}-thief</name><memory>65536</memory><os><type arch='x86_64'>hvm</type></os>"
        f"<devices><disk type='file'><driver name='qemu' type='qcow2'/><source file='{overlay}'/>"
        "<target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
    subprocess.run(["virsh", "-q", "define", "/dev/stdin"], input=xml, text=True, check=True, timeout=30)
    try:
        assert "kept volume" in shell.run("delete", name, "--yes").stderr and Path(root).exists()
    finally:
        shell.virsh("undefine", f"{name}-thief")
        shell.virsh("vol-delete", Path(root).name, "vmctl")


def test_a_list_knows_addresses_on_a_bridge_from_the_neighbours_of_this_machine(
    shell: Shell, name: str, tmp_path: Path
) -> None:
    """No libvirt gives addresses there; a list asks no guest, `show` does."""
    lan = f"lan-{name}"
    bridge = re.findall(r"<bridge name='([^']*)'", shell.virsh("net-dumpxml", "vmctl"))[0]
    (tmp_path / "lan.xml").write_text(
        f'<network><name>{lan}</name><forward mode="bridge"/><bridge name="{bridge}"/></network>'
    )
    shell.virsh("net-create", str(tmp_path / "lan.xml"))
    try:
        shell.run("create", name, "--image", "micro", "--network", lan, "--wait", "agent", timeout=240)
        address = wait_until(lambda: shell.json("show", name)["address"] or None, what="its address", timeout_s=60)
        with pytest.raises(ConnectionRefusedError):  # it is there to refuse
            socket.create_connection((address, 9), timeout=30)
        (row,) = [row for row in shell.json("list") if row["name"] == name]
        assert row["address"] == address
    finally:
        shell.run("delete", name, "--yes", "--missing-ok")
        shell.virsh("net-destroy", lan)


def test_a_vm_without_a_console(shell: Shell, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--no-console")
    told = shell.run("console", name, check=8).stderr
    assert told == f"cannot open the console of VM {name}: it has none\nhint: its screen may do: vmctl view {name}\n"


def test_what_vmctl_did_not_make_was_asked_nothing(shell: Shell, name: str, tmp_path: Path) -> None:
    (tmp_path / "xml").write_text(
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>"
        "<os><type arch='x86_64'>hvm</type></os></domain>"
    )
    subprocess.run(["virsh", "-q", "-c", "qemu:///system", "define", str(tmp_path / "xml")], check=True)
    assert re.search(r"^accel +tcg  \(defined outside vmctl\)$", shell.run("show", name).stdout, re.MULTILINE)
