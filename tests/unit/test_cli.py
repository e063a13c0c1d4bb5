"""What the command line makes of what people type: mistakes told at once, foreign words, keys, an end by Ctrl-C."""

from __future__ import annotations

import ast
import io
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmctl import doctor, seed
from vmctl.cli import many, run, words
from vmctl.cli.app import COMMANDS, command
from vmctl.errors import Conflict, Interrupted, PartialFailure, SpecError
from vmctl.hypervisor import events
from vmctl.wait import wait_until

REPO = Path(__file__).parents[2]
ON = ["-c", "test:///default"]


def told(capsys: pytest.CaptureFixture[str], *line: str, code: int = 2) -> list[str]:
    """What a command line says on stderr, by lines."""
    assert run([*ON, *line]) == code
    return capsys.readouterr().err.splitlines()


def test_no_command_shows_the_help_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ([], ["image"], ["disk", "pool"]):
        assert run(line) == 2
        shown = capsys.readouterr()
        assert shown.err == "" and "\\n" not in shown.out
        assert shown.out.splitlines()[0].startswith("Usage: vmctl") and "\nCommands:\n" in shown.out


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("rm x", "did you mean vmctl delete?"),
        ("ls", "did you mean vmctl list?"),
        ("up", "did you mean vmctl create, or vmctl start?"),
        ("destroy x", "did you mean vmctl delete, or vmctl stop --force?"),
        ("halt x", "did you mean vmctl stop?"),
        ("shell x", "did you mean vmctl ssh?"),
        ("launch", "did you mean vmctl create?"),
        ("suspend x", "did you mean vmctl pause, or vmctl save?"),
        ("images", "did you mean vmctl image list?"),
        ("image rm x", "did you mean vmctl image delete?"),
        ("image ls", "did you mean vmctl image list?"),
        ("disk pool rm x", "did you mean vmctl disk pool delete?"),
        ("disk halt", "vmctl disk --help"),
        ("delet x", "did you mean vmctl delete?"),
        ("sotp x", "did you mean vmctl stop?"),
        ("image bild", "did you mean vmctl image build?"),
        ("frobnicate x", "vmctl --help"),
        ("frobnicate", "vmctl --help"),
    ],
)
def test_a_word_from_elsewhere_or_mistyped(capsys: pytest.CaptureFixture[str], line: str, hint: str) -> None:
    first, second = told(capsys, *line.split())
    assert first.startswith("cannot understand the command line: no such command ") and second == f"hint: {hint}"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("disk resize web vdb +1G", "did you mean vmctl disk resize web:vdb +1G?"),
        ("disk detach web vdb --delete", "did you mean vmctl disk detach web:vdb --delete?"),
        ("snapshot create web before", "did you mean vmctl snapshot create web.before?"),
        ("snapshot revert web before --yes", "did you mean vmctl snapshot revert web.before --yes?"),
        ("disk resize web:vdb +1G now", "vmctl disk resize --help"),
        ("disk show -q web vdb", "vmctl disk show --help"),
        ("show web vdb --yes", "vmctl show --help"),
    ],
)
def test_a_disk_or_a_snapshot_named_in_two_words(capsys: pytest.CaptureFixture[str], line: str, hint: str) -> None:
    first, second = told(capsys, *line.split())
    assert first.startswith("cannot understand the command line: ") and second == "hint: " + hint.replace(
        "mean vmctl", f"mean vmctl {' '.join(ON)}"
    )


def test_every_word_from_elsewhere_leads_to_a_command() -> None:
    tree = command()
    for word, meant in words._ELSEWHERE.items():
        assert word not in COMMANDS, word
        for way in meant.split(", or "):
            first, *rest = way.split()
            assert first == "--version" or first == "--help" or first in COMMANDS, way
            if rest and rest[0][:1] != "-":
                assert rest[0] in tree.commands[first].commands, way
    for group, known in words._IN_GROUPS.items():
        commands = tree.commands[group].commands
        assert not set(known) & set(commands) and set(known.values()) <= set(commands), group


