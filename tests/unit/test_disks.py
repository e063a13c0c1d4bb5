"""What is decided about disks without any: names, sizes, sources, limits, who may write, where blocks are."""

from __future__ import annotations

import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from vmctl import disk_chain, disk_guard, disk_inside, disk_map, disk_spec, disk_xml, pools
from vmctl.choices import Aio, Bus, Cache, PoolType
from vmctl.disk_chain import Chain, Layer
from vmctl.disk_guard import Use
from vmctl.disk_spec import Attachment, IoLimits, Ref, Source, SourceKind
from vmctl.errors import ImageError, NotFound, SpecError
from vmctl.pools import NewPool
from vmctl.qemu_img import Extent


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("web1:vdc", Ref(vm="web1", disk="vdc")),
        ("web1:/srv/a.raw", Ref(vm="web1", disk="/srv/a.raw")),
        ("web1:nbd://h:1/x", Ref(vm="web1", disk="nbd://h:1/x")),
        ("data", Ref(pool="vmctl", volume="data")),
        ("fast/data.raw", Ref(pool="fast", volume="data.raw")),
        ("/srv/a:b.raw", Ref(path="/srv/a:b.raw")),
    ],
)
def test_a_disk_is_named_in_four_ways(text: str, ref: Ref) -> None:
    assert disk_spec.parse_ref(text, "vmctl") == ref


@pytest.mark.parametrize("text", ["", "nbd://h:1/x", "a/b/c", "x\n", ":vda", "web1:", "/", "a/", "a/..", "\u2028"])
def test_what_names_no_disk_is_refused(text: str) -> None:
    if text == "/":
        assert disk_spec.parse_ref(text, "p") == Ref(path="/")  # a path, if an odd one: it is looked at later
        return
    with pytest.raises(SpecError):
        disk_spec.parse_ref(text, "vmctl")


@pytest.mark.parametrize(
    "text",
    [
        "/srv/a b.raw",
        "nbd://10.0.0.1:10809/data",
        "nbd://[::1]:10810/data",
        "nbd+unix:///data?socket=/run/nbd.sock",
        "iscsi://host:3260/iqn.2024-01.org.example:disks/1",
        "rbd://mon:6789/pool/image",
    ],
)
def test_a_source_is_told_as_it_was_given_and_found_again_in_the_xml(text: str) -> None:
    source = disk_spec.parse_source(text)
    assert str(source) == text
    from vmctl import render

    kind = "file" if source.path else "network"
    protocol = "" if source.path else str(source.kind)
    view = render.AttachedView(
        kind,
        "raw",
        "vdc",
        "virtio",
        "data",
        source.path,
        protocol,
        source.name,
        source.host,
        source.port,
        source.socket,
    )
    (disk,) = disk_xml.read(f"<domain><devices>{render.attached_disk(view)}</devices></domain>")
    assert disk.source == text


def test_ports_have_their_defaults() -> None:
    assert disk_spec.parse_source("nbd://h/x") == Source(SourceKind.NBD, name="x", host="h", port=10809)
    assert disk_spec.parse_source("/dev/sdb").kind is SourceKind.BLOCK


@pytest.mark.parametrize(
    "text",
    [
        "a.raw",
        "/srv/../etc/x",
        "http://h/x",
        "nbd:///x",
        "nbd://h:0/x",
        "nbd://h:99999/x",
        "nbd://u@h/x",
        "iscsi://h/disks/1",
        "iscsi://h/iqn.2024-01.org.example:disks",
        "rbd://h/image",
        "nbd+unix:///x?socket=rel",
        "/srv/a\nb",
    ],
)
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        disk_spec.parse_source(text)


def test_sizes_are_relative_or_whole_and_end_on_a_sector() -> None:
    gib = 1 << 30
    assert disk_spec.new_size("+10G", gib) == 11 * gib
    assert disk_spec.new_size("20G", gib) == 20 * gib
    assert disk_spec.new_size("-512M", gib) == gib // 2
    assert disk_spec.new_size("1000000001B", gib) % 512 == 0
    for bad in ("-1G", "+", "ten", "0", "+-1G", "1.5G", "9999999T", "-0"):
        with pytest.raises(SpecError):
            disk_spec.new_size(bad, gib)


