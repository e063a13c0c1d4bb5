"""Disks whose QEMU was killed as a pull ended: what they need stays, and is put below them again, without a guest."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.driver.test_domains import xml_of
from vmctl import (
    disk_chain,
    disk_copy,
    disk_journal,
    image_users,
    layer_check,
    lifecycle,
    pull_journal,
    pull_settle,
    qemu_img,
    snapshot_layers,
)
from vmctl.errors import Conflict, ImageError
from vmctl.events import Reporter, silent
from vmctl.hosts import Host
from vmctl.hypervisor import domain
from vmctl.spec import VM


def heard(lines: list[str]) -> Reporter:
    return lambda event: lines.append(getattr(event, "text", ""))


def img(*words: str) -> None:
    subprocess.run(["qemu-img", *words], check=True, timeout=60, capture_output=True)


@pytest.fixture
def chain(host: Host, folder: Path) -> tuple[str, str, str]:
    """A stopped VM's disk, what it is based on, and what that is, of 1 MiB each; the lower two hold something."""
    low, mid, top = (f"{folder}/{name}.qcow2" for name in ("low", "mid", "top"))
    img("create", "-q", "-f", "qcow2", low, "1M")
    img("create", "-q", "-f", "qcow2", "-b", "low.qcow2", "-F", "qcow2", mid)
    for path, where in ((low, "0 64k"), (mid, "128k 64k")):
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P 7 {where}", path], check=True, timeout=60)
    img("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", top)  # by a way from its folder
    domain.define(host.conn, xml_of(VM("web1", "micro"), root=top), name="web1")
    return top, mid, low


def begun(host: Host, top: str) -> Path:
    """What is noted as a pull into it begins."""
    folders = [str(Path(top).parent)]
    layers = disk_chain.read(top, "qcow2", lambda: folders, doing="pull")
    return pull_settle.begin(host, domain.find(host.conn, "web1"), "vda", layers, "pull")


def cut_off(top: str, onto: str = "") -> None:
    """What a killed QEMU leaves: a header that names another base, or none, and nothing of what was pulled."""
    img("rebase", "-u", "-f", "qcow2", "-b", onto, *(("-F", "qcow2") if onto else ()), top)


def backing(top: str) -> str:
    return qemu_img.info(Path(top), "qcow2").backing_file


@pytest.mark.parametrize("onto", ["", "low.qcow2"])
def test_a_start_puts_the_old_base_back_first(host: Host, chain: tuple[str, str, str], onto: str) -> None:
    top, mid, _ = chain
    note = begun(host, top)
    cut_off(top, onto)
    lines: list[str] = []
    lifecycle.start(host, "web1", heard(lines))
    assert backing(top) == "mid.qcow2" and not note.exists()
    assert any(f"disk vda of web1 is based on {mid} again" in line for line in lines), lines
    assert domain.find(host.conn, "web1").active


def test_what_was_written_since_hides_what_is_put_back(host: Host, chain: tuple[str, str, str]) -> None:
    top, _, _ = chain
    begun(host, top)
    cut_off(top)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 9 0 4k", top], check=True, timeout=60)
    disk_journal.settle(host, "web1", silent)
    for where in ("-P 9 0 4k", "-P 7 128k 64k"):  # what qemu-io does not read as told it says, and ends well
        told = subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"read {where}", top], capture_output=True, text=True)
        assert "failed" not in told.stdout, told.stdout


def test_a_definition_that_says_it_is_based_on_nothing_says_so_no_more(host: Host, chain: tuple[str, str, str]) -> None:
    top, _, _ = chain
    text = domain.xml(host.conn, "web1", inactive=True)
    source = f"<source file='{top}'/>"
    domain.define(host.conn, text.replace(source, f"{source}<backingStore/>"), name="web1")
    assert "<backingStore/>" in domain.xml(host.conn, "web1", inactive=True)
    begun(host, top)
    cut_off(top)
    disk_journal.settle(host, "web1", silent)
    assert "<backingStore" not in domain.xml(host.conn, "web1", inactive=True) and backing(top) == "mid.qcow2"


def test_one_that_was_not_closed_is_put_back_too(host: Host, chain: tuple[str, str, str]) -> None:
    """A file with lazy refcounts, which QEMU mends as it opens it."""
    top, _, _ = chain
    begun(host, top)
    cut_off(top)
    img("amend", "-f", "qcow2", "-o", "lazy_refcounts=on", top)
    write = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 9 0 4k", "-c", "abort", top]
    subprocess.run(write, timeout=60, capture_output=True, check=False)
    with pytest.raises(ImageError, match="dirty"):
        disk_chain.read(top, "qcow2", lambda: [str(Path(top).parent)], doing="read it")
    disk_journal.settle(host, "web1", silent)
    assert backing(top) == "mid.qcow2"


