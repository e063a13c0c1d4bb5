"""`vmctl image search` and `image pull` as typed, against a web server of the test's own."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.system.conftest import REPO, VMCTL, Shell, environment, volumes
from tests.webserver import Page, Web, serving
from vmctl.wait import wait_until

pytestmark = pytest.mark.system

ENTRY = """
[[image]]
name = "{name}"
os = "debian"
os_version = "99"
architecture = "x86_64"
url = "{url}/img.qcow2"
checksum_url = "{url}/SHA512SUMS"
checksum_kind = "sha512"
default_user = "tester"
boots = ["bios", "uefi"]
osinfo = "debian99"
aliases = ["{name}-alias"]
"""


@dataclass
class Puller:
    """A web server with an image, a user whose catalogue has it, and that user's vmctl."""

    web: Web
    name: str
    data: bytes
    home: Path
    shell: Shell

    def __post_init__(self) -> None:
        self.env = environment(XDG_CACHE_HOME=str(self.home / "cache"), XDG_CONFIG_HOME=str(self.home / "config"))
        self.catalogue(ENTRY.format(name=self.name, url=self.web.url))
        self.web.pages["/img.qcow2"] = Page(self.data)
        self.web.pages["/SHA512SUMS"] = Page(f"{self.sha512()}  img.qcow2\n".encode())

    def sha512(self) -> str:
        """Of the image."""
        return hashlib.sha512(self.data).hexdigest()

    def catalogue(self, text: str) -> Path:
        """Replace the user's catalogue."""
        path = self.home / "config/vmctl/catalog.d/test.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def run(self, *words: str, check: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        """`vmctl image WORDS`."""
        return self.shell.run("image", *words, check=check, env=self.env, **options)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """The same, not waited for."""
        return subprocess.Popen(
            [*VMCTL, "image", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPO,
            env=self.env,
        )

    def refused(self, code: int, *words: str) -> str:
        """A pull that must fail: what it said. Nothing of the image may be in the store then."""
        said = self.run("pull", *words, check=code).stderr
        assert said.count("cannot ") == 1 and "Traceback" not in said, said
        assert self.stored() == set()
        return said

    def in_mounts(self, script: str) -> str:
        """What a shell script said that runs a pull as "$@", in mounts of its own."""
        pull = [sys.executable, "-m", "vmctl", "image", "pull", self.name]
        words = ["unshare", "-m", "sh", "-c", script, "sh", *pull]
        options: dict[str, Any] = {"capture_output": True, "text": True, "cwd": REPO, "env": self.env}
        return str(subprocess.run(words, timeout=120, check=False, **options).stderr)

    def stored(self) -> set[str]:
        """The image's volumes in the store."""
        return {volume for volume in volumes(self.shell, "vmctl-images") if volume.startswith(self.name)}

    def pulls(self) -> dict[str, int]:
        """Sizes of what is in the cache: the downloads, and whatever an import might leave beside them."""
        cache = self.home / "cache/vmctl"
        return {str(path.relative_to(cache)): path.stat().st_size for path in cache.rglob("*") if path.is_file()}

    @property
    def partial(self) -> Path:
        """The file it downloads to."""
        return self.home / f"cache/vmctl/pulls/{self.name}.partial"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A qcow2 file of some MiB that looks random."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "raw").write_bytes(secrets.token_bytes(4 << 20))
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(folder / "raw"), str(folder / "qcow2")]
    subprocess.run(words, check=True, timeout=60)
    return (folder / "qcow2").read_bytes()


@pytest.fixture
def puller(image: bytes, tmp_path: Path, shell: Shell) -> Iterator[Puller]:
    """A user who pulls an image that is in no store yet and in none afterwards."""
    with serving() as web:
        one = Puller(web, f"t-{secrets.token_hex(4)}", image, tmp_path, shell)
        yield one
    shell.run("image", "delete", one.name, "--yes", check=None)


