"""The reaper: what a daemon leaves behind is gone as soon as it has ended, and so is the reaper itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vmctl.wait import wait_until

REAPER = Path(__file__).parents[2] / "vmctl/reaper.py"


def started(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(REAPER), *words], capture_output=True, text=True, timeout=30)


def test_it_ends_as_the_command_does() -> None:
    done = started("sh", "-c", "echo told; echo why >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "told\n", "why\n")


def test_an_orphan_is_reaped_and_then_the_reaper_goes(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    done = started("sh", "-c", f"(sleep 60 >/dev/null 2>&1 & echo $! >{pid_file})")
    assert done.returncode == 0
    orphan = Path("/proc") / pid_file.read_text().strip()
    reaper = Path("/proc") / orphan.joinpath("stat").read_text().rpartition(")")[2].split()[1]
    assert "reaper.py" in reaper.joinpath("cmdline").read_text()
    subprocess.run(["kill", "-KILL", orphan.name], check=True)
    wait_until(lambda: not orphan.exists(), what="the orphan is not reaped", timeout_s=5, interval_s=0.01)
    # Whoever is pid 1 reaps the reaper, be it late.
    wait_until(lambda: not reaper.joinpath("exe").exists(), what="the reaper stays", timeout_s=5, interval_s=0.01)
