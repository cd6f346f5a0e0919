"""A stack of equal decoder blocks: scanned over stacked parameters, or unrolled over separate ones.

Scanning keeps a 61-layer program as small as one of two layers; it is the form of training and of checkpoints. In
decoding it would slice, and so copy, all experts of every layer at each step: there the stack is unrolled, over the
parameters that `unstack` lays out.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import Block, BlockOutput
from dsv3_jax.model.mla import Latents, Places
from dsv3_jax.model.rope import Rotation
from dsv3_jax.parallel.devices import release

STACKS = "dense_layers", "moe_layers"
SAVED_BY_SAVE_LATENTS = "c_q", "c_kv", "ffn_input"


def stack_sizes(config: ModelConfig) -> dict[str, int]:
    """Blocks in each stack that has any, bottom first."""
    sizes = dict(zip(STACKS, (config.first_k_dense_replace, config.num_moe_layers), strict=True))
    return {name: size for name, size in sizes.items() if size}


def rematerialised(block: type[nn.Module], config: ModelConfig, *, scanned: bool) -> type[nn.Module]:
    """`block`, with the backward pass recomputing what `config.remat` does not keep (section 3.2 of the report)."""
    if config.remat == "none":
        return block
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if config.remat == "full" else policies.save_only_these_names(*SAVED_BY_SAVE_LATENTS)
    return nn.remat(block, policy=policy, prevent_cse=not scanned)


def run_scanned(
    config: ModelConfig,
    name: str,
    size: int,
    h_BTD: jax.Array,
    cache: dict[str, Latents] | None,
    rotation: Rotation,
    places: Places | None,
    counted_BT: jax.Array | None = None,
    starts_BT: jax.Array | None = None,
    **block: Any,
) -> tuple[jax.Array, dict[str, BlockOutput]]:
    """Runs stack `name` as one scan, from within a module's compact method; outputs gain a leading layer axis."""
    scan = nn.scan(
        rematerialised(Block, config, scanned=True),
        variable_axes={"params": 0, "router": 0, "placement": 0},
        split_rngs={"params": True},
        in_axes=(0, *(nn.broadcast,) * 4),
        length=size,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    layers = scan(config, moe=name == "moe_layers", name=name, **block)
    cache_L = None if cache is None else cache[name]
    h_BTD, output = layers(h_BTD, cache_L, rotation, counted_BT, places, starts_BT)
    return h_BTD, {name: output}


def run_unrolled(
    config: ModelConfig,
    name: str,
    size: int,
    h_BTD: jax.Array,
    cache: dict[str, Latents] | None,
    rotation: Rotation,
    places: Places | None,
    counted_BT: jax.Array | None = None,
    starts_BT: jax.Array | None = None,
    **block: Any,
) -> tuple[jax.Array, dict[str, BlockOutput]]:
    """Runs stack `name` block by block over the parameters `name_0`, `name_1`, ..., from within a compact method."""
    outputs = {}
    for layer in (f"{name}_{i}" for i in range(size)):
        module = rematerialised(Block, config, scanned=False)(config, moe=name == "moe_layers", name=layer, **block)
        own_cache = None if cache is None else cache[layer]
        h_BTD, outputs[layer] = module(h_BTD, own_cache, rotation, counted_BT, places, starts_BT)
    return h_BTD, outputs


def unstack(variables: dict[str, Any], *, donate: bool = False) -> dict[str, Any]:
    """The variables of a scanned model laid out for an unrolled one: `moe_layers` becomes `moe_layers_0`, ...

    With `donate` every stack is deleted once its layers are there, so that never more than one exists twice.
    """

    def layers(stack: jax.Array) -> list[jax.Array]:
        found = [stack[i] for i in range(stack.shape[0])]
        if donate:
            release(stack, found)
        return found

    def unstacked(collection: dict[str, Any]) -> dict[str, Any]:
        out = {name: tree for name, tree in collection.items() if name not in STACKS}
        for name in (stack for stack in STACKS if stack in collection):  # In one order on every process.
            stacks, structure = jax.tree.flatten(collection[name])
            by_layer = zip(*map(layers, stacks), strict=True)
            out |= {f"{name}_{i}": jax.tree.unflatten(structure, layer) for i, layer in enumerate(by_layer)}
        return out

    return {collection: unstacked(tree) for collection, tree in variables.items()}
