"""Measuring I/O: which rows there are, what QEMU and the tools are told, what is read out of their answers, results."""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import subprocess
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmctl import json_schema, qemu_img
from vmctl.bench import fio, links, registers, setups, store, traffic
from vmctl.bench.compare import Verdict, compare
from vmctl.bench.disk_files import Files
from vmctl.bench.ground import Window, storage_of
from vmctl.bench.machine import Board, Clock, Refused, argv
from vmctl.bench.measured import Measure, Measured, Row, Sample, lines, measured_of
from vmctl.bench.result import Head
from vmctl.bench.setups import Aio, Backend, Cache, Device, Setup
from vmctl.bench.wire import Declined, telling
from vmctl.builder import recipe
from vmctl.choices import Accel
from vmctl.cli import run as vmctl
from vmctl.errors import GuestCommandFailed, SpecError, VmctlError
from vmctl.resources import image_recipes_dir, recipe_source

SAID = Path(__file__).with_name("said")  # by the tools, in real runs
RAW = Setup(Device.VIRTIO_BLK, Backend.RAW, Cache.NONE, Aio.NATIVE)


def test_the_usual_rows_change_one_thing_at_a_time() -> None:
    rows = setups.chosen([], [], [], [], [], quick=False, everything=False)
    assert {row.device for row in rows if row.backend is Backend.NULL} == set(setups.GUEST_DEVICES)
    assert {row.backend for row in rows} == set(Backend) and {row.aio for row in rows} == {*Aio, None}
    assert [row.name for row in rows[-2:]] == ["host raw none", "host raw writeback"]
    assert len(rows) == len(set(rows)) == 20
    quick = setups.chosen([], [], [], [], [], quick=True, everything=False)
    assert set(quick) < set(rows) and quick[-1].name == "host raw none"


def test_what_is_named_is_combined() -> None:
    rows = setups.chosen([Device.NVME, Device.IDE], [Backend.NULL, Backend.QCOW2], list(Cache), [], [], quick=False,
                         everything=False)  # fmt: skip
    assert [row.name for row in rows] == [
        "nvme null", "nvme qcow2 none native", "nvme qcow2 writeback native",
        "ide null", "ide qcow2 none native", "ide qcow2 writeback native", "host raw none", "host raw writeback",
    ]  # fmt: skip
    everything = setups.chosen([], [], [], [], [], quick=False, everything=True)
    # Each file in 2 caches, 3 ways, with and without thread; null with and without; of 5 devices; the host's two.
    assert len(everything) == 5 * (5 * 2 * 3 * 2 + 2) + 2


def test_guests_have_room_for_their_disks() -> None:
    rows = list(enumerate([Setup(Device.IDE, Backend.NULL)] * 6 + [RAW] * 40, 1))
    guests = setups.in_guests(rows)
    assert sorted(one for guest in guests for one in guest) == rows
    assert all(len(guest) <= 22 and sum(s.device is Device.IDE for _, s in guest) <= 4 for guest in guests)


def test_a_chain_is_spelled_out_to_its_last_file() -> None:
    files = [Path(name) for name in ("top", "middle", "last")]
    node = setups.node(replace(RAW, backend=Backend.CHAIN_5), "row1", files, 1)
    seen = []
    at: Any = node
    while at:
        seen.append(
            (at["file"]["filename"], at["file"]["aio"], at["file"]["cache"]["direct"], at.get("read-only", False))
        )
        at = at["backing"]
    assert seen == [("top", "native", True, False), ("middle", "native", True, True), ("last", "native", True, True)]
    assert Backend.CHAIN_20.depth == 20 and Backend.QCOW2.depth == 0


def test_a_chain_has_its_data_in_the_last_file_and_a_new_top_each_time(tmp_path: Path) -> None:
    files = Files(tmp_path, 1 << 20)
    chain = files.of("disk0", replace(RAW, backend=Backend.CHAIN_5))
    assert len(chain) == 6 and len(set(chain)) == 6
    infos = [qemu_img.info(path, "qcow2") for path in chain]
    assert [one.backing_file for one in infos] == [*(str(path) for path in chain[1:]), ""]
    assert {one.virtual_size for one in infos} == {1 << 20}
    assert all(one.actual_size < 1 << 19 for one in infos[:-1]) and infos[-1].actual_size >= 1 << 20
    made = [path.stat().st_ino for path in chain]
    chain[0].write_bytes(b"written to")
    assert files.of("disk0", replace(RAW, backend=Backend.CHAIN_5)) == chain
    assert qemu_img.info(chain[0], "qcow2").backing_file == str(chain[1])
    assert [path.stat().st_ino for path in chain[1:]] == made[1:], "what is below is made once"
    assert files.of("disk1", replace(RAW, backend=Backend.CHAIN_20))[-5:] == chain[1:], "and shared"
    (raw,) = files.of("disk0", RAW)
    assert raw.stat().st_size == raw.stat().st_blocks * 512 == 1 << 20, "no holes"
    assert files.of("disk2", Setup(Device.IDE, Backend.NULL)) == ()


