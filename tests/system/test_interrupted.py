"""Create and delete, stopped by SIGKILL and SIGINT after every single change they make to the host; and races."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests import warm
from tests.system.conftest import REPO, VMCTL, Shell, environment, reservations, volumes
from vmctl import identity, record
from vmctl.hosts import open_host
from vmctl.hypervisor import domain

pytestmark = pytest.mark.system

CREATE = ("create", "NAME", "--image", "micro", "--disk", "16M", "--autostart")


def interrupted(tmp_path: Path, which: str, at: int | str, *words: str) -> tuple[int, list[str]]:
    """Run a command line that signals itself after change ``at``; its exit code and the changes it made."""
    log = tmp_path / f"changes-{which.replace('/', '_')}-{at}-{words[0]}"
    done = warm.run(
        ["-m", "tests.system.interrupting", which, str(at), *words],
        env=environment(CHANGES=str(log)),
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, log.read_text().splitlines() if log.exists() else []


def state_of_host(shell: Shell) -> tuple[set[str], set[str], str]:
    """Domains, volumes and network definition."""
    return set(shell.virsh("list", "--all", "--name").split()), volumes(shell), reservations(shell)


def words(name: str) -> list[str]:
    """The create under test."""
    return [name if word == "NAME" else word for word in CREATE]


def test_create_killed_after_every_change(shell: Shell, name: str, tmp_path: Path) -> None:
    before = state_of_host(shell)
    at, seen = 0, 0
    while True:
        at += 1
        code, changes = interrupted(tmp_path, "SIGKILL", at, *words(name))
        if code != -signal.SIGKILL:
            assert code == 0
            break
        seen += 1
        assert len(changes) == at
        if at % 2:
            # A second create copes, unless the first had come to its very end.
            done = shell.run(*words(name), check=None)
            assert done.returncode == 0 or (done.returncode == 5 and changes[-1] == "domain.set_record"), done.stderr
            assert shell.virsh("domstate", name) == "running"
        shell.run("delete", name, "--yes", check=None)
        assert state_of_host(shell) == before, f"left after {changes}"
    assert seen >= 8 and {"storage.create_volume", "domain.define", "domain.start"} <= set(changes)


@pytest.mark.parametrize("why", ["moved", "cloned"])
def test_a_killed_create_of_another_vm_than_the_first_of_its_name(
    shell: Shell, name: str, tmp_path: Path, why: str
) -> None:
    """Of the first one, which moved away or whose disk a clone needs, it has not the UUID, nor its volumes' names."""
    shell.run(*words(name), "--no-start")
    with open_host() as host:
        uuid = domain.find(host.conn, name).uuid
        if why == "cloned":
            shell.run("clone", name, f"{name}-new")
        shell.run("delete", name, "--yes")
        try:
            if why == "moved":
                identity.note_moving(host, uuid)
            before = state_of_host(shell)
            code, changes = interrupted(tmp_path, "SIGKILL", "storage.create_volume", *words(name))
            assert code == -signal.SIGKILL and state_of_host(shell) != before, changes
            shell.run("delete", name, "--yes")
            assert state_of_host(shell) == before
        finally:
            identity.forget_moving(host, uuid)
            shell.run("delete", f"{name}-new", "--yes", "--missing-ok")


def test_create_interrupted_after_every_change_undoes_itself(shell: Shell, name: str, tmp_path: Path) -> None:
    before = state_of_host(shell)
    at = 0
    while True:
        at += 1
        code, changes = interrupted(tmp_path, "SIGINT", at, *words(name))
        if code == 0 or (code == 130 and changes and changes[-1] == "domain.set_record"):
            break
        assert code == 130, (code, changes)
        assert state_of_host(shell) == before, f"left after {changes}"
    assert at >= 8
    shell.run("delete", name, "--yes", "--missing-ok")
    assert state_of_host(shell) == before


