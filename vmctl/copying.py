"""Files and folders into a guest and out of it.

Through OpenSSH's client, whose ciphers cost a third of what they cost in Python: a file as it is, and anything else as
one tar archive for the guest's tar, so that a folder of many files costs no round trip for each. Where the client or
the guest's tar is missing, by SFTP (vmctl.ssh).
"""

from __future__ import annotations

import io
import os
import posixpath
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vmctl import guest, tarstream
from vmctl.errors import GuestCommandFailed, HostUnreachable, NotFound, SpecError, VmctlError
from vmctl.events import Progress, Reporter
from vmctl.guest import parse_place
from vmctl.hosts import Host
from vmctl.received import receive
from vmctl.tarstream import Kind, Malformed

_CHUNK = 256 * 1024
_END_S = 60.0
_UNTOLD = 4096  # what /sys says of the size of each file; /proc says nothing
_MOST_UNTOLD = 64 << 20
_SSH_FAILED = 255
_NO_TAR, _NOT_THERE, _NO_FOLDER = 79, 78, 77
# What arrives is put under its name only when all of it has come, which the archive's last member tells: a tar that
# meets the end of its input between two members takes that for the archive's.
_TAKE = """
command -v tar >/dev/null || exit 79
size=$1 mode=$2 d=$3; shift 3; name=
if [ "$size" ]; then
    one=$d
    [ ! -d "$d" ] || one=$d/$1
    # As cp does: through a link, into a device.
    if [ ! -d "$one" ] && { [ -L "$one" ] || { [ -e "$one" ] && [ ! -f "$one" ]; }; }; then exec cat >"$one"; fi
fi
if [ -d "$d" ]; then into=$d; else [ $# -eq 1 ] || exit 77; name=${d##*/}; into=$(dirname -- "$d"); fi
[ -d "$into" ] || exit 77
t=$(mktemp -d "$into/.vmctl-XXXXXX") || exit 1
trap 'rm -rf -- "$t"' EXIT
trap 'exit 1' HUP INT TERM
if [ "$size" ]; then
    mkdir "$t/in" && cat >"$t/in/$1" && chmod "$mode" "$t/in/$1" || exit 1
    [ "$(stat -c %s "$t/in/$1")" = "$size" ] || exit 1
else
    tar -xpmof - -C "$t" || exit 1
    [ -e "$t/end" ] || exit 1
fi
for n in "$@"; do
    to=$into/${name:-$n}
    if [ -d "$t/in/$n" ] && [ -d "$to" ]; then cp -a "$t/in/$n/." "$to/" || exit 1
    elif [ -d "$to" ]; then echo "$to is a folder" >&2; exit 1
    else mv -f -- "$t/in/$n" "$to" || exit 1; fi
done
"""
# A file's size is for the progress alone: a log has grown meanwhile, and those of /proc and /sys do not tell theirs.
_GIVE = """
command -v tar >/dev/null || exit 79
[ -e "$1" ] || exit 78
if [ -f "$1" ]; then stat -L -c 'file %s %a' "$1" && cat "$1" && printf end; exit; fi
echo tar
cd -- "$2" && exec tar -chf - -- "./$3"
"""


def copy(host: Host, sources: list[str], destination: str, report: Reporter, *, user: str | None = None) -> None:
    """Copy into a guest or out of one. Raises SpecError unless exactly one side is in a guest."""
    froms, to = [parse_place(source) for source in sources], parse_place(destination)
    machines = {place.vm for place in froms}
    if to.vm is not None and machines == {None}:
        paths = [Path(place.path) for place in froms]
        for path in paths:
            if not path.exists():
                raise NotFound(f"cannot copy {path}: there is no such file here")
        _put(host, paths, to.vm, to.path, report, user)
    elif to.vm is None and None not in machines:
        if len(froms) > 1 and not Path(to.path).is_dir():
            raise SpecError(f"cannot copy {len(froms)} things to {to.path}: it is no folder here")
        for place in froms:
            _get(host, place.vm or "", place.path, Path(to.path), report, user)
    else:
        raise SpecError(
            "cannot copy: just one side can be in a guest", hint="vmctl cp FILE VM:/path, or vmctl cp VM:/path FILE"
        )


