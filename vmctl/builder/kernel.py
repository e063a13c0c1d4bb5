"""Debian's kernel, unpacked to the ELF file a hypervisor can start through its PVH note, and its modules."""

from __future__ import annotations

import lzma
import re
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from vmctl.builder.tools import HUNG_S, run
from vmctl.errors import ImageError

_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_XZ = b"\xfd7zXZ"
_SIGNATURE_MARK = b"~Module signature appended~\n"


def unpack(bzimage: bytes) -> bytes:
    """The ELF vmlinux inside a bzImage (Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length).

    QEMU starts it directly: half a second less under emulation than a kernel that first unpacks itself from LZ4, and
    more than from XZ.
    """
    if bzimage[0x202:0x206] != b"HdrS":
        raise ImageError("cannot unpack the kernel: it is no bzImage")
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    begin = (setup_sectors + 1) * 512 + offset
    payload = bzimage[begin : begin + length]
    # The last four bytes are the unpacked size, which is not part of the frame.
    (size,) = struct.unpack("<I", payload[-4:])
    if payload.startswith(_LZ4_LEGACY):  # Debian's cloud kernel
        kernel = run(["lz4", "-d", "-c"], what="unpack the kernel", timeout_s=HUNG_S, stdin=payload[:-4])
    elif payload.startswith(_XZ):  # and its generic one
        kernel = _unxz(payload[:-4])
    else:
        text = f"cannot unpack the kernel: its payload begins with {payload[:4].hex()}, not as LZ4 or XZ does"
        raise ImageError(text)
    if len(kernel) != size or kernel[:4] != b"\x7fELF":
        raise ImageError(f"cannot unpack the kernel: got {len(kernel)} bytes that should be an ELF file of {size}")
    return kernel


def _unxz(frame: bytes) -> bytes:
    try:
        return lzma.decompress(frame, lzma.FORMAT_XZ)
    except lzma.LZMAError as error:
        raise ImageError(f"cannot unpack the kernel: {error}") from error


def unsigned(module: bytes) -> bytes:
    """The module without its appended signature (struct module_signature in Linux), to be loaded without checking it.

    Hashing and an RSA operation for each of ten modules is a twentieth of an emulated boot, and what it would prove
    is nothing here: kernel and initramfs come from the same unsigned image. The kernel notes taint flag E.
    """
    if not module.endswith(_SIGNATURE_MARK):
        return module
    (length,) = struct.unpack_from(">I", module, len(module) - len(_SIGNATURE_MARK) - 4)
    return module[: len(module) - len(_SIGNATURE_MARK) - 12 - length]


def _info(module: bytes, field: bytes) -> list[str]:
    return [found.decode() for found in re.findall(rb"(?<=\0)" + field + rb"=([^\0]*)\0", module)]


def module_name(path: str) -> str:
    """A module's name: of its file, with the underscores the kernel uses."""
    return PurePosixPath(path).name.removesuffix(".ko").replace("-", "_")


class Modules:
    """The kernel's modules by name, with what they need."""

    def __init__(self, files: Mapping[str, bytes], builtin: str) -> None:
        self.paths = {module_name(path): path for path in files}
        self.data = {module_name(path): data for path, data in files.items()}
        self._builtin = {module_name(line) for line in builtin.split()}

    def depends(self, name: str) -> list[str]:
        """Names of the modules that ``name`` needs directly."""
        found = _info(self.data[name], b"depends")
        return [one.replace("-", "_") for line in found for one in line.split(",") if one]

    def closure(self, names: Iterable[str]) -> list[str]:
        """``names`` and all they need, in an order they can be loaded in. Built-in ones are left out."""
        order: list[str] = []

        def add(name: str) -> None:
            if name in order or name in self._builtin:
                return
            if name not in self.paths:
                raise ImageError(
                    f"cannot build the image: the kernel has no module {name}", hint="see [modules] in the recipe"
                )
            for needed in self.depends(name):
                add(needed)
            order.append(name)

        for name in names:
            add(name.replace("-", "_"))
        return order

    def index(self, names: Iterable[str], root: str) -> dict[str, bytes]:
        """modules.dep and modules.alias for modprobe, with paths relative to ``root``."""
        dep, alias = [], []
        for name in names:
            needed = [self.paths[one].removeprefix(root) for one in self.closure([name])[:-1][::-1]]
            dep.append(f"{self.paths[name].removeprefix(root)}: {' '.join(needed)}".strip())
            alias += [f"alias {pattern} {name}" for pattern in _info(self.data[name], b"alias")]
        return {"modules.dep": ("\n".join(dep) + "\n").encode(), "modules.alias": ("\n".join(alias) + "\n").encode()}


def load_order(modules_dep: str, names: Iterable[str]) -> list[str]:
    """Paths of the modules and all they need, as depmod's list has them, each after what it needs."""
    needs = {path: needed.split() for path, _, needed in (line.partition(":") for line in modules_dep.splitlines())}
    paths = {module_name(path): path for path in needs}
    order: list[str] = []
    for name in names:
        path = paths.get(name)
        if path is None:
            raise ImageError(
                f"cannot build the image: the kernel has no module {name}", hint="see modules in the recipe"
            )
        order += [one for one in (*reversed(needs[path]), path) if one not in order]
    return order


def release(bzimage: bytes) -> str:
    """The kernel's release, from the version string its header points to."""
    (pointer,) = struct.unpack_from("<H", bzimage, 0x20E)
    text = bzimage[pointer + 0x200 : pointer + 0x200 + 128].split(b"\0")[0]
    return text.split(b" ")[0].decode()


def compile_init(sources: Path, epoch: int) -> bytes:
    """The guest's init from the C files of a folder, as one static program."""
    return compile_static(sorted(sources.glob("*.c")), sources, epoch)


def compile_static(sources: Sequence[Path], headers: Path, epoch: int) -> bytes:
    """One static program from C files, with the same bytes wherever they are."""
    with tempfile.TemporaryDirectory(prefix="vmctl-init-") as folder:
        out = Path(folder) / "init"
        options: list[str | Path] = [*sorted({f"-ffile-prefix-map={path.parent}/=" for path in sources}), "-I", headers]
        run(
            ["gcc", "-std=gnu11", "-O2", "-static", "-s", "-fno-ident", *options, "-Wl,--build-id=none", "-o", out,
             *sources],
            what="compile the guest's init", timeout_s=HUNG_S, env={"SOURCE_DATE_EPOCH": str(epoch)},
        )  # fmt: skip
        return out.read_bytes()
