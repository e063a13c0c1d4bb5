"""The digest of a disk: the same by any way of reading, and older manifests can still be read and checked."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from vmctl import digest, durable
from vmctl.manifest import Manifest, content_digest, name_taken, parse

# From the BLAKE3 team's test vectors.
EMPTY = "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_it_is_blake3(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert str(digest.Digest()) == digest.of_file(tmp_path / "empty") == EMPTY


@pytest.mark.parametrize("like", [EMPTY, "0" * 64])
def test_a_file_and_a_stream_have_one_digest(tmp_path: Path, like: str) -> None:
    data = os.urandom((9 << 20) + 7)
    (tmp_path / "file").write_bytes(data)
    told: list[int] = []
    found = digest.of_file(tmp_path / "file", like, told.append)
    stream = digest.Digest(like)
    for at in range(0, len(data), 100_000):
        stream.update(data[at : at + 100_000])
    assert found == str(stream) and told[-1] == len(data) and told == sorted(told)
    if like == "0" * 64:
        assert found == hashlib.sha256(data).hexdigest()
    (tmp_path / "file").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert digest.of_file(tmp_path / "file", like) != found


def test_a_manifest_of_an_older_store_is_read() -> None:
    sums = {"qcow2": "1" * 64, "kernel": "", "initrd": ""}
    made = Manifest(
        name="old",
        digest=content_digest(sums, ""),
        format="qcow2",
        os="debian",
        os_version="12",
        architecture="x86_64",
        default_user="root",
        virtual_size=1,
        size=1,
        disk_digest=sums["qcow2"],
        kernel_sha256="",
        initrd_sha256="",
        cmdline="",
        software={},
        source="here",
        built="2026-01-01T00:00:00+00:00",
    )
    values = asdict(made)
    values["disk_sha256"] = values.pop("disk_digest")
    read = parse(json.dumps(values).encode())
    assert read == made and content_digest(read.sums(), read.cmdline) == read.digest
    assert parse(made.to_bytes()) == made


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("recipe micro 111111111111", "recipe micro 222222222222", False),
        ("recipe micro 111111111111", "recipe bench 222222222222", True),
        ("web.step1-0, by steps", "web.step2-1, by steps", False),
        ("/a/disk.img (raw)", "/a/disk.img (qcow2)", False),
        ("/a/disk.img (raw)", "/b/disk.img (raw)", True),
        ("https://host/latest.img", "https://host/latest.img", False),
        ("recipe debian-12 111111111111", "https://host/latest.img", True),
    ],
)
def test_a_name_that_passes_to_an_image_from_elsewhere_is_told(before: str, now: str, told: bool) -> None:
    old, new = (
        Manifest("x", digest, "qcow2", "", "", "", "", 1, 1, "", "", "", "", {}, source, "")
        for digest, source in (("a" * 64, before), ("b" * 64, now))
    )
    said = name_taken(new, [old])
    assert len(said) == told and all("no longer x-aaaaaaaaaaaa, which came from elsewhere" in text for text in said)
    assert name_taken(old, [old]) == name_taken(new, []) == []


def test_a_file_is_written_out_while_it_grows(tmp_path: Path) -> None:
    """It may appear late or never; and what goes wrong in the block is what is told."""
    with durable.written_as_it_grows(tmp_path / "never"):
        pass
    with durable.written_as_it_grows(tmp_path / "late"):
        (tmp_path / "late").write_bytes(b"x")
    with pytest.raises(ZeroDivisionError), durable.written_as_it_grows(tmp_path / "late"):
        raise ZeroDivisionError
    (tmp_path / "pipe").symlink_to("/dev/null")
    with pytest.raises(OSError, match="Invalid argument"), durable.written_out([tmp_path / "pipe"]):
        pass
