"""Tar archives as a stream: what we write others read, what others write we read, and hostile ones are refused."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl import tarstream
from vmctl.tarstream import Kind, Malformed

NAMES = st.binary(min_size=1, max_size=300).filter(lambda n: b"\0" not in n and not n.endswith(b"/"))


def read(data: bytes) -> list[tuple[tarstream.Member, bytes]]:
    stream, found = io.BytesIO(data), []
    for member in tarstream.members(stream.read):
        found.append((member, stream.read(member.size)))
        stream.read(len(tarstream.padding(member.size)))
    return found


@given(NAMES, st.binary(max_size=1500), st.integers(0, 0o7777))
def test_what_is_written_is_read_back_and_by_others(name: bytes, content: bytes, mode: int) -> None:
    data = (
        tarstream.header(name, Kind.FILE, mode, len(content))
        + content
        + tarstream.padding(len(content))
        + tarstream.END
    )
    assert read(data) == [(tarstream.Member(name, Kind.FILE, mode, len(content)), content)]
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape", encoding="utf-8") as other:
        (one,) = other.getmembers()
        assert one.name.encode("utf-8", "surrogateescape") == name and one.mode == mode
        file = other.extractfile(one)
        assert file is not None and file.read() == content


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_others_write_is_read(form: int) -> None:
    out = io.BytesIO()
    names = ["a", "d/" + "x" * 90 + "/" + "y" * 90]
    with tarfile.open(fileobj=out, mode="w", format=form) as other:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mode = 3, 0o640
            other.addfile(info, io.BytesIO(b"abc"))
        linked = tarfile.TarInfo("b")
        linked.type, linked.linkname = tarfile.LNKTYPE, names[0]
        other.addfile(linked)
        folder = tarfile.TarInfo("e")
        folder.type = tarfile.DIRTYPE
        other.addfile(folder)
    found = read(out.getvalue())
    assert [(m.name.decode(), m.kind, c) for m, c in found[:2]] == [(n, Kind.FILE, b"abc") for n in names]
    assert (found[2][0].kind, found[2][0].link.decode()) == (Kind.LINK, names[0])
    assert found[3][0].kind is Kind.FOLDER


def test_sizes_beyond_eight_gigabytes() -> None:
    big = 20 << 30
    assert next(tarstream.members(io.BytesIO(tarstream.header(b"f", Kind.FILE, 0, big)).read)).size == big


@given(st.binary(max_size=2000))
def test_noise_is_refused_or_read_and_never_more(noise: bytes) -> None:
    try:
        read(noise)
    except Malformed:
        return


def test_a_long_name_that_would_fill_the_memory_is_refused() -> None:
    good = tarstream.header(b"x" * 200, Kind.FILE, 0, 0)
    block = bytearray(good[:512])
    block[124:136] = b"77777777777\0"
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    with pytest.raises(Malformed, match="bytes"):
        read(bytes(block) + good[512:])
    with pytest.raises(Malformed):
        read(good[:700])
