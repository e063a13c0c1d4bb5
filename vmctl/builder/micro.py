"""The micro image, and those based on it: from a recipe and Debian's packages to a disk, a kernel and an initramfs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from vmctl import qemu_img
from vmctl.builder import cpio, debs, ext4, kept, kernel
from vmctl.builder.recipe import Package, Recipe
from vmctl.builder.recipe import load as load_recipe
from vmctl.builder.tools import require, run
from vmctl.builder.tree import Tree
from vmctl.errors import ImageError, reason
from vmctl.events import Reporter, Step
from vmctl.manifest import NewImage
from vmctl.resources import image_recipes_dir, recipe_source

ROOT_LABEL = "vmctl-micro"
_TOOLS = ("apt-cache", "apt-get", "debugfs", "dpkg-deb", "e2fsck", "gcc", "lz4", "mke2fs", "qemu-img")
_FILES = ("vmlinux", "bzimage", "initrd", "disk.qcow2")
_FOLDERS = ("dev", "mnt", "opt", "proc", "run", "srv", "sys", "var/lib/vmctl", "var/log", "var/tmp", "etc/dropbear")
_ALIASES = ("bin", "lib", "lib64", "sbin")
# Applets that would stand in for the image's own init or pretend to a service it does not have.
_UNWANTED_APPLETS = frozenset({"init", "linuxrc", "shutdown"})


def build(name: str, out_dir: Path, report: Reporter) -> NewImage:
    """Build image ``name`` into the empty folder ``out_dir``, or take what an equal build left. Raises ImageError."""
    require(_TOOLS, f"build image {name}")
    recipe = _recipe(name)
    try:
        return _build(name, recipe, out_dir, report)
    except OSError as error:
        hint = "make room, or set XDG_CACHE_HOME to a disk that has some" if error.errno == 28 else ""
        raise ImageError(f"cannot build image {name}: {reason(error, path=True)}", hint=hint) from error


def fetch(name: str, report: Reporter) -> None:
    """Bring the packages of a recipe into the cache, for a build without a network. Raises ImageError."""
    apt, _, found = _packages(_recipe(name), report)
    debs.fetch(apt, found, debs.cache_folder() / "debs", report)


def _recipe(name: str) -> Recipe:
    return load_recipe(image_recipes_dir() / name / "recipe.toml")


def _build(name: str, recipe: Recipe, out_dir: Path, report: Reporter) -> NewImage:
    apt, packages, found = _packages(recipe, report)

    def make(paths: list[Path]) -> None:
        _make(recipe, packages, paths, out_dir, report)

    sources = image_recipes_dir() / name
    vmlinux, packed, initrd, disk = kept.taken_or_made(name, sources, apt, found, _FILES, out_dir, make, report)
    return NewImage(
        name=name,
        disk=disk,
        kernel=vmlinux,
        bzimage=packed,
        initrd=initrd,
        cmdline=recipe.cmdline,
        virtual_size=recipe.size_mib << 20,
        os_name=recipe.os_name,
        os_version=recipe.release,
        architecture=recipe.architecture,
        default_user=recipe.default_user,
        source=recipe_source(name),
        boots=("direct",),
        osinfo="debian12",
        first_boot="micro",
        software={deb.name: deb.version for deb in found},
    )


def _make(recipe: Recipe, packages: Sequence[Package], paths: Sequence[Path], out_dir: Path, report: Reporter) -> None:
    report(Step("unpacking packages"))
    root, boot, modules = Tree(), Tree(), {}
    bzimage, builtin = b"", ""
    for package, path in zip(packages, paths, strict=True):
        for file, member, data in debs.members(path, package):
            if not package.kernel:
                _place(root, file, member.mode, data, member.linkname if member.issym() else "")
            elif file.startswith("boot/vmlinuz-"):
                bzimage = data
            elif file.endswith("/modules.builtin"):
                builtin = data.decode()
            elif file.endswith(".ko"):
                modules[file] = data
    report(Step("compiling the guest's init"))
    init = kernel.compile_init(recipe.sources, recipe.epoch)
    _add_modules(recipe, kernel.Modules(modules, builtin), kernel.release(bzimage), root, boot)
    _add_system(recipe, init, root)
    _add_boot(init, boot)
    report(Step("writing kernel and initramfs"))
    vmlinux, packed, initrd, disk = (out_dir / file for file in _FILES)
    packed.write_bytes(bzimage)
    vmlinux.write_bytes(kernel.unpack(bzimage))
    initrd.write_bytes(cpio.archive(boot, recipe.epoch))
    report(Step("writing the root file system"))
    with tempfile.TemporaryDirectory(prefix="root-", dir=out_dir) as folder:
        raw = Path(folder) / "root.raw"
        ext4.make(root, raw, ext4.Shape(ROOT_LABEL, recipe.size_mib), epoch=recipe.epoch)
        qemu_img.convert(raw, "raw", disk, "qcow2")
    for path in (vmlinux, packed, initrd, disk):
        path.chmod(0o644)


def _packages(recipe: Recipe, report: Reporter) -> tuple[debs.Apt, list[Package], list[debs.Deb]]:
    apt = debs.Apt(debs.cache_folder() / "apt", recipe.debian_architecture)
    apt.refresh(report)
    packages = []
    for package in recipe.packages:
        name = apt.first_dependency(package.name, package.depends) if package.depends else package.name
        packages.append(Package(name, package.globs, kernel=package.kernel))
    return apt, packages, apt.candidates([package.name for package in packages])


def _place(root: Tree, name: str, mode: int, data: bytes, target: str) -> None:
    if target:
        # A link that spells out an unmerged folder still leads there, through the aliases.
        root.link(name, target)
    else:
        root.file(name, data, mode & 0o755)


def _add_modules(recipe: Recipe, modules: kernel.Modules, release: str, root: Tree, boot: Tree) -> None:
    lists = recipe.modules
    loaded: list[str] = []
    for moment, names, tree in (
        ("bus", lists.bus, boot),
        ("disk", lists.disk, boot),
        ("net", lists.net, boot),
        ("late", lists.late, root),
    ):
        order = [name for name in modules.closure(names) if name not in loaded]
        # What both the disk's and the network's driver need is loaded by the moment that comes first.
        loaded += order
        for name in order:
            tree.file(modules.paths[name], kernel.unsigned(modules.data[name]))
        tree.file(f"usr/lib/modules/load/{moment}", "".join(f"/{modules.paths[name]}\n" for name in order).encode())
    everything = sorted({*loaded, *modules.closure(lists.extra)})
    for name in everything:
        root.file(modules.paths[name], modules.data[name])
    folder = f"usr/lib/modules/{release}/"
    for name, data in modules.index(everything, folder).items():
        root.file(folder + name, data)


def _add_system(recipe: Recipe, init: bytes, root: Tree) -> None:
    for alias in _ALIASES:
        root.link(alias, f"usr/{alias}")
    for folder in _FOLDERS:
        root.folder(folder)
    root.folder("root", 0o700)
    root.folder("tmp", 0o1777)
    plain = recipe.sources / "root"
    for path in sorted(plain.rglob("*")):
        if path.is_file():
            executable = path.stat().st_mode & 0o100
            root.file(path.relative_to(plain).as_posix(), path.read_bytes(), 0o755 if executable else 0o644)
    root.file("usr/sbin/init", init, 0o755)
    root.link("usr/sbin/shutdown", "init")
    root.link("usr/sbin/vmctl-renew", "init")
    root.link("etc/resolv.conf", "../run/vmctl/resolv.conf")
    root.link("etc/mtab", "../proc/self/mounts")
    root.link("var/run", "../run")
    root.file("etc/os-release", _os_release(recipe).encode())
    for applet in _applets(root["usr/bin/busybox"].data):
        link = debs.merged(applet)
        if link not in root and PurePosixPath(link).name not in _UNWANTED_APPLETS:
            root.link(link, "/usr/bin/busybox")


def _os_release(recipe: Recipe) -> str:
    return (
        f'PRETTY_NAME="{recipe.os_name} {recipe.release} (vmctl)"\nNAME="{recipe.os_name}"\n'
        "ID=debian-micro\nID_LIKE=debian\n"
        f'VERSION_ID="{recipe.release}"\nVARIANT_ID=vmctl-micro\n'
    )


def _applets(busybox: bytes) -> list[str]:
    """The paths busybox would install itself under. Only the program knows: Debian ships no list."""
    with tempfile.TemporaryDirectory(prefix="vmctl-busybox-") as folder:
        program = Path(folder) / "busybox"
        program.write_bytes(busybox)
        program.chmod(0o700)
        return sorted(run([program, "--list-full"], what="list busybox's applets", timeout_s=10).decode().split())


def _add_boot(init: bytes, boot: Tree) -> None:
    boot.link("lib", "usr/lib")
    for folder in ("dev", "proc", "sys", "root"):
        boot.folder(folder)
    boot.console("dev/console")
    boot.file("init", init, 0o755)