def test_a_disk_that_has_no_room_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled to the last byte, the file system would stop the VMs that have their disks there."""
    free = shutil.disk_usage(tmp_path)._replace(free=3 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    files = Files(tmp_path, 4 << 20)
    for backend in (Backend.RAW, Backend.QCOW2, Backend.CHAIN_1):
        with pytest.raises(VmctlError, match="a disk of 4 MiB has no room, 3 MiB are free"):
            files.of("disk0", replace(RAW, backend=backend))
    assert list(tmp_path.iterdir()) == [] and Files(tmp_path, 3 << 20).of("disk0", RAW)


def test_what_qemu_refuses_is_laid_to_its_row() -> None:
    words = setups.arguments(3, Setup(Device.NVME, Backend.NULL, iothread=True), [], 1 << 20, ide=0)
    device = words[-1]
    said = f"qemu-system-x86_64: warning: x\nqemu-system-x86_64: -device {device}: Property 'nvme.iothread' not found\n"
    assert Refused(said).of(words) == (device, "Property 'nvme.iothread' not found")
    assert Refused("qemu: no such machine").of(words)[0] == "" and "said nothing" in Refused("").message
    assert setups.arguments(1, RAW, [Path("x")], 1, ide=0, doorbells=False)[-1].endswith("ioeventfd=off")
    assert "bus=ide.1,unit=1" in setups.arguments(1, Setup(Device.IDE, Backend.NULL), [], 1, ide=3)[-1]


def test_qemus_command_line(tmp_path: Path) -> None:
    board = Board(Path("/qemu"), Accel.KVM, "kernel", "initrd", "quiet", "/disk", tmp_path, ("nsenter", "--"))
    words = argv(board, ["-more"], {"agent": 4, "marks": 5, "monitor": 6})
    assert words[:6] == ["nsenter", "--", "setpriv", "--pdeathsig", "KILL", "--"] and words[-1] == "-more"
    assert words[words.index("-cpu") + 1] == "host" and "socket,id=monitor,fd=6" in words


def test_fio_is_told_every_job_and_marks_them() -> None:
    text = fio.job_file("/dev/vdb", length_ms=250, seed=7, direct=False, marks="/dev/marks")
    assert text.count("exec_prerun=(echo begin ") == text.count("exec_postrun=(echo end ") == len(fio.JOBS)
    assert f"exec_prerun={telling('begin read-latency', '/dev/marks')}\n" in text
    assert "direct=0" in text and "runtime=250ms" in text and "randseed=7" in text and ";" not in text
    assert "exec_" not in fio.job_file("/x", length_ms=250, seed=7, direct=True)
    assert "number_ios=500" in fio.counted_file("/x", 500) and "time_based" not in fio.counted_file("/x", 500)


def test_what_fio_says_is_read() -> None:
    """The answer is of a real run: fio 3.33 on a file."""
    said = (SAID / "fio.json").read_text()
    found = fio.read("fio: a warning before it\n" + said)
    assert list(found) == [job.name for job in fio.JOBS]
    jobs = {one["jobname"]: one for one in json.loads(said)["jobs"]}
    reads = jobs["read-iops"]["read"]
    assert (
        found["read-iops"].value == pytest.approx(reads["iops"], rel=0.01)
        and found["read-iops"].ios == reads["total_ios"]
    )
    assert found["read-bandwidth"].value == pytest.approx(jobs["read-bandwidth"]["read"]["bw_bytes"], rel=0.01)
    assert found["write-latency"].value == jobs["write-latency"]["write"]["clat_ns"]["percentile"]["50.000000"]
    assert found["sync-write"].value > jobs["sync-write"]["sync"]["lat_ns"]["mean"], "the write is in it, too"
    failed = json.loads(said)
    failed["jobs"][1]["error"] = 5
    for text in (json.dumps(failed), "", "{", '{"jobs": [{}]}'):
        with pytest.raises(GuestCommandFailed):
            fio.read(text)


def test_register_accesses_are_laid_to_the_device() -> None:
    log = [
        "memory_region_ops_write cpu 0 mr 0x55 addr 0x1f0 value 0x20 size 1 name 'ide'",
        "memory_region_ops_read cpu 1 mr 0x55 addr 0x1f7 value 0x20 size 1 name 'ide'",
        "memory_region_ops_read cpu 0 mr 0x56 addr 0xfed000f0 value 0x1 size 4 name 'hpet'",
        "memory_region_ops_write cpu 0 mr 0x57 addr 0xc000 value 0x8 size 1 name 'piix-bmdma'",
        "memory_region_ops_write cpu 0 mr 0x58 addr 0xfeb0 value 0x0 size 2 name 'virtio-pci-notify-virtio-blk'",
        "vm_state_notify running 1 reason 9 (running)",
    ]
    found = registers.count(log, Device.IDE, 2)
    assert (found.reads, found.writes, dict(found.regions)) == (0.5, 1.0, {"ide": 1.0, "piix-bmdma": 0.5})
    with pytest.raises(Declined):
        registers.count(log[-1:], Device.NVME, 1)
    assert registers.count(log, Device.VIRTIO_BLK, 1).writes == 1.0 and registers.count(log, Device.NVME, 1).writes == 0


def test_links_and_their_addresses() -> None:
    rows = links.chosen([], [])
    assert {row.path for row in rows} == set(links.Way) and len({row.name for row in rows}) == len(rows)
    assert [row.name for row in links.chosen([], [links.Card.E1000])] == ["e1000 tap", "e1000 user", "veth", "loopback"]
    assert [row.name for row in links.chosen([links.Way.USER], [])] == ["virtio-net user", "e1000 user"]
    addresses = [links.ends(n, row.path) for n, row in enumerate(rows, 1)]
    assert len({one.mac for one in addresses if one.mac}) == len(rows) - 1
    words = links.arguments(2, links.ALL[1])
    assert "vhost=on" in words[1] and "ifname=tap2" in words[1] and words[3].endswith("romfile=")
    assert "net=10.199.5.0/24" in links.arguments(5, links.ALL[4])[1]


def test_what_iperf3_and_sockperf_say_is_read() -> None:
    """The answers are of real runs: iperf3 3.12 and sockperf 3.7 over loopback."""
    said = {name: (SAID / f"{name}.txt").read_text() for name in ("send", "receive", "small-packets", "round-trip")}
    found = {name: traffic.read(traffic.BY_NAME[name], text) for name, text in said.items()}
    stream = json.loads(said["send"])["end"]["sum_received"]
    assert found["send"].value == stream["bits_per_second"] / 8 and found["receive"].value > 0
    flood = json.loads(said["small-packets"])["end"]["sum"]
    assert found["small-packets"].count == flood["packets"]
    trip = found["round-trip"]
    assert 1000 < trip.value < trip.details["p99_ns"] and trip.count > 100
    for text in ("", "{", '{"error": "unable to connect"}', '{"end": {}}'):
        for flow in traffic.FLOWS:
            with pytest.raises(GuestCommandFailed):
                traffic.read(flow, text)


@contextmanager
def heard(answer: Callable[[str], None] = lambda word: None) -> Iterator[tuple[str, list[str]]]:
    """A port as a guest has it, and the words that were told there; each is answered when ``answer`` is through."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    words: list[str] = []

    def listen() -> None:
        with open(ours, "rb", buffering=0, closefd=False) as port:
            while (word := port.readline().decode().strip()) != "over":
                words.append(word)
                answer(word)
                os.write(ours, b"\n")

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield os.ttyname(theirs), words
    finally:
        os.write(theirs, b"over\n")
        thread.join()
        os.close(ours)
        os.close(theirs)


