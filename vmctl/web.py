"""HTTP and HTTPS: one GET, with its redirects and the environment's proxies. The only place that imports urllib3.

Trouble that may pass (a refused or reset connection, a stall, 5xx) is a Temporary, all other trouble final.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from vmctl.errors import ImageError, NotFound, SpecError, VmctlError

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TEMPORARY = frozenset({408, 425, 429})
_MOST_REDIRECTS = 10
_IN_URLS = "%:/?#[]@!$&'()*+,;="
_CHUNK = 256 << 10


class Temporary(ImageError):
    """A download failed for a reason that may pass. ``reason`` is the message without its object."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"cannot download {url}: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered: 200, 206 or 416. ``url`` is where, after redirects.

    ``chunks`` raises Temporary when the body ends early or stalls.
    """

    url: str
    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


def check_url(url: str) -> None:
    """Raise SpecError for what cannot be downloaded at all."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isprintable() or " " in url:
        raise SpecError(f"cannot download {url}: it is no http or https URL")
    if parts.username or parts.password:
        # It would stand in the image's manifest for all to read.
        raise SpecError("cannot download from a URL with a user or password in it", hint="take it out of the URL")


def told(url: str) -> str:
    """A URL as all may read it: what stands behind a ? is a key as often as not."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query="…" if parts.query else "", fragment=""))


@contextmanager
def get(url: str, headers: Mapping[str, str], *, stall_s: float) -> Iterator[Answer]:
    """Ask for ``url``. ``stall_s`` is the longest time without a byte. Raises Temporary, NotFound, ImageError."""
    import urllib3  # late: it brings http.client and email with it

    seen = [url]
    while True:
        manager = _manager(seen[-1])
        try:
            response = manager.request(
                "GET",
                seen[-1],
                headers={"Accept-Encoding": "identity", "User-Agent": "vmctl", **headers},
                timeout=urllib3.Timeout(connect=stall_s, read=stall_s),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        except urllib3.exceptions.HTTPError as error:
            raise _refused(url, error, stall_s) from error
        try:
            if response.status not in _REDIRECTS or "location" not in response.headers:
                _accept(url, response.status)
                yield Answer(seen[-1], response.status, response.headers, _chunks(url, response, stall_s))
                return
            seen.append(_next(url, seen, response.headers["location"]))
        finally:
            response.close()
            manager.clear()


def _next(url: str, seen: list[str], location: str) -> str:
    try:
        target = quote(urljoin(seen[-1], location), safe=_IN_URLS)
        check_url(target)
    except (SpecError, ValueError) as error:
        raise ImageError(f"cannot download {url}: it redirects to {location!r}, no http or https URL") from error
    if urlsplit(seen[-1]).scheme == "https" and urlsplit(target).scheme == "http":
        raise ImageError(
            f"cannot download {url}: it redirects from https to {target}, which anybody on the way could change"
        )
    if target in seen:
        raise ImageError(f"cannot download {url}: its redirects go in a circle, over {target}")
    if len(seen) > _MOST_REDIRECTS:
        raise ImageError(f"cannot download {url}: more than {_MOST_REDIRECTS} redirects")
    return target


def _accept(url: str, status: int) -> None:
    if status in {200, 206, 416}:
        return
    from http.client import responses

    said = f"the server says {status} {responses.get(status, '')}".rstrip()
    if status >= 500 or status in _TEMPORARY:
        raise Temporary(url, said)
    if status in {404, 410}:
        raise NotFound(f"cannot download {url}: {said}", hint="has the image moved? `vmctl image search` has others")
    raise ImageError(f"cannot download {url}: {said}")


def _manager(url: str) -> PoolManager:
    from urllib.request import getproxies, proxy_bypass

    import urllib3

    parts = urlsplit(url)
    # The system's trust store, and SSL_CERT_FILE: what administrators expect to be looked at.
    context = ssl.create_default_context() if parts.scheme == "https" else None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc):
        return urllib3.PoolManager(ssl_context=context)
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    try:
        login = urlsplit(proxy)
        headers = None
        if login.username:
            headers = urllib3.make_headers(proxy_basic_auth=f"{login.username}:{login.password or ''}")
        return urllib3.ProxyManager(proxy, proxy_headers=headers, ssl_context=context)
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        shown = proxy.rpartition("@")[2]
        raise SpecError(
            f"cannot use proxy {shown}: it is no http or https URL", hint="see http_proxy, https_proxy"
        ) from error


def _chunks(url: str, response: BaseHTTPResponse, stall_s: float) -> Iterator[bytes]:
    import urllib3

    try:
        # read1 hands over what has come: a kill, or a stall, loses nothing that was received.
        while chunk := response.read1(_CHUNK):
            yield chunk
    except urllib3.exceptions.HTTPError as error:
        raise _refused(url, error, stall_s) from error


def _refused(url: str, error: Exception, stall_s: float) -> VmctlError:
    import socket
    from http.client import HTTPException, IncompleteRead, RemoteDisconnected

    import urllib3

    if isinstance(error, urllib3.exceptions.LocationValueError):
        return ImageError(f"cannot download {url}: {error}")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ImageError(
                f"cannot download {url}: the server's certificate cannot be trusted: {cause.verify_message}",
                hint="a certificate authority of your own: SSL_CERT_FILE=/path/ca.pem",
            )
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            return ImageError(f"cannot download {url}: there is no host {urlsplit(url).hostname}")
        if isinstance(cause, OSError) and cause.strerror:
            return Temporary(url, cause.strerror.lower())
        if isinstance(cause, HTTPException) and not isinstance(cause, IncompleteRead | RemoteDisconnected):
            return Temporary(url, f"the server's answer is no HTTP ({type(cause).__name__})")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return Temporary(url, f"no byte came for {stall_s:g} s")
    if isinstance(error, urllib3.exceptions.ProtocolError):
        return Temporary(url, "the connection ended too early")
    return Temporary(url, f"{error}" or type(error).__name__)
