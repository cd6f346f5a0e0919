"""DeepSeek-V3 (arXiv 2412.19437): embedding, a dense and an MoE stack, final norm, head, and the MTP depths.

`__call__` runs the model over whole sequences, `forward_cached` over new tokens and a cache of latents. `features` ends before
the head, for training and prefill, which never materialise logits [B, T, V].
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import Embedding, Linear, RMSNorm
from dsv3_jax.model.mla import CacheMetadata, Latents
from dsv3_jax.model.mtp import MTPDepth, rows_of_depth
from dsv3_jax.model.rope import RopeAngles, rope_angles
from dsv3_jax.model.transformer import BlockOutput, run_stacks
from dsv3_jax.parallel.mesh import without_mesh
from dsv3_jax.parallel.sharding import place_tokens, project

HEAD_AXES = "embed", "vocab"


@struct.dataclass
class ModelOutput:
    """Logits of the main model and MTP depths, expert loads and balance loss; on request hidden states and routes."""

    logits: jax.Array  # [B, T, V] float32; row t predicts token t + 1.
    mtp_logits: list[jax.Array]
    """With `mtp`: depth k at index k - 1, [B, max(T - k, 0), V] float32; row i predicts token i + k + 1."""
    load: dict[str, jax.Array]
    """Tokens per expert: "moe_layers" [L, E], and "mtp_0", ... [E] for the MTP depths that ran; float32."""
    balance_loss: jax.Array  # Sequence-wise balance loss summed over those layers, without alpha.
    hidden_states: jax.Array | None = None
    """With `hidden_states`: [L + 1, B, T, D], the embedding, then each block's output, the last one after the final norm."""
    routes: jax.Array | None = None  # With `hidden_states`: [L_moe, B, T, K] int32, each token's experts, best first.


class Features(NamedTuple):
    """Normalised states, ready for the head, of the main model and of MTP depths; embeddings, and outputs of the blocks."""

    h_BTD: jax.Array  # After the final norm.
    mtp_h_BTD: list[jax.Array]  # Of each depth k after its norm; the last k rows, or of each document, are meaningless.
    embedded_BTD: jax.Array
    outputs: dict[str, BlockOutput]  # By layer or stack, bottom first, then by MTP depth.

    @property
    def load(self) -> dict[str, jax.Array]:
        return {name: output.load_E for name, output in self.outputs.items() if output.load_E is not None}

    @property
    def rounds(self) -> jax.Array:
        """Largest number of exchange rounds of any layer, int32; 1 without MoE layers."""
        rounds = [jnp.max(output.rounds) for output in self.outputs.values() if output.rounds is not None]
        return functools.reduce(jnp.maximum, rounds, jnp.int32(1))

    @property
    def balance_loss(self) -> jax.Array:
        losses = [jnp.sum(o.balance_loss) for o in self.outputs.values() if o.balance_loss is not None]
        return sum(losses, jnp.float32(0))


