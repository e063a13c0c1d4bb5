"""Who needs a file: told by paths, for two files may have one name, and one file two paths."""

from __future__ import annotations

from pathlib import Path

from vmctl.image_users import Needed, chains


def test_a_file_needs_another_of_its_name() -> None:
    needed = Needed(chains({"/b/disk": ["web"], "/a/disk": ["/b/disk"]}, {"/b/disk": "/a/disk"}))
    assert needed.by("/a/disk") == ("disk", "web")
    assert needed.by("/a/disk", but=("web", "/a/disk")) == ("disk",)
    assert needed.by("/a/disk", but=("disk", "/b/disk")) == ("web",)


def test_a_file_is_needed_by_whatever_path_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    real, linked = f"{tmp_path}/folder/disk", f"{tmp_path}/link/disk"
    users = {real: frozenset({"web", f"{tmp_path}/folder/top"})}
    assert Needed(users).by(linked) == ("top", "web")
    assert Needed(users).by(linked, but=("web", f"{tmp_path}/link/top")) == ()
    assert Needed(users, local=False).by(linked) == (), "on another machine it may be no link"
