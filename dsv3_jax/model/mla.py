"""Multi-head latent attention (section 2.1.1 of the report, eqs. 1-11).

Keys and values of all heads are expanded from one latent c_kv of 512 values a token, beside one rotary key of 64
that all heads share: those 576 values are all that decoding caches. The same parameters serve two forms, equal in
exact arithmetic: *materialised* expands keys and values per head (cheaper over a whole sequence), *absorbed* takes
the query into the latent space instead (cheaper for a few queries over a long cache).
"""

from __future__ import annotations

import functools
import typing
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
# The reference fixes it, whatever rms_norm_eps says (model of the published code; both are 1e-6 there).
LATENT_NORM_EPSILON = 1e-6


class Latents(NamedTuple):
    """What attention needs of past tokens: the normalised c_kv [B, S, C] and the rotated shared key k_r [B, S, P]."""

    c_kv: jax.Array
    k_rope: jax.Array


class CacheMetadata(NamedTuple):
    """Where in a cache the latents of each sequence are."""

    cached_length_B: jax.Array
    """Its tokens so far, int32."""
    page_table_BJ: jax.Array | None = None
    """The pages that hold them (`CachedLatents`); None if row b of the cache is sequence b."""


class AbsorbedWeights(NamedTuple):
    """The two parts of W_kvb as the absorbed form multiplies with them: one matrix a head."""

    w_uk_NHC: jax.Array
    w_uv_NCW: jax.Array

    @classmethod
    def of(cls, kernel_CNX: Weight, config: ModelConfig) -> AbsorbedWeights:
        """Splits the kernel of `kv_b_proj`, in the computation dtype."""
        w_uk_CNH, w_uv_CNW = jnp.split(kernel_CNX.astype(config.dtype), [config.qk_nope_head_dim], axis=-1)
        return cls(w_uk_CNH.transpose(1, 2, 0), w_uv_CNW.transpose(1, 0, 2))


ABSORBED_AXES = AbsorbedWeights(*typing.cast(Any, (("heads", "head_dim", "latent"), ("heads", "latent", "head_dim"))))
"""Their logical axes."""


