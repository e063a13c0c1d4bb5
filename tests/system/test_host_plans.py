"""vmctl host balance, consolidate and drain, on three hosts with guests that are nothing but firmware."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import Testbed
from tests.system.conftest import VMCTL, Shell
from vmctl.hosts import open_host
from vmctl.locks import held
from vmctl.wait import wait_until

pytestmark = pytest.mark.system


class Fleet:
    """A testbed whose hosts vmctl knows."""

    def __init__(self, bed: Testbed, config: Path) -> None:
        self.bed, self.machines = bed, {machine.name: machine for machine in bed.machines}
        self.config = config

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Run vmctl beside the test."""
        env = {**os.environ, "XDG_CONFIG_HOME": str(self.config)}
        pipe = subprocess.PIPE
        return subprocess.Popen([*VMCTL, *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env)

    def run(self, *words: str, check: int = 0) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CONFIG_HOME", str(self.config))
            return Shell().run(*words, check=check)

    def run_any(self, *words: str) -> int:
        """Run it, whatever comes of it."""
        done = self.begin(*words)
        done.communicate(timeout=120)
        return done.returncode

    def json(self, *words: str, check: int = 0) -> Any:
        return json.loads(self.run(*words, "-o", "json", check=check).stdout)

    def define(self, host: str, name: str, *, vcpus: int = 1, start: bool = True, **labels: str) -> None:
        marks = "".join(f"<v:label key='{key.replace('_', '-')}' value='{value}'/>" for key, value in labels.items())
        xml = (
            f"<domain type='qemu'><name>{name}</name>"
            f"<metadata><v:vm xmlns:v='https://vmctl.dev/xmlns/vm/1' schema='1' image=''>{marks}</v:vm></metadata>"
            f"<memory unit='MiB'>32</memory><vcpu>{vcpus}</vcpu><os><type arch='x86_64'>hvm</type></os></domain>"
        )
        machine = self.machines[host]
        machine.run("sh", "-c", "cat >/tmp/d.xml && virsh -q define --validate /tmp/d.xml", input=xml)
        if start:
            machine.virsh("start", name)

    def where(self) -> dict[str, str]:
        """The host of each VM; each must be on one only."""
        found: dict[str, str] = {}
        for name, machine in self.machines.items():
            for vm in machine.virsh("list", "--all", "--name").split():
                assert vm not in found, f"{vm} is on {found[vm]} and {name}"
                found[vm] = name
        return found

    def running(self) -> set[str]:
        return {vm for machine in self.machines.values() for vm in machine.virsh("list", "--name").split()}

    def clear(self) -> None:
        for machine in self.machines.values():
            for vm in machine.virsh("list", "--name").split():
                machine.virsh("destroy", vm)
            for vm in machine.virsh("list", "--all", "--name").split():
                machine.virsh("undefine", vm)


@pytest.fixture(scope="module")
def bed(make_testbed: Callable[..., Testbed], tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    fleet = Fleet(make_testbed(3), tmp_path_factory.mktemp("config"))
    for machine in fleet.bed.machines:
        fleet.run("host", "add", machine.name, machine.ssh_uri, "--host-key", machine.host_key)
    return fleet


@pytest.fixture
def fleet(bed: Fleet) -> Iterator[Fleet]:
    yield bed
    bed.clear()


def test_balance(fleet: Fleet) -> None:
    """Five guests on one host, two of them kept apart, one pinned. By vCPUs, for these hosts share their processors."""
    for number in range(2):
        fleet.define("h1", f"v{number}", priority=str(number))
    fleet.define("h1", "held", vcpus=2, pinned="dongle")
    fleet.define("h1", "db1", anti_affinity="db", priority="9")
    fleet.define("h1", "db2", anti_affinity="db")
    before = fleet.where()
    plan = fleet.json("host", "balance", "--by", "vcpus", "--dry-run")
    assert fleet.where() == before, "nothing is done"
    assert plan["moves"][0]["vm"] == "db2" and "kept apart from db1" in plan["moves"][0]["why"]
    assert not plan["left"] and plan["spread_after"] < 0.3 < plan["spread_before"]
    refused = fleet.run("host", "balance", "--by", "vcpus", check=2)
    assert "add --yes, or see --dry-run" in refused.stderr and "db2: h1 -> " in refused.stderr
    assert fleet.where() == before
    said = fleet.run("host", "balance", "--by", "vcpus", "--yes")
    after = fleet.where()
    assert after == {**before, **{move["vm"]: move["target"] for move in plan["moves"]}}
    assert after["held"] == "h1" and after["db1"] != after["db2"] and fleet.running() == set(before)
    assert all(f"{move['vm']}: h1 -> {move['target']} in " in said.stdout for move in plan["moves"])
    again = fleet.run("host", "balance", "--by", "vcpus", "--yes")
    assert again.stdout == "nothing to move\n"


def test_drain_goes_on_where_it_was_left(fleet: Fleet) -> None:
    fleet.define("h2", "a")
    fleet.define("h2", "b", start=False)
    fleet.define("h2", "held", pinned="")
    plan = fleet.json("host", "drain", "h2", "--dry-run", "--avoid", "h1")
    assert {move["vm"]: move["target"] for move in plan["moves"]} == {"a": "h3", "b": "h3"}
    assert plan["left"] == [{"vm": "held", "host": "h2", "why": "it is labelled pinned"}]
    said = fleet.run("host", "drain", "h2", "--avoid", "h1", "--yes", check=14)
    assert "held on h2: it is labelled pinned" in said.stderr
    assert fleet.where() == {"a": "h3", "b": "h3", "held": "h2"} and fleet.running() == {"a", "held"}
    fleet.machines["h2"].virsh("destroy", "held")
    fleet.machines["h2"].virsh("undefine", "held")
    fleet.define("h2", "held")
    moved = fleet.json("host", "drain", "h2", "--yes")
    assert [(one["vm"], one["source"]) for one in moved] == [("held", "h2")] and moved[0]["mode"] != "stopped"
    assert "h2" not in fleet.where().values()
    assert fleet.run("host", "drain", "h2", "--yes").stdout == "nothing to move\n"


def test_a_host_to_which_something_came_is_not_called_empty(fleet: Fleet) -> None:
    """Whoever brought it there: the plan that was asked about did not know of it."""
    fleet.define("h1", "a")
    main, side = pty.openpty()
    env = {**os.environ, "XDG_CONFIG_HOME": str(fleet.config)}
    drain = subprocess.Popen([*VMCTL, "host", "drain", "h1"], stdin=side, stdout=side, stderr=side, env=env)
    os.close(side)
    said = ""
    try:
        while "[y/N]" not in said:
            assert select.select([main], [], [], 60)[0], said
            said += os.read(main, 4096).decode()
        fleet.define("h1", "late")
        os.write(main, b"y\n")
        with suppress(OSError):  # the other side is closed
            while select.select([main], [], [], 120)[0] and (more := os.read(main, 4096).decode()):
                said += more
        assert drain.wait(60) == 14, said
    finally:
        drain.kill()
        drain.wait()
        os.close(main)
    assert "late on h1: it came there after the look; the same again moves it" in said, said
    assert fleet.where()["a"] != "h1" and fleet.where()["late"] == "h1"
    fleet.run("host", "drain", "h1", "--yes")
    assert "h1" not in fleet.where().values()


def test_two_drains_at_once(fleet: Fleet) -> None:
    """Neither moves to the host that the other one empties; the first has planned, and waits for an answer."""
    fleet.define("h1", "a")
    fleet.define("h2", "b")
    main, side = pty.openpty()
    env = {**os.environ, "XDG_CONFIG_HOME": str(fleet.config)}
    first = subprocess.Popen([*VMCTL, "host", "drain", "h1"], stdin=side, stdout=side, stderr=side, env=env)
    os.close(side)
    try:
        said = ""
        while "[y/N]" not in said:
            assert select.select([main], [], [], 60)[0], said
            said += os.read(main, 4096).decode()
        plan = fleet.json("host", "drain", "h2", "--dry-run")
        assert [(move["vm"], move["target"]) for move in plan["moves"]] == [("b", "h3")]
        second = fleet.run("host", "drain", "h2", "--yes")
        assert "h1: another vmctl is emptying it" in second.stderr and fleet.where() == {"a": "h1", "b": "h3"}
    finally:
        first.kill()
        first.wait()
        os.close(main)
    plan = fleet.json("host", "drain", "h3", "--avoid", "h2", "--dry-run")
    assert [move["target"] for move in plan["moves"]] == ["h1"], "what was killed empties nothing"


def test_one_whose_qemu_died_is_moved_as_one_that_is_off(fleet: Fleet) -> None:
    fleet.define("h2", "a")
    fleet.machines["h2"].kill("qemu:a")
    wait_until(lambda: "a" not in fleet.running(), what="libvirt sees that it is gone", timeout_s=60)
    assert fleet.json("-c", "h2", "list")[0]["state"] == "crashed"
    fleet.run("host", "drain", "h2", "--yes")
    assert fleet.where()["a"] != "h2" and not fleet.running()


def test_several_at_once_with_files_in_a_folder_that_is_no_pool(fleet: Fleet) -> None:
    names = ("a", "b", "c", "d")
    for name in names:
        fleet.define("h1", name, start=False)
        folder = "/var/lib/libvirt/loose"
        disk = f"{folder}/{name}.raw"
        fleet.machines["h1"].run("sh", "-c", f"mkdir -p {folder}; truncate -s 1M {disk}")
        fleet.machines["h1"].virsh("attach-disk", name, disk, "vda", "--config", "--subdriver", "raw")
    fleet.machines["h2"].run("mkdir", "-p", folder)
    fleet.run("host", "drain", "h1", "--avoid", "h3", "--copy-storage", "full", "--at-once", "4", "--yes")
    assert fleet.where() == dict.fromkeys(names, "h2")
    assert fleet.machines["h1"].run("ls", folder).stdout == ""
    assert fleet.machines["h2"].run("ls", folder).stdout.split() == [f"{name}.raw" for name in names]
    assert "look" not in fleet.machines["h1"].virsh("pool-list", "--all") + fleet.machines["h2"].virsh("pool-list")


def test_consolidate(fleet: Fleet) -> None:
    for number, host in enumerate(("h1", "h1", "h1", "h2", "h3")):
        fleet.define(host, f"v{number}")
    plan = fleet.json("host", "consolidate", "--by", "vcpus", "--dry-run")
    assert plan["freed"] == ["h2", "h3"]
    assert fleet.json("host", "consolidate", "h1", "h2", "--by", "vcpus", "--dry-run")["freed"] == ["h2"]
    assert fleet.json("host", "consolidate", "--by", "vcpus", "--fill", "55", "--dry-run")["freed"] == ["h2"]
    said = fleet.run("host", "consolidate", "--by", "vcpus", "--yes")
    assert set(fleet.where().values()) == {"h1"} and "empty then: h2, h3" in said.stderr
    assert len(fleet.running()) == 5


def test_a_host_that_does_not_answer(fleet: Fleet) -> None:
    fleet.define("h1", "a", vcpus=2)
    fleet.define("h1", "b", vcpus=2)
    fleet.machines["h3"].cut()
    try:
        said = fleet.run("host", "balance", "--by", "vcpus", "--timeout", "6", "--dry-run", "-o", "json")
        assert {move["target"] for move in json.loads(said.stdout)["moves"]} == {"h2"} and "h3: " in said.stderr
        down = fleet.run("host", "drain", "h3", "--timeout", "6", "--yes", check=3)
        assert down.stderr.splitlines()[-2].startswith("cannot drain host h3: ")
        assert "cannot find host h9" in fleet.run("host", "drain", "h9", check=4).stderr
    finally:
        fleet.machines["h3"].mend()


def test_what_cannot_be_moved_is_told_before(fleet: Fleet) -> None:
    """A disk that only one host has: the look at both hosts says so, and nothing was changed."""
    here, disk = fleet.machines["h1"], "/var/lib/libvirt/images/only-here.qcow2"
    here.run("qemu-img", "create", "-q", "-f", "qcow2", disk, "1M")
    here.virsh("pool-create-as", "images", "dir", "--target", "/var/lib/libvirt/images")
    fleet.define("h1", "a", start=False)
    here.virsh("attach-disk", "a", disk, "vda", "--config", "--subdriver", "qcow2")
    here.virsh("start", "a")
    fleet.define("h1", "held", pinned="")
    checked = fleet.run("host", "drain", "h1", "--check", check=11).stderr
    assert checked.count("mend: --copy-storage") == 1 and checked.count("held on h1: it is labelled pinned") == 1
    assert "it is labelled pinned" in fleet.run("host", "drain", "h1", "--dry-run").stderr
    said = fleet.run("host", "drain", "h1", "--yes", check=14).stderr
    for host in ("h2", "h3"):
        assert said.count(f"is on h1 only: {host} does not see the same file (mend: --copy-storage") == 1, "told once"
    assert said.count("does not see") == said.count("--copy-storage") == 2
    assert said.count("it is labelled pinned") == 1 and "cannot move 2 that should\n" in said
    fleet.machines["h1"].virsh("destroy", "held")
    fleet.machines["h1"].virsh("undefine", "held")
    assert fleet.where() == {"a": "h1"}
    fleet.run("host", "drain", "h1", "--copy-storage", "full", "--yes")
    assert fleet.where()["a"] != "h1" and fleet.running() == {"a"}


def test_a_host_that_refuses_is_passed_over(fleet: Fleet) -> None:
    """One has a VM of the same UUID, which only the look at both hosts tells. It may be asked first or not."""
    fleet.define("h1", "a")
    uuid = fleet.machines["h1"].virsh("domuuid", "a")
    inside = f"<name>twin</name><uuid>{uuid}</uuid><memory>8192</memory><os><type>hvm</type></os>"
    twin = f"<domain type='qemu'>{inside}</domain>"
    fleet.machines["h2"].run("sh", "-c", "cat >/tmp/d.xml && virsh -q define /tmp/d.xml", input=twin)
    fleet.define("h3", "busy", vcpus=7)
    said = fleet.run("host", "drain", "h1", "--yes")
    assert fleet.where() == {"a": "h3", "busy": "h3", "twin": "h2"} and fleet.running() == {"a", "busy"}
    assert "has a VM of the same UUID" in said.stderr or "a: h1 -> h2" not in said.stderr
    stuck = fleet.run("host", "drain", "h3", "--avoid", "h1", "--yes", check=14)
    assert "a on h3: " in stuck.stderr and "h2 cannot take it: h2 has a VM of the same UUID" in stuck.stderr
    assert fleet.where() == {"a": "h3", "busy": "h2", "twin": "h2"}


def test_a_network_that_a_host_lacks(fleet: Fleet) -> None:
    with_it = [fleet.machines[name] for name in ("h1", "h3")]
    try:
        for machine in with_it:
            xml = "<network><name>extra</name><bridge name='extra0'/></network>"
            machine.run("sh", "-c", "cat >/tmp/n.xml && virsh -q net-create /tmp/n.xml", input=xml)
        fleet.define("h1", "a", start=False)
        with_it[0].virsh("attach-interface", "a", "network", "extra", "--config")
        with_it[0].virsh("start", "a")
        plan = fleet.json("host", "drain", "h1", "--avoid", "h3", "--dry-run")
        assert not plan["moves"] and "h2 has no network extra" in plan["left"][0]["why"]
        assert [move["target"] for move in fleet.json("host", "drain", "h1", "--dry-run")["moves"]] == ["h3"]
    finally:
        fleet.clear()
        for machine in with_it:
            machine.virsh("net-destroy", "extra", check=False)


def test_what_stayed_of_one_that_runs_on_a_third_host_does_not_go(fleet: Fleet) -> None:
    """With its disks it would go, where those two see them, and the third host does not."""
    fleet.define("h1", "a")
    fleet.run("-c", "h1", "migrate", "a", "--to", "h2", "--keep-source")
    said = fleet.run("-c", "h1", "migrate", "a", "--to", "h3", check=11).stderr
    assert "a runs on h2, where it went once" in said and "vmctl -c h2 migrate a --to h3" in said
    assert "a runs on h2, where it went once" in fleet.run("host", "drain", "h1", "--yes", check=14).stderr
    assert fleet.running() == {"a"} and not fleet.machines["h3"].virsh("list", "--all", "--name")


def test_migrate_to_auto(fleet: Fleet) -> None:
    first = fleet.machines["h1"]
    fleet.run("host", "add", "aaa", first.tcp_uri, "--insecure", "--no-check")
    try:
        fleet.define("h1", "a")
        fleet.define("h1", "b")
        fleet.define("h1", "held", pinned="")
        assert "held: it is labelled pinned" in fleet.run("-c", "h1", "migrate", "*", "--to", "auto", check=11).stderr
        assert set(fleet.where().values()) == {"h1"}
        said = fleet.run("-c", "h1", "migrate", "a", "--to", "auto")
        assert "aaa: it is the same host as h1" in said.stderr
        after = fleet.where()
        assert after == {"a": after["a"], "b": "h1", "held": "h1"} and after["a"] in {"h2", "h3"}
        assert "cannot find VM nope" in fleet.run("-c", "h1", "migrate", "nope", "--to", "auto", check=4).stderr
    finally:
        fleet.run("host", "remove", "aaa")


def test_to_auto_goes_on_where_it_was_cut_off(fleet: Fleet) -> None:
    """The same again, when one of the VMs has gone: that one is told, and the others move."""
    fleet.define("h2", "a")
    fleet.define("h1", "b")
    words = ("-c", "h1", "migrate", "a", "b")
    assert "cannot find VM nope" in fleet.run(*words, "nope", "--to", "auto", check=4).stderr
    assert fleet.where() == {"a": "h2", "b": "h1"}
    said = fleet.run(*words, "--to", "auto").stderr
    assert "a is on h2 already, running, and h1 has nothing of it" in said
    assert fleet.where()["a"] == "h2" and fleet.where()["b"] != "h1"
    assert fleet.run("-c", "h1", "migrate", "a", "--to", "auto").stdout == "a: on h2 already\n"
    (done,) = json.loads(fleet.run("-c", "h1", "migrate", "a", "--to", "auto", "-o", "json").stdout)
    assert (done["vm"], done["target"], done["mode"]) == ("a", "h2", "already")


def test_a_glob_of_vms_that_have_all_moved(fleet: Fleet) -> None:
    fleet.define("h1", "web-1")
    fleet.define("h1", "web-2", start=False)
    words = ("-c", "h1", "migrate", "web-*")
    fleet.run(*words, "--to", "h2")
    assert fleet.where() == {"web-1": "h2", "web-2": "h2"}
    for to in ("h2", "auto"):
        assert fleet.run(*words, "--to", to).stdout == "web-1: on h2 already\nweb-2: on h2 already\n"
        none = fleet.run(*words, "x*", "--to", to, check=4).stderr
        assert none == "cannot find VMs: none matches 'x*'\nhint: see `vmctl list --all-hosts`\n"
    assert "web-2 is on h2 already" in fleet.run(*words, "--to", "h2", "--check").stdout
    assert fleet.run(*words, "--to", "h3", check=4).stderr.startswith("cannot find VMs: none matches 'web-*'")
    assert "none matches" in fleet.run(*words, "--to", "h2", "--adjust", "--downtime", "9", check=4).stderr


def test_to_auto_when_the_host_does_not_answer(fleet: Fleet) -> None:
    """Neither a hang nor nothing to move."""
    fleet.define("h1", "a")
    fleet.machines["h1"].kill("libvirtd", signal.SIGSTOP)
    try:
        said = fleet.run("-c", "h1", "migrate", "a", "--to", "auto", check=3)
        assert said.stderr == "cannot ask host h1: no answer within 20 s\nhint: vmctl host check says more\n"
    finally:
        fleet.machines["h1"].kill("libvirtd", signal.SIGCONT)
    assert fleet.where() == {"a": "h1"}


def test_a_vm_that_others_ask_at_that_moment_can_be_moved(fleet: Fleet) -> None:
    """libvirt passes over a VM that is being asked: that alone does not mean that its QEMU hangs."""
    fleet.define("h1", "a")
    asking = "while echo domstats --balloon; do :; done | virsh -q >/dev/null"
    others = [fleet.machines["h1"].popen("sh", "-c", asking) for _ in range(2)]
    try:
        for _ in range(3):
            assert [move["vm"] for move in fleet.json("host", "drain", "h1", "--dry-run")["moves"]] == ["a"]
    finally:
        fleet.machines["h1"].run("pkill", "-x", "virsh")
        for one in others:
            one.wait()


@pytest.fixture
def with_disk(fleet: Fleet) -> Iterator[Callable[[str], str]]:
    """A function that defines a VM on h1 with a disk of its own, and returns its path."""
    first = fleet.machines["h1"]
    paths: list[str] = []

    def make(name: str) -> str:
        fleet.run("-c", "h1", "disk", "create", f"vmctl/{name}", "8M")
        paths.append(f"/var/lib/libvirt/vmctl/vmctl/{name}.qcow2")
        first.run("qemu-io", "-f", "qcow2", "-c", "write -q -P 5 0 4M", paths[-1])
        fleet.define("h1", name, start=False)
        first.virsh("attach-disk", name, paths[-1], "vda", "--driver", "qemu", "--subdriver", "qcow2", "--config")
        return paths[-1]

    yield make
    fleet.clear()
    for machine in fleet.machines.values():
        machine.run("rm", "-f", *paths)


def test_a_drain_ends_what_one_that_was_killed_left(fleet: Fleet, with_disk: Callable[[str], str]) -> None:
    """One VM has gone meanwhile, by libvirt alone; of another a half made file lies where it does not go now."""
    gone, stays = with_disk("a"), with_disk("b")
    first, second, third = fleet.bed.machines
    first.virsh("start", "a")
    fleet.bed.limit("2mbit")
    try:
        drain = fleet.begin("host", "drain", "h1", "--yes", "--copy-storage", "full", "--avoid", "h3", "--at-once", "1")
        wait_until(lambda: "Outgoing" in first.virsh("domjobinfo", "a", check=False), what="a is sent", timeout_s=60)
        drain.kill()
        drain.communicate(timeout=60)
    finally:
        fleet.bed.limit(None)
    wait_until(lambda: "a" not in first.virsh("list", "--all", "--name").split(), what="a has gone", timeout_s=60)
    assert not first.run("test", "-e", gone, check=False).returncode, "which nobody has cleared up"
    fleet.run("-c", "h3", "disk", "create", "vmctl/b", "8M")
    third.run("touch", f"{stays}.migrating")

    fleet.run("host", "drain", "h1", "--dry-run")
    assert not third.run("test", "-e", stays, check=False).returncode, "nothing is done"
    said = fleet.run("host", "drain", "h1", "--yes", "--copy-storage", "full", "--avoid", "h3").stderr
    assert "a has moved from h1 to h2" in said and f"deleted {stays} on h3" in said
    assert fleet.where() == {"a": "h2", "b": "h2"} and fleet.running() == {"a"}
    for machine in (first, second, third):
        there = set(machine.run("ls", gone.rpartition("/")[0], check=False).stdout.split())
        assert there == ({"a.qcow2", "b.qcow2"} if machine is second else set()), machine.name
    for path in (gone, stays):
        second.run("qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read -q -P 5 0 4M", path)


def _open_files(process: int | str, folder: Path) -> set[Path]:
    """The files of a folder that a process has open, locks that it has, or waits for."""
    found: set[Path] = set()
    for handle in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):
            if (path := handle.readlink()).is_relative_to(folder):
                found.add(path)
    return found


@pytest.mark.parametrize("running", [False, True])
def test_a_drain_clears_up_after_one_that_was_killed_when_all_had_moved(
    fleet: Fleet, with_disk: Callable[[str], str], running: bool
) -> None:
    """It waits for its turn to delete what is left, which until then the marks on the target tell of."""
    path = with_disk("a")
    first, second, _ = fleet.bed.machines
    if running:
        first.virsh("start", "a")
    words = ("host", "drain", "h1", "--yes", "--copy-storage", "full", "--avoid", "h3")
    with open_host("h1", {**os.environ, "XDG_CONFIG_HOME": str(fleet.config)}) as host:
        turn = f"shared disks on {host.lock_scope}"
        with held(host.folders.runtime, turn):
            drain = fleet.begin(*words)
            ours = _open_files("self", host.folders.runtime)
            wait_until(
                lambda: bool(ours & _open_files(drain.pid, host.folders.runtime)), what="it is its turn", timeout_s=60
            )
            drain.kill()
            drain.communicate(timeout=60)
    assert not first.run("test", "-e", path, check=False).returncode, "which nobody has cleared up"
    assert "a has moved from h1 to h2" in fleet.run(*words).stderr
    assert first.run("test", "-e", path, check=False).returncode == 1
    assert second.run("sh", "-c", f"ls {path}*").stdout.split() == [path], "nor is a mark left"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_drain_that_is_cut_off_goes_on(fleet: Fleet, number: signal.Signals) -> None:
    for name in ("a", "b", "c"):
        fleet.define("h1", name)
    fleet.bed.limit("2mbit")
    try:
        drain = fleet.begin("host", "drain", "h1", "--yes")
        assert drain.stderr is not None
        seen = ""
        while "peer-to-peer" not in seen:
            line = drain.stderr.readline()
            assert line, seen
            seen += line
        source = fleet.bed.machines[0]

        def sends() -> bool:
            return any("Outgoing" in source.virsh("domjobinfo", vm, check=False) for vm in ("a", "b", "c"))

        wait_until(sends, what="the first VM is sent", timeout_s=60, interval_s=0.02)
        drain.send_signal(number)
        _, rest = drain.communicate(timeout=60)
        assert drain.returncode == (130 if number is signal.SIGINT else -number), seen + rest
    finally:
        fleet.bed.limit(None)
    again = ("host", "drain", "h1", "--yes")  # libvirt may still be at what was begun
    wait_until(lambda: not fleet.run_any(*again), what="the rest of the drain", timeout_s=60)
    assert set(fleet.where()) == fleet.running() == {"a", "b", "c"} and "h1" not in fleet.where().values()
