"""Downloads from a real server that does everything a server should not."""

from __future__ import annotations

import re
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.webserver import Page, Web, serving
from vmctl import download
from vmctl.download import Bounds, Patience
from vmctl.errors import ImageError, NotFound, SpecError
from vmctl.events import Event, Progress, Warned
from vmctl.image_pull import plausible

DATA = bytes(range(256)) * 4096
HALF = len(DATA) // 2


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serving() as running:
        yield running


@dataclass
class Fetching:
    """Fetches into one partial file, recording what is told and how long is waited."""

    partial: Path
    events: list[Event] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def __call__(self, url: str, *, tries: int = 3, stall_s: float = 20, most: int = 1 << 30) -> bytes:
        patience, bounds = Patience(stall_s, tries, self.waits.append), Bounds(most, plausible)
        download.fetch(url, self.partial, "img", self.events.append, patience, bounds)
        return self.partial.read_bytes()

    def said(self) -> str:
        """Everything told but progress."""
        return "\n".join(str(event) for event in self.events if not isinstance(event, Progress))

    def left(self) -> set[str]:
        """What is in the folder."""
        return {path.name for path in self.partial.parent.iterdir()}


@pytest.fixture
def fetch(tmp_path: Path) -> Fetching:
    """A way to fetch."""
    (tmp_path / "pulls").mkdir()
    return Fetching(tmp_path / "pulls/img.partial")


def refused(fetch: Fetching, url: str, kind: type[Exception] = ImageError, **options: float) -> str:
    """The error that fetching ends with."""
    with pytest.raises(kind) as caught:
        fetch(url, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, ImageError | NotFound | SpecError)
    return caught.value.message


def test_a_plain_download_tells_its_progress(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA)
    assert fetch(web.url + "/img") == DATA
    told = [event for event in fetch.events if isinstance(event, Progress)]
    assert told[0] == Progress("img", 0, len(DATA)) and told[-1] == Progress("img", len(DATA), len(DATA))
    assert fetch(web.url + "/img") == DATA and len(web.requests) == 1, "what is complete is not asked for again"


def test_a_truncated_body_is_gone_on_with(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, stop_after=[HALF])
    assert fetch(web.url + "/img") == DATA
    assert [one.range for one in web.requests] == ["", f"bytes={HALF}-"]
    assert sum(one.sent for one in web.requests) == len(DATA) and fetch.waits == [1]


