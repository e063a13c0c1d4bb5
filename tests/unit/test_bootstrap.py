"""The set-up script's decisions, with stand-ins for the machine's tools.

That it really sets up a machine is proven in a bare one: tests/bootstrap/prove-in-chroot.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
TEST_COMMAND = "sh vmctl/bootstrap.sh tests/run"
SCRIPTS = ["vmctl/bootstrap.sh", "tests/run", "tests/prepare", "tests/testhost/up.sh", "tests/testhost/after.sh",
           "tests/bootstrap/prove-in-chroot", ".ci/run", "vmctl/virtiofsd-readonly"]  # fmt: skip

# What a minimal Debian has in /usr/bin, and the script may use.
TOOLS = [
    "sh",
    "awk",
    "cat",
    "chgrp",
    "chmod",
    "cut",
    "dirname",
    "env",
    "find",
    "flock",
    "grep",
    "ln",
    "mkdir",
    "mktemp",
    "readlink",
    "rm",
    "sed",
    "setsid",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "tail",
    "timeout",
    "touch",
    "tr",
    "true",
]

LOG = 'echo "${0##*/} $*" >>"$CALLS"\n'
DPKG_QUERY = r"""
for name; do
    case $name in -* | *" "*) ;; *) [ "$name" = "${LACKING-}" ] || echo "$name installed" ;; esac
done
"""
# A Python that makes a .venv of just what the script looks at, and a pip that does as told by PIP.
PYTHON = r"""
case "$1 ${2-}" in
-c*) echo 3.11.2 ;;
"-m venv")
    mkdir -p "$3/bin" "$3/lib/python3.11"
    touch "$3/pyvenv.cfg"
    ln -sf "$VMCTL_PYTHON" "$3/bin/python3"
    echo "#!$3/bin/python3" >"$3/bin/pip" ;;
"-m pip")
    [ "${PIP-}" != fails ] || { echo "pip: no such release" >&2; exit 1; }
    printf '#!/bin/sh\n' >"${0%/*}/vmctl"; chmod +x "${0%/*}/vmctl" ;;
esac
"""


class Machine:
    """A copy of the script in a checkout of its own, and a PATH of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        (self.checkout / "vmctl").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("vmctl/bootstrap.sh", "vmctl/packages.debian", "pyproject.toml"):
            shutil.copy(CHECKOUT / name, self.checkout / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or f"/usr/bin/{tool}")
        self.stand_in("id", "echo 1000")  # not root: it must not see to this machine's /dev/kvm
        self.stand_in("sudo", '[ "$1" != -n ] || shift; "$@"')
        self.stand_in("virsh", "exit 0")
        self.stand_in("dpkg-query", DPKG_QUERY)
        self.stand_in("apt-get", LOG)
        self.python = self.stand_in("python3", LOG + PYTHON)

    def stand_in(self, name: str, body: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return path

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            ["/bin/sh", self.checkout / "vmctl/bootstrap.sh", *arguments],
            env={"PATH": str(self.bin), "HOME": str(self.checkout.parent), "CALLS": str(self.calls),
                 "VMCTL_PYTHON": str(self.python)} | env,
            capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def called(self) -> list[str]:
        """What was run, shortened to program and first two words."""
        return [" ".join(line.split()[:3]) for line in self.calls.read_text().splitlines() if " -c " not in line]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    yield Machine(tmp_path)


def packages(section: str) -> Sequence[str]:
    text = (CHECKOUT / "vmctl/packages.debian").read_text()
    body = re.split(r"^\[(\w+)\]$", text, flags=re.MULTILINE)
    sections = dict(zip(body[1::2], body[2::2], strict=True))
    return [line.split()[0] for line in sections[section].splitlines() if line.strip()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_posix_shell(script: str) -> None:
    text = (CHECKOUT / script).read_text()
    assert text.startswith("#!/bin/sh\n")
    subprocess.run(["dash", "-n", CHECKOUT / script], check=True, timeout=30)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if "/run" in script or "prove" in script])
def test_commands_can_be_run(script: str) -> None:
    assert (CHECKOUT / script).stat().st_mode & stat.S_IXUSR


def test_ci_runs_the_readmes_test_command() -> None:
    commands = [line.partition("#")[0].strip() for line in (CHECKOUT / "README.md").read_text().splitlines()]
    assert TEST_COMMAND in commands
    assert (CHECKOUT / ".ci/run").read_text().splitlines()[-1].removeprefix("exec ") == TEST_COMMAND


def test_every_package_says_why() -> None:
    text = (CHECKOUT / "vmctl/packages.debian").read_text()
    silent = [line for line in text.splitlines() if line and line[0] not in "#[" and not re.search(r"#\s*\S", line)]
    assert not silent


def test_another_distribution_is_told_the_packages(machine: Machine) -> None:
    (machine.bin / "apt-get").unlink()
    done = machine.run("--with", "test", "true")
    assert done.returncode == 1
    problem, hint = done.stderr.splitlines()
    assert problem.startswith("cannot set up packages: this is not Debian but ")
    assert hint.split(": ")[-1].split() == [*packages("run"), *packages("test")]


def test_another_distribution_may_go_on_without(machine: Machine) -> None:
    (machine.bin / "apt-get").unlink()
    assert machine.run("--no-packages", "true").returncode == 0