class MLA(nn.Module):
    """Causal self-attention through a key-value latent."""

    config: ModelConfig
    absorbed: bool = False
    """Use the absorbed form over a whole sequence too, in the chunked loop (with a cache it is always used)."""

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
        """Attends from every token of x to itself, to those before it, and to the cache.

        Args:
          x_BTD: the normalised residual stream.
          rotation: cos and sin of the tokens' positions.
          cache: latents of the tokens before x, a row for each sequence or pages; None if x starts its sequences.
          places: where in it each sequence's are.
          segment_starts_BT: start of the document of each token, to attend within it (`kernels/documents.py`); not with a
            cache.

        Returns:
          The attention output [B, T, D], and the latents of x for the cache.
        """
        q_nope_BTNH, q_rope_BTNP = self._queries(x_BTD, angles)
        latents = self._latents(x_BTD, angles)
        if cache is not None:
            assert metadata is not None
            assert segment_starts_BT is None
            cached = CachedLatents(*cache, metadata.page_table_BJ)
            attend_over = self._expanded if expanding_pays(self.config, x_BTD.shape[1]) else self._cached
            o_BTNW = attend_over(q_nope_BTNH, q_rope_BTNP, latents, cached, metadata.cached_length_B)
        elif self.absorbed:
            o_BTNW = self._absorbed(q_nope_BTNH, q_rope_BTNP, latents, segment_starts_BT)
        else:
            o_BTNW = self._materialised(q_nope_BTNH, q_rope_BTNP, latents, segment_starts_BT)
        return self.o_proj(o_BTNW), latents

    def _queries(self, x_BTD: jax.Array, angles: RopeAngles) -> tuple[jax.Array, jax.Array]:
        if self.config.q_lora_rank is None:
            q_BTNX = self.q_proj(x_BTD)
        else:
            c_q_BTQ = checkpoint_name(self.q_a_proj(x_BTD), "c_q")
            q_BTNX = self.q_b_proj(self.q_a_layernorm(c_q_BTQ))
        q_nope_BTNH, q_rope_BTNP = jnp.split(q_BTNX, [self.config.qk_nope_head_dim], axis=-1)
        return q_nope_BTNH, apply_rope(q_rope_BTNP, angles)

    def _latents(self, x_BTD: jax.Array, angles: RopeAngles) -> Latents:
        compressed = checkpoint_name(self.kv_a_proj_with_mqa(x_BTD), "c_kv")
        c_kv_BTC, k_rope_BTP = jnp.split(compressed, [self.config.kv_lora_rank], axis=-1)
        return Latents(self.kv_a_layernorm(c_kv_BTC), apply_rope(k_rope_BTP, angles))

    def _materialised(
        self, q_nope_BTNH: jax.Array, q_rope_BTNP: jax.Array, latents: Latents, segment_starts_BT: jax.Array | None
    ) -> jax.Array:
        q_BTNX = jnp.concatenate([q_nope_BTNH, q_rope_BTNP], axis=-1)
        kernel_CNX = self.kv_b_proj.kernel
        if current_mesh() is None:
            return _attend_expanded(q_BTNX, latents, kernel_CNX, segment_starts_BT, self.config)
        return _attend_on_mesh(q_BTNX, latents, kernel_CNX, segment_starts_BT, self.config)

    def _absorbed(
        self, q_nope_BTNH: jax.Array, q_rope_BTNP: jax.Array, latents: Latents, segment_starts_BT: jax.Array | None
    ) -> jax.Array:
        q_BTNX = jnp.concatenate([self._into_latent(q_nope_BTNH), q_rope_BTNP], axis=-1)
        k_BTX = jnp.concatenate(latents, axis=-1)
        mixed_BTNC = causal_attention(
            q_BTNX,
            k_BTX[:, :, None],
            latents.c_kv[:, :, None],
            scale=self.config.softmax_scale,
            chunk=self.config.attention_chunk,
            segment_starts_BT=segment_starts_BT,
        )
        return self._out_of_latent(mixed_BTNC)

    def _cached(
        self, q_nope_BTNH: jax.Array, q_rope_BTNP: jax.Array, new: Latents, cached: CachedLatents, cached_length_B: jax.Array
    ) -> jax.Array:
        attend_over: Any = functools.partial(
            latent_attention, scale=self.config.softmax_scale, backend=_cache_backend(self.config)
        )
        arguments = self._into_latent(q_nope_BTNH), q_rope_BTNP, *new, cached, cached_length_B
        if current_mesh() is not None:
            attend_over = _by_sequences_and_heads(attend_over, cached)
        return self._out_of_latent(attend_over(*arguments))

    def _expanded(
        self, q_nope_BTNH: jax.Array, q_rope_BTNP: jax.Array, new: Latents, cached: CachedLatents, cached_length_B: jax.Array
    ) -> jax.Array:
        config, kernel_CNX = self.config, self.kv_b_proj.kernel

        def attend_over(kernel_CNX: Weight, *others: Any) -> jax.Array:
            if current_mesh() is not None:
                kernel_CNX = all_gather_weight(kernel_CNX, KV_B_AXES, config.dtype)
            return expanded_attention(kernel_CNX.astype(config.dtype), *others, scale=config.softmax_scale)

        if current_mesh() is not None:
            kernel_CNX, spec = shard_map_spec(kernel_CNX, KV_B_AXES)
            attend_over = _by_sequences_and_heads(attend_over, cached, spec)
        return attend_over(kernel_CNX, q_nope_BTNH, q_rope_BTNP, *new, cached, cached_length_B)

    def _into_latent(self, q_nope_BTNH: jax.Array) -> jax.Array:
        return jnp.einsum("BTNH,NHC->BTNC", q_nope_BTNH, self._absorbed_weights().w_uk_NHC)

    def _out_of_latent(self, mixed_BTNC: jax.Array) -> jax.Array:
        return jnp.einsum("BTNC,NCW->BTNW", mixed_BTNC, self._absorbed_weights().w_uv_NCW)

    def _absorbed_weights(self) -> AbsorbedWeights:
        if self.has_variable("absorbed", "kv_b_proj"):
            return self.get_variable("absorbed", "kv_b_proj")
        return AbsorbedWeights.of(self.kv_b_proj.kernel, self.config)


def expanding_pays(config: ModelConfig, num_queries: int) -> bool:
    """Whether so many queries are served faster by expanding every cached key and value than by going into the latent space.

    A query pays 2 C - H - W more products for every key and head there; a key and head costs C (H + W) to expand.
    """
    C, expanded = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    return num_queries * (2 * C - expanded) > C * expanded


def _by_sequences_and_heads(attend_over: Callable[..., jax.Array], cached: CachedLatents, *before: Any) -> Any:
    """Attention over a cache on the current mesh: a device has its own sequences, the pages of these, and its own heads."""
    mine, heads = PartitionSpec(BATCH_AXES), PartitionSpec(*TOKEN_SPEC, "tensor")
    pages = jax.tree.map(lambda _: mine, cached)
    specs: Any = *before, heads, heads, TOKEN_SPEC, TOKEN_SPEC, pages, mine
    # A kernel says nothing of the axes that its results vary over.
    return jax.shard_map(attend_over, in_specs=specs, out_specs=heads, check_vma=False)


