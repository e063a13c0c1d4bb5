"""The guest's screen: as a picture, and in a real browser."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests import png
from tests.system.chromium import Page
from tests.system.conftest import REPO, VMCTL, Shell
from vmctl.wait import wait_until

pytestmark = pytest.mark.system

COLUMNS, ROWS, CELL_W, CELL_H = 80, 25, 9, 16  # VGA text mode 3
CANVAS = "document.querySelector('#noVNC_container canvas')"


@pytest.fixture(scope="module")
def vm() -> Iterator[str]:
    shell = Shell()
    chosen = f"view-{os.getpid()}"
    shell.run("create", chosen, "--image", "micro", "--graphics", "vnc", "--wait", "ssh")
    wait_until(lambda: "press Enter" in text_of(chosen), what="the guest's console on its screen", timeout_s=30)
    yield chosen
    shell.run("delete", chosen, "--yes")


def text_of(vm: str) -> str:
    """What the guest's kernel says is on its first text console."""
    return Shell().run("exec", vm, "--", "cat", "/dev/vcs1").stdout


@contextmanager
def viewing(vm: str, *options: str) -> Iterator[str]:
    """The address that `vmctl view` serves meanwhile; it must end well on Ctrl-C: nothing else ends it."""
    running = subprocess.Popen(
        [*VMCTL, "view", vm, "--no-open", *options], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    try:
        ready, _, _ = select.select([running.stdout], [], [], 30)
        assert ready, "vmctl view says nothing"
        url = running.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), (url, running.communicate(timeout=10))
        yield url
    finally:
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0


def reads_as(width: int, pixels: bytes, text: str) -> bool:
    """Whether these pixels show this text: each letter always the same shape, and no two letters the same one."""
    shapes: dict[str, set[bytes]] = defaultdict(set)
    for place, letter in enumerate(text):
        x, y = place % COLUMNS * CELL_W, place // COLUMNS * CELL_H
        rows = (
            pixels[3 * ((y + line) * width + x) :][: 3 * CELL_W] for line in range(CELL_H - 3)
        )  # not the cursor's lines
        shapes[letter].add(b"".join(rows))
    return (
        all(len(s) == 1 for s in shapes.values()) and len({next(iter(s)) for s in shapes.values()}) == len(shapes) > 10
    )


def canvas(page: Page) -> tuple[int, int, bytes]:
    """Width, height and RGB of the page's screen."""
    found = json.loads(
        page.value(
            f"(() => {{ const c = {CANVAS}; if (!c || !c.width) return '[0, 0, \"\"]';"
            " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let s = '';"
            " for (let i = 0; i < d.length; i += 4) s += String.fromCharCode(d[i], d[i + 1], d[i + 2]);"
            " return JSON.stringify([c.width, c.height, btoa(s)]); })()"
        )
    )
    return found[0], found[1], base64.b64decode(found[2])


def test_a_screenshot_shows_the_guests_text_console(shell: Shell, vm: str, tmp_path: Path) -> None:
    path = tmp_path / "screen.png"
    assert shell.run("screenshot", vm, str(path)).stdout == f"{path}\n"
    width, height, pixels = png.decode(path.read_bytes())
    assert (width, height) == (COLUMNS * CELL_W, ROWS * CELL_H)
    text = text_of(vm)
    assert f"vmctl-micro {vm} tty1" in text
    assert reads_as(width, pixels, text)
    assert not reads_as(width, pixels, text.replace("press", "prose")), "the test cannot fail"
    assert path.stat().st_size < 60_000 and [p.name for p in tmp_path.iterdir()] == ["screen.png"]
    assert "cannot write" in shell.run("screenshot", vm, "/no/such/folder/x.png", check=1).stderr
    refused = shell.run("screenshot", vm, str(tmp_path / "screen.jpg"), check=2)
    assert "a screenshot is PNG, not image/jpeg" in refused.stderr and not (tmp_path / "screen.jpg").exists()