def test_a_pull_by_alias_keeps_what_the_catalogue_knows(puller: Puller) -> None:
    done = puller.run("pull", f"{puller.name}-alias")
    assert "sha512 is as it should be" in done.stderr and done.stdout.startswith(f"{puller.name}-")
    manifest = puller.shell.json("image", "show", puller.name)
    assert manifest["name"] == puller.name and manifest["checksum"] == f"sha512:{puller.sha512()}"
    assert (manifest["os"], manifest["os_version"], manifest["default_user"]) == ("debian", "99", "tester")
    assert (manifest["boots"], manifest["osinfo"]) == (["bios", "uefi"], "debian99")
    assert manifest["source"] == f"{puller.web.url}/img.qcow2" and manifest["verified"] is True
    assert puller.pulls() == {}, "what was downloaded is in the store now, and only there"
    assert f"sha512:{puller.sha512()}" in puller.shell.run("image", "show", puller.name).stdout
    assert "NOT VERIFIED" not in puller.shell.run("image", "list").stdout
    assert puller.run("show", f"{puller.name}-alias", "-o", "name").stdout == done.stdout, "it is found by it, too"


def test_the_key_in_a_url_is_written_down_nowhere(puller: Puller) -> None:
    words = ["pull", f"{puller.web.url}/img.qcow2?key=s3cret", "--name", puller.name]
    puller.run(*words, "--checksum", f"sha512:{puller.sha512()}")
    assert puller.shell.json("image", "show", puller.name)["source"] == f"{puller.web.url}/img.qcow2?…"
    kept = [*Path("/var/lib/libvirt").rglob("*.json"), *(puller.home / "cache").rglob("*")]
    assert kept and not [path for path in kept if path.is_file() and b"s3cret" in path.read_bytes()]


def test_an_image_for_another_architecture_is_known_as_one(puller: Puller) -> None:
    puller.catalogue(ENTRY.format(name=puller.name, url=puller.web.url).replace("x86_64", "aarch64"))
    puller.run("pull", puller.name)
    assert puller.shell.json("image", "show", puller.name)["architecture"] == "aarch64"
    refused = puller.shell.run("create", f"{puller.name}-vm", "--image", puller.name, check=2).stderr
    assert "the image is for aarch64" in refused


def test_what_the_store_has_is_not_downloaded_again(puller: Puller) -> None:
    first = puller.run("pull", puller.name).stdout
    again = puller.run("pull", puller.name)
    assert "is in the store already, unchanged" in again.stderr and again.stdout == first
    assert len(puller.web.of("/img.qcow2")) == 1


def test_a_newer_image_under_the_same_url_is_pulled(puller: Puller) -> None:
    puller.run("pull", puller.name)
    puller.data += bytes(512)  # another file, though of the same disk
    puller.__post_init__()
    puller.run("pull", puller.name)
    assert len(puller.stored()) == 2
    assert puller.shell.json("image", "show", puller.name)["checksum"] == f"sha512:{puller.sha512()}"
    puller.shell.run("image", "delete", puller.name, "--yes")


def test_a_wrong_checksum_is_refused_and_nothing_is_left(puller: Puller) -> None:
    puller.web.pages["/SHA512SUMS"].data = b"0" * 128 + b"  img.qcow2\n"
    said = puller.refused(10, puller.name)
    assert f"is {puller.sha512()} and should be {'0' * 128}" in said and puller.pulls() == {}


def test_a_length_that_promises_too_little_is_found_by_the_checksum(puller: Puller) -> None:
    puller.web.pages["/img.qcow2"].claims = 100_000
    assert "(100000 bytes) is" in puller.refused(10, puller.name) and puller.pulls() == {}


def test_a_length_that_promises_too_much_is_found(puller: Puller) -> None:
    puller.web.pages["/img.qcow2"].claims = len(puller.data) + 1
    said = puller.refused(10, puller.name, "--tries", "2")
    assert f"promised {len(puller.data) + 1} bytes and has {len(puller.data)}" in said and puller.pulls() == {}


@pytest.mark.parametrize(("status", "code"), [(404, 4), (410, 4), (403, 10)])
def test_what_the_server_will_not_give(puller: Puller, status: int, code: int) -> None:
    puller.web.pages["/img.qcow2"].statuses = [status] * 9
    assert f"the server says {status}" in puller.refused(code, puller.name)
    assert puller.pulls() == {} and len(puller.web.of("/img.qcow2")) == 1


def test_a_checksum_file_that_is_not_there_ends_it_before_the_image(puller: Puller) -> None:
    del puller.web.pages["/SHA512SUMS"]
    assert "/SHA512SUMS: the server says 404" in puller.refused(4, puller.name)
    assert puller.web.of("/img.qcow2") == [] and puller.pulls() == {}


def test_503_twice_then_success(puller: Puller) -> None:
    puller.web.pages["/img.qcow2"].statuses = [503, 503]
    assert "503 Service Unavailable: trying again in 2 s" in puller.run("pull", puller.name).stderr
    assert len(puller.stored()) == 2


