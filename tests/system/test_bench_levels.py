"""Levels of virtualization, the sheet of a VM, a run of everything and its report, for real."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import REPO, VMCTL, Shell, volumes
from vmctl import json_schema
from vmctl.bench import levels_words, places, store
from vmctl.bench.levels_result import WORKS, figures, levels_of
from vmctl.bench.sheet_result import entries, sheet_of
from vmctl.wait import wait_until

pytestmark = pytest.mark.system


def leftovers(shell: Shell) -> tuple[set[str], list[str], list[str]]:
    """Volumes, domains and files that a measurement might leave."""
    files = [*Path("/dev/shm").glob("vmctl-*"), *Path("~/.cache/vmctl").expanduser().glob(".levels-*")]
    domains = [one for one in shell.virsh("list", "--all", "--name").split() if one.startswith("vmctl-bench")]
    return volumes(shell), domains, [str(one) for one in files]


@pytest.fixture(scope="module")
def some() -> dict[str, Any]:
    """Three levels and the shares, by the command line."""
    shell = Shell()
    before = leftovers(shell)
    words = [word for level in ("qemu-user", "container", "tcg", "shares") for word in ("--level", level)]
    found: dict[str, Any] = shell.json("bench", "levels", "--quick", *words)
    assert leftovers(shell) == before
    assert json_schema.errors(store.schema(), found) == []
    return found


def test_every_row_on_every_level(some: dict[str, Any]) -> None:
    levels = {level["name"]: level for level in some["levels"]}
    assert list(levels) == ["native", "container", "qemu-user", "tcg"]
    for name in ("native", "qemu-user", "tcg"):
        assert not levels[name]["skipped"] and not levels[name]["failed"], levels[name]
        assert [row["name"] for row in levels[name]["rows"]] == [work.name for work in WORKS]
        assert all(len(row["runs"]) == 3 and len(row["runs"][0]["ns"]) == 5 for row in levels[name]["rows"]), name
    assert levels["container"]["rows"] or levels["container"]["skipped"]


def test_the_levels_cost_what_they_are(some: dict[str, Any]) -> None:
    """Ratios that follow from how each works, with wide margins: the machine is shared."""
    found = figures(levels_of(some))
    cost = {(row, level): one.times or 0.0 for row, by in found.items() for level, one in by.items()}
    assert all(cost[row.name, "native"] == 1 for row in WORKS)
    assert cost["float", "tcg"] > 3 and cost["float", "qemu-user"] > 3, "SSE is emulated by calls"
    assert cost["page_fault", "tcg"] > 2 * cost["page_fault", "qemu-user"], "qemu-user leaves the pages to the host"
    assert 0.2 < found["syscall"]["native"].ns / 100 < 100 and found["float"]["native"].ns < 10
    assert cost["syscall", "tcg"] > 1.5


def test_what_a_test_host_lacks_is_told_in_libvirts_words(some: dict[str, Any]) -> None:
    assert some["shares"]["skipped"].startswith("cannot run guests that compete: ")
    assert "cgroup CPU controller is not mounted" in some["shares"]["skipped"]
    container = next(one for one in some["levels"] if one["name"] == "container")
    assert container["skipped"].startswith("cannot run a container: ")


def test_a_container_and_fair_shares_where_there_are_cgroups() -> None:
    words = [*VMCTL, "bench", "levels", "--quick", "--level", "container", "--level", "shares", "-o", "json"]
    build = " ".join([*VMCTL, "image", "build", "micro"])
    inside = f"{build} >&2 && {' '.join(words)}"
    argv = ["unshare", "--mount", str(REPO / "tests/testhost/cgroups.sh"), "sh", "-c", inside]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280, cwd=REPO, check=False)
    if done.returncode == 77:
        pytest.skip("this kernel has no cgroup hierarchies of version 1")
    assert done.returncode == 0, done.stderr
    result = levels_of(json.loads(done.stdout))
    container = result.levels[-1]
    assert container.name == "container" and not container.skipped and not container.failed, container
    assert [row.name for row in container.rows if row.runs] == [work.name for work in WORKS]
    found = figures(result)
    assert 0.3 < (found["integer"]["container"].times or 0) < 3, "a container computes on the same CPU"
    assert result.shares is not None and not result.shares.skipped, result.shares
    for weight, promised, received in result.shares.lines():
        assert received == pytest.approx(promised, rel=0.25), weight


def test_shown_compared_reported(some: dict[str, Any], tmp_path: Path) -> None:
    shell = Shell()
    shown = shell.run("bench", "show", some["id"]).stdout
    assert "The cost of each level of virtualization" in shown and "system call" in shown
    assert "no change" in shell.run("bench", "compare", some["id"], some["id"]).stdout
    html, png = tmp_path / "report.html", tmp_path / "report.png"
    shell.run("bench", "report", some["id"], "--html", str(html), "--png", str(png))
    assert some["id"] in html.read_text() and png.read_bytes().startswith(b"\x89PNG")


def test_a_guest_within_a_guest() -> None:
    shell = Shell()
    before = leftovers(shell)
    words = ["--level", "nested", "--row", "integer", "--row", "syscall"]
    done = shell.run("bench", "levels", "--quick", *words, "-o", "json", timeout=290)
    result = levels_of(json.loads(done.stdout))
    nested = result.levels[-1]
    assert nested.name == "nested" and not nested.skipped and not nested.failed, nested
    assert nested.detail == "emulated (TCG) within TCG"
    found = figures(result)
    assert (found["integer"]["nested"].times or 0) > 5 and (found["syscall"]["nested"].times or 0) > 20
    assert leftovers(shell) == before


@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this machine has no /dev/kvm")
def test_kvm_is_measured_or_told_for_what_it_is() -> None:
    shell = Shell()
    verdict = shell.json("host", "info")["accel"]["kvm"]["verdict"]
    found = shell.json("bench", "levels", "--quick", "--level", "kvm", "--row", "integer")
    kvm = found["levels"][-1]
    if verdict == "works":
        assert kvm["rows"] and not kvm["failed"]
    elif verdict == "interpreted":
        assert "interprets" in kvm["detail"] and (kvm["rows"] or "it said nothing for" in kvm["failed"])
    else:
        assert kvm["skipped"]


@pytest.fixture(scope="module")
def vm() -> Iterator[str]:
    """One running VM for the sheets."""
    shell = Shell()
    shell.run("create", "t-sheet", "--image", "micro", "--vcpus", "2", "--accel", "tcg", "--wait", "agent")
    yield "t-sheet"
    shell.run("delete", "t-sheet", "--yes", check=None)


@pytest.mark.parametrize("via", ["ssh", "agent"])
def test_the_sheet_of_a_vm(vm: str, via: str) -> None:
    shell = Shell()
    shell.run("wait", vm, "--for", "ssh")
    found = shell.json("bench", "sheet", vm, "--via", via)
    assert json_schema.errors(store.schema(), found) == []
    sheet = {one.name: one for one in entries(sheet_of(found))}
    assert all(one.value for one in sheet.values()), sheet
    values = {name: one.value or 0.0 for name, one in sheet.items()}
    assert values["cores"] == 2 and 400 < values["RAM"] / (1 << 20) < 512
    assert 1e6 < values["CPU"] < 1e12 and values["maximal latency"] >= values["average latency"] > 1e-6
    asked = shell.run("exec", vm, "--", "sh", "-c", "cut -d. -f1 /proc/uptime; ls -A /tmp /var/tmp").stdout.split()
    assert 0 <= int(asked[0]) - values["uptime"] < 60
    assert not [one for one in asked if "sheet" in one or one.startswith("tmp.")], "nothing of it is left in the guest"


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_a_sheet_that_is_cut_off_leaves_nothing_in_the_guest(vm: str, by: signal.Signals) -> None:
    shell = Shell()
    shell.run("wait", vm, "--for", "ssh")

    def inside(script: str) -> list[str]:
        return shell.run("exec", vm, "--", "sh", "-c", script).stdout.splitlines()

    def at_work() -> bool:
        return any("sheet=/var/tmp" in line for line in inside("ps"))

    process = subprocess.Popen([*VMCTL, "bench", "sheet", vm], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(at_work, what="program in the guest", timeout_s=60)
        process.send_signal(by)
        process.wait(30)
    finally:
        process.kill()
    wait_until(lambda: not at_work(), what="its end", timeout_s=60)
    assert not [one for one in inside("ls -A /tmp /var/tmp") if one.startswith("tmp.") or "sheet" in one]


def test_a_sheet_that_cannot_be(vm: str) -> None:
    shell = Shell()
    assert "cannot find VM nope" in shell.run("bench", "sheet", "nope", check=4).stderr
    found = shell.json("bench", "sheet", vm, "--folder", "/nowhere")
    lines = {one["name"]: one for one in found["table"]}
    assert lines["CPU"]["figure"]
    for name in ("disk, write", "disk, read", "average latency", "maximal latency"):
        assert "No such file" in lines[name]["skipped"], lines[name]


def test_a_folder_without_room_says_so(tmp_path: Path) -> None:
    """Every row of the disk has a reason, on a kernel whose tmpfs lets the page cache be passed by, and on others."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(tmp_path)], check=True)
    try:
        argv = [str(places.program()), f"sheet={tmp_path}"]
        said = subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    why = levels_words.read(said).skipped
    assert set(why) == {"disk_write", "disk_read", "disk_latency"}
    assert "there is no room for it" in why["disk_write"] or "past the page cache" in why["disk_write"]


