"""The order in which names are listed."""

from __future__ import annotations

import re

_NUMBER = re.compile("([0-9]+)")


def natural(name: str) -> tuple[list[str | int], str]:
    """A sort key by which numbers in names count as such: node-2 comes before node-10."""
    parts: list[str | int] = [*_NUMBER.split(name)]
    parts[1::2] = [int(one) for one in parts[1::2]]
    return parts, name
