"""Live migration beside `virsh migrate` on the same pair of hosts, and `list --all-hosts` beside the slowest of them.

    tests/run --run .venv/bin/python3 tests/perf/migrate.py [ROUNDS]

Between two hosts of a testbed, over a link of 200 Mbit/s, goes a guest with 200 MB of memory that cannot be compressed:
by virsh, then back by vmctl, each a command of its own from its start to its end, with the same flags. For how long it
does not answer is seen from outside. A guest that changes memory faster than a link of 100 Mbit/s takes it is given a
minute by each of them.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.hosts import Machine, booted
from tests.system.conftest import REPO, VMCTL
from tests.system.migrating import Pair, busy, guest, known_pair
from vmctl.outage import Probe

_LINK, _NARROW = "200mbit", "100mbit"
_BALLAST_MB = 200
_LONG_S = 120.0


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def by_virsh(pair: Pair, name: str, source: Machine, target: Machine) -> None:
    """As vmctl orders it: peer-to-peer, live, slowed down when it does not converge."""
    flags = ["--live", "--p2p", "--persistent", "--undefinesource", "--unsafe", "--auto-converge"]
    way = [source.ssh_uri, "migrate", name, *flags, target.peer_uri]
    subprocess.run(["virsh", "-q", "-c", *way, f"tcp://{target.address}"], check=True)


def by_vmctl(pair: Pair, name: str, source: Machine, target: Machine) -> None:
    words = ["-q", "-c", source.name, "migrate", name, "--to", target.name, "--live"]
    subprocess.run([*VMCTL, *words], check=True, cwd=REPO, env=pair.env, stdout=subprocess.DEVNULL)


def side_by_side(pair: Pair, rounds: int) -> None:
    """Total time, and time without an answer."""
    first, second = pair.bed.machines
    with guest(pair, "h1", "--memory", "384M") as name:
        fill = f"head -c {_BALLAST_MB}000000 /dev/urandom >/run/ballast"
        pair.vmctl("-c", "h1", "exec", name, "--", "sh", "-c", f"mount -o remount,size=90% /run; {fill}", timeout=300)
        address = pair.json("-c", "h1", "show", name)["address"]
        pair.bed.limit(_LINK)
        took: dict[str, list[float]] = {"virsh": [], "vmctl": []}
        silent: dict[str, list[float]] = {"virsh": [], "vmctl": []}
        ways = [("virsh", by_virsh), ("vmctl", by_vmctl)]
        for turn in range(rounds):
            ends = (first, second)
            for label, work in ways if turn % 2 else ways[::-1]:
                with Probe(address) as probe:
                    assert probe.answers(5)
                    took[label].append(timed(lambda work=work, ends=ends: work(pair, name, *ends)))
                    time.sleep(0.5)  # a silence is as long as the first answer after it says
                silent[label].append(probe.longest_ms() or 0)
                ends = ends[::-1]
        pair.bed.limit(None)
        print(f"a guest with {_BALLAST_MB} MB of memory over {_LINK}, live; median of {rounds}")
        for label in took:
            seconds, gap = statistics.median(took[label]), statistics.median(silent[label])
            told = " ".join(f"{one:.1f}" for one in took[label])
            print(f"{label:<8} {seconds:6.2f} s in all   {gap:6.0f} ms without an answer   ({told})")
        ratio = statistics.median(took["vmctl"]) / statistics.median(took["virsh"])
        print(f"vmctl / virsh: {ratio:.2f}\n")


def converging(pair: Pair) -> None:
    """A guest that changes memory faster than it can be sent."""
    pair.bed.limit(_NARROW)
    first, second = pair.bed.machines
    for label in ("virsh", "vmctl"):
        with busy(pair) as name:
            began = time.monotonic()
            if label == "virsh":
                words = ["virsh", "-q", "-c", first.ssh_uri, "migrate", name, "--live", "--p2p", "--persistent"]
                words += ["--undefinesource", "--unsafe", second.peer_uri, f"tcp://{second.address}"]
                running = subprocess.Popen(words, stderr=subprocess.DEVNULL)
            else:
                line = ["-q", "-c", "h1", "migrate", name, "--to", "h2", "--live"]
                running = subprocess.Popen([*VMCTL, *line], cwd=REPO, env=pair.env, stdout=subprocess.DEVNULL)
            try:
                running.wait(_LONG_S)
                print(f"{label:<8} a busy guest over {_NARROW}: moved after {time.monotonic() - began:.1f} s")
            except subprocess.TimeoutExpired:
                first.virsh("domjobabort", name, check=False)
                running.wait(30)
                print(f"{label:<8} a busy guest over {_NARROW}: not in {_LONG_S:.0f} s")
    pair.bed.limit(None)
    print()


def lists(rounds: int, config: Path) -> None:
    """All hosts at once, and each alone; then with one of them 20 ms away."""
    with booted(5) as bed:
        pair = known_pair(bed, config)
        for delay in (0, 20):
            bed.machines[-1].slow(delay_ms=delay)
            alone = {
                one.name: statistics.median(timed(lambda one=one: _list(pair, "-c", one.name)) for _ in range(rounds))
                for one in bed.machines
            }
            every = statistics.median(timed(lambda: _list(pair, "--all-hosts")) for _ in range(rounds))
            slowest = max(alone.values())
            where = f", one of them {2 * delay} ms away" if delay else ""
            told = f"{every:.2f} s, the slowest alone {slowest:.2f} s, ratio {every / slowest:.2f}"
            print(f"list --all-hosts over five hosts{where}: {told}")


def _list(pair: Pair, *words: str) -> None:
    before, after = ([], [*words]) if words[0] == "--all-hosts" else ([*words], [])
    line = [*VMCTL, *before, "list", *after]
    subprocess.run(line, check=True, cwd=REPO, env=pair.env, stdout=subprocess.DEVNULL)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    subprocess.run([*VMCTL, "image", "build", "micro"], check=True, cwd=REPO, stdout=subprocess.DEVNULL)
    with TemporaryDirectory() as folder:
        with booted(2, shared=True) as bed:
            pair = known_pair(bed, Path(folder) / "two")
            (Path.home() / ".ssh").mkdir(exist_ok=True)  # the test host's: what virsh goes by
            shutil.copy(bed.known_hosts, Path.home() / ".ssh/known_hosts")
            side_by_side(pair, rounds)
            converging(pair)
        lists(rounds, Path(folder) / "five")


if __name__ == "__main__":
    main()
