"""Traps measured for real, in guests under TCG and, where there is one, under KVM."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import REPO, VMCTL, Shell, volumes
from tests.system.test_session import Person
from vmctl.bench import guests, popek, theorems, trap
from vmctl.bench.compare import Verdict, compare
from vmctl.bench.popek_result import popek_of
from vmctl.bench.result import TrapResult
from vmctl.bench.rows import ROWS
from vmctl.bench.sensitive import INSTRUCTIONS
from vmctl.bench.table import table
from vmctl.bench.trap import Plan
from vmctl.choices import AccelChoice
from vmctl.errors import GuestCommandFailed, Unsupported
from vmctl.events import Event, Warned, silent
from vmctl.hosts import open_host

pytestmark = pytest.mark.system

ELSEWHERE = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock"
SOURCES = REPO / "vmctl/baremetal"
DEADLINES = ("deadline_passed", "deadline_soon")
NOT_UNDER_TCG = {*DEADLINES, "rdmsr_tsc_adjust", "wrmsr_tsc_adjust", "vmcall", "vmmcall"}


def built(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """Another build of the trap guest: in each named source, one text has another put in its place."""
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("*.elf", "__pycache__"))
    for name, old, new in changes:
        text = (folder / name).read_text()
        assert text.count(old) == 1, f"{name} has not once {old!r}"
        (folder / name).write_text(text.replace(old, new))
    subprocess.run([sys.executable, str(folder / "build_hook.py")], check=True)
    return folder / "traps.elf"


def measured(plan: Plan, guest: Path | None = None, uri: str = "qemu:///system") -> TrapResult:
    with open_host(uri) as host:
        return trap.run(host, plan, AccelChoice.TCG, silent, guest=guest)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """One table under TCG, by the command line."""
    shell = Shell()
    before = volumes(shell)
    found: dict[str, Any] = shell.json("bench", "trap", "--accel", "tcg", "--quick")
    assert volumes(shell) == before and "vmctl-bench" not in shell.virsh("list", "--all", "--name")
    return found


def test_every_row_has_its_figures_or_its_reason(whole: dict[str, Any]) -> None:
    lines = {line["name"]: line for line in whole["table"]}
    assert list(lines) == [row.name for row in ROWS]
    assert {name for name, line in lines.items() if not line["guests"]} == NOT_UNDER_TCG
    assert all(lines[name]["note"] for name in NOT_UNDER_TCG)
    assert all(line["guests"] == 3 and line["parts"] >= 15 for name, line in lines.items() if name not in NOT_UNDER_TCG)
    assert whole["complete"] and whole["dimensions"]["accelerator"] == "tcg" and not whole["dimensions"]["interpreted"]
    assert {guest["clock"] for guest in whole["guests"]} <= {"hpet", "cpuid", "pit"}


def test_the_figures_are_plausible(whole: dict[str, Any]) -> None:
    """Ratios that follow from what is done, with wide margins: the machine is shared."""
    gross = {line["name"]: line["gross_cycles"] for line in whole["table"]}
    net = {line["name"]: line["net_cycles"] for line in whole["table"]}
    assert 5 < gross["loop"] < 400 and net["loop"] == 0
    assert gross["nops"] < 3 * gross["loop"], "a thousand NOPs are translated once"
    assert net["cr0_toggle_wp"] > 5 * net["cpuid"] and net["cr3_reload"] > 5 * net["cpuid"], "they flush the TLB"
    assert net["bell_mmio_eventfd"] > 1.5 * net["bell_mmio"], "an eventfd is a system call, under TCG on top"
    assert net["pf"] > net["cr8_read"] and net["self_ipi"] > net["in_kernel"]
    timer = next(line for line in whole["table"] if line["name"] == "timer_wake")
    khz = whole["guests"][0]["khz"]
    assert timer["gross_cycles"] > 50 * khz / 1000, "nobody wakes before the time"
    assert timer["gross_cycles"] - timer["net_cycles"] == pytest.approx(50 * khz / 1000 + gross["loop"], rel=0.01)


def test_the_rate_is_the_kernels_own(whole: dict[str, Any]) -> None:
    """Where this machine's kernel says what its TSC has, by its log or its CPU's name, the guest has found the same."""
    rates = [guest["khz"] for guest in whole["guests"]]
    assert max(rates) / min(rates) < 1.01
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout
    if match := re.search(r"tsc: (?:Detected|Refined TSC clocksource calibration:) (\d+\.\d+) MHz", log):
        assert rates[0] == pytest.approx(float(match[1]) * 1000, rel=0.01)


def test_a_whole_batch_is_fifty_milliseconds(tmp_path: Path) -> None:
    """Also where the calls that make a part were counted while others had the CPU, and are far too few."""
    plan = Plan(guests=1, rows=("loop", "cpuid", "cr3_reload"))
    disturbed = built(tmp_path / "few", ("traps.c", "return calls * part_ticks / took + 1;", "return 1;"))
    for found in (measured(plan), measured(plan, disturbed)):
        batch = 0.05 * found.guests[0].khz * 1000
        for row in found.rows:
            (run,) = row.runs
            assert sum(run.ticks) >= batch, (row.name, run)
            # Where others had the CPU for most of each part, twice the time is enough.
            assert len(run.ticks) >= 20 or sum(run.ticks) >= 2 * batch, (row.name, run)


def test_kept_listed_shown_and_checked(shell: Shell, whole: dict[str, Any]) -> None:
    (one,) = [kept for kept in shell.json("bench", "list") if kept["id"] == whole["id"]]
    assert one["complete"] and not one["problem"]
    shown = shell.json("bench", "show", whole["id"])
    assert shown["rows"] == whole["rows"] and shown["table"] == whole["table"]
    assert "no change" in shell.run("bench", "compare", whole["id"], whole["id"]).stdout


def test_a_slowed_row_is_found_and_no_other(tmp_path: Path) -> None:
    """The same guest, and one in which CPUID is done eight times: beyond what a busy machine does to five guests."""
    rows = ("loop", "cpuid", "rdtsc", "cr8_read", "dr7_write")
    plan = Plan(guests=5, parts=40, rows=rows)
    eight = "; xor %%eax, %%eax; ".join(["cpuid"] * 8)
    slow = built(tmp_path / "slow", ("rows.c", 'volatile("cpuid" : :', f'volatile("{eight}" : :'))
    for _ in range(3):  # one guest of the five that a busy machine held up hides it
        before, after = measured(plan), measured(plan, slow)
        changes = {change.name: change for change in compare(before, after).changes}
        if changes["cpuid"].verdict is Verdict.SLOWER:
            break
    assert changes["cpuid"].verdict is Verdict.SLOWER and changes["cpuid"].ratio > 1.2, changes
    assert all(change.verdict is not Verdict.SLOWER for name, change in changes.items() if name != "cpuid"), changes


def test_rows_that_end_their_guest_are_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row that faults where nothing expects it, one that ends the machine, one that never ends."""
    monkeypatch.setattr(trap, "_SILENT_S", 3.0)
    bad = built(
        tmp_path / "bad",
        ("rows.c", '__asm__ volatile("rdtsc" ::: "rax", "rdx");', "*(volatile int *)0x40000000;"),
        ("rows.c", '__asm__ volatile("cpuid" : : "a"(0), "c"(0) : "rbx", "rdx", "cc");', "power_off();"),
        ("rows.c", '__asm__ volatile("mov %%cr0, %%rax" ::: "rax");', 'for (;;) __asm__ volatile("");'),
    )
    found = measured(Plan(guests=2, parts=10, rows=("loop", "rdtsc", "cpuid", "cr0_read", "cr8_read")), bad)
    rows = {row.name: row for row in found.rows}
    assert rows["rdtsc"].failed.startswith("unexpected trap 14 at 0x")
    assert rows["cpuid"].failed == "the guest ended" and rows["cr0_read"].failed == "the guest said nothing for 3 s"
    assert [len(rows[name].runs) for name in ("loop", "rdtsc", "cpuid", "cr0_read", "cr8_read")] == [2, 0, 0, 0, 2]
    # One guest for each of the two that can be heard to the end, two for the one that vanished, one for what is left.
    assert len(found.guests) == 6 and {line.note for line in table(found) if line.name == "cpuid"} == {
        "the guest ended"
    }


