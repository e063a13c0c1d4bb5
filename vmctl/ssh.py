"""SSH to guests: run commands and copy files. The only room that imports paramiko.

Host keys are never learned on the way: the caller passes the one key the guest must show.
"""

from __future__ import annotations

import base64
import logging
import os
import posixpath
import select
import shlex
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import paramiko
from paramiko.pkey import UnknownKeyType

from vmctl import ending
from vmctl.errors import GuestCommandFailed, HostUnreachable, NotFound, SpecError, VmctlError, reason
from vmctl.login import Target, Terminal

logging.getLogger("paramiko").addHandler(logging.NullHandler())

_CONNECT_TIMEOUT_S = 20.0
# For each further answer of a guest that has greeted: one that boots under emulation on a busy host may take half a
# minute to open a session. OpenSSH's client waits for ever.
_ANSWER_TIMEOUT_S = 120.0
_CHUNK = 64 * 1024
_KEEPALIVE_S = 15
_LOOK_S = 1.0
_ENDING_S = 20.0  # for all that ending.SCRIPT does
_EXIT_UNKNOWN = 255  # what OpenSSH's client returns too


Judge = Callable[[float], object]


class NotAnswering(HostUnreachable):
    """Nothing there speaks SSH, and so nothing has been asked of it yet: trying again later is safe."""

    def __init__(self, target: Target, why: str) -> None:
        super().__init__(f"cannot reach {target}: {why}", hint="is the guest up? `vmctl wait` shows each stage")
        self.why = why


class _Watch:
    """Closes a connection of which nothing can be expected any more: TCP itself tells that after many minutes only.

    ``judge`` hears each second for how long the other side has given no sign of life, and raises when waiting on has
    no sense. A command may be silent for days: the server itself is asked for an answer, any answer.
    """

    def __init__(self, transport: paramiko.Transport, judge: Judge) -> None:
        self.failure: VmctlError | None = None
        self._transport, self._judge = transport, judge
        self._over = threading.Event()
        self._heard: float | None = None  # before the log-in other limits hold
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def begin(self) -> None:
        """From now on the server is asked."""
        self._heard = time.monotonic()
        threading.Thread(target=self._ask, name="pulse", daemon=True).start()

    def end(self) -> None:
        """Watch no longer."""
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            try:
                self._judge(0.0 if self._heard is None else time.monotonic() - self._heard)
            except VmctlError as error:
                self.failure = error
                self._transport.close()
                return

    def _ask(self) -> None:
        while not self._over.wait(_KEEPALIVE_S):
            try:
                self._transport.global_request("keepalive@openssh.com", wait=True)
            except (paramiko.SSHException, EOFError, OSError):
                return
            if not self._transport.is_active():
                return
            self._heard = time.monotonic()


def private_key(path: Path) -> paramiko.PKey:
    """The key in a file, of whatever kind: the user may have named one of theirs. Raises SpecError."""
    hint = "`ssh_key` in the config file names a private key without a passphrase; without it vmctl makes its own"
    try:
        return paramiko.PKey.from_path(path)
    except OSError as error:
        raise SpecError(f"cannot read SSH key {path}: {reason(error)}", hint=hint) from error
    except TypeError as error:  # what cryptography makes of a missing passphrase
        raise SpecError(f"cannot use SSH key {path}: it has a passphrase", hint=hint) from error
    except (ValueError, paramiko.SSHException, UnknownKeyType) as error:
        raise SpecError(f"cannot use SSH key {path}: it is no private key", hint=hint) from error


@contextmanager
def session(target: Target, judge: Judge = lambda silent_s: None) -> Iterator[paramiko.Transport]:
    """An authenticated connection. Raises HostUnreachable; a wrong host key is one too, and says so.

    Raises what ``judge`` does (see _Watch), NotAnswering when no SSH server greets, SpecError for a key of no use.
    """
    key = private_key(target.key)
    try:
        sock = socket.create_connection((target.host, target.port), timeout=_CONNECT_TIMEOUT_S)
    except OSError as error:
        raise NotAnswering(target, reason(error)) from error
    transport = paramiko.Transport(sock)
    watch = _Watch(transport, judge)
    transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = _ANSWER_TIMEOUT_S
    kind, _, blob = target.host_key.partition(" ")
    try:
        # Ask for just the kind of key that was planted: another kind could not be compared.
        transport.get_security_options().key_types = (kind,)
        transport.start_client(timeout=_ANSWER_TIMEOUT_S)
        shown = transport.get_remote_server_key()
        if shown.get_name() != kind or shown.asbytes() != base64.b64decode(blob):
            raise HostUnreachable(
                f"cannot trust {target}: it shows another host key than the one planted at its creation",
                hint="something else answers at that address, or the guest made new keys",
            )
        transport.auth_publickey(target.user, key)
        watch.begin()
        yield transport
        if watch.failure is not None:
            raise EOFError  # why is told below
    except paramiko.AuthenticationException as error:
        raise HostUnreachable(
            f"cannot log in to {target}: it refuses {target.key}",
            hint=f"does {target.user} exist there, and was the VM created by this user of the host?",
        ) from error
    except (paramiko.SSHException, EOFError, OSError, VmctlError) as error:
        if watch.failure is not None:
            raise watch.failure from error
        if isinstance(error, VmctlError) or isinstance(error, OSError) and transport.is_active():
            raise  # not the connection's end: a reader of ours that went away, a full disk
        if not transport.remote_version:
            raise NotAnswering(target, "no SSH server greets") from error
        raise HostUnreachable(f"cannot talk to {target}: {reason(error)}") from error
    finally:
        watch.end()
        transport.close()


