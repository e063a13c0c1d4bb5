"""How cloud-init's first boot went, from the files it leaves in the guest. Pure.

/run/cloud-init/result.json appears when all stages are over; its errors are those that made cloud-init fail. What
went wrong without that, "degraded" in cloud-init's own words since 23.4, is in status.json's recoverable_errors;
older releases only log it. A boot without the seed, which goes after the first one, leaves the word "disabled" there,
and the last result in /var/lib/cloud/data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

_MARK = "--vmctl--"
_PATIENCE_S = 20
NOT_YET, ABSENT, DISABLED = 75, 76, 77  # exit codes of the script


def script(folder: str = "/run/cloud-init", patience_s: float = _PATIENCE_S, kept: str = "/var/lib/cloud/data") -> str:
    """What a shell in the guest runs: waits for the result, at most ``patience_s``, and prints what ``read`` reads.

    One log-in for many looks, for each costs a guest under TCG seconds. The looks are one process's: a shell's loop
    starts a sleep for each, which took a third of an emulated processor from the very boot it waited for. cloud-init
    is written in Python, so its first line names one.
    """
    result, disabled = f"{folder}/result.json", f"{folder}/disabled"
    return f"""
if ! [ -e {result} ] && ! [ -e {disabled} ]; then
  program=$(command -v cloud-init) || exit {ABSENT}
  read -r line <"$program"
  ${{line#??}} -IS -c 'import os, time
end = time.monotonic() + {patience_s}
while time.monotonic() < end and not (os.path.exists("{result}") or os.path.exists("{disabled}")):
    time.sleep(0.25)' 2>/dev/null || sleep 2
fi
at={folder}
if [ ! -e {result} ]; then
  [ -e {disabled} ] || exit {NOT_YET}
  at={kept}
  [ -e $at/result.json ] || exit {DISABLED}
fi
cat $at/result.json; echo; echo {_MARK}; cat $at/status.json; echo; echo {_MARK}
for log in /var/log/cloud-init.log; do
  [ -r $log ] && cat $log || sudo -n cat $log
done 2>/dev/null | tr -d '\\000' | grep -E '\\[?(WARNING|ERROR|CRITICAL)\\]?:' | tail -n 20
sync  # whoever was told that it is done may pull the plug
exit 0
"""


class Status(StrEnum):
    """How it went, in cloud-init's words."""

    DONE = "done"
    DEGRADED = "degraded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The status, and cloud-init's own lines about what went wrong."""

    status: Status
    lines: tuple[str, ...]


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _listed(value: Any) -> list[str]:
    """Error lines out of a list, or out of lists by level."""
    if isinstance(value, dict):
        return [line for lines in value.values() for line in _listed(lines)]
    return [str(line) for line in value] if isinstance(value, list) else []


def read(text: str) -> Outcome:
    """The outcome from what ``script`` printed."""
    parts = [part.strip() for part in text.split(_MARK)]
    result, status, log = [*parts, "", "", ""][:3]
    errors = _listed(_json(result).get("v1", {}).get("errors"))
    stages = _json(status).get("v1", {})
    recoverable = []
    for stage in stages.values():
        if isinstance(stage, dict):
            errors += [line for line in _listed(stage.get("errors")) if line not in errors]
            recoverable += _listed(stage.get("recoverable_errors"))
    logged = [line for line in log.splitlines() if line.strip()]
    lines = tuple(dict.fromkeys([*errors, *recoverable, *logged]))
    if errors or not _json(result):
        return Outcome(Status.FAILED, lines or ("result.json is unreadable",))
    return Outcome(Status.DEGRADED if recoverable or logged else Status.DONE, lines)
