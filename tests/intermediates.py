"""What a function computes on its way: the shapes of all its intermediate arrays, those within loops included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax


def intermediate_shapes(function: Callable[..., Any], *args: Any) -> set[tuple[int, ...]]:
    """The shape of every array that an operation of the traced function makes, before the compiler fuses any away."""
    return set(_shapes(jax.make_jaxpr(function)(*args).jaxpr))


def _shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _shapes(inner)
