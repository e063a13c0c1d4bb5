"""The micro image: its promises inside the guest, and a build that fails leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.system.conftest import REPO, Shell, environment, volumes
from vmctl import images, render
from vmctl.hosts import open_host
from vmctl.hypervisor import storage
from vmctl.pytest_qemu import GuestVM
from vmctl.wait import wait_until

pytestmark = pytest.mark.system


def test_what_is_in_it(shared_vm: GuestVM) -> None:
    assert b"ID=debian-micro" in shared_vm.run("cat", "/etc/os-release").stdout
    for tool in ("resize2fs", "mke2fs", "qemu-ga", "dropbear", "busybox"):
        assert shared_vm.run("which", tool).stdout.strip(), tool
    assert shared_vm.run("sh", "-c", "mount | grep ' / '").stdout.startswith(b"/dev/vda on / type ext4")
    assert shared_vm.run("hostname").stdout.decode().strip() == shared_vm.name
    assert shared_vm.run("cat", "/etc/machine-id").stdout.strip()


def test_an_emulated_guest_copies_by_words(shell: Shell, shared_vm: GuestVM) -> None:
    """TCG does `rep movsb` byte by byte, and whoever is told of ERMS takes it for the quickest way."""
    flags = shared_vm.run("cat", "/proc/cpuinfo").stdout.decode().split()
    emulated = shell.json("show", shared_vm.name)["accel"] == "tcg"
    assert "rep_good" in flags and not (emulated and "erms" in flags)


def test_binary_data_survives_the_way_in_and_out(shared_vm: GuestVM) -> None:
    data = bytes(range(256)) * 4096
    assert shared_vm.run("cat", data=data).stdout == data


def test_the_root_file_system_grows_to_its_disk(make_vm: Callable[..., GuestVM]) -> None:
    """Before the first command: one that unpacks a lot at once must not meet a full disk."""
    guest = make_vm(root_size_mib=600)
    assert int(guest.run("sh", "-c", "df -m / | awk 'NR==2 {print $2}'").stdout) > 400


SECONDS_AFTER_BOOT = r"""
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
static double seconds(struct timespec time) { return time.tv_sec + time.tv_nsec / 1e9; }
int main(int count, char **words)
{
    struct timespec now, up;
    struct stat found;
    clock_gettime(CLOCK_REALTIME, &now);
    clock_gettime(CLOCK_BOOTTIME, &up);
    for (int i = 1; i < count && stat(words[i], &found) == 0; i++)
        printf("%f\n", seconds(up) - seconds(now) + seconds(found.st_ctim));
}
"""


def test_what_commands_rely_on_is_there_before_sshd(
    shell: Shell, make_vm: Callable[..., GuestVM], tmp_path: Path
) -> None:
    """A file written to /tmp by the first command must not vanish under a mount that comes a moment later."""
    build = ["gcc", "-static", "-O", "-x", "c", "-", "-o", str(tmp_path / "made")]
    subprocess.run(build, input=SECONDS_AFTER_BOOT, text=True, check=True, timeout=60)
    guest = make_vm()
    shell.run("cp", str(tmp_path / "made"), f"{guest.name}:/root/made")
    ticks = "for pid in $(pidof dropbear); do cut -d ' ' -f 22 /proc/$pid/stat; done | sort -n | head -n 1"
    begun = int(guest.run("sh", "-c", ticks).stdout) / 100
    for folder in ("/tmp", "/dev/shm", "/sys/fs/cgroup", "/dev/pts"):
        guest.run("grep", f" {folder} ", "/proc/mounts")
        if folder != "/sys/fs/cgroup":  # its times are not those of its mount
            made = float(guest.run("/root/made", folder).stdout)
            assert made < begun + 0.011, f"{folder} was mounted at {made}, sshd began at {begun}"


def test_two_guests_reach_each_other(make_vm: Callable[..., GuestVM]) -> None:
    one, two = make_vm(vcpus=2), make_vm(memory_mib=128)
    address = one.run("sh", "-c", "ip -4 -o addr show eth0 | awk '{print $4}' | cut -d/ -f1").stdout.decode().strip()
    two.run("ping", "-c", "1", "-W", "5", address)


def test_a_card_whose_cable_was_pulled_asks_for_its_address_anew(make_vm: Callable[..., GuestVM]) -> None:
    """It kept the one that it had, of another network maybe, until half its lease was over."""
    guest, shell = make_vm(agent=True), Shell()
    words = ("exec", "--via", "agent", guest.name, "--", "sh", "-c")

    def network() -> list[str]:
        found = shell.run(*words, "ip -4 -o addr show eth0; ip route").stdout.split("\n")
        return [line.split()[3] if "inet" in line else line.strip() for line in found if line.strip()]

    def link(state: str) -> None:
        shell.virsh("domif-setlink", guest.name, card, state)

    before = network()
    card = shell.virsh("domiflist", guest.name).split()[0]
    shell.run(*words, "ifconfig eth0 192.168.7.7 netmask 255.255.255.0 && route add default gw 192.168.7.1")
    assert "192.168.7.7/24" in network()
    link("down")
    # Not its carrier, which goes at once: who listens is told a second later, as is the state of the card.
    away = "grep -q down /sys/class/net/eth0/operstate"
    wait_until(lambda: not shell.run(*words, away, check=None).returncode, what="its cable pulled", timeout_s=10)
    assert "192.168.7.7/24" in network(), "until it is in another network"
    link("up")
    wait_until(lambda: network() == before, what="address and route of its network", timeout_s=10)


# Ends the sshd that takes connections, and the one that comes for it: when, and when there was a third. Three times.
ENDED_TWICE = """
firsts() { for p in $(pidof dropbear); do grep -q "^PPid:.1$" /proc/$p/status && echo $p; done; }
listening() { for p in $(firsts); do case " $ours " in *" $p "*) ;; *) echo $p; esac; done; }
ended() { old=$1; kill -9 $old; until new=$(listening) && [ -n "$new" ] && [ "$new" != $old ]; do :; done; }
now() { cut -d " " -f 1 /proc/uptime; }
first=$(firsts)
ours=" $(echo $(pidof dropbear)) "
ours="${ours%% $first *} ${ours##* $first }"
for i in 1 2 3; do
    sleep 2
    ended $(listening)
    at=$(now)
    ended $new
    echo $at $(now)
