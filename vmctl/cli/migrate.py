"""vmctl migrate."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vmctl import ui
from vmctl.choices import StorageCopy
from vmctl.cli.options import (
    GLOBALS,
    ConnectOption,
    Names,
    OutputOption,
    complete_host,
    fleet_of_config,
    reporter,
    tell_of_hosts,
    tell_where,
)
from vmctl.errors import HostUnreachable, Interrupted, NotFound, PartialFailure, PreflightFailed, SpecError, VmctlError
from vmctl.ui import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vmctl.migrate import Moved
    from vmctl.migrate_ends import Ends
    from vmctl.migrate_problems import Problem
    from vmctl.migrate_wish import Wish


def migrate(
    names: Names,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="HOST",
            help="Where to; auto: where there is most room for each.",
            autocompletion=complete_host,
        ),
    ],
    check: Annotated[
        bool, typer.Option("--check", "--dry-run", help="Only look whether it could; exit 11 if not.")
    ] = False,
    adjust: Annotated[
        bool, typer.Option("--adjust", help="Give one that is under way other --bandwidth and --downtime.")
    ] = False,
    recover: Annotated[
        bool, typer.Option("--recover", help="Look where it is after a migration that was cut off, and end that.")
    ] = False,
    copy_storage: Annotated[
        Optional[StorageCopy],  # noqa: UP045
        typer.Option(
            "--copy-storage", help="Take disks along that the target does not see: whole, or above their base."
        ),
    ] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="vmctl speaks with both hosts, which need not reach each other's libvirt.")
    ] = False,
    live: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--live/--held", help="Send memory while it runs, or hold it still; default: held if emulated."),
    ] = None,
    tunnelled: Annotated[
        bool, typer.Option("--tunnelled", help="Memory goes through the connection of the two libvirts.")
    ] = False,
    postcopy: Annotated[
        bool,
        typer.Option("--postcopy", help="If it does not converge, run it on the target before all of it is there."),
    ] = False,
    tls: Annotated[
        bool, typer.Option("--tls", help="Encrypt memory and disks on their way, by QEMU's certificates.")
    ] = False,
    parallel: Annotated[
        int, typer.Option("--parallel", metavar="N", min=0, max=255, help="Send over N connections.")
    ] = 0,
    compress: Annotated[bool, typer.Option("--compress", help="Compress memory that is sent again.")] = False,
    auto_converge: Annotated[
        bool, typer.Option("--auto-converge/--no-auto-converge", help="Slow the VM down when it does not converge.")
    ] = True,
    bandwidth: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--bandwidth", metavar="BYTES", help="Most bytes sent a second, as 50M."),
    ] = None,
    downtime: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--downtime", metavar="MS", min=1, help="Downtime to begin with; 300."),
    ] = None,
    max_downtime: Annotated[
        int,
        typer.Option("--max-downtime", metavar="MS", min=1, help="Downtime it may come to when it does not converge."),
    ] = 1000,
    timeout: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--timeout", metavar="SECONDS", min=1, help="Give it up then; with --postcopy, go over to that."),
    ] = None,
    stall_timeout: Annotated[
        float, typer.Option("--stall-timeout", metavar="SECONDS", min=1, help="Longest time without a byte; 45.")
    ] = 45.0,
    persistent: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--persistent/--transient", help="Whether the target keeps a definition; default: as it was."),
    ] = None,
    undefine_source: Annotated[
        bool, typer.Option("--undefine-source/--keep-source", help="Whether definition and disks go from where it was.")
    ] = True,
    connect: ConnectOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Move VMs to another host: running ones live, stopped ones as they are.

    Before anything is changed both hosts are looked at, and all that stands against it is told at once (exit 11).
    Ctrl-C leaves the VM where it is. What fails says where the VM is then, which is asked of both hosts. The same again
    ends a move that was cut off, as far as the target shows it, and is content with one that is done.
    """
    from vmctl.config import AUTO
    from vmctl.hypervisor.migration import Copying, Way
    from vmctl.migrate_policy import Policy
    from vmctl.migrate_wish import Wish, wish_problems

    wish = Wish(
        way=Way.DIRECT if direct else Way.TUNNELLED if tunnelled else Way.PEER,
        live=live,
        copying=Copying(copy_storage.value) if copy_storage else Copying.NONE,
        policy=Policy(
            downtime or 300,
            max(downtime or 300, max_downtime),
            stall_s=stall_timeout,
            give_up_s=timeout,
            postcopy=postcopy,
        ),
        persistent=persistent,
        keep=not undefine_source,
        auto_converge=auto_converge,
        compress=compress,
        parallel=parallel,
        tls=tls,
        bandwidth=_rate(bandwidth),
    )
    found = ["--direct goes with no --tunnelled"] if direct and tunnelled else []
    if check + adjust + recover > 1:
        found.append("of --check, --adjust and --recover goes one at a time")
    if found := [*found, *wish_problems(wish)]:
        raise SpecError("cannot migrate", problems=found)
    if to == AUTO:
        from vmctl.cli import host_plan

        if recover or adjust:
            doing = "recover" if recover else "adjust"
            raise SpecError(f"cannot {doing} a migration to no host in particular", hint="--to the host it goes to")
        host_plan.send(connect or GLOBALS.connect, names, wish, check=check, output=output)
        return
    with _ends(connect, to) as ends:
        if not (adjust or recover):  # those have to do with hosts that may be down
            ends.open()
        wanted = _wanted(ends, names, recover=recover, again=not adjust)
        if adjust:
            _adjust(ends, wanted, wish.bandwidth, downtime, output)
        elif check:
            _check(ends, wanted, wish, output)
        else:
            _move(ends, wanted, wish, output, recover=recover)


