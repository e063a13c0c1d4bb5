"""Checking values against a JSON Schema. The only place that imports jsonschema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at which place; ``keyword`` is the one of the schema that it offends."""

    path: tuple[str | int, ...]
    keyword: str
    message: str

    @property
    def where(self) -> str:
        """The place in words; "" for the whole."""
        return ".".join(map(str, self.path))


def errors(schema: Mapping[str, Any], values: Any) -> list[Problem]:
    """Every problem, in the order of their places."""
    from jsonschema import Draft202012Validator  # late: few commands read what must be checked

    found = sorted(Draft202012Validator(schema).iter_errors(values), key=lambda error: list(map(str, error.path)))
    return [Problem(tuple(e.absolute_path), str(e.validator), str(e.message)[:_LONGEST]) for e in found]