class DeepSeekV3(nn.Module):
    """The whole model; its variables are `params` and `router` (see `init_variables`)."""

    config: ModelConfig
    absorbed: bool = False
    """Use absorbed attention over whole sequences too, for comparison (see `MLA`)."""
    unrolled: bool = False
    """Run block by block over the variables that `unstack` returns, for decoding."""

    def setup(self) -> None:
        config = self.config
        self.embed = Embedding(config)
        self.norm = RMSNorm(config, config.hidden_size)
        self.lm_head = Linear(config, (config.hidden_size, config.vocab_size), HEAD_AXES)
        return_intermediates = ("latents",) if self.unrolled else ()
        self.mtp = [MTPDepth(config, return_intermediates) for _ in range(config.num_nextn_predict_layers)]

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        mtp: bool = False,
        hidden_states: bool = False,
        segment_starts_BT: jax.Array | None = None,
    ) -> ModelOutput:
        """Run the model over whole sequences.

        Args:
          tokens_BT: token ids.
          mtp: also run the MTP depths.
          hidden_states: also return every hidden state and route.
          segment_starts_BT: start of each token's document, -1 for padding, int32. Attention then stays within documents, and
            padding counts in no load and no loss. None lets attention cross documents.

        Raises:
          ValueError: as `check_tokens` and `check_starts`. Inside jit an id outside the vocabulary gives NaN.
        """
        extras = ("hidden", "routes") if hidden_states else ()
        features = self.features(tokens_BT, mtp=mtp, return_intermediates=extras, segment_starts_BT=segment_starts_BT)
        T = tokens_BT.shape[1]
        inspected = _hidden_states_and_routes(features) if hidden_states else (None, None)
        return ModelOutput(
            self.head(features.h_BTD),
            [self.head(h_BTD[:, : max(T - k, 0)]) for k, h_BTD in enumerate(features.mtp_h_BTD, 1)],
            features.load,
            features.balance_loss,
            *inspected,
        )

    def features(
        self,
        tokens_BT: jax.Array,
        *,
        mtp: bool = False,
        return_intermediates: tuple[str, ...] = (),
        segment_starts_BT: jax.Array | None = None,
    ) -> Features:
        """Run all but the head over whole sequences, as `__call__`; `return_intermediates`: "latents", "hidden", "routes"."""
        check_tokens(tokens_BT, self.config)
        if segment_starts_BT is not None:
            check_starts(segment_starts_BT, tokens_BT)
        angles = rope_angles(self.config, jnp.arange(tokens_BT.shape[1])[None])
        embedded_BTD = self.embed(tokens_BT)
        h_BTD, outputs = self._stacks(embedded_BTD, None, angles, None, return_intermediates, segment_starts_BT)
        h_BTD = self.norm(h_BTD)

        mtp_h_BTD, state_BTD = [], h_BTD
        for k, depth in enumerate(self.mtp if mtp else (), 1):
            ahead_BTD = place_tokens(jnp.roll(embedded_BTD, -k, axis=1))
            token_mask_BT = rows_of_depth(tokens_BT.shape, segment_starts_BT, k)
            state_BTD, normed_BTD, output = depth(state_BTD, ahead_BTD, angles, token_mask_BT, segment_starts_BT)
            outputs[f"mtp_{k - 1}"] = output
            mtp_h_BTD.append(normed_BTD)
        return Features(h_BTD, mtp_h_BTD, embedded_BTD, outputs)

    def head(self, h_BTD: jax.Array) -> jax.Array:
        """Return the logits [B, T, V], float32, of normalised states [B, T, D]."""
        kernel_DV, h_BTD = self.lm_head.kernel, h_BTD.astype(self.config.dtype)
        return project(h_BTD, kernel_DV, HEAD_AXES, preferred_element_type=jnp.float32)

    def decode(
        self, tokens_BT: jax.Array, cache: dict[str, Latents], cached_length_B: jax.Array
    ) -> tuple[jax.Array, dict[str, Latents]]:
        """Run `forward_cached` over a cache with one row per sequence; return logits [B, T, V] and the new tokens' latents."""
        h_BTD, latents = self.forward_cached(tokens_BT, cache, CacheMetadata(cached_length_B))
        return self.head(h_BTD), latents

    def forward_cached(
        self, tokens_BT: jax.Array, cache: dict[str, Latents] | None, metadata: CacheMetadata
    ) -> tuple[jax.Array, dict[str, Latents]]:
        """Run the model over T new tokens of each sequence, given the latents of earlier ones.

        Args:
          tokens_BT: the new tokens, at positions cached_length_B, cached_length_B + 1, ...
          cache: latents of earlier tokens by layer or stack: rows [(L,) B, S, ...], pages [(L,) Y, Z, ...], or None.
          metadata: location of each sequence in the cache.

        Returns:
          The states after the final norm [B, T, D], and the new tokens' latents [(L,) B, T, ...] for the caller to store.
        """
        angles = self._angles_after(metadata, tokens_BT)
        h_BTD, outputs = self._stacks(self.embed(tokens_BT), cache, angles, metadata, ("latents",))
        return self.norm(h_BTD), {name: output.latents for name, output in outputs.items()}

    def draft(
        self, h_BTD: jax.Array, ahead_BT: jax.Array, cache: Latents | None, metadata: CacheMetadata
    ) -> tuple[jax.Array, Latents]:
        """Run the first MTP depth over T new rows of each sequence, given the depth's latents of earlier rows.

        The report (section 2.2) has one depth for each token ahead; here one depth is applied repeatedly. Needs `unrolled`.

        Args:
          h_BTD: states at positions cached_length_B, ...: after the final norm, or those returned for the row before.
          ahead_BT: the token after each of these positions.
          cache, metadata: latents of the depth's earlier rows or None, and their location.

        Returns:
          The states [B, T, D], from which `head` predicts the token after `ahead_BT`, and the latents [B, T, ...].
        """
        angles = self._angles_after(metadata, ahead_BT)
        _, normed_BTD, output = self.mtp[0](
            h_BTD, self.embed(ahead_BT), angles, jnp.ones(ahead_BT.shape, bool), cache=cache, metadata=metadata
        )
        assert output.latents is not None, "drafting is for the unrolled model"
        return normed_BTD, output.latents

    def _angles_after(self, metadata: CacheMetadata, tokens_BT: jax.Array) -> RopeAngles:
        return rope_angles(self.config, metadata.cached_length_B[:, None] + jnp.arange(tokens_BT.shape[1]))

    @nn.compact
    def _stacks(self, h_BTD, cache, angles, metadata, extras, segment_starts_BT=None):  # type: ignore[no-untyped-def]
        token_mask_BT = None if segment_starts_BT is None else segment_starts_BT >= 0
        shared = angles, token_mask_BT, metadata, segment_starts_BT
        options = {"return_intermediates": extras, "absorbed": self.absorbed}
        return run_stacks(self.config, h_BTD, cache, *shared, unrolled=self.unrolled, **options)