def _adjust(ends: Ends, names: tuple[str, ...], bandwidth: int, downtime: int | None, output: Output) -> None:
    from vmctl import migrate as verb

    if not bandwidth and downtime is None:
        raise SpecError("cannot adjust: nothing to change is given", hint="--bandwidth, --downtime")
    for name in names:
        verb.adjust(ends.source, name, bandwidth=bandwidth, downtime_ms=downtime)
    rows = [{"vm": name, "bandwidth": bandwidth or None, "downtime_ms": downtime} for name in names]
    ui.emit(rows, output, lambda: "\n".join(f"{name}: adjusted" for name in names), lambda: names)


def _rate(text: str | None) -> int:
    """Bytes a second; 0 for no limit."""
    from vmctl.disk_spec import parse_bytes

    if text is None:
        return 0
    found = parse_bytes(text)
    if found < 1 << 20:
        raise SpecError(f"cannot migrate at {text} a second: libvirt limits to whole MiB", hint="--bandwidth 1M")
    return found


@contextmanager
def _ends(connect: str | None, to: str) -> Iterator[Ends]:
    """Source and target, not opened yet."""
    from vmctl import config
    from vmctl.fleet import called
    from vmctl.hypervisor.events import start_loop
    from vmctl.migrate_ends import Ends

    start_loop()
    fleet = fleet_of_config()
    source = config.chosen_entry(connect or GLOBALS.connect, fleet.settings)
    target = config.entry(to, fleet.settings)
    with Ends(fleet, source, target) as ends:
        try:
            yield ends
        except (VmctlError, Interrupted) as error:
            others = [one.name for one in fleet.settings.hosts.values() if one != source]
            tell_of_hosts(error, (source,), others)
            tell_of_hosts(error, (target,), ())
            for one in error.failures.values() if isinstance(error, PartialFailure) else (error,):
                if isinstance(one, NotFound):  # what other errors hint at names its host, for there are two
                    tell_where(one, called(source))
            raise


def _wanted(ends: Ends, names: list[str], *, recover: bool, again: bool) -> tuple[str, ...]:
    """The VMs that are meant. Where the same ``again`` has a sense, a glob is also of those that have moved already."""
    from vmctl.listing import is_glob, matching

    if recover and not any(is_glob(name) for name in names):
        return tuple(dict.fromkeys(names))  # it may be on the target only by now
    found: dict[str, None] = {}
    for name in names:
        try:
            these = matching(ends.source, [name])
        except NotFound as none:
            try:
                these = matching(ends.target, [name]) if again else ()
            except NotFound:
                these = ()
            if not these:
                raise none from None
        found |= dict.fromkeys(these)
    return tuple(found)


