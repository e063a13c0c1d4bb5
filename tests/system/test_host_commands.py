"""vmctl host and list --all-hosts, on three hosts that are reached by SSH."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts import Machine, Testbed
from tests.system.conftest import VMCTL, Shell
from vmctl import config
from vmctl.fleet import Fleet, Watch
from vmctl.wait import wait_until

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def bed(make_testbed: Callable[..., Testbed]) -> Testbed:
    return make_testbed(3, tls=True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    """vmctl with a config file of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    yield Shell()


@pytest.fixture
def known(here: Shell, bed: Testbed) -> Shell:
    for machine in bed.machines:
        here.run("host", "add", machine.name, machine.ssh_uri, "--host-key", machine.host_key)
    return here


def test_a_host_is_trusted_by_its_key_alone(here: Shell, bed: Testbed, tmp_path: Path) -> None:
    first, second = bed.machines[:2]
    refused = here.run("host", "add", "h1", first.ssh_uri, check=2)
    assert "is not known, and there is no terminal" in refused.stderr and "--fingerprint SHA256:" in refused.stderr
    shown = refused.stderr.partition("--fingerprint ")[2].split(",")[0]
    other = subprocess.run(
        ["ssh-keygen", "-lf", "-"], input=second.host_key, capture_output=True, text=True, check=True
    )
    wrong = here.run("host", "add", "h1", first.ssh_uri, "--fingerprint", other.stdout.split()[1], check=3)
    assert "it shows other SSH host keys than that" in wrong.stderr
    assert not (tmp_path / "vmctl/config.toml").exists()
    imposter = here.run("host", "add", "h1", first.ssh_uri, "--host-key", second.host_key, check=3)
    assert "Host key verification failed" in imposter.stderr
    assert "it shows another SSH host key than SHA256:" in imposter.stderr
    said = here.run("host", "add", "h1", first.ssh_uri, "--fingerprint", shown).stdout
    assert shown in said
    assert here.json("-c", "h1", "list") == []
    # A key that changed: nothing is sent, and nobody is asked whether that is all right.
    config = tmp_path / "vmctl/config.toml"
    config.write_text(config.read_text().replace(first.host_key.split()[1], second.host_key.split()[1]))
    changed = here.run("-c", "h1", "list", check=3).stderr
    assert "Host key verification failed" in changed and "hint: it shows another SSH host key than SHA256:" in changed
    everywhere = here.run("list", "--all-hosts", check=14)
    assert "unreachable" in everywhere.stdout and "vmctl host remove h1" in everywhere.stderr
    assert "cannot find host h9" in here.run("-c", "h9", "list", check=4).stderr
    assert here.run("host", "remove", "h1").stdout.startswith("h1: no longer known")
    assert "cannot find host h1" in here.run("-c", "h1", "list", check=4).stderr


def test_a_person_is_asked(here: Shell, bed: Testbed) -> None:
    first = bed.machines[0]
    for answer, code in (("n", 1), ("y", 0)):
        main, side = pty.openpty()
        argv = [*VMCTL, "host", "add", "asked", first.ssh_uri]
        process = subprocess.Popen(argv, stdin=side, stdout=subprocess.PIPE, stderr=side, text=True)
        os.close(side)
        said = ""
        while "[y/N]" not in said:
            assert select.select([main], [], [], 30)[0], said
            said += os.read(main, 4096).decode()
        assert "SHA256:" in said
        os.write(main, f"{answer}\n".encode())
        process.communicate(timeout=30)
        os.close(main)
        assert process.returncode == code
    assert here.json("-c", "asked", "list") == []


