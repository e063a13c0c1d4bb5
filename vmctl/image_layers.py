"""Building a user's own image: each step in a guest of its own, each result a layer in the store, found again later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vmctl import copying, creation, deletion, guest, images, lifecycle, qemu_img, readiness
from vmctl.errors import GuestCommandFailed, Unsupported, quietly
from vmctl.events import Reporter, Step
from vmctl.hosts import Host
from vmctl.hypervisor import domain
from vmctl.images import Image
from vmctl.layers import BuildStep, LayeredRecipe, first_missing, keys, step_name
from vmctl.manifest import Manifest, NewImage
from vmctl.readiness import Goal
from vmctl.spec import VM

_STOP_TIMEOUT_S = 300.0
_LINES = 15
_INSTALL = """
set -e
if command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q && apt-get install -yq --no-install-recommends "$@"
elif command -v dnf >/dev/null; then dnf install -y "$@"
elif command -v zypper >/dev/null; then zypper -n install "$@"
elif command -v apk >/dev/null; then apk add "$@"
elif command -v pacman >/dev/null; then pacman -Sy --noconfirm "$@"
else echo "no package manager that vmctl knows" >&2; exit 1
fi
"""
# Owner and mode are given on the way: the target may be a folder that is there, of another's and with more in it.
_PLACE = """
set -e
cd "$1"
chown -R 0:0 "./$2"
[ -z "$4" ] || chmod "$4" "./$2"
mkdir -p "$(dirname "$3")"
if [ -d "./$2" ]; then cp -aT "./$2" "$3"; else cp -a "./$2" "$3"; fi
"""
# A line for each package, its name and version; nothing where no package manager is. Each is asked for its version
# first, for busybox has an rpm that is none.
_SOFTWARE = r"""
has() { "$1" --version >/dev/null 2>&1; }
if has dpkg-query; then dpkg-query -W -f '${db:Status-Abbrev} ${Package} ${Version}\n' | sed -n 's/^ii *//p'
elif has rpm; then rpm -qa --qf '%{NAME} %{VERSION}-%{RELEASE}\n'
elif has apk; then apk info -v | sed 's/-\([^-]*-r[0-9]*\)$/ \1/'
elif has pacman; then pacman -Q
fi
"""
# What makes two machines of one image the same machine, and what let this build in.
_SEAL = """
rm -rf /tmp/vmctl-build /var/lib/cloud/instance /var/lib/cloud/instances /var/lib/cloud/data /var/lib/cloud/sem
rm -f /etc/ssh/ssh_host_* /etc/dropbear/*_host_key /var/lib/vmctl/instance-id /var/log/cloud-init*.log
rm -f /root/.ssh/authorized_keys /home/*/.ssh/authorized_keys /var/lib/systemd/random-seed
[ ! -e /etc/machine-id ] || if [ -d /run/systemd/system ]; then : > /etc/machine-id; else rm -f /etc/machine-id; fi
! command -v apt-get >/dev/null || apt-get clean
sync
"""


def _begun(host: Host, recipe: LayeredRecipe) -> tuple[Image, tuple[str, ...], dict[str, Manifest], int]:
    """The base, the keys of all steps, the images that are results of steps, and how many steps need not be taken."""
    if not host.conn.local:
        raise Unsupported(f"cannot build image {recipe.name} there: run vmctl on {host.name} itself")
    base = images.find(host, recipe.base)
    wanted = tuple(keys(recipe, base.manifest.digest))
    layers = {manifest.layer: manifest for manifest in images.list_images(host) if manifest.layer}
    return base, wanted, layers, first_missing(wanted, frozenset(layers))


def preview(host: Host, recipe: LayeredRecipe) -> tuple[str, ...]:
    """What building the image would do. Raises as build() does before it changes anything."""
    base, wanted, layers, done = _begun(host, recipe)
    last = layers[wanted[done - 1]].stem if done else base.manifest.stem
    told = [f"go on from image {last}, {done} of {len(wanted)} steps being as they were"]
    for number in range(done, len(wanted)):
        told.append(
            f"boot VM build-{wanted[number][:12]} for step {number + 1}, {recipe.steps[number].name}; delete it"
        )
        name = recipe.name if number == len(wanted) - 1 else step_name(recipe.name, number + 1)
        told.append(images.would_add(host, name))
    if done == len(wanted):
        told.append(images.would_add(host, recipe.name))
    return tuple(told)


def build(host: Host, recipe: LayeredRecipe, report: Reporter) -> Manifest:
    """Build the image, from the last step on whose result is in the store. Raises what its guests meet."""
    current, wanted, layers, done = _begun(host, recipe)
    if done:
        current = images.with_paths(host, layers[wanted[done - 1]])
        report(Step(f"{done} of {len(wanted)} steps are as they were: going on from {current.manifest.stem}"))
    for number in range(done, len(wanted)):
        last = number == len(wanted) - 1
        name = recipe.name if last else step_name(recipe.name, number + 1)
        report(Step(f"step {number + 1} of {len(wanted)}: {recipe.steps[number].name}"))
        made = _layer(host, recipe, number, current, name, wanted, report)
        current = images.with_paths(host, made)
    if done == len(wanted):
        with images.making(host, recipe.name):
            if current.manifest.name == recipe.name:  # the plain name may mean a later build, with other steps
                return images.renew(host, current.manifest, report)
            # An earlier build's middle, or another recipe's end, is this one's end.
            return images.add(host, _new(current, recipe.name, wanted, Path(current.disk)), report)
    return current.manifest


def _layer(
    host: Host, recipe: LayeredRecipe, number: int, base: Image, name: str, keys: Sequence[str], report: Reporter
) -> Manifest:
    """The image ``name``, which step ``number`` (from 0) makes of ``base``."""
    machine = f"build-{keys[number][:12]}"
    with images.making(host, name) as folder:
        if domain.find_or_none(host.conn, machine) is not None:
            deletion.delete(host, machine, report)  # of a build that was killed: we hold the image's name
        vm = VM(machine, base.manifest.stem, memory_mib=recipe.memory_mib, vcpus=recipe.vcpus)
        try:
            made = creation.create(host, vm, report).vm
            goal = Goal.CLOUD_INIT if base.manifest.first_boot == "cloud-init" else Goal.SSH
            readiness.wait_for(host, made, Goal.SSH, timeout_s=None, report=report)
            if goal is Goal.CLOUD_INIT:  # or its package work would be in the way of ours
                readiness.wait_for(host, made, goal, timeout_s=None, report=report)
            packages = _take_step(host, machine, base.manifest, recipe.steps[number], report)
            lifecycle.stop(host, machine, report, timeout_s=_STOP_TIMEOUT_S)
            overlay = next(disk.source for disk in domain.find(host.conn, machine).facts.disks)
            qemu_img.convert(Path(overlay), "qcow2", folder / "disk.qcow2", "qcow2")
        finally:
            quietly(lambda: deletion.delete(host, machine, report))
        step_of = "" if name == recipe.name else recipe.name
        new = _new(base, name, keys[: number + 1], folder / "disk.qcow2", step_of)
        return images.add(host, replace(new, software=packages or new.software), report)


def _take_step(host: Host, machine: str, manifest: Manifest, step: BuildStep, report: Reporter) -> dict[str, str]:
    """Do what a step says; returns the packages that are in the guest then, with their versions."""
    if step.packages:
        _run(
            host,
            machine,
            manifest,
            ["sh", "-c", _INSTALL, "sh", *step.packages],
            f"install {', '.join(step.packages)}",
        )
    for number, file in enumerate(step.files):
        # Through a folder of the login user's: what the target belongs to, only root may write.
        passage = f"/tmp/vmctl-build/{number}"
        _run(host, machine, manifest, ["sh", "-c", 'mkdir -p -m 777 "$1" /tmp/vmctl-build', "sh", passage], "make room")
        copying.copy(host, [str(file.source)], f"{machine}:{passage}/", report)
        _run(
            host,
            machine,
            manifest,
            ["sh", "-c", _PLACE, "sh", passage, file.source.name, file.target, file.mode],
            f"put {file.target}",
        )
    for command in step.commands:
        _run(host, machine, manifest, ["sh", "-c", command], f"run {command!r}")
    told = _run(host, machine, manifest, ["sh", "-c", _SOFTWARE], "list the packages")
    _run(host, machine, manifest, ["sh", "-c", _SEAL], "clean up")
    return software(told)


def software(told: str) -> dict[str, str]:
    """Versions by package, in order, from lines of both; others are passed over. Pure."""
    pairs = (line.split(" ") for line in told.splitlines())
    return dict(sorted((pair[0], pair[1]) for pair in pairs if len(pair) == 2 and all(pair)))


def _run(host: Host, machine: str, manifest: Manifest, argv: list[str], what: str) -> str:
    """What a command, run as root in the build guest, prints. Raises GuestCommandFailed with the last lines it said."""
    said, out = bytearray(), bytearray()

    def heard(data: bytes) -> None:
        said.extend(data)
        out.extend(data)

    prefix = [] if manifest.default_user == "root" else ["sudo", "-n"]
    code = guest.execute(host, machine, [*prefix, *argv], stdin=None, out=heard, err=said.extend)
    if code:
        lines = said.decode(errors="replace").splitlines()[-_LINES:]
        raise GuestCommandFailed(f"cannot {what} in the build guest: exit code {code}", evidence=lines)
    return out.decode(errors="replace")


def _new(base: Image, name: str, keys: Sequence[str], disk: Path, step_of: str = "") -> NewImage:
    """An image like ``base`` but for its disk, by the steps of these ``keys``.

    Its kernel is the base's, whose modules a step leaves in place.
    """
    kept = base.manifest
    return NewImage(
        name=name,
        disk=disk,
        virtual_size=kept.virtual_size,
        os_name=kept.os,
        os_version=kept.os_version,
        architecture=kept.architecture,
        default_user=kept.default_user,
        source=f"{kept.stem}, by steps",
        cmdline=kept.cmdline,
        boots=kept.boots,
        osinfo=kept.osinfo,
        verified=kept.verified,
        first_boot=kept.first_boot,
        software=kept.software,
        kernel=Path(base.kernel) if base.kernel else None,
        initrd=Path(base.initrd) if base.initrd else None,
        bzimage=Path(base.bzimage) if base.bzimage else None,
        layer=keys[-1],
        built_on=tuple(keys[:-1]),
        step_of=step_of,
    )