def _check(ends: Ends, names: tuple[str, ...], wish: Wish, output: Output) -> None:
    from vmctl import migrate_again
    from vmctl.migrate_problems import Problem, fatal

    found: dict[str, tuple[Problem, ...]] = {}
    for name in names:
        try:
            found[name] = migrate_again.check(ends, name, wish)
        except HostUnreachable:
            raise  # what is true of all of them
        except VmctlError as error:
            if len(names) == 1:
                raise
            found[name] = (Problem(error.message, error.hint),)
    rows = [{"vm": name, **one._asdict()} for name, these in found.items() for one in these]
    ui.emit(rows, output, lambda: _report(found), lambda: [name for name in names if not fatal(found[name])])
    bad = [(f"{name}: {one.what}", one.mend) for name, these in found.items() for one in fatal(these)]
    if bad:
        count = "1 problem" if len(bad) == 1 else f"{len(bad)} problems"
        untold = bad if output is Output.NAME else ()  # all other forms of the result have told them
        raise PreflightFailed(f"cannot migrate to {ends.names[1]}: {count}", problems=untold)


def _report(found: Mapping[str, tuple[Problem, ...]]) -> str:
    lines = []
    for name, these in found.items():
        for one in these:
            lines.append(f"{'note' if one.note else 'failed':<8} {name}: {one.what}")
            lines += [f"{'':<8}   mend: {one.mend}"] if one.mend else []
        lines += [] if these else [f"ok       {name}"]
    return "\n".join(lines)


def _move(ends: Ends, names: tuple[str, ...], wish: Wish, output: Output, *, recover: bool) -> None:
    from vmctl import migrate_again

    work, report = migrate_again.recover if recover else migrate_again.migrate, reporter()
    _each(names, lambda name: work(ends, name, wish, report), output)


def _each(names: tuple[str, ...], work: Callable[[str], Moved], output: Output) -> None:
    """One after the other: two at once would only share the wire."""
    failures: dict[str, VmctlError] = {}
    moved: list[Moved] = []
    for name in names:
        try:
            result = work(name)
        except (KeyboardInterrupt, Interrupted) as early:
            told_of = early if isinstance(early, Interrupted) else Interrupted(f"cannot migrate VM {name}: interrupted")
            rest = names[names.index(name) + 1 :]
            if moved and output is not Output.TABLE:
                ui.emit(moved, output, str, lambda: [one.vm for one in moved])
            raise Interrupted(
                told_of.message + (f"; not begun: {', '.join(rest)}" if rest else ""), hint=told_of.hint
            ) from early
        except VmctlError as error:
            if len(names) == 1:
                raise
            failures[name] = error
            continue
        moved.append(result)
        if output is Output.TABLE:
            ui.say(told(result))
    if output is not Output.TABLE:
        ui.emit(moved, output, str, lambda: [one.vm for one in moved])
    if failures:
        raise PartialFailure(f"cannot migrate {len(failures)} of {len(names)} VMs", failures=failures)


def told(one: Moved) -> str:
    """A line on what was done."""
    if one.mode == "already":
        return f"{one.vm}: on {one.target} already"
    text = f"{one.vm}: {one.source} -> {one.target} in {one.time_s:.1f} s, {one.mode}"
    if one.mode == "stopped":
        return text + (f", {len(one.copied)} files copied" if one.copied else "")
    if one.data or one.passes:  # of one that went before nothing is known of that
        text += f", {ui.size(one.data)} in {one.passes} passes"
    if one.downtime_ms is not None and one.mode == "live":
        text += f", downtime {one.downtime_ms} ms"
    if one.outage_ms is not None:
        text += f", did not answer for {one.outage_ms} ms"
    return text + (", by post-copy" if one.postcopy else "")
