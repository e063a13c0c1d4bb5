"""Network namespaces of our own, which nobody else sees and which are gone with this process, however it ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from vmctl.bench.machine import DYING_WITH_US
from vmctl.errors import GuestCommandFailed, Unsupported, reason
from vmctl.wait import wait_until

_QUICK_S = 20.0
_USERS = ("--user", "--preserve-credentials")


class Namespace:
    """A network namespace, held by a process that ends when our end of its pipe is closed.

    Without root it is in a user namespace, where we are root, without rights outside; another is made beside it in the
    same one, or no link could lead from one to the other.
    """

    def __init__(self, beside: Namespace | None = None) -> None:
        self._own_users = os.geteuid() != 0
        make = ["unshare", "--user", "--map-root-user", "--net"] if self._own_users else ["unshare", "--net"]
        if beside and self._own_users:
            make = ["nsenter", "--target", str(beside.pid), *_USERS, "--", "unshare", "--net"]
        try:
            self._holder = subprocess.Popen(
                [*make, "sh", "-c", "echo there; exec cat > /dev/null"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise Unsupported(f"cannot make a network namespace: {reason(error, path=True)}") from error
        if not (self._holder.stdout and self._holder.stdout.readline()):
            said = self._holder.communicate()[1].decode(errors="replace").strip()
            raise Unsupported(f"cannot make a network namespace: {said}", hint="as root, or where users may have them")
        self.run("ip", "link", "set", "lo", "up")

    @property
    def pid(self) -> int:
        """The process that holds it."""
        return self._holder.pid

    @property
    def within(self) -> tuple[str, ...]:
        """The words that run a command in it."""
        return ("nsenter", "--target", str(self.pid), "--net", *(_USERS if self._own_users else ()), "--")

    def close(self) -> None:
        """Let it go."""
        self._holder.communicate()

    def run(self, *words: str, timeout_s: float = _QUICK_S, cwd: Path | None = None) -> str:
        """What a command in it prints. Raises GuestCommandFailed when it fails."""
        try:
            done = subprocess.run(
                [*self.within, *DYING_WITH_US, *words],
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=True,
                stdin=subprocess.DEVNULL,
                cwd=cwd,
            )
        except subprocess.CalledProcessError as error:
            evidence = [*error.stderr.splitlines()[-5:], *error.stdout.splitlines()[-5:]]
            raise GuestCommandFailed(f"cannot measure: {' '.join(words[:3])} failed", evidence=evidence) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise GuestCommandFailed(f"cannot measure: {' '.join(words[:3])}: {reason(error)}") from error
        return done.stdout

    @contextmanager
    def serving(self, servers: Mapping[int, Sequence[str]]) -> Iterator[None]:
        """Servers that run in it meanwhile, by the TCP port each listens on. Raises WaitTimeout where one does not."""
        with ExitStack() as ending:
            for words in servers.values():
                server = subprocess.Popen(
                    [*self.within, *DYING_WITH_US, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                ending.callback(server.wait)
                ending.callback(server.kill)
            names = ", ".join(words[0] for words in servers.values())
            what = f"cannot measure: {names} to listen"
            wait_until(lambda: self._listening() >= set(servers), what=what, timeout_s=_QUICK_S, interval_s=0.02)
            yield

    def _listening(self) -> set[int]:
        """TCP ports that somebody listens on (Documentation/networking/proc_net_tcp.rst: state 0A)."""
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == "0A":
                    found.add(int(words[1].rpartition(":")[2], 16))
        return found


@contextmanager
def two_namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """Two of them, between which links can be laid. Raises Unsupported where there can be none."""
    with closing(Namespace()) as first, closing(Namespace(beside=first)) as second:
        yield first, second
