"""The numerical sheet of an instance: what a VM has, and what of it one gets, measured inside of it."""

from __future__ import annotations

from datetime import UTC, datetime

from vmctl import __version__, agent, guest
from vmctl.accel import Verdict
from vmctl.bench import environment, levels_words, places, store
from vmctl.bench.result import Head
from vmctl.bench.sheet_result import SheetResult
from vmctl.choices import Accel, AccelChoice
from vmctl.errors import GuestCommandFailed
from vmctl.events import Reporter
from vmctl.hosts import Host, decide_accel
from vmctl.hypervisor import domain
from vmctl.hypervisor.domain import State

METHOD = 1
_LONGEST_S = 300.0
# The program comes on standard input: so it does by SSH and by the agent, and there is one thing less to clear away.
# Its file loses its name before it has a byte: a connection that ends ends the shell, and nobody would clear it away.
_SCRIPT = (
    't=$(mktemp) && exec 3<"$t" 4>"$t" && rm -f "$t" && cat >&4 && exec 4>&- && chmod 700 /proc/self/fd/3 && '
    'exec /proc/self/fd/3 sheet="$1" </dev/null'
)


def measure(host: Host, name: str, folder: str, report: Reporter, *, by_agent: bool, user: str | None) -> SheetResult:
    """Fill the sheet of a running VM, and keep it. The program is gone from the guest afterwards.

    Raises WrongState for one that does not run, GuestCommandFailed where the program cannot run in it.
    """
    vm = domain.find(host.conn, name)
    domain.require(vm, frozenset({State.RUNNING}), "measure", f"vmctl start {name}")
    argv = ["sh", "-c", _SCRIPT, "sh", folder]
    said, wrong = bytearray(), bytearray()
    with places.program().open("rb") as program:
        if by_agent:
            code = agent.execute(
                host, name, argv, stdin=program.fileno(), out=said.extend, err=wrong.extend, timeout_s=_LONGEST_S
            )
        else:
            code = guest.execute(
                host, name, argv, stdin=program.fileno(), out=said.extend, err=wrong.extend, user=user, report=report
            )
    found = levels_words.read(bytes(said))
    if code or not found.done:
        raise GuestCommandFailed(
            f"cannot measure VM {name}: the program ended with {code}",
            evidence=bytes(wrong or said).decode("utf-8", "replace").splitlines()[-5:],
            hint="it needs sh, mktemp and x86-64",
        )
    made = datetime.now(UTC).isoformat(timespec="seconds")
    place = store.folder(host.folders.data)
    decision = decide_accel(host, AccelChoice.AUTO)
    env = environment.capture(host, decision)
    dimensions = {
        "unit": "ns",
        "method": METHOD,
        "accelerator": str(vm.facts.accel or ""),
        "interpreted": vm.facts.accel is Accel.KVM and decision.kvm.verdict is Verdict.INTERPRETED,
        "host_cpu": env.get("cpu") or env["cpu_model"],
    }
    head = Head(store.new_id(place, "sheet", made), "sheet", made, __version__, True, dimensions, env)
    result = SheetResult(head, vm.name, folder, found.has, found.rows())
    store.write(place, result.to_json())
    return result
