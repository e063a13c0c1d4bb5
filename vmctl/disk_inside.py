"""What is on a raw disk: a partition table or a file system, checked, and how much room it needs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmctl.errors import ImageError

_TIMEOUT_S = 3600
_SECTOR = 512
_GPT_BACKUP = 33 * _SECTOR  # UEFI 2.10, 5.3: the second table, behind the last partition
_BOOT_CODE = 440  # of the first sector; behind it the disk's number and the partitions
_EXT_MAGIC_AT, _EXT_MAGIC = 1080, b"\x53\xef"


@dataclass(frozen=True, slots=True)
class Inside:
    """What was found. ``kind`` is "gpt", "dos", "ext" or "empty"; ``needs`` is how many bytes of the disk it takes.

    ``can_shrink``: the file system itself can be made smaller, as it is alone on the disk.
    """

    kind: str
    needs: int
    can_shrink: bool = False


def _run(words: Sequence[str], what: str, text: str = "", *, fine: Collection[int] = (0,)) -> str:
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            input=text,
            timeout=_TIMEOUT_S,
            check=False,
            env=os.environ | {"LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise ImageError(f"cannot {what}: {words[0]} is missing", hint="apt-get install e2fsprogs fdisk") from error
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"cannot {what}: {words[0]} did not end in {_TIMEOUT_S} s") from error
    if done.returncode not in fine:
        said = (done.stdout + done.stderr).strip().splitlines()[-3:]
        first = "make room on it in its guest" if "smaller than minimum" in done.stderr else "mend it in its guest"
        raise ImageError(
            f"cannot {what}: {words[0]}: {'; '.join(said) or f'exit status {done.returncode}'}",
            hint=f"{first} first; the disk is as it was",
        )
    return done.stdout


def _read(raw: Path, offset: int, count: int) -> bytes:
    with raw.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def _is_ext(raw: Path, start: int) -> bool:
    return _read(raw, start + _EXT_MAGIC_AT, 2) == _EXT_MAGIC


def _ext_size(raw: Path, start: int) -> int:
    """The size an ext file system's superblock gives it, in bytes."""
    block = _read(raw, start + 1024, 1024)
    count = int.from_bytes(block[4:8], "little")
    if int.from_bytes(block[0x60:0x64], "little") & 0x80:  # the 64bit feature
        count |= int.from_bytes(block[0x150:0x154], "little") << 32
    return count * (1024 << int.from_bytes(block[24:28], "little"))


def look(raw: Path, *, what: str) -> Inside:
    """What is on the disk, its ext file systems checked. Raises ImageError for damage and for what is not known."""
    if _is_ext(raw, 0):
        _run(["e2fsck", "-f", "-n", str(raw)], what)
        return Inside("ext", _ext_size(raw, 0), can_shrink=True)
    if _read(raw, 510, 2) == b"\x55\xaa" and not _is_file_system(raw, what):
        return _partitioned(raw, what)
    if _empty(raw):
        return Inside("empty", 0)
    raise ImageError(
        f"cannot {what}: what is on it is neither ext2, 3 or 4 nor a partition table, so vmctl cannot check it",
        hint="copy it to a smaller disk in the guest",
    )


def _is_file_system(raw: Path, what: str) -> bool:
    """Whether a file system is on the disk itself: FAT and NTFS end their first sector as a partition table does."""
    said = _run(["blkid", "-p", "-o", "export", str(raw)], what, fine=(0, 2, 8))  # 2: nothing, 8: of two kinds
    return any(line.startswith("TYPE=") for line in said.splitlines()) or not said.strip()


def _partitioned(raw: Path, what: str) -> Inside:
    table = json.loads(_run(["sfdisk", "-J", str(raw)], what))["partitiontable"]
    sector = int(table.get("sectorsize", _SECTOR))
    end = 0
    for one in table.get("partitions", ()):
        start = int(one["start"]) * sector
        end = max(end, start + int(one["size"]) * sector)
        if _is_ext(raw, start):
            _run(["e2fsck", "-f", "-n", f"{raw}?offset={start}"], what)
    if table.get("label") not in {"gpt", "dos"}:
        raise ImageError(f"cannot {what}: it has a partition table of kind {table.get('label')}")
    return Inside(table["label"], end + (_GPT_BACKUP if table["label"] == "gpt" else 0))


def _empty(raw: Path) -> bool:
    with raw.open("rb") as file:
        try:
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
        except OSError:
            return True  # nothing but a hole
        return all(not chunk.strip(b"\0") for chunk in iter(lambda: file.read(1 << 20), b""))


def cut(raw: Path, found: Inside, size: int, *, what: str) -> None:
    """Make the raw disk ``size`` bytes, what is on it too if it must. Raises ImageError where it does not fit."""
    if found.needs > size and not found.can_shrink:
        raise ImageError(
            f"cannot {what}: its partitions end at {found.needs} bytes",
            hint="shrink the last partition in the guest first",
        )
    if found.needs > size:
        # The look before changed nothing; resize2fs wants one that has left its mark since the last mount.
        _run(["e2fsck", "-f", "-p", str(raw)], what, fine=(0, 1))
        _run(["resize2fs", str(raw), f"{size // 1024}K"], what)
    if found.kind == "gpt":
        _cut_gpt(raw, size, what)
    else:
        os.truncate(raw, size)
    if look(raw, what=what).kind != found.kind:
        raise ImageError(f"cannot {what}: what is on it does not survive it", hint="the disk is as it was")


def _cut_gpt(raw: Path, size: int, what: str) -> None:
    """Write the table anew for the smaller disk: its first copy names the last sector, its second lies there.

    sfdisk keeps the identities of disk and partitions, but not the boot loader's first sector.
    """
    lines = _run(["sfdisk", "--dump", str(raw)], what).splitlines()
    text = "\n".join(line for line in lines if not line.startswith(("last-lba:", "device:"))) + "\n"
    loader = _read(raw, 0, _BOOT_CODE)
    os.truncate(raw, size)
    _run(["sfdisk", "-q", "--wipe", "never", "--wipe-partitions", "never", str(raw)], what, text)
    with raw.open("r+b") as file:
        file.write(loader)
