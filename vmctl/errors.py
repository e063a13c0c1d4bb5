"""The error tree. Every failure a user can meet is one of these; anything else is a bug and shows its traceback.

A message reads ``cannot VERB OBJECT: REASON``; a hint names the next action. The exit code belongs to the
class, so that scripts can tell causes apart without reading text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence


class VmctlError(Exception):
    """Base of all expected failures."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SpecError(VmctlError):
    """Bad input. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str = "") -> None:
        self.problems = tuple(problems)
        if self.problems:
            message = f"{message}: " + "; ".join(self.problems)
        super().__init__(message, hint=hint)


class HostUnreachable(VmctlError):
    """No libvirt answered at the URI."""

    exit_code = 3


class NotFound(VmctlError):
    """The named object does not exist (never: could not be asked for).

    ``missing`` is what there is none of, where somebody may know of another place to look for it: "VM". ``meant`` is
    the name of one that is there, and probably was meant; the hint says so.
    """

    exit_code = 4

    def __init__(self, message: str, *, hint: str = "", missing: str = "", meant: str = "") -> None:
        super().__init__(message, hint=f"did you mean {meant}?" if meant else hint)
        self.missing = missing
        self.meant = meant


def close_to(name: str, known: Iterable[str]) -> str:
    """The one of those names that was probably meant by a mistyped one; "" for none."""
    from difflib import get_close_matches  # late: only who mistypes asks

    return next(iter(get_close_matches(name, list(known), n=1)), "")


class Conflict(VmctlError):
    """The name or resource is taken."""

    exit_code = 5


class WrongState(VmctlError):
    """The object exists, but its state does not allow the operation."""

    exit_code = 6


class WaitTimeout(VmctlError):
    """A bounded wait ran out. ``evidence`` is what was observed, line by line."""

    exit_code = 7

    def __init__(self, what: str, *, after_s: float, evidence: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(f"{what}: not after {after_s:.1f} s", hint=hint)
        self.what = what
        self.after_s = after_s
        self.evidence = tuple(evidence)


class Unsupported(VmctlError):
    """This host lacks the feature."""

    exit_code = 8


class GuestCommandFailed(VmctlError):
    """A command vmctl itself ran in the guest failed. ``evidence`` is what the guest said, line by line."""

    exit_code = 9

    def __init__(self, message: str, *, evidence: Sequence[str] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.evidence = tuple(evidence)


class ImageError(VmctlError):
    """Checksum, format, build or qemu-img trouble."""

    exit_code = 10


class NoRoom(ImageError):
    """There is no room for an image, which may be good: with more room, what is there of it can be used."""


class PreflightFailed(VmctlError):
    """What was asked cannot go well. Carries every problem found with its mend, before anything was changed."""

    exit_code = 11

    def __init__(self, message: str, *, problems: Sequence[tuple[str, str]], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


class MigrationFailed(VmctlError):
    """A migration did not come to its end; the message says where the VM is now."""

    exit_code = 12


class HypervisorError(VmctlError):
    """A libvirt error that has no class of its own. ``code`` and ``domain`` are libvirt's."""

    exit_code = 13

    def __init__(self, message: str, *, code: int, domain: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.domain = domain


class PartialFailure(VmctlError):
    """Some of several targets failed; ``failures`` maps each failed name to its error."""

    exit_code = 14

    def __init__(self, message: str, *, failures: Mapping[str, VmctlError]) -> None:
        super().__init__(message)
        self.failures = dict(failures)


class Interrupted(BaseException):
    """The user or a supervisor asked vmctl to stop (SIGINT, SIGTERM).

    No VmctlError, as KeyboardInterrupt is no Exception: who copes with what fails must not go on after it.
    """

    exit_code = 130

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def reason(error: Exception, *, path: bool = False) -> str:
    """Why something failed, in words for a message: no "[Errno 2]", and the path only where nothing names it yet."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if path and error.filename else error.strerror
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    return f"{error}" or type(error).__name__


def quietly(act: Callable[[], object]) -> None:
    """Undo one step. What undoing meets must not hide why there was something to undo."""
    try:
        act()
    except VmctlError:
        return
