"""What is decided of snapshots, and their XML: every kind, every refusal, every shape of chain."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmctl import disk_xml, domain_files, record, snapshot_diff, snapshot_plan, snapshot_xml
from vmctl.errors import NotFound, SpecError, Unsupported, VmctlError, WrongState
from vmctl.snapshot_plan import DiskState, Files, Kind, Merge, Ref, Situation, Wanted, address, choose, tidy, tree
from vmctl.snapshot_xml import Kept, Snapshot

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DISKS = (DiskState("vda", "qcow2"), DiskState("vdb", "raw", readonly=True))
HERE = Situation("running", False, False, True, (9, 0, 0), DISKS)

XML = """<domainsnapshot>
  <name>two</name>
  <state>running</state>
  <parent>
    <name>one</name>
  </parent>
  <creationTime>1767323045</creationTime>
  <memory snapshot='external' file='/p/m.memory'/>
  <disks>
    <disk name='vda' snapshot='external' type='file'>
      <driver type='qcow2'/>
      <source file='/p/c.qcow2'/>
    </disk>
    <disk name='vdb' snapshot='no'/>
  </disks>
  <domain type='qemu'>
    <name>web1</name>
    <metadata><vmctl:vm xmlns:vmctl="https://vmctl.dev/xmlns/vm/1" image="old"></vmctl:vm></metadata>
    <devices>
      <disk type='file' device='disk'>
        <driver name='qemu' type='qcow2'/>
        <source file='/p/b.qcow2' index='1'/>
        <backingStore type='file'><format type='qcow2'/><source file='/p/a.qcow2'/></backingStore>
        <target dev='vda' bus='virtio'/>
      </disk>
      <disk type='file' device='disk'>
        <driver name='qemu' type='raw'/>
        <source file='/p/seed.iso'/>
        <target dev='vdb' bus='virtio'/>
        <readonly/>
      </disk>
    </devices>
  </domain>
  <inactiveDomain type='qemu'>
    <name>web1</name>
    <metadata><vmctl:vm xmlns:vmctl="https://vmctl.dev/xmlns/vm/1" image="old"></vmctl:vm></metadata>
    <devices>
      <disk type='file' device='disk'>
        <driver name='qemu' type='qcow2'/>
        <source file='/p/b.qcow2'/>
        <target dev='vda' bus='virtio'/>
      </disk>
    </devices>
  </inactiveDomain>