def test_a_part_may_be_shorter_than_asked_for(web: Web, fetch: Fetching) -> None:
    """Whole by its own length, and yet not the end of the file."""
    web.pages["/img"] = Page(DATA, stop_after=[HALF], part=len(DATA) // 4 + 1)
    assert fetch(web.url + "/img") == DATA
    assert len(web.requests) == 3 and "bytes came of" in fetch.said()


def test_a_server_without_ranges_begins_again(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, ranges=False, stop_after=[HALF])
    assert fetch(web.url + "/img") == DATA
    assert [one.sent for one in web.requests] == [HALF, len(DATA)] and "does not send parts" in fetch.said()


@pytest.mark.parametrize("heeds", [True, False], ids=["says so", "sends the range all the same"])
def test_a_file_that_changed_in_between_is_never_mixed(web: Web, fetch: Fetching, heeds: bool) -> None:
    web.pages["/img"] = Page(DATA, stop_after=[HALF])
    refused(fetch, web.url + "/img", tries=1)
    other = DATA[::-1]
    web.pages["/img"] = Page(other, etag='"2"', heeds_if_range=heeds)
    assert fetch(web.url + "/img") == other
    assert ("another one now" if heeds else "changed on the server") in fetch.said()


def test_bytes_without_a_validator_are_not_gone_on_with(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, etag="", stop_after=[HALF])
    assert fetch(web.url + "/img") == DATA
    assert [one.range for one in web.requests] == ["", ""]


def test_bytes_of_another_url_are_not_used(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, stop_after=[HALF])
    refused(fetch, web.url + "/img", tries=1)
    web.pages["/other"] = Page(DATA[::-1])
    assert fetch(web.url + "/other") == DATA[::-1]


def test_a_broken_state_file_means_from_the_beginning(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, stop_after=[HALF])
    refused(fetch, web.url + "/img", tries=1)
    (fetch.partial.parent / "img.partial.json").write_text('{"url": 3')
    assert fetch(web.url + "/img") == DATA and web.requests[-1].range == ""


def test_503_twice_then_success_with_growing_waits(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, statuses=[503, 503])
    assert fetch(web.url + "/img") == DATA
    assert fetch.waits == [1, 2] and "503 Service Unavailable: trying again in 2 s" in fetch.said()


def test_503_for_ever_ends(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, statuses=[503] * 9)
    said = refused(fetch, web.url + "/img", tries=4)
    assert "the server says 503 Service Unavailable; 4 tries brought nothing more" in said
    assert fetch.waits == [1, 2, 4] and fetch.left() == set()


@pytest.mark.parametrize(("status", "kind"), [(404, NotFound), (410, NotFound), (403, ImageError), (401, ImageError)])
def test_what_will_not_pass_is_an_error_at_once(web: Web, fetch: Fetching, status: int, kind: type) -> None:
    web.pages["/img"] = Page(DATA, statuses=[status] * 9)
    assert f"cannot download {web.url}/img: the server says {status}" in refused(fetch, web.url + "/img", kind)
    assert len(web.requests) == 1 and fetch.waits == [] and fetch.left() == set()


def test_a_refused_connection_is_tried_again(fetch: Fetching) -> None:
    with serving() as gone:
        url = gone.url
    assert "connection refused; 3 tries" in refused(fetch, url + "/img")
    assert fetch.waits == [1, 2]


def test_redirects_are_followed(web: Web, fetch: Fetching) -> None:
    web.pages |= {"/a": Page(redirect="/b"), "/b": Page(redirect=web.url + "/img"), "/img": Page(DATA)}
    assert fetch(web.url + "/a") == DATA


def test_it_goes_on_at_the_mirror_that_sent_the_first_part(web: Web, fetch: Fetching) -> None:
    """A site that redirects to another mirror each time: their validators are not each other's."""
    mirrors = [Page(DATA, etag=f'"{i}"') for i in range(2)]
    web.pages |= {"/img": Page(redirect="/0"), "/0": mirrors[0], "/1": mirrors[1]}
    mirrors[0].stop_after = [HALF]
    refused(fetch, web.url + "/img", tries=1)
    web.pages["/img"].redirect = "/1"
    assert fetch(web.url + "/img") == DATA
    assert [(one.path, one.sent) for one in web.requests] == [("/img", 0), ("/0", HALF), ("/0", len(DATA) - HALF)]


@pytest.mark.parametrize("status", [404, 503])
def test_a_mirror_that_is_gone_is_left(web: Web, fetch: Fetching, status: int) -> None:
    web.pages |= {"/img": Page(redirect="/0"), "/0": Page(DATA, stop_after=[HALF]), "/1": Page(DATA, etag='"1b"')}
    refused(fetch, web.url + "/img", tries=1)
    web.pages["/img"].redirect = "/1"
    web.pages["/0"].statuses = [status] * 9
    assert fetch(web.url + "/img") == DATA
    assert [one.sent for one in web.of("/1")] == [len(DATA)]


def test_a_redirect_loop_is_one_clear_error(web: Web, fetch: Fetching) -> None:
    web.pages |= {"/a": Page(redirect="/b"), "/b": Page(redirect="/a")}
    assert "redirects go in a circle" in refused(fetch, web.url + "/a")
    assert len(web.requests) == 2 and fetch.left() == set()


def test_redirects_without_end_are_one_clear_error(web: Web, fetch: Fetching) -> None:
    web.pages |= {f"/{i}": Page(redirect=f"/{i + 1}") for i in range(99)}
    assert "more than 10 redirects" in refused(fetch, web.url + "/0")
    assert len(web.requests) == 11


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://host/x", "gopher://x", "http://u:p@127.0.0.1/"])
def test_a_redirect_to_anything_but_the_web_is_refused(web: Web, fetch: Fetching, target: str) -> None:
    web.pages["/a"] = Page(redirect=target)
    assert "it redirects to" in refused(fetch, web.url + "/a") and fetch.left() == set()


def test_a_stall_is_noticed_and_gone_on_after(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, stop_after=[HALF], hangs=True)
    assert fetch(web.url + "/img", stall_s=0.3) == DATA
    assert "no byte came for 0.3 s" in fetch.said() and web.requests[1].range == f"bytes={HALF}-"


def test_a_server_that_never_answers_is_given_up(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, stop_after=[0, 0], hangs=True)
    assert "no byte came for 0.2 s; 2 tries" in refused(fetch, web.url + "/img", stall_s=0.2, tries=2)


def test_a_length_that_promises_too_much_is_found(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, claims=len(DATA) + 1000)
    said = refused(fetch, web.url + "/img")
    assert f"the server promised {len(DATA) + 1000} bytes and has {len(DATA)}" in said and fetch.left() == set()


def test_one_that_promises_too_much_without_ranges_is_given_up(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, claims=len(DATA) + 1000, ranges=False)
    assert "the connection ended too early; 3 tries" in refused(fetch, web.url + "/img")
    assert len(web.requests) == 3


def test_a_length_that_promises_too_little_ends_there(web: Web, fetch: Fetching) -> None:
    """The rest is no part of the answer, as HTTP has it; what is missing, the checksum shows."""
    web.pages["/img"] = Page(DATA, claims=HALF)
    assert fetch(web.url + "/img") == DATA[:HALF]


def test_a_body_without_a_length_is_complete_at_its_last_chunk_only(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, chunked=True, stop_after=[HALF])
    assert fetch(web.url + "/img") == DATA
    assert [one.range for one in web.requests] == ["", f"bytes={HALF}-"]


def test_too_little_room_is_said_before_anything_is_fetched(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA, claims=1 << 60)
    assert re.search(
        r"it needs 1152921504606846976 bytes and .* has \d+ free", refused(fetch, web.url + "/img", most=1 << 61)
    )
    assert fetch.left() == set() and len(web.requests) == 1


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_without_a_length_ends_at_the_limit(web: Web, fetch: Fetching, chunked: bool) -> None:
    web.pages["/img"] = Page(DATA, chunked=chunked, endless=1 << 32)
    said = refused(fetch, web.url + "/img", most=8 << 20)
    assert re.search(r"it tells no length and goes on after \d+ bytes, above the limit of 8388608$", said)
    assert fetch.left() == set() and len(web.requests) == 1 and web.requests[0].sent < 64 << 20


def test_a_promise_above_the_limit_is_not_taken_up(web: Web, fetch: Fetching) -> None:
    web.pages["/img"] = Page(DATA)
    said = refused(fetch, web.url + "/img", most=len(DATA) - 1)
    assert said.endswith(f"it is {len(DATA)} bytes, above the limit of {len(DATA) - 1}") and fetch.left() == set()
    assert fetch(web.url + "/img", most=len(DATA)) == DATA


@pytest.mark.parametrize("told", [0, 1 << 29], ids=["no length", "a length"])
@pytest.mark.parametrize("form", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_what_goes_on_behind_an_image_is_not_taken_for_it(
    web: Web, fetch: Fetching, tmp_path: Path, form: str, told: int
) -> None:
    """Its header says how large it can be: a few MiB of disk are no half GiB of file."""
    image = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", form, str(image), "8M"], check=True, timeout=60)
    data = image.read_bytes()
    data += bytes(max(0, (2 << 20) - len(data)))
    web.pages["/img"] = Page(data, claims=told or None, endless=1 << 30)
    if told:
        web.pages["/img"].endless = 0
        web.pages["/img"].hangs = True
    said = refused(fetch, web.url + "/img", tries=1)
    most = (8 << 20) + (2 << 20) + (64 << 20)
    assert said.endswith(f"bytes or more, and by its own header an image of at most {most}") and fetch.left() == set()
    assert web.requests[0].sent < 256 << 20


def test_a_raw_disk_is_as_large_as_its_file(web: Web, fetch: Fetching) -> None:
    data = bytes(510) + b"\x55\xaa" + bytes(100 << 20)
    web.pages["/img"] = Page(data)
    assert fetch(web.url + "/img") == data


def test_the_environments_proxy_is_used_and_its_exceptions_heeded(
    web: Web, fetch: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.pages["/img"] = Page(DATA)
    monkeypatch.setenv("http_proxy", web.url)
    assert fetch("http://image.invalid/img") == DATA and web.requests[-1].by_proxy
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch(web.url + "/img") == DATA and not web.requests[-1].by_proxy


def test_a_proxy_that_is_none_is_bad_input(web: Web, fetch: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://user:secret@127.0.0.1:1")
    said = refused(fetch, web.url + "/img", SpecError)
    assert "cannot use proxy 127.0.0.1:1" in said and "secret" not in said


@pytest.mark.parametrize("url", ["ftp://h/x", "http:///x", "http://h:port/x", "http://h/a b", "http://u:p@h/x", "x"])
def test_urls_that_cannot_be_downloaded_are_bad_input(url: str) -> None:
    from vmctl.web import check_url

    with pytest.raises(SpecError, match="cannot download"):
        check_url(url)


def test_a_checksum_file_is_small(web: Web) -> None:
    web.pages |= {"/small": Page(b"abc"), "/huge": Page(bytes(5 << 20))}
    told: list[Event] = []
    assert download.text(web.url + "/small", told.append, Patience()) == "abc"
    with pytest.raises(ImageError, match="too large to be a checksum file"):
        download.text(web.url + "/huge", told.append, Patience())
    assert not [event for event in told if isinstance(event, Warned)]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for 127.0.0.1, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test".split()
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{folder}/key", "-out", f"{folder}/cert"]
    subprocess.run(["openssl", *words, *files], check=True, capture_output=True, timeout=60)
    both = folder / "both.pem"
    both.write_bytes((folder / "key").read_bytes() + (folder / "cert").read_bytes())
    return both


@pytest.fixture
def secure(web: Web, certificate: Path) -> Iterator[Web]:
    """A server by https."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(context) as running:
        yield running


def test_https_is_checked_against_the_systems_trust(
    secure: Web, fetch: Fetching, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secure.pages["/img"] = Page(DATA)
    assert "certificate cannot be trusted" in refused(fetch, secure.url + "/img")
    assert fetch.waits == [] and fetch.left() == set()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetch(secure.url + "/img") == DATA


def test_a_redirect_from_https_down_to_http_is_refused(
    web: Web, secure: Web, fetch: Fetching, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    secure.pages["/img"] = Page(redirect=web.url + "/img")
    web.pages |= {"/img": Page(DATA), "/up": Page(redirect=secure.url + "/real")}
    assert "redirects from https to http://" in refused(fetch, secure.url + "/img") and not web.requests
    secure.pages["/real"] = Page(DATA)
    assert fetch(web.url + "/up") == DATA


@contextmanager
def replying(raw: bytes) -> Iterator[str]:
    """A server that answers everything with these bytes."""

    class Reply(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(raw)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Reply) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/img"
        finally:
            server.shutdown()
            thread.join()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"SSH-2.0-dropbear\r\n",
        b"HTTP/1.1 99999 what\r\n\r\n",
        OK + b"no colon\r\n" * 200,
        OK + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
        OK + b"Content-Length: 1, 2\r\n\r\nabc",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc",
        OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc",
        b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-2/3\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 416 No\r\nContent-Range: bytes */3\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://h:99999/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: \xff\xfe:\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://a..b/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 200 OK\r\nETag: "a\xff\r\n b"\r\nContent-Length: 9\r\n\r\nabc',
    ],
)
def test_nonsense_for_an_answer_is_one_clear_error(fetch: Fetching, raw: bytes) -> None:
    with replying(raw) as url:
        said = refused(fetch, url, tries=2, stall_s=5)
    assert said.startswith(f"cannot download {url}: ") and "\n" not in said and len(said) < 400, said


def test_an_answer_that_is_no_http_is_told_from_one_cut_short(fetch: Fetching) -> None:
    with replying(b"SSH-2.0-dropbear\r\n") as url:
        assert "the server's answer is no HTTP (BadStatusLine)" in refused(fetch, url, tries=1)
    assert "label empty or too long" in refused(fetch, "http://a..b/x") and fetch.waits == []


def test_a_redirect_with_a_space_in_it_is_followed(web: Web, fetch: Fetching) -> None:
    web.pages |= {"/img": Page(redirect="/an image"), "/an%20image": Page(DATA)}
    assert fetch(web.url + "/img") == DATA
