"""python -m tests.hosts up N [--shared] [--tls] [-- COMMAND...]: a shell, or a command, beside N hosts.

vmctl knows them in there: `vmctl -c h1 list`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_MARKER = Path("/run/vmctl-test-host")


def main() -> int:
    """Inside a test host: boot the hosts, and run the command beside them. Outside: enter one first."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.hosts",
        description="Libvirt hosts in namespaces, and beside them a shell, or what stands after --.",
    )
    parser.add_argument("up", choices=["up"])
    parser.add_argument("count", type=int, choices=range(1, 6))
    parser.add_argument("--shared", action="store_true", help="one folder of disks in all of them")
    parser.add_argument("--tls", action="store_true", help="certificates, by a CA of its own")
    words, _, command = ("\0".join(sys.argv[1:]) + "\0").partition("\0--\0")
    given = parser.parse_args([word for word in words.split("\0") if word])
    if not _MARKER.exists():
        os.execv(_ROOT / "tests/run", ["tests/run", "--run", sys.executable, "-m", "tests.hosts", *sys.argv[1:]])
    from tests.hosts import booted
    from tests.hosts.machine import tied

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of clearing up
    with booted(given.count, shared=given.shared, tls=given.tls) as bed:
        env = {**os.environ, "BED": str(bed.folder), "XDG_CONFIG_HOME": str(bed.folder / "config"), "PS1": "testbed# "}
        for machine in bed.machines:
            print(f"{machine.name}  {machine.address}  {machine.ssh_uri}", file=sys.stderr)
            words = ["host", "add", machine.name, machine.ssh_uri, "--host-key", machine.host_key, "--no-check"]
            subprocess.run([sys.executable, "-m", "vmctl", "--quiet", *words], check=True, env=env, stdout=sys.stderr)
        words = command.split("\0")[:-1] or ["bash", "--norc", "-i"]
        try:
            return subprocess.run(words, check=False, env=env, preexec_fn=tied).returncode
        except OSError as error:
            print(f"cannot run {words[0]}: {error.strerror}", file=sys.stderr)
            return 127


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
