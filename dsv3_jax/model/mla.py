"""Multi-head latent attention (section 2.1.1 of the report, eqs. 1-11).

The keys and values of all heads are expanded from one latent c_kv per token (512 values), and all heads share one rotary key
(64 values); decoding caches these 576 values alone. The same parameters are used in two forms, equal in exact arithmetic:
*materialised* expands keys and values per head, which is cheaper over a whole sequence; *absorbed* multiplies W_UK into the
query and W_UV into the output, so that attention stays in the latent space, which is cheaper for few queries over a long cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.attention import attend, causal_attention, choose_attention
from dsv3_jax.kernels.latent_attention import CachedLatents, choose_latent_backend, expanded_attention, latent_attention
from dsv3_jax.kernels.vma import varying_axes, varying_over
from dsv3_jax.model.layers import Linear, RMSNorm
from dsv3_jax.model.rope import RopeAngles, apply_rope
from dsv3_jax.parallel.mesh import BATCH_AXES, current_mesh, current_platform
from dsv3_jax.parallel.sharding import TOKEN_SPEC, Weight, all_gather_weight, shard_map_spec

KV_B_AXES = "latent", "heads", "head_dim"
# Fixed in the published code, independent of rms_norm_eps (which is 1e-6 there too).
LATENT_NORM_EPSILON = 1e-6


class Latents(NamedTuple):
    """Keys and values of tokens in compressed form, as the cache stores them."""

    c_kv: jax.Array  # Normalised latent, [B, S, C].
    k_rope: jax.Array  # Rotated key that all heads share, [B, S, P].


class Queries(NamedTuple):
    """Queries of all heads in two parts: H dims without position, and P dims with it, already rotated."""

    nope_BTNH: jax.Array
    rope_BTNP: jax.Array


class CacheMetadata(NamedTuple):
    """Number of cached tokens of each sequence, and its page table; None if the cache has one contiguous row per sequence."""

    cached_length_B: jax.Array  # Number of cached tokens, int32.
    page_table_BJ: jax.Array | None = None  # Pages (see `CachedLatents`); None if row b of the cache is sequence b.


class AbsorbedWeights(NamedTuple):
    """W_UK and W_UV, the two parts of `kv_b_proj`, as the absorbed form uses them: one matrix per head."""

    w_uk_NHC: Any
    w_uv_NCW: Any

    @classmethod
    def of(cls, kernel_CNX: Weight, config: ModelConfig) -> AbsorbedWeights:
        """Split the kernel [C, N, H + W] of `kv_b_proj`, cast to `config.dtype`, into W_UK [N, H, C] and W_UV [N, C, W]."""
        w_uk_CNH, w_uv_CNW = jnp.split(kernel_CNX.astype(config.dtype), [config.qk_nope_head_dim], axis=-1)
        return cls(w_uk_CNH.transpose(1, 2, 0), w_uv_CNW.transpose(1, 0, 2))


ABSORBED_AXES = AbsorbedWeights(("heads", "head_dim", "latent"), ("heads", "latent", "head_dim"))
"""Logical axes of `AbsorbedWeights`."""


class MLA(nn.Module):
    """Multi-head latent attention: causal, with the keys and values of all heads compressed to one latent per token."""

    config: ModelConfig
    absorbed: bool = False
    """Use the absorbed form over whole sequences too, in the chunked loop. Over a cache, the number of queries decides."""

    def setup(self) -> None:
        c = self.config
        N, H, P, W = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        D, C, Q = c.hidden_size, c.kv_lora_rank, c.q_lora_rank
        if Q is None:
            self.q_proj = Linear(c, (D, N, H + P), ("embed", "heads", "head_dim"))
        else:
            self.q_a_proj = Linear(c, (D, Q), ("embed", "latent_out"))
            self.q_a_layernorm = RMSNorm(c, Q, LATENT_NORM_EPSILON)
            self.q_b_proj = Linear(c, (Q, N, H + P), ("latent", "heads", "head_dim"))
        self.kv_a_proj_with_mqa = Linear(c, (D, C + P), ("embed", "latent_out"))
        self.kv_a_layernorm = RMSNorm(c, C, LATENT_NORM_EPSILON)
        self.kv_b_proj = Linear(c, (C, N, H + W), KV_B_AXES)
        self.o_proj = Linear(c, (N, W, D), ("heads", "head_dim", "embed"), num_in=2)

    def __call__(
        self,
        x_BTD: jax.Array,
        angles: RopeAngles,
        cache: Latents | None = None,
        metadata: CacheMetadata | None = None,
        segment_starts_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, Latents]:
        """Attend from every token of x to itself, to the tokens of x before it, and to the cache.

        Args:
          x_BTD: normalised residual stream.
          angles: RoPE angles of the tokens' positions.
          cache, metadata: latents of the tokens before x, in rows or pages, and their location; None if x starts its sequences.
          segment_starts_BT: start of each token's document, to attend within it (`kernels/documents.py`); not with a cache.

        Returns:
          The attention output [B, T, D], and the latents of x for the cache.
        """
        queries = self._queries(x_BTD, angles)
        latents = self._latents(x_BTD, angles)
        if cache is not None:
            assert metadata is not None
            assert segment_starts_BT is None
            cached = CachedLatents(*cache, metadata.page_table_BJ)
            expand = expanding_pays(self.config, x_BTD.shape[1])
            attend_cached = self._materialised_over_cache if expand else self._absorbed_over_cache
            o_BTNW = attend_cached(queries, latents, cached, metadata.cached_length_B)
        else:
            attend_whole = self._absorbed if self.absorbed else self._materialised
            o_BTNW = attend_whole(queries, latents, segment_starts_BT)
        return self.o_proj(o_BTNW), latents

    def _queries(self, x_BTD: jax.Array, angles: RopeAngles) -> Queries:
        """Return the queries of all heads, their rotary part rotated (eqs. 6-9)."""
        if self.config.q_lora_rank is None:
            q_BTNX = self.q_proj(x_BTD)
        else:
            c_q_BTQ = checkpoint_name(self.q_a_proj(x_BTD), "c_q")
            q_BTNX = self.q_b_proj(self.q_a_layernorm(c_q_BTQ))
        q_nope_BTNH, q_rope_BTNP = jnp.split(q_BTNX, [self.config.qk_nope_head_dim], axis=-1)
        return Queries(q_nope_BTNH, apply_rope(q_rope_BTNP, angles))

    def _latents(self, x_BTD: jax.Array, angles: RopeAngles) -> Latents:
        """Return each token's normalised key-value latent and rotated shared key, as the cache stores them (eqs. 1 and 3)."""
        compressed = checkpoint_name(self.kv_a_proj_with_mqa(x_BTD), "c_kv")
        c_kv_BTC, k_rope_BTP = jnp.split(compressed, [self.config.kv_lora_rank], axis=-1)
        return Latents(self.kv_a_layernorm(c_kv_BTC), apply_rope(k_rope_BTP, angles))

    def _materialised(self, queries: Queries, latents: Latents, segment_starts_BT: jax.Array | None) -> jax.Array:
        c, kernel_CNX = self.config, self.kv_b_proj.kernel
        q_BTNX = jnp.concatenate(queries, axis=-1)
        widths, documents = (c.qk_head_dim, c.v_head_dim), segment_starts_BT is not None
        backend = choose_attention(c.attention_backend, c.dtype, widths, current_platform(), documents)
        attend_expanded = functools.partial(_attend_expanded, config=c, backend=backend)
        if current_mesh() is None:
            return attend_expanded(q_BTNX, latents, kernel_CNX, segment_starts_BT)

        def on_device(
            q_BTNX: jax.Array, latents: Latents, kernel_CNX: Weight, segment_starts_BT: jax.Array | None
        ) -> jax.Array:
            """Attend from this device's queries and heads; the latents, not all heads' keys and values, are gathered."""
            kernel_CNX = all_gather_weight(varying_over(kernel_CNX, varying_axes(q_BTNX)), KV_B_AXES, c.dtype)
            whole = Latents(*(jax.lax.all_gather(part, "context", axis=1, tiled=True) for part in latents))
            first = jax.lax.axis_index("context") * q_BTNX.shape[1]
            return attend_expanded(q_BTNX, whole, kernel_CNX, segment_starts_BT, first=first)

        heads = PartitionSpec(*TOKEN_SPEC, "tensor")
        kernel_CNX, kernel_spec = shard_map_spec(kernel_CNX, KV_B_AXES)
        specs: Any = heads, TOKEN_SPEC, kernel_spec, TOKEN_SPEC
        # Splash does not declare the axes over which its results vary, so the check is off for it. JAX then inserts no sums
        # where a value begins to vary; only gradients of replicated inputs need them, and the region's border sums those.
        region = jax.shard_map(on_device, in_specs=specs, out_specs=heads, check_vma=backend != "splash")
        return region(q_BTNX, latents, kernel_CNX, segment_starts_BT)

    def _absorbed(self, queries: Queries, latents: Latents, segment_starts_BT: jax.Array | None) -> jax.Array:
        scale, chunk = self.config.softmax_scale, self.config.attention_chunk
        q_BTNX = jnp.concatenate([self._into_latent(queries.nope_BTNH), queries.rope_BTNP], axis=-1)
        k_BT1X, v_BT1C = jnp.concatenate(latents, axis=-1)[:, :, None], latents.c_kv[:, :, None]
        mixed_BTNC = causal_attention(q_BTNX, k_BT1X, v_BT1C, scale=scale, chunk=chunk, segment_starts_BT=segment_starts_BT)
        return self._out_of_latent(mixed_BTNC)

    def _absorbed_over_cache(
        self, queries: Queries, new: Latents, cached: CachedLatents, cached_length_B: jax.Array
    ) -> jax.Array:
        c = self.config
        backend = choose_latent_backend(c.cache_backend, c.dtype, (c.kv_lora_rank, c.qk_rope_head_dim), current_platform())
        attend_latents: Any = functools.partial(latent_attention, scale=c.softmax_scale, backend=backend)
        arguments = self._into_latent(queries.nope_BTNH), queries.rope_BTNP, *new, cached, cached_length_B
        if current_mesh() is not None:
            attend_latents = _split_by_sequences_and_heads(attend_latents, cached)
        return self._out_of_latent(attend_latents(*arguments))

    def _materialised_over_cache(
        self, queries: Queries, new: Latents, cached: CachedLatents, cached_length_B: jax.Array
    ) -> jax.Array:
        c, kernel_CNX = self.config, self.kv_b_proj.kernel

        def attend_expanding(kernel_CNX: Weight, *others: Any) -> jax.Array:
            if current_mesh() is not None:
                kernel_CNX = all_gather_weight(kernel_CNX, KV_B_AXES, c.dtype)
            return expanded_attention(kernel_CNX.astype(c.dtype), *others, scale=c.softmax_scale)

        if current_mesh() is not None:
            kernel_CNX, spec = shard_map_spec(kernel_CNX, KV_B_AXES)
            attend_expanding = _split_by_sequences_and_heads(attend_expanding, cached, spec)
        return attend_expanding(kernel_CNX, *queries, *new, cached, cached_length_B)

    def _into_latent(self, q_nope_BTNH: jax.Array) -> jax.Array:
        return jnp.einsum("BTNH,NHC->BTNC", q_nope_BTNH, self._absorbed_weights().w_uk_NHC)

    def _out_of_latent(self, mixed_BTNC: jax.Array) -> jax.Array:
        return jnp.einsum("BTNC,NCW->BTNW", mixed_BTNC, self._absorbed_weights().w_uv_NCW)

    def _absorbed_weights(self) -> AbsorbedWeights:
        if self.has_variable("absorbed", "kv_b_proj"):
            return self.get_variable("absorbed", "kv_b_proj")
        return AbsorbedWeights.of(self.kv_b_proj.kernel, self.config)