def test_a_guest_goes_on_when_its_word_was_heard(tmp_path: Path) -> None:
    """Also with the redirection that fio puts behind it."""

    def late(word: str) -> None:
        (tmp_path / "heard").write_text(word)

    with heard(late) as (port, words):
        line = f"{telling('begin a', port)} 1> said 2>&1 && cat heard"
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout == "begin a" and words == ["begin a"] and (tmp_path / "said").read_text() == ""


def test_a_client_is_run_again_until_its_server_is_there(tmp_path: Path) -> None:
    flow = replace(
        traffic.FLOWS[0], name="x", words=lambda to, seconds: ("sh", "-c", "echo $$ >> t; [ $(wc -l < t) = 3 ]")
    )
    with heard() as (port, words):
        subprocess.run(["sh", "-c", traffic.script(flow, "h", 1, port)], cwd=tmp_path, check=True)
    assert words == ["begin x"] * 3 + ["end x"] and len((tmp_path / "t").read_text().split()) == 3
    never = replace(flow, words=lambda to, seconds: ("sh", "-c", "echo no; exit 1"))
    failed = subprocess.run(["sh", "-c", traffic.script(never, "h", 1)], cwd=tmp_path, check=False, capture_output=True)
    assert failed.returncode == 1 and failed.stderr == b"no\n"