def check_tokens(tokens_BT: Any, config: ModelConfig) -> None:
    """Raise ValueError for a wrong shape, for too long a sequence, and, outside jit, for an id outside the vocabulary."""
    if tokens_BT.ndim != 2:
        raise ValueError(f"tokens have shape {tokens_BT.shape}; the model takes [batch, length]")
    length, longest = tokens_BT.shape[1], config.max_position_embeddings
    if length > longest:
        raise ValueError(f"{length} tokens exceed max_position_embeddings ({longest}); shorten the sequence")
    if not isinstance(tokens_BT, jax.core.Tracer):
        ids = np.asarray(tokens_BT)
        bad = ids[(ids < 0) | (ids >= config.vocab_size)]
        if bad.size:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary of {config.vocab_size}; use the model's tokenizer")


def check_starts(segment_starts_BT: Any, tokens_BT: Any) -> None:
    """Raise ValueError for a wrong shape or dtype and, outside jit, a start other than -1, its position or the start before."""
    if segment_starts_BT.shape != tokens_BT.shape or not jnp.issubdtype(segment_starts_BT.dtype, jnp.integer):
        raise ValueError(
            f"starts of documents are {segment_starts_BT.dtype} {segment_starts_BT.shape}; "
            f"give one integer for each token, {tokens_BT.shape}"
        )
    if isinstance(segment_starts_BT, jax.core.Tracer):
        return
    starts = np.asarray(segment_starts_BT)
    before = np.pad(starts, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    # A token is padding, begins a document, or continues the document of the token before.
    wrong = np.argwhere((starts != -1) & (starts != np.arange(starts.shape[1])) & (starts != before))
    if wrong.size:
        row, position = wrong[0]
        raise ValueError(
            f"row {row} has start {starts[row, position]} at position {position}, after {before[row, position]}; give each "
            "token the position of the first one of its document, and padding -1"
        )


def _hidden_states_and_routes(features: Features) -> tuple[jax.Array, jax.Array | None]:
    """Return (main model's embedding and block outputs [L + 1, B, T, D], last one normed; routes [L_moe, B, T, K] or None)."""
    outputs = [output for name, output in features.outputs.items() if not name.startswith("mtp_")]

    def by_layer(arrays: list[jax.Array | None]) -> list[jax.Array]:
        return [array if array.ndim == 4 else array[None] for array in arrays if array is not None]

    blocks_LBTD = jnp.concatenate(by_layer([output.hidden_BTD for output in outputs]))
    routes = by_layer([output.chosen_BTK for output in outputs])
    hidden_LBTD = jnp.concatenate([features.embedded_BTD[None], blocks_LBTD[:-1], features.h_BTD[None]])
    return hidden_LBTD, jnp.concatenate(routes) if routes else None


def init_variables(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Return fresh variables, nested dicts: `params` (normal with `initializer_range`, norms one) and `router` (biases zero).

    A parameter's random key depends on its path alone, so the main model is the same with and without MTP depths.
    """
    return nn.meta.unbox(_init_boxed(config, key))


def abstract_variables(config: ModelConfig) -> dict[str, Any]:
    """Return the tree of `init_variables` with `jax.ShapeDtypeStruct`s as leaves."""
    return nn.meta.unbox(_abstract_boxed(config))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """Return the tree of `init_variables` with tuples of logical axis names as leaves."""
    boxed = _abstract_boxed(config)
    return jax.tree.map(lambda leaf: leaf.names, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


@functools.lru_cache(maxsize=64)  # Tracing the whole model takes a second or more.
def _abstract_boxed(config: ModelConfig) -> dict[str, Any]:
    return jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))


def _init_boxed(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    tokens_BT = jnp.zeros((1, config.num_nextn_predict_layers + 1), jnp.int32)
    # Only the shapes of this pass are used, possibly on another platform than the run's, whose kernels may not exist here.
    config = dataclasses.replace(config, attention_backend="chunked", expert_backend="tiles")
    with without_mesh():  # The single row would not divide over a mesh.
        variables = DeepSeekV3(config).init(key, tokens_BT, mtp=True)
    return {"params": variables["params"], "router": variables.get("router", {})}
