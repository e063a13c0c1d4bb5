"""Backups' formats and decisions: manifests that lie, plans, retention; the qcow2 writer; definitions made over."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl import (
    backup,
    backup_copy,
    backup_definition,
    backup_index,
    backup_list,
    backup_manifest,
    backup_plan,
    backup_store,
    backup_verify,
    digest,
    qemu_nbd,
)
from vmctl.backup_copy import Copy
from vmctl.backup_definition import Changes
from vmctl.backup_index import CLUSTER, ZEROS
from vmctl.backup_manifest import Manifest, StoredDisk, StoredFile
from vmctl.backup_plan import DiskNow, Wanted
from vmctl.choices import Compression
from vmctl.cli import run
from vmctl.errors import ImageError, NotFound, SpecError, WrongState
from vmctl.events import Event, silent
from vmctl.nbd import Broken, Export
from vmctl.qcow2_writer import Qcow2Writer

UUID = "071f873c-40fc-5132-ace9-7f2d1cfc06bc"
DIGEST = "0" * 64


def disk(target: str = "vda", parent: str = "", size: int = 1 << 20) -> StoredDisk:
    return StoredDisk(
        target, "root", "qcow2", size, f"blake3:{DIGEST}", f"{target}.qcow2", 1, f"{target}.digests", DIGEST, 1, parent
    )


def manifest(number: int, parent: int | None = None, **changes: object) -> Manifest:
    name = f"202601{number:02}T000000Z"
    below = f"202601{parent:02}T000000Z" if parent else ""
    made = Manifest(
        name, "web1", UUID, "vm", f"2026-01-{number:02}T00:00:00+00:00", "crash", "none", f"vmctl-{name}",
        (disk(parent=below),), (StoredFile("domain", "domain.xml", 1, DIGEST),),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_manifest_is_read_as_it_was_written() -> None:
    one = manifest(2, 1)
    assert backup_manifest.parse(backup_manifest.dump(one), what="m") == one


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("id",), "../x"),
        (("vm",), "../../etc"),
        (("schema",), 2),
        (("kind",), "other"),
        (("disks", 0, "file"), "../../etc/passwd"),
        (("disks", 0, "file"), "/etc/passwd"),
        (("disks", 0, "file"), ".hidden"),
        (("disks", 0, "index"), "a/b"),
        (("disks", 0, "parent"), "../20260101T000000Z"),
        (("disks", 0, "size"), -1),
        (("disks", 0, "size"), 1 << 60),
        (("disks", 0, "size"), True),
        (("disks", 0, "format"), "vmdk"),
        (("disks", 0, "target"), "vda/../x"),
        (("disks", 0, "digest"), "xyz"),
        (("disks",), {}),
        (("files", 0, "file"), "vda.qcow2"),
        (("files", 0, "file"), "..\n"),
    ],
)
def test_a_manifest_that_lies_is_refused(path: tuple[object, ...], value: object) -> None:
    values = json.loads(backup_manifest.dump(manifest(1)))
    at = values
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ImageError):
        backup_manifest.parse(json.dumps(values), what="m")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_json_is_more_than_refused(values: object) -> None:
    with pytest.raises(ImageError):
        backup_manifest.parse(json.dumps(values), what="m")
    if isinstance(values, dict):
        with pytest.raises(ImageError):
            backup_manifest.parse(json.dumps(values | {"kind": "vmctl-backup", "schema": 1}), what="m")


def test_chains() -> None:
    known = {one.id: one for one in (manifest(1), manifest(2, 1), manifest(3, 2))}
    last = manifest(3).id
    assert [m.id for m, _ in backup_manifest.chain(known, last, "vda")] == sorted(known, reverse=True)
    with pytest.raises(ImageError, match="20260101T000000Z, which is missing"):
        backup_manifest.chain({k: v for k, v in known.items() if k > "20260101T9"}, last, "vda")
    with pytest.raises(ImageError, match="does not end"):
        backup_manifest.chain(known | {manifest(1).id: manifest(1, 3)}, last, "vda")
    with pytest.raises(ImageError, match="another size"):
        other = replace(manifest(1), disks=(disk(size=2 << 20),))
        backup_manifest.chain(known | {other.id: other}, last, "vda")


NOW = DiskNow("vda", "root", "/x", "qcow2", 1 << 20, True)


@pytest.mark.parametrize(
    ("now", "dirty", "why"),
    [
        (NOW, {"vda": 1}, ""),
        (NOW, {}, "bitmap"),
        (NOW, None, "checkpoint"),
        (replace(NOW, size=2 << 20), {"vda": 1}, "size"),
        (replace(NOW, marks=False, format="raw"), {"vda": 1}, "raw disk keeps no bitmap"),
        (replace(NOW, serial="other"), {"vda": 1}, "another disk"),
        (replace(NOW, target="vdb"), {"vdb": 1}, "not in backup"),
    ],
)
def test_what_is_taken_of_a_disk(now: DiskNow, dirty: dict[str, int] | None, why: str) -> None:
    (one,) = backup_plan.plan([now], manifest(1), dirty, Wanted.AUTO, uuid=UUID)
    assert bool(one.parent) == (not why) and why in one.why
    (full,) = backup_plan.plan([now], manifest(1), dirty, Wanted.FULL, uuid=UUID)
    assert not full.parent
    if why:
        with pytest.raises(WrongState, match=why):
            backup_plan.plan([now], manifest(1), dirty, Wanted.INCREMENTAL, uuid=UUID)


def test_a_vm_of_another_identity_is_taken_whole() -> None:
    (one,) = backup_plan.plan([NOW], manifest(1), {"vda": 1}, Wanted.AUTO, uuid=UUID.replace("0", "1"))
    assert "another VM" in one.why


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.none() | st.integers(1, 12),
    st.none() | st.integers(0, 12),
    st.frozensets(st.integers(1, 12)),
)
def test_pruning_never_breaks_what_is_kept(
    depths: list[int], keep: int | None, days: int | None, ill: frozenset[int]
) -> None:
    points = [manifest(n, n - 1 if n > 1 and depth else None) for n, depth in enumerate(depths, 1)]
    age = None if days is None else timedelta(days=days)
    broken = {one.id: "short" for n, one in enumerate(points, 1) if n in ill}
    found = backup_plan.prune(points, keep=keep, older_than=age, now=datetime(2026, 1, 13, tzinfo=UTC), broken=broken)
    by_id = {one.id: one for one in points}
    assert set(found.delete) | set(found.keep) == set(by_id) and points[-1].id in found.keep
    for one in found.keep:
        assert not (by_id[one].parents & set(found.delete)) or one in found.merge
    if keep is None and age is None:
        assert not found.delete
    whole = [one.id for one in points if one.id not in broken]
    assert not whole or whole[-1] in found.keep
    assert not set(found.merge) & set(broken) and set(found.broken) == set(found.keep) & set(broken)
    if keep is not None:
        assert len(set(found.keep) & set(whole)) >= min(keep, len(whole))
    for one in found.delete:
        assert age is None or datetime(2026, 1, 13, tzinfo=UTC) - datetime.fromisoformat(by_id[one].created) > age


def _shelved(folder: Path, *points: Manifest) -> None:
    for one in points:
        place = folder / one.id
        place.mkdir(parents=True)
        (place / backup_manifest.NAME).write_text(backup_manifest.dump(one))
        for stored in one.disks:
            (place / stored.file).write_bytes(b"x" * stored.file_size)
            (place / stored.index).write_bytes(b"x" * backup_index.packed_size(stored.clusters))
        for file in one.files:
            (place / file.file).write_bytes(b"x" * file.size)


@pytest.mark.parametrize("ill", ["cut short", "missing", "link", "no index", "no definition", "parent"])
def test_pruning_keeps_a_whole_one_where_the_newest_is_broken(tmp_path: Path, ill: str) -> None:
    folder = tmp_path / "web1"
    below, newest = manifest(3), manifest(4, 3)
    _shelved(folder, manifest(1), manifest(2), below, newest)
    damaged = folder / (below if ill == "parent" else newest).id
    if ill == "cut short":
        (damaged / "vda.qcow2").write_bytes(b"")
    else:
        (damaged / {"no index": "vda.digests", "no definition": "domain.xml"}.get(ill, "vda.qcow2")).unlink()
    if ill == "link":
        (damaged / "vda.qcow2").symlink_to(folder / manifest(1).id / "vda.qcow2")
    listed = {one.id: bool(one.problem) for one in backup_list.list_backups(tmp_path, ["web1"])}
    assert listed == {
        manifest(1).id: False, manifest(2).id: False, below.id: ill == "parent", newest.id: True,
    }  # fmt: skip
    told: list[Event] = []
    done = backup.prune(folder, 1, None, told.append, dry=True)
    assert told[0].text.startswith(f"backup {newest.id if ill != 'parent' else below.id} is not counted")  # type: ignore[union-attr]
    assert done == backup.prune(folder, 1, None, told.append, dry=False)
    # What a broken one is laid over is the last of it that can still be had.
    left = [manifest(2).id, below.id, newest.id] if ill == "parent" else [below.id, newest.id]
    assert sorted(one.name for one in folder.iterdir()) == left == list(done.keep)


def test_the_one_before_a_damaged_one_is_not_the_latest(tmp_path: Path) -> None:
    folder = tmp_path / "web1"
    _shelved(folder, manifest(1), manifest(2))
    assert backup_store.shelf(folder).point("latest").id == manifest(2).id
    (folder / manifest(2).id / backup_manifest.NAME).write_text("{")
    with pytest.raises(ImageError, match="the latest") as told:
        backup_store.shelf(folder).point("latest")
    assert manifest(1).id in told.value.hint
    assert backup_store.shelf(folder).point(manifest(1).id).id == manifest(1).id


def test_pruning_refuses_where_none_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "web1"
    _shelved(folder, manifest(1), manifest(2))
    for one in folder.iterdir():
        (one / "vda.qcow2").unlink()
    with pytest.raises(ImageError, match="none that could be kept is whole"):
        backup.prune(folder, 1, None, lambda _event: None, dry=False)
    assert len(list(folder.iterdir())) == 2


def test_ages() -> None:
    assert backup_plan.parse_age("30d") == timedelta(days=30) and backup_plan.parse_age("2w") == timedelta(weeks=2)
    for text in ("", "30", "d", "-1d", "1y", "9999999d"):
        with pytest.raises(SpecError):
            backup_plan.parse_age(text)


def test_needless_checkpoints() -> None:
    known = {"a": ("1", "/x"), "b": ("2", "/x"), "c": ("3", "/away")}
    assert backup_plan.needless(known, {"/x": {"b"}}) == ("a",)


def test_digests_do_not_depend_on_how_a_disk_is_made_up() -> None:
    size = 10 * CLUSTER + 5
    one, two, three = {0: b"a" * 32, 5: b"b" * 32}, {5: ZEROS, 7: b"c" * 32}, {0: b"d" * 32}
    whole = {0: b"d" * 32, 7: b"c" * 32}
    assert backup_index.digest(backup_index.laid_over([three, two, one]), size) == backup_index.digest(whole, size)
    assert backup_index.digest(whole, size) != backup_index.digest(whole, size + 1)
    assert backup_index.unpack(backup_index.pack(two), size, what="x") == two
    for spoiled in (backup_index.pack(two)[:-1], b"", b"x" * 64, backup_index.pack({99: ZEROS})):
        with pytest.raises(ImageError):
            backup_index.unpack(spoiled, size, what="x")


@given(st.sets(st.integers(0, 300)))
def test_runs(numbers: set[int]) -> None:
    runs = backup_copy.runs_of(sorted(numbers))
    assert [n for first, count in runs for n in range(first, first + count)] == sorted(numbers)
    cut = list(backup_copy.pieces(runs, 4))
    assert [n for first, count in cut for n in range(first, first + count)] == sorted(numbers)
    assert all(0 < count <= 4 for _, count in cut)


@pytest.mark.parametrize("compression", list(Compression))
@pytest.mark.parametrize("size", [0, 512, CLUSTER, 5 * CLUSTER + 512, (600 << 20) + 1024])
def test_a_written_qcow2_is_what_qemu_reads(tmp_path: Path, compression: Compression, size: int) -> None:
    rng = random.Random(f"{compression}{size}")
    path, raw = tmp_path / "x.qcow2", tmp_path / "x.raw"
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    with raw.open("wb") as file:
        file.truncate(size)
        writer = Qcow2Writer(handle, size, compression)
        whole = backup_index.clusters(size)
        for first in rng.sample(range(whole), min(whole, 40)) if whole < 100 else range(0, whole, whole // 40):
            if first % 7 == 3:
                writer.zero(first)
                continue
            data = rng.randbytes(CLUSTER) if first % 2 else rng.randbytes(64) * (CLUSTER // 64)
            if first == whole - 1:
                rest = size - first * CLUSTER
                data = data[:rest] + bytes(CLUSTER - rest)
            writer.write(first, memoryview(data))
            file.seek(first * CLUSTER)
            file.write(data[: size - first * CLUSTER])
    with path.open("rb") as begun:
        assert not begun.read(4).strip(b"\0")  # no header until the end
    assert writer.finish() == path.stat().st_size
    assert path.stat().st_blocks * 512 < path.stat().st_size + (1 << 20), "room that was not needed is given back"
    os.close(handle)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=True)
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", str(path), str(raw)], check=True)


DEFINITION = """<domain type='qemu'>
  <name>web1</name>
  <uuid>071f873c-40fc-5132-ace9-7f2d1cfc06bc</uuid>
  <metadata>
    <vmctl:vm xmlns:vmctl="https://vmctl.dev/xmlns/vm/1" schema="1"><vmctl:label key="name" value="web1"/></vmctl:vm>
  </metadata>
  <os><kernel>/pool/k</kernel><nvram>/old/nvram</nvram></os>
  <devices>
    <emulator>/usr/bin/qemu</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/pool/a.qcow2'/>
      <backingStore type='file'><format type='qcow2'/><source file='/pool/base'/></backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='n'/></interface>
    <serial type='pty'><log file='/pool/old.log' append='on'/></serial>
  </devices>