def _pump(channel: paramiko.Channel, source: int) -> None:
    """Feed the remote command from file descriptor ``source`` until either side ends."""
    try:
        while not channel.closed:
            # Bounded, so that this thread notices that the command ended while nobody types.
            if not select.select([source], [], [], 0.2)[0]:
                continue
            data = os.read(source, _CHUNK)
            if not data:
                channel.shutdown_write()
                return
            channel.sendall(data)
    except OSError:
        return  # the command ended without reading its input: its exit code tells the rest


def run(
    target: Target,
    command: str,
    *,
    stdin: int | None,
    out: Callable[[bytes], object],
    err: Callable[[bytes], object],
    terminal: Terminal | None = None,
    judge: Judge = lambda silent_s: None,
) -> int:
    """Run ``command`` by the guest's shell and return its exit code. Both streams are drained together.

    ``stdin`` is a file descriptor to pass on, None for no input; for ``judge`` see ``session``. Whatever ends this
    early, Ctrl-C above all, ends the command too.
    """
    with session(target, judge) as transport:
        channel = transport.open_session(timeout=_ANSWER_TIMEOUT_S)
        if terminal is not None:
            channel.get_pty(terminal.kind, terminal.columns, terminal.rows)
        try:
            channel.exec_command(os.fsencode(command))  # a file's name need not be UTF-8
            if stdin is None:
                channel.shutdown_write()
            else:
                threading.Thread(target=_pump, args=(channel, stdin), name="stdin", daemon=True).start()
            _drain(channel, out, err)
        except BaseException:
            ending = threading.Thread(target=_end_command, args=(transport, channel), name="end", daemon=True)
            ending.start()
            ending.join(_ENDING_S)
            raise
        code = channel.recv_exit_status()
        return code if code >= 0 else _EXIT_UNKNOWN


def _end_command(transport: paramiko.Transport, channel: paramiko.Channel) -> None:
    """End the command of ``channel`` in the guest, however many processes it has become."""
    if channel.exit_status_ready() or not transport.is_active():
        return
    try:
        with transport.open_session(timeout=_ENDING_S) as other:
            other.exec_command(shlex.join(["sh", "-c", ending.SCRIPT]))
            other.recv_exit_status()
    except (paramiko.SSHException, EOFError, OSError):
        _signal(transport, channel, "INT")  # no second session for us: to whom the server passes it on