@pytest.mark.parametrize("text", ["10", "+1", "1048576", " 7 "])
def test_a_size_without_a_unit_is_refused(text: str) -> None:
    """It was bytes here and MiB in create: a disk of ten bytes, or a millionth of the room that was asked for."""
    with pytest.raises(SpecError, match="no unit") as told:
        disk_spec.new_size(text, 1 << 30)
    number = text.strip().lstrip("+")
    assert told.value.hint == f"{number}G, {number}M or {number}K; {number}B for bytes"


@pytest.mark.parametrize("size", [512, 1 << 10, 3 << 20, 2 << 30, 5 << 40, (1 << 30) + 512])
def test_an_exact_size_is_read_as_itself(size: int) -> None:
    assert disk_spec.parse_size(disk_spec.exact(size)) == size


def test_targets_and_serials_are_the_first_free_ones() -> None:
    assert disk_spec.next_target(Bus.VIRTIO, frozenset({"vda", "vdb", "vdd"})) == "vdc"
    letters = [chr(97 + n) for n in range(26)]
    assert disk_spec.next_target(Bus.SCSI, frozenset(f"sd{a}" for a in letters)) == "sdaa"
    assert disk_spec.next_target(Bus.NVME, frozenset({"nvme0n1"})) == "nvme1n1"
    with pytest.raises(SpecError):
        disk_spec.next_target(Bus.IDE, frozenset({"hda", "hdb", "hdc", "hdd"}))
    assert disk_spec.next_serial(frozenset({"disk1", "root"})) == "disk2"


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        (Attachment(serial="with space"), "serial"),
        (Attachment(serial="x" * 21), "serial"),
        (Attachment(target="sda"), "bus virtio"),
        (Attachment(target="vd1"), "like vdc"),
        (Attachment(aio=Aio.NATIVE, cache=Cache.WRITEBACK), "native"),
        (Attachment(bus=Bus.SCSI, iothread=1), "iothread"),
        (Attachment(iothread=0), "iothread"),
        (Attachment(bus=Bus.IDE, readonly=True), "read-only"),
        (Attachment(limits=IoLimits(iops=1, write_iops=1)), "exclude"),
        (Attachment(limits=IoLimits(bps=-1)), "below 0"),
    ],
)
def test_attachments_that_cannot_be_are_told(wanted: Attachment, word: str) -> None:
    (problem,) = disk_spec.attachment_problems(wanted)
    assert word in problem


USES = [Use("a", "k1", "/one", writes=True), Use("b", "k2", "/two", writes=False)]


def test_a_disk_that_is_written_is_used_by_one_vm_only() -> None:
    def told(*mine: Use) -> list[str]:
        return disk_guard.conflicts(mine, USES)

    assert told(Use("a", "k1", "/one", writes=True)) == []  # its own
    assert told(Use("c", "k1", "/one", writes=True)) == ["/one is in use: running VM a writes it"]
    assert told(Use("c", "k1", "/one", writes=False)) == ["/one is in use: running VM a writes it"]
    assert told(Use("c", "k2", "/two", writes=True)) == ["/two is in use: running VM b reads it"]
    assert told(Use("c", "k2", "/two", writes=False)) == []
    shared = [replace(USES[0], shared=True)]
    assert disk_guard.conflicts([Use("c", "k1", "/one", writes=True, shared=True)], shared) == []
    assert disk_guard.conflicts([Use("c", "k1", "/one", writes=True)], shared)


def test_two_names_of_one_file_are_one_disk(tmp_path: Path) -> None:
    file, link, hard = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    file.touch()
    link.symlink_to(file)
    hard.hardlink_to(file)
    keys = {disk_guard.key(str(one), local=True) for one in (file, link, hard, tmp_path / "x" / ".." / "a")[:3]}
    assert len(keys) == 1
    assert disk_guard.key(str(file), local=False) == str(file)


