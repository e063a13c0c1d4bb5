"""What a guest sends when files are copied out of it, written here: one file, or a tree as a tar archive.

Nothing of it has its name before it is whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vmctl import tarstream
from vmctl.errors import GuestCommandFailed, SpecError
from vmctl.events import Progress, Reporter
from vmctl.tarstream import Kind, Malformed, Member

MARK = b"end"  # after a file that came whole; the script in copying.py says it
_CHUNK = 256 * 1024
_LINE = 64


def receive(source: IO[bytes], root: Path, depth: int, label: str, report: Reporter) -> None:
    """Write what comes to ``root``, ``depth`` parts of each name left off. A guest's names are not trusted.

    First a line: "file SIZE MODE", then the file and MARK, or "tar", then an archive. Raises Malformed for what is cut
    short or neither, GuestCommandFailed for names that lead elsewhere, SpecError where it cannot be written.
    """
    with open(source.fileno(), "rb", buffering=4 * _CHUNK, closefd=False) as stream:
        kind, *about = stream.readline(_LINE).split() or [b""]
        if kind == b"file" and len(about) == 2 and about[0].isdigit() and not about[1].strip(b"01234567"):
            alone = Member(b"", Kind.FILE, int(about[1], 8), int(about[0]))
            # As cp and scp do: what a link of the user's leads to is written, and a device is written into; so is
            # what /dev/stdout is, also where that is a file: others write on there.
            path = root.resolve() if root.is_symlink() else root
            try:
                if root.parent == Path("/dev") or root.exists() and not root.is_file():
                    _write_into(root, _until_mark(stream), alone.size, label, report)
                else:
                    _write(_until_mark(stream), alone, path, label, 0, report)
            except OSError as error:
                raise SpecError(f"cannot write {root}: {error.strerror}") from error
            return
        if kind != b"tar":
            raise Malformed("it is neither file nor archive")
        try:
            folders = _receive_tree(stream, root, depth, label, report)
        except OSError as error:
            raise SpecError(f"cannot write {root}: {error.strerror}") from error
        while stream.read(_CHUNK):  # what tar pads its last record with
            pass
    for path, mode in reversed(folders):
        path.chmod(mode & 0o777)


def _receive_tree(stream: IO[bytes], root: Path, depth: int, label: str, report: Reporter) -> list[tuple[Path, int]]:
    """Write an archive's members; returns the folders with their modes. A new tree gets its name when it is whole."""
    if root.exists():
        return [
            (root.joinpath(*parts), mode) for parts, mode in _members(stream, root, depth, label, report, new=False)
        ]
    with tempfile.TemporaryDirectory(prefix=f".{root.name[:64]}.", dir=root.parent) as folder:
        staged = Path(folder) / "tree"
        folders = _members(stream, staged, depth, label, report, new=True)
        if not staged.exists():
            raise Malformed("it is neither file nor folder")
        staged.replace(root)
    return [(root.joinpath(*parts), mode) for parts, mode in folders]


def _members(
    stream: IO[bytes], root: Path, depth: int, label: str, report: Reporter, *, new: bool
) -> list[tuple[list[str], int]]:
    folders, done = [], 0
    for member in tarstream.members(stream.read):
        parts = [part for part in member.name.split(b"/") if part not in {b"", b"."}]
        if b".." in parts or b"\0" in member.name:
            raise GuestCommandFailed(f"cannot copy {label}: the guest names a file outside of it")
        within = [os.fsdecode(part) for part in parts[depth:]]
        path = root.joinpath(*within)
        if member.kind is Kind.FOLDER:
            path.mkdir(exist_ok=True)
            folders.append((within, member.mode))
        elif member.kind is Kind.LINK:
            _copy_linked(root, depth, member, path)
        elif member.kind is Kind.FILE:
            done = _write(_exactly(stream, member.size), member, path, label, done, report, staged=new)
            stream.read(len(tarstream.padding(member.size)))
    return folders


def _exactly(stream: IO[bytes], size: int) -> Iterator[bytes]:
    while size:
        data = stream.read(min(_CHUNK, size))
        if not data:
            raise Malformed("it is cut short")
        size -= len(data)
        yield data


def _until_mark(stream: IO[bytes]) -> Iterator[bytes]:
    """All but the mark at its end."""
    held = b""
    while data := stream.read(_CHUNK):
        held += data
        yield held[: -len(MARK)]
        held = held[-len(MARK) :]
    if held != MARK:
        raise Malformed("it is cut short")


def _write_into(path: Path, pieces: Iterator[bytes], size: int, label: str, report: Reporter) -> None:
    done = 0
    with path.open("wb", buffering=0) as file:
        for data in pieces:
            file.write(data)
            done += len(data)
            report(Progress(label, done, max(size, done) if size else 0))


def _write(
    pieces: Iterator[bytes],
    member: Member,
    path: Path,
    label: str,
    done: int,
    report: Reporter,
    *,
    staged: bool = False,
) -> int:
    """Write one file, under another name until it is whole unless all is ``staged``; returns the bytes so far."""
    total = member.size if not done and path.name == label else 0
    partial = path if staged else path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb", buffering=0) as file:
            for data in pieces:
                file.write(data)
                done += len(data)
                report(Progress(label, done, max(total, done) if total else 0))
            os.fchmod(file.fileno(), member.mode & 0o777)
        if not staged:
            partial.replace(path)
    except BaseException:
        if partial.is_file():
            partial.unlink()
        raise
    return done


def _copy_linked(root: Path, depth: int, member: Member, path: Path) -> None:
    """A second name of a file that came before: as a file of its own, as cp makes it."""
    parts = [part for part in member.link.split(b"/") if part not in {b"", b"."}][depth:]
    first = root.joinpath(*map(os.fsdecode, parts))
    if b".." in parts or not parts or first.is_symlink() or not first.is_file():
        raise GuestCommandFailed(f"cannot copy {path.name}: the guest names a file outside of what is copied")
    shutil.copy(first, path)
