"""The decoder block, and stacks of equal blocks: scanned over stacked parameters, or unrolled over separate ones.

Training and checkpoints use the scan, which keeps the program of 61 layers as small as that of two. In decoding a scan would
slice, and so copy, all experts of every layer at each step; there the stack is unrolled, over the parameters that `unstack`
returns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import RMSNorm, SwiGLU
from dsv3_jax.model.mla import MLA, CacheMetadata, Latents
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.rope import RopeAngles
from dsv3_jax.parallel.devices import release
from dsv3_jax.parallel.sharding import place_tokens


class BlockOutput(NamedTuple):
    """Outputs of a block in addition to h. Fields are None if not requested or, for those of MoE, from a dense block."""

    load_E: jax.Array | None = None  # MoE: tokens per expert.
    balance_loss: jax.Array | None = None  # MoE: sequence-wise balance loss, without alpha.
    rounds: jax.Array | None = None  # MoE: rounds of the expert exchange.
    chosen_BTK: jax.Array | None = None  # MoE, with "routes" requested: expert ids.
    latents: Latents | None = None  # With "latents" requested: the block's tokens as a cache stores them.
    hidden_BTD: jax.Array | None = None  # With "hidden" requested: the residual stream after the block.


class Block(nn.Module):
    """A pre-norm decoder block, h += MLA(norm(h)); h += FFN(norm(h)), with the signature of a scan body."""

    config: ModelConfig
    moe: bool
    return_intermediates: tuple[str, ...] = ()
    absorbed: bool = False

    def setup(self) -> None:
        config = self.config
        self.input_layernorm = RMSNorm(config, config.hidden_size)
        self.self_attn = MLA(config, self.absorbed)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size)
        self.mlp: Any = MoE(config) if self.moe else SwiGLU(config, config.intermediate_size)

    def __call__(
        self,
        h_BTD: jax.Array,
        cache: Latents | None,
        angles: RopeAngles,
        token_mask_BT: jax.Array | None = None,
        metadata: CacheMetadata | None = None,
        segment_starts_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, BlockOutput]:
        """Return the residual stream after the block, and its other outputs; arguments as in `MLA` and `Router`."""
        attended_BTD, latents = self.self_attn(self.input_layernorm(h_BTD), angles, cache, metadata, segment_starts_BT)
        h_BTD += attended_BTD
        x_BTD = checkpoint_name(self.post_attention_layernorm(h_BTD), "ffn_input")
        output = BlockOutput(latents=latents if "latents" in self.return_intermediates else None)
        if self.moe:
            y_BTD, routing, rounds = self.mlp(x_BTD, token_mask_BT)
            output = output._replace(
                load_E=routing.load_E,
                balance_loss=routing.balance_loss,
                rounds=rounds,
                chosen_BTK=routing.chosen_BTK if "routes" in self.return_intermediates else None,
            )
        else:
            y_BTD = self.mlp(x_BTD)
        h_BTD = place_tokens(h_BTD + y_BTD)
        return h_BTD, output._replace(hidden_BTD=h_BTD if "hidden" in self.return_intermediates else None)


SAVED_BY_SAVE_LATENTS = "c_q", "c_kv", "ffn_input"


def rematerialised(block: type[nn.Module], config: ModelConfig, *, scanned: bool) -> type[nn.Module]:
    """Return `block` with a backward pass that recomputes all that `config.remat` does not save; unchanged for "none"."""
    if config.remat == "none":
        return block
    policies = jax.checkpoint_policies
    policy = policies.nothing_saveable if config.remat == "full" else policies.save_only_these_names(*SAVED_BY_SAVE_LATENTS)
    return nn.remat(block, policy=policy, prevent_cse=not scanned)


# ----------------------------------------------------------------------------------------------------------------------
# Stacks of blocks.


STACKS = "dense_layers", "moe_layers"


def stack_sizes(config: ModelConfig) -> dict[str, int]:
    """Return {stack name: number of blocks}, the dense stack first, without empty stacks."""
    sizes = dict(zip(STACKS, (config.first_k_dense_replace, config.num_moe_layers), strict=True))
    return {name: size for name, size in sizes.items() if size}


def run_stacks(
    config: ModelConfig, h_BTD: jax.Array, cache: dict[str, Latents] | None, *shared: Any, unrolled: bool, **options: Any
) -> tuple[jax.Array, dict[str, BlockOutput]]:
    """Run both stacks, from within a compact method of a module.

    Args:
      config: the model.
      h_BTD: residual stream.
      cache: latents of earlier tokens by stack, or by layer if unrolled.
      *shared: inputs of every block after its cache: angles, token_mask_BT, metadata, segment_starts_BT.
      unrolled: run block by block over the parameters `moe_layers_0`, ... instead of a scan over those of `moe_layers`.
      **options: fields of `Block`.

    Returns:
      The residual stream, and the outputs of each stack, with a leading layer axis, or of each layer if unrolled.
    """
    block = rematerialised(Block, config, scanned=not unrolled)
    outputs: dict[str, BlockOutput] = {}
    for name, size in stack_sizes(config).items():
        if unrolled:
            layers, module = [f"{name}_{i}" for i in range(size)], block
        else:
            layers = [name]
            module = nn.scan(
                block,
                variable_axes={"params": 0, "router": 0, "placement": 0},
                split_rngs={"params": True},
                in_axes=(0, *(nn.broadcast for _ in shared)),
                length=size,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
        for layer in layers:
            run = module(config, moe=name == "moe_layers", name=layer, **options)
            h_BTD, outputs[layer] = run(h_BTD, None if cache is None else cache[layer], *shared)
    return h_BTD, outputs


def unstack(variables: dict[str, Any], *, donate: bool = False) -> dict[str, Any]:
    """Return the variables of a scanned model for an unrolled one: `moe_layers` becomes `moe_layers_0`, ...

    With `donate` every stacked array is deleted once its layers exist, so that at most one array is in memory twice.
    """

    def layers(stack: jax.Array) -> list[jax.Array]:
        found = [stack[i] for i in range(stack.shape[0])]
        if donate:
            release(stack, found)
        return found

    def unstacked(collection: dict[str, Any]) -> dict[str, Any]:
        out = {name: tree for name, tree in collection.items() if name not in STACKS}
        for name in (stack for stack in STACKS if stack in collection):  # The same order on every process.
            stacks, structure = jax.tree.flatten(collection[name])
            by_layer = zip(*map(layers, stacks), strict=True)
            out |= {f"{name}_{i}": jax.tree.unflatten(structure, layer) for i, layer in enumerate(by_layer)}
        return out

    return {collection: unstacked(tree) for collection, tree in variables.items()}
