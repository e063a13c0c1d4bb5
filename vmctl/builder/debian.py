"""A Debian image: from its recipe and Debian's packages to a disk for BIOS and UEFI, and a kernel to start directly."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vmctl import qemu_img
from vmctl.builder import bootstrap, bytecode, cpio, debs, disk, ext4, kept, kernel, rootfs
from vmctl.builder.tools import require
from vmctl.builder.tree import Entry, Kind, Tree
from vmctl.errors import ImageError, reason
from vmctl.events import Reporter, Step
from vmctl.manifest import NewImage
from vmctl.resources import image_recipes_dir, recipe_source

_TOOLS = (
    "apt-cache", "apt-get", "debugfs", "dpkg-deb", "e2fsck", "gcc", "lz4", "mcopy", "mformat", "mke2fs", "mmd",
    "mmdebstrap", "qemu-img", "sfdisk",
)  # fmt: skip
_FILES = ("disk.qcow2", "vmlinux", "initrd")
_JOURNAL_MIB = 64
_INODE_RATIO = 16384
_GRUB = "usr/lib/grub/i386-pc"
_FIRST_BOOT = "usr/lib/systemd/system-generators/vmctl-first-boot"
_SIGNED = {
    "shimx64.efi": "usr/lib/shim/shimx64.efi.signed",
    "mmx64.efi": "usr/lib/shim/mmx64.efi.signed",
    "grubx64.efi": "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed",
}
# Runs in the new system. GRUB's core is made by the GRUB that the image has.
_FINISH = """set -eu
mkdir -p "$1/boot/grub/i386-pc" "$1/boot/efi"
chroot "$1" grub-mkimage -O i386-pc -p '(,gpt1)/boot/grub' -o /boot/grub/i386-pc/core.img biosdisk part_gpt ext2
cd "$1/usr/lib/grub/i386-pc"
cp *.mod *.lst boot.img "$1/boot/grub/i386-pc/"
touch "$1/etc/grub.d/enable_cloud"
chroot "$1" systemctl enable systemd-networkd.service
chroot "$1" systemctl disable e2scrub_reap.service e2scrub_all.timer
chroot "$1" groupadd --force --system netdev
# Neither names nor the time of day are needed to log in: after sshd and network, which else wait for the processor.
# As whole units, for no drop-in can take away a Before=.
late='After=ssh.service systemd-networkd-wait-online.service'
for unit in systemd-resolved systemd-timesyncd; do
    sed -e '/^Before=/s/ *\\(sysinit\\|network\\)\\.target//g' -e "/^\\[Unit\\]/a $late" \\
        "$1/usr/lib/systemd/system/$unit.service" > "$1/etc/systemd/system/$unit.service"
