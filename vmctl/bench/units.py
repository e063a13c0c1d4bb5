"""Values as people read them. Pure."""

from __future__ import annotations

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))
TIMES, PERCENT = "×", "%"


def _scaled(value: float) -> tuple[float, str]:
    factor, prefix = next(((f, p) for f, p in _PREFIXES if abs(value) >= 0.9995 * f), _PREFIXES[-1])
    return value / factor, prefix


def si(value: float, unit: str) -> str:
    """With three digits and a prefix of the SI: 3.21 GB/s, 230 ns."""
    scaled, prefix = _scaled(value)
    size = abs(scaled)
    return f"{scaled:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f} {prefix}{unit}".rstrip()


def times(value: float | None) -> str:
    """A ratio: ×1.02, ×35.0, ×1,200; "" for none."""
    if value is None:
        return ""
    return f"×{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def told(value: float, unit: str) -> str:
    """A value of any unit that a chart may have."""
    if unit == TIMES:
        return times(value)
    return f"{value:.1f} %" if unit == PERCENT else si(value, unit)


def tick(value: float, unit: str) -> str:
    """A mark of an axis, as short as it can be."""
    if unit == TIMES:
        return f"×{value:,g}" if value < 1e6 else f"×{value:.0e}"
    if unit == PERCENT:
        return f"{value:g} %"
    scaled, prefix = _scaled(value) if value else (0.0, "")
    return f"{scaled:.3g} {prefix}{unit}".rstrip()


def binary(count: float) -> str:
    """Bytes of memory and disks: 512 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
