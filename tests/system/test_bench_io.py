"""Disk and network I/O measured for real: fio in guests and on the host; iperf3 and sockperf over all links."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import REPO, VMCTL, Shell
from vmctl import json_schema
from vmctl.bench import fio, io, links, registers, setups, store, traffic
from vmctl.bench.setups import Backend, Device, Setup
from vmctl.wait import wait_until
from vmctl.workspace import workspace

# Minutes on a machine that others keep busy: the first test waits for the image and for six guests.
pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

QEMU = "qemu-system-x86_64"
SHORT = ("--accel", "tcg", "--rounds", "1", "--length", "50", "--size", "8")


def processes(program: str) -> list[int]:
    """Processes of that program; of QEMU those that are guests of these measurements."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if words[0].endswith(program) and (program != QEMU or "vmctl-bench" in words):
            found.append(int(path.parent.name))
    return found


def qemus() -> list[int]:
    return processes(QEMU)


def leftovers(folder: Path) -> list[Path]:
    """Folders that a measurement works in."""
    return [path for place in (folder, Path("/var/lib/libvirt/vmctl")) for path in place.rglob(".measuring-*")]


@pytest.fixture(scope="module")
def shell() -> Shell:
    """vmctl on qemu:///system."""
    return Shell()


@pytest.fixture(scope="module", autouse=True)
def bench_image(shell: Shell) -> Iterator[None]:
    """The image, from packages that tests/prepare has fetched; whoever lacks it is told how to make it."""
    told = shell.run("bench", "io", "--quick", check=4).stderr
    assert "hint: make it: vmctl image build bench" in told
    shell.run("image", "build", "bench", timeout=300)
    yield
    shell.run("image", "delete", "bench", "--yes", check=None)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder on the machine's own disk: the pools of a test host are on tmpfs, which need not know O_DIRECT."""
    with workspace(Path.home() / ".cache/vmctl", "bench-test-") as place:
        yield place


@pytest.fixture(scope="module")
def disks(shell: Shell, folder: Path) -> dict[str, Any]:
    """A quick look at disks, by the command line."""
    words = ("--quick", "--accel", "tcg", "--size", "16", "--length", "80", "--folder", str(folder))
    found = asked(shell, "bench", "io", *words)
    assert not qemus() and not leftovers(folder)
    return found


def asked(shell: Shell, *words: str) -> dict[str, Any]:
    """What a measurement prints, however long it takes."""
    found: dict[str, Any] = json.loads(shell.run(*words, "-o", "json", timeout=600).stdout)
    return found


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["rows"]}


def figures(result: dict[str, Any], measure: str) -> dict[str, dict[str, Any]]:
    return {line["row"]: line for line in result["table"] if line["measure"] == measure}


def test_every_disk_has_every_figure(disks: dict[str, Any], folder: Path) -> None:
    assert disks["complete"] and json_schema.errors(store.schema(), disks) == []
    assert [row["name"] for row in disks["rows"]] == [row.name for row in setups.with_ceilings(setups.QUICK)]
    for name, row in by_name(disks).items():
        assert not row["skipped"] and not row["failed"], (name, row["skipped"], row["failed"])
        assert [one["name"] for one in row["measures"]] == [job.name for job in fio.JOBS]
        for measure in row["measures"]:
            (sample,) = measure["samples"]
            assert sample["details"]["host_cpu_ns_per_io"] > 0, (name, measure["name"])
    assert disks["environment"]["guest_kernel"].endswith("-amd64") and disks["environment"]["guest_clock"]
    mounted = subprocess.run(["findmnt", "-n", "-o", "FSTYPE", "--target", folder], capture_output=True, text=True)
    assert disks["environment"]["storage"]["filesystem"] == mounted.stdout.strip()