def test_a_browser_shows_the_guests_text_console_and_types_into_it(vm: str, tmp_path: Path) -> None:
    shell = Shell()
    with viewing(vm) as url, Page(tmp_path / "profile") as page:
        page.go(url)

        def shown() -> bool:
            width, _, pixels = canvas(page)
            return width == COLUMNS * CELL_W and reads_as(width, pixels, text_of(vm))

        wait_until(shown, what="the guest's text in the page", timeout_s=60, interval_s=0.3)
        shell.run("screenshot", vm, str(tmp_path / "now.png"))
        width, height, pixels = png.decode((tmp_path / "now.png").read_bytes())
        seen = canvas(page)
        assert seen[:2] == (width, height)
        unlike = sum(a != b for a, b in zip(pixels[::3], seen[2][::3], strict=True))
        assert unlike <= CELL_W * CELL_H, f"{unlike} pixels differ: more than a blinking cursor"
        page.value(f"{CANVAS}.focus()")
        page.type("\ntouch /root/typed\n")
        wait_until(
            lambda: "typed" in shell.run("exec", vm, "--", "ls", "/root").stdout, what="what was typed", timeout_s=30
        )
        wait_until(lambda: "touch" in text_of(vm) and shown(), what="the new text in the page", timeout_s=30)


def asked(url: str, path: str, **headers: str) -> tuple[int, bytes]:
    """Status and body of one request, its path sent as it is."""
    at = urlsplit(url)
    connection = http.client.HTTPConnection("127.0.0.1", at.port or 0, timeout=20)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in ({"Host": at.netloc} | headers).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read() if answer.status != 101 else b""


def test_the_page_is_for_this_machine_and_its_own_pages_only(vm: str) -> None:
    with viewing(vm) as url:
        netloc = urlsplit(url).netloc
        assert asked(url, "/vnc.html")[0] == asked(url, "/")[0] == asked(url, "/core/rfb.js?x=1")[0] == 200
        for path in (
            "/core/",
            "/core",
            "/../../etc/passwd",
            "/core/../vnc.html",
            "//etc/passwd",
            "/%2e%2e/x",
            "/etc/passwd",
        ):
            assert asked(url, path)[0] == 404, path
        assert asked(url, "/vnc.html", Host="evil.example")[0] == 421
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Protocol": "binary",
        }
        assert asked(url, "/websockify", **upgrade)[0] == 403
        assert asked(url, "/websockify", **upgrade, Origin="http://evil.example")[0] == 403
        assert asked(url, "/websockify", **upgrade, Origin=f"http://{netloc}")[0] == 101
        port = urlsplit(url).port
        listening = subprocess.run(
            ["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True, check=True
        ).stdout
        assert re.search(rf"127\.0\.0\.1:{port}\b", listening) and "0.0.0.0:" not in listening.replace("0.0.0.0:*", "")
        for bad in ({}, {"Host": "a", "Content-Length": "x"}):
            with socket.create_connection(("127.0.0.1", port or 0)) as raw:
                raw.sendall(
                    b"GET / HTTP/1.1\r\n" + b"".join(f"{k}: {v}\r\n".encode() for k, v in bad.items()) + b"\r\n"
                )
                assert raw.recv(64).startswith(b"HTTP/1.1 421")


def test_a_taken_port_and_a_vm_without_a_screen_are_clear_errors(shell: Shell, vm: str, name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = shell.run("view", vm, "--port", str(taken.getsockname()[1]), check=5)
        assert "is taken" in refused.stderr
    shell.run("create", name, "--image", "micro", "--no-start")
    assert "vmctl start" in shell.run("screenshot", name, check=6).stderr
    shell.run("start", name)
    for verb in ("view", "screenshot"):
        refused = shell.run(verb, name, check=8)
        assert "has no screen" in refused.stderr and "--graphics vnc" in refused.stderr
    assert not (REPO / f"{name}.png").exists()
