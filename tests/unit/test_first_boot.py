"""User-data parts, network-config, what cloud-init's own files say, and what is refused."""

from __future__ import annotations

import email
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from vmctl import cloud_init, render, spec, user_data
from vmctl.cli.first_boot import read_text, read_user_data
from vmctl.cloud_init import Status
from vmctl.errors import SpecError
from vmctl.seed_disk import WENT_ON, first_boot_is_kept, tells_that_first_boot_is_over
from vmctl.spec import VM, Nic

OURS = "#cloud-config\nhostname: web1\nruncmd:\n  - ours\nssh_keys:\n  ed25519_private: |\n    A\n    B\n"


def test_cloud_configs_are_merged_into_one() -> None:
    text = user_data.combined(
        OURS, ["#cloud-config\nruncmd: [a]\nx: {b: 1}\n", "#cloud-config\nx: {c: 2}\nhostname: w\n"]
    )
    assert text.startswith("#cloud-config\n")
    found = yaml.safe_load(text)
    assert found["runcmd"] == ["ours", "a"] and found["x"] == {"b": 1, "c": 2} and found["hostname"] == "w"
    assert found["ssh_keys"]["ed25519_private"] == "A\nB\n" and "|" in text
    assert user_data.combined(OURS, []) == OURS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ nope }}", "'nope' is undefined"),
        ("x\n{% if %}", ", line 2: "),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{% include '/etc/shadow' %}", "no loader"),
        ("{{ ''.__class__ }}", "unsafe"),
        ("{{ name.nope() }}", "has no attribute 'nope'"),
        ("{% for i in range(999999999) %}{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_bad_input(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "u.j2"
    path.write_text(text)
    with pytest.raises(SpecError, match=f"cannot fill in user-data {path}.*{said}"):
        read_user_data([path], [], "web1")


def test_an_empty_file_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "n.yaml").write_text("\n")
    with pytest.raises(SpecError, match=f"cannot use network-config {tmp_path}/n.yaml: it is empty"):
        read_text(tmp_path / "n.yaml", "network-config")
    assert read_text(None, "network-config") == ""


def test_variables_need_user_data() -> None:
    with pytest.raises(SpecError, match="no user-data"):
        read_user_data([], ["a=b"], "web1")


def test_other_parts_make_it_multipart() -> None:
    text = user_data.combined(OURS, ["#!/bin/sh\necho é\n", "#cloud-config\nruncmd: [a]\n"])
    message = email.message_from_string(text)
    kinds = [part.get_content_type() for part in message.walk() if not part.is_multipart()]
    assert kinds == ["text/cloud-config", "text/x-shellscript"]
    parts = [part.get_payload(decode=True).decode() for part in message.walk() if not part.is_multipart()]  # type: ignore[union-attr]
    assert yaml.safe_load(parts[0])["runcmd"] == ["ours", "a"] and parts[1] == "#!/bin/sh\necho é\n"
    assert user_data.needs_cloud_init(["#!/bin/sh\n"]) and not user_data.needs_cloud_init(["#cloud-config\n{}\n"])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"user_data": ("hello",)}, "begins with none of"),
        ({"user_data": ("#cloud-config\na: [",)}, "is no YAML in line"),
        ({"user_data": ("#cloud-config\n- a\n",)}, "is no mapping"),
        ({"user_data": ("#cloud-config\nssh_keys: {}\n",)}, "sets 'ssh_keys'"),
        ({"user_data": ("#cloud-config\n" + "x" * (1 << 20),)}, "more than 1 MiB"),
        ({"vendor_data": "hello"}, "the vendor-data begins"),
        ({"network_config": "ethernets: {}"}, "no `version: 2`"),
        ({"network_config": "version: 2"}, "has no ethernets"),
        ({"network_config": "version: 1", "nics": (Nic(addresses=("10.0.0.2/24",)),)}, "exclude each other"),
        ({"ignition": "{"}, "is no JSON"),
        ({"user_data": ("#cloud-config\na: " + "[" * 5000,)}, "nested too deeply"),
        ({"network_config": "version: []"}, "no `version: 2`"),
        ({"ignition": "{}"}, "no ignition.version"),
        ({"ignition": '{"ignition": []}'}, "no ignition.version"),
        ({"ignition": "[" * 100_000}, "nested too deeply"),
        ({"user": "Bob B"}, "not a user name"),
        ({"password_hash": "secret"}, "not one of crypt(5)"),
        ({"nics": (Nic(addresses=("10.0.0.2",)),)}, "no prefix length"),
        ({"nics": (Nic(addresses=("10.0.0.0/24",)),)}, "address of its network"),
        ({"nics": (Nic(addresses=("10.0.0.2/24",), gateway="10.1.0.1"),)}, "in none of its networks"),
        ({"nics": (Nic(gateway="10.1.0.1"),)}, "needs an address"),
        ({"nics": (Nic(nameservers=("x",)),)}, "'x' is not an IP address"),
    ],
)
def test_what_is_wrong_with_a_first_boot(fields: dict[str, object], said: str) -> None:
    found = spec.problems(VM("web1", "micro", **fields))  # type: ignore[arg-type]
    assert any(said in problem for problem in found), found
    assert "secret" not in "".join(found)