def test_a_redirect_loop(puller: Puller) -> None:
    puller.web.pages["/img.qcow2"] = Page(redirect="/b")
    puller.web.pages["/b"] = Page(redirect="/img.qcow2")
    assert "redirects go in a circle" in puller.refused(10, puller.name) and puller.pulls() == {}


def test_a_truncated_download_without_ranges_ends_and_keeps_nothing_usable(puller: Puller) -> None:
    puller.web.pages["/img.qcow2"].ranges = False
    puller.web.pages["/img.qcow2"].stop_after = [100_000] * 9
    said = puller.refused(10, puller.name, "--tries", "2")
    assert "the connection ended too early; 2 tries brought nothing more" in said
    assert puller.pulls()[f"pulls/{puller.name}.partial"] == 100_000
    puller.web.pages["/img.qcow2"].stop_after = []
    puller.run("pull", puller.name)
    assert puller.pulls() == {} and len(puller.stored()) == 2


def test_a_stall_is_gone_on_after(puller: Puller) -> None:
    puller.web.pages["/img.qcow2"].stop_after = [100_000]
    puller.web.pages["/img.qcow2"].hangs = True
    assert "no byte came for 0.5 s" in puller.run("pull", puller.name, "--stall-timeout", "0.5").stderr
    assert [one.range for one in puller.web.of("/img.qcow2")] == ["", "bytes=100000-"]


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_pull_goes_on_where_it_ended(puller: Puller, which: signal.Signals) -> None:
    half = len(puller.data) // 2
    puller.web.pages["/img.qcow2"].stop_after = [half]
    puller.web.pages["/img.qcow2"].hangs = True
    killed = puller.start("pull", puller.name)
    there = lambda: puller.partial.exists() and puller.partial.stat().st_size == half  # noqa: E731
    wait_until(there, what="half of the image", timeout_s=60)
    killed.send_signal(which)
    said = killed.communicate(timeout=60)[1]
    assert killed.returncode == (-which if which == signal.SIGKILL else 130) and "Traceback" not in said
    assert puller.stored() == set() and set(puller.pulls()) == {
        f"pulls/{puller.name}.partial",
        f"pulls/{puller.name}.partial.json",
    }
    puller.run("pull", puller.name)
    assert [one.sent for one in puller.web.of("/img.qcow2")] == [half, len(puller.data) - half]
    assert puller.pulls() == {} and len(puller.stored()) == 2


def test_a_pull_killed_after_any_change_to_the_store_is_made_good_by_the_next(puller: Puller) -> None:
    killed_when_done = 0
    for at in range(1, 99):
        words = ["-m", "tests.system.interrupting", "SIGKILL", str(at), "image", "pull", puller.name]
        code = warm.run(words, env=puller.env | {"CHANGES": str(puller.home / "changes")}, timeout=120).returncode
        stored = puller.stored()  # as they are on the disk now: libvirt may have looked before or not
        listed = puller.name in {one["name"] for one in puller.shell.json("image", "list")}
        if code == 0:
            break
        assert code == -signal.SIGKILL
        done = any(volume.endswith(".json") for volume in stored)
        assert listed == done, "an image is there when its manifest is, which is written last"
        if done:
            killed_when_done = at
            assert len(stored) == 2
            puller.shell.run("image", "delete", puller.name, "--yes")
    assert at - 1 == killed_when_done > 2 and listed and len(puller.web.of("/img.qcow2")) == 1
    assert puller.pulls() == {}


def test_the_download_of_a_pull_killed_at_its_very_end_goes_with_the_next(puller: Puller) -> None:
    puller.run("pull", puller.name)
    puller.partial.write_bytes(puller.data)
    puller.run("pull", puller.name)
    assert puller.pulls() == {}


def test_a_file_that_changed_between_two_parts_is_pulled_anew(puller: Puller) -> None:
    puller.web.pages["/img.qcow2"].stop_after = [100_000]
    puller.refused(10, puller.name, "--tries", "1")
    assert puller.pulls()[f"pulls/{puller.name}.partial"] == 100_000
    puller.data += bytes(512)
    puller.__post_init__()
    puller.web.pages["/img.qcow2"].etag = '"2"'
    assert "another one now" in puller.run("pull", puller.name).stderr
    assert puller.shell.json("image", "show", puller.name)["checksum"] == f"sha512:{puller.sha512()}"


