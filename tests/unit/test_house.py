"""The house's rules as tests: types, style, import direction, and a README that is complete and true."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
README = (REPO / "README.md").read_text()


def check(*argv: str) -> None:
    """Run a linter; its words are the failure."""
    done = subprocess.run([str(BIN / argv[0]), *argv[1:]], cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff() -> None:
    check("ruff", "check", "--no-cache", "vmctl", "tests")


def test_format() -> None:
    check("ruff", "format", "--no-cache", "--check", "vmctl", "tests")


@pytest.mark.timeout(600)
def test_mypy() -> None:
    check("mypy", "--cache-dir=/dev/null", "vmctl")


def test_imports_go_down_only() -> None:
    check("lint-imports", "--no-cache")


def commands() -> dict[str, list[str]]:
    """Every command with its options, groups' as ``group command``."""
    from vmctl.cli.app import COMMANDS, command

    found = {}
    tree = command()
    for name in COMMANDS:
        built = tree.commands[name]
        for words, one in leaves((name,), built):
            found[" ".join(words)] = [o for p in one.params for o in p.opts if o.startswith("--")]
    return found


def leaves(words: tuple[str, ...], one: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command, or those of a group and of the groups in it."""
    if not getattr(one, "commands", None):
        yield words, one
    for name, below in getattr(one, "commands", {}).items():
        yield from leaves((*words, name), below)


def test_the_reference_names_every_command_and_option() -> None:
    reference = README.partition("## Command reference")[2].partition("\n## ")[0]
    for name, options in commands().items():
        match = re.search(rf"^### `vmctl {re.escape(name)}[ `].*?(?=^### |\Z)", reference, re.MULTILINE | re.DOTALL)
        assert match, f"README's command reference has no `vmctl {name}`"
        missing = [option for option in options if f"`{option}" not in match[0] and option not in {"--help"}]
        assert not missing, f"README's `vmctl {name}` does not name {missing}"


def test_the_reference_names_nothing_else() -> None:
    reference = README.partition("## Command reference")[2].partition("\n## ")[0]
    named = set(re.findall(r"^### `vmctl ([a-z-]+(?: [a-z-]+){0,2})", reference, re.MULTILINE))
    known = set(commands())
    assert {n for n in named if n not in known} == set()


def test_the_overview_says_what_the_commands_say() -> None:
    from vmctl.cli.app import COMMANDS, command

    text = subprocess.run([str(BIN / "vmctl"), "--help"], capture_output=True, text=True, check=True).stdout
    for name, entry in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.summary[:20])}", text, re.MULTILINE)
        assert command().commands[name].help


def test_usage_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from vmctl.cli.app import command

    for words in commands():
        assert command().main(args=[*words.split(), "-q", "--help"], prog_name="vmctl", standalone_mode=False) in {
            0,
            None,
        }
        usage = capsys.readouterr().out.splitlines()[0]
        assert usage.startswith(f"Usage: vmctl {words} [OPTIONS]") and "{" not in usage, usage


def test_quiet_and_verbose_after_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from vmctl.cli import run
    from vmctl.cli.options import GLOBALS
    from vmctl.ui import Verbosity

    for flag, verbosity in (("-q", Verbosity.QUIET), ("-v", Verbosity.VERBOSE), ("--quiet", Verbosity.QUIET)):
        assert run(["-c", "test:///default", "list", flag]) == 0 and GLOBALS.verbosity is verbosity
        assert run(["-c", "test:///default", "list"]) == 0 and GLOBALS.verbosity is Verbosity.NORMAL


def test_exit_codes_in_the_readme() -> None:
    from vmctl import errors

    for name in dir(errors):
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, errors.VmctlError | errors.Interrupted):
            assert re.search(rf"^\| {kind.exit_code} \|", README, re.MULTILINE), (name, kind.exit_code)


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        ([], {"libvirt", "urllib3", "jsonschema", "paramiko", "jinja2", "rich", "yaml", "pycdlib"}),
        (
            ["list"],
            {
                "paramiko",
                "jinja2",
                "rich",
                "yaml",
                "pycdlib",
                "vmctl.accel",
                "vmctl.lifecycle",
                "vmctl.creation",
                "vmctl.builder",
                "vmctl.bench",
                "vmctl.cli.bench",
            },
        ),
        (["bench", "list"], {"libvirt", "jsonschema", "paramiko", "jinja2", "rich", "yaml", "vmctl.accel"}),
        (["bench", "compare", "a", "b"], {"libvirt", "jsonschema", "paramiko", "jinja2", "rich", "yaml"}),
        (["image", "search"], {"urllib3", "jsonschema", "paramiko", "rich", "yaml", "vmctl.builder.micro"}),
        (
            ["image", "export", "nope", "nope.raw"],
            {"paramiko", "jinja2", "urllib.request", "tarfile", "gzip", "vmctl.hypervisor.domain", "vmctl.vagrant_box"},
        ),
        (["image", "import", "nope.raw"], {"paramiko", "jinja2", "urllib.request", "vmctl.hypervisor.domain"}),
        (["cp", "README.md", "test:/tmp/"], {"paramiko", "jinja2", "urllib.request"}),
        (["pause", "nope"], {"paramiko", "rich", "yaml", "pycdlib", "vmctl.builder.micro"}),
    ],
)
def test_no_command_imports_what_it_does_not_need(words: list[str], unwanted: set[str]) -> None:
    script = f"import sys\nfrom vmctl.cli import run\nrun({words!r})\nprint('MODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPO,
        env={"VMCTL_CONNECT": "test:///default", "PATH": "/usr/bin"},
    )
    loaded = set(done.stdout.rpartition("MODULES")[2].split())
    assert not loaded & unwanted


def test_the_top_level_is_what_was_agreed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=False).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    assert {t for t in top if not t.startswith(".")} <= {
        "pyproject.toml",
        "README.md",
        "Vagrantfile",
        "LICENSE",
        "vmctl",
        "templates",
        "images",
        "tests",
    }