def test_a_guest_that_never_begins(tmp_path: Path) -> None:
    mute = built(tmp_path / "mute", ("traps.c", '    print("vmctl-trap 1\\n");', "    power_off();"))
    with pytest.raises(GuestCommandFailed, match="before its first row"):
        measured(Plan(guests=1, rows=("loop",)), mute)


def test_a_qemu_without_the_test_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trap, "_TEST_DEVICE", ("-device", "vmctl-no-such-device"))
    found = measured(Plan(guests=2, parts=10, rows=("loop", "bell_mmio", "bell_port_eventfd")))
    rows = {row.name: row for row in found.rows}
    assert rows["bell_mmio"].skipped == rows["bell_port_eventfd"].skipped == "QEMU has no pci-testdev there"
    assert len(rows["loop"].runs) == 2


def test_a_count_of_instructions_is_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trap, "_TEST_DEVICE", ("-icount", "shift=0"))
    with pytest.raises(Unsupported, match="counts instructions"):
        measured(Plan(guests=1, rows=("loop",)))


def test_a_machine_without_hpet_is_timed_by_the_pit(whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trap, "_TEST_DEVICE", ("-machine", "hpet=off"))
    found = measured(Plan(guests=1, parts=10, rows=("loop", "mmio_hpet")))
    assert found.guests[0].clock == "pit" and found.rows[1].skipped == "this machine has no HPET"
    assert found.guests[0].khz == pytest.approx(whole["guests"][0]["khz"], rel=0.005)


