"""A file that somebody's disk is based on stays, whatever the two are called and by whichever path they are named."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.conftest import Shell
from vmctl import disk_xml

pytestmark = pytest.mark.system

FOLDER = Path("/var/lib/libvirt/whose")


@pytest.fixture(params=["plain", "link"])
def pool(shell: Shell, request: pytest.FixtureRequest) -> Iterator[str]:
    """A second pool, named by its folder or by a link to it."""
    link = FOLDER.with_name("whose-link")
    FOLDER.mkdir()
    link.symlink_to(FOLDER)
    shell.run("disk", "pool", "create", "whose", "--path", str(FOLDER if request.param == "plain" else link))
    yield "whose"
    for path in FOLDER.iterdir():
        path.unlink()
    shell.run("disk", "pool", "delete", "whose", "--yes")
    link.unlink()
    FOLDER.rmdir()


def test_what_a_disk_of_the_same_name_is_based_on_stays(shell: Shell, pool: str, name: str) -> None:
    base, top = f"{name}.qcow2", f"{pool}/{name}.qcow2"
    shell.run("disk", "create", base, "4M")
    shell.run("disk", "create", top, "--backing", base)
    shell.run("create", name, "--image", "micro", "--no-start")
    for words in (
        ("delete", base, "--yes"),
        ("convert", base, "--format", "raw"),
        ("attach", name, base),
        ("resize", base, "+1M"),
    ):
        refused = shell.run("disk", *words, check=5).stderr
        assert f"{name}.qcow2 needs it as it is" in refused, refused
    shell.run("disk", "delete", top, "--yes")
    shell.run("disk", "delete", base, "--yes")


def test_what_is_a_vms_own_stays_while_a_disk_is_based_on_it(shell: Shell, pool: str, name: str) -> None:
    shell.run("create", name, "--image", "micro", "--no-start")
    shell.run("disk", "attach", name, "4M", "--serial", "own")
    shell.run("disk", "move", f"{name}:own", "--pool", pool)
    (own,) = [d.source for d in disk_xml.read(shell.virsh("dumpxml", name)) if d.serial == "own"]
    top = Path("/var/lib/libvirt/vmctl/vmctl") / Path(own).name
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", own, str(top)], check=True)
    told = shell.run("delete", name, "--yes").stderr
    assert f"kept volume {Path(own).name}: another VM uses it, or a disk is based on it" in told
    assert Path(own).exists()
    shell.run("disk", "delete", f"vmctl/{top.name}", "--yes")
