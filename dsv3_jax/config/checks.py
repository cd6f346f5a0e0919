"""The two checks every config dataclass is built from."""

from __future__ import annotations

from typing import Any


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_positive(config: Any, *names: str) -> None:
    """Raises ValueError naming the first of the fields `names` that is below 1."""
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{name} is {value}; it must be at least 1")