def test_a_run_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    shell = Shell()
    before = leftovers(shell)
    words = ["bench", "run", "--quick", "--only", "trap-tcg", "--only", "popek-tcg"]
    process = subprocess.Popen([*VMCTL, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO)
    try:
        assert process.stderr is not None
        told = ""
        while "2 of 2: popek-tcg; all of it in about" not in told:
            line = process.stderr.readline()
            assert line, f"it ended: {told}"
            told += line
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and leftovers(shell) == before
    junit = tmp_path / "junit.xml"
    done = shell.run(*words, "--junit", str(junit), "-o", "json", timeout=200)
    assert "going on with run-" in done.stderr and "1 of 2 parts are through" in done.stderr
    assert "trap-tcg;" not in done.stderr, "what is through is not measured again"
    run = json.loads(done.stdout)
    assert run["complete"] and [one["name"] for one in run["parts"]] == ["trap-tcg", "popek-tcg"]
    assert all(one["result"] for one in run["parts"])
    assert "<testsuite name='trap.tcg'" in junit.read_text() and "name='popek-goldberg.tcg" in junit.read_text()
    assert "What a trap costs" in shell.run("bench", "report", run["id"]).stdout
    again = shell.run(*words[:3], "--only", "nope", check=2).stderr
    assert "there is no part nope on this host" in again


def test_a_part_that_cannot_be_measured_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host with no program to answer a guest's packets."""
    shell, junit = Shell(), tmp_path / "junit.xml"
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["--only", "net", "--only", "trap-tcg", "--junit", str(junit), "-o", "json"]
    done = shell.run("bench", "run", "--quick", "--new", *words, check=14)
    trap, net = json.loads(done.stdout)["parts"]
    assert trap["result"] and not trap["problem"] and net["name"] == "net" and not net["result"]
    assert "iperf3 and sockperf missing" in net["problem"] and "cannot measure 1 of 2 parts" in done.stderr
    assert "<testsuite name='net' tests='1' failures='1'" in junit.read_text()
    # What came to nothing is through: the next run begins anew, and does not try for ever to go on.
    assert "going on with" not in shell.run("bench", "run", "--quick", "--only", "net", check=14).stderr


def test_levels_are_for_this_machine() -> None:
    elsewhere = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock"
    assert "run it on that host" in Shell().run("bench", "levels", "-c", elsewhere, check=8).stderr
