"""An ext4 file system from a tree, without mounting and without root.

``mke2fs -d`` would copy a folder of the host: its owners, change times and reading order come along. So the file system
is made empty and debugfs writes every entry, in a fixed order, with every field given.
"""

from __future__ import annotations

import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vmctl.builder.tools import HUNG_S, run
from vmctl.builder.tree import Entry, Kind, Tree
from vmctl.errors import ImageError

_TYPE = {Kind.FOLDER: 0o040000, Kind.FILE: 0o100000, Kind.LINK: 0o120000}
# Not random, or no two builds were equal; the guest may change it with tune2fs.
_NAMESPACE = uuid.UUID("6f9d1c52-2d0e-5d33-9d4e-0d0a8f6b7c11")


def _quoted(path: str) -> str:
    # debugfs has no escape for its quotes, and no path of ours needs one.
    if '"' in path or "\n" in path:
        raise ImageError(f"cannot make the file system: unusable path {path!r}")
    return f'"{path}"'


def _inode(path: str, entry: Entry, epoch: int, names: int = 1) -> Iterator[str]:
    name = _quoted(f"/{path}")
    yield f"sif {name} mode 0{_TYPE[entry.kind] | entry.mode:o}"
    yield f"sif {name} uid {entry.uid}"
    yield f"sif {name} gid {entry.gid}"
    if names > 1:
        yield f"sif {name} links_count {names}"
    for field in ("atime", "ctime", "crtime"):
        yield f"sif {name} {field} {_stamp(epoch)}"
    yield f"sif {name} mtime {_stamp(epoch if entry.mtime is None else min(epoch, entry.mtime))}"


def _stamp(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y%m%d%H%M%S")


def _script(tree: Tree, contents: Path, epoch: int) -> Iterator[str]:
    links = Counter(entry.same_as for _, entry in tree.sorted() if entry.same_as)
    for number, (path, entry) in enumerate(tree.sorted()):
        parent, _, name = path.rpartition("/")
        if entry.same_as:
            yield f"ln {_quoted('/' + entry.same_as)} {_quoted('/' + path)}"
            continue
        yield f"cd {_quoted('/' + parent)}"
        if entry.kind is Kind.FOLDER:
            yield f"mkdir {_quoted(name)}"
        elif entry.kind is Kind.LINK:
            yield f"symlink {_quoted(name)} {_quoted(entry.data.decode())}"
        elif entry.kind is Kind.FILE:
            source = entry.source
            if source is None:
                source = contents / str(number)
                source.write_bytes(entry.data)
            yield f"write {source} {_quoted(name)}"
        else:
            raise ImageError(f"cannot make the file system: {path} is a {entry.kind}, which it does not hold")
        for place, (key, value) in enumerate(entry.xattrs):
            attribute = contents / f"{number}-{place}"
            attribute.write_bytes(value)
            yield f"ea_set -f {attribute} {_quoted('/' + path)} {key}"
        yield from _inode(path, entry, epoch, 1 + links[path])
    yield from _inode("", Entry(Kind.FOLDER, 0o755), epoch)
    yield from _inode("lost+found", Entry(Kind.FOLDER, 0o700), epoch)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a file system is like. ``inode_ratio`` is bytes for each inode; ``lazy`` leaves zeroing to the guest."""

    label: str
    size_mib: int
    inode_ratio: int = 32768
    journal_mib: int = 8
    lazy: bool = True


def identity(label: str) -> uuid.UUID:
    """The UUID of the file system with that label."""
    return uuid.uuid5(_NAMESPACE, label)


def make(tree: Tree, image: Path, shape: Shape, *, epoch: int) -> None:
    """Write the tree as a raw ext4 image file. Raises ImageError, also when the tree does not fit."""
    own = identity(shape.label)
    fake = {"E2FSPROGS_FAKE_TIME": str(epoch), "MKE2FS_CONFIG": "/dev/null", "TZ": "UTC", "DEBUGFS_PAGER": "cat"}
    lazy = int(shape.lazy)
    options = f"hash_seed={own},lazy_itable_init={lazy},lazy_journal_init={lazy},root_owner=0:0,nodiscard"
    features = (
        "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,"
        "huge_file,dir_nlink,extra_isize,metadata_csum"
    )
    with image.open("wb") as file:
        file.truncate(shape.size_mib << 20)
    run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", str(shape.inode_ratio), "-m", "1",
         "-J", f"size={shape.journal_mib}", "-O", features, "-L", shape.label, "-U", str(own), "-E", options, image],
        what="make the file system", timeout_s=HUNG_S, env=fake,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="contents-", dir=image.parent) as folder:
        script = Path(folder) / "script"
        script.write_text("\n".join(_script(tree, Path(folder), epoch)) + "\n")
        run(["debugfs", "-w", "-f", script, image], what="fill the file system", timeout_s=HUNG_S, env=fake)
    _check(tree, image, fake)


def _file(tree: Tree, path: str) -> Entry:
    entry = tree[path]
    return tree[entry.same_as] if entry.same_as else entry


def _size(entry: Entry) -> int:
    return entry.source.stat().st_size if entry.source else len(entry.data)


def _check(tree: Tree, image: Path, env: dict[str, str]) -> None:
    # debugfs exits 0 whatever its commands did: ask the result.
    run(["e2fsck", "-f", "-n", image], what="check the file system", timeout_s=HUNG_S, env=env)
    files = [path for path, entry in tree.sorted() if entry.kind is Kind.FILE]
    request = "".join(f"stat {_quoted('/' + path)}\n" for path in files).encode()
    listing = run(["debugfs", "-f", "-", image], what="check the file system", timeout_s=HUNG_S, env=env, stdin=request)
    sizes = [
        int(line.rpartition(b"Size:")[2]) for line in listing.splitlines() if b"Size:" in line and b"User:" in line
    ]
    if sizes != [_size(_file(tree, path)) for path in files]:
        raise ImageError(
            "cannot fill the file system: not every file arrived whole", hint="is size_mib of the recipe too small?"
        )
