"""vmctl image: the group, with build, search, pull, list, show and delete; the others are in files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli import image_care, image_files, image_warm
from vmctl.cli.command import Command, group
from vmctl.cli.options import (
    ConnectOption,
    DryRunOption,
    ImageName,
    OutputOption,
    YesOption,
    opened,
    refuse_unless_yes,
    reporter,
)
from vmctl.errors import HostUnreachable, VmctlError
from vmctl.ui import Output

if TYPE_CHECKING:
    from vmctl.manifest import Manifest

_KNOWN_BY = {
    "inside": " (its own files say so)",
    "os": " (by its system)",
    "name": " (a guess by its file's name)",
    "nothing": " (assumed: nothing tells)",
}

app = group("Images that VMs start from.")


def _complete(incomplete: str) -> list[str]:
    from vmctl import catalog, config

    try:
        found = catalog.load(config.folders().config / "catalog.d")
    except VmctlError:
        return []  # a shell that completes has no place for an error
    known = [*found.aliases, *(entry.name for entry in found.entries)]
    return sorted(one for one in known if one.startswith(incomplete))


def _details(m: Manifest) -> str:
    return ui.fields(
        [
            ("name", m.name),
            ("digest", m.digest),
            ("os", f"{m.os} {m.os_version} ({m.architecture})".strip()),
            ("format", m.format),
            ("virtual size", ui.size(m.virtual_size)),
            ("size", ui.size(m.size)),
            ("tags", ", ".join(m.tags)),
            ("step of", m.step_of),
            ("default user", f"{m.default_user}{_KNOWN_BY.get(m.default_user_by, '')}"),
            ("starts by", ", ".join(m.boots)),
            ("kernel", f"direct boot, sha256 {m.kernel_sha256}" if m.kernel_sha256 else ""),
            ("command line", m.cmdline),
            ("source", m.source),
            ("checksum", m.checksum if m.verified else "NOT VERIFIED: it was taken without a checksum"),
            ("built", m.built_at),
            ("warm", _warm(m)),
            ("software", "\n".join(f"{name} {version}" for name, version in m.software.items())),
        ]
    )


def _warm(m: Manifest) -> str:
    if m.warm is None:
        return ""
    kept = m.warm
    what = f"{kept.memory_mib} MiB, {kept.vcpus} vCPU, {kept.machine}, CPU {kept.cpu} on {kept.accel}"
    return f"{what}, QEMU {kept.hypervisor}; takes {ui.size(kept.size)}"


@app.command(cls=Command)
def build(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Name of a recipe that comes with vmctl, or the path of a .toml.")
    ],
    dry_run: DryRunOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Build an image by a recipe of vmctl's, or by one of your own, and put it into the store."""
    from vmctl import image_build

    report = reporter()
    with opened(connect) as host:
        if name.endswith(".toml"):
            from vmctl import image_layers, layers

            recipe = layers.load(Path(name))
            if dry_run:
                ui.say("\n".join(f"would {line}" for line in image_layers.preview(host, recipe)))
                return
            manifest = image_layers.build(host, recipe, report)
        elif dry_run:
            ui.say("\n".join(f"would {line}" for line in image_build.preview(host, name)))
            return
        else:
            manifest = image_build.build(host, name, report)
        ui.emit(manifest, output, lambda: manifest.stem, lambda: [manifest.stem])


def _in_words(in_store: bool | None) -> str:
    return "?" if in_store is None else "yes" if in_store else "no"