@contextmanager
def _remote(
    host: Host, name: str, argv: list[str], *, stdin: int | None, stdout: int | None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of OpenSSH's client, ended when the block ends early. Its errors are in ``stderr``, a file.

    Raises why nothing more can be expected of the guest, when that ended it.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=errors, bufsize=0)
        process.stderr = errors
        failures: list[VmctlError] = []
        try:
            with guest.watched(host, name, process) as failures:
                yield process
        except VmctlError as error:
            if failures and failures[0] is not error:
                raise failures[0] from error
            raise
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            if process.poll() is None:
                process.kill()
                process.wait()


def _ended(host: Host, process: subprocess.Popen[bytes], doing: str, name: str) -> int:
    """Its exit code, when that is one a script above chose; raises what went wrong otherwise."""
    code = process.wait(_END_S)
    if code in {0, _NO_TAR, _NOT_THERE, _NO_FOLDER}:
        return code
    assert process.stderr is not None
    process.stderr.seek(0)
    words = process.stderr.read(4096).decode("utf-8", "replace").strip().splitlines()
    reason = words[-1] if words else f"the guest's tar ended with {code}"
    if code == _SSH_FAILED:
        if why := guest.missing(host, name):
            raise guest.unanswered(host, name, why)
        raise HostUnreachable(f"cannot {doing}: {reason}", hint=f"vmctl wait {name} --for ssh")
    raise GuestCommandFailed(f"cannot {doing}: {reason}")


def _script(text: str, *words: str) -> str:
    return shlex.join(["sh", "-c", text, "sh", *words])


# --- into a guest ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """A file or folder here, and its name in the archive."""

    path: Path
    name: bytes
    mode: int
    size: int
    folder: bool
    content: bytes | None = None  # where its size was not to be told but by reading it


def _found(path: Path, name: bytes, about: os.stat_result) -> _Found:
    mode = stat.S_IMODE(about.st_mode)
    if about.st_blocks or about.st_size > _UNTOLD:
        return _Found(path, name, mode, about.st_size, False)
    with path.open("rb") as file:
        content = file.read(_MOST_UNTOLD + 1)
    if len(content) > _MOST_UNTOLD:
        raise SpecError(f"cannot copy {path}: it does not tell how long it is")
    return _Found(path, name, mode, len(content), False, content)


def _walk(path: Path, name: bytes, above: tuple[tuple[int, int], ...] = ()) -> Iterator[_Found]:
    """It and all below it, links followed. Raises SpecError for what is neither file nor folder, or a loop of links."""
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            yield _found(path, name, found)
            return
        here = (found.st_dev, found.st_ino)
        if not stat.S_ISDIR(found.st_mode) or here in above:
            raise SpecError(f"cannot copy {path}: " + ("it leads back to itself" if here in above else "it is no file"))
        yield _Found(path, name, stat.S_IMODE(found.st_mode), 0, True)
        for child in sorted(path.iterdir()):
            yield from _walk(child, name + b"/" + os.fsencode(child.name), (*above, here))
    except OSError as error:
        nowhere = isinstance(error, FileNotFoundError) and path.is_symlink()
        raise SpecError(f"cannot copy {path}: {'its link leads nowhere' if nowhere else error.strerror}") from error


