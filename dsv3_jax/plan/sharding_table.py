"""Path, shape, logical axes, PartitionSpec and bytes per device of every array of a run's state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import Config
from dsv3_jax.model import logical_axes
from dsv3_jax.plan.arrays import device_bytes, placed
from dsv3_jax.train.state import init_state, state_shardings


class Row(NamedTuple):
    """One array."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    logical_axes: tuple[str, ...] | None
    """None for the counters of the optimizer and the step."""
    spec: tuple[Any, ...]
    """Mesh axis, tuple of mesh axes or None for each dimension."""
    bytes_per_device: int


def sharding_table(config: Config, mesh: Mesh | AbstractMesh) -> list[Row]:
    """Every array of the state: variables first, then the optimizer's.

    Raises:
      ValueError: naming the variable, if a dimension is no multiple of the mesh axes it is split along.
    """
    shapes = jax.eval_shape(lambda: init_state(config))
    axes = dict(_flat(logical_axes(config.model), is_leaf=lambda leaf: isinstance(leaf, tuple)))
    rows = []
    for (path, leaf), sharding in zip(_flat(shapes), jax.tree.leaves(state_shardings(config, mesh)), strict=True):
        parameter = _parameter_of(path)
        size = device_bytes(placed(leaf, sharding))
        rows.append(Row("/".join(path), leaf.shape, leaf.dtype.name, axes.get(parameter), tuple(sharding.spec), size))
    return rows


def golden_text(rows: list[Row]) -> str:
    """One line an array: path, shape and spec, as the file that is checked in holds them."""
    return "".join(f"{row.path} {list(row.shape)} {spec_text(row.spec)}\n" for row in rows)


def spec_text(spec: tuple[Any, ...]) -> str:
    """A PartitionSpec in short: (-, fsdp+expert, tensor)."""
    return "(" + ", ".join("-" if part is None else part if isinstance(part, str) else "+".join(part) for part in spec) + ")"


def _flat(tree: Any, is_leaf: Any = None) -> list[tuple[tuple[str, ...], Any]]:
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(tuple(jax.tree_util.keystr((key,), simple=True) for key in path), leaf) for path, leaf in found]


def _parameter_of(path: tuple[str, ...]) -> tuple[str, ...]:
    """The variable that an array belongs to: itself, or the parameter whose moment it is."""
    for moments in ("mu", "nu"):
        if moments in path:
            return ("params", *path[path.index(moments) + 1 :])
    return path