done
"""


def test_an_sshd_that_is_ended_as_soon_as_it_has_begun_is_back_at_once(make_vm: Callable[..., GuestVM]) -> None:
    """As a fork ends it. One that ends at once again and again is given a second each time."""
    told = make_vm(agent=False).run("sh", "-c", ENDED_TWICE).stdout.split()
    assert len(told) == 6
    assert min(float(b) - float(a) for a, b in zip(told[::2], told[1::2], strict=True)) < 1


def test_identity_is_kept_over_a_reboot_and_runcmd_runs_once(make_vm: Callable[..., GuestVM]) -> None:
    guest = make_vm(runcmd=("echo ran >>/root/ran",))
    script = "for i in $(seq 50); do test -s /root/ran && break; sleep 0.2; done; cat /etc/machine-id; sync"
    before = guest.run("sh", "-c", script).stdout
    shell = Shell()
    shell.run("stop", guest.name)
    shell.run("start", guest.name)
    shell.run("wait", guest.name, "--for", "agent")
    assert guest.run("cat", "/etc/machine-id").stdout == before
    assert guest.run("cat", "/root/ran").stdout == b"ran\n"


@pytest.fixture
def anew(tmp_path: Path) -> dict[str, str]:
    """An environment with a cache that has lists and packages, and no finished build to be taken."""
    cache, own = Path.home() / ".cache/vmctl", tmp_path / "cache/vmctl"
    own.mkdir(parents=True)
    for part in ("apt", "debs"):
        (own / part).symlink_to(cache / part)
    return environment(XDG_CACHE_HOME=str(own.parent))


def test_a_build_that_runs_out_of_disk_leaves_nothing(shell: Shell, anew: dict[str, str]) -> None:
    images, store = shell.json("image", "list"), "/var/lib/libvirt/vmctl/vmctl-images"
    script = f'mount -t tmpfs -o size=20m tmpfs {store} && {{ "$@"; code=$?; ls -A {store}; exit $code; }}'
    build = [sys.executable, "-m", "vmctl", "image", "build", "micro"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *build], capture_output=True, text=True, cwd=REPO, timeout=120,
        env=anew,
    )  # fmt: skip
    assert done.returncode == 10, done.stderr
    assert "cannot " in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "", "left in the store"
    assert shell.json("image", "list") == images


def test_building_again_changes_nothing(shell: Shell, anew: dict[str, str], tmp_path: Path) -> None:
    """The same bytes come of it; and what is there already is taken, not built."""
    before = shell.json("image", "list")
    told = shell.run("image", "build", "micro", env=anew).stderr
    assert "already, unchanged" in told and "unpacking packages" in told
    assert shell.json("image", "list") == before
    (built,) = (tmp_path / "cache/vmctl/built").iterdir()
    assert (Path.home() / ".cache/vmctl/built" / built.name).is_dir()
    apts = Path.home() / ".cache/vmctl/apt/pkgcache.bin"
    apts.unlink(missing_ok=True)
    told = shell.run("image", "build", "micro").stderr
    assert "already, unchanged" in told and "of the last build, which is taken" in told
    assert "unpacking packages" not in told and shell.json("image", "list") == before
    read = apts.stat().st_ino
    shell.run("image", "build", "micro")
    assert apts.stat().st_ino == read, "apt read all of its lists again: a second a question, two a build"


def test_an_image_of_an_older_recipe_is_told_of_until_it_is_built_again(shell: Shell, name: str) -> None:
    """By its plain name; who names its digest has chosen it."""
    with open_host() as host:
        built = images.find(host, "micro").manifest
        images.rewrite(host, replace(built, source="recipe micro 0123456789ab"))
        words = ("--no-start", "--accel", "tcg")
        assert "image micro is of an older recipe" in shell.run("create", name, "--image", "micro", *words).stderr
        shell.run("delete", name, "--yes")
        assert "older recipe" not in shell.run("create", name, "--image", built.stem, *words).stderr
        shell.run("delete", name, "--yes")
        shell.run("image", "build", "micro")
        assert images.find(host, "micro").manifest == built
    assert "older recipe" not in shell.run("create", name, "--image", "micro", *words).stderr


def test_a_dry_run_tells_and_changes_nothing(shell: Shell) -> None:
    before = shell.json("image", "list")
    told = shell.run("image", "build", "micro", "--dry-run").stdout
    assert (
        "micro/recipe.toml" in told
        and "would put image micro-… into pool vmctl-images; until pruned, these stay: micro-" in told
    )
    assert "no recipe" in shell.run("image", "build", "nosuch", "--dry-run", check=4).stderr
    assert shell.json("image", "list") == before


def test_what_was_built_last_is_what_the_name_means(shell: Shell) -> None:
    """A recipe taken back to an earlier state: its image is there already, behind a newer one."""
    with open_host() as host:
        micro = images.find(host, "micro").manifest
        newer = replace(micro, digest="f" * 64, built=datetime.now(UTC).isoformat(timespec="seconds"))
        pool, text = host.settings.image_pool, json.dumps(asdict(newer)).encode()
        volume = f"{newer.stem}.json"
        storage.create_volume(host.conn, pool, render.volume(render.VolumeView(volume, len(text), "raw")), name=volume)
        try:
            storage.upload_bytes(host.conn, pool, volume, text)
            assert images.find(host, "micro").manifest == newer
            later = lambda: datetime.now(UTC).isoformat(timespec="seconds") > newer.built  # noqa: E731
            wait_until(later, what="the next second", timeout_s=3)
            shell.run("image", "build", "micro")
            assert images.find(host, "micro").manifest.digest == micro.digest
        finally:
            storage.delete_volume(host.conn, pool, volume)


def test_a_missing_tool_is_named_with_its_package() -> None:
    from vmctl.builder import tools
    from vmctl.errors import ImageError

    tools.PACKAGE_OF["no-such-tool"] = "its-package"
    try:
        with pytest.raises(ImageError) as caught:
            tools.require(["no-such-tool"], "build image micro")
    finally:
        del tools.PACKAGE_OF["no-such-tool"]
    assert "no-such-tool missing" in caught.value.message and "its-package" in caught.value.hint


def test_the_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    from vmctl.builder import cpio
    from vmctl.builder.tree import Tree

    tree = Tree()
    tree.file("a/b", b"content", 0o755)
    tree.link("l", "a/b")
    data = cpio.archive(tree, 1)
    assert data == cpio.archive(tree, 1) and data[:6] == b"070701" and b"TRAILER!!!" in data and b"content" in data


def test_a_build_without_a_network_says_what_it_could_not_reach(shell: Shell, tmp_path: Path) -> None:
    """There is none in the test host, and this cache has neither lists nor packages."""
    before = volumes(shell, "vmctl-images")
    done = shell.run("image", "build", "micro", check=10, timeout=280, env=environment(XDG_CACHE_HOME=str(tmp_path)))
    (error, hint) = done.stderr.splitlines()[-2:]
    assert error.startswith("cannot fetch Debian's package lists from ") and hint.startswith("hint: is the network up?")
    assert "apt-get" not in error and "[Errno" not in error
    assert volumes(shell, "vmctl-images") == before and not list(tmp_path.rglob(".making-*"))
    # No stamp that would keep the next run, with a network, from asking again.
    assert not list(tmp_path.rglob("updated")) and not list(tmp_path.rglob("*Packages*"))
