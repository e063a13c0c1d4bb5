"""The form of a guest agent's answers, after QEMU's qga/qapi-schema.json: a guest may answer anything. Pure."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from typing import Any

_LARGEST = 1 << 63


def _base64(text: str) -> object:
    return base64.b64decode(text)


def _address(text: str) -> object:
    return ipaddress.ip_address(text)


# A key that may be missing ends in "?"; of a list, each member has the one form; a function raises ValueError.
_FORMS: Mapping[str, Any] = {
    "guest-exec": {"pid": int},
    "guest-exec-status": {
        "exited": bool,
        "exitcode?": int,
        "signal?": int,
        "out-data?": _base64,
        "err-data?": _base64,
    },
    "guest-file-open": int,
    "guest-file-read": {"count": int, "buf-b64": _base64},
    "guest-fsfreeze-freeze": int,
    "guest-fsfreeze-status": str,
    "guest-fsfreeze-thaw": int,
    "guest-fstrim": {"paths": [{"path": str, "trimmed?": int, "error?": str}]},
    "guest-get-time": int,
    "guest-network-get-interfaces": [
        {"name": str, "hardware-address?": str, "ip-addresses?": [{"ip-address": _address, "prefix": int}]}
    ],
}


def is_sound(command: str, answer: object) -> bool:
    """Whether an answer to ``command`` has the form it should have; of one whose answer nobody reads, any has."""
    return command not in _FORMS or _fits(answer, _FORMS[command])


def _fits(answer: Any, form: Any) -> bool:
    if isinstance(form, dict):
        return isinstance(answer, dict) and all(_has(answer, key, part) for key, part in form.items())
    if isinstance(form, list):
        return isinstance(answer, list) and all(_fits(one, form[0]) for one in answer)
    if isinstance(form, type):
        return type(answer) is form and (not isinstance(answer, int) or abs(answer) < _LARGEST)
    try:
        return isinstance(answer, str) and (form(answer), True)[1]
    except ValueError:
        return False


def _has(answer: dict[str, Any], key: str, form: Any) -> bool:
    name = key.removesuffix("?")
    return _fits(answer[name], form) if name in answer else name != key
