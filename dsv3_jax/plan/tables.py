"""Path, shape, logical axes, PartitionSpec and bytes per device of every array of a run's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from rich.console import Console
from rich.table import Table

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.model import abstract_variables, logical_axes
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.plan.program import GIB, device_bytes, placed
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


# ----------------------------------------------------------------------------------------------------------------------
# The table of what programs take of a device's memory, and whether they fit.


def amount(value: float) -> str:
    """Two decimals, or three digits where they would show less."""
    return f"{value:.2f}" if abs(value) >= 1 or not value else f"{value:.3g}"


def print_memory(
    console: Console,
    columns: Sequence[str],
    rows: dict[str, Sequence[int | None]],
    chip: Chip | None,
    fits: bool | None,
    title: str | None = None,
) -> None:
    """Prints bytes in GiB, the chip's memory below them, and the verdict.

    Args:
      console: where to.
      columns: headings: of the names, and of each program.
      rows: by name, the bytes of each program; None is unknown.
      chip: None for CPU devices.
      fits: None says nothing of it.
      title: of the table.
    """
    table = Table(*columns, title=title)
    programs = table.columns[1:]
    for column in programs:
        column.justify = "right"
    hbm = None if chip is None else chip.hbm_gib * GIB
    for name, sizes in {**rows, "HBM a program can use": [hbm] * len(programs)}.items():
        table.add_row(name, *("?" if size is None else amount(size / GIB) for size in sizes))
    console.print(table)
    if fits is not None:
        console.print("It fits." if fits else "[bold]It does not fit.[/bold]")


# ----------------------------------------------------------------------------------------------------------------------
# How many parameters a model has, by module and in all: counted from shapes, so that no array is made.


def count_parameters(config: ModelConfig) -> dict[str, Any]:
    """Parameters of a model, router biases included.

    Returns:
      `parameters_main` (as published: without MTP), `parameters_mtp` (the MTP depths without their copies of embedding
      and head), `parameters_active` (of the main model, for one token, embedding and head included), `experts` and
      `experts_active` (shared ones counted, over all MoE layers of the main model), and `modules`: module -> count.
    """
    shapes = abstract_variables(config)
    modules: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = [key.key for key in path[1:]]
        depth = 2 if names[0] in ("dense_layers", "moe_layers") else 1
        if names[:depth] == ["moe_layers", "mlp"]:
            depth = 3
        name = "/".join(names[:depth])
        modules[name] = modules.get(name, 0) + leaf.size
    mtp = sum(count for name, count in modules.items() if name.startswith("mtp_"))
    main = sum(modules.values()) - mtp
    one_expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_moe_layers * (config.n_routed_experts - config.num_experts_per_tok)
    per_layer = config.n_shared_experts + config.n_routed_experts
    return {
        "parameters_main": main,
        "parameters_mtp": mtp,
        "parameters_active": main - idle * one_expert,
        "experts": config.num_moe_layers * per_layer,
        "experts_active": config.num_moe_layers * (config.n_shared_experts + config.num_experts_per_tok),
        "modules": modules,
    }


# ----------------------------------------------------------------------------------------------------------------------
# How far a token can travel: node-limited routing, laid out on the devices of a mesh (section 2.1.2 of the report).


class Reach(NamedTuple):
    """The most places that the experts of one token can live in."""

    devices: int
    hosts: int


def reach(config: ModelConfig, mesh: Mesh) -> Reach:
    """Bounds the devices and hosts of one token's experts: its K experts come from `topk_group` groups of consecutive ones."""
    groups, experts, size = config.n_group, config.n_routed_experts, mesh.shape["expert"]
    lines = np.moveaxis(mesh.devices, AXES.index("expert"), -1).reshape(-1, size)
    device_of = np.arange(experts) * size // experts
    members = np.split(device_of, groups)

    def farthest(places: list[set[Any]]) -> int:
        """Places of the groups that are spread over most, of which there cannot be more than experts, nor than there are."""
        spread = sum(sorted(len(group) for group in places)[-config.topk_group :])
        return min(config.num_experts_per_tok, spread, len(set().union(*places)))

    devices = farthest([set(group) for group in members])
    hosts = [farthest([{_host(line[device]) for device in group} for group in members]) for line in lines]
    return Reach(devices, max(hosts))


def _host(device: Any) -> tuple[int, int]:
    return getattr(device, "slice_index", 0), device.process_index