def test_only_what_is_missing_is_installed(machine: Machine) -> None:
    done = machine.run("true", LACKING="dnsmasq-base")
    assert done.returncode == 0, done.stderr
    assert "installing 1 package: dnsmasq-base" in done.stderr
    update, install = [line for line in machine.calls.read_text().splitlines() if line.startswith("apt-get")]
    assert update.endswith(" update")
    assert install.endswith(" install --no-install-recommends dnsmasq-base")


def test_what_apt_says_is_shown_when_it_fails(machine: Machine) -> None:
    machine.stand_in("apt-get", 'echo "E: no space"; exit 100')
    done = machine.run("true", LACKING="dnsmasq-base")
    assert done.returncode == 1
    assert "    E: no space\n" in done.stderr
    *_, problem, hint = done.stderr.splitlines()
    assert problem.startswith("cannot set up packages: ")
    assert hint == "hint: apt-get install --no-install-recommends dnsmasq-base"


def test_without_root_or_sudo_it_says_what_root_must_do(machine: Machine) -> None:
    machine.stand_in("sudo", "exit 1")
    done = machine.run("true", LACKING="lz4")
    assert done.stderr.splitlines() == [
        "cannot set up packages: 1 package missing, and only root can install what is",
        "hint: as root: apt-get install --no-install-recommends lz4",
    ]


def test_second_run_does_nothing_and_says_nothing(machine: Machine) -> None:
    first = machine.run("true")
    assert first.returncode == 0, first.stderr
    assert machine.called() == ["python3 -m venv", "python3 -m pip", "python3 -m compileall"]
    second = machine.run("true")
    assert (second.returncode, second.stderr, machine.called()) == (0, "", [])


def test_a_changed_project_is_installed_again_into_the_same_venv(machine: Machine) -> None:
    machine.run("true")
    with (machine.checkout / "pyproject.toml").open("a") as project:
        project.write("\n")
    machine.run("true")
    assert machine.called() == ["python3 -m pip", "python3 -m compileall"]


def test_an_extra_is_added_once_and_stays(machine: Machine) -> None:
    machine.run("true")
    machine.run("--with", "test", "true")
    assert f"{machine.checkout}[test]\n" in machine.calls.read_text()
    for arguments in (["--with", "test", "true"], ["true"]):
        machine.run(*arguments)
        assert machine.called() == []


def test_an_unfinished_venv_is_made_anew(machine: Machine) -> None:
    failed = machine.run("true", PIP="fails")
    assert failed.returncode == 1
    assert "    pip: no such release\n" in failed.stderr
    mended = machine.run("true")
    assert mended.returncode == 0
    assert "making .venv anew: an earlier set-up was interrupted" in mended.stderr
    assert machine.called() == ["python3 -m venv", "python3 -m pip", "python3 -m compileall"]


def test_a_moved_checkout_gets_a_new_venv(machine: Machine) -> None:
    machine.run("true")
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    moved = machine.run("true")
    assert "making .venv anew: it was made in another folder" in moved.stderr
    assert moved.returncode == 0


@pytest.mark.parametrize("body", [None, "echo 3.9.2; exit 1"])
def test_an_unfit_python_is_refused_in_one_line(machine: Machine, body: str | None) -> None:
    python = machine.stand_in("old", body) if body else Path("/nonexistent")
    done = machine.run("true", VMCTL_PYTHON=str(python))
    assert done.returncode == 1
    problem, hint = done.stderr.splitlines()
    assert problem.startswith("cannot set up .venv: ")
    assert str(python) in problem
    assert hint == "hint: set VMCTL_PYTHON to a Python 3.11 or newer"


def test_an_ordinary_user_may_have_only_the_session(machine: Machine) -> None:
    machine.stand_in("virsh", 'case "$*" in *system*) exit 1;; esac')
    if Path("/run/systemd/system").is_dir():
        machine.stand_in("sudo", "exit 1")
    done = machine.run("true")
    assert done.returncode == 0
    assert "vmctl will use qemu:///session" in done.stderr


def test_it_becomes_the_command(machine: Machine) -> None:
    machine.stand_in("job", 'echo "$1|$2|$VIRTUAL_ENV|$(umask)"; exit 7')
    umask = subprocess.check_output(["sh", "-c", "umask"], text=True, timeout=30)
    done = machine.run("job", "a b", "c")
    assert (done.returncode, done.stdout) == (7, f"a b|c|{machine.checkout / '.venv'}|{umask}")


def test_vmctl_is_told_how_to_get_a_shell_in_which_it_is_on_the_path(machine: Machine) -> None:
    machine.run()
    asked = machine.stand_in("job", 'echo "${VMCTL_SHELL-none}"')
    (made := machine.checkout / ".venv/bin/vmctl").unlink(missing_ok=True)
    made.symlink_to(asked)
    assert machine.run("vmctl").stdout == f"sh {machine.checkout}/vmctl/bootstrap.sh bash\n"
    assert machine.run("job").stdout == "none\n", "a shell, it may be: in there it is on the path"
    there = f"{machine.bin}:{machine.checkout}/.venv/bin"
    assert machine.run("vmctl", PATH=there).stdout == "none\n"


def test_an_unknown_command_or_option_or_section_is_named(machine: Machine) -> None:
    assert "cannot run no-such: there is no such command" in machine.run("no-such").stderr
    assert machine.run("no-such").returncode == 127
    assert "no such option: --wiht" in machine.run("--wiht", "test").stderr
    assert "no section [tset]" in machine.run("--with", "tset", "true").stderr


def test_without_a_command_it_says_what_is_next(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1].startswith("vmctl set-up: ready; next: ")
