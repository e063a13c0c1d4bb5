"""The command line. One file per group of commands; each turns flags into one call and prints its result."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
from itertools import takewhile
from types import FrameType
from typing import Any

from vmctl.cli.unheard import Watch
from vmctl.errors import Interrupted, SpecError, VmctlError

_READER_GONE = 141  # what a shell makes of SIGPIPE
_AGAIN_S = 0.02


class _Interrupt:
    """Whether Ctrl-C was pressed: typer makes of it an exit code, which a guest's command may have as well."""

    pressed = False
    watch: Watch | None = None


def _interrupted(signum: int, frame: FrameType | None) -> None:
    _Interrupt.pressed = True
    _heard()
    signal.default_int_handler(signum, frame)


def _heard() -> None:
    if _Interrupt.watch is not None:
        _Interrupt.watch.heard()


def _terminated(_signum: int, _frame: FrameType | None) -> None:
    _heard()
    raise Interrupted("stopped on request (SIGTERM)")


def hear_signals() -> None:
    """Let Ctrl-C and SIGTERM end what runs by an exception, wherever they come."""
    # Undoing half-made work must not be cut short by a second signal from an impatient supervisor.
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell told us to ignore it
        signal.signal(signal.SIGINT, _interrupted)
    sys.unraisablehook = _dropped
    _Interrupt.watch = Watch({_interrupted, _terminated})


def _dropped(found: sys.UnraisableHookArgs) -> None:
    """Bring an interrupt back that came in a destructor, say of a handle of libvirt's: what those raise is dropped."""
    lost = {KeyboardInterrupt: signal.SIGINT, Interrupted: signal.SIGTERM}.get(found.exc_type)
    if lost is None:
        sys.__unraisablehook__(found)
    else:  # in a moment: now it would be dropped again
        threading.Timer(_AGAIN_S, os.kill, (os.getpid(), lost)).start()


def main() -> None:
    """Entry point: run the command line and exit with its code."""
    # Importing makes thousands of objects that stay: to look for garbage among them costs a tenth of a short command.
    gc.set_threshold(100_000)
    _open_closed_streams()
    hear_signals()
    try:
        code = run(sys.argv[1:])
    except (KeyboardInterrupt, Interrupted) as early:  # while what tells of it was being imported
        os.write(2, f"{str(early) or 'interrupted'}\n".encode())
        os._exit(Interrupted.exit_code)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, say) went away: nobody is left to tell, not even at interpreter shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or _READER_GONE
    except OSError as error:  # nothing of it can be written again at the interpreter's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or _unwritten(error)
    sys.stderr.flush()
    # Everything is closed and flushed. Taking the interpreter apart, object by object, would cost 20 ms more.
    os._exit(code)


def _open_closed_streams() -> None:
    """Closed standard streams become empty ones: else the next file opened, a connection say, took their place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            setattr(sys, name, os.fdopen(number, mode))
        elif number:
            stream.reconfigure(errors="backslashreplace")  # a terminal without the letters shows their numbers


def _unwritten(error: OSError) -> int:
    from vmctl import ui

    ui.tell_error(VmctlError(f"cannot write the output: {error.strerror}"))
    return VmctlError.exit_code


def run(args: list[str]) -> int:
    """Run one command line and return its exit code. An unexpected exception is a bug and passes through."""
    from vmctl import ui

    try:
        from vmctl.cli.app import command

        result = command().main(args=args, prog_name="vmctl", standalone_mode=False)
    except (VmctlError, Interrupted) as error:
        ui.tell_error(error)
        return error.exit_code
    except (KeyboardInterrupt, EOFError):
        ui.note("interrupted")
        return Interrupted.exit_code
    except BrokenPipeError:
        return _READER_GONE
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        return _unwritten(error)
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):  # typer ends by itself on one of these
            return _READER_GONE
        raise
    except Exception as error:  # noqa: BLE001  typer's own classes have moved between its versions
        return _usage(error, args)
    if _Interrupt.pressed and result == Interrupted.exit_code:
        ui.note("interrupted")
    return result if isinstance(result, int) else 0


def _usage(error: Exception, args: list[str]) -> int:
    """Exit code of typer's own errors, told like all others; an abort is an interrupt. All else is a bug."""
    from vmctl import ui

    if type(error).__name__ == "Abort":
        ui.note("interrupted")
        return Interrupted.exit_code
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
        ui.write(f"{error}".rstrip() + "\n")
        return SpecError.exit_code
    said, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if isinstance(code, int):
        words = said() if said is not None else ""
        if words:
            # An option without its value is noticed before there is a context.
            before = " ".join(["vmctl", *takewhile(lambda word: word[:1] != "-", args[:1])])
            context = getattr(error, "ctx", None)
            path = getattr(context, "command_path", before)
            text = (words[:1].lower() + words[1:]).rstrip(".")
            hint = (_meant(context, path, args) if "extra argument" in text else "") or f"{path} --help"
            ui.tell_error(SpecError(f"cannot understand the command line: {text}", hint=hint))
        return code
    raise error


def _meant(context: Any, path: str, args: list[str]) -> str:
    from vmctl.cli.words import in_one_word

    first = next((one.metavar or "" for one in context.command.params if one.param_type_name == "argument"), "")
    meant = in_one_word(path, args, first)
    return f"did you mean {meant}?" if meant else ""
