"""How many parameters a model has, by module and in all: counted from shapes, so that no array is made."""

from __future__ import annotations

from typing import Any

import jax

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import abstract_variables


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
