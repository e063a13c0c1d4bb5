"""Recipes of a user's own: what is wrong with them is told at once, and a digest says what a step's result is."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vmctl import image_care, image_layers, layers
from vmctl.errors import SpecError
from vmctl.manifest import Manifest

GOOD = """
[image]
name = "web"
base = "micro"
[[step]]
name = "files"
files = [{ from = "site", to = "/etc/site", mode = "0600" }]
[[step]]
run = ["echo two"]
"""


def recipe(folder: Path, text: str = GOOD) -> Path:
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site/a").write_text("a")
    path = folder / "web.toml"
    path.write_text(text)
    return path


def test_a_digest_changes_with_all_that_led_to_a_step_and_with_nothing_else(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    first = layers.keys(layers.load(path), "b" * 64)
    assert layers.keys(layers.load(path), "b" * 64) == first and len(set(first)) == 2
    assert all(a != b for a, b in zip(first, layers.keys(layers.load(path), "c" * 64), strict=True))
    recipe(tmp_path, GOOD.replace("echo two", "echo 2"))
    other = layers.keys(layers.load(path), "b" * 64)
    assert other[0] == first[0] and other[1] != first[1]
    (tmp_path / "site/a").write_text("b")
    assert layers.keys(layers.load(path), "b" * 64)[0] != first[0]


def test_work_begins_after_the_last_result_that_is_there() -> None:
    assert layers.first_missing(["a", "b", "c"], frozenset()) == 0
    assert layers.first_missing(["a", "b", "c"], frozenset({"a"})) == 1
    assert layers.first_missing(["a", "b", "c"], frozenset({"b", "x"})) == 2


def test_all_problems_of_a_recipe_are_told_at_once(tmp_path: Path) -> None:
    bad = """
    [image]
    name = "Web!"
    base = "micro"
    memory = "lots"
    [extra]
    [[step]]
    packages = ["-rf", "ok"]
    files = [{ from = "nope", to = "../x", mode = "9" }]
    [[step]]
    frobnicate = 1
    """
    with pytest.raises(SpecError) as caught:
        layers.load(recipe(tmp_path, bad))
    said = " ".join(caught.value.problems)
    for word in ("'Web!'", "'lots'", "'extra'", "'-rf'", "no file", "'../x'", "'9'", "'frobnicate'", "does nothing"):
        assert word in said, word
    with pytest.raises(SpecError, match="cannot read recipe"):
        layers.load(recipe(tmp_path, "["))


NOW = datetime(2026, 1, 9, 12, tzinfo=UTC)


def stored(name: str, keys: str, hours_ago: float, step_of: str = "", tags: tuple[str, ...] = ()) -> Manifest:
    """An image by the steps of these keys, a letter each."""
    built = (NOW - timedelta(hours=hours_ago)).isoformat(timespec="microseconds")
    return Manifest(
        name, f"{name}-{keys}", "qcow2", "debian", "12", "x86_64", "root", 1, 1, "", "", "", "", {}, "", built,
        tags=tags, layer=keys[-1:], built_on=tuple(keys[:-1]), step_of=step_of,
    )  # fmt: skip


def pruned(*known: Manifest, keep: int = 1) -> set[str]:
    order = sorted(sorted(known, key=lambda m: m.built, reverse=True), key=lambda m: m.name)
    old = image_care.outdated(order, keep)
    rest = [m for m in order if m not in old]
    return {m.digest for m in (*old, *image_care.idle_steps(rest, NOW))}


def test_a_step_stays_while_an_image_is_there_that_it_led_to() -> None:
    first, second = stored("web.step1", "a", 50, "web"), stored("web.step2", "ab", 49, "web")
    web = stored("web", "abc", 48)
    assert pruned(first, second, web) == set()
    # The recipe was changed and changed back: the newer steps are the ones that led nowhere.
    tried, other = stored("web.step1", "x", 40, "web"), stored("web", "xyz", 39)
    again = stored("web", "abc", 38)
    assert pruned(first, second, again, tried, other) == {"web.step1-x", "web-xyz"}
    assert pruned(first, second, again, tried, other, keep=2) == set()
    # The image was deleted, and nothing else came of its steps; one was tagged.
    assert pruned(first, second) == {"web.step1-a", "web.step2-ab"}
    assert pruned(stored("web.step1", "a", 50, "web", ("mine",)), second) == {"web.step2-ab"}
    # Another recipe begins in the same way.
    assert pruned(first, second, stored("shop", "aq", 10)) == {"web.step2-ab"}


def test_the_steps_of_a_build_that_was_cut_off_stay_for_a_day() -> None:
    web, one, two = stored("web", "abc", 30), stored("web.step1", "x", 2, "web"), stored("web.step2", "xy", 1, "web")
    assert pruned(web, one, two) == set()
    assert pruned(web, stored("web.step1", "x", 26, "web"), stored("web.step2", "xy", 25, "web")) == {
        "web.step1-x",
        "web.step2-xy",
    }


def test_an_older_image_of_fewer_steps_is_a_step_too() -> None:
    assert pruned(stored("web", "a", 9), stored("web", "ab", 8)) == set()
    assert pruned(stored("web", "a", 9), stored("web", "cb", 8)) == {"web-a"}


def test_software_is_told_in_lines_of_two_words() -> None:
    told = "nginx 1.22.1-9\nsudo: unable to resolve host x\nadduser 3.134\n\nlone\n"
    assert image_layers.software(told) == {"adduser": "3.134", "nginx": "1.22.1-9"}


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="no dpkg here")
def test_the_packages_of_a_debian_are_listed() -> None:
    done = subprocess.run(["sh", "-c", image_layers._SOFTWARE], capture_output=True, text=True, timeout=60, check=True)
    found = image_layers.software(done.stdout)
    assert found["dpkg"] and len(found) == len(done.stdout.splitlines())
