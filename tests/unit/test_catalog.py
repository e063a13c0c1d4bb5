"""The image catalogue: its schema, its aliases, and users' own."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from vmctl import catalog, manifest
from vmctl.errors import NotFound, SpecError
from vmctl.resources import image_recipes_dir

NOWHERE = Path("/nonexistent")
MINE = """
[[image]]
name = "mine"
os = "debian"
os_version = "12"
architecture = "x86_64"
url = "http://host/mine.qcow2"
checksum = "sha256:{a}"
default_user = "me"
boots = ["bios"]
""".format(a="a" * 64)


def user_catalogue(folder: Path, text: str, name: str = "mine.toml") -> Path:
    """A user's catalogue."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder


def test_vmctls_own_is_valid() -> None:
    assert catalog.check(tomllib.loads((image_recipes_dir() / "catalog.toml").read_text())) == []


def test_schema_and_program_know_the_same() -> None:
    image = catalog.schema()["$defs"]["image"]
    assert set(image["properties"]) == {field.name for field in fields(catalog.Entry)} - {"catalogue"}
    assert catalog.schema()["$defs"]["name"]["pattern"] == f"^{manifest.NAME}$"


def test_what_was_promised_is_in_it() -> None:
    names = {entry.name for entry in catalog.load(NOWHERE).entries}
    assert {"debian-11", "debian-12", "debian-13", "ubuntu-20.04", "ubuntu-22.04", "ubuntu-24.04"} <= names
    assert {"almalinux-8", "almalinux-9", "rocky-8", "rocky-9", "centos-stream-9", "centos-stream-10"} <= names
    assert {"opensuse-leap-15.6", "arch"} <= names and len([n for n in names if n.startswith("fedora-")]) == 2
    assert any(name.startswith("alpine-") for name in names)


def test_every_image_comes_over_https_with_a_checksum_of_its_own() -> None:
    for entry in catalog.load(NOWHERE).entries:
        assert entry.url.startswith("https://") and entry.checksum_url.startswith("https://"), entry.name
        assert entry.osinfo, entry.name


@pytest.mark.parametrize(
    ("alias", "os"), [("debian", "debian"), ("ubuntu-lts", "ubuntu"), ("fedora", "fedora"), ("alpine", "alpine")]
)
def test_an_alias_means_the_newest(alias: str, os: str) -> None:
    found = catalog.load(NOWHERE)
    newest = max((e for e in found.entries if e.os == os), key=lambda e: [int(n) for n in e.os_version.split(".")])
    assert catalog.find(found, alias) == newest


def test_an_unknown_name_is_not_found_with_its_neighbours() -> None:
    with pytest.raises(NotFound) as caught:
        catalog.find(catalog.load(NOWHERE), "debain")
    assert "cannot find image debain" in caught.value.message and "debian" in caught.value.hint


def test_search_looks_at_names_aliases_and_systems() -> None:
    found = catalog.load(NOWHERE)
    assert {e.name for e in catalog.search(found, "BOOKWORM")} == {"debian-12"}
    assert {e.os for e in catalog.search(found, "stream")} == {"centos-stream"}
    assert catalog.search(found, "no-such") == () and catalog.search(found, "") == found.entries


def test_a_users_catalogue_adds_and_overrides(tmp_path: Path) -> None:
    users = user_catalogue(tmp_path / "c", MINE + 'aliases = ["debian"]\n', "10.toml")
    user_catalogue(users, MINE.replace('"me"', '"later"').replace('"mine"', '"debian-12"'), "20.toml")
    found = catalog.load(users)
    assert catalog.find(found, "mine").default_user == "me"
    assert catalog.find(found, "debian").name == "mine"
    assert catalog.find(found, "debian-12").default_user == "later"
    assert catalog.find(found, "debian-12").catalogue == str(users / "20.toml")
    with pytest.raises(NotFound):
        catalog.find(found, "bookworm")  # went with the entry that was replaced


def test_all_problems_of_a_users_catalogue_are_named_at_once(tmp_path: Path) -> None:
    broken = MINE.replace("http://", "ftp://").replace('boots = ["bios"]', 'boots = ["floppy"]\ncolour = "red"')
    second = MINE.replace('"mine"', '"second"').replace("checksum =", "checksum_url =")
    users = user_catalogue(tmp_path / "c", broken + second)
    with pytest.raises(SpecError) as caught:
        catalog.load(users)
    said = "\n".join(caught.value.problems)
    assert str(users / "mine.toml") in caught.value.message and caught.value.exit_code == 2
    for part in ("mine: url", "floppy", "colour", "second: give either checksum", "second: checksum_url"):
        assert part in said, said


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (MINE + MINE, "mine stands for mine and mine"),
        (MINE + MINE.replace('"mine"', '"x"') + 'aliases = ["mine"]\n', "mine stands for mine and x"),
        ("image = 3\n", "image: 3 is not of type 'array'"),
        ("image = [3]\n", "image number 1: 3 is not of type 'object'"),
        ("", "'image' is a required property"),
        ("[[image", "mine.toml: "),
    ],
)
def test_a_catalogue_that_cannot_be_used(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        catalog.load(user_catalogue(tmp_path / "c", text))
    assert problem in caught.value.message and "cannot use catalogue" in caught.value.message
