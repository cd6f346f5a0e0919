"""The checks every config dataclass is built from."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any


def check(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_numbers(config: Any, prefix: str = "") -> None:
    """Raises ValueError naming the first field declared as an integer or a number that is none, or is not finite."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type).removesuffix(" | None")
        if kind not in ("int", "float") or (value is None and kind != field.type):
            continue
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if kind == "int":
            check(is_integer, f"{prefix}{field.name} is {value!r}; use an integer")
        else:
            is_finite = (is_integer or isinstance(value, float)) and abs(value) <= sys.float_info.max
            check(is_finite, f"{prefix}{field.name} is {value!r}; use a finite number")


def check_seed(name: str, seed: Any) -> None:
    """Raises ValueError unless `seed` is an integer of 32 bits without a sign: what random keys are made from."""
    is_seed = isinstance(seed, int) and 0 <= seed < 2**32
    check(is_seed, f"{name} is {seed!r}; it must be an integer in 0..{2**32 - 1}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError naming the first of the fields `names` that is below 1."""
    for name in names:
        value = getattr(config, name)
        check(value >= 1, f"{name} is {value}; it must be at least 1")
