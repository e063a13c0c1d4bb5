"""Recipes of a user's own: what is wrong with them is told at once, and a digest says what a step's result is."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmctl import layers
from vmctl.errors import SpecError

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
