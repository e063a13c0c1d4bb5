"""What doctor sees and settles of disks that were cut off as they went on in another file, without a guest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.driver.test_domains import RECORD, xml_of
from vmctl import layer_check, render, snapshot_journal, unclear
from vmctl.disk_xml import read
from vmctl.errors import Conflict
from vmctl.events import silent
from vmctl.hosts import Host
from vmctl.hypervisor import domain
from vmctl.record import Owned
from vmctl.spec import VM


def made(path: Path, on: str = "") -> str:
    """An empty disk, or an empty layer on one."""
    words = ["-b", on, "-F", "qcow2", str(path)] if on else [str(path), "1M"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words], check=True, timeout=60)
    return str(path)


@pytest.fixture
def files(folder: Path) -> tuple[str, str]:
    """A disk and an empty layer on it, in a pool."""
    base = made(folder / "web1.qcow2")
    return base, made(folder / "web1-layer1.qcow2", base)


def written(path: str, where: str = "0 64k") -> None:
    """Write something into a disk."""
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P 7 {where}", path], check=True, timeout=60)


def defined(host: Host, root: str, *own: str) -> tuple[Owned, ...]:
    """A stopped VM with that disk and these volumes for its own."""
    owned = tuple(Owned("disks", Path(one).name) for one in own)
    domain.define(host.conn, xml_of(VM("web1", "micro"), root=root), name="web1")
    domain.set_record(host.conn, "web1", render.metadata(replace(RECORD, owned=owned)))
    return owned


def owned_by_it(host: Host) -> tuple[Owned, ...]:
    record = domain.find(host.conn, "web1").facts.record
    assert record is not None
    return record.owned


def source(host: Host) -> str:
    return next(one.source for one in read(domain.xml(host.conn, "web1", inactive=True)) if one.target == "vda")


@pytest.fixture
def merging(host: Host, files: tuple[str, str]) -> Callable[..., Path]:
    """A stopped VM whose top was being merged: what the journal says of it, by its fields."""

    def begun(**fields: bool) -> Path:
        domain.define(host.conn, xml_of(VM("web1", "micro"), root=files[1]), name="web1")
        entry = snapshot_journal.Entry(host.conn.uri, "web1", "merge", "one", files[1:], files[1:], **fields)  # type: ignore[arg-type]
        return snapshot_journal.begin(host, entry)

    return begun


@pytest.fixture
def another(host: Host) -> Callable[[], subprocess.Popen[bytes]]:
    """Another process that has the VM's name held when this returns."""

    def hold() -> subprocess.Popen[bytes]:
        code = (
            "import sys; from pathlib import Path; from vmctl.locks import held\n"
            "with held(Path(sys.argv[1]), sys.argv[2]): print('held', flush=True); sys.stdin.read()"
        )
        words = [sys.executable, "-c", code, str(host.folders.runtime), f"VM web1 on {host.lock_scope}"]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        return process

    return hold


def test_only_who_mends_lets_a_definition_follow(
    host: Host, files: tuple[str, str], merging: Callable[..., Path]
) -> None:
    merging(unsure=True, switched=True)
    assert unclear.find(host) == () and source(host) == files[1]
    assert unclear.find(host, fix=True) == () and source(host) == files[0]


def test_only_who_mends_notes_that_two_files_read_the_same(host: Host, merging: Callable[..., Path]) -> None:
    path = merging(unsure=True)
    before = path.read_bytes()
    assert unclear.find(host) == () and path.read_bytes() == before
    assert unclear.find(host, fix=True) == () and path.read_bytes() != before


@pytest.mark.parametrize("switched", [False, True])
def test_a_vm_that_another_vmctl_works_on_is_left_alone(
    host: Host,
    files: tuple[str, str],
    merging: Callable[..., Path],
    another: Callable[[], subprocess.Popen[bytes]],
    switched: bool,
) -> None:
    path = merging(unsure=True, switched=switched)
    before = path.read_bytes()
    with another() as process:
        assert unclear.find(host, fix=True) == ()
        assert source(host) == files[1] and path.read_bytes() == before
        process.communicate(timeout=60)
    unclear.find(host, fix=True)
    assert source(host) == files[0] if switched else path.read_bytes() != before


def test_nothing_is_chosen_for_a_vm_that_another_vmctl_works_on(
    host: Host, files: tuple[str, str], merging: Callable[..., Path], another: Callable[[], subprocess.Popen[bytes]]
) -> None:
    path = merging(unsure=True)
    written(files[1])
    (doubt,) = unclear.find(host)
    assert (doubt.told, doubt.other) == (files[1], files[0]) and unclear.find(host, fix=True) == (doubt,)
    with another() as process:
        with pytest.raises(Conflict, match="another vmctl is at it"):
            unclear.keep(host, [files[0]], silent)
        assert source(host) == files[1] and path.exists()
        process.communicate(timeout=60)
    unclear.keep(host, [files[0]], silent)
    assert source(host) == files[0] and unclear.find(host) == () and Path(files[1]).exists()


@pytest.mark.parametrize("kept", ["base", "layer"])
def test_a_layer_of_a_fork_is_asked_about_once(host: Host, files: tuple[str, str], kept: str) -> None:
    base, layer = files
    owned = defined(host, base, *files)
    written(layer)
    assert layer_check.newer_than_stopped(host) == {layer: ("web1", base)}
    chosen = base if kept == "base" else layer
    unclear.keep(host, [chosen], silent)
    assert source(host) == chosen and layer_check.newer_than_stopped(host) == {} and Path(layer).exists()
    assert owned_by_it(host) == (owned if kept == "layer" else owned[:1])


def test_what_the_chosen_file_is_based_on_stays_the_vms_own(host: Host, folder: Path) -> None:
    """A layer that a fork made, into which the one above it was being merged: it was given up, and left for ever."""
    layer = made(folder / "web1-layer1.qcow2")
    top = made(folder / "web1.snap-one.qcow2", layer)
    written(top)
    owned = defined(host, top, layer)
    entry = snapshot_journal.Entry(host.conn.uri, "web1", "merge", "one", (top,), (top,), unsure=True)
    snapshot_journal.begin(host, entry)
    (doubt,) = unclear.find(host)
    assert (doubt.told, doubt.other) == (top, layer)
    unclear.keep(host, [top], silent)
    assert source(host) == top and owned_by_it(host) == owned


def test_layers_of_forks_are_told_by_the_end_of_their_name() -> None:
    assert layer_check.of_fork("web-0a1b-layer12.qcow2") and layer_check.of_fork("web-layer-0a1b-layer1.qcow2")
    assert not any(map(layer_check.of_fork, ("web-layer-0a1b.qcow2", "web-layer2-seed.iso", "-layer1.qcow2")))