@pytest.mark.parametrize("group", ["backup", "bench", "disk", "disk pool", "host", "image", "snapshot"])
def test_the_help_of_a_group_is_whole(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    """First sentences to their end, and completion where it is installed, at the top only."""
    run([*group.split(), "--help"])
    text = capsys.readouterr().out
    assert "Commands:" in text and "..." not in text.partition("Commands:")[2] and "completion" not in text
    told(capsys, *group.split(), "crete")


def test_wrong_choices_are_told_with_all_other_problems(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = told(
        capsys, "create", "web 1", "--image", "micro", "--accel", "nope", "--machine", "vax", "--vcpus", "many",
        "--memory", "lots", "--disk", "1G,bus=floppy", "--disk", "2Q", "--share", "a", "--share", "/b",
    )  # fmt: skip
    for said in (
        "'nope' is not one of",
        "'vax' is not one of",
        "'many' is not",
        "'web 1'",
        "'lots'",
        "it can have bus",
        "'2Q'",
        "share 'a'",
        "share '/b'",
    ):
        assert said in line, line
    assert line.startswith("cannot create VM: ")
    first, second = told(capsys, "create", "--accel", "nope")
    assert "'nope'" in first and "'NAME'" in first and "'--image'" in first and second == "hint: vmctl create --help"
    first, _ = told(capsys, "disk", "attach", "web1", "1G", "--bus", "x", "--cache", "y")
    assert "'x' is not one of" in first and "'y' is not one of" in first
    (line,) = told(capsys, "create", "web 1", "--image", "micro")
    assert "nope" not in line


def private_key(folder: Path) -> Path:
    path = folder / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["wait", "x", "--timeout", "nan"], "'nan' is not a number"),
        (["wait", "x", "--timeout", "inf"], "'inf' is more than 1000000000"),
        (["host", "list", "--timeout", "1e300"], "'1e300' is more than 1000000000"),
        (["image", "pull", "http://127.0.0.1/x", "--stall-timeout", "nan"], "'nan' is not a number"),
        (["image", "pull", "http://127.0.0.1/x", "--stall-timeout", "inf"], "inf is not in the range"),
    ],
)
def test_a_time_that_would_never_pass_is_refused(
    capsys: pytest.CaptureFixture[str], line: list[str], said: str
) -> None:
    assert said in told(capsys, *line)[0]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # of stdin, as the locale has it
@pytest.mark.parametrize("line", [["passwd", "test"], ["create", "x", "--image", "micro", "--password"]])
def test_a_password_that_is_no_text_is_bad_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: list[str], errors: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8", errors))
    assert told(capsys, *line) == ["cannot take the password: it is not UTF-8"]