def test_what_qemu_spent_is_laid_to_the_job() -> None:
    clocks = iter([Clock(0, 0, 0), Clock(1000, 800, 30), Clock(5000, 900, 0), Clock(5000, 900, 0)])
    window = Window(lambda: next(clocks))
    for line in ("begin a", "end a", "end b", "nonsense"):
        window.hear(line)
    assert window.host_side("a", 8) == {"host_cpu_ns_per_io": 100.0, "waited_percent": 3.0}
    assert window.host_side("b", 8) == {} and window.host_side("a", 0) == {}


def test_what_a_folder_is_on() -> None:
    assert storage_of(Path("/proc/self"))["filesystem"] == "proc"


def test_a_recipe_on_a_base() -> None:
    """Its kernel takes the place of the base's, and what both name is taken together."""
    micro, bench = (recipe.load(image_recipes_dir() / name / "recipe.toml") for name in ("micro", "bench"))
    packages = {package.name: package for package in bench.packages}
    assert [p.name for p in bench.packages if p.kernel] == ["linux-image-amd64"]
    assert len(packages) == len(bench.packages) and {p.name for p in micro.packages if not p.kernel} < set(packages)
    libc = next(p for p in micro.packages if p.name == "libc6")
    assert packages["libc6"].globs[: len(libc.globs)] == libc.globs and len(packages["libc6"].globs) > len(libc.globs)
    assert (
        set(bench.modules.extra) >= {*micro.modules.extra, "ahci", "e1000"} and bench.modules.bus == micro.modules.bus
    )
    assert bench.cmdline == micro.cmdline and bench.sources == micro.sources and bench.size_mib > micro.size_mib


