"""A stack of equal decoder blocks: scanned over stacked parameters, or unrolled over separate ones.

Scanning keeps a 61-layer program as small as one of two layers; it is the form of training and of checkpoints. In
decoding it would slice, and so copy, all experts of every layer at each step: there the stack is unrolled, over the
parameters that `unstack` lays out.
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
    angles: RopeAngles,
    metadata: CacheMetadata | None,
    token_mask_BT: jax.Array | None = None,
    segment_starts_BT: jax.Array | None = None,
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
    h_BTD, output = layers(h_BTD, cache_L, angles, token_mask_BT, metadata, segment_starts_BT)
    return h_BTD, {name: output}


def run_unrolled(
    config: ModelConfig,
    name: str,
    size: int,
    h_BTD: jax.Array,
    cache: dict[str, Latents] | None,
    angles: RopeAngles,
    metadata: CacheMetadata | None,
    token_mask_BT: jax.Array | None = None,
    segment_starts_BT: jax.Array | None = None,
    **block: Any,
) -> tuple[jax.Array, dict[str, BlockOutput]]:
    """Runs stack `name` block by block over the parameters `name_0`, `name_1`, ..., from within a compact method."""
    outputs = {}
    for layer in (f"{name}_{i}" for i in range(size)):
        module = rematerialised(Block, config, scanned=False)(config, moe=name == "moe_layers", name=layer, **block)
        own_cache = None if cache is None else cache[layer]
        h_BTD, outputs[layer] = module(h_BTD, own_cache, angles, token_mask_BT, metadata, segment_starts_BT)
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


# ----------------------------------------------------------------------------------------------------------------------
# One pre-norm decoder block: h += MLA(norm(h)); h += FFN(norm(h)), the FFN dense or MoE.


class BlockOutput(NamedTuple):
    """What a block has to say beside the residual stream; None is what it was not asked for, or does not have."""

    load_E: jax.Array | None = None
    """MoE: counted tokens per expert."""
    balance_loss: jax.Array | None = None
    """MoE: sequence-wise balance loss, without alpha."""
    rounds: jax.Array | None = None
    """MoE: rounds of the exchange with the experts' devices."""
    chosen_BTK: jax.Array | None = None
    """MoE, if "routes" is kept: expert ids."""
    latents: Latents | None = None
    """If "latents" is kept: what a cache stores of the block's tokens."""
    hidden_BTD: jax.Array | None = None
    """If "hidden" is kept: the residual stream after the block."""


class Block(nn.Module):
    """A decoder block of either kind, shaped as a scan body: (h, per-layer cache, shared...) -> (h, BlockOutput)."""

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
        """Runs the block.

        Args:
          h_BTD: the residual stream.
          cache: latents of earlier tokens, or None.
          rotation: rotation of the tokens' positions.
          token_mask_BT: tokens that enter load and balance loss; None counts all.
          places: where in the cache each sequence's are.
          segment_starts_BT: where the document of each token begins, to attend within it; None attends across documents.
        """
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
