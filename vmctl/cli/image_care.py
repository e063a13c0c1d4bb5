"""vmctl image tag, verify, prune."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli.options import ConnectOption, ImageName, OutputOption, YesOption, opened, refuse_unless_yes, reporter
from vmctl.ui import Output


def tag(
    name: ImageName,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="The further name.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take it from the image again.")] = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Give an image one more name; another image that has it loses it."""
    from vmctl import image_care

    with opened(connect) as host:
        work = image_care.untag if remove else image_care.tag
        manifest = work(host, name, tag, reporter())
        ui.emit(manifest, output, lambda: manifest.stem, lambda: [manifest.stem])


def verify(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="IMAGE...", help="Names of images; default: all."),
    ] = None,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Read the files of images again, and exit 10 when one is not what it was when it was stored."""
    from vmctl import image_care

    with opened(connect) as host:
        whole = image_care.verify(host, names or [], reporter())
        stems = [manifest.stem for manifest in whole]
        ui.emit(whole, output, lambda: "\n".join(stems), lambda: stems)


def prune(
    keep: Annotated[int, typer.Option("--keep", metavar="N", min=1, help="Newest images kept of each name.")] = 1,
    downloads: Annotated[
        float, typer.Option("--downloads", metavar="DAYS", min=0.0, help="Age of interrupted downloads given up.")
    ] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be deleted.")] = False,
    yes: YesOption = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Delete older images of a name, untagged ones that no VM and no disk needs, even indirectly; and old downloads.

    Steps of a recipe go when no image is left that they led to. The other hosts of the config file are asked as well,
    where they see the same store; while one does not answer, no image goes.
    """
    from vmctl import image_care

    with opened(connect) as host:
        report = reporter()
        idle_s = downloads * 86400
        what = image_care.prunable(host, report, kept_each=keep, idle_s=idle_s)
        names = [*what.images, *what.leftovers, *(f"{name}.partial" for name in what.downloads)]
        if names and not dry_run:
            refuse_unless_yes([*names, f"frees {ui.size(what.freed)}"], yes=yes)
            image_care.prune(host, what, report, idle_s=idle_s)
        lines = [*names, f"{'would free' if dry_run else 'freed'} {ui.size(what.freed)}"] if names else []
        ui.emit(what, output, lambda: "\n".join(lines) or "nothing to prune", lambda: names)
