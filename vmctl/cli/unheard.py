"""An end by signal where Python cannot give it: libvirt waits for a QEMU, or a daemon, that is stopped.

Python runs a signal's handler in the main thread, between two of its instructions, and libvirt, interrupted in a call,
goes on waiting: Ctrl-C and SIGTERM did nothing for as long as the call lasted.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Collection

from vmctl.errors import Interrupted

_HEARD = b"\0"
_TELL_S = 2.0  # an impatient supervisor's second signal, which comes before, ends no call that is just a little long
_LEAVE_S = 60.0
_WAITS = b"interrupted; waiting for what libvirt was asked for, and it does not answer (Ctrl-C again leaves it)\n"
_LEFT = b"interrupted while libvirt did not answer: what it was asked for may still come to pass\n"


class Watch:
    """Ends the process when a second signal comes, or a minute passes, and the first has still not been heard.

    What is half-made then is as after SIGKILL, which every command is made for.
    """

    def __init__(self, handlers: Collection[object]) -> None:
        """``handlers`` are those of Python's that call ``heard``; signals that have another are not looked at."""
        self._handlers = handlers
        self._pipe, self._told = os.pipe()
        os.set_blocking(self._told, False)
        signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="unheard", daemon=True).start()

    def heard(self) -> None:
        """Say that a handler runs. It comes after what the interpreter wrote of the signal, also of two at once."""
        try:
            os.write(self._told, _HEARD)
        except BlockingIOError:
            return  # full of signals, none of which the thread below has looked at yet

    def _run(self) -> None:
        since, told = 0.0, False
        while True:
            left_s = None
            if since:
                left_s = max(since + (_LEAVE_S if told else _TELL_S) - time.monotonic(), 0.0)
            again = False
            if select.select([self._pipe], [], [], left_s)[0]:
                for number in os.read(self._pipe, 256):
                    if number == _HEARD[0]:
                        since, told, again = 0.0, False, False
                    elif signal.getsignal(number) in self._handlers:
                        since, again = since or time.monotonic(), bool(since)
            elif not told:
                os.write(2, _WAITS)
                told = True
            else:
                again = True
            if again and told:
                os.write(2, _LEFT)
                os._exit(Interrupted.exit_code)
