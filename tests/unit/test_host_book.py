"""Hosts in the config file, and how they are reached."""

from __future__ import annotations

import socket
import tomllib
from pathlib import Path

import pytest

from vmctl import config, host_add, host_book, host_ssh, hosts
from vmctl.cli import run
from vmctl.cli.options import on_host, tell_of_hosts
from vmctl.config import Folders, HostEntry, Settings
from vmctl.errors import Conflict, HostUnreachable, NotFound, PartialFailure, SpecError, VmctlError

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ2m3tqF7Qq3b0m7cXW5w0m3F4yZ1QmXyq0m1u8Hq2xS"
FILE = """# mine
connect = "one"  # the first

[host.one]
uri = "qemu+ssh://root@one/system"

# about two
[host.two]
uri = "qemu+tls://two/system"
"""


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path, tmp_path, tmp_path, tmp_path / "run")


def write(folders: Folders, text: str) -> Path:
    path = folders.config / "config.toml"
    path.write_text(text)
    return path


def test_add_and_remove_leave_the_rest_to_the_letter(folders: Folders) -> None:
    path = write(folders, FILE)
    path.chmod(0o640)
    entry = HostEntry("three", "qemu+ssh://root@three/system", KEY, peer='qemu+ssh://three/system?no_tty="1"')
    host_book.add(folders, entry)
    assert path.read_text().startswith(FILE) and path.stat().st_mode & 0o777 == 0o640
    assert config.load(path).hosts["three"] == entry
    assert host_book.remove(folders, "three") == entry
    assert path.read_text().rstrip() == FILE.rstrip()
    host_book.remove(folders, "one")
    assert "# mine" in path.read_text() and "root@one" not in path.read_text()
    assert set(config.load(path).hosts) == {"two"}


def test_the_host_that_connect_names_is_removed(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folders.config))
    (folders.config / "vmctl").mkdir()
    (folders.config / "vmctl/config.toml").write_text(FILE)
    for name, named in (("two", False), ("one", True)):
        assert run(["host", "remove", name]) == 0
        assert ("`connect` in the config file still names it" in capsys.readouterr().err) is named


def test_line_ends_are_left_too(folders: Folders) -> None:
    path = folders.config / "config.toml"
    before = FILE.replace("\n", "\r\n").replace("mine", "m\u00efne").encode()
    path.write_bytes(before)
    host_book.add(folders, HostEntry("three", "qemu:///system"))
    host_book.remove(folders, "three")
    assert path.read_bytes().rstrip() == before.rstrip()


def test_a_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / ("x" * 300), "File name too long")):
        with pytest.raises(SpecError, match=f"cannot read config file .*: {why}"):
            config.load(path)
    for nothing in (tmp_path / "none", tmp_path / "file/config.toml"):
        (tmp_path / "file").touch()
        assert config.load(nothing) == config.Settings()


def test_the_first_host_makes_the_file(folders: Folders) -> None:
    host_book.add(folders, HostEntry("one", "qemu:///system"))
    assert tomllib.loads((folders.config / "config.toml").read_text()) == {"host": {"one": {"uri": "qemu:///system"}}}


def test_what_is_refused(folders: Folders) -> None:
    write(folders, FILE)
    with pytest.raises(Conflict, match="has it already"):
        host_book.add(folders, HostEntry("one", "qemu:///system"))
    with pytest.raises(NotFound, match="none of that name"):
        host_book.remove(folders, "ten")
    path = write(folders, 'host = { one = { uri = "qemu:///system" } }\n')
    with pytest.raises(SpecError, match="a way of their own"):
        host_book.remove(folders, "one")
    assert path.read_text() == 'host = { one = { uri = "qemu:///system" } }\n'
    write(folders, 'host = "x"\nwrong = 1\n')
    with pytest.raises(SpecError, match=r"unknown key 'wrong'; host is not made of tables"):
        config.load(path)
    write(folders, "[host.one]\nurl = 1\npeer = 2\n")
    with pytest.raises(SpecError, match=r"unknown key 'url' in \[host.one\]; peer in .* not a string; no uri in"):
        config.load(path)


