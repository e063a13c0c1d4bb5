"""An ext4 file system from a tree, without mounting and without root.

``mke2fs -d`` would copy a folder of the host: its owners, change times and reading order come along. So the file system
is made empty and debugfs writes every entry, in a fixed order, with every field given.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from vmctl.builder.tools import run
from vmctl.builder.tree import Entry, Kind, Tree
from vmctl.errors import ImageError

_TYPE = {Kind.FOLDER: 0o040000, Kind.FILE: 0o100000, Kind.LINK: 0o120000}
# Not random, or no two builds were equal; the guest may change it with tune2fs.
_NAMESPACE = uuid.UUID("6f9d1c52-2d0e-5d33-9d4e-0d0a8f6b7c11")
_TIMEOUT_S = 120


def _quoted(path: str) -> str:
    # debugfs has no escape for its quotes, and no path of ours needs one.
    if '"' in path or "\n" in path:
        raise ImageError(f"cannot make the file system: unusable path {path!r}")
    return f'"{path}"'


def _inode(path: str, entry: Entry, stamp: str) -> Iterator[str]:
    name = _quoted(f"/{path}")
    yield f"sif {name} mode 0{_TYPE[entry.kind] | entry.mode:o}"
    yield f"sif {name} uid 0"
    yield f"sif {name} gid 0"
    for field in ("atime", "ctime", "mtime", "crtime"):
        yield f"sif {name} {field} {stamp}"


def _script(tree: Tree, contents: Path, stamp: str) -> Iterator[str]:
    for number, (path, entry) in enumerate(tree.sorted()):
        parent, _, name = path.rpartition("/")
        yield f"cd {_quoted('/' + parent)}"
        if entry.kind is Kind.FOLDER:
            yield f"mkdir {_quoted(name)}"
        elif entry.kind is Kind.LINK:
            yield f"symlink {_quoted(name)} {_quoted(entry.data.decode())}"
        elif entry.kind is Kind.FILE:
            source = contents / str(number)
            source.write_bytes(entry.data)
            yield f"write {source} {_quoted(name)}"
        else:
            raise ImageError(f"cannot make the file system: {path} is a {entry.kind}, which it does not hold")
        yield from _inode(path, entry, stamp)
    yield from _inode("", Entry(Kind.FOLDER, 0o755), stamp)
    yield from _inode("lost+found", Entry(Kind.FOLDER, 0o700), stamp)


def make(tree: Tree, image: Path, *, label: str, size_mib: int, epoch: int) -> None:
    """Write the tree as a raw ext4 image file. Raises ImageError, also when the tree does not fit."""
    identity = uuid.uuid5(_NAMESPACE, label)
    fake = {"E2FSPROGS_FAKE_TIME": str(epoch), "MKE2FS_CONFIG": "/dev/null", "TZ": "UTC", "DEBUGFS_PAGER": "cat"}
    options = f"hash_seed={identity},lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0,nodiscard"
    features = (
        "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,"
        "huge_file,dir_nlink,extra_isize,metadata_csum"
    )
    with image.open("wb") as file:
        file.truncate(size_mib << 20)
    run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "32768", "-m", "1", "-J", "size=8",
         "-O", features, "-L", label, "-U", str(identity), "-E", options, image],
        what="make the file system", timeout_s=_TIMEOUT_S, env=fake,
    )  # fmt: skip
    stamp = datetime.fromtimestamp(epoch, UTC).strftime("%Y%m%d%H%M%S")
    with tempfile.TemporaryDirectory(prefix="contents-", dir=image.parent) as folder:
        script = Path(folder) / "script"
        script.write_text("\n".join(_script(tree, Path(folder), stamp)) + "\n")
        run(["debugfs", "-w", "-f", script, image], what="fill the file system", timeout_s=_TIMEOUT_S, env=fake)
    _check(tree, image, fake)


def _check(tree: Tree, image: Path, env: dict[str, str]) -> None:
    # debugfs exits 0 whatever its commands did: ask the result.
    run(["e2fsck", "-f", "-n", image], what="check the file system", timeout_s=_TIMEOUT_S, env=env)
    files = [path for path, entry in tree.sorted() if entry.kind is Kind.FILE]
    request = "".join(f"stat {_quoted('/' + path)}\n" for path in files).encode()
    listing = run(
        ["debugfs", "-f", "-", image], what="check the file system", timeout_s=_TIMEOUT_S, env=env, stdin=request
    )
    sizes = [
        int(line.rpartition(b"Size:")[2]) for line in listing.splitlines() if b"Size:" in line and b"User:" in line
    ]
    if sizes != [len(tree[path].data) for path in files]:
        raise ImageError(
            "cannot fill the file system: not every file arrived whole", hint="is size_mib of the recipe too small?"
        )