def test_other_ways(here: Shell, bed: Testbed) -> None:
    first = bed.machines[0]
    assert "neither encrypted" in here.run("host", "add", "t", first.tcp_uri, check=2).stderr
    here.run("host", "add", "t", first.tcp_uri, "--insecure")
    twice = here.run("host", "add", "again", first.tcp_uri, "--insecure", "--no-check", check=5).stderr
    assert f"cannot add host again: the config file has it already as t, at {first.tcp_uri}\n" in twice
    other_way = here.run("host", "add", "s", first.tls_uri, check=5).stderr
    assert "cannot add host s: the config file has it already as t, with host UUID" in other_way
    assert "hint: it is -c t; to call it s, or reach it by another URI, first vmctl host remove t" in other_way
    here.run("host", "add", "s", first.tls_uri, "--no-check")
    here.run("host", "add", "mine", "qemu:///system")
    assert "file has it already as mine" in here.run("host", "add", "own", "qemu+unix:///system", check=5).stderr
    assert {row["name"]: row["state"] for row in here.json("host", "list")} == dict.fromkeys(("t", "s", "mine"), "up")
    assert here.json("host", "show", "s")["hostname"] == "h1"
    assert here.run("host", "add", "s", first.tls_uri, check=5).stderr.startswith("cannot add host s")
    down = here.run("host", "add", "down", "qemu+tls://10.98.250.1/system", check=3)
    assert "--no-check" in down.stderr
    here.run("host", "add", "down", "qemu+tls://10.98.250.1/system", "--no-check")


def test_all_hosts_and_one_that_does_not_answer(known: Shell, bed: Testbed, name: str) -> None:
    second, third = bed.machines[1:]
    xml = f"<domain type='qemu'><name>{name}</name><memory>8192</memory><os><type>hvm</type></os></domain>"
    second.run("sh", "-c", "cat >/tmp/d.xml; virsh define /tmp/d.xml", input=xml)
    try:
        rows = known.json("list", "--all-hosts")
        assert [(row["name"], row["host"], row["problem"]) for row in rows] == [(name, "h2", "")]
        absent = known.run("-c", "h1", "show", name, check=4).stderr
        assert absent == f"cannot find VM {name}: h1 has none of that name\nhint: see `vmctl list --all-hosts`\n"
        for stopped in (True, False):
            if stopped:
                third.kill("libvirtd", signal.SIGSTOP)
            else:
                third.kill("libvirtd", signal.SIGCONT)
                third.cut()
            began = time.monotonic()
            said = known.run("list", "--all-hosts", "--timeout", "3", "-o", "json", check=14)
            assert time.monotonic() - began < 20
            marked = {row["host"]: row for row in json.loads(said.stdout)}
            assert set(marked) == {"h2", "h3"} and marked["h3"]["state"] == "unreachable" and marked["h3"]["problem"]
            assert "cannot list the VMs of 1 of 3 hosts" in said.stderr and "h3: " in said.stderr
            states = {row["name"]: row["state"] for row in known.json("host", "list", "--timeout", "3")}
            assert states == {"h1": "up", "h2": "up", "h3": "unreachable"}
            if stopped:
                for words in (("host", "show", "h3"), ("-c", "h3", "list")):
                    assert "no answer within 30 s" in known.run(*words, check=3).stderr, "one alone is no hang either"
        assert "cannot connect to h3: " in known.run("-c", "h3", "list", check=3).stderr
        third.mend()
        assert "unreachable" not in known.run("list", "--all-hosts").stdout
        assert known.run("list", "--all-hosts", "-o", "name").stdout.split() == [name]
    finally:
        second.virsh("undefine", name)


