"""The web page of a guest's screen: noVNC's files and the way to QEMU's own WebSocket, on loopback only.

Nothing here asks for a password, so nothing here may be reached from elsewhere, and not by a page from elsewhere in
a browser of this machine: a request must name this very server (which ends DNS rebinding), and a WebSocket must come
from a page of ours. Files are served from a list made beforehand: no path of a request ever reaches the disk.
"""

from __future__ import annotations

import mimetypes
import select
import socket
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from vmctl.errors import Unsupported

_NOVNC = Path("/usr/share/novnc")
_WEBSOCKET = "/websockify"  # where noVNC looks unless told otherwise
_PAGE = "/vnc.html?autoconnect=true&resize=scale&reconnect=true"
_CONNECT_S = 5.0
_CHUNK = 64 * 1024
_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml", ".json": "application/json"}


def _files(root: Path) -> dict[str, Path]:
    """Each file below ``root`` by the path it is asked for; links that lead out of it are left out."""
    if not (root / "vnc.html").is_file():
        raise Unsupported("cannot show a screen in the browser: noVNC is not installed", hint="apt-get install novnc")
    real = root.resolve()
    return {
        f"/{path.relative_to(root).as_posix()}": path
        for path in root.rglob("*")
        if path.is_file() and path.resolve().is_relative_to(real)
    }


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: _Http
    protocol_version = "HTTP/1.1"
    timeout = 60

    _SAFE: ClassVar = {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    def do_GET(self) -> None:
        """A file, or the way to the WebSocket."""
        if self.headers.get("Host") not in self.server.names:
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"this server has another name\n")
            return
        path = self.path.partition("?")[0]
        if path == _WEBSOCKET:
            self._websocket()
        elif (file := self.server.files.get("/vnc.html" if path == "/" else path)) is not None:
            kind = _TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            self._answer(HTTPStatus.OK, file.read_bytes(), kind)
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"there is no such file\n")

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **self._SAFE}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _websocket(self) -> None:
        """Hand the handshake to QEMU, which does the protocol, and then bytes both ways."""
        self.close_connection = True
        if self.headers.get("Origin") not in {f"http://{name}" for name in self.server.names}:
            self._answer(HTTPStatus.FORBIDDEN, b"only this server's own pages may connect\n")
            return
        try:
            qemu = socket.create_connection(self.server.target, timeout=_CONNECT_S)
        except OSError:
            self._answer(HTTPStatus.BAD_GATEWAY, b"the VM's screen does not answer\n")
            return
        with qemu:
            # QEMU knows no other path.
            lines = ["GET / HTTP/1.1", *(f"{name}: {value}" for name, value in self.headers.items()), "", ""]
            qemu.sendall("\r\n".join(lines).encode("latin-1"))
            self.server.join(self.connection, qemu)

    def log_message(self, format: str, *_: object) -> None:
        """Nothing: what a browser fetches is of no interest."""


class _Http(ThreadingHTTPServer):
    """The server with what its requests need."""

    daemon_threads = True

    def __init__(self, port: int, target: tuple[str, int], files: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.files, self.target = files, target
        own = self.server_address[1]
        self.names = {f"127.0.0.1:{own}", f"localhost:{own}"} | ({"127.0.0.1", "localhost"} if own == 80 else set())
        self.over = threading.Event()

    def join(self, one: socket.socket, other: socket.socket) -> None:
        """Bytes both ways until either side ends."""
        ways = {one: other, other: one}
        while not self.over.is_set():
            for source in select.select([one, other], [], [], 1.0)[0]:
                try:
                    data = source.recv(_CHUNK)
                    if not data:
                        return
                    ways[source].sendall(data)
                except OSError:
                    return

    def handle_error(self, _request: object, _client: object) -> None:
        """A browser that went away is nothing to tell."""


class Server:
    """The page of one screen, from construction to the end of the block. Raises OSError for a port not to be had."""

    def __init__(self, port: int, target: tuple[str, int]) -> None:
        self._http = _Http(port, target, _files(_NOVNC))
        self._thread = threading.Thread(target=self._http.serve_forever, name="web", daemon=True)

    @property
    def url(self) -> str:
        """The page."""
        return f"http://127.0.0.1:{self._http.server_address[1]}{_PAGE}"

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.over.set()
        self._http.shutdown()
        self._http.server_close()
