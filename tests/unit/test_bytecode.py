"""Compiled Python of a built system: checked by its source's time and size, as an installation's is."""

from __future__ import annotations

import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

from vmctl.builder import bytecode
from vmctl.builder.tree import Entry, Kind, Tree

EPOCH = 1_700_000_000


def said(folder: Path) -> str:
    """What the module says; Python writes nothing there."""
    words = [sys.executable, "-B", "-c", "import m; print(m.WORD)"]
    return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def test_python_takes_it_by_time_and_size_and_reads_no_source(tmp_path: Path) -> None:
    module, put = tmp_path / "m.py", tmp_path / "put"
    module.write_text("WORD = 'one'\n")
    os.utime(module, (EPOCH, EPOCH))
    compiled = Path(py_compile.compile(str(module), invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH))
    shutil.copy(compiled, put)
    tree = Tree()
    tree.add("usr/lib/m.py", Entry(Kind.FILE, 0o644, source=module, mtime=EPOCH))
    tree.add(f"usr/lib/__pycache__/{compiled.name}", Entry(Kind.FILE, 0o644, source=put, mtime=EPOCH + 9))
    bytecode.date(tree)
    module.write_text("WORD = 'two'\n")
    os.utime(module, (EPOCH, EPOCH))
    assert said(tmp_path) == "two", "by its hash, the source is read and another one is found"
    shutil.copy(put, compiled)
    assert said(tmp_path) == "one", "time and size are the same, and that is all that is looked at"
    os.utime(module, (EPOCH + 1, EPOCH + 1))
    assert said(tmp_path) == "two", "one that was changed later is read"


def test_what_has_no_plain_source_and_what_is_dated_stay(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for head in (b"\xa7\r\r\n" + (0).to_bytes(4, "little") + b"12345678code", b"short"):
        assert bytecode.dated(head, EPOCH, 5) == head
    hashed = b"\xa7\r\r\n" + (3).to_bytes(4, "little") + b"12345678code"
    file.write_bytes(hashed)
    tree = Tree()
    tree.link("usr/lib/a.py", "/etc/a.py")
    for name in ("a", "gone"):
        tree.add(f"usr/lib/__pycache__/{name}.cpython-311.pyc", Entry(Kind.FILE, 0o644, source=file, mtime=EPOCH))
    bytecode.date(tree)
    assert file.read_bytes() == hashed
