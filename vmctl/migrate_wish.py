"""How a VM is to be migrated, and what of that goes with no other part of it, or with a stopped VM. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from vmctl.hypervisor.migration import Copying, Way
from vmctl.migrate_policy import Policy
from vmctl.migrate_problems import Problem


@dataclass(frozen=True, slots=True)
class Wish:
    """How to migrate. ``live``: send it while it runs; None: where that is safe.

    ``persistent``: the target keeps a definition, None: as it was; ``keep``: the source does.
    """

    way: Way = Way.PEER
    live: bool | None = None
    copying: Copying = Copying.NONE
    policy: Policy = Policy()
    persistent: bool | None = None
    keep: bool = False
    auto_converge: bool = True
    compress: bool = False
    parallel: int = 0
    tls: bool = False
    bandwidth: int = 0


def wish_problems(wish: Wish) -> list[str]:
    """What of a wish goes with no other part of it, all of it."""
    found = []
    if wish.way is Way.TUNNELLED and wish.parallel:
        found.append("a tunnelled migration has one connection: no --parallel")
    if wish.way is Way.TUNNELLED and wish.copying is not Copying.NONE:
        found.append("a tunnelled migration copies no storage")
    if wish.way is Way.TUNNELLED and (wish.tls or wish.policy.postcopy):
        found.append("a tunnelled migration goes by libvirt's own connection: no --tls, no --postcopy")
    if wish.compress and wish.parallel:
        found.append("--compress goes with one connection only: no --parallel")
    if wish.policy.postcopy and wish.compress:
        found.append("--postcopy goes with no --compress")
    if wish.policy.postcopy and wish.live is False:
        found.append("--postcopy goes with no --held")
    if wish.policy.downtime_ms > wish.policy.max_downtime_ms:
        found.append("--downtime is above --max-downtime")
    return found


def of_stopped(name: str, wish: Wish) -> tuple[Problem, ...]:
    """What of a wish a stopped VM cannot have, and what says nothing of it: no memory is sent."""
    found = []
    if wish.persistent is False:
        what = f"{name} is stopped: with --transient its target would have nothing of it"
        found.append(Problem(what, f"start {name} first, or without --transient"))
    policy, usual = wish.policy, Policy()
    given = {
        "--live": wish.live is True,
        "--held": wish.live is False,
        "--tunnelled": wish.way is Way.TUNNELLED,
        "--postcopy": policy.postcopy,
        "--tls": wish.tls,
        "--parallel": wish.parallel > 0,
        "--compress": wish.compress,
        "--no-auto-converge": not wish.auto_converge,
        "--downtime": policy.downtime_ms != usual.downtime_ms,
        "--max-downtime": policy.max_downtime_ms != max(policy.downtime_ms, usual.max_downtime_ms),
        "--timeout": policy.give_up_s is not None,
        "--stall-timeout": policy.stall_s != usual.stall_s,
    }
    if idle := [option for option, is_given in given.items() if is_given]:
        found.append(
            Problem(f"{name} is stopped, and has no memory to send: nothing is done for {', '.join(idle)}", note=True)
        )
    return tuple(found)