def test_events_of_all_hosts_and_of_one_that_is_lost(known: Shell, bed: Testbed, name: str) -> None:
    first, second, third = bed.machines
    xml = f"<domain type='qemu'><name>{name}</name><memory>8192</memory><os><type>hvm</type></os></domain>"
    pipe = subprocess.PIPE
    assert "goes with no --connect" in known.run("-c", "h1", "events", "--all-hosts", check=2).stderr
    assert f"cannot find VM {name} on any of 3" in known.run("events", name, "--all-hosts", check=4).stderr
    words = [*VMCTL, "events", f"{name}*", "--all-hosts", "--count", "2", "-o", "json"]
    watcher = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True)
    alone = subprocess.Popen([*VMCTL, "-c", "h3", "events"], stdout=pipe, stderr=pipe, text=True)
    try:
        assert watcher.stdout and watcher.stderr and alone.stderr
        assert watcher.stderr.readline() == alone.stderr.readline() == "watching; Ctrl-C ends\n"
        second.kill("libvirtd")
        seen = [json.loads(watcher.stdout.readline())]
        first.run("sh", "-c", "cat >/tmp/d.xml; virsh define /tmp/d.xml", input=xml)
        seen.append(json.loads(watcher.stdout.readline()))
        third.kill("libvirtd", signal.SIGSTOP)  # no connection of it breaks
        seen.append(json.loads(watcher.stdout.readline()))
        _, said = alone.communicate(timeout=60)
        assert alone.returncode == 3 and said.startswith("cannot watch events: ") and said.count("\n") == 2, said
        second.start("libvirtd")
        seen.append(json.loads(watcher.stdout.readline()))
        first.virsh("undefine", name)
        out, said = watcher.communicate(timeout=30)
        assert watcher.returncode == 0 and said == ""
        seen += [json.loads(line) for line in out.splitlines()]
    finally:
        for process in (watcher, alone):
            process.kill()
        third.kill("libvirtd", signal.SIGCONT)
        first.virsh("undefine", name, check=False)
    assert [(one["host"], one["name"], one["event"]) for one in seen] == [
        ("h2", "", "unreachable"),
        ("h1", name, "defined"),
        ("h3", "", "unreachable"),
        ("h2", "", "reachable"),
        ("h1", name, "undefined"),
    ]
    assert seen[0]["detail"].endswith("went away")


def test_who_names_no_host_is_told_which_there_are(here: Shell, bed: Testbed) -> None:
    first = bed.machines[0]
    here.run("host", "add", "h1", first.ssh_uri, "--host-key", first.host_key)
    for words in (("migrate", "nope", "--to", "h1"), ("show", "nope")):
        said = here.run(*words, check=4).stderr
        assert "qemu:///system has none" in said and said.endswith("hint: see `vmctl list --all-hosts`; hosts: h1\n")


def test_check(known: Shell, bed: Testbed) -> None:
    first, second = bed.machines[:2]
    found = known.json("host", "check")
    by = {(one["host"], one["name"]): one for one in found}
    assert {one["result"] for one in found} <= {"ok", "note"}
    for host, other in (("h1", "h2"), ("h2", "h1"), ("h3", "h1")):
        assert by[host, f"reaches {other}"]["result"] == "ok"
    assert "SHA256:" in by["h1", "trust"]["detail"] and by["h1", "clock"]["result"] == "ok"
    first.cut_from(second)
    try:
        said = known.run("host", "check", "h1", "h2", check=1).stdout
        assert "failed   h1 reaches h2" in said and "failed   h2 reaches h1" in said and "mend: " in said
        assert "an SSH key" not in said, "keys are no mend for that"
    finally:
        first.mend_from(second)
    second.kill("sshd")
    try:
        said = known.run("host", "check", "h1", "h2", check=1).stdout
        assert said.count("no SSH server listens there") == 2 and "SSH key" not in said, said
        assert "no SSH server listens there" in known.run("-c", "h2", "list", check=3).stderr
    finally:
        second.start("sshd")
    first.run("mount", "--bind", "/bin/true", "/usr/bin/date")
    try:
        by = {
            (one["host"], one["name"]): one
            for one in json.loads(known.run("host", "check", "-o", "json", check=1).stdout)
        }
        assert by["h1", "clock"]["result"] == "failed" and "it says" in by["h1", "clock"]["detail"]
        assert by["h1", "reachable"]["result"] == by["h1", "reaches h2"]["result"] == "ok", "all else is told, too"
    finally:
        first.run("umount", "/usr/bin/date")