def test_registers_are_counted_and_tell_the_devices_apart(disks: dict[str, Any]) -> None:
    rows = by_name(disks)
    each = {row["setting"]["device"]: row["counted"] for row in disks["rows"] if row["setting"]["backend"] == "null"}
    assert set(each) == set(setups.GUEST_DEVICES) and rows["virtio-blk raw none native"]["counted"] is None
    total = {device: found["reads"] + found["writes"] for device, found in each.items()}
    assert 0.9 < total["virtio-blk"] < 2 and 0.9 < total["virtio-scsi"] < 2, "a doorbell for each, and hardly more"
    assert 1.9 < total["nvme"] < 3, "two doorbells"
    assert total["ide"] > 15 and total["ide"] > total["sata"] > total["nvme"]
    assert each["ide"]["reads"] > 5 and each["nvme"]["reads"] < 0.1, "NVMe has nothing to read"


def test_the_figures_are_plausible(disks: dict[str, Any]) -> None:
    """What others' work on the machine cannot turn round: one short round is a rough look, of a busy one."""
    iops = figures(disks, "read-iops")
    cost = {name: line["details"]["host_cpu_ns_per_io"] for name, line in iops.items()}
    assert cost["host raw none"] < cost["virtio-blk raw none native"], "a guest's is the host's and more"
    for line in iops.values():
        # So many in a second at so much CPU time: no more than the CPUs of the host, and a little for what is not I/O.
        assert line["median"] * line["details"]["host_cpu_ns_per_io"] < 1.5e9 * (disks["environment"]["cpus"] + 1)


def test_kept_shown_and_compared(shell: Shell, disks: dict[str, Any]) -> None:
    shown = shell.json("bench", "show", disks["id"])
    assert shown["rows"] == disks["rows"] and shown["table"] == disks["table"]
    text = shell.run("bench", "show", disks["id"], "--explain").stdout
    assert "READ us" in text and "REGISTERS" in text and "null-co" in text
    assert "no change" in shell.run("bench", "compare", disks["id"], disks["id"]).stdout


def test_what_cannot_be_had_is_skipped_with_its_reason(shell: Shell, folder: Path) -> None:
    """By QEMU's own words, in one guest with what can."""
    found = by_name(
        asked(shell,
            "bench", "io", *SHORT, "--folder", str(folder), "--device", "virtio-scsi", "--device", "nvme",
            "--backend", "null", "--backend", "qcow2+5", "--cache", "writeback", "--iothread",
            "--aio", "native", "--aio", "threads",
        )
    )  # fmt: skip
    assert found["nvme null iothread"]["skipped"] == "Property 'nvme.iothread' not found"
    assert "requires cache.direct=on" in found["virtio-scsi qcow2+5 writeback native iothread"]["skipped"]
    for name in ("virtio-scsi null iothread", "virtio-scsi qcow2+5 writeback threads iothread", "host raw writeback"):
        assert len(found[name]["measures"]) == len(fio.JOBS) and not found[name]["skipped"], found[name]


def test_a_folder_that_is_none(shell: Shell) -> None:
    told = shell.run("bench", "io", "--quick", "--folder", "/nonexistent", check=4).stderr
    assert "cannot measure in /nonexistent: there is no such folder\nhint: --folder" in told


def test_a_file_system_without_direct_io(shell: Shell, tmp_path: Path) -> None:
    """ramfs is one on every kernel."""
    subprocess.run(["mount", "-t", "ramfs", "none", str(tmp_path)], check=True)
    try:
        found = by_name(asked(shell, "bench", "io", *SHORT, "--backend", "raw", "--folder", str(tmp_path)))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert all(row["skipped"] and not row["measures"] for row in found.values()), found
    assert "O_DIRECT" in found["virtio-blk raw none native"]["skipped"]


