"""vmctl image: the group, with build, list, show and delete; the others are in files of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from vmctl import ui
from vmctl.cli import image_care, image_files
from vmctl.cli.command import Command
from vmctl.cli.options import ConnectOption, ImageName, OutputOption, YesOption, opened, refuse_unless_yes, reporter
from vmctl.ui import Output

if TYPE_CHECKING:
    from vmctl.manifest import Manifest

app = typer.Typer(help="Images that VMs start from.", no_args_is_help=True, rich_markup_mode=None)


def _details(m: Manifest) -> str:
    return ui.fields(
        [
            ("name", m.name),
            ("digest", m.digest),
            ("os", f"{m.os} {m.os_version} ({m.architecture})"),
            ("format", m.format),
            ("virtual size", ui.size(m.virtual_size)),
            ("size", ui.size(m.size)),
            ("tags", ", ".join(m.tags)),
            ("default user", m.default_user),
            ("starts by", ", ".join(m.boots)),
            ("kernel", f"direct boot, sha256 {m.kernel_sha256}" if m.kernel_sha256 else ""),
            ("command line", m.cmdline),
            ("source", m.source),
            ("checksum", m.checksum if m.verified else "none was checked"),
            ("built", m.built_at),
            ("software", "\n".join(f"{name} {version}" for name, version in m.software.items())),
        ]
    )


@app.command(cls=Command)
def build(
    name: ImageName,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Build an image by its recipe and put it into the store."""
    from vmctl import image_build

    with opened(connect) as host:
        manifest = image_build.build(host, name, reporter())
        ui.emit(manifest, output, lambda: manifest.stem, lambda: [manifest.stem])


@app.command("list", cls=Command)
def list_(connect: ConnectOption = None, output: OutputOption = Output.TABLE) -> None:
    """List the images in the store."""
    from vmctl import images

    with opened(connect) as host:
        found = images.list_images(host)
        ui.emit(
            found,
            output,
            lambda: ui.columns(
                ("NAME", "DIGEST", "OS", "FORMAT", "SIZE", "BUILT"),
                [
                    (m.name, m.digest[:12], f"{m.os} {m.os_version}", m.format, ui.size(m.size), m.built_at)
                    for m in found
                ],
            ),
            lambda: [m.stem for m in found],
        )


@app.command(cls=Command)
def show(name: ImageName, connect: ConnectOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show an image's manifest."""
    from vmctl import images

    with opened(connect) as host:
        manifest = images.find(host, name).manifest
        ui.emit(manifest, output, lambda: _details(manifest), lambda: [manifest.stem])


@app.command(cls=Command)
def delete(name: ImageName, yes: YesOption = False, connect: ConnectOption = None) -> None:
    """Delete an image that no VM needs."""
    from vmctl import images

    with opened(connect) as host:
        manifest = images.find(host, name).manifest
        refuse_unless_yes([f"image {manifest.stem}, {ui.size(manifest.size)}"], yes=yes)
        images.delete(host, manifest.stem, reporter())
        ui.say(manifest.stem)


app.command("import", cls=Command)(image_files.import_)
app.command(cls=Command)(image_files.export)
app.command(cls=Command)(image_care.tag)
app.command(cls=Command)(image_care.verify)
app.command(cls=Command)(image_care.prune)