XML = """<domain><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' io='native' discard='unmap' iothread='2'/>
 <source file='/top'/><backingStore type='file'><format type='qcow2'/><source file='/mid'/>
  <backingStore type='file'><format type='raw'/><source file='/low'/><backingStore/></backingStore></backingStore>
 <target dev='vdc' bus='virtio'/><iotune><total_iops_sec>9</total_iops_sec></iotune><serial>data</serial>
 <mirror type='file' job='copy' ready='yes'><source file='/new'/></mirror><alias name='virtio-disk2'/></disk>
<disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='sda' bus='scsi'/><readonly/></disk>
<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>
</devices></domain>"""


def test_disks_are_read_with_tuning_chain_and_job() -> None:
    one, two, three = disk_xml.read(XML)
    assert (one.source, one.backing, one.mirror) == ("/top", ("/mid", "/low"), "/new")
    assert (one.cache, one.aio, one.iothread, one.limits) == ("none", "native", 2, {"total_iops_sec": 9})
    assert one.named("vdc") and one.named("data") and one.named("/top") and not one.named("")
    assert (two.source, two.readonly, three.source) == ("p/v", True, "")
    uses = disk_guard.uses("x", [one, two], local=False)
    assert [(use.name, use.writes) for use in uses] == [
        ("/top", True),
        ("/mid", False),
        ("/low", False),
        ("p/v", False),
    ]


def test_a_definition_gets_another_file_and_keeps_all_else() -> None:
    text = disk_xml.with_source(XML, "vdc", "/new.raw", "raw")
    one, two, three = disk_xml.read(text)
    assert (one.source, one.format, one.backing, one.mirror) == ("/new.raw", "raw", (), "")
    assert (one.serial, one.cache, one.iothread) == ("data", "none", 2)
    assert [two.source, three.source] == ["p/v", ""]
    record = "<metadata><v:vm xmlns:v='urn:x'><disk>a</disk></v:vm></metadata>"
    assert record in disk_xml.with_source(XML.replace("<devices>", f"{record}<devices>"), "vdc", "/new.raw", "raw")


def test_the_map_joins_what_goes_on_and_tells_layers() -> None:
    chain = Chain((Layer("/top", "qcow2", 400, 1), Layer("/low", "raw", 400, 1)))
    found = disk_map.pieces(
        [
            Extent(0, 100, 1, True, False, True, 0),
            Extent(100, 50, 1, True, False, True, 100),
            Extent(150, 50, 0, True, False, True, 900),
            Extent(200, 50, 0, True, True, False, None),
            Extent(250, 50, 1, False, True, False, None),
            Extent(300, 100, 0, True, False, True, None),
        ],
        chain,
    )
    told = [(p.offset, p.length, p.layer, p.zero, p.allocated, p.file_offset) for p in found]
    assert told == [
        (0, 150, "/low", False, True, 0),
        (150, 50, "/top", False, True, 900),
        (200, 50, "/top", True, True, None),
        (250, 50, "", True, False, None),
        (300, 100, "/top", False, True, None),
    ]
    drawn = disk_map.picture(disk_map.DiskMap("x", chain, found), width=8).splitlines()
    assert drawn == ["|   █  ██|  top (qcow2)", "|███     |  └ low (raw)"]


def test_backing_names_are_plain_files_or_nothing() -> None:
    for name, path in (
        ("/a/b", "/a/b"),
        ("b", "/top/b"),
        ("../b", "/b"),
        ("file:/a", "/a"),
        ('json:{"driver":"qcow2","file":{"driver":"file","filename":"/a"}}', "/a"),
        ('json:{"driver":"nbd","host":"h"}', ""),
        ("json:[", ""),
        ("nbd://h/x", ""),
        ("nbd:h:1", ""),
    ):
        assert disk_chain.backing_path(name, "/top/disk") == path, name


