"""Warmed images: kept, looked at, gone on from, refused where they do not fit, and taken away."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.system.conftest import STORE, Shell, volumes
from tests.system.test_clone import who

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]


def test_a_warmed_image_from_making_to_removal(shell: Shell, names: Callable[[], str]) -> None:
    shell.cold()
    store, before = volumes(shell, "vmctl-images"), volumes(shell)
    one, two = names(), names()
    assert "is not warm" in shell.run("create", one, "--image", "micro", "--warm", check=4).stderr
    said = shell.run("image", "warm", "micro", "--dry-run").stdout
    assert ".memory" in said and volumes(shell, "vmctl-images") == store
    assert "new file" in shell.json("image", "warm", "micro", "--dry-run")["touches"][1]
    for dry in ([], ["--dry-run"]):
        assert "it has none" in shell.run("image", "warm", "micro", "--remove", *dry, check=4).stderr
        assert shell.run("image", "warm", "micro", "--vcpus", "0", *dry, check=2).stderr
    shell.run("image", "warm", "micro", timeout=600)
    assert volumes(shell) == before  # the VM it was made of is gone
    (row,) = [line for line in shell.run("image", "list").stdout.splitlines() if line.startswith("micro ")]
    assert "warm" in row and "512 MiB, 1 vCPU" in shell.run("image", "show", "micro").stdout
    shell.run("image", "verify", "micro")
    plan = shell.run("create", one, "--image", "micro", "--warm", "--dry-run").stdout.splitlines()
    assert plan[0].startswith(f"new running VM {one} (") and volumes(shell) == before
    for name in (one, two):
        made = shell.run("create", name, "--image", "micro", "--warm", "--label", f"is={name}", timeout=240)
        assert made.stdout == f"{name}\n"
    new = {volume for volume in volumes(shell) - before if volume.startswith(f"{one}-")}
    assert {line.split()[2] for line in plan[1:]} == new
    told = [who(shell, name) for name in (one, two)]
    assert [each[:2] for each in told] == [[one, one], [two, two]]
    for which in range(2, 5):
        assert told[0][which] != told[1][which]
    for name in (one, two):  # neither has booted
        assert "vmctl-micro: init" not in shell.run("logs", name).stdout
        # Nor was an sshd begun for it: the state was taken when the one that only waits for its key was there.
        begun = "grep -las dropbear_ed25519_host_ke[y] /proc/[0-9]*/cmdline"
        assert "/proc/" not in shell.run("exec", name, "--", "sh", "-c", begun, check=None).stdout
    assert shell.json("show", one)["labels"] == {"is": one}
    for words in (
        ["image", "delete", "micro", "--yes"],
        ["image", "warm", "micro"],
        ["image", "warm", "micro", "--dry-run"],
        ["image", "warm", "micro", "--remove"],
        ["image", "warm", "micro", "--remove", "--dry-run"],
    ):
        assert one in shell.run(*words, check=5).stderr
    shell.run("delete", one, two, "--yes")
    gone = {
        line.rpartition("/")[2] for line in shell.json("image", "warm", "micro", "--remove", "--dry-run")["touches"]
    }
    assert volumes(shell, "vmctl-images") - store < gone
    shell.run("image", "warm", "micro", "--remove")
    assert (volumes(shell, "vmctl-images"), volumes(shell)) == (store, before)


def test_what_does_not_fit_is_refused_before_anything_is_made(shell: Shell, names: Callable[[], str]) -> None:
    name, before = names(), volumes(shell)
    shell.run("image", "warm", "micro", timeout=600)
    try:
        for options, why in (
            (("--memory", "1G"), "512 MiB of memory, not 1024"),
            (("--vcpus", "2"), "1 vCPUs, not 2"),
            (("--disk", "1G"), "nothing can be asked of it"),
            (("--runcmd", "true"), "nothing can be asked of it"),
        ):
            assert why in shell.run("create", name, "--image", "micro", "--warm", *options, check=8).stderr
        (memory,) = STORE.glob("micro-*.memory")
        data = memory.read_bytes()
        memory.write_bytes(b"LibvirtQemudPart" + data[16:])
        assert "not written to its end" in shell.run("create", name, "--image", "micro", "--warm", check=8).stderr
        assert "is not what it was" in shell.run("image", "verify", "micro", check=10).stderr
        assert volumes(shell) == before
    finally:
        shell.run("image", "warm", "micro", "--remove")
