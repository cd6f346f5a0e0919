"""Field types that carry their bounds, such as `PositiveInt`, and the one check that every config dataclass runs."""

from __future__ import annotations

import functools
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple


class Bound(NamedTuple):
    """Condition on a field's value, declared in the field's type as `Annotated[int, Bound(holds, remedy)]`."""

    holds: Callable[[Any], bool]
    remedy: str
    """End of the error message, after "<field> is <value>; "."""


PositiveInt = Annotated[int, Bound(lambda value: value >= 1, "it must be at least 1")]
NonNegativeInt = Annotated[int, Bound(lambda value: value >= 0, "it cannot be negative")]
PositiveFloat = Annotated[float, Bound(lambda value: value > 0, "it must be positive")]
NonNegativeFloat = Annotated[float, Bound(lambda value: value >= 0, "it cannot be negative")]
Share = Annotated[float, Bound(lambda value: 0 <= value <= 1, "it must lie in 0..1")]
OpenShare = Annotated[float, Bound(lambda value: 0 < value < 1, "it must lie strictly between 0 and 1")]
Seed = Annotated[int, Bound(lambda value: 0 <= value < 2**32, f"it must be an integer in 0..{2**32 - 1}")]


def check(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError with `name` if `value` is no int, finite float, bool or choice as `hint` says, or breaks a `Bound`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        arms = [arm for arm in typing.get_args(hint) if arm is not types.NoneType]
        if value is None or len(arms) > 1:
            return
        (hint,) = arms
    kind, *bounds = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if kind is int:
        check(is_integer, f"{name} is {value!r}; use an integer")
    elif kind is float:
        is_finite = (is_integer or isinstance(value, float)) and abs(value) <= sys.float_info.max
        check(is_finite, f"{name} is {value!r}; use a finite number")
    elif kind is bool:
        check(isinstance(value, bool), f"{name} is {value!r}; use True or False")
    elif typing.get_origin(kind) is Literal:
        check(value in typing.get_args(kind), f"{name} is {value!r}; choose {' or '.join(typing.get_args(kind))}")
    for bound in bounds:
        if isinstance(bound, Bound):  # Not an annotation of tyro's.
            check(bound.holds(value), f"{name} is {value!r}; {bound.remedy}")


def check_fields(config: Any, prefix: str = "") -> None:
    """Raise ValueError for the first field of a dataclass that `check_value` refuses, named `prefix` + field."""
    for name, hint in _hints(config.__class__).items():
        check_value(prefix + name, getattr(config, name), hint)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)
