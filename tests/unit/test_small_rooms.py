"""Waiting, settings, locks, addresses, output: the small pure rooms."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import png
from vmctl import config, guest, locks, networks, picture, progress, render, seed, ssh, ui
from vmctl.errors import (
    Conflict,
    HostUnreachable,
    Interrupted,
    SpecError,
    VmctlError,
    WaitTimeout,
    WrongState,
    quietly,
)
from vmctl.events import Progress, StageBegan, StageDone, StageGoesOn, Step, Warned, bytes_in_words
from vmctl.hypervisor.domain import State
from vmctl.order import natural
from vmctl.wait import wait_until


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_wait_probes_at_least_once() -> None:
    clock = Clock()
    assert wait_until(lambda: "yes", what="x", timeout_s=0, clock=clock, sleep=clock.sleep) == "yes"


def test_wait_probes_once_more_at_the_very_end() -> None:
    clock = Clock()
    probe = lambda: clock.now >= 101.0  # noqa: E731
    assert wait_until(probe, what="x", timeout_s=1.0, interval_s=0.7, clock=clock, sleep=clock.sleep)


def test_wait_is_bounded_and_carries_evidence() -> None:
    clock = Clock()
    with pytest.raises(WaitTimeout) as caught:
        wait_until(
            lambda: None,
            what="x",
            timeout_s=2,
            interval_s=0.5,
            evidence=lambda: ["seen: nothing"],
            clock=clock,
            sleep=clock.sleep,
        )
    assert caught.value.after_s == 2.0 and caught.value.evidence == ("seen: nothing",) and caught.value.exit_code == 7


def test_uri_precedence() -> None:
    settings = config.Settings(connect="qemu:///config")
    env = {"VMCTL_CONNECT": "qemu:///ours", "LIBVIRT_DEFAULT_URI": "qemu:///theirs"}

    def chosen(flag: str | None, env: dict[str, str]) -> str:
        found = config.chosen(flag, settings, env)
        assert found is not None
        return found.uri

    assert chosen("qemu:///flag", env) == "qemu:///flag"
    assert chosen(None, env) == "qemu:///ours"
    assert chosen(None, {"LIBVIRT_DEFAULT_URI": "qemu:///theirs"}) == "qemu:///theirs"
    assert chosen(None, {}) == "qemu:///config"
    assert config.chosen(None, config.Settings(), {}) is None


def test_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    assert config.load(path) == config.Settings()
    path.write_text('connect = "qemu:///session"\nnetwork = "lab"\n')
    assert config.load(path) == config.Settings(connect="qemu:///session", network="lab")
    for bad in ("colour = 'red'", "network = 3", "not toml", "\x00"):
        path.write_text(bad)
        with pytest.raises(SpecError):
            config.load(path)


def test_config_names_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("a = 1\nnetwork = 2\n")
    with pytest.raises(SpecError) as caught:
        config.load(path)
    assert len(caught.value.problems) == 2


def test_a_lock_excludes_and_dies_with_its_process(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, sys, pathlib\nfrom vmctl import locks\n"
            "with locks.held(pathlib.Path(sys.argv[1]), 'x'):\n print('held', flush=True)\n signal.pause()",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(Conflict), locks.held(tmp_path, "x"):
            pass
        with locks.held(tmp_path, "y"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locks.held(tmp_path, "x"):
        pass


def test_subnet_avoids_routes() -> None:
    table = (
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "eth0\t00004D0A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
    )
    routes = networks.parse_routes(table)
    assert routes == (ipaddress.IPv4Network("10.77.0.0/16"),)
    assert networks.pick_subnet(routes) == ipaddress.IPv4Network("10.78.0.0/22")
    with pytest.raises(Conflict):
        networks.pick_subnet([ipaddress.IPv4Network("10.0.0.0/8")])


@given(st.uuids(), st.sets(st.integers(0, networks.ADDRESSES - 1), max_size=30))
def test_macs_are_free_and_have_an_address(ident: uuid.UUID, taken: set[int]) -> None:
    known = networks.macs("host", "net")
    used = {known[n] for n in taken}
    mac = networks.pick_mac(known, str(ident), used)
    assert mac in known and mac not in used


def test_every_mac_has_its_own_address_outside_the_first_ten() -> None:
    subnet = next(networks.candidate_subnets())
    kept = networks.reservations(subnet, "host", "net")
    assert len(kept) == networks.ADDRESSES == len({e.mac for e in kept}) == len({e.address for e in kept})
    assert all(ipaddress.IPv4Address(e.address) in list(subnet)[11:-1] for e in kept)
    assert subnet.num_addresses - 20 > 2 * len(kept), "as many may come from other hosts"
    # Unicast, locally administered, and not libvirt's own range.
    assert all(int(e.mac[:2], 16) & 3 == 2 and not e.mac.startswith("52:54:00:") for e in kept)
    # Another subnet, after a move, keeps them; another host or network has others.
    moved = networks.reservations(ipaddress.IPv4Network("10.80.0.0/22"), "host", "net")
    assert [e.mac for e in moved] == [e.mac for e in kept]
    assert not set(networks.macs("host", "other")) & set(networks.macs("host", "net"))


def test_a_full_network_is_a_conflict() -> None:
    known = networks.macs("host", "net")
    with pytest.raises(Conflict):
        networks.pick_mac(known, str(uuid.uuid4()), set(known))


def test_what_vms_that_are_away_may_have_is_given_last() -> None:
    known = networks.macs("host", "net")
    ident = str(uuid.UUID(int=7))
    assert networks.pick_mac(known, ident, (), {known[7]}) == known[8]
    assert networks.pick_mac(known, ident, {known[8]}, {known[7]}) == known[9]
    assert networks.pick_mac(known, ident, (), set(known)) == known[7]


@pytest.mark.parametrize("name", ["vmctl", "a-very-long-network-name", "x_y.z", "---"])
def test_bridge_names_fit_the_kernel(name: str) -> None:
    first = networks.pick_bridge(name, ())
    assert len(first) <= 15
    assert networks.pick_bridge(name, {first}) != first


@given(st.text(min_size=1).filter(lambda t: "\r" not in t), st.lists(st.text(), max_size=3))
def test_user_data_is_yaml_that_says_the_same(hostname: str, commands: list[str]) -> None:
    import yaml

    seed = render.SeedView(
        "id-1", hostname, ("ssh-ed25519 AAAA x",), "-----BEGIN\nAAAA\n-----END", "ssh-ed25519 B", tuple(commands)
    )
    text = render.user_data(seed)
    assert text.startswith("#cloud-config\n")
    found = yaml.safe_load(text)
    assert found["hostname"] == hostname
    assert found.get("runcmd", []) == commands
    assert found["ssh_keys"]["ed25519_private"].strip() == "-----BEGIN\nAAAA\n-----END"
    assert yaml.safe_load(render.meta_data(seed)) == {"instance-id": "id-1", "local-hostname": hostname}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("web1:/etc", guest.Place("web1", "/etc")),
        ("web1:", guest.Place("web1", ".")),
        ("./a:b", guest.Place(None, "./a:b")),
        ("/tmp/x", guest.Place(None, "/tmp/x")),
        ("file", guest.Place(None, "file")),
        (":x", guest.Place(None, ":x")),
    ],
)
def test_places(text: str, place: guest.Place) -> None:
    assert guest.parse_place(text) == place


def test_console_text_is_plain() -> None:
    assert guest.plain("\x1b[1;31mred\x1b[0m\r\n\x1b[2Jx") == "red\nx"


@dataclass(frozen=True)
class Thing:
    name: str
    path: Path
    inner: tuple[int, ...]
    share: float


def test_json_is_the_same_object(capsys: pytest.CaptureFixture[str]) -> None:
    thing = Thing("é", Path("/x"), (1, 2), 0.123456)
    ui.emit([thing], ui.Output.JSON, lambda: "", lambda: [])
    assert json.loads(capsys.readouterr().out) == [{"name": "é", "path": "/x", "inner": [1, 2], "share": 0.123}]
    ui.emit([thing], ui.Output.NAME, lambda: "", lambda: ["é"])
    assert capsys.readouterr().out == "é\n"


def test_a_table_cannot_be_broken_by_its_content() -> None:
    text = ui.columns(("A", "B"), [("x\ny", "\x1b[31m"), ("", "z")])
    assert text.splitlines() == ["A     B", "x\\ny  \\x1b[31m", "-     z"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (512, "512 B"), (65536, "64.0 KiB"), (192 << 20, "192.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_no_amount_of_bytes_is_told_as_nothing(count: int, text: str) -> None:
    assert bytes_in_words(count) == text == ui.size(count)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0.4, "0s"), (59, "59s"), (61, "1m01s"), (3700, "1h01m"), (90000, "1d01h")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert ui.duration(seconds) == text


def test_the_rate_counts_only_what_came_since(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download that goes on at 900 MiB did not fetch those in its first seconds, and one begun again none yet."""
    clock = iter((0.0, 10.0, 20.0, 30.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    tell, mib = progress.reporter(), 1 << 20
    for done in (900, 910, 0, 100):
        tell(Progress("x", done * mib, 1000 * mib))
    assert capsys.readouterr().err.splitlines() == [
        "x: 910.0 MiB of 1000.0 MiB (91 %), 1.0 MiB/s, 1m30s to go",
        "x: 0 B of 1000.0 MiB (0 %)",
        "x: 100.0 MiB of 1000.0 MiB (10 %), 10.0 MiB/s, 1m30s to go",
    ]


def test_a_bar_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with open(slave, "w") as terminal:  # noqa: PTH123  a descriptor
        monkeypatch.setattr(sys, "stderr", terminal)
        tell = progress.reporter()
        for done in (0, 1, 2):
            monkeypatch.setattr(progress, "_BAR_EVERY_S", 0.0)
            tell(Progress("an-image-with-a-long-name-0123456789ab.qcow2", done << 20, 4 << 20))
        tell(StageBegan("a-vm-of-a-long-name-indeed: cloud-init", 1.0))
        said = ""
        while said.count("\r") < 4 or len(said.rpartition("\r\x1b[K")[2]) < 39:
            said += os.read(master, 4096).decode()
    os.close(master)
    parts = [part for part in said.split("\r\x1b[K") if part]
    assert len(parts) == 4 and all(len(part) == 39 for part in parts), parts


def test_a_stage_that_goes_on_is_told_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = [StageBegan("ssh", 0.0), StageGoesOn("ssh", 1.0), StageGoesOn("ssh", 2.0), StageDone("ssh", 2.5, 2.5)]
    for event in waits:
        progress.reporter()(event)
    assert capsys.readouterr().err == "  ssh        2.50 s   at   2.50 s\n"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(slave, "w") as terminal:  # noqa: PTH123  a descriptor
        monkeypatch.setattr(sys, "stderr", terminal)
        tell = progress.reporter()
        for event in waits:
            tell(event)
        said = ""
        while "\n" not in said:
            said += os.read(master, 4096).decode()
    os.close(master)
    assert [part.split()[2] for part in said.split("\r\x1b[K") if "so far" in part] == ["0.0", "1.0", "2.0"]
    assert said.endswith("\r\x1b[K  ssh        2.50 s   at   2.50 s\r\n")


def test_numbers_in_names_are_ordered_as_numbers() -> None:
    plain = ["a", "a10", "a2b", "node-02", "node-10", "node-10-1", "node-2"]
    assert sorted(plain, key=natural) == ["a", "a2b", "a10", "node-02", "node-2", "node-10", "node-10-1"]


@given(st.text("ab-01.9"), st.text("ab-01.9"))
def test_no_two_names_are_alike_in_their_order(one: str, other: str) -> None:
    assert (natural(one) == natural(other)) == (one == other)
    assert (natural(one) < natural(other)) or (natural(other) < natural(one)) or one == other


def test_plain_progress_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    tell = progress.reporter()
    for event in (Step("did it"), StageDone("ssh", 1.0, 2.0, "10.0.0.1"), Progress("x", 1, 10), Progress("x", 10, 10)):
        tell(event)
    err = capsys.readouterr().err
    assert "did it\n" in err and "ssh" in err and "10.0.0.1" in err and "\r" not in err and "\x1b" not in err


def test_a_note_is_one_line_with_its_mend_and_quiet_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    warned = Warned("running on TCG: reasons", "mend: vmctl host info")
    progress.reporter()(warned)
    assert capsys.readouterr().err == "note: running on TCG: reasons (mend: vmctl host info)\n"
    tell = progress.reporter(ui.Verbosity.QUIET)
    tell(Step("chatter"))
    tell(warned)
    assert capsys.readouterr().err == ""


@pytest.fixture(autouse=True)
def _no_color(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NO_COLOR", "1")
    yield


def test_a_ppm_picture_becomes_png() -> None:
    pixels = os.urandom(3 * 5 * 7)
    made = picture.png("image/x-portable-pixmap", b"P6\n# by a guest\n5 7\n255\n" + pixels)
    assert png.decode(made) == (5, 7, pixels)
    assert picture.png("image/png", made) == made


@pytest.mark.parametrize(
    "data", [b"", b"P6\n5 7\n255\n" + bytes(104), b"P3\n1 1\n255\n0 0 0", b"P6\n0 0\n255\n", b"P6 999999 1 255 "]
)
def test_a_picture_cut_short_or_of_another_kind_is_refused(data: bytes) -> None:
    with pytest.raises(VmctlError, match="cannot read the screen's picture"):
        picture.png("image/x-portable-pixmap", data)


@pytest.mark.parametrize("module", ["vmctl.ui", "vmctl.cli.app"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_loaded_ends_it_with_one_line(module: str, number: int) -> None:
    script = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), {number})\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from vmctl.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "version"], capture_output=True, text=True, timeout=60)
    said = "interrupted\n" if number == signal.SIGINT else "stopped on request (SIGTERM)\n"
    assert (done.returncode, done.stderr) == (130, said)


def test_who_may_not_look_into_a_folder_cannot_share_it_by_9p(tmp_path: Path) -> None:
    from vmctl.share import barred_at

    (tmp_path / "closed/in").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    found = barred_at(tmp_path / "closed/in", "nobody")
    assert found is not None and (tmp_path / "closed").is_relative_to(found)
    assert barred_at(Path("/usr"), "nobody") is None
    assert barred_at(tmp_path / "closed/in", "root") is None


def test_a_lease_is_told_by_the_clock_on_the_wall() -> None:
    from vmctl.hypervisor.network import Lease
    from vmctl.readiness import _told

    text = _told(Lease("52:54:00:00:00:01", "10.0.0.5", "", 1_795_638_292), 1_795_638_292 - 1500)
    assert re.fullmatch(r"10\.0\.0\.5, until 2026-11-2\d \d\d:\d\d:\d\d \S+, 25 min left", text), text
    assert _told(Lease("", "10.0.0.5", "", 1_000_000_000), 1_795_638_292).endswith(", over")
    assert _told(Lease("", "10.0.0.5", "", 0), 0.0) == "10.0.0.5, for ever"


def test_a_panic_is_found_above_its_trace() -> None:
    lines = ["[1.0] Kernel panic - not syncing: old", "boot", "[9.5] Kernel panic - not syncing: new", "[9.5] </TASK>"]
    assert guest.panic_line(lines) == "[9.5] Kernel panic - not syncing: new"
    assert guest.panic_line(["login:"]) == ""


def test_when_a_guests_answer_is_no_longer_to_be_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short pause is nothing; a long one, an end, a panic and a long silence are; a lost daemon tells nothing."""
    states: list[object] = []

    def state(_conn: object, _name: str) -> tuple[State, str]:
        found = states.pop(0)
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[return-value]

    now = [0.0]
    monkeypatch.setattr(guest.domain, "state", state)
    vigil = guest.Vigil(SimpleNamespace(conn=None), "web1", clock=lambda: now[0])  # type: ignore[arg-type]

    def at(seconds: float, found: object, silent_s: float = 0.0) -> None:
        now[0] = seconds
        states.append(found)
        vigil(silent_s)

    at(0, (State.RUNNING, ""))
    at(1, (State.PAUSED, "asked"))
    at(30, (State.PAUSED, "asked"))
    at(31, (State.RUNNING, ""))
    at(32, (State.PAUSED, "asked"))
    at(60, HostUnreachable("cannot ask"))
    at(61, (State.PAUSED, "asked"))
    with pytest.raises(WrongState, match="it is paused now"):
        at(91, (State.PAUSED, "asked"))
    with pytest.raises(WrongState, match=r"crashed \(guest panicked\)"):
        at(92, (State.CRASHED, "guest panicked"))
    with pytest.raises(WrongState, match="it is stopped now"):
        at(93, (State.STOPPED, ""))
    monkeypatch.setattr(guest, "unanswered", lambda _host, _name, why: HostUnreachable(why))
    at(94, (State.RUNNING, ""), silent_s=119.0)
    with pytest.raises(HostUnreachable, match="no sign of life for 120 s"):
        at(95, (State.RUNNING, ""), silent_s=120.0)


def test_what_copes_with_failures_does_not_swallow_an_interrupt() -> None:
    def fails() -> None:
        raise WrongState("cannot do it: it is off")

    def is_stopped() -> None:
        raise Interrupted("stopped on request (SIGTERM)")

    quietly(fails)
    with pytest.raises(Interrupted):
        quietly(is_stopped)
    assert not issubclass(Interrupted, Exception), "nor does any other handler of errors"


def test_the_kernels_neighbours_are_read_without_those_it_only_looks_for(tmp_path: Path) -> None:
    from vmctl.listing import neighbours

    head = "IP address       HW type     Flags       HW address            Mask     Device\n"
    one = "10.0.0.7         0x1         0x2         52:54:00:AA:bb:01     *        br0\n"
    sought = "10.0.0.8         0x1         0x0         00:00:00:00:00:00     *        br0\n"
    (tmp_path / "arp").write_text(f"{head}{one}{sought}")
    assert neighbours(tmp_path / "arp") == {"52:54:00:aa:bb:01": "10.0.0.7"}
    assert neighbours(tmp_path / "none") == {}


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
def test_a_key_of_the_users_is_of_any_kind(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "lab.key"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", path], check=True)
    public = seed.public_key(path).split()
    assert ssh.private_key(path).get_base64() == public[1]
    assert seed.authorized_keys(path, tmp_path)[0].split()[:2] == public[:2]


def test_a_key_of_the_users_that_is_of_no_use(tmp_path: Path) -> None:
    locked, text = tmp_path / "locked", tmp_path / "text"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", locked], check=True)
    text.write_text("no key")
    for path, why in (
        (locked, f"cannot use SSH key {locked}: it has a passphrase"),
        (text, f"cannot use SSH key {text}: it is no private key"),
        (tmp_path / "gone", f"cannot read SSH key {tmp_path / 'gone'}: No such file or directory"),
    ):
        with pytest.raises(SpecError) as caught:
            ssh.private_key(path)
        assert caught.value.message == why and "ssh_key" in caught.value.hint
    with pytest.raises(SpecError, match="cannot read SSH public key .*gone.pub: No such file"):
        seed.authorized_keys(tmp_path / "gone", tmp_path)


def test_a_home_where_no_key_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VmctlError, match="cannot keep an SSH key in .*: Not a directory"):
        seed.client_key(tmp_path / "file" / "vmctl", tmp_path)