def test_a_host_elsewhere(tmp_path: Path) -> None:
    found = measured(Plan(guests=1, parts=10, rows=("loop", "cpuid")), uri=ELSEWHERE)
    assert found.rows[1].runs and found.head.environment["uri"] == ELSEWHERE
    assert "mitigations" not in found.head.environment, "what cannot be seen from here is not told"


def test_one_measurement_at_a_time_and_an_interrupt_leaves_nothing(shell: Shell) -> None:
    before, kept = volumes(shell), {one["id"] for one in shell.json("bench", "list")}
    words = [*VMCTL, "bench", "trap", "--accel", "tcg", "--row", "cpuid", "--guests", "100", "-v"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO)
    try:
        deadline = time.monotonic() + 60
        new: list[dict[str, Any]] = []
        while not new and time.monotonic() < deadline:
            new = [one for one in shell.json("bench", "list") if one["id"] not in kept]
        assert new and not new[0]["complete"]
        assert "another vmctl is at it" in shell.run("bench", "trap", "--row", "cpuid", check=5).stderr
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert volumes(shell) == before and "vmctl-bench" not in shell.virsh("list", "--all", "--name")
    partial = shell.json("bench", "show", new[0]["id"])
    assert not partial["complete"] and partial["rows"][1]["runs"], "what was measured until then is kept"


def test_a_killed_run_is_no_hindrance(shell: Shell) -> None:
    before = volumes(shell)
    words = [*VMCTL, "bench", "trap", "--accel", "tcg", "--row", "cpuid", "--guests", "100"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPO)
    deadline = time.monotonic() + 60
    while "vmctl-bench-trap" not in shell.virsh("list", "--name") and time.monotonic() < deadline:
        pass
    process.kill()
    process.wait(10)
    shell.run("bench", "trap", "--accel", "tcg", "--row", "cpuid", "--guests", "1")
    assert volumes(shell) == before


