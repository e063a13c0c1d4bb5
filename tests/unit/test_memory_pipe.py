"""A saved memory is read while it is written, and never to its end before it is whole."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from vmctl import saved_memory
from vmctl.errors import VmctlError
from vmctl.memory_pipe import SavedMemory

HEAD = saved_memory.head("<domain><name>one</name></domain>", "")
OWN = b"own head"
STREAM = b"QEVM" + bytes(range(256)) * 400


class Reader(threading.Thread):
    """Reads a pipe to its end."""

    def __init__(self, pipe: Path) -> None:
        super().__init__(daemon=True)
        self.pipe, self.got = pipe, b""
        self.start()

    def run(self) -> None:
        with self.pipe.open("rb", buffering=0) as file:
            while piece := file.read(1 << 16):
                self.got += piece


def settled(reader: Reader) -> bytes:
    """What has come when nothing more comes for a moment."""
    before = None
    while before != reader.got:
        before = reader.got
        time.sleep(0.1)  # that nothing comes has no event of its own
    return reader.got


def test_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(HEAD + STREAM)
    memory = SavedMemory(path)
    with memory.piped(memory.head().size, OWN) as pipe:
        reader = Reader(pipe)
        reader.join(10)
    assert reader.got == OWN + STREAM and list(tmp_path.iterdir()) == [path]


def test_while_it_is_written_its_end_is_held_back(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    memory = SavedMemory(path, whole=False)
    partial = b"LibvirtQemudPart" + HEAD[16:]
    with path.open("wb", buffering=0) as file:
        file.write(partial + STREAM[:20_000])
        head = memory.head()
        with memory.piped(head.size, OWN) as pipe:
            reader = Reader(pipe)
            first = settled(reader)
            assert first.startswith(OWN + STREAM[:1000]) and len(first) < len(OWN) + 20_000
            file.write(STREAM[20_000:])
            assert len(settled(reader)) < len(OWN + STREAM)
            file.seek(0)
            file.write(HEAD)
            memory.end(good=True)
            reader.join(10)
    assert reader.got == OWN + STREAM


def test_one_that_is_not_written_to_its_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    memory = SavedMemory(path, whole=False)
    path.write_bytes(b"LibvirtQemudPart" + HEAD[16:] + STREAM)
    with memory.piped(memory.head().size, OWN) as pipe:
        reader = Reader(pipe)
        settled(reader)
        memory.end(good=False)
        reader.join(10)
    assert not reader.is_alive() and len(reader.got) < len(OWN + STREAM)
    assert reader.got.endswith(bytes(8))
    with pytest.raises(VmctlError, match="not written to its end"):
        memory.head()


def test_one_that_was_removed_is_no_stream(tmp_path: Path) -> None:
    memory = SavedMemory(tmp_path / "memory", whole=False)
    with memory.piped(0, OWN) as pipe:
        reader = Reader(pipe)
        memory.end(good=False)
        reader.join(10)
    assert reader.got == OWN + bytes(8)


def test_one_that_never_came(tmp_path: Path) -> None:
    memory = SavedMemory(tmp_path / "memory", whole=False)
    memory.end(good=False)
    with pytest.raises(VmctlError, match="not written"):
        memory.head()
