"""A system's tar archive as a tree, without what belongs to one machine or one build."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

from vmctl.builder.tree import Entry, Kind, Tree
from vmctl.errors import ImageError

# What a build leaves behind: keys, identities, logs, caches and backup copies.
_DROPPED = re.compile(
    r"(dev|proc|sys|run|tmp|var/tmp|var/lib/apt/lists|var/cache/(apt|ldconfig|debconf/.*-old))/.*"
    r"|var/log/(.*/)?[^/]+\.(log|xz)|etc/ssh/ssh_host_.*|var/lib/dbus/machine-id|etc/(hostname|resolv\.conf|machine-id)"
    r"|etc/\.resolv\.conf\.systemd-resolved\.bak"  # that of the machine which builds: its name servers
    r"|etc/(passwd|group|shadow|gshadow|subuid|subgid)-|var/lib/dpkg/.*-old|etc/apt/sources\.list"
    r"|var/lib/systemd/random-seed|var/lib/dpkg/(lock.*|triggers/Lock)|etc/\.pwd\.lock|root/\.(?!bashrc|profile).*"
)
_EMPTIED = frozenset({"var/log/btmp", "var/log/wtmp", "var/log/lastlog", "var/log/faillog"})
_XATTR = "SCHILY.xattr."


def read(archive: Path, contents: Path) -> Tree:
    """The tree of a system. Files' contents go into the folder ``contents``. Raises ImageError."""
    tree = Tree()
    with tarfile.open(archive) as system:
        for number, member in enumerate(system):
            path = member.name.removeprefix("./").rstrip("/")
            if path in {"", "."} or _DROPPED.fullmatch(path):
                continue
            tree.add(path, _entry(system, member, path, contents / str(number)))
    _settle_links(tree)
    return tree


def _entry(system: tarfile.TarFile, member: tarfile.TarInfo, path: str, content: Path) -> Entry:
    xattrs = tuple(
        (key.removeprefix(_XATTR), value.encode("utf-8", "surrogateescape"))
        for key, value in sorted(member.pax_headers.items())
        if key.startswith(_XATTR)
    )
    kind, data, source, same_as = Kind.FILE, b"", None, ""
    if member.isdir():
        kind = Kind.FOLDER
    elif member.issym():
        kind, data = Kind.LINK, member.linkname.encode()
    elif member.islnk():
        same_as = member.linkname.removeprefix("./")
    elif member.isfile():
        file = system.extractfile(member)
        if file is not None and path not in _EMPTIED and member.size:
            with content.open("wb") as out:
                shutil.copyfileobj(file, out, 1 << 20)
            source = content
    else:
        raise ImageError(f"cannot make the file system: {path} is neither a file, a folder nor a link")
    mode = 0o777 if kind is Kind.LINK else member.mode & 0o7777
    return Entry(kind, mode, data, source, same_as, member.uid, member.gid, int(member.mtime), xattrs)


def _settle_links(tree: Tree) -> None:
    """Make the first name in the tree's order the file, and the others links to it."""
    groups: dict[str, list[str]] = {}
    for path, entry in tree.sorted():
        if entry.same_as:
            groups.setdefault(entry.same_as, []).append(path)
    for target, others in groups.items():
        file = tree[target]
        first, *rest = sorted([target, *others], key=lambda path: path.split("/"))
        tree.add(first, file)
        for path in rest:
            tree.add(path, Entry(Kind.FILE, file.mode, same_as=first))