def test_top_and_show(known: Shell, bed: Testbed) -> None:
    looks = [
        json.loads(line)
        for line in known.run("host", "top", "--count", "2", "--interval", "0.3", "-o", "json").stdout.splitlines()
    ]
    assert len(looks) == 2
    assert all([row["name"] for row in look] == ["h1", "h2", "h3"] for look in looks)
    assert all(0 <= row["cpu_percent"] <= 100 and row["available_mib"] > 0 for look in looks for row in look)
    table = known.run("host", "top", "--count", "2", "--interval", "0.3").stdout.splitlines()
    assert [bool(line) for line in table] == [True] * 4 + [False] + [True] * 4, table
    pipe = subprocess.PIPE
    with subprocess.Popen([*VMCTL, "host", "top", "--interval", "0.3"], stdout=pipe, stderr=pipe, text=True) as running:
        assert running.stdout is not None and running.stdout.readline()
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=30)[1]
    assert (running.returncode, said) == (0, "")
    shown = known.json("host", "show", "h2")
    assert shown["peer"] == bed.machines[1].peer_uri and shown["address"] == bed.machines[1].address
    assert "lan" in shown["networks"]
    assert known.json("-c", "h2", "host", "info")["name"] == "h2"


def test_top_waits_once_for_a_host_that_is_stopped(known: Shell, bed: Testbed) -> None:
    """Else each look would take as long as that one's, and leave a thread and an SSH client behind."""
    first, third = bed.machines[0], bed.machines[2]
    folders = config.folders()
    watch = Watch(Fleet(config.load(folders.config / "config.toml"), folders), ("h1", "h3"), timeout_s=10)
    assert [row.problem for row in watch.look()] == ["", ""]
    watch = Watch(Fleet(config.load(folders.config / "config.toml"), folders), ("h1", "h3"), timeout_s=3)
    clients = len(_clients(third))
    third.kill("libvirtd", signal.SIGSTOP)
    try:
        looks = [watch.look() for _ in range(5)]
        assert [rows[1].problem for rows in looks[:1]] == ["cannot ask host h3: no answer within 3 s"]
        assert all("cannot ask host h3: no answer for " in rows[1].problem for rows in looks[1:])
        assert [rows[0].problem for rows in looks[1:]] == [""] * 4, "the other one is asked"
        assert len(_clients(third)) == clients + 1
        assert len(_clients(first)) >= 1
    finally:
        third.kill("libvirtd", signal.SIGCONT)
    wait_until(lambda: not watch.look()[1].problem, what="h3 to be asked again", timeout_s=60)