def test_a_password_is_never_cut_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """openssl would take the first 256 bytes, and nobody could log in with the whole."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 257 + b"\n")))
    said = told(capsys, "create", "x", "--image", "micro", "--password")
    assert said == ["cannot take the password: it is longer than 256 bytes"]
    assert seed.password_hash("x" * 256).startswith("$6$")


def test_nothing_of_a_private_key_is_quoted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    key = private_key(tmp_path)
    text = key.read_text()
    cut = tmp_path / "cut"  # its first and last lines are gone: nothing tells what it is
    cut.write_text("\n".join(text.splitlines()[1:-1]))
    for given, said in ((str(key), f"give {key}.pub"), (text, "it is a private one"), (str(cut), "line 1 is not")):
        (line,) = told(capsys, "create", "x", "--image", "micro", "--ssh-key", given)
        assert said in line
        assert not [part for part in text.split() if len(part) > 12 and part in line], line
    Path(f"{key}.pub").unlink()
    (line,) = told(capsys, "create", "x", "--image", "micro", "--ssh-key", str(key))
    assert f"ssh-keygen -y -f {key}" in line


def test_public_keys_come_from_files_or_stand_there(tmp_path: Path) -> None:
    from vmctl.cli import first_boot

    public = Path(f"{private_key(tmp_path)}.pub")
    line = public.read_text().strip()
    (tmp_path / "many").write_text(f"# of the team\n\n{line}\n{line}\n")
    assert first_boot.read_keys([str(public), line, str(tmp_path / "many")]) == (line,) * 4
    for bad in (tmp_path, tmp_path / "none"):
        with pytest.raises(SpecError) as caught:
            first_boot.read_keys([str(bad)])
        assert "[Errno" not in caught.value.message


def test_no_message_has_the_number_of_an_os_error() -> None:
    """str() of an OSError is "[Errno 2] …": vmctl.errors.reason() is for messages."""
    found = []
    for path in (REPO / "vmctl").rglob("*.py"):
        for handler in ast.walk(ast.parse(path.read_text())):
            if not isinstance(handler, ast.ExceptHandler) or "OSError" not in ast.unparse(handler.type or ast.Tuple()):
                continue
            for node in ast.walk(handler):
                value = node.value if isinstance(node, ast.FormattedValue) else None
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "str":
                    value = node.args[0]
                if isinstance(value, ast.Name) and value.id == handler.name:
                    found.append(f"{path.relative_to(REPO)}:{node.lineno}")
    # paramiko's own errors have no number, and these say what it said.
    assert [one for one in found if not one.startswith("vmctl/ssh.py")] == []


def test_each_tells_in_order_and_gathers_failures() -> None:
    def work(name: str) -> str:
        if name == "b":
            raise Conflict("cannot b")
        return name * 2

    results: list[str] = []
    with pytest.raises(PartialFailure) as caught:
        many.each(["c", "a", "b"], work, lambda name, result: results.append(name + result), "do")
    assert results == ["ccc", "aaa"] and list(caught.value.failures) == ["b"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_all_workers_and_says_what_was_done(number: int, tmp_path: Path) -> None:
    script = tmp_path / "each.py"
    script.write_text(
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "from vmctl import cli\n"
        "from vmctl.cli import many\n"
        "from vmctl.errors import Conflict, Interrupted\n"
        "here = Path(sys.argv[1])\n"
        "def work(name):\n"
        "    (here / name).touch()\n"
        "    if name == 'v02': return 'done'\n"
        "    if name == 'v03': raise Conflict('cannot v03')\n"
        "    try:\n"
        "        while True: time.sleep(0.02)  # work that only a signal ends\n"
        "    finally:\n"
        "        (here / (name + '.undone')).touch()\n"
        "signal.signal(signal.SIGTERM, cli._terminated)\n"
        "try:\n"
        "    many.each([f'v{n:02}' for n in range(12)], work, lambda name, said: print(name, said), 'stop')\n"
        "except Interrupted as error:\n"
        "    print(error.message)\n"
        "    sys.exit(error.exit_code)\n"
    )
    running = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    begun = [f"v{n:02}" for n in range(10)]
    wait_until(lambda: all((tmp_path / one).exists() for one in begun), what="the workers", timeout_s=60)
    running.send_signal(number)
    out, _ = running.communicate(timeout=8)  # well below the time that a stuck one may take to take itself back
    assert running.returncode == 130, out
    assert out.splitlines()[0] == "v02 done"
    why = "interrupted" if number == signal.SIGINT else "stopped on request (SIGTERM)"
    assert out.splitlines()[1] == (
        f"cannot stop all 12 VMs: {why}; done: v02; failed: v03 (cannot v03); "
        "cut off: v00, v01, v04, v05, v06, v07, v08, v09; not begun: v10, v11"
    )
    assert all((tmp_path / f"{one}.undone").exists() for one in begun if one not in {"v02", "v03"})


def test_a_second_interrupt_waits_for_nobody_and_still_says_what_was_done(tmp_path: Path) -> None:
    script = tmp_path / "each.py"
    script.write_text(
        "import os, sys, threading\n"
        "from vmctl.cli import many\n"
        "from vmctl.errors import Interrupted\n"
        "begun = threading.Barrier(3)\n"
        "def work(name):\n"
        "    try:\n"
        "        begun.wait()\n"
        "        while True: pass\n"
        "    finally:\n"
        "        threading.Event().wait()  # takes for ever to take itself back\n"
        "def watch():\n"
        "    begun.wait()\n"
        "    print('begun', flush=True)\n"
        "threading.Thread(target=watch).start()\n"
        "try:\n"
        "    waits = lambda: print('waits', flush=True)\n"
        "    many.each(['a', 'b'], work, lambda name, said: None, 'move', undo_s=3600, waits=waits)\n"
        "except Interrupted as error:\n"
        "    print(error.message, flush=True)\n"
        "    os._exit(error.exit_code)\n"
    )
    running = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    assert running.stdout is not None
    for line in ("begun", "waits"):
        assert running.stdout.readline() == f"{line}\n"
        running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    said = "a (its end was not waited for), b (its end was not waited for)"
    assert out == f"cannot move all 2 VMs: interrupted; cut off: {said}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_libvirt_does_not_answer(number: int, tmp_path: Path) -> None:
    """A daemon that takes the call and says nothing: libvirt's call, in the main thread, hears no signal."""
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(tmp_path / "silent"))
        daemon.listen()
        running = subprocess.Popen(
            [sys.executable, "-m", "vmctl", "-c", f"qemu+unix:///system?socket={tmp_path / 'silent'}", "list"],
            stderr=subprocess.PIPE, text=True, cwd=REPO,
        )  # fmt: skip
        caller, _ = daemon.accept()
        with caller, running:
            assert caller.recv(1)  # it has asked, and waits
            assert running.stderr is not None
            running.send_signal(number)
            assert running.stderr.readline().startswith("interrupted; waiting for what libvirt was asked for")
            running.send_signal(number)
            assert running.wait(timeout=60) == 130
            assert running.stderr.read().startswith("interrupted while libvirt did not answer: ")