def expanding_pays(config: ModelConfig, num_queries: int) -> bool:
    """Return True if expanding all cached keys and values is cheaper than the absorbed form, for this number of queries.

    Per cached token and head, a query costs 2 C - H - W more multiplications if absorbed, and the expansion costs C (H + W).
    """
    C, expanded = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    return num_queries * (2 * C - expanded) > C * expanded


def _attend_expanded(
    q_BTNX: jax.Array,
    latents: Latents,
    kernel_CNX: Weight,
    segment_starts_BT: jax.Array | None,
    first: jax.Array | int = 0,
    *,
    config: ModelConfig,
    backend: str,
) -> jax.Array:
    """Expand the latents [B, S, ...] to keys and values (eqs. 2, 4, 5), and attend from queries at `first` on (eq. 10)."""
    kv_BSNX = jnp.einsum("BSC,CNX->BSNX", latents.c_kv, kernel_CNX.astype(config.dtype))
    k_nope_BSNH, v_BSNW = jnp.split(kv_BSNX, [config.qk_nope_head_dim], axis=-1)
    k_rope_BSNP = jnp.broadcast_to(latents.k_rope[:, :, None], (*k_nope_BSNH.shape[:3], config.qk_rope_head_dim))
    k_BSNX = jnp.concatenate([k_nope_BSNH, k_rope_BSNP], axis=-1)
    scale, chunk = config.softmax_scale, config.attention_chunk
    return attend(
        q_BTNX, k_BSNX, v_BSNW, scale=scale, chunk=chunk, first=first, segment_starts_BT=segment_starts_BT, backend=backend
    )


