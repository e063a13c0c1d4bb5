"""The probe guest for real, under TCG and, where there is one, under KVM; and doctor's mends in a private /dev."""

from __future__ import annotations

import grp
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import REPO, Shell, environment, volumes
from vmctl import accel, accel_probe, remote_kvm, render
from vmctl.accel import Verdict
from vmctl.accel_probe import End, ProbeRun
from vmctl.errors import HypervisorError
from vmctl.hosts import Host, open_host
from vmctl.hypervisor import console, storage
from vmctl.hypervisor.console import Transcript
from vmctl.resources import baremetal_guest
from vmctl.spec import Accel

pytestmark = pytest.mark.system

QEMU = Path("/usr/bin/qemu-system-x86_64")


def test_under_tcg_every_proof_is_given() -> None:
    began = time.monotonic()
    run = accel_probe.run(QEMU, Accel.TCG)
    assert run.complete and run.missing == () and run.lines[0] == "vmctl-probe 1"
    assert run.nops_cycles is not None and 0 < run.nops_cycles < 100_000
    assert time.monotonic() - began < accel_probe.TIMEOUT_S


def guest(tmp_path: Path, body: str) -> Path:
    """A PVH guest with this assembly at its entry."""
    source, out = tmp_path / "g.S", tmp_path / "g.elf"
    note = '.section .note.pvh,"a",@note\n.long 4,4,18\n.asciz "Xen"\n.long go\n'
    source.write_text(f"{note}.text\n.code32\n.globl go\ngo:\n{body}\n")
    script = REPO / "vmctl/baremetal/link.ld"
    flags = ["-nostdlib", "-static", "-no-pie", "-Wl,-n", f"-Wl,-T,{script}", "-Wl,-e,go", "-Wl,--build-id=none"]
    subprocess.run(["gcc", *flags, "-o", str(out), str(source)], check=True, capture_output=True)
    return out


def test_a_guest_that_hangs_is_ended_and_told_apart(tmp_path: Path) -> None:
    run = accel_probe.run(QEMU, Accel.TCG, guest=guest(tmp_path, "1: jmp 1b"), timeout_s=1.0)
    assert run.end is End.TIMEOUT and run.lines == ()
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(p)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_triple_fault_is_a_failure_although_qemu_ends_with_0(tmp_path: Path) -> None:
    run = accel_probe.run(QEMU, Accel.TCG, guest=guest(tmp_path, "lidt zero\nud2\nzero: .word 0\n.long 0"))
    assert (run.end, run.status) == (End.EXIT, 0) and not run.complete


def test_a_qemu_that_is_not_there() -> None:
    assert accel_probe.run(Path("/nope"), Accel.TCG).end is End.NOT_STARTED


