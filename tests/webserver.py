"""A web server with every fault a download can meet, on loopback; it counts what it was asked and what it sent."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Page:
    """A file, and how its server misbehaves. Lists are used up, one entry a request."""

    data: bytes = b""
    etag: str = '"1"'
    ranges: bool = True
    # False: sends the range that was asked for although the file is another one now.
    heeds_if_range: bool = True
    # Bytes it sends at most where a range was asked for, and says so.
    part: int | None = None
    chunked: bool = False
    claims: int | None = None
    statuses: list[int] = field(default_factory=list)
    redirect: str = ""
    stop_after: list[int | None] = field(default_factory=list)
    # What it does where it stops: close the connection, or say nothing more until it is released.
    hangs: bool = False
    # After the data it goes on and on, to as many bytes in all as no test should take.
    endless: int = 0


@dataclass
class Request:
    """One request as it came, and the bytes of the body that went."""

    path: str
    range: str
    by_proxy: bool
    sent: int = 0


class Web:
    """The running server."""

    def __init__(self, server: ThreadingHTTPServer, scheme: str) -> None:
        self.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
        self.pages: dict[str, Page] = {}
        self.requests: list[Request] = []
        self.release = threading.Event()

    def of(self, path: str) -> list[Request]:
        """The requests for a path."""
        return [one for one in self.requests if one.path == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: Web

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer."""
        path = urlsplit(self.path).path
        request = Request(path, self.headers.get("Range", ""), by_proxy="://" in self.path)
        self.web.requests.append(request)
        self.close_connection = True
        page = self.web.pages.get(path)
        status = page.statuses.pop(0) if page and page.statuses else 200
        if page is None or status != 200:
            self._head(status if page else 404, {"Content-Length": "0"})
        elif page.redirect:
            self._head(302, {"Location": page.redirect, "Content-Length": "0"})
        else:
            self._file(page, request)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _file(self, page: Page, request: Request) -> None:
        data, start, status = page.data, 0, 200
        headers = {"ETag": page.etag} if page.etag else {}
        match = re.fullmatch(r"bytes=(\d+)-", request.range)
        current = not page.heeds_if_range or self.headers.get("If-Range", page.etag) == page.etag
        if match and page.ranges and current:
            start, status = int(match[1]), 206
            if start >= len(data):
                self._head(416, {**headers, "Content-Range": f"bytes */{len(data)}", "Content-Length": "0"})
                return
            total = page.claims if page.claims is not None else len(data)
            data = data if page.part is None else data[: start + page.part]
            headers["Content-Range"] = f"bytes {start}-{(total if page.part is None else len(data)) - 1}/{total}"
        if page.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif page.endless:
            pass  # no length: it ends where the connection does
        else:
            claims = page.claims if page.claims is not None and page.part is None else len(data)
            headers["Content-Length"] = str(claims - start)
        self._head(status, headers)
        stop = page.stop_after.pop(0) if page.stop_after else None
        try:
            self._body(page, request, data[start:] if stop is None else data[start:stop], whole=stop is None)
            while request.sent < page.endless:
                self._body(page, request, bytes(1 << 20), whole=False)
        except (BrokenPipeError, ConnectionResetError):
            return
        if stop is not None and page.hangs:
            self.web.release.wait(60)

    def _body(self, page: Page, request: Request, data: bytes, *, whole: bool) -> None:
        for at in range(0, len(data), 65536):
            part = data[at : at + 65536]
            request.sent += len(part)  # before the client can have it, and a test look
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if page.chunked else part)
        if page.chunked and whole and not page.endless:
            self.wfile.write(b"0\r\n\r\n")


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Web]:
    """Run a server."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    web = Handler.web = Web(server, "https" if tls else "http")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield web
    finally:
        web.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