def test_an_interrupt_while_nothing_runs_any_more() -> None:
    def done(name: str, _: str) -> None:
        if name == "a":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="cannot do all 2 VMs: interrupted; done: a"):
        many.each(["a", "b"], lambda name: name, done, "do")


def begin(*line: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "vmctl", *ON, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO
    )


@pytest.mark.parametrize("output", ["table", "json", "yaml", "name"])
def test_a_watched_list_comes_through_a_pipe_at_once(output: str) -> None:
    running = begin("list", "-w", "-o", output)
    try:
        assert running.stdout is not None
        came = b""
        while b"test" not in came:
            assert select.select([running.stdout], [], [], 60)[0], f"nothing more came than {came!r}"
            came += os.read(running.stdout.fileno(), 4096)
    finally:
        running.kill()
        running.communicate()


@pytest.mark.parametrize("line", [["list", "-w"], ["events"], ["list", "-w", "-o", "json"]])
def test_a_closed_pipe_ends_what_watches_quietly(line: list[str]) -> None:
    running = begin("-q", *line)
    assert running.stdout is not None and running.stderr is not None
    if line[0] == "list":
        running.stdout.readline()
    running.stdout.close()
    assert running.wait(60) == 141
    assert running.stderr.read() == b""
    running.stderr.close()


def test_what_doctor_says_is_to_be_typed_names_the_host_that_was_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = (doctor.Finding("creations", "failed", "the creation of web was cut off", "vmctl delete web"),)
    monkeypatch.setattr(doctor, "examine", lambda *_words, **_more: found)
    assert run(["-c", "a b", "doctor"]) == 1
    assert "mend: vmctl -c 'a b' delete web\n" in capsys.readouterr().out


def test_events_of_a_vm_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = told(capsys, "events", "tset", code=4)
    assert first.startswith("cannot find VM tset") and second == "hint: did you mean test?"


@pytest.mark.parametrize(
    ("line", "code"), [("list -w", 0), ("list -w -o json", 0), ("events", 0), ("events --count 1", 130)]
)
def test_ctrl_c_ends_well_what_has_no_other_end(line: str, code: int) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "vmctl", *ON, *line.split()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO,
    )  # fmt: skip
    with running:
        assert running.stdout is not None and running.stderr is not None
        (running.stderr if line.startswith("events") else running.stdout).readline()
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=60)[1]
    assert (running.returncode, said) == (code, "interrupted\n" if code else "")


