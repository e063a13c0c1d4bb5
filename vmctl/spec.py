"""What a user asks for. Placeholder for the enums other rooms already need; the rest follows."""

from __future__ import annotations

from enum import StrEnum


class Accel(StrEnum):
    """What runs a guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


class AccelChoice(StrEnum):
    """What a user may ask for with --accel."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"
    REQUIRE_KVM = "require-kvm"