</domainsnapshot>"""


def snapshot(name: str, parent: str = "", *, current: bool = False, age: int = 0, kept: Kept | None = None) -> Snapshot:
    when = NOW - timedelta(hours=age)
    return Snapshot(name, parent, "", when, "shutoff", "no", "", (), kept, current, "")


def test_xml_is_read_and_what_holds_the_state_is_told_from_what_was_made_on_top() -> None:
    one = snapshot_xml.read(XML, current=True)
    assert (one.name, one.parent, one.state, one.memory_file) == ("two", "one", "running", "/p/m.memory")
    assert one.files == {"/p/b.qcow2"} and one.external[0].overlay == "/p/c.qcow2" and one.kind == "external"
    # Neither the overlay nor the chain of then keeps a file: they may be gone since.
    assert domain_files.named(XML) == {"/p/b.qcow2", "/p/seed.iso", "/p/m.memory"}


def test_what_is_kept_is_read_again_replaced_and_counts_as_named() -> None:
    text = snapshot_xml.with_kept(XML, Kept("/p/n&.nvram", NOW))
    assert snapshot_xml.read(text).kept == Kept("/p/n&.nvram", NOW)
    assert "/p/n&.nvram" in domain_files.named(text)
    text = snapshot_xml.with_kept(text, Kept())
    assert snapshot_xml.read(text).kept == Kept() and text.count("vmctlsnap:snapshot") == 1
    without = XML.replace(XML[XML.index("<metadata>") : XML.index("</metadata>") + 11], "", 1)
    assert snapshot_xml.read(snapshot_xml.with_kept(without, Kept("/n"))).kept == Kept("/n")
    assert "vmctlsnap" not in snapshot_xml.definition(snapshot_xml.read(text))


@pytest.mark.parametrize(
    "shape",
    [
        "<metadata/>",
        "<metadata />",
        "<metadata\n/>",
        "<metadata></metadata>",
        "<metadata >\n</metadata>",
        "<metadata xmlns:a='urn:a'/>",
        "",
    ],
)
def test_what_is_kept_gets_into_metadata_of_any_shape(shape: str) -> None:
    """An empty element was not seen, and got a second one beside it, of which libvirt reads the first alone."""
    begin, end = XML.index("<metadata>"), XML.index("</metadata>") + len("</metadata>")
    text = snapshot_xml.with_kept(XML[:begin] + shape + XML[end:], Kept("/n"))
    assert snapshot_xml.read(text).kept == Kept("/n")
    elements = ET.fromstring(text).findall("domain/metadata")
    assert len(elements) == 1 and len(elements[0]) == 1
    assert snapshot_xml.read(snapshot_xml.with_kept(text, Kept("/m"))).kept == Kept("/m")


def test_the_definition_is_the_inactive_one_under_its_own_tag() -> None:
    text = snapshot_xml.definition(snapshot_xml.read(XML))
    assert text.startswith("<domain type='qemu'>") and text.endswith("</domain>") and "index" not in text
    assert [one.target for one in disk_xml.read(text)] == ["vda"]


def test_files_move_in_both_definitions_and_nowhere_else() -> None:
    text = snapshot_xml.with_files(XML, {"/p/b.qcow2": ("/p/a.raw", "raw")})
    assert text.count("/p/a.raw") == 2 and "/p/b.qcow2" not in text and "/p/c.qcow2" in text
    one = snapshot_xml.read(text)
    assert (one.disks[0].file, one.disks[0].format) == ("/p/a.raw", "raw")
    assert "/p/c.qcow2.gone" in (without := snapshot_xml.without_overlays(XML)) and "/p/b.qcow2'" in without


def test_a_definition_keeps_the_record_of_now() -> None:
    now = '<domain><metadata><vmctl:vm image="new"><x/></vmctl:vm></metadata></domain>'
    text = snapshot_xml.with_record_of(snapshot_xml.definition(snapshot_xml.read(XML)), now)
    assert 'image="new"' in text and 'image="old"' not in text
    assert snapshot_xml.with_record_of("<domain/>", "<domain/>") == "<domain/>"
    assert "<name>a&amp;b</name>" in snapshot_xml.with_name(XML, "a&b")


def test_addresses_may_have_dots_on_both_sides() -> None:
    assert address("web", {"web"}) == Ref("web", "")
    assert address("web.a.b", {"web", "we"}) == Ref("web", "a.b")
    assert address("web.a.b", {"web", "web.a"}) == Ref("web.a", "b")
    with pytest.raises(NotFound):
        address("wex.a", {"web"})


@pytest.mark.parametrize(("text", "hours"), [("30m", 0.5), ("12h", 12), ("7d", 168), ("2w", 336)])
def test_spans(text: str, hours: float) -> None:
    assert snapshot_plan.span(text) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "0d", "7", "-1d", "7y", "1.5h", "7d "])
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(SpecError):
        snapshot_plan.span(text)


@pytest.mark.parametrize(
    ("now", "wanted", "kind", "memory"),
    [
        (HERE, Wanted(), "external", True),
        (HERE, Wanted(memory=False), "external", False),
        (HERE, Wanted(freeze=True), "external", False),
        (replace(HERE, state="paused"), Wanted(), "external", True),
        (replace(HERE, state="stopped"), Wanted(), "external", False),
        (replace(HERE, local=False), Wanted(), "internal", True),
        (replace(HERE, kinds=frozenset({"internal"})), Wanted(), "internal", True),
        (HERE, Wanted(kind=Kind.INTERNAL), "internal", True),
        (replace(HERE, uefi=True), Wanted(), "external", True),
        (replace(HERE, uefi=True, nvram_qcow2=True, libvirt=(10, 10, 0)), Wanted(kind=Kind.INTERNAL), "internal", True),
        (replace(HERE, unsaveable=("shared folders",)), Wanted(), "external", False),
        (replace(HERE, disks=(DiskState("vda", "raw"),)), Wanted(), "external", True),
    ],
)
def test_the_kind_that_is_chosen(now: Situation, wanted: Wanted, kind: str, memory: bool) -> None:
    mode = choose("do it", now, wanted)
    assert (mode.kind, mode.memory, mode.disks) == (kind, memory, ("vda",)) and mode.why


@pytest.mark.parametrize(
    ("now", "wanted", "error", "words"),
    [
        (replace(HERE, state="saved"), Wanted(), WrongState, "saved"),
        (replace(HERE, persistent=False), Wanted(), Unsupported, "transient"),
        (replace(HERE, disks=DISKS[1:]), Wanted(), Unsupported, "no disk"),
        (HERE, Wanted(memory=True, freeze=True), SpecError, "frozen"),
        (replace(HERE, state="stopped"), Wanted(memory=True), WrongState, "stopped"),
        (replace(HERE, state="paused"), Wanted(freeze=True), WrongState, "paused"),
        (replace(HERE, unsaveable=("host devices",)), Wanted(memory=True), Unsupported, "host devices"),
        (HERE, Wanted(kind=Kind.INTERNAL, memory=False), Unsupported, "has its memory"),
        (replace(HERE, uefi=True), Wanted(kind=Kind.INTERNAL), Unsupported, "UEFI"),
        (replace(HERE, kinds=frozenset({"external"})), Wanted(kind=Kind.INTERNAL), Unsupported, "external snapshots"),
        (replace(HERE, kinds=frozenset({"internal"})), Wanted(kind=Kind.EXTERNAL), Unsupported, "internal snapshots"),
        (replace(HERE, local=False), Wanted(kind=Kind.EXTERNAL), Unsupported, "another machine"),
        (replace(HERE, local=False, uefi=True), Wanted(), Unsupported, "UEFI"),
        (replace(HERE, disks=(DiskState("vda", "raw"),)), Wanted(kind=Kind.INTERNAL), Unsupported, "not qcow2"),
        (replace(HERE, disks=(DiskState("vda", "qcow2", file=False),)), Wanted(), Unsupported, "no file"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(
    now: Situation, wanted: Wanted, error: type[VmctlError], words: str
) -> None:
    with pytest.raises(error, match=words):
        choose("do it", now, wanted)


def test_which_go_by_age_and_number() -> None:
    found = [snapshot(str(n), age=n, kept=Kept()) for n in range(5)] + [snapshot("foreign", age=99)]
    found.append(snapshot("old", age=50, kept=Kept(expires=NOW)))
    expired, oldest = snapshot_plan.victims(found, NOW, most=3)
    assert [one.name for one in expired] == ["old"] and [one.name for one in oldest] == ["4", "3"]
    assert snapshot_plan.victims(found, NOW - timedelta(seconds=1), most=None) == ([], [])


def test_the_tree_is_drawn() -> None:
    found = [
        snapshot("a", age=9),
        snapshot("b", "a", age=8),
        snapshot("c", "a", age=7, current=True),
        snapshot("d", "b"),
    ]
    drawn = [branch.lead + (branch.snapshot.name if branch.snapshot else "*") for branch in tree(found)]
    assert drawn == ["└─ a", "   ├─ b", "   │  └─ d", "   └─ c", "      └─ *"]
    deep = [snapshot(str(n), str(n - 1) if n else "", age=3000 - n) for n in range(3000)]
    assert len(tree(deep)) == 3001


def files(bases: dict[str, str], mine: dict[str, str], own: str, others: str = "") -> Files:
    pins = {path: frozenset(names.split()) for path, names in mine.items()}
    return Files(bases, pins, others.split(), own.split(), frozenset(own.split()))


LINE = {"d": "c", "c": "b", "b": "a", "a": "image"}


@pytest.mark.parametrize(
    ("found", "want"),
    [
        (files(LINE, {"d": "now", "c": "s3", "b": "s2", "a": "s1"}, "a b c d"), ((), ())),
        (files(LINE, {"d": "now", "c": "s3", "b": "s2"}, "a b c d"), ((), (Merge("a", "b"),))),
        (files(LINE, {"d": "now", "c": "s3", "a": "s1"}, "a b c d"), ((), (Merge("b", "c"),))),
        (files(LINE, {"d": "now", "b": "s2", "a": "s1"}, "a b c d"), ((), (Merge("c", "d"),))),
        (files(LINE, {"b": "s2", "a": "s1"}, "a b c d"), (("d", "c"), ())),
        # A branch: what both need stays, whoever else goes.
        (files(LINE | {"e": "b"}, {"d": "now", "c": "s3", "e": "s4", "a": "s1"}, "a b c d e"), ((), ())),
        # A clone of somebody's.
        (files(LINE | {"clone": "c"}, {"d": "now", "b": "s2", "a": "s1"}, "a b c d"), ((), ())),
        (files(LINE | {"clone": "d"}, {"a": "s1"}, "a b c d"), ((), (Merge("b", "c"), Merge("b", "d")))),
        (files(LINE, {"b": "s2", "a": "s1"}, "a b c d", others="d"), ((), ())),
        # Never into what is not the VM's own.
        (files({"a": "image"}, {"a": "now"}, "a"), ((), ())),
    ],
)
def test_what_is_tidied(found: Files, want: object) -> None:
    assert tidy(found) == want


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_tidied_nobody_loses_a_file_they_need(data: st.DataObject) -> None:
    """Any forest, any pins: what is pinned reads the same afterwards, through merged files."""
    count = data.draw(st.integers(1, 9))
    names = [chr(ord("a") + n) for n in range(count)]
    bases = {name: data.draw(st.sampled_from(["image", *names[:n]])) for n, name in enumerate(names)}
    pinned = data.draw(st.sets(st.sampled_from(names)))
    own = data.draw(st.sets(st.sampled_from(names)))
    others = data.draw(st.sets(st.sampled_from(names), max_size=2))
    pins = {name: frozenset({f"s-{name}"}) for name in pinned & own}
    gone, merges = tidy(Files(bases, pins, others, sorted(own), frozenset(own)))

    def reads(top: str, of: dict[str, str], held: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
        found: tuple[str, ...] = ()
        while top != "image":
            found += held[top]
            top = of[top]
        return found

    before = {name: (name,) for name in names}
    of, held, now = dict(bases), dict(before), {name: name for name in pins}
    assert not set(gone) & ({*now.values()} | others)
    for path in gone:
        assert path not in of.values()
        of.pop(path)
    for merge in merges:
        assert [top for top, base in of.items() if base == merge.base] == [merge.top]
        assert merge.base not in now.values() and not {merge.base, merge.top} & others
        held[merge.base] = held[merge.top] + held[merge.base]
        of = {top: merge.base if base == merge.top else base for top, base in of.items() if top != merge.top}
        now = {who: merge.base if at == merge.top else at for who, at in now.items()}
    for who, at in now.items():
        assert reads(at, of, held) == reads(who, bases, before)
    for other in set(names) - own:
        assert reads(other, of, held) == reads(other, bases, before)


def test_ranges_are_counted_once() -> None:
    assert snapshot_plan.union([(0, 10), (5, 15), (20, 30), (21, 22)]) == 25
    for order in itertools.permutations([(0, 4), (2, 6), (8, 9)]):
        assert snapshot_plan.union(order) == 7


def test_a_definition_inside_a_snapshot_differs_not_by_where_it_stands() -> None:
    now = "<domain type='qemu'>\n  <name>a</name>\n  <devices>\n    <emulator/>\n  </devices>\n</domain>\n"
    inside = "<domain type='qemu'>\n    <name>a</name>\n    <devices>\n      <emulator/>\n    </devices>\n  </domain>"
    assert snapshot_diff._lines(now) == snapshot_diff._lines(inside)
    record = "  <metadata>\n{0}    <vmctl:vm xmlns:vmctl='v'>\n{0}  <vmctl:ssh/>\n{0}</vmctl:vm>\n  </metadata>\n"
    written_anew, as_put = (now.replace("  <devices>", record.format(by) + "  <devices>") for by in ("    ", ""))
    assert snapshot_diff._lines(written_anew) == snapshot_diff._lines(as_put)


def test_the_note_of_its_hosts_is_that_of_now_in_both_definitions() -> None:
    def domain(*hosts: str, metadata: str = "") -> str:
        homes = "".join(f'<vmctl-homes:home host="{one}" name="n" uri=""/>' for one in hosts)
        note = f'<vmctl-homes:homes xmlns:vmctl-homes="{record.HOMES}" vm="u">\n{homes}</vmctl-homes:homes>'
        return f"<domain><uuid>u</uuid><metadata>{metadata}{note if hosts else ''}</metadata></domain>"

    def hosts(text: str) -> list[str]:
        return [one.uuid for one in record.homes(text)]

    bare, emptied = "<domain><uuid>u</uuid></domain>", "<domain><uuid>u</uuid><metadata/></domain>"
    for then in (domain(), domain("x"), domain("x", metadata="<other/>"), bare, emptied):
        for now in (domain(), domain("a", "b"), "<domain><uuid>u</uuid></domain>"):
            text = record.with_homes_of(then, now)
            assert hosts(text) == hosts(now) and ("<other/>" in text) == ("<other/>" in then)
            assert len(ET.fromstring(text).findall("metadata")) <= 1, "libvirt's schema has one"
    saved = XML.replace("<name>web1</name>", "<name>web1</name><uuid>u</uuid>")
    for now in (domain("a", "b"), domain("c"), domain()):
        saved = snapshot_xml.with_homes_of(saved, now)
        whole = ET.fromstring(saved)
        for part in ("domain", "inactiveDomain"):
            found = whole.find(part)
            assert found is not None and hosts(ET.tostring(found, encoding="unicode")) == hosts(now)
            assert found.find("metadata/{https://vmctl.dev/xmlns/vm/1}vm") is not None


@pytest.mark.parametrize("external", [True, False])
def test_memory_that_cannot_be_saved_is_said_to_be_left_out(external: bool) -> None:
    """The reason named neither the memory nor the shared folders, and a revert ended with a stopped VM."""
    now = replace(HERE, unsaveable=("shared folders",))
    mode = choose("x", now, Wanted(Kind.EXTERNAL if external else None))
    assert not mode.memory and mode.lacks == "QEMU cannot save its shared folders"
    if not external:
        assert str(mode) == "external, disk vda (QEMU cannot save its shared folders)"
    assert choose("x", now, Wanted(memory=False)).lacks == choose("x", now, Wanted(freeze=True)).lacks == ""
    assert choose("x", replace(now, state="stopped"), Wanted()).lacks == choose("x", HERE, Wanted()).lacks == ""


def test_a_mistyped_snapshot_or_vm_is_guessed() -> None:
    with pytest.raises(NotFound) as told:
        snapshot_plan.one_of([snapshot("clean"), snapshot("x")], Ref("web1", "claen"))
    assert told.value.hint == "did you mean web1.clean?"
    with pytest.raises(NotFound) as told:
        address("wbe1.clean", {"web1", "db"})
    assert told.value.hint == "did you mean web1.clean?"