def test_the_source_of_an_image_on_a_base_tells_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmctl import resources

    monkeypatch.setattr(resources, "image_recipes_dir", lambda: tmp_path)
    for name, text in {"micro": "kind = 'micro'", "bench": "base = 'micro'"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text(text)
    before = recipe_source("bench")
    (tmp_path / "micro/init.c").write_text("int main;")
    assert recipe_source("bench") != before


# Results of io and net.


def made(seed: int, *, rounds: int = 5, slowed: float = 1.0, workload: str = "io", **dimensions: Any) -> Measured:
    """A result with some per cent of noise between rounds; one row is ``slowed``, in time and in rate."""
    numbers = random.Random(seed)
    shape = {"accelerator": "tcg", "interpreted": False, "host_cpu": "x"} | dimensions
    made = f"2026-01-02T00:00:{seed:02d}+00:00"
    head = Head(f"{workload}-{seed}", workload, made, "0", True, shape, {"qemu": "7.2", "storage": {}})

    def samples(value: float) -> tuple[Sample, ...]:
        details = {"median_ns": 2.0, "host_cpu_ns_per_io": 50_000.0, "waited_percent": 3.0}
        return tuple(Sample(n, value * numbers.uniform(0.98, 1.02), details) for n in range(1, rounds + 1))

    def row(setup: Setup, slowed: float = 1.0) -> Row:
        latency = Measure("read-latency", "ns", "lower", samples(100_000 * slowed))
        iops = Measure("read-iops", "1/s", "higher", samples(20_000 / slowed))
        counted = {"ios": 500, "reads": 2.0, "writes": 24.0, "regions": {"ide": 26.0}}
        return Row(setup.name, setup.to_json(), (latency, iops), counted=counted)

    rows = (row(Setup(Device.IDE, Backend.NULL)), row(RAW, slowed), Row("nvme null", {}, skipped="no nvme here"))
    return Measured(head, rows)


def verdicts(before: Measured, after: Measured) -> dict[str, Verdict]:
    return {change.name: change.verdict for change in compare(before, after, threshold=0.1).changes}


def test_a_slowed_row_is_found_whichever_way_is_better() -> None:
    name = "virtio-blk raw none native"
    assert compare(made(1), made(2), threshold=0.1).verdict == "no change"
    found = compare(made(1), made(2, slowed=1.3), threshold=0.1)
    assert found.verdict == "2 slower" and found.regressed
    changes = {change.name: change for change in found.changes}
    assert changes[f"{name}: read-iops"].ratio < 0.8 and changes[f"{name}: read-iops"].cost > 1.25
    assert changes[f"{name}: read-latency"].ratio > 1.2 and changes[f"{name}: read-latency"].unit == "ns"
    assert verdicts(made(2, slowed=1.3), made(1))[f"{name}: read-iops"] is Verdict.FASTER
    assert verdicts(made(1, rounds=1), made(2, rounds=1, slowed=3))[f"{name}: read-iops"] is Verdict.UNCLEAR
    ide, raw, nvme = made(2).rows
    for rows, verdict in (
        ((ide, replace(raw, measures=(), failed="it is gone"), nvme), Verdict.GONE),
        ((ide, nvme), Verdict.LEFT_OUT),
    ):
        assert verdicts(made(1), replace(made(2), rows=rows))[f"{name}: read-iops"] is verdict


def test_user_mode_is_never_compared_with_tap() -> None:
    with pytest.raises(SpecError, match="paths is tap before and user after"):
        compare(made(1, workload="net", paths="tap"), made(2, workload="net", paths="user"))
    with pytest.raises(SpecError, match="workload"):
        compare(made(1), made(2, workload="net"))


def test_figures() -> None:
    (latency, *_rest) = lines(made(1))
    assert latency.median == pytest.approx(100_000, rel=0.03) and latency.samples == 5 and latency.mad < 3000
    assert latency.details["host_cpu_ns_per_io"] == 50_000


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    place = store.folder(tmp_path / "vmctl")
    for result in (
        made(1),
        made(2, slowed=1.5),
        made(3, workload="net", paths="tap"),
        made(4, workload="net", paths="user"),
    ):
        store.write(place, result.to_json())
    return place


def test_the_commands(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measured_of(store.find(kept, "io-1")) == made(1)
    assert vmctl(["bench", "list", "-o", "name"]) == 0
    assert capsys.readouterr().out.split() == ["io-1", "io-2", "net-3", "net-4"]
    assert vmctl(["bench", "show", "io-1", "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert json_schema.errors(store.schema(), shown) == [] and len(shown["table"]) == 4
    assert vmctl(["bench", "show", "io-1", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "READ us" in text and "SYNC us" not in text.partition("COLUMN")[0], "columns without a figure are left out"
    assert "nvme null: skipped: no nvme here" in text and "±" in text and "26.0" in text and "4 figures" in text
    store.write(kept, replace(made(6), head=made(6).head.with_environment(guest_kernel="6.1")).to_json())
    assert "guest" not in text.partition("rounds")[0], "none was there to tell its kernel"
    assert vmctl(["bench", "show", "io-6"]) == 0 and "kernel 6.1, clock ?" in capsys.readouterr().out
    assert vmctl(["bench", "compare", "io-1", "io-2"]) == 15 and "2 slower" in capsys.readouterr().out
    assert vmctl(["bench", "compare", "net-3", "net-4"]) == 2
    assert vmctl(["bench", "compare", "io-1", "net-3"]) == 2
    assert vmctl(["bench", "io", "--device", "floppy", "--aio", "x", "-c", "test:///default"]) == 2
    error = capsys.readouterr().err
    assert "no device is called floppy" in error and "no aio is called x" in error
    nothing = ["bench", "net", "--path", "user", "--card", "e1000e", "-c", "test:///default"]
    assert vmctl(nothing) == 2 and "no row is of that path and that card" in capsys.readouterr().err
    for words in (["io"], ["io", "--quick", "--iothread"]):
        assert vmctl(["bench", *words, "-c", "test:///default"]) == 8


def test_user_mode_stands_apart(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = made(5, workload="net", paths="tap,user")
    rows = []
    for link in (links.ALL[0], links.ALL[4]):
        trip = Measure("round-trip", "ns", "lower", result.rows[0].measures[0].samples)
        rows.append(Row(link.name, link.to_json(), (trip,)))
    store.write(kept, replace(result, rows=tuple(rows)).to_json())
    assert vmctl(["bench", "show", "net-5"]) == 0
    tap, title, user = capsys.readouterr().out.partition("user mode: the figures are of slirp")
    assert title and "virtio-net  tap" in tap and "virtio-net  tap" not in user and "virtio-net  user" in user


def test_a_result_that_was_tampered_with_is_refused(kept: Path) -> None:
    values = made(1).to_json()
    values["rows"][0]["measures"][0]["samples"][0]["value"] = -1
    store.write(kept, values)
    with pytest.raises(SpecError, match="rows.0.measures.0.samples.0.value"):
        store.find(kept, "io-1")
