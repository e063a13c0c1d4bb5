"""Images of a user's own, built in real guests; what did not change is not built again."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.system.conftest import Shell

pytestmark = [pytest.mark.system, pytest.mark.timeout(1500)]

RECIPE = """
[image]
name = "t-web"
base = "micro"
memory = "256M"
[[step]]
name = "files"
files = [{ from = "site", to = "/srv/site", mode = "0750" }]
run = ["echo built > /srv/how; mkdir /srv/theirs; touch /srv/theirs/old; chown -R 7:7 /srv/theirs"]
[[step]]
name = "last"
files = [{ from = "site", to = "/srv/site" }, { from = "one", to = "/srv/theirs/", mode = "0640" }]
run = ["%s"]
"""


def stems(shell: Shell) -> set[str]:
    """The images of the recipe, and of its steps."""
    return {f"{m['name']}-{m['digest'][:12]}" for m in shell.json("image", "list") if m["name"].startswith("t-web")}


def test_only_what_changed_is_built_again(shell: Shell, name: str, tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/a b").write_text("content")
    (tmp_path / "one").write_text("one")
    path.write_text(RECIPE % "echo one > /srv/last")
    try:
        first = shell.run("image", "build", str(path)).stderr
        assert "step 1 of 2: files" in first and "step 2 of 2: last" in first
        assert "2 of 2 steps are as they were" in shell.run("image", "build", str(path)).stderr
        path.write_text(RECIPE % "echo two > /srv/last")
        there = shell.json("image", "list")
        would = shell.run("image", "build", str(path), "--dry-run").stdout
        assert "1 of 2 steps being as they were" in would and "for step 2, last; delete it" in would
        assert "would put image t-web-… into pool vmctl-images; until pruned, these stay: t-web-" in would
        assert shell.json("image", "list") == there
        changed = shell.run("image", "build", str(path)).stderr
        assert "1 of 2 steps are as they were" in changed and "step 1 of 2" not in changed
        path.write_text(RECIPE % "echo no such luck; exit 3")
        failed = shell.run("image", "build", str(path), check=9)
        assert "exit code 3" in failed.stderr and "no such luck" in failed.stderr
        assert not [vm for vm in shell.json("list") if vm["name"].startswith("build-")]

        shell.run("create", name, "--image", "t-web", "--wait", "ssh")
        look = "cat '/srv/site/a b' /srv/how /srv/last; stat -c '%u' /srv/theirs /srv/theirs/old; "
        look += "stat -c '%a %u' /srv/theirs/one; ls /srv/site; cat /etc/machine-id; hostname"
        lines = shell.run("exec", name, "--", "sh", "-c", look).stdout.splitlines()
        assert lines[0] == "contentbuilt" and lines[1] == "two"
        # A folder that was there keeps its owner, and one that is put again is not put into itself.
        assert lines[2:6] == ["7", "7", "640 0", "a b"] and lines[7] == name
        shell.run("image", "verify", "t-web")
    finally:
        shell.run("delete", name, "--yes", "--missing-ok")
        for image in shell.json("image", "list"):
            if image["name"].startswith("t-web"):
                shell.run("image", "delete", f"{image['name']}-{image['digest'][:12]}", "--yes")


def test_prune_takes_steps_that_led_nowhere_and_leaves_the_others(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    (tmp_path / "site").mkdir()
    (tmp_path / "one").write_text("one")

    def build(word: str) -> str:
        (tmp_path / "site/word").write_text(word)
        path.write_text(RECIPE % "echo last > /srv/last")
        return shell.run("image", "build", str(path)).stdout.strip()

    try:
        live = build("one")
        of_live = stems(shell) - {live}
        other = build("two")
        of_other = stems(shell) - {live, other} - of_live
        assert len(of_live) == len(of_other) == 1
        assert build("one") == live, "nothing was built, and the plain name means the first again"
        assert shell.run("image", "show", "t-web", "-o", "name").stdout.strip() == live
        assert "a step of t-web" in shell.run("image", "list").stdout
        would = set(shell.json("image", "prune", "--dry-run")["images"])
        assert would & stems(shell) == {other, *of_other}
        shell.run("image", "prune", "--yes")
        assert stems(shell) == {live, *of_live}
        shell.run("image", "delete", live, "--yes")
        assert stems(shell) == of_live
        # The base is as it was, so that the step is gone on from, until a day is over.
        shell.run("image", "prune", "--yes")
        assert stems(shell) == of_live and "1 of 2 steps" in shell.run("image", "build", str(path)).stderr
    finally:
        for stem in stems(shell):
            shell.run("image", "delete", stem, "--yes")


APT = """
[image]
name = "t-web-apt"
base = "debian-12"
[[step]]
name = "where from"
files = [{ from = "repo", to = "/srv/repo" }]
run = ["rm -f /etc/apt/sources.list.d/*; echo 'deb [trusted=yes] file:/srv/repo ./' > /etc/apt/sources.list"]
[[step]]
name = "what"
packages = ["vmctl-hello"]
"""


def test_packages_come_by_the_guests_own_package_manager(shell: Shell, debian_image: None, tmp_path: Path) -> None:
    about = "Package: vmctl-hello\nVersion: 1.5-2\nArchitecture: all\nMaintainer: nobody <n@example.org>\n"
    control, repo = tmp_path / "tree/DEBIAN/control", tmp_path / "repo"
    control.parent.mkdir(parents=True)
    control.write_text(f"{about}Description: a test\n")
    repo.mkdir()
    deb = repo / "vmctl-hello.deb"
    words = ["dpkg-deb", "--root-owner-group", "-b", str(tmp_path / "tree"), str(deb)]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    sums = (
        f"Filename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {hashlib.sha256(deb.read_bytes()).hexdigest()}\n"
    )
    (repo / "Packages").write_text(f"{about}{sums}Description: a test\n")
    (tmp_path / "apt.toml").write_text(APT)
    try:
        shell.run("image", "build", str(tmp_path / "apt.toml"), timeout=1400)
        software = shell.json("image", "show", "t-web-apt")["software"]
        assert software["vmctl-hello"] == "1.5-2" and len(software) > 100
        assert "vmctl-hello" not in shell.json("image", "show", "debian-12")["software"]
    finally:
        for stem in stems(shell):
            shell.run("image", "delete", stem, "--yes")