done
# It looks for its servers, one after the other, in the moment in which a network is there: a fork's, in which somebody
# waits to log in. It gets what nobody else wants.
sed -i '/^\\[Service\\]/a CPUSchedulingPolicy=idle' "$1/etc/systemd/system/systemd-timesyncd.service"
# A login shows the message that is there, and does not run five programs first to make one of the kernel's version.
sed -i '/pam_motd\\.so *motd=/d' "$1/etc/pam.d/sshd"
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an image is made of."""

    os_name: str
    release: str
    suite: str
    architecture: str
    debian_architecture: str
    default_user: str
    osinfo: str
    size_mib: int
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    cmdline: str
    grub_cmdline: str


def load(path: Path) -> Recipe:
    """Read a recipe. Raises ImageError for one that is not whole."""
    try:
        values = tomllib.loads(path.read_text())
        image = values["image"]
        return Recipe(
            **image,
            packages=tuple(values["packages"]["names"]),
            modules=tuple(values["kernel"]["modules"]),
            cmdline=" ".join(values["kernel"]["cmdline"]),
            grub_cmdline=" ".join(values["grub"]["cmdline"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImageError(f"cannot read recipe {path}: {reason(error)}") from error


def build(name: str, out_dir: Path, report: Reporter) -> NewImage:
    """Build image ``name`` into the empty folder ``out_dir``, or take what an equal build left. Raises ImageError."""
    what = f"build image {name}"
    require(_TOOLS, what)
    sources = image_recipes_dir() / name
    recipe = load(sources / "recipe.toml")
    try:
        cache = debs.cache_folder()
        apt = debs.Apt(cache / "apt", recipe.debian_architecture)
        apt.refresh(report)
        found = apt.candidates(apt.installed_for(recipe.packages))

        def make(paths: list[Path]) -> None:
            _Build(name, recipe, sources, out_dir, report).make(found, paths)

        files = kept.taken_or_made(name, sources, apt, found, _FILES, out_dir, make, report)
        return _described(name, recipe, files, found)
    except OSError as error:
        hint = "make room, or set XDG_CACHE_HOME to a disk that has some" if error.errno == 28 else ""
        raise ImageError(f"cannot {what}: {reason(error, path=True)}", hint=hint) from error


def _described(name: str, recipe: Recipe, files: Sequence[Path], found: Sequence[debs.Deb]) -> NewImage:
    image, vmlinux, initrd = files
    return NewImage(
        name=name,
        disk=image,
        kernel=vmlinux,
        initrd=initrd,
        cmdline=recipe.cmdline,
        virtual_size=recipe.size_mib << 20,
        os_name=recipe.os_name,
        os_version=recipe.release,
        architecture=recipe.architecture,
        default_user=recipe.default_user,
        source=recipe_source(name),
        boots=("direct", "bios", "uefi", "uefi-secure"),
        osinfo=recipe.osinfo,
        software={deb.name: deb.version for deb in found},
    )


class _Build:
    """One build in its folder."""

    def __init__(self, name: str, recipe: Recipe, sources: Path, folder: Path, report: Reporter) -> None:
        self.name, self.recipe, self.sources, self.folder, self.report = name, recipe, sources, folder, report
        self.layout = disk.Layout(recipe.size_mib)
        self.epoch = 0

    def make(self, found: list[debs.Deb], paths: list[Path]) -> None:
        """Write disk.qcow2, vmlinux and initrd."""
        self.epoch = bootstrap.built_at(paths)
        system = self.folder / "system.tar"
        overlay = self.folder / "overlay.tar"
        overlay.write_bytes(self._overlay())
        bootstrap.make(
            found, paths, system, self.report, suite=self.recipe.suite, architecture=self.recipe.debian_architecture,
            overlay=overlay, finish=_FINISH, epoch=self.epoch,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="system-", dir=self.folder) as folder:
            self.report(Step("taking the system apart"))
            tree = rootfs.read(system, Path(folder))
            system.unlink()
            bytecode.date(tree)
            self._settle(tree)
            self._direct(tree)
            self._disk(tree)

    def _overlay(self) -> bytes:
        """root/ beside the recipe as a tar archive, owned by root, with fixed times."""
        out = io.BytesIO()
        root = self.sources / "root"
        with tarfile.open(fileobj=out, mode="w") as archive:
            for path in sorted(root.rglob("*")):
                if path.is_dir() and not path.is_symlink():  # the system's own keep their modes
                    continue
                info = archive.gettarinfo(path, path.relative_to(root).as_posix())
                info.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
                info.uid = info.gid = 0
                info.uname = info.gname = "root"
                info.mtime = self.epoch
                if info.issym():
                    archive.addfile(info)
                else:
                    archive.addfile(info, io.BytesIO(path.read_bytes()))
            program = self._first_boot()
            info = tarfile.TarInfo(_FIRST_BOOT)
            info.mode, info.size, info.mtime = 0o755, len(program), self.epoch
            archive.addfile(info, io.BytesIO(program))
        return out.getvalue()

    def _first_boot(self) -> bytes:
        """The program that reads the seed before cloud-init does; how to read one it has from the micro image."""
        micro = self.sources.parent / "micro"
        shared = [micro / name for name in ("files.c", "hostkey.c", "iso.c", "renew.c", "yaml.c")]
        return kernel.compile_static([*sorted((self.sources / "first-boot").glob("*.c")), *shared], micro, self.epoch)

    def _settle(self, tree: Tree) -> None:
        """What a machine has instead of what the build left."""
        fat, root = disk.fat_uuid(self.name), ext4.identity(self.name)
        fstab = (
            f"UUID={root} / ext4 errors=remount-ro 0 1\n"
            # Mounted when GRUB is updated, not at each boot.
            f"UUID={fat} /boot/efi vfat umask=0077,noauto,x-systemd.automount,x-systemd.idle-timeout=60 0 0\n"
        )
        tree.file("etc/fstab", fstab.encode())
        tree.file("etc/machine-id", b"", 0o444)  # empty: systemd chooses one at the first boot
        tree.file("etc/hostname", b"debian\n")
        tree.link("usr/sbin/vmctl-renew", f"/{_FIRST_BOOT}")
        tree.link("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")
        tree.link("var/lib/dbus/machine-id", "/etc/machine-id")
        tree.file("boot/grub/grub.cfg", self._grub_cfg(tree).encode(), 0o600)

    def _grub_cfg(self, tree: Tree) -> str:
        """A first grub.cfg; update-grub writes the next. Asking grub-mkconfig here would describe the building host."""
        release, root = _release(tree), ext4.identity(self.name)
        return (
            "set timeout=0\nset default=0\n"
            f"menuentry '{self.recipe.os_name}' {{\n"
            f"  search --no-floppy --fs-uuid --set=root {root}\n"
            f"  linux /boot/vmlinuz-{release} root=UUID={root} ro {self.recipe.grub_cmdline}\n"
            f"  initrd /boot/initrd.img-{release}\n}}\n"
        )

    def _direct(self, tree: Tree) -> None:
        """Kernel and initramfs of the direct boot."""
        self.report(Step("writing kernel and initramfs"))
        release = _release(tree)
        folder = f"usr/lib/modules/{release}/"
        (self.folder / "vmlinux").write_bytes(kernel.unpack(_content(tree, f"boot/vmlinuz-{release}")))
        boot = Tree()
        for mount_point in ("dev", "proc", "root"):
            boot.folder(mount_point)
        boot.console("dev/console")
        boot.file("init", kernel.compile_init(self.sources / "initramfs", self.epoch), 0o755)
        listed = _content(tree, f"{folder}modules.dep").decode()
        order = kernel.load_order(listed, self.recipe.modules)
        for path in order:
            boot.file(Path(path).name, kernel.unsigned(_content(tree, folder + path)))
        boot.file("load", "".join(f"/{Path(path).name}\n" for path in order).encode())
        (self.folder / "initrd").write_bytes(cpio.archive(boot, self.epoch))

    def _disk(self, tree: Tree) -> None:
        esp, root, raw = (self.folder / f"{part}.raw" for part in ("esp", "root", "disk"))
        signed = {name: _content(tree, path) for name, path in _SIGNED.items()}
        root_id = ext4.identity(self.name)
        own = f"search.fs_uuid {root_id} root\nset prefix=($root)/boot/grub\nconfigfile $prefix/grub.cfg\n"
        files = {f"EFI/debian/{name}": data for name, data in signed.items()}
        # The removable path, for firmware without an entry of ours; no fbx64, which would write one and reset.
        files |= {f"EFI/BOOT/{name}": data for name, data in signed.items() if name != "shimx64.efi"}
        files |= {"EFI/BOOT/BOOTX64.EFI": signed["shimx64.efi"], "EFI/debian/grub.cfg": own.encode()}
        disk.make_esp(files, esp, name=self.name, size_mib=self.layout.esp.size_mib, epoch=self.epoch)
        self.report(Step("writing the root file system"))
        shape = ext4.Shape(self.name, self.layout.root.size_mib, _INODE_RATIO, _JOURNAL_MIB, lazy=False)
        ext4.make(tree, root, shape, epoch=self.epoch)
        self.report(Step("writing the disk"))
        disk.assemble(
            raw, self.layout, name=self.name, root=root, esp=esp, boot=_content(tree, f"{_GRUB}/boot.img"),
            core=_content(tree, "boot/grub/i386-pc/core.img"), epoch=self.epoch,
        )  # fmt: skip
        root.unlink()
        qemu_img.convert(raw, "raw", self.folder / "disk.qcow2", "qcow2")
        raw.unlink()
        for name in _FILES:
            (self.folder / name).chmod(0o644)


def _release(tree: Tree) -> str:
    found = [path.removeprefix("boot/vmlinuz-") for path in tree.entries if path.startswith("boot/vmlinuz-")]
    if len(found) != 1:
        raise ImageError(f"cannot use the system: it has {len(found)} kernels, not one")
    return found[0]


def _content(tree: Tree, path: str) -> bytes:
    if path not in tree:
        raise ImageError(f"cannot use the system: it has no /{path}")
    entry: Entry = tree[path]
    if entry.same_as:
        entry = tree[entry.same_as]
    if entry.kind is Kind.LINK:
        return _content(tree, os.path.normpath(PurePosixPath(path).parent / entry.data.decode()).lstrip("/"))
    return entry.source.read_bytes() if entry.source else entry.data
