"""One pre-norm decoder block: h += MLA(norm(h)); h += FFN(norm(h)), the FFN dense or MoE."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import RMSNorm, SwiGLU
from dsv3_jax.model.mla import MLA, Latents, Places
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.rope import Rotation
from dsv3_jax.parallel.sharding import place_tokens


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
    keep: tuple[str, ...] = ()
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
        rotation: Rotation,
        counted_BT: jax.Array | None = None,
        places: Places | None = None,
        starts_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, BlockOutput]:
        """Runs the block.

        Args:
          h_BTD: the residual stream.
          cache: latents of earlier tokens, or None.
          rotation: rotation of the tokens' positions.
          counted_BT: tokens that enter load and balance loss; None counts all.
          places: where in the cache each sequence's are.
          starts_BT: where the document of each token begins, to attend within it; None attends across documents.
        """
        attended_BTD, latents = self.self_attn(self.input_layernorm(h_BTD), rotation, cache, places, starts_BT)
        h_BTD += attended_BTD
        x_BTD = checkpoint_name(self.post_attention_layernorm(h_BTD), "ffn_input")
        output = BlockOutput(latents=latents if "latents" in self.keep else None)
        if self.moe:
            y_BTD, routing, rounds = self.mlp(x_BTD, counted_BT)
            output = output._replace(
                load_E=routing.load_E,
                balance_loss=routing.balance_loss,
                rounds=rounds,
                chosen_BTK=routing.chosen_BTK if "routes" in self.keep else None,
            )
        else:
            y_BTD = self.mlp(x_BTD)
        h_BTD = place_tokens(h_BTD + y_BTD)
        return h_BTD, output._replace(hidden_BTD=h_BTD if "hidden" in self.keep else None)