@pytest.mark.parametrize("words", [(), ("--no-verify",)], ids=["checked", "unchecked"])
def test_two_pulls_at_once_download_once(puller: Puller, words: tuple[str, ...]) -> None:
    puller.web.pages["/img.qcow2"].stop_after = [100_000]
    puller.web.pages["/img.qcow2"].hangs = True
    first = puller.start("pull", puller.name, *words)
    wait_until(lambda: puller.partial.exists(), what="the first pull's file", timeout_s=60)
    second = puller.start("pull", puller.name, *words)
    assert second.stderr is not None
    assert f"another vmctl is pulling {puller.name}: waiting for it" in second.stderr.readline()
    puller.web.release.set()
    first_said, second_said = first.communicate(timeout=60), second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), (first_said, second_said)
    assert "in the store already" in second_said[1] and first_said[0] == second_said[0]
    assert sum(one.sent for one in puller.web.of("/img.qcow2")) == len(puller.data)


def test_no_checksum_no_use_unless_it_is_typed(puller: Puller) -> None:
    url = f"{puller.web.url}/img.qcow2"
    assert "there is no checksum to check it against" in puller.refused(2, url, "--name", puller.name)
    assert puller.web.requests == []
    assert "either --checksum or --no-verify" in puller.refused(
        2, url, "--no-verify", "--checksum", "sha256:" + "0" * 64
    )
    done = puller.run("pull", url, "--name", puller.name, "--no-verify")
    assert "without having been checked" in done.stderr
    manifest = puller.shell.json("image", "show", puller.name)
    assert manifest["verified"] is False and manifest["checksum"] == ""
    assert "NOT VERIFIED" in puller.shell.run("image", "show", puller.name).stdout
    assert f"{puller.name} " in next(
        line for line in puller.shell.run("image", "list").stdout.splitlines() if line.endswith("NOT VERIFIED")
    )
    # The same bytes, checked now, do not make it forget.
    again = puller.run("pull", url, "--name", puller.name, "--checksum", f"sha512:{puller.sha512()}")
    assert "once taken unchecked" in again.stderr
    assert "NOT VERIFIED" in puller.shell.run("image", "show", puller.name).stdout


def test_what_the_user_knows_of_an_image_at_a_url(puller: Puller) -> None:
    words = [f"{puller.web.url}/img.qcow2", "--no-verify", "--name", puller.name]
    assert "--boots takes bios, uefi" in puller.refused(2, *words, "--boots", "floppy")
    assert puller.web.requests == []
    puller.run("pull", *words, "--os", "debian", "--os-version", "99", "--user", "me", "--boots", "bios,uefi-secure")
    manifest = puller.shell.json("image", "show", puller.name)
    assert (manifest["os"], manifest["os_version"], manifest["default_user"]) == ("debian", "99", "me")
    assert manifest["default_user_by"] == "told"
    create = ["create", f"{puller.name}-vm", "--image", puller.name, "--print-xml", "--firmware"]
    assert '<loader secure="yes"/>' in puller.shell.run(*create, "uefi-secure").stdout
    assert "does not boot by uefi;" in puller.shell.run(*create, "uefi", check=2).stderr
    digest = f"sha256:{hashlib.sha256(puller.data).hexdigest()}"
    puller.run("pull", words[0], "--checksum", digest, "--name", f"{puller.name}b")
    puller.run("pull", words[0], "--checksum", digest, "--name", f"{puller.name}b", "--user", "you")
    manifest = puller.shell.json("image", "show", f"{puller.name}b")
    assert (manifest["default_user"], manifest["default_user_by"]) == ("you", "told")
    puller.shell.run("image", "delete", f"{puller.name}b", "--yes")


