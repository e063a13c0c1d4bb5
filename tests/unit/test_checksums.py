"""Checksum files, in each form distributions publish them."""

from __future__ import annotations

import pytest

from vmctl import checksums
from vmctl.checksums import Checksum
from vmctl.errors import ImageError, SpecError

A, B, LONG = "a" * 64, "b" * 64, "c" * 128
IMAGE = "https://host/dir/one.qcow2"


def found(text: str, kind: str = "sha256", url: str = "https://host/dir/CHECKSUM") -> str:
    return str(checksums.from_file(text, kind, image_url=IMAGE, url=url))


@pytest.mark.parametrize(
    "text",
    [
        f"{B}  other.qcow2\n{A}  one.qcow2\n",
        f"{B} *other.img\n{A.upper()} *one.qcow2\n",
        f"{A}  ./one.qcow2\n{B}  two",
        f"# one.qcow2: 5 bytes\nSHA256 (one.qcow2) = {A}\nSHA256 (two.qcow2) = {B}\n",
        f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nSHA256 (one.qcow2) = {A}\n-----BEGIN PGP SIGNATURE",
        f"{A}\n",
        f"{A} -",
    ],
    ids=["sha256sum", "binary", "with a folder", "BSD", "signed BSD", "lone", "from a pipe"],
)
def test_each_form_is_read(text: str) -> None:
    assert found(text, url=IMAGE + ".sha256") == f"sha256:{A}"


def test_sha512_is_told_from_sha256_by_its_length() -> None:
    both = f"{A}  one.qcow2\n{LONG}  one.qcow2\n"
    assert found(both, "sha512") == f"sha512:{LONG}" and found(both, "sha256") == f"sha256:{A}"
    assert found(both, "") == f"sha512:{LONG}"


def test_a_file_of_this_image_alone_may_call_it_by_its_dated_name() -> None:
    text = f"{A}  one-20260101.qcow2\n"
    assert found(text, url=IMAGE + ".sha256") == f"sha256:{A}"
    with pytest.raises(ImageError, match="no sha256 for one.qcow2"):
        found(text)


@pytest.mark.parametrize("text", ["", "<html>not here</html>", f"{B}  one.qcow2.torrent\n{A}  x", f"{LONG}  one.qcow2"])
def test_an_image_that_is_not_in_it_is_an_error(text: str) -> None:
    with pytest.raises(ImageError) as caught:
        found(text)
    assert "cannot find the checksum in https://host/dir/CHECKSUM" in caught.value.message


def test_two_values_for_one_image_are_an_error() -> None:
    with pytest.raises(ImageError, match="2 different ones for one.qcow2"):
        found(f"{A}  one.qcow2\n{B}  one.qcow2\n")


@pytest.mark.parametrize("text", ["", "sha256:", "sha256:" + "g" * 64, "md5:" + "a" * 32, "sha512:" + A, A])
def test_a_checksum_given_wrong_is_bad_input(text: str) -> None:
    with pytest.raises(SpecError, match="cannot read checksum"):
        checksums.parse(text)


def test_a_checksum_given_right() -> None:
    assert checksums.parse("SHA256:" + A.upper()) == Checksum("sha256", A)
