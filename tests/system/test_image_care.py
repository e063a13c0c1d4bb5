"""Care of the store: tags, damage that is found, and a prune that takes nothing anybody needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.conftest import REPO, Shell, environment, volumes

pytestmark = pytest.mark.system

STORE = Path("/var/lib/libvirt/vmctl/vmctl-images")
DISKS = Path("/var/lib/libvirt/vmctl/vmctl")


@pytest.fixture
def stored(shell: Shell, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """A function that imports one more image called ``kept``; all of them are gone afterwards."""

    def new() -> str:
        raw = tmp_path / "kept.raw"
        raw.write_bytes(os.urandom(510) + b"\x55\xaa" + os.urandom(1 << 20))
        return shell.run("image", "import", str(raw)).stdout.strip()

    yield new
    for manifest in shell.json("image", "list"):
        if manifest["name"] == "kept":
            shell.run("image", "delete", f"kept-{manifest['digest'][:12]}", "--yes")


def overlay(path: Path, base: Path) -> Path:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(path)], check=True, timeout=60
    )
    return path


def kept(shell: Shell) -> set[str]:
    """Which images of that name a prune would leave."""
    would = set(shell.json("image", "prune", "--dry-run")["images"])
    return {f"kept-{m['digest'][:12]}" for m in shell.json("image", "list") if m["name"] == "kept"} - would


def test_a_tag_is_one_more_name_and_moves(shell: Shell, stored: Callable[[], str], name: str) -> None:
    one, two = stored(), stored()
    assert shell.run("image", "tag", one, "stable").stdout.strip() == one
    assert shell.run("image", "show", "stable", "-o", "name").stdout.strip() == one
    shell.run("create", name, "--image", "stable", "--no-start")
    shell.run("delete", name, "--yes")
    shell.run("image", "tag", two, "stable")
    assert shell.run("image", "show", "stable", "-o", "name").stdout.strip() == two
    assert [m["tags"] for m in shell.json("image", "list") if m["name"] == "kept"].count(["stable"]) == 1
    table = [line.split() for line in shell.run("image", "list").stdout.splitlines()]
    assert table[0][:3] == ["NAME", "DIGEST", "TAGS"] and ["kept", two[-12:], "stable"] in [row[:3] for row in table]
    assert shell.run("image", "verify", "stable").stdout.strip() == two
    shell.run("image", "tag", one, "stable", "--remove", check=4)
    shell.run("image", "tag", two, "stable", "--remove")
    shell.run("image", "show", "stable", check=4)
    shell.run("image", "tag", one, "micro", check=5)
    shell.run("image", "tag", one, "Bad Tag", check=2)
    shell.run("image", "tag", one, "like-0123456789ab", check=2)


def test_an_image_that_another_host_put_into_the_store_is_seen(
    shell: Shell, stored: Callable[[], str], tmp_path: Path
) -> None:
    """It is the newest of its name, and libvirt does not know of it."""
    one, two = stored(), stored()
    files = [*STORE.glob(f"{two}.*")]
    for path in files:
        shutil.move(path, tmp_path)
    shell.virsh("pool-refresh", "vmctl-images")
    assert shell.run("image", "show", "kept", "-o", "name").stdout.strip() == one
    for path in files:
        shutil.move(tmp_path / path.name, path)
    assert shell.run("image", "show", "kept", "-o", "name").stdout.strip() == two


def test_an_image_that_takes_the_name_of_a_tag_says_so(shell: Shell, stored: Callable[[], str], tmp_path: Path) -> None:
    tagged = stored()
    shell.run("image", "tag", tagged, "later")
    raw = tmp_path / "later.raw"
    raw.write_bytes(os.urandom(510) + b"\x55\xaa" + os.urandom(1 << 16))
    done = shell.run("image", "import", str(raw))
    assert f"later means this image from now on, and no longer {tagged}" in done.stderr
    assert shell.run("image", "show", "later", "-o", "name").stdout == done.stdout
    shell.run("image", "delete", "later", "--yes")
    assert shell.run("image", "show", "later", "-o", "name").stdout.strip() == tagged


def test_an_image_from_elsewhere_that_takes_a_name_says_so(
    shell: Shell, stored: Callable[[], str], tmp_path: Path
) -> None:
    first = stored()
    raw = tmp_path / "other.raw"
    raw.write_bytes(os.urandom(510) + b"\x55\xaa" + os.urandom(1 << 16))
    told = f"kept means this image from now on, and no longer {first}, which came from elsewhere and stays until it is"
    would = shell.run("image", "import", str(raw), "--name", "kept", "--dry-run").stdout
    assert "other.raw, raw of 64.5 KiB" in would and f"until pruned, these stay: {first}" in would
    assert [m["name"] for m in shell.json("image", "list")].count("kept") == 1
    other = shell.run("image", "import", str(raw), "--name", "kept")
    assert told in other.stderr and "raw, 64.5 KiB" in other.stderr
    assert told not in shell.run("image", "import", str(raw), "--name", "kept").stderr
    assert shell.run("image", "show", first, "-o", "name").stdout.strip() == first
    # The first file again, with what it held; and with more, which is its next version.
    again = shell.run("image", "import", str(tmp_path / "kept.raw"))
    assert again.stdout.strip() == first and f"no longer {other.stdout.strip()}, which came" in again.stderr
    assert "from now on" not in shell.run("image", "import", str(tmp_path / "kept.raw")).stderr
    with (tmp_path / "kept.raw").open("ab") as file:
        file.write(os.urandom(1 << 16))
    later = shell.run("image", "import", str(tmp_path / "kept.raw"))
    assert later.stdout.strip() != first and "from now on" not in later.stderr


def test_a_single_bit_is_found(shell: Shell, name: str, stored: Callable[[], str]) -> None:
    stem = stored()
    shell.run("image", "verify", stem, "micro")
    assert {m["name"] for m in shell.json("image", "verify")} >= {"kept", "micro"}
    file = STORE / f"{stem}.qcow2"
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) * 2 // 3] ^= 4
    file.write_bytes(damaged)
    done = shell.run("image", "verify", stem, "micro", check=10)
    assert f"{stem}.qcow2 is not what it was" in done.stderr and "micro-" not in done.stderr.splitlines()[-2]
    file.write_bytes(whole)
    shell.run("image", "verify", stem)
    text = (STORE / f"{stem}.json").read_bytes()
    (STORE / f"{stem}.json").write_bytes(text.replace(b'"cmdline": ""', b'"cmdline": "init=/bin/sh"'))
    assert f"{stem}.json is not what it was" in shell.run("image", "verify", stem, check=10).stderr
    (STORE / f"{stem}.json").write_bytes(text)
    file.unlink()
    lost = shell.run("create", name, "--image", stem, check=10).stderr
    assert f"cannot create VM {name}: image {stem} has lost its disk\nhint: `vmctl image verify {stem}`" in lost
    assert f"{name}-" not in shell.virsh("vol-list", "vmctl") and name not in shell.run("list").stdout
    assert f"{stem}.qcow2 is missing" in shell.run("image", "verify", stem, check=10).stderr
    shell.run("image", "verify", "none", check=4)


def test_a_dry_run_of_a_delete_names_the_files(shell: Shell, stored: Callable[[], str]) -> None:
    one = stored()
    told = shell.run("image", "delete", one, "--dry-run").stdout.splitlines()
    assert set(told) == {f"would delete {path}" for path in STORE.iterdir() if path.name.startswith(f"{one}.")}
    assert len(told) == 2 and shell.run("image", "show", one)


def test_prune_takes_the_old_ones_and_says_what(shell: Shell, stored: Callable[[], str]) -> None:
    one, two, three = stored(), stored(), stored()
    before = volumes(shell, "vmctl-images")
    assert shell.json("image", "prune", "--dry-run", "--keep", "2")["images"] == [one]
    shell.run("image", "prune", check=2)
    shell.run("image", "tag", one, "first")
    assert volumes(shell, "vmctl-images") == before
    done = shell.run("image", "prune", "--yes")
    assert two in done.stdout and one not in done.stdout and "freed 1." in done.stdout
    assert before - volumes(shell, "vmctl-images") == {f"{two}.qcow2", f"{two}.json"}
    shell.run("image", "tag", one, "first", "--remove")
    assert kept(shell) == {three}


def test_prune_leaves_what_a_stopped_and_a_saved_vm_need(shell: Shell, stored: Callable[[], str], name: str) -> None:
    one = stored()
    shell.run("create", name, "--image", one, "--no-start", "--memory", "64M")
    two = stored()
    assert kept(shell) == {one, two}
    shell.run("start", name)
    shell.run("save", name)
    assert kept(shell) == {one, two}
    assert name in shell.run("image", "delete", one, check=5).stderr
    shell.run("delete", name, "--yes")
    assert kept(shell) == {two}


def test_prune_follows_overlays_on_overlays(shell: Shell, stored: Callable[[], str], tmp_path: Path) -> None:
    one, two = stored(), stored()
    middle = overlay(tmp_path / "middle.qcow2", STORE / f"{one}.qcow2")
    top = overlay(DISKS / "prune-top.qcow2", middle)
    try:
        assert kept(shell) == {one, two}
        assert "prune-top.qcow2" in shell.run("image", "delete", one, "--yes", check=5).stderr
        shell.run("image", "prune", "--yes")
        assert (STORE / f"{one}.qcow2").exists()
    finally:
        top.unlink()
        shell.virsh("pool-refresh", "vmctl")
    assert kept(shell) == {two}


def test_prune_looks_at_disks_outside_pools_and_pools_that_do_not_run(
    shell: Shell, stored: Callable[[], str], name: str, tmp_path: Path
) -> None:
    one, two = stored(), stored()
    (tmp_path / "pool").mkdir()
    loose = overlay(tmp_path / "loose.qcow2", overlay(tmp_path / "middle.qcow2", STORE / f"{one}.qcow2"))
    assert kept(shell) == {two}, "nobody uses the overlay"
    shell.run("create", name, "--image", "micro", "--no-start")
    # By virsh: vmctl gives no VM a file whose backing file is in no pool.
    shell.virsh("attach-disk", name, str(loose), "vdz", "--subdriver", "qcow2", "--config")
    assert kept(shell) == {one, two}
    shell.run("delete", name, "--yes")
    assert kept(shell) == {two}
    overlay(tmp_path / "pool/asleep.qcow2", STORE / f"{one}.qcow2")
    shell.virsh("pool-define-as", "asleep", "dir", "--target", str(tmp_path / "pool"))
    try:
        assert kept(shell) == {one, two}
    finally:
        shell.virsh("pool-undefine", "asleep")


def test_prune_takes_left_over_files_too(shell: Shell, stored: Callable[[], str]) -> None:
    stored()
    left = STORE / "killed-0123456789ab.qcow2"
    left.write_bytes(bytes(4096))
    assert left.stem + ".qcow2" in shell.json("image", "prune", "--dry-run")["leftovers"] and left.exists()
    shell.run("image", "prune", "--yes")
    assert not left.exists()


def test_prune_takes_old_downloads_but_none_that_a_pull_works_on(shell: Shell, tmp_path: Path) -> None:
    cache, runtime = tmp_path / "cache", tmp_path / "run"
    env = environment(XDG_CACHE_HOME=str(cache), XDG_RUNTIME_DIR=str(runtime))
    pulls = cache / "vmctl/pulls"
    pulls.mkdir(parents=True)
    runtime.mkdir(mode=0o700)
    for name, days in (("old", 8), ("busy", 8), ("fresh", 6)):
        for path in (pulls / f"{name}.partial", pulls / f"{name}.partial.json"):
            path.write_bytes(bytes(1 << 16))
            os.utime(path, (time.time() - days * 86400,) * 2)
    (pulls / "a user's.partial").touch()
    (pulls / "orphan.partial.json").write_text("{}")
    lock = "import sys\nfrom pathlib import Path\nfrom vmctl.config import folders\nfrom vmctl.locks import held\n"
    lock += "with held(folders().runtime, 'pull busy'):\n    print(flush=True)\n    sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", lock], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO
    ) as pulling:
        assert pulling.stdout and pulling.stdin
        pulling.stdout.readline()
        would = json.loads(shell.run("image", "prune", "--dry-run", "-o", "json", env=env).stdout)
        assert would["downloads"] == ["old"] and would["freed"] >= 2 << 16
        assert "old.partial" in shell.run("image", "prune", "--yes", env=env).stdout
        kept = {"busy.partial", "busy.partial.json", "fresh.partial", "fresh.partial.json"}
        assert {path.name for path in pulls.iterdir()} == {*kept, "a user's.partial", "orphan.partial.json"}
        pulling.stdin.close()
    shell.run("image", "prune", "--yes", env=env)
    assert not (pulls / "busy.partial").exists() and (pulls / "fresh.partial").exists()
    shell.run("image", "prune", "--downloads", "0", "--yes", env=env)
    assert {path.name for path in pulls.iterdir()} == {"a user's.partial"}