def _put(host: Host, paths: list[Path], name: str, destination: str, report: Reporter, user: str | None) -> None:
    doing = f"copy to {destination} in VM {name}"
    bases = [path.resolve().name if path.name in {"", "..", "."} else path.name for path in paths]
    if shutil.which("ssh"):
        found = [
            one for path, base in zip(paths, bases, strict=True) for one in _walk(path, b"in/" + os.fsencode(base))
        ]
        alone = found[0] if len(found) == 1 and not found[0].folder else None
        about = (str(alone.size), f"{alone.mode:o}") if alone else ("", "")
        argv = guest.openssh_argv(host, name, [_script(_TAKE, *about, destination, *bases)], user=user, report=report)
        label = bases[0] if len(bases) == 1 else f"{len(bases)} things"
        with _remote(host, name, argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            with suppress(BrokenPipeError):  # the guest's side has ended: its exit code says why
                _send(process, found, label, report)
            code = _ended(host, process, doing, name)
        if code == 0:
            return
        if code != _NO_TAR:
            raise NotFound(f"cannot {doing}: there is no such folder in the guest")
    from vmctl import ssh

    where = guest.reachable(host, name, user=user, report=report)
    ssh.put(
        where,
        paths,
        destination,
        lambda label, done, total: report(Progress(label, done, total)),
        guest.Vigil(host, name),
    )


def _send(process: subprocess.Popen[bytes], found: Sequence[_Found], label: str, report: Reporter) -> None:
    pipe = process.stdin
    assert pipe is not None
    total, done = sum(one.size for one in found), 0
    out = _Buffered(pipe)
    bare = len(found) == 1 and not found[0].folder
    if not bare:
        out.write(tarstream.header(b"in", Kind.FOLDER, 0o700, 0))
    for one in found:
        if not bare:
            out.write(tarstream.header(one.name, Kind.FOLDER if one.folder else Kind.FILE, one.mode, one.size))
        if one.folder:
            continue
        try:
            with io.BytesIO(one.content) if one.content is not None else one.path.open("rb", buffering=0) as file:
                left = one.size
                while left and (data := file.read(min(_CHUNK, left))):
                    out.write(data)
                    left -= len(data)
                    done += len(data)
                    report(Progress(label, done, total))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise SpecError(f"cannot read {one.path}: {error.strerror}") from error
        if left:
            raise SpecError(f"cannot copy {one.path}: it has become shorter meanwhile")
        if not bare:
            out.write(tarstream.padding(one.size))
    if not bare:
        out.write(tarstream.header(b"end", Kind.FILE, 0o600, 0) + tarstream.END)
    out.flush()
    pipe.close()


class _Buffered:
    """Small pieces gathered, large ones written as they are."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._held = pipe, bytearray()

    def write(self, data: bytes) -> None:
        """Write, sooner or later."""
        if len(data) >= _CHUNK:
            self.flush()
            self._all(data)
            return
        self._held += data
        if len(self._held) >= _CHUNK:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        held, self._held = bytes(self._held), bytearray()
        self._all(held)

    def _all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._pipe.write(view) :]


# --- out of a guest ----------------------------------------------------------------------------------------


def _get(host: Host, name: str, source: str, destination: Path, report: Reporter, user: str | None) -> None:
    base = posixpath.basename(source.rstrip("/"))
    root = destination / base if destination.is_dir() and base not in {"", ".", ".."} else destination
    doing = f"copy {source} from VM {name}"
    if shutil.which("ssh"):
        folder, member = (
            (source, ".") if base in {"", ".", ".."} else (posixpath.dirname(source.rstrip("/")) or ".", base)
        )
        folder = "/" if source.startswith("/") and folder in {"", "/"} else folder
        argv = guest.openssh_argv(host, name, [_script(_GIVE, source, folder, member)], user=user, report=report)
        with _remote(host, name, argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                receive(process.stdout, root, 0 if member == "." else 1, root.name, report)
            except Malformed as error:
                if _ended(host, process, doing, name) == 0:
                    raise GuestCommandFailed(f"cannot {doing}: {error}") from error
            code = _ended(host, process, doing, name)
        if code == 0:
            return
        if code != _NO_TAR:
            raise NotFound(f"cannot {doing}: there is no such file in the guest")
    from vmctl import ssh

    where = guest.reachable(host, name, user=user, report=report)
    ssh.get(
        where,
        source,
        destination,
        lambda label, done, total: report(Progress(label, done, total)),
        guest.Vigil(host, name),
    )
