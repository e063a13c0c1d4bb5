"""Who on other hosts needs volumes of a host, where they see the same storage: none of its own VMs tells of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from vmctl import folder_pools, image_users
from vmctl.config import HostEntry
from vmctl.errors import Conflict, VmctlError
from vmctl.events import Reporter, Warned
from vmctl.fleet import DEADLINE_S, Fleet, each
from vmctl.hosts import Host
from vmctl.hypervisor import domain, storage


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What the other hosts of the config file say: of each volume ``users`` its users, each by host and name.

    ``unasked``: hosts that did not answer, and why.
    """

    users: Mapping[str, tuple[tuple[str, str], ...]]
    unasked: Mapping[str, str]


def look(host: Host, pool: str, volumes: Collection[str], timeout_s: float = DEADLINE_S) -> Elsewhere:
    """Ask all other hosts that vmctl knows at once, each until ``timeout_s`` are over.

    A path that is in use there counts where both see one folder, which is proved by a file that is gone again.
    """
    fleet = Fleet(host.settings, host.folders)
    entries = [one for one in host.settings.hosts.values() if one != host.entry]
    if not entries or not volumes:
        return Elsewhere({}, {})
    folder = storage.pool_path(host.conn, pool)

    def ask(entry: HostEntry) -> dict[str, tuple[str, ...]]:
        with fleet.open(entry) as other:
            needed, owners = image_users.needed(other.conn), _owners(other, pool)
            found = {one: users for one in volumes if (users := needed.by(f"{folder}/{one}") or _owner(owners, one))}
            return found if found and folder_pools.shared_folders(host, other, [folder]) else {}

    users: dict[str, list[tuple[str, str]]] = {}
    unasked = {}
    for name, answer in each(entries, ask, timeout_s):
        if isinstance(answer, VmctlError):
            unasked[name] = answer.message
            continue
        for volume, names in answer.items():
            users.setdefault(volume, []).extend((name, user) for user in names)
    return Elsewhere({volume: tuple(found) for volume, found in users.items()}, unasked)


def _owners(host: Host, pool: str) -> dict[str, str]:
    """The VM whose own each volume of a pool is, be it attached or not, as a console log."""
    facts = domain.all_facts(host.conn)
    return {owned.volume: one.name for one in facts if one.record for owned in one.record.owned if owned.pool == pool}


def _owner(owners: Mapping[str, str], volume: str) -> tuple[str, ...]:
    """Whose a volume is: a log that was rotated has a number after its name."""
    return tuple(sorted({vm for one, vm in owners.items() if volume == one or volume.startswith(f"{one}.")}))


def require_unused(host: Host, ref: str, pool: str, volume: str, report: Reporter) -> None:
    """Raise Conflict when another host has a VM that needs the volume; warn of hosts that cannot be asked."""
    found = look(host, pool, [volume])
    if users := found.users.get(volume, ()):
        told = ", ".join(f"{user} on {other}" for other, user in users)
        raise Conflict(
            f"cannot delete disk {ref}: {told} needs it, on storage that both hosts see",
            hint=f"vmctl -c {users[0][0]} disk list shows whose it is",
        )
    if found.unasked:
        why = next(iter(found.unasked.values()))
        report(Warned(f"not asked whether a VM of theirs has it: {', '.join(found.unasked)} ({why})"))