def test_names_and_uris(folders: Folders) -> None:
    settings = config.load(write(folders, FILE))
    assert config.entry("one", settings).uri == "qemu+ssh://root@one/system"
    assert config.entry("qemu:///session", settings) == HostEntry("", "qemu:///session")
    with pytest.raises(NotFound, match="cannot find host ten") as caught:
        config.entry("ten", settings)
    assert caught.value.hint == "known: one, two"


def test_a_host_is_told_of_by_its_name() -> None:
    far = HostEntry("far", "qemu+tcp://127.0.0.1:1/system?mode=direct")
    assert config.by_name(f"cannot ask {far.uri}: no", far) == "cannot ask far: no"
    assert config.by_name(f"at {far.uri}.", far._replace(uri="qemu+tcp://127.0.0.1:1/system")) == f"at {far.uri}."
    with pytest.raises(HostUnreachable, match="^cannot connect to far: "):
        hosts.open_entry(far, Settings(), config.folders())
    missing, several = NotFound(f"cannot find x: {far.uri} has none"), Conflict(f"VM x on {far.uri}: at it")
    tell_of_hosts(PartialFailure("some", failures={"x": missing, "y": several}), [far], [])
    assert (missing.message, several.message) == ("cannot find x: far has none", "VM x on far: at it")


def test_who_named_no_host_is_told_which_there_are() -> None:
    for entries, hint in (
        ([HostEntry("one", "qemu:///session")], "see `vmctl list --all-hosts`"),
        ([HostEntry("", "qemu:///system")], "see `vmctl list --all-hosts`; hosts: two, three"),
    ):
        absent = NotFound("cannot find VM x: none", missing="VM", hint="see `vmctl list`")
        tell_of_hosts(absent, entries, ["two", "three"])
        assert absent.hint == hint


def test_a_uri_that_cannot_be_taken_apart(folders: Folders) -> None:
    broken = "qemu+ssh://[::1/system"
    with pytest.raises(SpecError, match="it is no URI"):
        config.entry(broken, config.load(write(folders, FILE)))
    for key in ("uri", "peer"):
        table = {"uri": "qemu:///system", key: broken}
        path = write(folders, "[host.one]\n" + "".join(f'{one} = "{uri}"\n' for one, uri in table.items()))
        with pytest.raises(SpecError, match=rf"{key} in \[host.one\] is no URI"):
            config.load(path)
    wish = host_add.Wish("one", broken, KEY, "", broken)
    assert [one.split(" is ")[1][:6] for one in host_add.problems(wish)] == ["no URI", "no URI"]


def test_what_is_no_host(folders: Folders) -> None:
    for uri in ("http://h/x", "test:///default", "qemu+carrier-pigeon://h/system", ""):
        wish = host_add.Wish("one", uri, peer="" if uri else "ftp://h")
        assert "is no URI of a libvirt host" in "; ".join(host_add.problems(wish))
        path = write(folders, f'[host.one]\nuri = "{uri}"\nbogus = 1\n')
        with pytest.raises(SpecError) as caught:
            config.load(path)
        wrong = ["unknown key 'bogus' in [host.one]", f"uri in [host.one] is no URI of a libvirt host: {uri!r}"]
        assert list(caught.value.problems) == wrong
    for name in ("auto", "../a", "qemu:///system", ""):
        with pytest.raises(SpecError, match="is no name for a host"):
            config.load(write(folders, f'[host."{name}"]\nuri = "qemu:///system"\n'))
    for address in ("a b", "10.0.0.1:49152", "/x"):
        assert host_add.problems(host_add.Wish("one", "qemu:///system", address=address)) == [
            f"--address {address!r} is no address"
        ]
        with pytest.raises(SpecError, match=r"address in \[host.one\] is none"):
            config.load(write(folders, f'[host.one]\nuri = "qemu:///system"\naddress = "{address}"\n'))
    for address in ("fe80::1", "[fe80::1]", "10.0.0.1", "big.example", ""):
        assert host_add.problems(host_add.Wish("one", "qemu:///system", address=address)) == []