def test_good_ones_pass() -> None:
    nic = spec.parse_nic(
        "lab,mac=52:54:00:AA:bb:cc,address=10.0.0.2/24,address=fd00::2/64,gateway=10.0.0.1,dns=9.9.9.9"
    )
    vm = VM("web1", "debian-12", nics=(nic,), user="bob", password_hash="$6$abc$" + "x" * 86)
    assert spec.problems(vm) == () and nic.mac == "52:54:00:aa:bb:cc" and "xxx" not in repr(vm)
    for bad in ("lab,foo=1", "lab,mac", "lab,gateway=10.0.0.1,gateway=10.0.0.2"):
        with pytest.raises(SpecError):
            spec.parse_nic(bad)


def test_network_config_says_what_was_asked() -> None:
    cards = [
        render.CardView("52:54:00:00:00:01"),
        render.CardView("52:54:00:00:00:02", ("10.0.0.2/24",), "10.0.0.1", ("9.9.9.9",)),
    ]
    text = render.network_config(cards)
    assert user_data.network_config_problems(text) == []
    first, second = yaml.safe_load(text)["ethernets"].values()
    assert first == {"match": {"macaddress": "52:54:00:00:00:01"}, "dhcp4": True}
    assert second["routes"] == [{"to": "0.0.0.0/0", "via": "10.0.0.1"}] and "dhcp4" not in second


@pytest.mark.parametrize(
    ("result", "status", "log", "expected", "line"),
    [
        ('{"v1": {"errors": []}}', '{"v1": {}}', "", Status.DONE, ""),
        ('{"v1": {"errors": ["boom"]}}', '{"v1": {}}', "", Status.FAILED, "boom"),
        ('{"v1": {"errors": []}}', '{"v1": {"init": {"errors": ["e1"]}}}', "", Status.FAILED, "e1"),
        (
            '{"v1": {"errors": []}}',
            '{"v1": {"init": {"errors": [], "recoverable_errors": {"WARNING": ["w1"]}}}}',
            "",
            Status.DEGRADED,
            "w1",
        ),
        (
            '{"v1": {"errors": []}}',
            '{"v1": {}}',
            "x - cc.py[WARNING]: old\n",
            Status.DEGRADED,
            "x - cc.py[WARNING]: old",
        ),
        ("", "", "", Status.FAILED, "unreadable"),
    ],
)
def test_how_cloud_init_went(result: str, status: str, log: str, expected: Status, line: str) -> None:
    found = cloud_init.read(f"{result}\n--vmctl--\n{status}\n--vmctl--\n{log}")
    assert found.status is expected and (not line or any(line in one for one in found.lines))


