"""Shapes of all intermediate arrays of a function, those inside loops included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax


def intermediate_shapes(function: Callable[..., Any], *args: Any) -> set[tuple[int, ...]]:
    """Return the shape of the result of every operation of the traced function, before the compiler fuses any."""
    return set(_shapes(jax.make_jaxpr(function)(*args).jaxpr))


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _shapes(inner)
