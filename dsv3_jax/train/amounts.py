"""Large numbers as people read them: 1.2M tokens, 3.4 hours."""

from __future__ import annotations

_SUFFIXES = "", "K", "M", "B", "T"


def in_short(number: float, decimals: int = 1) -> str:
    """A count in few digits: 980, 1.2M, 123K, 14.8T; `decimals` at most, and those only below 100."""
    value, power = float(f"{number:.{decimals + 2}g}"), 0  # Rounded first: 999,960 is 1M.
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    while abs(value) >= 1000:
        value, power = value / 1000, power + 1
    digits = f"{value:.{decimals}f}" if abs(value) < 100 else f"{value:.0f}"
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + _SUFFIXES[power]


def in_time(seconds: float) -> str:
    """A duration in its largest unit that it holds twice over: 119 s, 12 min, 2.5 h, 3.0 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