def test_sigterm_undoes_too(shell: Shell, name: str) -> None:
    before = state_of_host(shell)
    running = subprocess.Popen([*VMCTL, *words(name), "--wait", "agent"], stderr=subprocess.PIPE, text=True, cwd=REPO)
    assert running.stderr is not None
    while "disks of" not in running.stderr.readline():
        pass
    running.terminate()
    assert running.wait(30) in {130, 0}
    running.stderr.close()
    shell.run("delete", name, "--yes", "--missing-ok")
    assert state_of_host(shell) == before


def test_delete_killed_after_every_change(shell: Shell, name: str, tmp_path: Path) -> None:
    before = state_of_host(shell)
    at = 0
    while True:
        at += 1
        shell.run(*words(name))
        code, changes = interrupted(tmp_path, "SIGKILL", at, "delete", name, "--yes")
        if code != -signal.SIGKILL:
            assert code == 0
            break
        shell.run("delete", name, "--yes", check=None)
        assert state_of_host(shell) == before, f"left after {changes}"
    assert at >= 6 and {"domain.power_off", "storage.delete_volume", "domain.undefine"} <= set(changes)


def test_two_creates_of_one_name(shell: Shell, name: str) -> None:
    before = state_of_host(shell)
    for _ in range(4):
        both = [
            subprocess.Popen([*VMCTL, "create", name, "--image", "micro"], stderr=subprocess.PIPE, text=True, cwd=REPO)
            for _ in range(2)
        ]
        errors = [process.communicate(timeout=60)[1] for process in both]
        assert sorted(process.returncode for process in both) == [0, 5], errors
        assert shell.virsh("domstate", name) == "running"
        shell.run("delete", name, "--yes")
        assert state_of_host(shell) == before


def test_many_creates_at_once(shell: Shell, name: str) -> None:
    before = state_of_host(shell)
    many = [f"{name}-{n}" for n in range(6)]
    all_ = [
        subprocess.Popen(
            [*VMCTL, "create", n, "--image", "micro", "--no-start"], stderr=subprocess.PIPE, text=True, cwd=REPO
        )
        for n in many
    ]
    errors = [process.communicate(timeout=120)[1] for process in all_]
    assert [process.returncode for process in all_] == [0] * len(many), errors
    rows = [row for row in shell.json("list") if row["name"] in many]
    assert len({row["address"] for row in rows}) == len(many)
    shell.run("delete", f"{name}-*", "--yes")
    assert state_of_host(shell) == before


@pytest.mark.parametrize("what", ["snapshot", "internal snapshot", "backup"])
def test_what_takes_a_definitions_place_says_which_hosts_have_it(
    shell: Shell, name: str, tmp_path: Path, what: str
) -> None:
    """Killed right after it was defined, it had lost that note, and its start asked nobody."""
    shell.run("create", name, "--image", "micro", "--no-start")
    folder = ("--folder", str(tmp_path / "backups"))
    step, undo = "domain.define", ["snapshot", "revert", f"{name}.then", "--yes"]
    if what == "backup":
        shell.run("backup", "create", name, *folder)
        undo = ["backup", "restore", name, "--yes", *folder]
    elif what == "snapshot":
        shell.run("snapshot", "create", f"{name}.then")
    else:
        shell.run("snapshot", "create", f"{name}.then", "--internal")
        step = "snapshots.revert"

    def says() -> tuple[record.Home, ...]:
        return record.homes(shell.virsh("dumpxml", name, "--inactive"))

    there = record.Home("another", "big", "qemu+ssh://big/system")
    uuid = shell.virsh("domuuid", name).strip()
    note = f'<homes vm="{uuid}"><home host="{there.uuid}" name="{there.name}" uri="{there.uri}"/></homes>'
    shell.virsh("metadata", name, record.HOMES, "--key", record.HOMES_PREFIX, "--set", note, "--config")
    assert says() == (there,)
    code, changes = interrupted(tmp_path, "SIGKILL", step, *undo)
    assert code == -signal.SIGKILL and changes[-1] == step
    assert says() == (there,), changes
    shell.run(*undo)
    assert says() == (there,)
    shell.virsh("metadata", name, record.HOMES, "--remove", "--config")
    shell.run(*undo)
    assert says() == (), "nor does one come back"
