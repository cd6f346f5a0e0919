"""Multi-token prediction (section 2.2 of the report): depth k predicts the token k + 1 ahead.

Each depth joins the state of the previous depth with the embedding of the token k ahead, and runs one MoE block. Embedding
and head are the main model's, so their gradients add.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.documents import has_ahead
from dsv3_jax.model.layers import Linear, RMSNorm
from dsv3_jax.model.mla import CacheMetadata, Latents
from dsv3_jax.model.rope import RopeAngles
from dsv3_jax.model.transformer import Block, BlockOutput, rematerialised


def rows_of_depth(shape: tuple[int, ...], segment_starts_BT: jax.Array | None, depth: int) -> jax.Array:
    """Return a mask [B, T]: True if a token `depth` ahead exists, with segment starts one of the same document, not padding."""
    if segment_starts_BT is None:
        return jnp.broadcast_to(jnp.arange(shape[1]) < shape[1] - depth, shape)
    return has_ahead(segment_starts_BT, depth)


class MTPDepth(nn.Module):
    """One prediction depth: u = eh_proj([enorm(embedding) ; hnorm(h)]), then a decoder block."""

    config: ModelConfig
    return_intermediates: tuple[str, ...] = ()

    def setup(self) -> None:
        config, D = self.config, self.config.hidden_size
        self.enorm = RMSNorm(config, D)
        self.hnorm = RMSNorm(config, D)
        self.eh_proj = Linear(config, (2 * D, D), ("mtp_in", "embed"))
        self.block = rematerialised(Block, config, scanned=False)(
            config, moe=True, return_intermediates=self.return_intermediates
        )
        self.norm = RMSNorm(config, D)

    def __call__(
        self,
        h_BTD: jax.Array,
        ahead_BTD: jax.Array,
        angles: RopeAngles,
        token_mask_BT: jax.Array,
        segment_starts_BT: jax.Array | None = None,
        cache: Latents | None = None,
        metadata: CacheMetadata | None = None,
    ) -> tuple[jax.Array, jax.Array, BlockOutput]:
        """Run the depth over whole sequences, or over new rows and a cache of the rows before.

        Args:
          h_BTD: h^{k-1}; for the first depth the main model's state after its final norm.
          ahead_BTD: embedding of the token k ahead of each row (arbitrary in the last k rows).
          token_mask_BT: rows that count in load and balance loss, from `rows_of_depth`.
          angles, segment_starts_BT, cache, metadata: as in `MLA`, for the depth's own rows.

        Returns:
          h^k for the next depth, norm(h^k) for the shared head, and the block's other outputs.
        """
        # [embedding ; hidden] as in the checkpoints; eq. 21 has the halves in the other order.
        u_BTD = self.eh_proj(jnp.concatenate([self.enorm(ahead_BTD), self.hnorm(h_BTD)], axis=-1))
        h_BTD, output = self.block(u_BTD, cache, angles, token_mask_BT, metadata, segment_starts_BT)
        return h_BTD, self.norm(h_BTD), output
