"""The four basic layers: RMSNorm, Linear, Embedding and the SwiGLU feed-forward.

No layer has a bias. Parameters carry logical axes, by which the sharding rules split them. Products run in `config.dtype`,
norms in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv3_jax.config import ModelConfig
from dsv3_jax.parallel.mesh import BATCH_AXES, current_mesh
from dsv3_jax.parallel.sharding import TOKEN_SPEC, current_rules, project

EMBEDDING_AXES = "vocab", "embed"


def normal_init(config: ModelConfig, axes: tuple[str, ...]) -> nn.initializers.Initializer:
    """Return a normal initializer with standard deviation `initializer_range` and these logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(config.initializer_range), axes)


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + epsilon) over the last axis; computed in float32, returned in `config.dtype`."""

    config: ModelConfig
    size: int
    epsilon: float | None = None  # None for `rms_norm_eps`.

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (self.size,), self.config.param_dtype)
        epsilon = self.config.rms_norm_eps if self.epsilon is None else self.epsilon
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
        return (x32 * scale.astype(jnp.float32)).astype(self.config.dtype)


class Linear(nn.Module):
    """Contraction of the last `num_in` axes of x with the first `num_in` axes of a kernel of shape `shape`."""

    config: ModelConfig
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    num_in: int = 1

    def setup(self) -> None:
        init = normal_init(self.config, self.axes)
        self.kernel = self.param("kernel", init, self.shape, self.config.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return project(x.astype(self.config.dtype), self.kernel, self.axes, num_in=self.num_in)


class Embedding(nn.Module):
    """Lookup of token ids [B, T] in a [V, D] table: [B, T, D] in `config.dtype`; NaN for an id outside the table."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        config = self.config
        shape = config.vocab_size, config.hidden_size
        embedding_VD = self.param("embedding", normal_init(config, EMBEDDING_AXES), shape, config.param_dtype)
        if current_mesh() is not None:
            return _look_up_on_mesh(embedding_VD, tokens_BT, config)
        # Plain indexing would clamp or wrap an id outside the table, and inside jit no error can be raised.
        table_VD = jnp.asarray(embedding_VD)
        rows_BTD = table_VD.at[tokens_BT].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        # Cast after the lookup, so that the gradients of a token's occurrences are summed in the table's dtype.
        return rows_BTD.astype(config.dtype)


def _look_up_on_mesh(embedding_VD: jax.Array, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Look up ids [B, T] in a table split over the mesh: ids are gathered and rows exchanged, the table stays; NaN outside."""
    rules = current_rules()
    batch_axes = tuple(axis for axis in rules.embed if axis in BATCH_AXES)

    def on_device(embedding_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        tokens_BT = jax.lax.all_gather(tokens_BT, batch_axes, axis=0, tiled=True)
        tokens_BT = jax.lax.all_gather(tokens_BT, "context", axis=1, tiled=True)
        row_BT = tokens_BT - jax.lax.axis_index("tensor") * embedding_VD.shape[0]
        mine_BTD = embedding_VD.at[row_BT].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        rows_BTD = jax.lax.psum(mine_BTD.astype(config.dtype), "tensor")
        # Columns are split with `context` innermost.
        rows_BTD = jax.lax.all_to_all(rows_BTD, "context", 1, 2, tiled=True)
        return jax.lax.all_to_all(rows_BTD, batch_axes, 0, 2, tiled=True)

    region = jax.shard_map(on_device, in_specs=(rules.spec(EMBEDDING_AXES), TOKEN_SPEC), out_specs=TOKEN_SPEC)
    known_BT = (tokens_BT >= 0) & (tokens_BT < config.vocab_size)
    return jnp.where(known_BT[..., None], region(embedding_VD, tokens_BT), jnp.nan)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), with `size` hidden units."""

    config: ModelConfig
    size: int

    def setup(self) -> None:
        config, width = self.config, self.config.hidden_size
        self.gate_proj = Linear(config, (width, self.size), ("embed", "mlp"))
        self.up_proj = Linear(config, (width, self.size), ("embed", "mlp"))
        self.down_proj = Linear(config, (self.size, width), ("mlp", "embed"))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down_proj(nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
