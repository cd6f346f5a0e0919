"""Tables of a run: shape, sharding and bytes of every array, parameter counts, memory, and the spread of a token's experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich
from jax.sharding import AbstractMesh, Mesh
from rich.table import Table

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.model import abstract_variables, logical_axes
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.plan.program import GIB, state_on
from dsv3_jax.plan.topology import device_bytes, named_leaves


class Row(NamedTuple):
    """One array of the training state and its sharding."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    logical_axes: tuple[str, ...] | None
    """None for the counters of the optimizer and the step."""
    spec: tuple[Any, ...]
    """Mesh axis, tuple of mesh axes or None for each dimension."""
    bytes_per_device: int


def sharding_table(config: Config, mesh: Mesh | AbstractMesh) -> list[Row]:
    """Return a row for every array of the training state: step, parameters, router biases, optimizer.

    Raises:
      ValueError: naming the variable, if a dimension is no multiple of the mesh axes it is split along.
    """
    axes = dict(named_leaves(logical_axes(config.model), is_leaf=lambda leaf: isinstance(leaf, tuple)))
    rows = []
    for path, leaf in named_leaves(state_on(config, mesh)):
        moments = next((name for name in ("mu", "nu") if name in path), None)
        parameter = path if moments is None else ("params", *path[path.index(moments) + 1 :])
        spec, size = tuple(leaf.sharding.spec), device_bytes(leaf)
        rows.append(Row("/".join(path), leaf.shape, leaf.dtype.name, axes.get(parameter), spec, size))
    return rows


def spec_text(spec: tuple[Any, ...]) -> str:
    """Return a PartitionSpec as text, such as "(-, fsdp+expert, tensor)", where "-" is a dimension that is not split."""
    return "(" + ", ".join("-" if part is None else part if isinstance(part, str) else "+".join(part) for part in spec) + ")"


def print_sharding(rows: list[Row], mesh: Mesh | AbstractMesh) -> None:
    """Print the mesh, one line per array, not cut to the terminal's width as rich would, and the bytes of all on a device."""
    print(f"\n{mesh.size} devices: {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}")
    lines = [("array", "shape", "logical axes", "split along", "bytes a device")]
    for row in rows:
        axes, size = str(row.logical_axes or "-"), f"{row.bytes_per_device:,}"
        lines.append((row.path, str(list(row.shape)), axes, spec_text(row.spec), size))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    print(f"all: {sum(row.bytes_per_device for row in rows):,} bytes a device\n")


# ----------------------------------------------------------------------------------------------------------------------
# Printed tables: of numbers, and of the memory that programs take.


def print_table(columns: Sequence[str], *sections: Iterable[Sequence[str]], title: str | None = None, texts: int = 1) -> None:
    """Print a table of rows in sections; columns after the first `texts` are aligned to the right, as numbers."""
    table = Table(*columns, title=title)
    for column in table.columns[texts:]:
        column.justify = "right"
    for section in sections:
        for row in section:
            table.add_row(*row)
        table.add_section()
    rich.print(table)


def amount(value: float) -> str:
    """Return a number as text: two decimals, or three significant digits if 0 < |value| < 1."""
    return f"{value:.2f}" if abs(value) >= 1 or not value else f"{value:.3g}"


def print_memory(
    columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], chip: Chip | None, fits: bool | None, title: str | None
) -> None:
    """Print memory in GiB, with the chip's memory in the last row ("?" on CPU), then if it fits, unless `fits` is None.

    Args:
      columns: headings of the names and of each program.
      rows: name -> bytes of each program, None if unknown.
      chip: None for CPU devices.
      fits: None if unknown.
      title: title of the table, or None.
    """
    hbm = None if chip is None else chip.hbm_gib * GIB
    rows = {**rows, "HBM a program can use": [hbm] * (len(columns) - 1)}
    cells = ([name, *("?" if size is None else amount(size / GIB) for size in sizes)] for name, sizes in rows.items())
    print_table(columns, cells, title=title)
    if fits is not None:
        rich.print("It fits." if fits else "[bold]It does not fit; use more devices or a smaller batch.[/bold]")


# ----------------------------------------------------------------------------------------------------------------------
# Parameter counts, from shapes.


def count_parameters(config: ModelConfig) -> dict[str, Any]:
    """Return the number of parameters of a model, router biases included.

    Returns:
      `parameters_main` (as published: without MTP), `parameters_mtp` (the MTP depths without their copies of embedding
      and head), `parameters_active` (of the main model, for one token, embedding and head included), `experts` and
      `experts_active` (with shared experts, over all MoE layers of the main model), and `modules`: module -> count.
    """
    modules: dict[str, int] = {}
    for (_, *names), leaf in named_leaves(abstract_variables(config)):
        depth = 3 if names[:2] == ["moe_layers", "mlp"] else 2 if names[0] in ("dense_layers", "moe_layers") else 1
        name = "/".join(names[:depth])
        modules[name] = modules.get(name, 0) + leaf.size
    mtp = sum(count for name, count in modules.items() if name.startswith("mtp_"))
    main = sum(modules.values()) - mtp
    one_expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_moe_layers * (config.n_routed_experts - config.num_experts_per_tok)
    return {
        "parameters_main": main,
        "parameters_mtp": mtp,
        "parameters_active": main - idle * one_expert,
        "experts": config.num_moe_layers * (config.n_shared_experts + config.n_routed_experts),
        "experts_active": config.num_moe_layers * (config.n_shared_experts + config.num_experts_per_tok),
        "modules": modules,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Spread of a token's experts: node-limited routing, laid out on the devices of a mesh (section 2.1.2 of the report).


def reach(config: ModelConfig, mesh: Mesh) -> tuple[int, int]:
    """Return the most devices, and the most hosts, that hold the K experts of one token, from `topk_group` groups."""
    experts, size = config.n_routed_experts, mesh.shape["expert"]
    lines = np.moveaxis(mesh.devices, AXES.index("expert"), -1).reshape(-1, size)
    groups = np.split(np.arange(experts) * size // experts, config.n_group)

    def largest(holders: list[set[Any]]) -> int:
        """Return the smallest of K, the sum of the `topk_group` largest sets of holders, and the number of all holders."""
        spread = sum(sorted(len(group) for group in holders)[-config.topk_group :])
        return min(config.num_experts_per_tok, spread, len(set().union(*holders)))

    def host(device: Any) -> tuple[int, int]:
        return getattr(device, "slice_index", 0), device.process_index

    devices = largest([set(group) for group in groups])
    return devices, max(largest([{host(line[device]) for device in group} for group in groups]) for line in lines)