def test_one_that_was_not_over_needs_nothing(host: Host, chain: tuple[str, str, str]) -> None:
    top, mid, _ = chain
    note = begun(host, top)
    Path(mid).write_bytes(Path(mid).read_bytes())  # changed: no matter
    before = Path(top).read_bytes()
    assert pull_settle.settle(host, "web1", silent)
    assert not note.exists() and Path(top).read_bytes() == before
    assert not pull_settle.settle(host, "web1", silent)


def test_one_whose_file_is_another_now_needs_nothing(host: Host, chain: tuple[str, str, str]) -> None:
    top, _, _ = chain
    note = begun(host, top)
    Path(top).rename(f"{top}.was")
    img("create", "-q", "-f", "qcow2", top, "1M")
    assert pull_settle.settle(host, "web1", silent)
    assert not note.exists() and backing(top) == ""


@pytest.mark.parametrize("which", ["base", "below it", "gone"])
def test_a_base_that_is_not_as_it_was_is_refused_and_nothing_changed(
    host: Host, chain: tuple[str, str, str], which: str
) -> None:
    top, mid, low = chain
    note = begun(host, top)
    cut_off(top)
    before = Path(top).read_bytes()
    if which == "gone":
        Path(mid).unlink()
    else:
        path = mid if which == "base" else low
        os.utime(path, ns=(0, Path(path).stat().st_mtime_ns + 1))
    with pytest.raises(Conflict, match="cannot settle disk vda of VM web1") as told:
        lifecycle.start(host, "web1", silent)
    assert f"rm {note}" in told.value.hint and "qemu-img rebase -u -f qcow2 -b mid.qcow2 -F qcow2" in told.value.hint
    assert note.exists() and Path(top).read_bytes() == before and not domain.find(host.conn, "web1").active
    lines: list[str] = []
    assert pull_settle.settle(host, "web1", heard(lines), deciding=True)  # it is to be deleted
    assert not note.exists() and any("may lack" in line for line in lines)


def test_what_a_pull_may_need_again_is_needed_till_it_is_settled(host: Host, chain: tuple[str, str, str]) -> None:
    top, mid, low = chain
    note = begun(host, top)
    cut_off(top)
    for path in (mid, low):
        assert image_users.needed(host).by(path, but=(mid, low)) == ("top.qcow2", "web1")
    pull_journal.end(note)
    assert image_users.needed(host).by(mid, but=(mid,)) == ()


def test_what_lies_below_a_base_that_is_gone_is_needed_as_the_header_says(
    host: Host, chain: tuple[str, str, str]
) -> None:
    top, mid, low = chain
    begun(host, top)
    cut_off(top, "low.qcow2")
    Path(mid).unlink()
    host.conn.handle.storagePoolLookupByName("disks").refresh()
    assert image_users.needed(host).by(low, but=(low,)) == ("web1",)


def test_who_does_not_settle_it_refuses(host: Host, chain: tuple[str, str, str]) -> None:
    top, _, _ = chain
    note = begun(host, top)
    vm = domain.find(host.conn, "web1")
    layer_check.require_none_newer(host, vm, "clone VM web1")
    cut_off(top)
    for noting in (False, True):
        with pytest.raises(Conflict, match="cannot clone VM web1: .*top.qcow2 may lack") as told:
            layer_check.require_none_newer(host, vm, "clone VM web1", noting=noting)
        assert told.value.hint == "vmctl doctor --fix"
    assert note.exists()


def test_the_doctor_and_the_next_work_on_the_disk_settle_it(host: Host, chain: tuple[str, str, str]) -> None:
    top, mid, _ = chain
    begun(host, top)
    cut_off(top)
    assert disk_journal.unsettled(host) == [f"disk vda of web1, which was based on {mid}"]
    assert disk_journal.unsettled(host, but={"web1"}) == []
    assert disk_journal.settle_all(host, silent) == ["web1"]
    assert backing(top) == "mid.qcow2" and disk_journal.unsettled(host) == []
    note = begun(host, top)
    cut_off(top)
    with snapshot_layers.working_on(host, "web1", silent):
        assert backing(top) == "mid.qcow2" and not note.exists()
    note = begun(host, top)
    cut_off(top)
    assert all(one.result is not None for one in disk_copy.check(host, "web1:vda", silent, repair=False, dry=False))
    assert backing(top) == "mid.qcow2" and not note.exists()


def test_a_vm_that_has_another_name_now_has_it_settled_too(host: Host, chain: tuple[str, str, str]) -> None:
    top, _, _ = chain
    note = begun(host, top)
    cut_off(top)
    domain.undefine(host.conn, "web1")
    domain.define(host.conn, xml_of(VM("web2", "micro"), root=top), name="web2")
    lifecycle.start(host, "web2", silent)
    assert backing(top) == "mid.qcow2" and not note.exists()
