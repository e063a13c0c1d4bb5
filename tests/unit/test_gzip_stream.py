"""gzip written piece by piece on several processors: one stream that anything reads."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import subprocess
import tarfile
import zlib
from typing import IO, cast

import pytest

from vmctl.gzip_stream import GzipStream


def packed(data: bytes, pieces: int, workers: int = 2) -> bytes:
    target = io.BytesIO()
    with GzipStream(target, 3, workers) as stream:
        for at in range(0, len(data), pieces):
            assert stream.write(data[at : at + pieces]) == len(data[at : at + pieces])
    return target.getvalue()


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (5 << 20) + 7])
def test_what_was_written_comes_out_of_every_reader(size: int) -> None:
    data = (random.Random(size).randbytes(size // 2) + b"text " * size)[:size]
    made = packed(data, 300_001)
    assert gzip.decompress(made) == data
    assert subprocess.run([shutil.which("gzip") or "gzip", "-dc"], input=made, capture_output=True).stdout == data


def test_it_is_one_member_and_the_same_however_it_is_written() -> None:
    data = random.Random(1).randbytes(1 << 20) * 3
    made = packed(data, 1 << 20)
    reader = zlib.decompressobj(31)
    assert reader.decompress(made) == data and reader.eof and not reader.unused_data
    assert packed(data, 77_777, workers=5) == made


def test_a_piece_knows_what_was_before_it() -> None:
    data = b"".join(b"%d," % number for number in range(800_000))
    assert len(packed(data, 1 << 20)) < 1.02 * len(gzip.compress(data, 3))


def test_a_tar_goes_through_it() -> None:
    target = io.BytesIO()
    with GzipStream(target, 3) as stream, tarfile.open(fileobj=cast(IO[bytes], stream), mode="w|") as archive:
        member = tarfile.TarInfo("a")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"hello"))
    with tarfile.open(fileobj=io.BytesIO(target.getvalue()), mode="r:gz") as archive:
        assert cast(IO[bytes], archive.extractfile("a")).read() == b"hello"


def test_an_error_of_the_target_is_told_and_ends_it() -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            if len(cast(bytes, data)) > 10:
                raise OSError(28, "No space left on device")
            return super().write(cast(bytes, data))

    with pytest.raises(OSError, match="No space"), GzipStream(Full(), 3, 1) as stream:
        stream.write(random.Random(2).randbytes(8 << 20))
