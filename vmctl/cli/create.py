"""vmctl create and delete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Optional, TypeVar

import typer

from vmctl import spec, ui
from vmctl.cli import first_boot
from vmctl.cli.options import (
    GLOBALS,
    ConnectOption,
    Names,
    OutputOption,
    TimeoutOption,
    WaitOption,
    YesOption,
    each,
    goal_of,
    note,
    opened,
    refuse_unless_yes,
    reporter,
)
from vmctl.errors import SpecError
from vmctl.spec import AccelChoice, Boot, Firmware, Graphics, Machine, NicModel, OnCrash
from vmctl.ui import Output

T = TypeVar("T")
_MACHINE, _DEVICES, _FIRST_BOOT = "Machine", "Disks, network, folders", "First boot"


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new VM, also its host name.")],
    image: Annotated[
        str,
        typer.Option("--image", "-i", help="Image to start from; see `vmctl image list`.", rich_help_panel=_MACHINE),
    ],
    description: Annotated[str, typer.Option(help="Free text about the VM.")] = "",
    memory: Annotated[
        str,
        typer.Option("--memory", "-m", metavar="SIZE", help="Memory, such as 512M or 2G.", rich_help_panel=_MACHINE),
    ] = "512M",
    vcpus: Annotated[int, typer.Option("--vcpus", help="Number of virtual CPUs.", rich_help_panel=_MACHINE)] = 1,
    root_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Root disk size, if larger than the image's.", rich_help_panel=_DEVICES),
    ] = None,
    disk: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="SIZE|PATH",
            help="Further disk: 10G, or /path/file.qcow2; ,bus=scsi ,format=raw. Repeatable.",
            rich_help_panel=_DEVICES,
        ),
    ] = None,
    network: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="NETWORK",
            help="Network of a card, empty for vmctl's own; ,mac= ,address=IP/PREFIX ,gateway= ,dns=. Repeatable.",
            rich_help_panel=_DEVICES,
        ),
    ] = None,
    nic_model: Annotated[
        NicModel, typer.Option(help="Model of the network cards.", rich_help_panel=_DEVICES)
    ] = NicModel.VIRTIO,
    accel: Annotated[
        AccelChoice,
        typer.Option(help="What runs the guest; auto takes KVM only where it truly works.", rich_help_panel=_MACHINE),
    ] = AccelChoice.AUTO,
    cpu: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="CPU model; default: the host's on KVM, max on TCG, without ERMS.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    machine: Annotated[Machine, typer.Option(help="Machine type.", rich_help_panel=_MACHINE)] = Machine.Q35,
    firmware: Annotated[Firmware, typer.Option(help="Firmware.", rich_help_panel=_MACHINE)] = Firmware.BIOS,
    boot: Annotated[
        Boot,
        typer.Option(
            help="Start from the image's kernel where firmware allows it (auto), or from its disk.",
            rich_help_panel=_MACHINE,
        ),
    ] = Boot.AUTO,
    graphics: Annotated[
        Graphics, typer.Option(help="Graphical console, bound to loopback.", rich_help_panel=_MACHINE)
    ] = Graphics.NONE,
    share: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="HOST:GUEST[:ro]",
            help="Folder of the host to mount in the guest. Repeatable.",
            rich_help_panel=_DEVICES,
        ),
    ] = None,
    console: Annotated[
        bool, typer.Option("--console/--no-console", help="Serial console, logged.", rich_help_panel=_MACHINE)
    ] = True,
    rng: Annotated[
        bool, typer.Option("--rng/--no-rng", help="virtio random number source.", rich_help_panel=_MACHINE)
    ] = True,
    balloon: Annotated[
        bool, typer.Option("--balloon/--no-balloon", help="virtio memory balloon.", rich_help_panel=_MACHINE)
    ] = True,
    agent: Annotated[
        bool, typer.Option("--agent/--no-agent", help="Guest agent channel.", rich_help_panel=_MACHINE)
    ] = True,
    label: Annotated[
        list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="Label. Repeatable.")
    ] = None,
    ssh_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|KEY",
            help="Further public key to let in, or its .pub file. Repeatable.",
            rich_help_panel=_FIRST_BOOT,
        ),
    ] = None,
    runcmd: Annotated[
        list[str] | None,
        typer.Option(metavar="COMMAND", help="Command for the first boot. Repeatable.", rich_help_panel=_FIRST_BOOT),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="User to make; default: the image's.", rich_help_panel=_FIRST_BOOT),
    ] = None,
    password: Annotated[
        bool,
        typer.Option(
            "--password", help="Give the user a password: asked for, or read from stdin.", rich_help_panel=_FIRST_BOOT
        ),
    ] = False,
    user_data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="cloud-init user-data; cloud-configs are merged, .j2 filled in. Repeatable.",
            rich_help_panel=_FIRST_BOOT,
        ),
    ] = None,
    var: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Variable for Jinja in user-data. Repeatable.", rich_help_panel=_FIRST_BOOT
        ),
    ] = None,
    vendor_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="cloud-init vendor-data.", rich_help_panel=_FIRST_BOOT)
    ] = None,
    network_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="cloud-init network-config, version 2 or 1.", rich_help_panel=_FIRST_BOOT),
    ] = None,
    ignition: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Ignition config, handed over by fw_cfg.", rich_help_panel=_FIRST_BOOT),
    ] = None,
    tpm: Annotated[bool, typer.Option("--tpm", help="A TPM 2.0 of its own (swtpm).", rich_help_panel=_MACHINE)] = False,
    autostart: Annotated[bool, typer.Option("--autostart", help="Start it with its host.")] = False,
    on_crash: Annotated[
        OnCrash, typer.Option(help="When its kernel panics: keep it as it is then, restart it, or power it off.")
    ] = OnCrash.PRESERVE,
    no_start: Annotated[bool, typer.Option("--no-start", help="Define it only.")] = False,
    warm: Annotated[
        bool, typer.Option("--warm", help="Go on from the running state that `vmctl image warm` has kept.")
    ] = False,
    wait: WaitOption = None,
    timeout: TimeoutOption = None,
    exist_ok: Annotated[
        bool, typer.Option("--exist-ok", help="A VM of that name is no error; it is left as it is.")
    ] = False,
    print_xml: Annotated[
        bool,
        typer.Option(
            "--print-xml", "--dry-run", help="Print the domain XML, or with --warm what would be made; change nothing."
        ),
    ] = False,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a VM from an image and start it.

    Example: vmctl create web1 --image micro --memory 512M --vcpus 2 --wait ssh
    """
    problems = list(GLOBALS.wrong)
    nets = network or [""]
    size = _collected(problems, lambda: spec.parse_size_mib(memory), 512)
    root_mib = _collected(problems, lambda: spec.parse_size_mib(root_size) if root_size else None, None)
    no_labels: dict[str, str] = {}
    no_keys: tuple[str, ...] = ()
    disks = _all_collected(problems, spec.parse_disk, disk or [])
    shares = _all_collected(problems, spec.parse_share, share or [])
    labels = _collected(problems, lambda: spec.parse_labels(label or []), no_labels)
    keys = _collected(problems, lambda: first_boot.read_keys(ssh_key or []), no_keys)
    nics = _all_collected(problems, lambda text: spec.parse_nic(text, nic_model), nets)
    parts = _collected(problems, lambda: first_boot.read_user_data(user_data or [], var or [], name), no_keys)
    vendor = _collected(problems, lambda: first_boot.read_text(vendor_data, "vendor-data"), "")
    networks = _collected(problems, lambda: first_boot.read_text(network_config, "network-config"), "")
    ignited = _collected(problems, lambda: first_boot.read_text(ignition, "Ignition config"), "")
    vm = spec.VM(
        name=name,
        image=image,
        description=description,
        vcpus=vcpus,
        nics=nics,
        accel=accel,
        cpu=cpu,
        machine=machine,
        firmware=firmware,
        boot=boot,
        graphics=graphics,
        shares=shares,
        console=console,
        rng=rng,
        balloon=balloon,
        agent=agent,
        runcmd=tuple(runcmd or ()),
        autostart=autostart,
        on_crash=on_crash,
        memory_mib=size,
        root_size_mib=root_mib,
        disks=disks,
        labels=labels,
        ssh_keys=keys,
        user=user,
        user_data=parts,
        vendor_data=vendor,
        network_config=networks,
        ignition=ignited,
        tpm=tpm,
    )
    problems += spec.problems(vm)
    goal = _collected(problems, lambda: goal_of(wait), None)
    if no_start and wait:
        problems.append("--wait and --no-start exclude each other")
    if warm and (no_start or exist_ok or password):
        problems.append("--warm makes a new running VM: not with --no-start, --exist-ok or --password")
    if problems:
        raise SpecError("cannot create VM", problems=problems)
    if password:  # asked for only when the rest is in order
        vm = replace(vm, password_hash=first_boot.read_password())
    from vmctl import creation, readiness

    report = reporter()
    with opened(connect) as host:
        if print_xml and not warm:
            ui.write(creation.preview(host, vm))
            return
        if warm:
            from vmctl import warming

            if print_xml:
                lines = warming.plan(host, vm)
                ui.emit({"touches": lines}, output, lambda: "\n".join(lines), lambda: [name])
                return
            gone_on = warming.create(host, vm, report)
            ui.emit({**ui.jsonable(gone_on), "existed": False}, output, lambda: name, lambda: [name])
            return
        try:
            made = creation.create(host, vm, report, exist_ok=exist_ok, start_it=not no_start)
        except KeyboardInterrupt:
            ui.note(f"{name} was not created; what there was of it is gone again")
            raise
        if made.existed:
            note(f"{name} exists already, {made.vm.state}")
        where = None
        if goal is not None:
            try:
                where = readiness.wait_for(host, made.vm, goal, timeout_s=timeout, report=report)
            except KeyboardInterrupt:
                ui.note(f"{name} stays, and runs; go on with `vmctl wait {name} --for {goal}`")
                raise
        result = {
            "name": made.vm.name,
            "uuid": made.vm.uuid,
            "existed": made.existed,
            "address": where.host if where else "",
        }
        ui.emit(result, output, lambda: name, lambda: [name])


