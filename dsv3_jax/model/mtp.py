"""Multi-token prediction (section 2.2 of the report): depth k predicts the token k + 1 ahead.

Each depth joins the state of the depth before with the embedding of the token k ahead and runs one MoE block over
it. It owns neither embedding nor head: those are the main model's, handed in, so their gradients add.
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
    """Which rows of a depth have a token to join, `depth` further on: bool [B, T].

    Not the last ones; where documents are kept apart (`kernels/documents.py`), not the last ones of each, and no padding.
    """
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
        """One depth over a whole sequence, or over some rows and a cache of those before.

        Args:
          h_BTD: h^{k-1}; for the first depth the main model's state after its final norm.
          ahead_BTD: embedding of the token k ahead of each row (arbitrary in the last k rows).
          rotation: rotation of the rows' positions.
          token_mask_BT: False for the rows that have no token k ahead (`rows_of_depth`).
          segment_starts_BT: where the document of each row begins, to attend within it; None attends across documents.
          cache, places: the depth's latents of earlier rows, if there are any, and where each sequence's are.

        Returns:
          h^k for the next depth, norm(h^k) for the shared head, and what the block has to say.
        """
        # [embedding ; hidden], as in the checkpoints; eq. 21 prints the halves the other way round.
        u_BTD = self.eh_proj(jnp.concatenate([self.enorm(ahead_BTD), self.hnorm(h_BTD)], axis=-1))
        h_BTD, output = self.block(u_BTD, cache, angles, token_mask_BT, metadata, segment_starts_BT)
        return h_BTD, self.norm(h_BTD), output
