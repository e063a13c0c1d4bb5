"""Of QEMU's stream all is needed but pages of zeros of a memory that has none yet, however it comes in pieces."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl.ram_stream import RamStream

PAGE = 4096
CONFIG = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-7.2x"
BEGIN = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"
PART, LAST, FOOTER = b"\x02\0\0\0\x02", b"\x03\0\0\0\x02", b"\x7e\0\0\0\x02"
END = struct.pack(">Q", 0x10)
DEVICES = b"\x04\0\0\0\x05\x05timer" + bytes(range(256)) * 40
NAMES = (b"pc.ram", b"pc.bios")
SIZES = struct.pack(">Q", 6 * 65536 | 4) + b"".join(
    bytes([len(name)]) + name + struct.pack(">Q", size) for name, size in zip(NAMES, (65536 * 5, 65536), strict=True)
)
Page = tuple[int, int]  # which it is, and the byte it is full of; -1: no byte alone


def records(name: bytes, pages: list[Page], *, first: bool = True) -> bytes:
    """A block's pages as QEMU writes them: the first tells the block's name."""
    found = b""
    for number, value in pages:
        flags = (0x02 if value >= 0 else 0x08) | (0 if first else 0x20)
        found += struct.pack(">Q", number * PAGE | flags) + (bytes([len(name)]) + name if first else b"")
        found += bytes([value]) if value >= 0 else struct.pack(">I", number) * (PAGE // 4)
        first = False
    return found


def stream(main: list[Page], other: list[Page], *, again: bytes = b"") -> bytes:
    half = len(main) // 2
    parts = [
        BEGIN + SIZES + END + FOOTER,
        PART + records(NAMES[0], main[:half]) + END + FOOTER if half else b"",
        PART + records(NAMES[0], main[half:], first=not half) + records(NAMES[1], other) + again + END + FOOTER,
        LAST + END + FOOTER + DEVICES,
    ]
    return CONFIG + b"".join(parts)


def reduced(data: bytes, sizes: list[int]) -> bytes:
    """What is needed of a stream that grows by these sizes."""
    reader, there, found = RamStream(), 0, []
    for size in [*sizes, len(data)]:
        there = min(len(data), there + size)
        found += reader.read(data[reader.at : there], last=there == len(data))
    assert reader.at == len(data) and all(a[1] <= b[0] for a, b in zip(found, found[1:], strict=False))
    return b"".join(data[begin:end] for begin, end in found)


def loaded(data: bytes) -> tuple[dict[tuple[bytes, int], bytes], bytes]:
    """The pages that a machine of zeros has after it, by block and number, and what follows the memory."""
    at, block, memory = len(CONFIG) + len(BEGIN) + len(SIZES) + len(END) + len(FOOTER), b"", {}
    while data[at] in {2, 3}:
        at += 5
        while (word := struct.unpack_from(">Q", data, at)[0]) & 0xFFF != 0x10:
            at += 8
            if not word & 0x20:
                block = data[at + 1 : at + 1 + data[at]]
                at += 1 + data[at]
            size = PAGE if word & 0x08 else 1
            memory[block, word // PAGE] = data[at : at + size] * (PAGE // size)
            at += size
        at += len(END) + len(FOOTER)
    return {key: page for key, page in memory.items() if page.strip(b"\0")}, data[at:]


def numbered(values: list[int], gaps: list[int]) -> list[Page]:
    places = [sum(gaps[: at + 1]) + at for at in range(len(values))]
    return list(zip(places, values, strict=True))


VALUES = st.lists(st.sampled_from([0, 0, 0, -1, -1, 7]), min_size=1, max_size=30)


@given(VALUES, VALUES, st.lists(st.integers(1, 9000), max_size=60), st.integers(0, 1000))
def test_what_is_left_out_are_zeros(main: list[int], other: list[int], sizes: list[int], seed: int) -> None:
    gaps = [seed % 7 if number % 5 == 0 else 0 for number in range(30)]
    data = stream(numbered(main, gaps), numbered(other, [0] * 30))
    less = reduced(data, sizes)
    assert loaded(less) == loaded(data)
    zeros = main[1:].count(0)  # the first tells the block's name
    assert len(data) - len(less) == 9 * zeros


def test_zeros_of_another_block_are_needed() -> None:
    """What was in a ROM is overwritten by them."""
    data = stream([(0, -1)], [(0, 7), (1, 0), (2, 0)])
    assert reduced(data, []) == data


@pytest.mark.parametrize("named", [False, True])
def test_a_page_that_comes_again_is_needed(named: bool) -> None:
    """A guest that ran meanwhile has emptied it."""
    first = [(0, -1), (1, -1), (2, 0), (3, 0)]
    data = stream(first, [(0, -1)], again=records(NAMES[0], [(1, 0), (2, -1), (3, 0)], first=True))
    if not named:  # no other block came between: its name is not told again
        data = stream(first, [], again=records(NAMES[0], [(0, -1), (1, 0)], first=False))
    less = reduced(data, [])
    assert loaded(less) == loaded(data) and len(data) - len(less) == 2 * 9


@pytest.mark.parametrize(
    "data",
    [
        b"QEVM" + bytes(9000),
        b"",
        CONFIG,
        CONFIG + BEGIN + SIZES[:20],
        CONFIG + BEGIN + struct.pack(">Q", 10 | 4 << 12) + b"\x01a" + bytes(40),
        CONFIG + BEGIN + SIZES + END + FOOTER + PART + struct.pack(">Q", 0x122) + bytes(90),
        CONFIG + BEGIN + SIZES + END + FOOTER + b"\x02\0\0\0\x09" + records(b"else", [(0, 0), (1, 0)]),
    ],
)
def test_what_is_not_known_is_needed(data: bytes) -> None:
    assert reduced(data, [1] * 300) == data


def test_a_memory_of_zeros_of_any_length() -> None:
    data = stream([(number, 0) for number in range(70_000)], [(0, -1)])
    assert len(reduced(data, [1 << 18])) < len(stream([], [(0, -1)])) + 100