def test_a_qemu_without_microvm_runs_the_probe_on_q35(tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text(f'#!/bin/sh\n[ "$2" = microvm ] && exec {QEMU} -M vmctl-no-such-machine\nexec {QEMU} "$@"\n')
    qemu.chmod(0o755)
    run = accel_probe.run(qemu, Accel.TCG)
    assert run.complete and run.missing == ()


def test_absent_for_real(tmp_path: Path) -> None:
    found = accel.examine(qemu_user=None, qemu_binary=QEMU, cache_dir=tmp_path, device=tmp_path / "kvm")
    assert found.verdict is Verdict.ABSENT and found.mend


needs_kvm = pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this machine has no /dev/kvm")


@needs_kvm
def test_a_guest_that_kvm_gives_up_is_no_hang(tmp_path: Path) -> None:
    """int3 with no IDT: a native KVM sees a triple fault, one that interprets stops the guest and keeps QEMU alive."""
    run = accel_probe.run(QEMU, Accel.KVM, guest=guest(tmp_path, "int3"))
    seen = accel.Observations("", True, "/dev/kvm", None, None, 0, 0, run)
    assert accel.judge(seen).verdict is Verdict.FAILS


@needs_kvm
def test_the_verdict_agrees_with_what_the_machine_is(shell: Shell) -> None:
    found = shell.json("host", "info", "--refresh")["accel"]
    flags = Path("/proc/cpuinfo").read_text().split()
    evidence = {check["name"]: check for check in found["kvm"]["evidence"]}
    assert found["kvm"]["verdict"] in {v.value for v in Verdict}
    assert (found["chosen"] == "kvm") == (found["kvm"]["verdict"] == "works")
    if not {"vmx", "svm"} & set(flags):
        # A kernel without hardware help cannot reach native speed, whatever its /dev/kvm says.
        assert found["kvm"]["verdict"] != "works" and evidence["cpu-flags"]["result"] == "warning"
    # The same again from the cache, and told by show and doctor too.
    assert shell.json("host", "info")["accel"] == found
    assert any(f["name"] == "accelerator" and found["reason"] in f["detail"] for f in shell.json("doctor"))


@needs_kvm
def test_require_kvm_fails_rather_than_fall_back(shell: Shell, name: str) -> None:
    if shell.json("host", "info")["accel"]["chosen"] == "kvm":
        pytest.skip("KVM works here")
    assert "cannot use KVM" in shell.run("create", name, "--image", "micro", "--accel", "require-kvm", check=8).stderr
    assert "running on TCG" not in shell.run("create", name, "--image", "micro", "--accel", "tcg", "--no-start").stderr


@needs_kvm
def test_permission_for_real(tmp_path: Path) -> None:
    """As a user who is in no group that may open the device."""
    script = (
        "import os, sys, pathlib\nfrom vmctl import accel\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "f = accel.examine(qemu_user=None, qemu_binary=pathlib.Path(sys.argv[1]), cache_dir=pathlib.Path('/nope'))\n"
        "print(f.verdict, f.mend)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(QEMU)], capture_output=True, text=True, cwd=REPO, timeout=60
    )
    assert done.stdout.startswith("permission ") and "usermod" in done.stdout, done.stderr


# The same daemon by an address that is not this machine's ordinary one: all that vmctl does on a host elsewhere.
ELSEWHERE = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock"


@pytest.fixture
def far() -> Iterator[Host]:
    with open_host(ELSEWHERE) as host:
        assert not host.conn.local
        yield host


def heard(host: Host, elf: Path, timeout_s: float) -> Transcript:
    """What a bare-metal guest says on that host under TCG."""
    volume = render.VolumeView("t-heard.elf", elf.stat().st_size, "raw", mode="0644")
    path = storage.create_volume(host.conn, "vmctl", render.volume(volume), name=volume.name)
    try:
        storage.upload_bytes(host.conn, "vmctl", volume.name, elf.read_bytes())
        view = render.ProbeView("t-heard", "qemu", "kvm64", str(QEMU), path)
        enough = lambda said: "done" in accel_probe.lines_of(said)  # noqa: E731
        return console.transcript(host.conn, render.probe(view), until=enough, timeout_s=timeout_s)
    finally:
        storage.delete_volume(host.conn, "vmctl", volume.name)


def test_a_guest_elsewhere_is_heard_over_its_console(shell: Shell, far: Host, tmp_path: Path) -> None:
    found = heard(far, baremetal_guest("probe"), 60.0)
    assert ProbeRun(End.DONE, 0, accel_probe.lines_of(found.said), "").missing == () and not found.stopped
    (tmp_path / "deaf").mkdir()
    assert heard(far, guest(tmp_path / "deaf", "1: jmp 1b"), 3.0).timed_out
    died = heard(far, guest(tmp_path, "lidt zero\nud2\nzero: .word 0\n.long 0"), 60.0)
    assert died.stopped and not died.timed_out
    assert "t-heard" not in shell.virsh("list", "--all", "--name").split()


def written() -> dict[str, int]:
    """When verdicts on hosts elsewhere were written down."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "vmctl"
    return {one.name: one.stat().st_mtime_ns for one in folder.glob("accel-at-*.json")}


def test_kvm_elsewhere_is_judged_by_a_guest_that_ran_there(
    shell: Shell, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # test hosts side by side share the usual one
    here = shell.json("host", "info", "--refresh")["accel"]["kvm"]
    there = Shell(ELSEWHERE)
    before = volumes(shell)
    found = there.json("host", "info", "--refresh")["accel"]["kvm"]
    if Path("/dev/kvm").exists():
        assert found["verdict"] == here["verdict"], (found, here)
        assert found["evidence"][-1]["name"] == "guest-probe"
    else:
        assert found["verdict"] == "absent"
    assert volumes(shell) == before and "vmctl-probe" not in shell.virsh("list", "--all", "--name")
    judged = written()
    assert there.json("host", "info")["accel"]["kvm"] == found
    if found["verdict"] == "interpreted":
        assert judged and written() == judged, "it was not taken from the cache"
        told = there.run("create", name, "--image", "micro", "--no-start").stderr
        assert "note: running on TCG: this kernel's KVM interprets its guests" in told


@needs_kvm
def test_who_may_use_libvirt_but_not_kvm_gets_the_verdict_of_guests(shell: Shell) -> None:
    """In group libvirt, not in group kvm: guests run as QEMU's user, who may open the device."""
    group = grp.getgrnam("libvirt").gr_gid
    become = ["setpriv", "--reuid=65534", "--regid=65534", f"--groups={group}"]
    home = Path(tempfile.mkdtemp(dir="/var/tmp"))
    os.chown(home, 65534, group)
    env = {"HOME": str(home), "XDG_RUNTIME_DIR": str(home), "PATH": os.environ["PATH"]}
    command = [*become, sys.executable, "-m", "vmctl", "-c", "qemu:///system", "host", "info", "-o", "json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=REPO, timeout=120, check=True)
    found = json.loads(done.stdout)["accel"]["kvm"]
    assert found["verdict"] == shell.json("host", "info")["accel"]["kvm"]["verdict"], done.stdout
    results = {check["name"]: check["result"] for check in found["evidence"]}
    assert results["open-self"] == "warning" and "guest-probe" in results


def test_who_asks_for_tcg_waits_for_no_probe(name: str, tmp_path: Path) -> None:
    words = ["create", name, "--image", "micro", "--no-start", "--accel", "tcg"]
    Shell(ELSEWHERE).run(*words, env=environment(XDG_CACHE_HOME=str(tmp_path)))
    assert not list(tmp_path.rglob("accel-*"))


def test_a_host_elsewhere_without_kvm_and_one_whose_guest_does_not_start() -> None:
    def fails() -> ProbeRun:
        raise HypervisorError("cannot run a probe: no", code=1, domain=1)

    assert remote_kvm.judge(("qemu",), fails).verdict is Verdict.ABSENT
    found = remote_kvm.judge(("qemu", "kvm"), fails)
    assert found.verdict is Verdict.FAILS and found.mend and found.evidence[-1].detail == "cannot run a probe: no"


def in_private_dev(mode: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with a /dev/kvm of its own, root's, of this mode: the machine's stays as it is."""
    script = (
        f"node=/tmp/kvm-$$; mknod $node c 10 232 && chmod {mode} $node && mount --bind $node /dev/kvm && "
        'rm $node && exec "$@"'
    )
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *command], capture_output=True, text=True, cwd=REPO, timeout=120
    )


@needs_kvm
def test_the_capability_cache_trap_is_found_explained_and_mended() -> None:
    doctor = [sys.executable, "-m", "vmctl", "doctor", "-o", "json"]
    done = in_private_dev("600", doctor)
    assert done.returncode == 1
    (found,) = [f for f in json.loads(done.stdout) if f["name"] == "capability-cache"]
    assert found["result"] == "failed" and "about a minute" in found["detail"] and "doctor --fix" in found["mend"]
    both = " ".join([*doctor, "--fix", ">/dev/null;", *doctor, "&&", "stat -c '%G %a' /dev/kvm"])
    done = in_private_dev("600", ["sh", "-c", both])
    assert done.stdout.rstrip().endswith("kvm 660"), done.stdout + done.stderr
    (found,) = [f for f in json.loads(done.stdout.rpartition("]")[0] + "]") if f["name"] == "capability-cache"]
    assert found["result"] == "ok"


@needs_kvm
def test_the_open_check_really_becomes_qemus_user() -> None:
    script = "from vmctl import kvm_device as kvm\nprint(kvm.open_as_qemu('libvirt-qemu', kvm.DEVICE))"
    run = [sys.executable, "-c", script]
    assert in_private_dev("600", run).stdout.strip() != "0"
    assert in_private_dev("666", run).stdout.strip() == "0"
    assert os.geteuid() == 0


def test_doctor_without_libvirt_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmctl", "-c", "qemu+unix:///system?socket=/nope", "doctor"],
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert done.returncode == 1 and "failed   libvirt: cannot connect" in done.stdout


def test_a_bridge_left_by_a_crash_is_avoided_and_removed(shell: Shell, name: str) -> None:
    """The network is down, its bridge and dnsmasq still there: what a daemon that lost its state leaves."""
    bridge = [line for line in shell.virsh("net-dumpxml", "vmctl").splitlines() if "<bridge" in line][0].split("'")[1]
    conf = Path("/var/lib/libvirt/dnsmasq/vmctl.conf").read_text()
    shell.virsh("net-destroy", "vmctl")
    subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
    subprocess.run(["ip", "addr", "add", "10.77.0.1/22", "dev", bridge], check=True)
    subprocess.run(["ip", "link", "set", bridge, "up"], check=True)
    stale = Path("/var/lib/libvirt/dnsmasq/vmctl.conf")
    stale.write_text(conf)
    dnsmasq = subprocess.Popen([shutil.which("dnsmasq") or "/usr/sbin/dnsmasq", "-k", f"--conf-file={stale}"])
    try:
        assert any(
            f["name"] == "networks" and f["result"] == "failed"
            for f in json.loads(shell.run("doctor", "-o", "json", check=1).stdout)
        )
        # A create does not wait for the doctor: it moves aside, and the VM is reachable.
        shell.run("create", name, "--image", "micro", "--wait", "ssh")
        assert f"name='{bridge}'" not in shell.virsh("net-dumpxml", "vmctl")
        shell.run("delete", name, "--yes")
        # With the old definition back, the doctor takes the stale bridge away, and its dnsmasq with it.
        text = shell.virsh("net-dumpxml", "vmctl", "--inactive")
        now = [line for line in text.splitlines() if "<bridge" in line][0].split("'")[1]
        shell.virsh("net-destroy", "vmctl")
        shell.virsh("net-undefine", "vmctl")
        path = Path("/tmp/net.xml")
        path.write_text(text.replace(f"'{now}'", f"'{bridge}'"))
        shell.virsh("net-define", str(path))
        stale.write_text(conf)  # libvirt takes it away with a network's definition, a crash does not
        shell.run("doctor", "--fix")
        assert not Path(f"/sys/class/net/{bridge}").exists()
        dnsmasq.wait(10)
    finally:
        dnsmasq.kill()
        dnsmasq.wait()
        subprocess.run(["ip", "link", "delete", bridge], check=False, capture_output=True)
        shell.virsh("net-destroy", "vmctl", check=False)
        shell.virsh("net-undefine", "vmctl", check=False)
    shell.run("create", name, "--image", "micro", "--no-start")


def test_doctor_tells_of_volumes_that_no_vm_has_and_how_to_be_rid_of_one(shell: Shell, name: str) -> None:
    shell.run("disk", "create", f"vmctl/{name}.qcow2", "1M")
    (finding,) = [one for one in shell.json("doctor") if one["name"] == "volumes"]
    assert finding["result"] == "warning" and f"{name}.qcow2" in finding["detail"]
    (mend,) = [one for one in finding["mend"].partition(": ")[2].split("; ") if name in one]
    shell.run(*shlex.split(mend.removeprefix("vmctl ")), "--yes")
    assert name not in json.dumps(shell.json("doctor"))


def test_doctor_finds_and_clears_a_cut_off_creation(shell: Shell, name: str, tmp_path: Path) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    text = shell.virsh("dumpxml", name, "--inactive").replace("<vmctl:vm ", '<vmctl:vm creating="yes" ', 1)
    path = tmp_path / "d.xml"
    path.write_text(text)
    shell.virsh("define", str(path))
    assert f"the creation of {name} was cut off" in shell.run("doctor", check=1).stdout
    shell.run("doctor", "--fix")
    assert name not in shell.virsh("list", "--all", "--name").split()
