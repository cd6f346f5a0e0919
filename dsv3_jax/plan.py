"""`python -m dsv3_jax.plan --config C [--json]`: what a run is made of, before anything is paid for.

Nothing is computed: shapes come from `jax.eval_shape`, so the 671B model is counted on a laptop.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.command_line import exits_with_one_line, parse_with_config
from dsv3_jax.model import init_variables


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    """What stands beside the fields of the run config."""

    config: str = "configs/tiny.py"
    """Python file that exposes `config`, a Config; the fields below override it."""
    topology: str | None = None
    """Accelerator topology to compile for, such as v5p:8x8x8."""
    json: bool = False
    """Print one JSON object and nothing else."""


def count_parameters(config: ModelConfig) -> dict[str, Any]:
    """Parameters of a model, router biases included.

    Returns:
      `parameters_main` (as published: without MTP), `parameters_mtp` (the MTP depths without their copies of embedding
      and head), `parameters_active` (of the main model, for one token, embedding and head included), `experts` and
      `experts_active` (shared ones counted, over all MoE layers of the main model), and `modules`: module -> count.
    """
    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
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


@exits_with_one_line
def main() -> None:
    """The command line."""
    flags, config = parse_with_config(PlanFlags, description=__doc__ or "")
    if flags.topology is not None:
        raise NotImplementedError(f"--topology {flags.topology}: compiling for a topology is not implemented yet; leave it out")
    counts = count_parameters(config.model)
    if flags.json:
        print(json.dumps(counts))
        return
    table = Table("module", "parameters", title=flags.config)
    table.columns[1].justify = "right"
    for name, count in counts["modules"].items():
        table.add_row(name, f"{count:,}")
    table.add_section()
    for name in ("parameters_main", "parameters_mtp", "parameters_active", "experts", "experts_active"):
        table.add_row(name.replace("_", " "), f"{counts[name]:,}")
    Console().print(table)


if __name__ == "__main__":
    main()
