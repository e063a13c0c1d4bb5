"""vmctl image import, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli.options import ConnectOption, DryRunOption, ImageName, OutputOption, opened, reporter
from vmctl.errors import SpecError
from vmctl.ui import Output

UserOption = Annotated[
    str,
    typer.Option("--user", metavar="USER", help="User to log in as; default: told by its cloud-init, system or name."),
]
BootsOption = Annotated[
    str,
    typer.Option("--boots", metavar="LIST", help="How it can start: of bios, uefi, uefi-secure, with commas between."),
]


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Disk image, .ova or Vagrant .box.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name in the store; default: the file's.")] = "",
    format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="qcow2, raw, vmdk, vdi or vhdx; default: told by itself.")
    ] = "",
    checksum: Annotated[
        str, typer.Option("--checksum", metavar="SUM", help="What it must match: sha256:HEX or sha512:HEX.")
    ] = "",
    os: Annotated[str, typer.Option("--os", metavar="NAME", help="Operating system in it.")] = "unknown",
    os_version: Annotated[str, typer.Option("--os-version", metavar="VERSION", help="And its version.")] = "",
    user: UserOption = "",
    boots: BootsOption = "bios",
    arch: Annotated[
        str,
        typer.Option("--arch", metavar="ARCH", help="Its architecture, as `uname -m` says; default: this machine's."),
    ] = "",
    max_size: Annotated[
        str, typer.Option("--max-size", metavar="SIZE", help="Largest disk taken, such as 100G.")
    ] = "2T",
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Import a disk image, an .ova or a Vagrant .box, trusting nothing in it."""
    from vmctl import image_import, spec

    wish = image_import.Wish(
        file=file,
        name=name,
        format=format,
        checksum=checksum,
        os_name=os,
        os_version=os_version,
        user=user,
        boots=tuple(boots.split(",")),
        architecture=arch,
        most_bytes=spec.parse_size_mib(max_size) << 20,
    )
    with opened(connect) as host:
        if dry_run:
            ui.say("\n".join(f"would {line}" for line in image_import.preview(host, wish, reporter())))
            return
        manifest = image_import.import_image(host, wish, reporter())
        ui.emit(manifest, output, lambda: manifest.stem, lambda: [manifest.stem])


def export(
    name: ImageName,
    file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="[FILE]", help="File to write; IMAGE.FORMAT here by default."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format", metavar="FORMAT", help="qcow2, raw, vmdk, vdi, vhdx, ova or box; default: by the ending."
        ),
    ] = "",
    compress: Annotated[bool, typer.Option("--compress", help="Smaller and slower (qcow2, vmdk).")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Write over a file that is there.")] = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Write an image to a file: a disk image, an .ova or a Vagrant box for libvirt."""
    from vmctl import image_export

    if file is None:
        if not format:
            raise SpecError(
                f"cannot export image {name}: neither FILE nor --format says to what",
                hint=f"for example --format qcow2, which writes {name}.qcow2 here",
            )
        file = Path(f"{name}.{format}")
    with opened(connect) as host:
        done = image_export.export(host, name, file, reporter(), format=format, compress=compress, force=force)
        ui.emit(done, output, lambda: done.file, lambda: [done.file])
