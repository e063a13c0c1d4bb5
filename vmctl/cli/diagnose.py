"""vmctl host info, doctor, demo."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vmctl import ui
from vmctl.cli.options import ConnectOption, OutputOption, opened, reporter
from vmctl.ui import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmctl.doctor import Finding
    from vmctl.host_info import HostInfo


def _info_text(info: HostInfo) -> str:
    kvm = info.accel.kvm
    checks = "\n".join(
        f"{check.name}: {check.result}, {check.detail}" + (f"\n  mend: {check.mend}" if check.mend else "")
        for check in kvm.evidence
    )
    return ui.fields(
        [
            ("host", info.name),
            ("uri", info.uri),
            ("cpu", f"{info.cpus} x {info.cpu_model} ({info.arch})"),
            ("memory", ui.memory(info.memory_mib)),
            ("libvirt", info.libvirt),
            ("qemu", f"{info.qemu} ({info.emulator})"),
            ("network", info.network or "user networking"),
            ("pools", f"{info.pool} (disks), {info.image_pool} (images)"),
            ("accel", f"{info.accel.chosen}: {info.accel.reason}"),
            ("mend", info.accel.mend),
            ("kvm", kvm.verdict),
            ("evidence", checks),
        ]
    )


def info(
    refresh: Annotated[bool, typer.Option("--refresh", help="Probe the accelerator again.")] = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show the host and which accelerator works there, with the evidence."""
    from vmctl import host_info

    with opened(connect) as host:
        found = host_info.info(host, refresh=refresh)
        ui.emit(found, output, lambda: _info_text(found), lambda: [found.name])


def _findings_text(findings: Sequence[Finding]) -> str:
    lines = []
    for finding in findings:
        lines.append(f"{finding.result:<8} {finding.name}: {finding.detail}")
        if finding.mend and finding.result != "ok":
            lines.append(f"{'':<8}   mend: {finding.mend}")
    return "\n".join(lines)


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended from here.")] = False,
    keep: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--keep", metavar="FILE", help="With --fix: of two, the one a VM is to go on in. Repeatable."),
    ] = None,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Look for what keeps VMs from running well, explain it, and with --fix mend it.

    Where nobody can tell which of two files a VM wrote to last, both are named, and --keep chooses one; both stay.

    Exits 1 while something is broken.
    """
    from vmctl import doctor as check
    from vmctl.cli.options import GLOBALS, on_host

    if keep and not fix:
        raise typer.BadParameter("--keep changes what a VM starts from: it goes with --fix")
    given = connect or GLOBALS.connect
    findings = check.examine(given, fix=fix, report=reporter(), keep=keep or ())
    if given:  # typed without it a mend would be of another host
        findings = tuple(replace(one, mend=on_host(one.mend, given)) for one in findings)
    ui.emit(
        findings, output, lambda: _findings_text(findings), lambda: [f.name for f in findings if f.result == "failed"]
    )
    if any(finding.result == "failed" for finding in findings):
        raise typer.Exit(1)


def demo(
    name: Annotated[str, typer.Option(help="Name of the demonstration VM.")] = "demo",
    connect: ConnectOption = None,
) -> None:
    """Show the main job from end to end, printing each command before it runs."""
    from vmctl import demo as play
    from vmctl.cli import run
    from vmctl.cli.options import GLOBALS

    play.run(name, connect or GLOBALS.connect, run)