def test_a_config_file_that_cannot_be_written_says_what_to_write(folders: Folders) -> None:
    """As one that is made by something else, in a place that is read-only."""
    sealed = folders._replace(config=Path("/proc/self/fdinfo"))
    with pytest.raises(VmctlError, match=r"cannot write config file /proc/\d+/fdinfo/config.toml: ") as caught:
        host_book.add(sealed, HostEntry("one", "qemu:///system"))
    assert caught.value.hint == 'make it writable, or write [host.one] with uri = "qemu:///system" where it is made'


@pytest.mark.parametrize(
    ("hint", "told"),
    [
        ("see `vmctl list`", "see `vmctl -c 'a b' list`"),
        ("vmctl start x, or vmctl -c h2 stop x", "vmctl -c 'a b' start x, or vmctl -c h2 stop x"),
        ("is it another vmctl? `vmctl creates` none", "is it another vmctl? `vmctl creates` none"),
        ("vmctl host add NAME URI", "vmctl host add NAME URI"),
        ("run vmctl there", "run vmctl there"),
        ("see `vmctl list --all-hosts`", "see `vmctl list --all-hosts`"),
    ],
)
def test_what_a_hint_names_is_for_the_host_that_was_given(hint: str, told: str) -> None:
    assert on_host(hint, "a b") == told


def test_who_named_a_host_that_is_none(folders: Folders) -> None:
    settings = config.load(write(folders, 'connect = "three"\n' + FILE.partition('connect = "one"')[2]))
    assert config.chosen("one", settings, {"VMCTL_CONNECT": "nosuch"}) == settings.hosts["one"]
    for env, by in (
        ({"VMCTL_CONNECT": "nosuch", "LIBVIRT_DEFAULT_URI": "none"}, "VMCTL_CONNECT names it; known: one, two"),
        ({"LIBVIRT_DEFAULT_URI": "none"}, "LIBVIRT_DEFAULT_URI names it; known: one, two"),
        ({}, "`connect` in the config file names it; known: one, two"),
    ):
        with pytest.raises(NotFound) as caught:
            config.chosen(None, settings, env)
        assert caught.value.hint == by
    with pytest.raises(SpecError, match="no URI of libvirt's") as wrong:
        config.chosen(None, settings, {"VMCTL_CONNECT": "http://h"})
    assert "VMCTL_CONNECT names it" in wrong.value.hint
    assert config.chosen(None, config.Settings(), {}) is None


def test_the_way_there_knows_the_pinned_key_alone(folders: Folders) -> None:
    entry = HostEntry("one", "qemu+ssh://root@10.0.0.1:2222/system?keyfile=/k", KEY)
    uri = host_ssh.through(entry, folders.runtime)
    assert uri == f"{entry.uri}&command={folders.runtime}/host-one.ssh"
    script = (folders.runtime / "host-one.ssh").read_text()
    assert script.startswith("#!/bin/sh\ntrap '' INT TERM\nexec ssh -o ")
    for part in ("StrictHostKeyChecking=yes", "GlobalKnownHostsFile=/dev/null", "HostKeyAlias=one", "BatchMode=yes"):
        assert part in script
    assert (folders.runtime / "host-one.keys").read_text() == f"one {KEY}\n"
    argv = host_ssh.argv(entry, folders.runtime, "echo", "a b")
    assert argv[-9:] == ["-l", "root", "-p", "2222", "-i", "/k", "--", "10.0.0.1", "echo 'a b'"]
    assert host_ssh.elsewhere(entry) == "qemu+ssh://root@10.0.0.1:2222/system"
    assert host_ssh.address(entry) == "10.0.0.1"
    known_elsewhere = HostEntry("", "qemu+ssh://two/system")
    assert host_ssh.through(known_elsewhere, folders.runtime).endswith(f"?command={folders.runtime}/hosts.ssh")
    assert (folders.runtime / "hosts.ssh").read_text() == "#!/bin/sh\ntrap '' INT TERM\nexec ssh \"$@\"\n"
    with_its_own = HostEntry("three", "qemu+ssh://three/system?command=/usr/local/bin/ssh", KEY)
    assert host_ssh.through(with_its_own, folders.runtime) == with_its_own.uri
    assert host_ssh.through(HostEntry("two", "qemu+tls://two/system"), folders.runtime) == "qemu+tls://two/system"