@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this machine has no /dev/kvm")
def test_kvm_is_labelled_for_what_it_is(shell: Shell) -> None:
    verdict = shell.json("host", "info")["accel"]["kvm"]["verdict"]
    if verdict not in {"works", "interpreted"}:
        pytest.skip(f"KVM here: {verdict}")
    heard: list[Event] = []
    with open_host("qemu:///system") as host:
        plan = Plan(guests=1, parts=5, rows=("loop", "nops", "in_kernel", "in_user", *DEADLINES, "int"))
        found = trap.run(host, plan, AccelChoice.KVM, heard.append)
    lines = {line.name: line for line in table(found)}
    interpreted = found.head.dimensions["interpreted"]
    assert interpreted == (verdict == "interpreted")
    # One guest beside other work: that they are measured, not what they cost. TCG has no such timer as in the last two.
    assert all(lines[name].gross_cycles > 0 for name in ("in_kernel", "in_user", *DEADLINES)), lines
    if interpreted:
        assert lines["nops"].net_cycles > 20_000 and "interpreter" in lines["nops"].handled_by
        assert any(isinstance(event, Warned) and "interprets" in event.text for event in heard)
        told = shell.run("bench", "show", found.head.id).stdout
        assert "interpreted by the kernel: not a CPU's figures" in told
    else:
        assert lines["nops"].net_cycles < 20_000 and lines["int"].guests


@pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this machine has no /dev/kvm")
def test_the_theory_under_kvm(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some instructions that every KVM knows, and the properties."""
    verdict = shell.json("host", "info")["accel"]["kvm"]["verdict"]
    if verdict not in {"works", "interpreted"}:
        pytest.skip(f"KVM here: {verdict}")
    some = ("sgdt", "popf", "mov_cs", "hlt", "cli", "add")
    monkeypatch.setattr(theorems, "names", lambda: some)
    with open_host("qemu:///system") as host:
        (machine,) = popek.run(host, AccelChoice.KVM, silent).machines
    found = {one.name: one for one in machine.outcomes}
    assert tuple(found) == some and machine.interpreted == (verdict == "interpreted")
    assert found["hlt"].finding == found["cli"].finding == "privileged" and found["add"].finding == "innocuous"
    assert found["popf"].finding == "sensitive and silent"
    assert machine.work and machine.work_user and machine.work.digest == machine.work_user.digest
    assert machine.work.digest == machine.native_digest and machine.ended_in_s is not None
    efficiency = next(one for one in theorems.statements(machine) if one.title.startswith("efficiency"))
    if verdict == "works":
        assert efficiency.holds == "yes" and found["mov_cs"].finding == "sensitive and silent"
    else:
        assert efficiency.holds in {"in user mode", "no"}


def test_results_are_private_to_their_user(whole: dict[str, Any]) -> None:
    path = Path("~/.local/share/vmctl/bench").expanduser() / f"{whole['id']}.json"
    assert json.loads(path.read_text())["id"] == whole["id"] and path.stat().st_mode & 0o077 == 0


@pytest.fixture(scope="module")
def theory() -> dict[str, Any]:
    """Popek and Goldberg under TCG, by the command line."""
    shell = Shell()
    before = volumes(shell)
    found: dict[str, Any] = shell.json("bench", "popek-goldberg", "--accel", "tcg")
    assert volumes(shell) == before and "vmctl-bench" not in shell.virsh("list", "--all", "--name")
    return found


def test_the_instructions_do_under_tcg_what_a_cpu_does(theory: dict[str, Any]) -> None:
    """The list as measured by others: with UMIP off, with UMIP on, and what always traps."""
    (machine,) = theory["machines"]
    found = {one["name"]: one for one in machine["instructions"]}
    silent = {name for name, one in found.items() if one["tries"].get("user", {}).get("trap", 0) is None}
    always = "sgdt sidt sldt smsw str pushf popf lar lsl verr verw pop_fs mov_cs ret_far cpuid rdtsc".split()
    assert silent >= set(always) and machine["umip"]
    assert {n for n in silent if found[n]["tries"]["umip"]["trap"] == 13} == {"sgdt", "sidt", "sldt", "smsw", "str"}
    for name in "hlt cli mov_from_cr0 in rdmsr lgdt swapgs rdtsc_tsd xsetbv".split():
        assert found[name]["tries"]["user"]["trap"] == 13 and found[name]["finding"] == "privileged", name
    assert found["clac"]["tries"]["user"]["trap"] == 6 and found["clac"]["finding"] == "privileged"
    # The kernel's CS; the rights that it had set; what it found written.
    shown = {"syscall": "0x8", "rdpkru": "0xfffffff0", "wrgsbase": "0x1000", "wrpkru": "0x55555550"}
    for name, value in shown.items():
        assert found[name]["tries"]["user"]["value"] == found[name]["tries"]["kernel"]["value"] == value, name
    assert silent >= {"rdfsbase", *shown} and found["rdfsbase"]["tries"]["user"]["value"]
    result = popek_of(theory)
    assert popek.sound(result.machines) == []
    assert not {one["name"] for one in found.values() if one["finding"] == "silent, and not the guest's"}


def test_the_verdict_under_tcg(theory: dict[str, Any]) -> None:
    assert [one["holds"] for one in theory["verdicts"]["tcg"]] == ["no", "no", "no", "no", "yes", "yes"]
    (machine,) = theory["machines"]
    assert machine["work"]["digest"] == machine["work_user"]["digest"] == machine["native_digest"]
    assert 4_000_000 < machine["instructions_counted"] < 12_000_000 and machine["work"]["interventions"] == 200
    assert (
        machine["reach"] == {"looked": 1024 - guests.MEMORY_MIB, "answered": 0, "kept": 0}
        and 0 < machine["ended_in_s"] < 20
    )


def test_instructions_that_end_their_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LAR ends the machine, STR hangs in user mode: told, and all others are tried. What writes nothing is no proof."""
    monkeypatch.setattr(popek, "_TRY_SILENT_S", 2.0)
    bad = built(
        tmp_path / "bad",
        ("sensitive.c", "lar %%ecx, %%eax;", "mov $0x2000, %%eax; mov $0x604, %%edx; out %%ax, %%dx; 5: jmp 5b;"),
        ("sensitive.c", "str %%ax;", "mov %%cs, %%ecx; test $3, %%ecx; 6: jnz 6b;"),
        ("sensitive.c", "wrgsbase %%rax;", ""),
        ("sensitive.c", "wrpkru; xor %%eax, %%eax;", "xor %%eax, %%eax;"),
    )
    monkeypatch.setattr(guests, "compiled", lambda _name: (bad.parent / "popek.elf").read_bytes())
    with open_host("qemu:///system") as host:
        (machine,) = popek.run(host, AccelChoice.TCG, silent).machines
    found = {one.name: one for one in machine.outcomes}
    assert list(found) == [one.name for one in INSTRUCTIONS]
    assert (found["lar"].finding, found["lar"].note) == ("ended the guest", "the guest ended")
    assert (found["str"].finding, found["str"].note) == ("ended the guest", "the guest said nothing for 2 s")
    assert found["lsl"].finding == found["mov_cs"].finding == "sensitive and silent"
    assert found["wrgsbase"].finding == found["wrpkru"].finding == "silent, and not the guest's"


def test_without_root() -> None:
    found = Person().json("bench", "trap", "--accel", "tcg", "--row", "cpuid", "--guests", "1")
    assert found["rows"][1]["runs"] and found["environment"]["uri"] == "qemu:///session"