def _split_by_sequences_and_heads(attend_cached: Callable[..., jax.Array], cached: CachedLatents, *before: Any) -> Any:
    """Return `attend_cached` in a `shard_map` over the mesh: each device has its own sequences, their pages and heads."""
    sequences, heads = PartitionSpec(BATCH_AXES), PartitionSpec(*TOKEN_SPEC, "tensor")
    specs: Any = *before, heads, heads, TOKEN_SPEC, TOKEN_SPEC, jax.tree.map(lambda _: sequences, cached), sequences
    # No check: the kernels do not declare the axes over which their results vary.
    return jax.shard_map(attend_cached, in_specs=specs, out_specs=heads, check_vma=False)


def with_absorbed_weights(variables: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return an unrolled model's variables plus a collection `absorbed` with every `kv_b_proj` split into `AbsorbedWeights`.

    It is in the computation dtype even if `kv_b_proj` is in 8 bits: every step uses all of it, 1/300 of the published model.
    """
    return variables | {"absorbed": absorbed(variables["params"], lambda kernel: AbsorbedWeights.of(kernel, config))}


def absorbed(params: dict[str, Any], split: Callable[[Any], AbsorbedWeights]) -> dict[str, Any]:
    """Return the collection `absorbed`: `split` of the `kv_b_proj` kernel (or of its logical axes) of each layer."""

    def of_layer(layer: dict[str, Any]) -> dict[str, Any]:
        if "block" in layer:  # An MTP depth.
            return {"block": of_layer(layer["block"])}
        return {"self_attn": {"kv_b_proj": split(layer["self_attn"]["kv_b_proj"]["kernel"])}}

    return {name: of_layer(layer) for name, layer in params.items() if "self_attn" in layer or "block" in layer}
