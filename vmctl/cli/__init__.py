"""The command line. One file per group of commands; each turns flags into one call and prints its result."""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

from vmctl.errors import Interrupted, VmctlError


def _terminated(_signum: int, _frame: FrameType | None) -> None:
    raise Interrupted("stopped on request (SIGTERM)")


def main() -> None:
    """Entry point: run the command line and exit with its code."""
    # Importing makes thousands of objects that stay: to look for garbage among them costs a tenth of a short command.
    gc.set_threshold(100_000)
    # Undoing half-made work must not be cut short by a second signal from an impatient supervisor.
    signal.signal(signal.SIGTERM, _terminated)
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, say) went away: nobody is left to tell, not even at interpreter shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 141
    sys.stderr.flush()
    # Everything is closed and flushed. Taking the interpreter apart, object by object, would cost 20 ms more.
    os._exit(code)


def run(args: list[str]) -> int:
    """Run one command line and return its exit code. An unexpected exception is a bug and passes through."""
    from vmctl import ui

    try:
        from vmctl.cli.app import command

        result = command().main(args=args, prog_name="vmctl", standalone_mode=False)
    except VmctlError as error:
        ui.tell_error(error)
        return error.exit_code
    except (KeyboardInterrupt, EOFError):
        ui.note("interrupted")
        return Interrupted.exit_code
    except BrokenPipeError:
        return 141
    except Exception as error:  # noqa: BLE001  typer's own classes have moved between its versions
        return _usage(error)
    return result if isinstance(result, int) else 0


def _usage(error: Exception) -> int:
    """Exit code of typer's own errors: wrong usage tells itself; an abort is an interrupt. All else is a bug."""
    from vmctl import ui

    if type(error).__name__ == "Abort":
        ui.note("interrupted")
        return Interrupted.exit_code
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if isinstance(code, int):
        if show is not None:
            show()
        return code
    raise error