def test_a_chain_that_leaves_the_pools_is_not_followed(tmp_path: Path) -> None:
    from vmctl import qemu_img

    inside, outside = tmp_path / "pool", tmp_path / "else"
    inside.mkdir(), outside.mkdir()
    for folder in (inside, outside):
        qemu_img.create(folder / "base.qcow2", "qcow2", 1 << 20)
        qemu_img.create(
            inside / f"on-{folder.name}.qcow2", "qcow2", 1 << 20, backing=folder / "base.qcow2", backing_format="qcow2"
        )
    good = disk_chain.read(str(inside / "on-pool.qcow2"), "qcow2", lambda: [str(inside)], doing="x")
    assert [Path(layer.path).name for layer in good.layers] == ["on-pool.qcow2", "base.qcow2"]
    with pytest.raises(ImageError, match="in no storage pool"):
        disk_chain.read(str(inside / "on-else.qcow2"), "qcow2", lambda: [str(inside)], doing="x")
    link = inside / "link.qcow2"
    link.symlink_to(outside / "base.qcow2")
    assert not disk_chain.inside(str(link), [str(inside)])  # a link out of the pool is out of it
    with pytest.raises(NotFound):
        disk_chain.read(str(inside / "none"), "qcow2", lambda: [], doing="x")
    with pytest.raises(ImageError):
        disk_chain.read(str(inside / "base.qcow2"), "vmdk", lambda: [], doing="x")


POOLS = [
    NewPool("d", path="/srv/d"),
    NewPool("f", PoolType.FS, path="/mnt/f", device=("/dev/sdz1",), format="ext4"),
    NewPool("n", PoolType.NFS, path="/mnt/n", host="nas", export="/export/a & b"),
    NewPool("l", PoolType.LOGICAL, source_name="vg0", device=("/dev/sdy", "/dev/sdz")),
    NewPool("i", PoolType.ISCSI, host="san", port=3260, iqn="iqn.2024-01.org.example:x"),
    NewPool(
        "s",
        PoolType.ISCSI_DIRECT,
        host="san",
        iqn="iqn.2024-01.org.example:x",
        initiator="iqn.2024-01.org.example:me",
        user="u",
        secret="0e6e5fc0-9a5c-4a43-8d1b-2a2c6ea4a0f3",
    ),
    NewPool(
        "r", PoolType.RBD, host="mon", source_name="rbd", user="admin", secret="0e6e5fc0-9a5c-4a43-8d1b-2a2c6ea4a0f3"
    ),
]


@pytest.mark.parametrize("wanted", POOLS, ids=lambda pool: str(pool.type))
def test_each_kind_of_pool_can_be_asked_for(wanted: NewPool) -> None:
    assert pools.problems(wanted) == []


def test_what_a_pool_lacks_or_has_too_much_is_told_at_once() -> None:
    wanted = NewPool("bad name", PoolType.NFS, path="rel", device=("/dev/x",), user="u", iqn="x")
    told = "; ".join(pools.problems(wanted))
    words = ("name", "needs --export", "needs --host", "has no --device", "has no --iqn", "not absolute", "--secret")
    for word in words:
        assert word in told, word
    assert "root of all folders" in "; ".join(pools.problems(NewPool("p", PoolType.DIR, path="//")))
    assert pools.problems(NewPool("n", PoolType.NFS, path="/srv/n", host="h", export="/")) == []


def dump(raw: Path) -> list[str]:
    """The partition table, identities among it, without the disk's end."""
    done = subprocess.run(["/sbin/sfdisk", "--dump", str(raw)], capture_output=True, text=True, check=True, timeout=60)
    return [line for line in done.stdout.splitlines() if not line.startswith("last-lba")]