def _collected(problems: list[str], parse: Callable[[], T], default: T) -> T:
    """The parsed value, or ``default`` with the problem noted, so that all problems are reported together."""
    try:
        return parse()
    except SpecError as error:
        problems.append(error.message)
        return default


def _all_collected(problems: list[str], parse: Callable[[str], T], texts: list[str]) -> tuple[T, ...]:
    """Those that could be parsed, with the problems of all others noted."""
    found = (_collected(problems, partial(parse, text), None) for text in texts)
    return tuple(one for one in found if one is not None)


def delete(
    names: Names,
    yes: YesOption = False,
    missing_ok: Annotated[bool, typer.Option("--missing-ok", help="A VM that is not there is no error.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be deleted.")] = False,
    connect: ConnectOption = None,
) -> None:
    """Delete VMs with their own disks, seed, NVRAM and saved state. Base images and others' disks stay."""
    from vmctl import deletion
    from vmctl.errors import NotFound
    from vmctl.listing import matching

    report = reporter()
    with opened(connect) as host:
        wanted = []
        lines: list[str] = []
        doomed: list[deletion.Doomed] = []
        found = matching(host, names)
        if yes and not dry_run and not missing_ok:
            wanted, found = [*found], ()  # nobody is shown what goes: it is looked at once, when it does
        for name in found:
            try:
                doomed.append(deletion.doomed(host, name, doomed))
                lines += doomed[-1].lines
            except NotFound:
                if not missing_ok and len(names) == 1:
                    raise
                if missing_ok:
                    continue
            wanted.append(name)
        if dry_run:
            for line in lines:
                ui.say(line)
            return
        if not wanted:
            return
        refuse_unless_yes(lines, yes=yes)
        each(wanted, lambda name: deletion.delete(host, name, report), lambda name, _: ui.say(name), "delete")