def test_whom_an_image_at_a_url_lets_in_is_guessed_by_its_name_and_said(puller: Puller) -> None:
    digest = f"sha256:{hashlib.sha256(puller.data).hexdigest()}"
    words = ["--checksum", digest, "--name", puller.name]
    puller.web.pages["/Rocky-9-Base.qcow2"] = puller.web.pages["/img.qcow2"]
    said = puller.run("pull", f"{puller.web.url}/img.qcow2", *words).stderr
    assert f"note: {puller.name} is assumed to let in root: nothing tells (another one: --user NAME)" in said
    assert "root (assumed: nothing tells)" in puller.run("show", puller.name).stdout
    puller.shell.run("image", "delete", puller.name, "--yes")
    said = puller.run("pull", f"{puller.web.url}/Rocky-9-Base.qcow2?x=1", *words).stderr
    assert f"note: {puller.name} is assumed to let in rocky: by the name Rocky-9-Base.qcow2" in said
    assert "rocky (a guess by its file's name)" in puller.run("show", puller.name).stdout
    manifest = puller.shell.json("image", "show", puller.name)
    assert (manifest["default_user"], manifest["default_user_by"]) == ("rocky", "name")
    puller.shell.run("image", "delete", puller.name, "--yes")
    said = puller.run("pull", puller.name).stderr
    assert "let" not in said and puller.shell.json("image", "show", puller.name)["default_user_by"] == "catalogue"


def test_a_url_with_each_form_of_checksum(puller: Puller) -> None:
    sha256 = hashlib.sha256(puller.data).hexdigest()
    puller.web.pages["/CHECKSUM"] = Page(f"SHA256 (img.qcow2) = {sha256}\n".encode())
    url = f"{puller.web.url}/img.qcow2"
    puller.run("pull", url, "--name", puller.name, "--checksum", f"{puller.web.url}/CHECKSUM")
    assert puller.shell.json("image", "show", puller.name)["checksum"] == f"sha256:{sha256}"
    again = puller.run("pull", url, "--name", puller.name, "--checksum", f"sha256:{sha256.upper()}")
    assert "in the store already" in again.stderr and len(puller.web.of("/img.qcow2")) == 1
    wrong = puller.run("pull", url, "--name", puller.name, "--checksum", "sha256:12", check=2).stderr
    assert "cannot read checksum 'sha256:12'" in wrong


def test_names_and_urls_that_cannot_be(puller: Puller) -> None:
    assert "cannot find image no-such-image" in puller.refused(4, "no-such-image")
    assert "it is built, not pulled: vmctl image build micro" in puller.refused(4, "micro")
    assert "cannot call an image 'A/B'" in puller.refused(2, puller.name, "--name", "A/B")
    assert "it is no http or https URL" in puller.refused(2, "file:///etc/passwd")
    assert puller.web.requests == [] and puller.pulls() == {}


def test_a_backing_file_is_refused(puller: Puller, tmp_path: Path) -> None:
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", str(tmp_path / "evil")]
    subprocess.run(words, check=True, timeout=60)
    puller.data = (tmp_path / "evil").read_bytes()
    puller.__post_init__()
    said = puller.refused(10, puller.name)
    assert f"cannot import {puller.web.url}/img.qcow2: it has a backing file" in said and puller.pulls() == {}


def test_what_is_no_image_is_not_kept_for_the_next_pull(puller: Puller) -> None:
    """Unchecked, and whole as far as the server told: it would be tried again and again, and never asked for."""
    url, good = f"{puller.web.url}/img.qcow2", puller.web.pages["/img.qcow2"]
    puller.web.pages["/img.qcow2"] = Page(b"<html>log in first</html>")
    said = puller.refused(10, url, "--no-verify", "--name", puller.name)
    assert f"cannot import {url}: it is no disk image" in said and "--format" not in said and puller.pulls() == {}
    puller.web.pages["/img.qcow2"] = good
    puller.run("pull", url, "--no-verify", "--name", puller.name)


def test_what_came_is_kept_where_there_is_no_room_for_the_image(puller: Puller) -> None:
    store = "/var/lib/libvirt/vmctl/vmctl-images"
    script = f'mount -t tmpfs -o size=66m tmpfs {store} && "$@"'
    pull = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-m", "vmctl", "image", "pull", puller.name]
    done = subprocess.run(pull, capture_output=True, text=True, cwd=REPO, env=puller.env, timeout=120, check=False)
    assert done.returncode == 10 and "hint: make room" in done.stderr, done.stderr
    puller.run("pull", puller.name)
    assert len(puller.web.of("/img.qcow2")) == 1