@app.command(cls=Command)
def search(
    term: Annotated[str, typer.Argument(metavar="[TERM]", help="Part of a name, an alias or a system.")] = "",
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the images that can be pulled by name."""
    from vmctl import config, image_pull

    users = config.folders().config / "catalog.d"
    try:
        with opened(connect) as host:
            found = image_pull.search(host, users, term)
    except HostUnreachable:
        found = image_pull.search(None, users, term)  # what can be pulled is worth knowing before there is a host
    ui.emit(
        [{**ui.jsonable(one.image), "in_store": one.in_store} for one in found],
        output,
        lambda: ui.columns(
            ("NAME", "OS", "ARCH", "BOOTS", "IN STORE", "ALIASES"),
            [
                (
                    one.image.name,
                    f"{one.image.os} {one.image.os_version}",
                    one.image.architecture,
                    ", ".join(one.image.boots),
                    _in_words(one.in_store),
                    ", ".join(one.image.aliases),
                )
                for one in found
            ],
        ),
        lambda: [one.image.name for one in found],
    )


@app.command(cls=Command)
def pull(
    what: Annotated[
        str, typer.Argument(metavar="NAME|URL", help="A name in the catalogue, or a URL.", autocompletion=_complete)
    ],
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--name", metavar="NAME", help="What to call it in the store."),
    ] = None,
    checksum: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--checksum", metavar="SUM", help="sha256:HEX, sha512:HEX, or the URL of a checksum file."),
    ] = None,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Take it unchecked; it is marked so for ever.")
    ] = False,
    os: Annotated[str, typer.Option("--os", metavar="NAME", help="Operating system in it, for a URL.")] = "",
    os_version: Annotated[str, typer.Option("--os-version", metavar="VERSION", help="And its version.")] = "",
    user: image_files.UserOption = "",
    boots: image_files.BootsOption = "",
    max_size: Annotated[
        str, typer.Option("--max-size", metavar="SIZE", help="Largest download; default: 64G, by name the catalogue's.")
    ] = "",
    stall_timeout: Annotated[
        float,
        typer.Option("--stall-timeout", metavar="SECONDS", min=0.1, max=86400.0, help="Longest time without a byte."),
    ] = 30.0,
    tries: Annotated[
        int, typer.Option("--tries", metavar="N", min=1, help="Tries in a row that may bring nothing new.")
    ] = 5,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Download an image, check it, and put it into the store; go on with a download that was cut off."""
    from vmctl import image_pull
    from vmctl.download import Patience

    told = {"os": os, "os_version": os_version, "default_user": user, "boots": tuple(boots.split(",")) if boots else ""}
    with opened(connect) as host:
        manifest = image_pull.pull(
            host,
            what,
            reporter(),
            name=name or "",
            checksum=checksum or "",
            verify=not no_verify,
            patience=Patience(stall_timeout, tries),
            told={key: value for key, value in told.items() if value},
            max_size=max_size,
        )
        ui.emit(manifest, output, lambda: manifest.stem, lambda: [manifest.stem])


def _remark(m: Manifest) -> str:
    parts = [
        "warm" if m.warm else "",
        f"a step of {m.step_of}" if m.step_of else "",
        "" if m.verified else "NOT VERIFIED",
    ]
    return ", ".join(part for part in parts if part)


@app.command("list", cls=Command)
def list_(connect: ConnectOption = None, output: OutputOption = Output.TABLE) -> None:
    """List the images in the store."""
    from vmctl import images

    with opened(connect) as host:
        found = images.list_images(host, anew=True)
        ui.emit(
            found,
            output,
            lambda: ui.columns(
                ("NAME", "DIGEST", "TAGS", "OS", "FORMAT", "SIZE", "BUILT", "NOTE"),
                [
                    (
                        m.name,
                        m.short,
                        ", ".join(m.tags),
                        f"{m.os} {m.os_version}".strip(),
                        m.format,
                        ui.size(m.size),
                        m.built_at,
                        _remark(m),
                    )
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
def delete(
    name: ImageName, yes: YesOption = False, dry_run: DryRunOption = False, connect: ConnectOption = None
) -> None:
    """Delete an image that no VM needs.

    The other hosts of the config file are asked as well, where they see the same store; one that does
    not answer is told.
    """
    from vmctl import image_care, images

    with opened(connect) as host:
        manifest = image_care.find_unused(host, name, reporter()).manifest
        if dry_run:
            ui.say("\n".join(f"would delete {path}" for path in images.files(host, manifest)))
            return
        refuse_unless_yes([f"image {manifest.stem}, {ui.size(manifest.size)}"], yes=yes)
        image_care.delete(host, manifest.stem, reporter())
        ui.say(manifest.stem)


app.command(cls=Command)(image_warm.warm)
app.command("import", cls=Command)(image_files.import_)
app.command(cls=Command)(image_files.export)
app.command(cls=Command)(image_care.tag)
app.command(cls=Command)(image_care.verify)
app.command(cls=Command)(image_care.prune)
