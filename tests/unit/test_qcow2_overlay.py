"""Overlays of our own: QEMU finds them whole, reads the base through them, and writes above it."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path

import pytest

from vmctl import qcow2_overlay
from vmctl.errors import ImageError


def run(*words: str | Path) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("size", ["512", "8M", "513M", "10G", "5T"])
def test_it_is_what_qemu_img_makes(tmp_path: Path, size: str) -> None:
    base, ours, theirs = (tmp_path / name for name in ("base.qcow2", "ours.qcow2", "theirs.qcow2"))
    run("qemu-img", "create", "-f", "qcow2", base, size)
    qcow2_overlay.make(ours, base, "qcow2")
    run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", theirs)
    run("qemu-img", "check", ours)
    told = []
    for path in (ours, theirs):
        values = json.loads(run("qemu-img", "info", "--output=json", path))
        told.append({key: values[key] for key in values if key not in {"filename", "actual-size", "children"}})
    assert told[0] == told[1]


@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_the_base_is_read_through_it_and_not_written(tmp_path: Path, form: str) -> None:
    base, ours = tmp_path / "base", tmp_path / "ours.qcow2"
    run("qemu-img", "create", "-f", form, base, "4M")
    run("qemu-io", "-f", form, "-c", "write -P 1 0 4M", base)
    if form == "raw":
        with base.open("ab") as file:
            file.write(b"\1" * 100)
    held = base.read_bytes()
    qcow2_overlay.make(ours, base, form)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 1M", ours)
    run("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "read -P 2 1M 1M", "-c", "read -P 1 2M 2M", ours)
    run("qemu-img", "check", ours)
    assert base.read_bytes() == held


def test_what_is_there_stays_and_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    base, ours = tmp_path / "base.qcow2", tmp_path / "ours.qcow2"
    base.write_bytes(b"no disk")
    with pytest.raises(ImageError, match="cannot create image"):
        qcow2_overlay.make(ours, base, "qcow2")
    assert not ours.exists()
    run("qemu-img", "create", "-f", "qcow2", base, "1M")
    ours.write_bytes(b"there")
    with pytest.raises(ImageError, match="cannot create image"):
        qcow2_overlay.make(ours, base, "qcow2")
    assert ours.read_bytes() == b"there"


def test_what_a_guest_wrote_is_read_by_nobody_else(tmp_path: Path) -> None:
    base, ours = tmp_path / "base.qcow2", tmp_path / "ours.qcow2"
    run("qemu-img", "create", "-f", "qcow2", base, "1M")
    qcow2_overlay.make(ours, base, "qcow2")
    assert stat.S_IMODE(ours.stat().st_mode) == 0o600
