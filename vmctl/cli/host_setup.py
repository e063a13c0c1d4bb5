"""vmctl host setup."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli.options import YesOption, fleet_of_config, note, refuse_unless_yes, reporter
from vmctl.errors import Interrupted


def setup(
    where: Annotated[str, typer.Argument(metavar="USER@MACHINE", help="A Debian machine that lets you in by SSH.")],
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--name", metavar="NAME", help="What to call it; default: MACHINE's first part, or its address."),
    ] = None,
    keyfile: Annotated[str, typer.Option("--keyfile", metavar="FILE", help="Private SSH key to log in with.")] = "",
    host_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--host-key", metavar="KEY", help="As of `vmctl host add`."),
    ] = None,
    fingerprint: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--fingerprint", metavar="SHA256:…", help="As of `vmctl host add`."),
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Let its root and that of each known host log in to each other.")
    ] = False,
    tls: Annotated[
        bool, typer.Option("--tls", help="Give it certificates, by which `migrate --tls` encrypts what it sends.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    yes: YesOption = False,
) -> None:
    """Make a bare Debian machine a host of vmctl's: packages, libvirt, groups, storage pools, network; then add it.

    What will change is shown first, a + before each. Run again, it changes what is missing only. --peers is what
    migration needs, unless it is --direct. --tls signs by an authority of your own, made with the first host.
    """
    from vmctl import host_add, host_book, host_setup, host_tls
    from vmctl.cli.host import trusts

    wish = host_setup.login(where, keyfile)
    fleet, report = fleet_of_config(), reporter()
    chosen = name or wish.name
    entry = fleet.settings.hosts.get(chosen)
    if entry is None:
        host_add.refuse_same_uri(fleet, chosen, wish.uri)
        entry = host_add.entry(host_add.Wish(chosen, wish.uri, host_key or "", fingerprint or ""), trusts)
    else:
        host_setup.meant(entry, wish, host_key or "", fingerprint or "")
    found = host_setup.look(fleet, entry)
    wanted = host_setup.changes(found)
    extra = host_setup.furnishings(fleet, entry) if found.libvirt else ("storage pools", "network")
    new = chosen not in fleet.settings.hosts
    others = host_setup.peers(fleet, entry, report) if peers else ()
    certificates = host_tls.wanted(fleet, entry) if tls else ()
    lines = [*(one.what for one in wanted), *extra, *certificates, *(change.what for _, change in others)]
    lines += [f"host {chosen} in the config file"] if new else []
    if not lines:
        ui.say(f"{chosen}: nothing to change")
        return
    for line in lines:
        ui.say(f"+ {line}")
    if dry_run:
        return
    refuse_unless_yes([], yes=yes, question="Change this?")
    try:
        host_setup.apply(fleet, entry, found, wanted, report)
        host_setup.furnish(fleet, entry, report)
        if certificates:
            host_tls.make(fleet, entry, report)
        if new:
            host_book.add(fleet.folders, entry)
        while others:
            for on, change in others:
                host_setup.apply(fleet, on, host_setup.look(fleet, on), [change], report)
            others = tuple(one for one in host_setup.peers(fleet_of_config(), entry) if one not in others)
    except (KeyboardInterrupt, Interrupted) as early:
        text = f"cannot set up {chosen}: {f'{early}' or 'interrupted'}; what was done stays, and apt may go on there"
        raise Interrupted(text, hint="the same command again does the rest") from early
    note(f"{chosen} is set up; vmctl host check {chosen}")
