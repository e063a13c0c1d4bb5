"""The manifest of a warmed image, a chain of disks read by its headers, names of copies, work side by side."""

from __future__ import annotations

import json
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from vmctl import copies, disk_chain, warming
from vmctl.at_once import at_once
from vmctl.errors import ImageError, SpecError
from vmctl.manifest import Manifest, Warm, parse

COLD = Manifest("web", "ab" * 32, "qcow2", "Debian", "12", "x86_64", "root", 1, 2, "d", "", "", "", {}, "", "2026")
WARM = Warm("a", "b", 3, 512, 1, "tcg", "pc-q35-7.2", "maximum", "7.2.22", 4, "key")


def test_a_warm_manifest_is_read_as_it_was_written() -> None:
    warm = replace(COLD, warm=WARM)
    assert parse(warm.to_bytes()) == warm and parse(COLD.to_bytes()) == COLD


def test_one_of_an_older_vmctl_is_cold() -> None:
    values = json.loads(COLD.to_bytes())
    del values["warm"]
    assert parse(json.dumps(values).encode()) == COLD


def test_one_with_half_a_warm_state_is_none() -> None:
    values = json.loads(replace(COLD, warm=WARM).to_bytes())
    del values["warm"]["cpu"]
    assert parse(json.dumps(values).encode()) is None


def test_a_delete_takes_the_warm_files_too() -> None:
    assert {f"{COLD.stem}.warm", f"{COLD.stem}.memory"} <= set(COLD.volumes())


@pytest.mark.parametrize(
    ("looks", "rests"),
    [
        ([], False),
        ([5.0, 5.01, 5.02], False),
        ([5.0, 5.01, 5.02, 5.03], True),
        ([1.0, 5.0, 5.01, 5.02, 5.03], True),
        ([5.0, 5.01, 5.06, 5.07], False),
        ([5.0, 5.01, 5.02, 5.03, 5.2], False),
    ],
)
def test_a_guest_rests_after_three_calm_looks(looks: list[float], rests: bool) -> None:
    assert warming.at_rest(looks) is rests


def test_a_chain_is_read_by_its_headers(tmp_path: Path) -> None:
    below = ""
    for number in range(12):
        path = tmp_path / f"{number}.qcow2"
        backing = ["-b", below, "-F", "qcow2"] if below else []
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(path), "16M"], check=True)
        below = str(path)
    chain = disk_chain.read(below, "qcow2", lambda: [str(tmp_path)], doing="test")
    assert [Path(layer.path).stem for layer in chain.layers] == [str(n) for n in range(11, -1, -1)]
    assert {(layer.format, layer.virtual_size) for layer in chain.layers} == {("qcow2", 16 << 20)}
    with pytest.raises(ImageError, match="in no storage pool"):
        disk_chain.read(below, "qcow2", tuple, doing="test")


@pytest.mark.parametrize(("count", "names"), [(None, ("a",)), (1, ("a-1",)), (3, ("a-1", "a-2", "a-3"))])
def test_names_of_copies(count: int | None, names: tuple[str, ...]) -> None:
    assert copies.numbered("a", count) == names


@pytest.mark.parametrize(("new", "count"), [("a", 0), ("a", copies.MOST + 1), ("a_b", None), ("a" * 62, 10)])
def test_names_that_cannot_be(new: str, count: int | None) -> None:
    with pytest.raises(SpecError):
        copies.numbered(new, count)


def test_the_first_error_is_raised_when_all_has_ended() -> None:
    ended: list[int] = []
    begun = threading.Barrier(2)

    def fail() -> None:
        begun.wait(10)
        raise SpecError("no")

    def work() -> None:
        begun.wait(10)
        ended.append(1)

    with pytest.raises(SpecError):
        at_once([fail, work])
    assert ended == [1]