def _signal(transport: paramiko.Transport, channel: paramiko.Channel, name: str) -> None:
    """RFC 4254, 6.9: a signal to the remote command. No answer comes."""
    message = paramiko.Message()
    message.add_byte(paramiko.common.cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string("signal")
    message.add_boolean(False)
    message.add_string(name)
    with suppress(paramiko.SSHException, EOFError, OSError):
        transport._send_user_message(message)  # type: ignore[attr-defined]  # paramiko has no call for this request


class Stream:
    """A byte stream to a port in a guest."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def recv(self, size: int) -> bytes:
        """Some bytes, b"" at the end. Raises OSError."""
        return bytes(self._channel.recv(size))

    def sendall(self, data: bytes) -> None:
        """All of them. Raises OSError once the other side is gone."""
        self._channel.sendall(data)

    def shutdown_write(self) -> None:
        """Say that nothing more will be sent. Raises OSError."""
        self._channel.shutdown_write()

    @property
    def ended_well(self) -> bool:
        """Whether the other side said that it has sent all, rather than going away."""
        return bool(self._channel.eof_received)

    def close(self) -> None:
        """End both directions; doing it again is no error."""
        self._channel.close()


class Tunnel:
    """A connection through which ports of the guest are reached."""

    def __init__(self, transport: paramiko.Transport, target: Target) -> None:
        self._transport, self._target = transport, target

    @property
    def alive(self) -> bool:
        """Whether the connection stands."""
        return self._transport.is_active()

    def open(self, port: int) -> Stream:
        """A stream to a port of the guest's loopback. Raises GuestCommandFailed when the guest refuses it."""
        try:
            channel = self._transport.open_channel(
                "direct-tcpip", ("127.0.0.1", port), ("127.0.0.1", 0), timeout=_CONNECT_TIMEOUT_S
            )
        except paramiko.ChannelException as error:
            raise GuestCommandFailed(f"cannot connect to port {port} of {self._target}: {error.text}") from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise HostUnreachable(f"cannot talk to {self._target}: {reason(error)}") from error
        return Stream(channel)


@contextmanager
def tunnel(target: Target, judge: Judge) -> Iterator[Tunnel]:
    """A connection for forwards inside the block. Raises as ``session`` does."""
    with session(target, judge) as transport:
        transport.set_keepalive(_KEEPALIVE_S)
        yield Tunnel(transport, target)


def _drain(
    channel: paramiko.Channel,
    out: Callable[[bytes], object],
    err: Callable[[bytes], object],
) -> None:
    """Hand over both streams until the command has ended and both are empty."""
    while True:
        select.select([channel], [], [], _LOOK_S)
        moved = False
        while channel.recv_ready():
            out(channel.recv(_CHUNK))
            moved = True
        while channel.recv_stderr_ready():
            err(channel.recv_stderr(_CHUNK))
            moved = True
        if moved:
            continue
        if channel.closed or channel.eof_received and channel.exit_status_ready():
            # What came between the last look and the end.
            while channel.recv_ready() or channel.recv_stderr_ready():
                if channel.recv_ready():
                    out(channel.recv(_CHUNK))
                if channel.recv_stderr_ready():
                    err(channel.recv_stderr(_CHUNK))
            return


Moved = Callable[[str, int, int], None]


@contextmanager
def _sftp(target: Target, judge: Judge) -> Iterator[paramiko.SFTPClient]:
    with session(target, judge) as transport:
        client = paramiko.SFTPClient.from_transport(transport)
        if client is None:
            raise GuestCommandFailed(f"cannot copy with {target}: it offers no SFTP")
        with client:
            yield client


def _is_dir(client: paramiko.SFTPClient, path: str) -> bool:
    try:
        return stat.S_ISDIR(client.stat(path).st_mode or 0)
    except FileNotFoundError:
        return False


def _is_new_or_file(client: paramiko.SFTPClient, path: str) -> bool:
    """Whether it is, or will be, a file: it has a size afterwards, and a mode of its own; a device has neither."""
    try:
        return stat.S_ISREG(client.stat(path).st_mode or 0)
    except FileNotFoundError:
        return True


def put(target: Target, sources: list[Path], destination: str, moved: Moved, judge: Judge) -> None:
    """Copy files and folders into the guest, as cp -r does; ``moved`` hears name, bytes so far, bytes in all."""
    with _sftp(target, judge) as client:
        into = _is_dir(client, destination)
        if len(sources) > 1 and not into:
            raise NotFound(f"cannot copy {len(sources)} things to {destination}: it is no folder in the guest")
        for source in sources:
            _put_one(client, source, posixpath.join(destination, source.name) if into else destination, moved)


def _put_one(client: paramiko.SFTPClient, source: Path, destination: str, moved: Moved) -> None:
    try:
        if source.is_dir():
            if not _is_dir(client, destination):
                client.mkdir(destination)
            for child in sorted(source.iterdir()):
                _put_one(client, child, posixpath.join(destination, child.name), moved)
        else:
            client.put(
                str(source),
                destination,
                callback=lambda done, total: moved(source.name, done, total),
                confirm=_is_new_or_file(client, destination),
            )
        if _is_new_or_file(client, destination) or source.is_dir():
            client.chmod(destination, stat.S_IMODE(source.stat().st_mode))
    except (OSError, paramiko.SFTPError) as error:
        raise GuestCommandFailed(f"cannot copy {source} to {destination} in the guest: {reason(error)}") from error


def get(target: Target, source: str, destination: Path, moved: Moved, judge: Judge) -> None:
    """Copy a file or folder out of the guest. A file appears under its name only when it is whole."""
    with _sftp(target, judge) as client:
        name = posixpath.basename(source.rstrip("/"))
        _get_one(client, source, destination / name if destination.is_dir() and name else destination, moved)


def _get_one(client: paramiko.SFTPClient, source: str, destination: Path, moved: Moved) -> None:
    # As cp and scp do: what a link of the user's leads to is written, and a device is written into.
    destination = destination.resolve() if destination.is_symlink() else destination
    through = destination.exists() and not destination.is_file() and not destination.is_dir()
    partial = destination if through else destination.with_name(f".{destination.name}.part")
    try:
        mode = client.stat(source).st_mode or 0
        if stat.S_ISDIR(mode):
            destination.mkdir(exist_ok=True)
            for child in sorted(client.listdir(source)):
                if child in {".", ".."} or "/" in child:  # a guest is not to be trusted with names on the host
                    continue
                _get_one(client, posixpath.join(source, child), destination / child, moved)
        else:
            with partial.open("wb") as file:
                got = client.getfo(source, file, callback=lambda done, total: moved(destination.name, done, total))
            if got < (client.stat(source).st_size or 0):
                raise OSError("it was cut short")
            if not through:
                partial.chmod(stat.S_IMODE(mode) & 0o777)
                partial.replace(destination)
    except (OSError, paramiko.SFTPError) as error:
        kind = NotFound if isinstance(error, FileNotFoundError) else GuestCommandFailed
        raise kind(f"cannot copy {source} from the guest to {destination}: {reason(error)}") from error
    finally:
        if not through:
            partial.unlink(missing_ok=True)