def test_a_driver_that_the_guest_lacks(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmctl.choices import AccelChoice
    from vmctl.events import silent
    from vmctl.hosts import open_host

    monkeypatch.setitem(setups.DRIVERS, Device.NVME, ("no_such_module",))
    monkeypatch.setattr(registers, "EVENTS", "no_such_event_*")
    rows = (Setup(Device.NVME, Backend.NULL), Setup(Device.VIRTIO_BLK, Backend.NULL))
    with open_host("qemu:///system") as host:
        found = io.run(host, io.Plan(rows, 1, 50, 8 << 20), AccelChoice.TCG, None, silent)
    assert found.rows[0].skipped == "the guest's kernel has no driver no_such_module" and not found.rows[0].measures
    assert found.rows[1].measures and found.rows[1].counted is None, "a QEMU without trace events measures all the same"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_nothing(shell: Shell, folder: Path, number: signal.Signals) -> None:
    kept = {one["id"] for one in shell.json("bench", "list")}
    words = [*VMCTL, "bench", "io", "--accel", "tcg", "--backend", "null", "--length", "50", "--size", "8"]
    words += ["--folder", str(folder), "--rounds", "100"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO)
    try:
        new: list[dict[str, Any]] = []

        def measured() -> bool:
            new[:] = [one for one in shell.json("bench", "list") if one["id"] not in kept]
            return bool(new)

        wait_until(measured, what="the first figures", timeout_s=60)
        wait_until(lambda: bool(qemus()) or process.poll() is not None, what="the next guest", timeout_s=60)
        assert process.poll() is None, process.communicate()
        assert leftovers(folder) and not new[0]["complete"]
        assert "another vmctl is at it" in shell.run("bench", "io", "--quick", check=5).stderr
        process.send_signal(number)
        process.communicate(timeout=30)
    finally:
        process.kill()
    wait_until(lambda: not qemus(), what="QEMU to end with vmctl", timeout_s=10)
    if number is signal.SIGINT:
        assert process.returncode == 130 and not leftovers(folder)
    else:
        shell.run("bench", "io", *SHORT, "--backend", "null", "--device", "nvme", "--iothread", "--folder", str(folder))
        assert not leftovers(folder), "the next run clears up"
    partial = shell.json("bench", "show", new[0]["id"])
    assert not partial["complete"] and partial["rows"][0]["measures"], "what was measured until then is kept"


def test_a_guest_that_ends_is_told_and_the_rest_goes_on(folder: Path) -> None:
    """QEMU is killed in the middle of a row; the row is told, a new guest does the one after it."""
    words = [*VMCTL, "bench", "io", "--accel", "tcg", "--backend", "null", "--device", "virtio-blk", "--device", "nvme"]
    words += ["--rounds", "1", "--length", "700", "--size", "8", "--folder", str(folder), "-o", "json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO) as process:
        try:
            wait_until(lambda: any(io.BEGINS in console() for console in consoles(folder)), what="fio", timeout_s=60)
            for pid in qemus():
                subprocess.run(["kill", "-KILL", str(pid)], check=True)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    found = by_name(json.loads(out))
    assert "it is gone" in found["virtio-blk null"]["failed"] and found["nvme null"]["measures"], err


def consoles(folder: Path) -> list[Callable[[], str]]:
    """What guests say on their consoles."""
    files = [place / "console" for place in leftovers(folder)]
    return [lambda path=path: path.read_text(errors="replace") for path in files if path.exists()]  # type: ignore[misc]


@pytest.fixture(scope="module")
def network(shell: Shell, folder: Path) -> dict[str, Any]:
    """A quick look at links, by the command line."""
    before = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    found = asked(shell, "bench", "net", "--quick", "--accel", "tcg")
    assert not qemus() and not leftovers(folder)
    assert subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout == before
    return found


def test_every_link_has_every_figure(network: dict[str, Any]) -> None:
    assert network["complete"] and json_schema.errors(store.schema(), network) == []
    rows = by_name(network)
    assert list(rows) == [
        "virtio-net tap", "virtio-net tap vhost", "e1000 tap", "virtio-net user", "e1000 user", "veth", "loopback",
    ]  # fmt: skip
    for name, row in rows.items():
        if name == "virtio-net tap vhost" and not Path("/dev/vhost-net").exists():
            assert "/dev/vhost-net is not there" in row["skipped"] and not row["measures"]
            continue
        assert not row["skipped"] and not row["failed"], (name, row["skipped"], row["failed"])
        assert [one["name"] for one in row["measures"]] == [flow.name for flow in traffic.FLOWS], name
    trips = figures(network, "round-trip")
    assert trips["virtio-net tap"]["details"]["host_cpu_ns_per_io"] > 0
    assert trips["loopback"]["median"] < trips["virtio-net tap"]["median"], "loopback is the ceiling"
    assert trips["veth"]["median"] < trips["e1000 tap"]["median"]


def test_user_mode_stands_apart_and_is_not_compared_with_tap(shell: Shell, network: dict[str, Any]) -> None:
    text = shell.run("bench", "show", network["id"]).stdout
    tap, title, user = text.partition("user mode: the figures are of slirp in QEMU, not of the card")
    assert title and "e1000       user" in user and "user  " not in tap
    only = [asked(shell, "bench", "net", "--quick", "--path", path)["id"] for path in ("loopback", "veth")]
    refused = shell.run("bench", "compare", *only, check=2).stderr
    assert "paths is loopback before and veth after" in refused
    assert "no change" in shell.run("bench", "compare", network["id"], network["id"]).stdout


def test_a_killed_run_leaves_no_server_and_no_namespace(shell: Shell) -> None:
    words = [*VMCTL, "bench", "net", "--path", "loopback", "--rounds", "50"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPO)
    try:
        wait_until(
            lambda: len(processes("iperf3")) > 1 and bool(processes("sockperf")), what="the servers", timeout_s=60
        )
    finally:
        process.kill()
        process.wait(10)
    wait_until(
        lambda: not [one for name in ("iperf3", "sockperf", "cat") for one in processes(name)],
        what="their end", timeout_s=10,
    )  # fmt: skip
    left = leftovers(Path("/var/lib/libvirt/vmctl"))
    told = shell.run("doctor", check=None).stdout
    assert left and "a measurement was killed" in told and all(str(one) in told for one in left)
    assert "no VM knows of" not in told
    assert "a measurement was killed" in shell.run("doctor", "--fix", check=None).stdout
    assert not leftovers(Path("/var/lib/libvirt/vmctl"))


def test_namespaces_without_root() -> None:
    """A user's own: with a link between them, a server that is waited for, and nothing left."""
    script = """
from vmctl.bench import net
from vmctl.bench.namespaces import two_namespaces
with two_namespaces() as (far, near):
    far.run("ip", "link", "add", "veth1", "type", "veth", "peer", "eth0", "netns", str(near.pid))
    for where, card, address in ((far, "veth1", "10.199.1.1/24"), (near, "eth0", "10.199.1.2/24")):
        where.run("ip", "address", "add", address, "dev", card)
        where.run("ip", "link", "set", card, "up")
    with far.serving(net._SERVERS):
        print(near.run("iperf3", "-c", "10.199.1.1", "-n", "1M"))
"""
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = subprocess.run([*become, sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO, timeout=60,
                          check=False)  # fmt: skip
    assert done.returncode == 0 and "iperf Done." in done.stdout, done.stderr
    assert not processes("iperf3") and not processes("sockperf")


def test_a_server_that_is_busy_is_waited_for(tmp_path: Path) -> None:
    """It has one client at a time, and may be long in seeing that one has gone."""
    port = str(links.TCP_PORT)
    with subprocess.Popen(["iperf3", "-s", "-p", port, "--forceflush"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            next(line for line in server.stdout if "listening" in line)
            with subprocess.Popen(["iperf3", "-c", "127.0.0.1", "-p", port, "-t", "4"], stdout=subprocess.DEVNULL):
                next(line for line in server.stdout if "Accepted" in line)
                words = ["sh", "-c", traffic.script(traffic.BY_NAME["send"], "127.0.0.1", 1)]
                done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
            assert traffic.read(traffic.BY_NAME["send"], done.stdout).value > 0
        finally:
            server.kill()
