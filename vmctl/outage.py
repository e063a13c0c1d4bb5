"""For how long a guest did not answer, seen from outside: what its users notice of a migration."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from types import TracebackType

_EVERY_S = 0.01
_WAIT_S = 1.0


class Probe:
    """Knocks at a TCP port of an address; use as a context manager. Any answer counts, a refusal too.

    One knock after the other, a hundred a second: a guest that is emulated has to answer each.
    """

    def __init__(self, address: str, port: int = 9) -> None:
        self._where = (address, port)
        self._over = threading.Event()
        self._answered: list[float] = []
        self._thread = threading.Thread(target=self._knock, name="outage", daemon=True)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(_WAIT_S)

    def answers(self, within_s: float = _WAIT_S) -> bool:
        """Whether it has answered, or does within that time."""
        deadline = time.monotonic() + within_s
        while not self._answered and time.monotonic() < deadline:
            self._over.wait(_EVERY_S)
        return bool(self._answered)

    def answers_again(self, within_s: float) -> bool:
        """Whether it answers from now on, within that time."""
        now = time.monotonic()
        while not (heard := bool(self._answered) and self._answered[-1] > now) and time.monotonic() < now + within_s:
            self._over.wait(_EVERY_S)
        return heard

    def longest_ms(self) -> int | None:
        """The longest time without an answer between two; None where it answered less than twice."""
        gaps = [after - before for before, after in zip(self._answered, self._answered[1:], strict=False)]
        return round(1000 * max(gaps)) if gaps else None

    def _knock(self) -> None:
        pending: dict[socket.socket, float] = {}
        with selectors.DefaultSelector() as selector:
            while not self._over.is_set():
                self._begin(selector, pending)
                until = time.monotonic() + _EVERY_S
                while (left := until - time.monotonic()) > 0:
                    for key, _ in selector.select(left):
                        self._hear(selector, pending, key.fileobj)
                now = time.monotonic()
                for sock in [sock for sock, began in pending.items() if now - began > _WAIT_S]:
                    self._drop(selector, pending, sock)
            for sock in list(pending):
                self._drop(selector, pending, sock)

    def _begin(self, selector: selectors.BaseSelector, pending: dict[socket.socket, float]) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        try:
            sock.connect(self._where)
        except BlockingIOError:
            pending[sock] = time.monotonic()
            selector.register(sock, selectors.EVENT_WRITE)
            return
        except OSError:
            pass  # no way there at all, now
        sock.close()

    def _hear(self, selector: selectors.BaseSelector, pending: dict[socket.socket, float], sock: object) -> None:
        if not isinstance(sock, socket.socket):
            return
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error in {0, 111}:  # ECONNREFUSED: someone is there to refuse
            self._answered.append(time.monotonic())
        self._drop(selector, pending, sock)

    @staticmethod
    def _drop(selector: selectors.BaseSelector, pending: dict[socket.socket, float], sock: socket.socket) -> None:
        selector.unregister(sock)
        pending.pop(sock, None)
        sock.close()
