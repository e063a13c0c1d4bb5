"""The head of a saved memory: read, written for another domain, and refused when it is not what is known."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl import saved_memory
from vmctl.errors import Unsupported

XML = "<domain type='qemu'><name>one</name></domain>\n"
COOKIE = "<cookie><cpu/></cookie>\n"
STREAM = b"QEVM\0\0\0\3"


def file(xml: str = XML, cookie: str = COOKIE) -> bytes:
    """A whole file with the beginning of a stream."""
    return saved_memory.head(xml, cookie) + STREAM


def header(**changes: int | bytes) -> bytes:
    """A header of libvirt's with some fields changed."""
    fields = {"magic": saved_memory.MAGIC, "version": 2, "data": 100, "ran": 1, "compressed": 0, "cookie": 0}
    fields |= changes
    return struct.pack("=16s5I", *fields.values()) + bytes(56)


def test_what_is_written_is_read_again() -> None:
    found = saved_memory.parse(file())
    assert (found.xml, found.cookie, found.was_running) == (XML, COOKIE, True)
    assert file()[found.size :] == STREAM and found.size == saved_memory.length(file()[: saved_memory.HEADER])


def test_without_a_cookie() -> None:
    found = saved_memory.parse(file(cookie=""))
    assert (found.xml, found.cookie) == (XML, "")


def test_libvirts_own_layout() -> None:
    """By hand, as libvirt's source has it: 92 bytes of header, then XML, NUL, cookie, NUL, padding."""
    body = (XML.encode() + b"\0" + COOKIE.encode() + b"\0").ljust(4004, b"\0")
    made = header(data=len(body), cookie=len(XML) + 1) + body + STREAM
    assert saved_memory.HEADER == 92
    found = saved_memory.parse(made)
    assert (found.xml, found.cookie, found.size) == (XML, COOKIE, 92 + 4004)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"magic": b"LibvirtQemudPart"}, "not written to its end"),
        ({"magic": b"QEVM"}, "does not begin"),
        ({"version": 1}, "version is 1"),
        ({"version": 3}, "version is 3"),
        ({"compressed": 2}, "compressed"),
        ({"data": 0}, "has 0 bytes"),
        ({"data": 0xFFFFFFFF}, "bytes"),
    ],
)
def test_headers_that_are_refused(changes: dict[str, int | bytes], why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        saved_memory.length(header(**changes))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cut off"),
        (header()[:50], "cut off"),
        (header() + b"<domain>", "cut off"),
        (header(data=8) + b"<domain>" + STREAM, "no end"),
        (header(data=9, cookie=10) + b"<domain>\0" + STREAM, "outside"),
        (header(data=9, cookie=9) + b"<domain>\0" + STREAM, "no end"),
        (header(data=9) + b"<machine\0" + STREAM, "does not describe"),
        (header(data=9) + b"<domain\xff\0" + STREAM, "no text"),
        (header(data=9) + b"<domain>\0" + b"LOST", "does not begin where"),
    ],
)
def test_bodies_that_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(Unsupported, match=why):
        saved_memory.parse(data)


@given(st.binary(max_size=400))
def test_whatever_comes_it_is_read_or_refused(data: bytes) -> None:
    for tried in (data, header(data=max(1, len(data) - 4)) + data):
        try:
            saved_memory.parse(tried)
        except Unsupported:
            continue


@given(st.integers(0, 91), st.integers(0, 255))
def test_a_changed_header_is_read_or_refused(at: int, byte: int) -> None:
    made = bytearray(file())
    made[at] = byte
    try:
        found = saved_memory.parse(bytes(made))
    except Unsupported:
        return
    assert found.size <= len(made)


def test_what_cannot_be_written() -> None:
    with pytest.raises(Unsupported):
        saved_memory.head("<domain>\0</domain>", "")


def test_one_that_is_still_being_written_is_read_when_that_is_expected() -> None:
    partial = b"LibvirtQemudPart" + file()[16:]
    assert saved_memory.parse(partial, partial=True) == saved_memory.parse(file())
