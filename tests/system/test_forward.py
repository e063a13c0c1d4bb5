"""Ports of a guest, here."""

from __future__ import annotations

import hashlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.system.conftest import REPO, VMCTL, Shell

pytestmark = pytest.mark.system

BIG = 16 << 20


@pytest.fixture(scope="module")
def vm() -> Iterator[str]:
    """A guest that on its loopback echoes (7), digests what it gets once that has ended (9), and sends (11)."""
    shell = Shell()
    chosen = f"forward-{os.getpid()}"
    shell.guest(chosen)
    serve = "setsid nc -ll -p {} -e {} </dev/null >/dev/null 2>&1 &"
    shell.run("exec", chosen, "--", "sh", "-c", f"head -c {BIG} /dev/urandom >/root/big")
    for port, command in ((7, "cat"), (9, "sha256sum"), (11, "cat /root/big"), (13, "hostname")):
        shell.run("exec", chosen, "--", "sh", "-c", serve.format(port, command))
    yield chosen
    shell.run("delete", chosen, "--yes")


@contextmanager
def forwarded(vm: str, *ports: str) -> Iterator[tuple[list[int], subprocess.Popen[str]]]:
    """The ports that `vmctl forward` tells; it must end on Ctrl-C, unless a test ends it."""
    running = subprocess.Popen(
        [*VMCTL, "forward", vm, *ports], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert running.stdout is not None
    try:
        assert select.select([running.stdout], [], [], 30)[0], "vmctl forward says nothing"
        lines = [running.stdout.readline() for _ in ports]
        assert all(lines), running.communicate(timeout=10)
        yield [int(line.split(" ->")[0].rpartition(":")[2]) for line in lines], running
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGINT)
            assert running.wait(20) == 0


def everything(sock: socket.socket) -> bytes:
    """All that comes until the other side ends its sending."""
    found = bytearray()
    while data := sock.recv(1 << 16):
        found += data
    return bytes(found)


def test_an_answer_comes_after_the_request_has_ended(vm: str) -> None:
    """Half-close: sha256sum says nothing before the end of its input."""
    with forwarded(vm, "0:9") as ((port,), _), socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(b"all of it")
        sock.shutdown(socket.SHUT_WR)
        assert everything(sock).split()[0] == hashlib.sha256(b"all of it").hexdigest().encode()


def test_large_transfers_are_whole_in_both_directions(shell: Shell, vm: str) -> None:
    data = os.urandom(1 << 20) * (BIG >> 20)
    with forwarded(vm, "0:9", "0:11") as ((digest, source), _):
        with socket.create_connection(("127.0.0.1", digest), timeout=120) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            assert everything(sock).split()[0] == hashlib.sha256(data).hexdigest().encode()
        with socket.create_connection(("127.0.0.1", source), timeout=120) as sock:
            got = everything(sock)
    there = shell.run("exec", vm, "--", "sha256sum", "/root/big").stdout.split()[0]
    assert len(got) == BIG and hashlib.sha256(got).hexdigest() == there


def test_several_connections_at_once_do_not_mix_or_wait(vm: str) -> None:
    with forwarded(vm, "0:7", "127.0.0.1:0:13") as ((echo, named), _):
        held = socket.create_connection(("127.0.0.1", echo), timeout=60)  # open and silent all the while

        def talk(number: int) -> bool:
            text = f"{number} ".encode() * 5000
            with socket.create_connection(("127.0.0.1", echo), timeout=60) as sock:
                sock.sendall(text)
                sock.shutdown(socket.SHUT_WR)
                return everything(sock) == text

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(talk, range(8)))
        with socket.create_connection(("127.0.0.1", named), timeout=60) as sock:
            assert everything(sock) == vm.encode() + b"\n"
        held.sendall(b"still here")
        assert held.recv(100) == b"still here"
        held.close()


def test_a_port_nobody_listens_on_in_the_guest_ends_the_connection_and_not_the_forward(vm: str) -> None:
    with forwarded(vm, "0:99", "0:13") as ((closed, named), running):
        with socket.create_connection(("127.0.0.1", closed), timeout=60) as sock, pytest.raises(ConnectionResetError):
            assert sock.recv(10) == b"never"
        with socket.create_connection(("127.0.0.1", named), timeout=60) as sock:
            assert everything(sock) == vm.encode() + b"\n"
        assert running.stderr is not None
        assert "cannot connect to port 99" in running.stderr.readline() + running.stderr.readline()


def test_only_loopback_listens_unless_told_otherwise(vm: str) -> None:
    with forwarded(vm, "0:13", "[::1]:0:13", "0.0.0.0:0:13") as (ports, running):
        told = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout
        at = [next(w for w in told.split() if w.endswith(f":{port}")) for port in ports]
        assert at == [f"127.0.0.1:{ports[0]}", f"[::1]:{ports[1]}", f"0.0.0.0:{ports[2]}"]
        assert running.stderr is not None and "open to whoever reaches 0.0.0.0" in running.stderr.readline()


def test_a_taken_port_is_one_clear_error(shell: Shell, vm: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = shell.run("forward", vm, "0:13", f"{taken.getsockname()[1]}:13", check=5).stderr
        assert "the port is taken" in told and told.count("\n") == 2
    shell.run("forward", vm, "80", check=2)
    shell.run("forward", "no-such-vm", "0:80", check=4)


def test_a_guest_that_goes_away_ends_the_forward_with_its_reason(shell: Shell, name: str) -> None:
    shell.guest(name)
    with forwarded(name, "0:22") as (_, running):
        shell.run("stop", name)
        assert running.wait(40) == 3
        assert running.stderr is not None and "its SSH server is gone" in running.stderr.read()