def _attend_expanded(
    q_BTNX: jax.Array,
    latents: Latents,
    kernel_CNX: Weight,
    segment_starts_BT: jax.Array | None,
    config: ModelConfig,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Keys and values of every head expanded from the latents [B, S, ...], and attended to by queries from `first` on."""
    kv_BSNX = jnp.einsum("BSC,CNX->BSNX", latents.c_kv, kernel_CNX.astype(config.dtype))
    k_nope_BSNH, v_BSNW = jnp.split(kv_BSNX, [config.qk_nope_head_dim], axis=-1)
    k_rope_BSNP = jnp.broadcast_to(latents.k_rope[:, :, None], (*k_nope_BSNH.shape[:3], config.qk_rope_head_dim))
    k_BSNX = jnp.concatenate([k_nope_BSNH, k_rope_BSNP], axis=-1)
    scale, chunk = config.softmax_scale, config.attention_chunk
    backend = _attention_backend(config, segment_starts_BT is not None)
    return attend(
        q_BTNX, k_BSNX, v_BSNW, scale=scale, chunk=chunk, first=first, segment_starts_BT=segment_starts_BT, backend=backend
    )


def _attention_backend(config: ModelConfig, documents: bool) -> str:
    widths = config.qk_head_dim, config.v_head_dim
    return choose_attention(config.attention_backend, config.dtype, widths, current_platform(), documents)


def _cache_backend(config: ModelConfig) -> str:
    widths = config.kv_lora_rank, config.qk_rope_head_dim
    return choose_latent_backend(config.cache_backend, config.dtype, widths, current_platform())


def _attend_on_mesh(
    q_BTNX: jax.Array, latents: Latents, kernel_CNX: Weight, segment_starts_BT: jax.Array | None, config: ModelConfig
) -> jax.Array:
    """The same on the current mesh: a device has its own queries and heads, and gathers the latents of the whole sequence.

    It is the latents that travel along `context`, 576 values a token, and not the keys and values of all heads.
    """

    def on_device(
        q_BTNX: jax.Array, latents: tuple[jax.Array, jax.Array], kernel_CNX: Weight, segment_starts_BT: jax.Array | None
    ) -> jax.Array:
        whole = all_gather_weight(varying_over(kernel_CNX, varying_axes(q_BTNX)), KV_B_AXES, config.dtype)
        everyone = Latents(*(jax.lax.all_gather(part, "context", axis=1, tiled=True) for part in latents))
        first = jax.lax.axis_index("context") * q_BTNX.shape[1]
        return _attend_expanded(q_BTNX, everyone, whole, segment_starts_BT, config, first)

    heads = PartitionSpec(*TOKEN_SPEC, "tensor")
    kernel_CNX, kernel_spec = shard_map_spec(kernel_CNX, KV_B_AXES)
    specs: Any = heads, (TOKEN_SPEC, TOKEN_SPEC), kernel_spec, TOKEN_SPEC
    backend = _attention_backend(config, segment_starts_BT is not None)
    # Splash says nothing of the axes its results vary over, so there the check is off, and with it the sums that JAX would
    # put where a value begins to vary; those of replicated inputs' gradients, which are all there are, the border has anyway.
    region = jax.shard_map(on_device, in_specs=specs, out_specs=heads, check_vma=backend != "splash")
    return region(q_BTNX, (latents.c_kv, latents.k_rope), kernel_CNX, segment_starts_BT)


def with_absorbed_weights(variables: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The variables of an unrolled model with a collection `absorbed`, so that decoding need not split W_kvb each step.

    These are in the computation dtype even if W_kvb is in 8 bits: every step multiplies with all of them, and they are a
    three-hundredth of the published model.
    """

    return variables | {"absorbed": absorbed(variables["params"], lambda kernel: AbsorbedWeights.of(kernel, config))}


def absorbed(params: dict[str, Any], split: Callable[[Any], AbsorbedWeights]) -> dict[str, Any]:
    """That collection: what `split` makes of the kernel of `kv_b_proj` (or of what stands for it) in each layer of `params`."""

    def of_layer(layer: dict[str, Any]) -> dict[str, Any]:
        if "block" in layer:  # Of an MTP depth.
            return {"block": of_layer(layer["block"])}
        return {"self_attn": {"kv_b_proj": split(layer["self_attn"]["kv_b_proj"]["kernel"])}}

    return {name: of_layer(layer) for name, layer in params.items() if "self_attn" in layer or "block" in layer}
