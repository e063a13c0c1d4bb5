"""What the README shows is so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.conftest import REPO

pytestmark = pytest.mark.system


def test_the_example_for_pytest(tmp_path: Path) -> None:
    section = (REPO / "README.md").read_text().partition("### In pytest\n")[2]
    (tmp_path / "test_example.py").write_text(section.partition("```python\n")[2].partition("```")[0])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