@pytest.mark.parametrize("told", [True, False], ids=["a length too large", "no length"])
def test_a_full_disk_is_one_clear_error_and_leaves_some_of_it_free(puller: Puller, told: bool) -> None:
    puller.web.pages["/img.qcow2"].chunked = not told
    script = (
        'mkdir -p "$XDG_CACHE_HOME" && mount -t tmpfs -o size=2m tmpfs "$XDG_CACHE_HOME" && "$@"; first=$?;'
        ' echo "LEFT $(ls "$XDG_CACHE_HOME/vmctl/pulls" | tr "\\n" " ")" >&2;'
        ' mount -o remount,size=100m "$XDG_CACHE_HOME" && "$@"; echo "ENDED $first $?" >&2'
    )
    said = puller.in_mounts(script)
    assert "ENDED 10 0" in said and said.count("cannot ") == 1 and "Traceback" not in said, said
    assert "LEFT \n" in said and "stay free" in said and "hint: make room there, or set XDG_CACHE_HOME" in said
    assert (f"it needs {len(puller.data)} bytes and" in said) == told, said
    assert len(puller.stored()) == 2


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "until it closes"])
def test_a_body_without_end_does_not_fill_the_disk(puller: Puller, chunked: bool) -> None:
    puller.web.pages["/img.qcow2"] = Page(b"\xeb\x63" + bytes(508) + b"\x55\xaa", chunked=chunked, endless=1 << 32)
    script = (
        'mkdir -p "$XDG_CACHE_HOME" && mount -t tmpfs -o size=64m tmpfs "$XDG_CACHE_HOME" && "$@"; first=$?;'
        ' echo "LEFT $(ls "$XDG_CACHE_HOME/vmctl/pulls" | tr "\\n" " ")" >&2; "$@" --max-size 16M;'
        ' echo "ENDED $first $?" >&2'
    )
    said = puller.in_mounts(script)
    assert "ENDED 10 10" in said and "LEFT \n" in said and said.count("cannot ") == 2, said
    assert "it tells no length and goes on after" in said and f"of which {(64 << 20) // 20} stay free" in said
    assert "above the limit of 16777216" in said and puller.stored() == set()


def test_the_catalogue_says_how_large_an_image_may_be(puller: Puller) -> None:
    entry = ENTRY.format(name=puller.name, url=puller.web.url)
    puller.catalogue(f'{entry}max_size = "1M"\n')
    said = puller.refused(10, puller.name)
    assert f"it is {len(puller.data)} bytes, above the limit of 1048576" in said and "--max-size" in said
    assert puller.pulls() == {}
    puller.catalogue(f'{entry}max_size = "lots"\n')
    assert "max_size" in puller.refused(2, puller.name)
    puller.catalogue(f'{entry}max_size = "1M"\n')
    assert "cannot read size 'much'" in puller.refused(2, puller.name, "--max-size", "much")
    puller.run("pull", puller.name, "--max-size", "8M")


def test_search_shows_what_the_store_has(puller: Puller) -> None:
    found = puller.run("search", f"{puller.name}-al", "-o", "json").stdout
    assert f'"name": "{puller.name}"' in found and '"in_store": false' in found
    puller.run("pull", puller.name)
    row = puller.run("search", puller.name).stdout.splitlines()[1]
    assert row.split()[:3] == [puller.name, "debian", "99"] and " yes " in row
    assert puller.run("search", "debian-12", "-o", "name").stdout == "debian-12\n"
    assert "debian-12" in puller.run("search", "-o", "yaml").stdout
    own = ENTRY.format(name=puller.name, url=f"{puller.web.url}/elsewhere")
    puller.catalogue(own)
    row = puller.run("search", puller.name).stdout.splitlines()[1]
    assert " no " in row, "one of that name that came from elsewhere is not the catalogue's"


def test_search_needs_no_host(puller: Puller) -> None:
    env = puller.env | {"VMCTL_CONNECT": "qemu+unix:///system?socket=/nonexistent"}
    found = puller.shell.run("image", "search", "bookworm", env=env).stdout.splitlines()
    assert len(found) == 2 and found[1].split()[0] == "debian-12" and " ? " in found[1]


def test_a_broken_catalogue_is_one_clear_error(puller: Puller) -> None:
    path = puller.catalogue("[[image]]\nname = 3\n")
    said = puller.run("search", check=2).stderr
    assert f"cannot use catalogue {path}" in said and "3 is not of type 'string'" in said
    assert f"cannot use catalogue {path}" in puller.refused(2, "debian")


def test_a_cache_that_cannot_be_written_is_one_clear_error(puller: Puller) -> None:
    puller.env["XDG_CACHE_HOME"] = "/proc/nowhere"
    assert os.geteuid() == 0  # even root cannot write there
    assert "cannot keep downloads in /proc/nowhere/vmctl/pulls" in puller.refused(10, puller.name)