def test_who_says_no_has_nothing_done_and_was_not_wrong() -> None:
    main, side = pty.openpty()
    words = [sys.executable, "-m", "vmctl", *ON, "disk", "pool", "delete", "default-pool"]
    with subprocess.Popen(words, stdin=side, stdout=side, stderr=side, cwd=REPO) as running:
        os.close(side)
        said = ""
        while "[y/N]" not in said:
            assert select.select([main], [], [], 60)[0], said
            said += os.read(main, 4096).decode()
        os.write(main, b"n\n")
        while "nothing was done" not in said:
            assert select.select([main], [], [], 60)[0], said
            said += os.read(main, 4096).decode()
        assert running.wait(60) == 1
    os.close(main)


def test_notes_are_for_those_who_did_not_ask_for_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = events.watch

    def interrupted(conn: Any, ready: Callable[[], None], idle: Callable[[], None]) -> Any:
        def begun() -> None:
            ready()
            os.kill(os.getpid(), signal.SIGINT)

        return watch(conn, ready=begun, idle=idle)

    monkeypatch.setattr(events, "watch", interrupted)
    shown: list[str] = []
    for quiet in ([], ["-q"]):
        assert run([*ON, *quiet, "events"]) == 0
        shown.append(capsys.readouterr().err)
    assert "watching" in shown[0] and "watching" not in shown[1]


@pytest.mark.parametrize(
    "typed",
    [
        ["-o", "json", "image", "search", "debian-12"],
        ["--output=json", "-v", "image", "search", "debian-12"],
        ["image", "-o", "json", "search", "debian-12"],
        ["-o", "name", "image", "search", "debian-12", "-o", "json"],
        ["-o", "name", "image", "-q", "-o", "json", "search", "debian-12"],
    ],
    ids=" ".join,
)
def test_the_form_of_the_result_may_be_said_before_the_command(
    capsys: pytest.CaptureFixture[str], typed: list[str]
) -> None:
    assert run(typed) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["debian-12"]
    assert run(["image", "search", "debian-12"]) == 0
    assert capsys.readouterr().out.startswith("NAME"), "and lasts for the one command"


def test_a_form_for_a_command_that_has_one_only_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for typed in (["-o", "json", "start", "x"], ["-o", "json", "screenshot", "x"], ["-o", "yaml", "exec", "x", "id"]):
        assert run(typed) == 2
        said = capsys.readouterr().err
        assert "no such option: --output" in said and f"hint: vmctl {typed[2]} --help" in said
    assert run(["-o", "jsn", "list"]) == 2
    assert "'jsn' is not one of" in capsys.readouterr().err
    assert run(["-o", "json", "start", "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["exec", "ssh"])
def test_an_option_behind_the_name_is_not_run_in_the_guest(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert run(["-c", "test:///default", verb, "test", "--user", "bob", "--", "id"]) == 2
    said = capsys.readouterr().err
    assert "cannot run '--user' in a guest: options stand before the VM's name" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "--check --tunnelled --copy-storage full --parallel 2",
            "one connection: no --parallel; a tunnelled migration",
        ),
        ("--check --postcopy --held", "--postcopy goes with no --held"),
        ("--check --recover", "of --check, --adjust and --recover goes one at a time"),
        ("--direct --tunnelled --compress --parallel 2", "--direct goes with no --tunnelled; --compress goes with"),
        ("--bandwidth 100K", "cannot migrate at 100K a second: libvirt limits to whole MiB"),
    ],
)
@pytest.mark.parametrize("target", ["nowhere", "auto"])
def test_what_cannot_be_meant_of_a_migration_is_said_before_any_host_is_asked(
    capsys: pytest.CaptureFixture[str], line: str, said: str, target: str
) -> None:
    assert said in told(capsys, "migrate", "web1", "--to", target, *line.split())[0]


@pytest.mark.parametrize(("number", "raised"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "Interrupted")])
def test_an_interrupt_that_meets_a_destructor_is_not_dropped(number: str, raised: str) -> None:
    """Python prints what a destructor raises, and goes on; one of libvirt's runs whenever a handle is let go."""
    script = f"""
import os, signal, time
from vmctl import cli

class Handle:
    def __del__(self):
        os.kill(os.getpid(), signal.{number})
        sum(range(9))

cli.hear_signals()
try:
    Handle()
    time.sleep(20)  # what ends it is the interrupt
except BaseException as early:
    print(type(early).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (f"{raised}\n", "")
