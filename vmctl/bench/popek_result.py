"""The result of trying Popek and Goldberg's conditions, and JSON: what was seen is kept, what follows is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vmctl.bench.popek_words import Reach, Work
from vmctl.bench.result import Head, head_of
from vmctl.bench.sensitive import BY_NAME, Try
from vmctl.bench.theorems import Machine, Outcome, outcome


@dataclass(frozen=True, slots=True)
class PopekResult:
    """What every accelerator showed."""

    head: Head
    machines: tuple[Machine, ...]

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {**self.head.to_json(), "machines": [_machine_json(machine) for machine in self.machines]}


def _machine_json(machine: Machine) -> dict[str, Any]:
    return {
        "accelerator": machine.accelerator,
        "interpreted": machine.interpreted,
        "cpu": machine.cpu,
        "hypervisor": machine.hypervisor,
        "umip": machine.umip,
        "nested": machine.nested,
        "instructions": [_outcome_json(one) for one in machine.outcomes],
        "work": _work_json(machine.work),
        "work_user": _work_json(machine.work_user),
        "native_digest": f"{machine.native_digest:x}",
        "native_ticks": machine.native_ticks,
        "instructions_counted": machine.instructions,
        "reach": asdict(machine.reach) if machine.reach else None,
        "ended_in_s": None if machine.ended_in_s is None else round(machine.ended_in_s, 3),
    }


def _work_json(work: Work | None) -> dict[str, Any] | None:
    # A digest has 64 bits, which many readers of JSON cut down to 53: as text.
    return {**asdict(work), "digest": f"{work.digest:x}"} if work else None


def _work_of(values: Mapping[str, Any] | None) -> Work | None:
    return Work(int(values["digest"], 16), values["ticks"], values["interventions"]) if values else None


def _outcome_json(one: Outcome) -> dict[str, Any]:
    tries = {
        level: {"trap": tried.vector, "value": None if tried.value is None else f"{tried.value:#x}"}
        for level, tried in (("kernel", one.kernel), ("user", one.user), ("umip", one.umip))
        if tried is not None and tried != Try()
    }
    ended = one.finding == "ended the guest"
    return {
        "name": one.name,
        "mnemonic": BY_NAME[one.name].mnemonic if one.name in BY_NAME else one.name,
        "tries": tries,
        "finding": one.finding,
        "finding_umip": one.finding_umip,
        "skipped": "" if ended else one.note,
        "failed": one.note if ended else "",
    }


def popek_of(values: Mapping[str, Any]) -> PopekResult:
    """A result as it was kept; the values have been checked against the schema. Findings are computed anew."""
    return PopekResult(head_of(values), tuple(_machine_of(machine) for machine in values["machines"]))


def _machine_of(values: Mapping[str, Any]) -> Machine:
    reach = values["reach"]
    return Machine(
        accelerator=values["accelerator"],
        interpreted=values["interpreted"],
        cpu=values["cpu"],
        hypervisor=values["hypervisor"],
        umip=values["umip"],
        nested=values["nested"],
        outcomes=tuple(_outcome_of(one) for one in values["instructions"] if one["name"] in BY_NAME),
        work=_work_of(values["work"]),
        work_user=_work_of(values["work_user"]),
        native_digest=int(values["native_digest"], 16),
        native_ticks=values["native_ticks"],
        instructions=values["instructions_counted"],
        reach=Reach(**reach) if reach else None,
        ended_in_s=values["ended_in_s"],
    )


def _outcome_of(values: Mapping[str, Any]) -> Outcome:
    tries = {
        level: Try(tried["trap"], None if tried["value"] is None else int(tried["value"], 16))
        for level, tried in values["tries"].items()
    }
    return outcome(values["name"], tries, values["skipped"], values["failed"])