def _clients(machine: Machine) -> list[str]:
    """SSH clients of this process that go there."""
    said = subprocess.run(
        ["ps", "-ww", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True, check=True
    )
    return [line for line in said.stdout.splitlines() if machine.address in line and line.startswith("ssh ")]


def test_setup_shows_what_it_changes_and_changes_it_once(here: Shell, bed: Testbed) -> None:
    first, second = bed.machines[:2]
    second.kill("libvirtd")  # which leaves its socket
    second.kill("virtlogd")
    second.run("sh", "-c", "rm -f ~/.ssh/known_hosts ~/.ssh/id_ed25519*")
    here.run("host", "add", "h1", first.ssh_uri, "--host-key", first.host_key)
    words = ("host", "setup", f"root@{second.address}", "--name", "h2", "--keyfile", str(bed.key), "--peers")
    words += ("--host-key", second.host_key)
    shown = here.run(*words, "--dry-run").stdout
    for line in ("libvirtd running", "network", "an SSH key of root's on h2", "h2 knows the host key of h1"):
        assert f"+ {line}" in shown
    assert "no terminal to ask on" in here.run(*words, check=2).stderr
    assert "cannot find host h2" in here.run("-c", "h2", "list", check=4).stderr, "nothing was changed"
    _interrupted_when_libvirt_is_started(words, second)
    here.run(*words, "--yes")
    assert here.run(*words, "--yes").stdout == "h2: nothing to change\n"
    assert here.json("-c", "h2", "list") == []
    pools = second.virsh("pool-list", "--name").split()
    assert {"vmctl", "vmctl-images"} <= set(pools) and "vmctl" in second.virsh("net-list", "--name").split()
    checked = {(one["host"], one["name"]): one["result"] for one in here.json("host", "check")}
    assert checked["h2", "reaches h1"] == checked["h1", "reaches h2"] == "ok"


def _interrupted_when_libvirt_is_started(words: tuple[str, ...], machine: Machine) -> None:
    """Nothing of it is lost, and how to go on is told."""
    held = "#!/bin/sh\necho $PPID $$ >/run/held; exec sleep 1000\n"
    machine.run("sh", "-c", "cat >/run/held.sh; chmod 755 /run/held.sh", input=held)
    machine.run("mount", "--bind", "/run/held.sh", "/usr/sbin/virtlogd")
    try:
        process = subprocess.Popen([*VMCTL, *words, "--yes"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stderr is not None
        begun = process.stderr.readline()
        assert begun == "h2: libvirtd running\n", begun + process.communicate(timeout=60)[1]
        wait_until(lambda: machine.run("cat", "/run/held", check=False).stdout, what="it to be at it", timeout_s=60)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert "cannot set up h2: interrupted; what was done stays" in said and "again does the rest" in said
    finally:
        machine.run("umount", "/usr/sbin/virtlogd")
        machine.run("sh", "-c", "kill $(cat /run/held)", check=False)


def test_setup_by_a_user_who_becomes_root(here: Shell, bed: Testbed) -> None:
    """The others' roots log in as that user, too; and it is root there whose libvirt must reach them."""
    first, third = bed.machines[0], bed.machines[2]
    script = """
        echo 'admin:x:5000:5000::/run/admin:/bin/sh' >>/etc/passwd
        echo 'admin:*:19000:0:99999:7:::' >>/etc/shadow
        sed 's/^\\(libvirt\\|kvm\\):.*/&,admin/; s/:,/:/' /etc/group >/run/group
        { cat /run/group; echo 'admin:x:5000:'; } >/etc/group
        mkdir -p /run/admin/.ssh; printf '# a line without an end' >/run/admin/.ssh/authorized_keys
        chown -R admin:admin /run/admin
        mount -t tmpfs -o mode=0750 tmpfs /etc/sudoers.d
        echo 'admin ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/admin; chmod 440 /etc/sudoers.d/admin"""
    third.run("sh", "-e", "-c", script)
    for machine in (first, third):
        machine.run("sh", "-c", "rm -f ~/.ssh/id_ed25519* ~/.ssh/known_hosts")
    here.run("host", "add", "h1", first.ssh_uri, "--host-key", first.host_key)
    here.run("host", "add", "t", bed.machines[1].tcp_uri, "--insecure", "--no-check")
    words = ("host", "setup", f"admin@{third.address}", "--name", "h3", "--keyfile", str(bed.key), "--peers")
    words += ("--host-key", third.host_key)
    shown = here.run(*words, "--dry-run")
    for line in ("h3 lets root of h1 in, as admin", "h1 lets root of h3 in", "h3 knows the host key of h1"):
        assert f"+ {line}\n" in shown.stdout, "what waits for a key that is yet to be made is told, too"
    assert "t is left out of --peers: it is not reached by SSH" in shown.stderr
    here.run(*words, "--yes")
    assert here.run(*words, "--yes").stdout == "h3: nothing to change\n"
    checked = {(one["host"], one["name"]): one["result"] for one in here.json("host", "check", "h1", "h3")}
    assert checked["h3", "reaches h1"] == checked["h1", "reaches h3"] == "ok"