def test_what_is_on_a_disk_decides_whether_it_shrinks(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(32 << 20)
    assert disk_inside.look(raw, what="x").kind == "empty"
    subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", str(raw)], check=True)
    # Mounted since it was made, as every file system in use.
    mounted = "set_super_value mtime 20380101000000"
    subprocess.run(["/sbin/debugfs", "-w", "-R", mounted, str(raw)], check=True, capture_output=True)
    found = disk_inside.look(raw, what="x")
    assert (found.kind, found.needs) == ("ext", 32 << 20)
    disk_inside.cut(raw, found, 16 << 20, what="x")
    assert disk_inside.look(raw, what="x").needs <= 16 << 20 == raw.stat().st_size
    table = "label: gpt\nstart=2048, size=8192\n"
    for label, needed in (("gpt", (10240 + 33) * 512), ("dos", 10240 * 512)):
        with raw.open("wb") as file:
            file.truncate(32 << 20)
        text = table.replace("gpt", label)
        subprocess.run(["/sbin/sfdisk", "-q", str(raw)], input=text.encode(), check=True, stdout=subprocess.DEVNULL)
        found = disk_inside.look(raw, what="x")
        assert (found.kind, found.needs) == (label, needed)
        with pytest.raises(ImageError, match="partitions end"):
            disk_inside.cut(raw, found, 4 << 20, what="x")
        before = dump(raw)
        disk_inside.cut(raw, found, 8 << 20, what="x")
        assert dump(raw) == before
        assert disk_inside.look(raw, what="x").needs == needed
    raw.write_bytes(b"data" * 4096)
    with pytest.raises(ImageError, match="cannot check"):
        disk_inside.look(raw, what="x")


def test_a_file_system_that_ends_its_first_sector_as_a_partition_table_does_is_not_cut(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    # FAT, as mkfs.vfat makes it on a whole disk: jump, sizes, media; FAT16; no partition where a table would have them.
    sizes = struct.pack("<HBHBHHBHHHII", 512, 8, 1, 2, 512, 0, 0xF8, 64, 32, 2, 0, (64 << 20) // 512)
    kind = b"\x80\0\x29" + b"\1\2\3\4" + b"NO NAME    " + b"FAT16   "
    sector = (b"\xeb\x3c\x90mkfs.fat" + sizes + kind).ljust(510, b"\0") + b"\x55\xaa"
    with raw.open("wb") as file:
        file.truncate(64 << 20)
        file.write(sector + b"\xf8\xff\xff\xff")
        file.seek((64 << 20) - 4096)
        file.write(b"data" * 1024)
    with pytest.raises(ImageError, match="cannot check"):
        disk_inside.look(raw, what="x")


def test_a_thread_is_a_disks_own_where_nothing_else_names_it() -> None:
    disks = '<disk><driver iothread="1"/><target dev="vda"/></disk><disk><driver{}/><target dev="vdb"/></disk>'
    text = "<domain>{}<devices>" + disks + "{}</devices></domain>"
    assert disk_xml.only_user(text.format("", "", ""), "vda") == 1
    assert disk_xml.only_user(text.format("", "", ""), "vdb") is None
    assert disk_xml.only_user(text.format("", "", ""), "vdc") is None
    for top, other, below in (
        ("", ' iothread="1"', ""),
        ("", "", '<controller><driver iothread="1"/></controller>'),
        ('<cputune><iothreadpin iothread="1" cpuset="0"/></cputune>', "", ""),
        ('<cputune><iothreadsched iothreads="1" scheduler="fifo"/></cputune>', "", ""),
    ):
        assert disk_xml.only_user(text.format(top, other, below), "vda") is None


def test_ports_that_are_taken() -> None:
    port = '<controller type="pci" index="{}" model="pcie-root-port"/>'
    disk = '<disk><address type="pci" bus="0x01"/></disk>'
    assert not disk_xml.without_free_port(f"<domain><devices>{disk}</devices></domain>")
    assert disk_xml.without_free_port(f"<domain><devices>{port.format(1)}{disk}</devices></domain>")
    assert not disk_xml.without_free_port(f"<domain><devices>{port.format(1)}{port.format(2)}{disk}</devices></domain>")


def test_what_qemu_img_says_on_several_lines_is_told_on_one(tmp_path: Path) -> None:
    from vmctl import qemu_img_run

    above, none = str(tmp_path / "above.qcow2"), str(tmp_path / "none")
    with pytest.raises(ImageError) as failed:
        qemu_img_run.run(["create", "-f", "qcow2", "-F", "raw", "-b", none, above], what="make it", timeout_s=60)
    said = failed.value.message
    assert said.isprintable() and said.endswith("No such file or directory; Could not open backing image."), said