def test_what_a_note_names_is_opened_by_ssh_alone_and_asks_nobody() -> None:
    """A definition from elsewhere says what it likes, and a URI of libvirt's may hold a command to run here."""
    for plain in (
        "qemu+ssh://root@10.0.0.1:2222/system?keyfile=/k",
        "qemu+ssh://u@[fe80::1%25eth0]/session?keyfile=/k",
    ):
        assert host_ssh.unattended(plain) == f"{plain}&no_tty=1"
    assert host_ssh.unattended("qemu+ssh://h-1.example/system") == "qemu+ssh://h-1.example/system?no_tty=1"
    for not_so in (
        "qemu+ssh://h/system?command=/tmp/evil",
        "qemu+ssh://h/system?keyfile=/k&command=/tmp/evil",
        "qemu+ssh://h/system?no_verify=1",
        "qemu+ssh://h/system?command=",
        "qemu+ssh://-oProxyCommand=evil/system",
        "qemu+ssh://-evil@h/system",
        "qemu+ssh://u:password@h/system",
        "qemu+ssh:///system",
        "qemu+ssh://h:port/system",
        "qemu+ssh://h/embed",
        "qemu+ext://h/system?command=/tmp/evil",
        "qemu+tcp://h/system",
        "qemu+unix:///system?socket=/tmp/evil",
        "qemu:///system",
        "qemu+ssh://[h/system",
        "",
    ):
        assert not host_ssh.unattended(not_so), not_so


def test_keys() -> None:
    assert host_ssh.known_as(host_ssh.place("qemu+ssh://root@h/system")) == "h"
    assert host_ssh.known_as(host_ssh.place("qemu+ssh://root@h:2222/system")) == "[h]:2222"
    assert host_ssh.checked_key(f"one,10.0.0.1 {KEY} root@one") == KEY
    assert host_ssh.fingerprint(KEY).startswith("SHA256:") and "=" not in host_ssh.fingerprint(KEY)
    for wrong in ("qemu+ssh:///system", "qemu+ssh://-F.config/system", "qemu+ssh://root@-v/system"):
        with pytest.raises(SpecError, match="it names no host"):
            host_ssh.place(wrong)
    for wrong in ("", "ssh-ed25519", "ssh-ed25519 !!", "hello world"):
        with pytest.raises(SpecError, match="cannot use SSH host key"):
            host_ssh.checked_key(wrong)


def test_all_that_is_wrong_with_a_wish() -> None:
    wish = host_add.Wish("no name", "qemu+tcp://h/system", KEY, "MD5:x", "ftp://h")
    found = "; ".join(host_add.problems(wish))
    for part in ("no name", "neither encrypted", "ftp://h", "qemu+ssh only", "SHA256:"):
        assert part in found
    assert host_add.problems(host_add.Wish("one", "qemu+tcp://h/system", insecure=True)) == []


def test_a_host_that_shows_no_key_is_told_with_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for host, port_, why, mend in (
        ("127.0.0.1", port, "Connection refused", "no SSH server listens there"),
        ("no..such", 22, "", "no name server and no hosts file knows that name"),
    ):
        with pytest.raises(HostUnreachable) as told:
            host_ssh.offered(host_ssh.place(f"qemu+ssh://root@{host}:{port_}/system"))
        assert why in told.value.message and mend in told.value.hint and "--host-key" in told.value.hint, told.value