@pytest.mark.parametrize(
    ("log", "kept"),
    [
        ("vmctl-micro: seed done\n", True),
        ("Cloud-init v. 22.4.2 finished at Mon\n", False),  # written, and not yet on the disk
        ("Cloud-init v. 22.4.2 finished at Mon\n[   99.1] reboot: Power down\n", True),
        ("Cloud-init v. 22.4.2 finished at Mon\n[   99.1] reboot: Restarting system\n", True),
        ("[   20.1] reboot: Power down\n[    0.0] Linux\nCloud-init v. 22.4.2 finished at Mon\n", False),
        ("[   20.1] reboot: Power down\n", False),
        ("", False),
    ],
)
def test_a_seed_goes_only_when_nothing_of_it_can_be_lost(log: str, kept: bool) -> None:
    assert first_boot_is_kept(log) is kept


@pytest.mark.parametrize(
    ("log", "over"),
    [
        ("", False),
        ("vmctl-micro: init\nvmctl-micro: sshd ready\n", False),
        ("vmctl-micro: init\nvmctl-micro: seed done\n", True),
        ("Cloud-init v. 22.4.2 running 'init'\nCloud-init v. 22.4.2 finished at Mon\n", True),
        (WENT_ON, True),
        (f"{WENT_ON}# a shell's prompt", True),
        (f"{WENT_ON}vmctl-micro: init\n", False),  # it booted since, as the machine it has become
        (f"{WENT_ON}Cloud-init v. 22.4.2 running 'init-local'\n", False),
        (f"{WENT_ON}vmctl-micro: init\nvmctl-micro: seed done\n", True),
    ],
)
def test_a_fork_has_had_its_first_boot_until_it_boots_itself(log: str, over: bool) -> None:
    assert tells_that_first_boot_is_over(log) is over


def look(folder: Path, patience_s: float, path: str) -> subprocess.CompletedProcess[str]:
    """The script as a guest's shell would run it, with a cloud-init and a sleep of the test's own."""
    return subprocess.run(
        ["/bin/sh", "-c", cloud_init.script(str(folder), patience_s, str(folder.parent / "kept"))],
        env={"PATH": path}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_the_wait_in_the_guest_is_one_process(tmp_path: Path) -> None:
    run, programs = tmp_path / "run", tmp_path / "bin"
    programs.mkdir()
    run.mkdir()
    assert look(run, 0.5, str(programs)).returncode == cloud_init.ABSENT
    path = f"{programs}:/usr/bin:/bin"
    (programs / "cloud-init").write_text(f"#!{sys.executable}\n")
    (programs / "sleep").write_text(f"#!/bin/sh\necho >>{tmp_path}/slept\n")
    for file in programs.iterdir():
        file.chmod(0o755)
    assert look(run, 0.5, path).returncode == cloud_init.NOT_YET
    assert not (tmp_path / "slept").exists()
    (run / "status.json").write_text('{"v1": {}}')
    soon = threading.Timer(0.5, lambda: (run / "result.json").write_text('{"v1": {"errors": ["no luck"]}}'))
    soon.start()
    done = look(run, 30, path)
    assert done.returncode == 0 and cloud_init.read(done.stdout).lines[0] == "no luck"
    (run / "result.json").unlink()
    (run / "disabled").touch()
    assert look(run, 30, path).returncode == cloud_init.DISABLED
    # It is so at each boot after the one that had the seed, and that one's result stays the guest's.
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/status.json").write_text('{"v1": {"init": {"recoverable_errors": {"WARNING": ["odd"]}}}}')
    (tmp_path / "kept/result.json").write_text('{"v1": {"errors": []}}')
    assert cloud_init.read(look(run, 30, path).stdout) == cloud_init.Outcome(Status.DEGRADED, ("odd",))
    # One that is no Python of its own (a wrapper) is asked again rather than in a busy loop.
    (run / "disabled").unlink()
    (programs / "cloud-init").write_text("#!/bin/sh\n")
    assert look(run, 0.5, path).returncode == cloud_init.NOT_YET and (tmp_path / "slept").exists()