</domain>"""


def test_a_definition_made_over() -> None:
    changes = Changes(
        "web2", UUID.replace("0", "1"), {"vda": ("/new/a.qcow2", "qcow2")},
        {"/pool/old.log": "/new/new.log", "/old/nvram": "/new/n"}, {"52:54:00:00:00:01": "52:54:00:00:00:02"},
        "<vmctl:vm xmlns:vmctl='x' new='1'/>", "/new/seed.iso",
    )  # fmt: skip
    text = backup_definition.changed(DEFINITION, changes)
    for gone in ("web1<", "/pool/a.qcow2", "/pool/base", "old.log", "00:01", "/old/nvram", "vmctl:label"):
        assert gone not in text
    for there in (
        "<name>web2<",
        "/new/a.qcow2",
        "/new/new.log",
        ":00:02",
        "/new/n<",
        "new='1'",
        "/new/seed.iso",
        "'vdb'",
    ):
        assert there in text


def test_a_definition_of_others_made_over() -> None:
    bare = DEFINITION[: DEFINITION.index("  <metadata>")] + DEFINITION[DEFINITION.index("  <os>") :]
    text = backup_definition.changed(bare, Changes("web2", UUID.replace("0", "1"), {}, {"/old/nvram": "/new/n"}))
    assert "<name>web2<" in text and "<nvram>/new/n<" in text and UUID not in text


def test_a_file_is_given_no_more_room_than_twice_what_it_needs(tmp_path: Path) -> None:
    """An increment is some clusters; of a quarter of a GiB each a folder of backups may have no room for many."""
    with (tmp_path / "disk").open("wb") as file:
        writer = Qcow2Writer(file.fileno(), 64 << 20)
        for number in range(512):
            writer.write(number, memoryview(bytes(CLUSTER)))
            size = os.fstat(file.fileno()).st_size
            assert size <= 2 * max(1 << 20, (number + 2) * CLUSTER), number
        assert writer.finish() == os.fstat(file.fileno()).st_size


def test_what_a_definition_reaches() -> None:
    def reaches(extra: str) -> frozenset[str]:
        text = DEFINITION.replace("</devices>", extra + "</devices>")
        return backup_definition.reaches(text, {"/old/nvram"}, ["/pool"], "/usr/bin/qemu")

    assert reaches("") == frozenset()
    for extra in (
        "<disk><source file='/etc/shadow'/></disk>",
        "<disk><source file='/pool/../etc/shadow'/></disk>",
        "<disk><source dev='/dev/sda'/></disk>",
        "<hostdev><source><address bus='1'/></source></hostdev>",
        "<filesystem><source dir='/'/></filesystem>",
        "<emulator>/tmp/x</emulator>",
        "<serial type='file'><source path='/etc/x'/></serial>",
        "<q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'><q:arg value='-x'/></q:commandline>",
    ):
        assert reaches(extra), extra
    with pytest.raises(ImageError):
        backup_definition.require_same(DEFINITION, "web2", UUID)
    with pytest.raises(ImageError):
        backup_definition.require_same("<domain", "web1", UUID)


@pytest.mark.parametrize("size", [5 * CLUSTER + 512, 40 * CLUSTER])
def test_a_copy_is_what_is_served_and_proves_it(tmp_path: Path, size: int) -> None:
    raw, made = tmp_path / "raw", tmp_path / "made.qcow2"
    rng = random.Random(size)
    content = bytearray(size)
    for number in range(0, backup_index.clusters(size), 2):
        at = number * CLUSTER
        content[at : min(at + CLUSTER, size)] = rng.randbytes(min(CLUSTER, size - at))
    raw.write_bytes(content)
    runs = ((0, backup_index.clusters(size)),)
    handle = os.open(made, os.O_RDWR | os.O_CREAT)
    with qemu_nbd.served(qemu_nbd.plain_tree(str(raw), "raw"), what="serve") as (socket, export):
        writer = Qcow2Writer(handle, size)
        index = backup_copy.run(Copy(socket, export, size, runs, writer, "x", keep_zeros=True))
        writer.finish()
        assert backup_copy.run(Copy(socket, export, size, runs, backup_copy.Nowhere(), "x", expected=index))
        wrong = index | {2: b"x" * 32}
        with pytest.raises(ImageError, match=f"cannot trust x: what it holds at {2 * CLUSTER}"):
            backup_copy.run(Copy(socket, export, size, runs, backup_copy.Nowhere(), "x", expected=wrong))
        with Export(socket, export, ["base:allocation"]) as asked:
            assert sum(span.length for span in asked.status("base:allocation")) == size == asked.size
            with pytest.raises(Broken):
                asked.read(size + CLUSTER, memoryview(bytearray(CLUSTER)))
        with pytest.raises(Broken):
            Export(socket, export, ["qemu:dirty-bitmap:none"])
        with pytest.raises(Broken):
            Export(socket, "another")
    os.close(handle)
    assert {n for n, one in index.items() if one == ZEROS} == set(range(1, backup_index.clusters(size), 2))
    assert all(index[n] == digest.leaf(bytes(content[n * CLUSTER :][:CLUSTER]).ljust(CLUSTER, b"\0")) for n in (0, 2))
    subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", str(made), str(raw)], check=True)
    with pytest.raises(Broken):
        Export(socket, export)


def test_a_file_that_backups_share_is_proved_once_and_no_other_in_its_place(tmp_path: Path) -> None:
    data, read = b"kernel" * 100, list[str]()
    for number in range(1, 4):
        made = manifest(number, disks=(), files=(StoredFile("boot", "boot-1", len(data), sha256(data).hexdigest()),))
        folder = tmp_path / made.id
        folder.mkdir()
        (folder / "manifest.json").write_text(backup_manifest.dump(made))
        if number == 1:
            (folder / "boot-1").write_bytes(data)
        else:
            os.link(next(tmp_path.glob("*/boot-1")), folder / "boot-1")
    # It stays for as long as the process.
    sys.addaudithook(lambda event, words: read.append(str(words[0])) if event == "open" else None)
    found = backup_verify.verify(tmp_path, (), lambda _event: None)
    assert [one.problems for one in found] == [()] * 3
    assert len([path for path in read if path.endswith("boot-1")]) == 1
    last = tmp_path / found[-1].id / "boot-1"
    last.unlink()
    last.write_bytes(data[:-1] + b"x")
    problems = [one.problems for one in backup_verify.verify(tmp_path, (), lambda _event: None)]
    assert problems[:2] == [(), ()] and str(last) in problems[2][0]


def test_a_mistyped_vm_is_guessed_from_those_that_have_backups(tmp_path: Path) -> None:
    (tmp_path / "web-server").mkdir()
    (tmp_path / ".half-made").mkdir()
    meant = tmp_path / "web-sever"
    for ask in (
        lambda: backup.prune(meant, 1, None, silent, dry=True),
        lambda: backup_store.shelf(meant).point("latest"),
    ):
        with pytest.raises(NotFound) as failed:
            ask()
        assert "web-server" in failed.value.hint
    assert backup_store.vm_meant(tmp_path / "database") == ""


def test_a_file_is_shown_with_what_is_known_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nvram = StoredFile("nvram", "nvram.fd", 2, DIGEST, "/nvram/web1.fd")
    one = manifest(1, files=(StoredFile("domain", "domain.xml", 1, DIGEST), nvram))
    _shelved(tmp_path / "web1", one)
    assert run(["backup", "show", "web1", "--folder", str(tmp_path)]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["domain", "domain.xml, 1 B"] in rows and ["nvram", "nvram.fd, 2 B, /nvram/web1.fd"] in rows


def test_the_vms_are_listed_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for vm in ("web10", "web2"):
        _shelved(tmp_path / vm, manifest(1, vm=vm))
    assert [one.vm for one in backup_list.list_backups(tmp_path, ())] == ["web2", "web10"]
