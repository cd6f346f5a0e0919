"""DeepSeek-V3 (arXiv 2412.19437): embedding, a dense and an MoE stack, final norm, head, and the MTP depths.

`__call__` is the model over whole sequences, `forward_cached` the model over new tokens and a latent cache, `features` what
both training and prefill start from: the states before the head, so that [B, T, V] logits need never exist.
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
from dsv3_jax.model.transformer import BlockOutput, run_scanned, run_unrolled, stack_sizes
from dsv3_jax.parallel.mesh import without_mesh
from dsv3_jax.parallel.sharding import place_tokens, project

HEAD_AXES = "embed", "vocab"


@struct.dataclass
class ModelOutput:
    """What the model returns for a batch of sequences."""

    logits: jax.Array
    """[B, T, V] float32; row t predicts token t + 1."""
    mtp_logits: list[jax.Array]
    """If asked for: depth k at index k - 1, [B, max(T - k, 0), V] float32; row i predicts token i + k + 1."""
    load: dict[str, jax.Array]
    """Tokens per expert: "moe_layers" [L, E], and "mtp_0", ... [E] for the MTP depths that ran; float32."""
    balance_loss: jax.Array
    """Sequence-wise balance loss summed over those layers, alpha not included."""
    hidden_states: jax.Array | None = None
    """If asked for: [L + 1, B, T, D], the embedding, then each block's output, the last one after the final norm."""
    routes: jax.Array | None = None
    """If asked for: [L_moe, B, T, K] int32, the experts of each token, best first."""


class Features(NamedTuple):
    """The states that the head turns into logits, and what the blocks had to say."""

    h_BTD: jax.Array
    """After the final norm."""
    mtp_h_BTD: list[jax.Array]
    """Of each MTP depth, after its own norm; the last k rows of depth k, or of each document, mean nothing."""
    embedded_BTD: jax.Array
    outputs: dict[str, BlockOutput]
    """By layer or stack name, bottom first, the MTP depths at the end."""

    @property
    def load(self) -> dict[str, jax.Array]:
        return {name: output.load_E for name, output in self.outputs.items() if output.load_E is not None}

    @property
    def rounds(self) -> jax.Array:
        """Most rounds of exchange that any layer took, int32."""
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
    """Attention over whole sequences in the absorbed form, to compare with; with a cache it always is."""
    unrolled: bool = False
    """Blocks one by one over the variables that `unstack` lays out, for decoding."""

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
        """The model over whole sequences.

        Args:
          tokens_BT: token ids.
          mtp: also run the MTP depths.
          hidden_states: also return every hidden state and route.
          segment_starts_BT: for each token the position of the first one of its document, -1 for padding, int32: no token then
            attends to another document, and padding enters no load and no loss. None attends across documents.

        Raises:
          ValueError: if the sequence exceeds `max_position_embeddings`, if `segment_starts_BT` has another shape, or if
            (outside jit) an id is outside the vocabulary or `segment_starts_BT` is no such list of starts; inside jit such an
            id gives NaN.
        """
        return_intermediates = ("hidden", "routes") if hidden_states else ()
        features = self.features(
            tokens_BT, mtp=mtp, return_intermediates=return_intermediates, segment_starts_BT=segment_starts_BT
        )
        T = tokens_BT.shape[1]
        inspected = _inspected(features) if hidden_states else (None, None)
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
        """The states before the head; `return_intermediates` names what blocks also return ("latents", "hidden", "routes")."""
        check_tokens(tokens_BT, self.config)
        if segment_starts_BT is not None:
            check_starts(segment_starts_BT, tokens_BT)
        T = tokens_BT.shape[1]
        angles = rope_angles(self.config, jnp.arange(T)[None])
        embedded_BTD = self.embed(tokens_BT)
        h_BTD, outputs = self._stacks(embedded_BTD, None, angles, None, return_intermediates, segment_starts_BT)
        h_BTD = self.norm(h_BTD)

        mtp_h_BTD, state_BTD = [], h_BTD
        for k, depth in enumerate(self.mtp if mtp else (), 1):
            ahead_BTD = place_tokens(jnp.roll(embedded_BTD, -k, axis=1))
            token_mask_BT = rows_of_depth(tokens_BT.shape, segment_starts_BT, k)
            state_BTD, normed_BTD, outputs[f"mtp_{k - 1}"] = depth(
                state_BTD, ahead_BTD, angles, token_mask_BT, segment_starts_BT
            )
            mtp_h_BTD.append(normed_BTD)
        return Features(h_BTD, mtp_h_BTD, embedded_BTD, outputs)

    def head(self, h_BTD: jax.Array) -> jax.Array:
        """Logits of normalised states, float32."""
        kernel_DV, h_BTD = self.lm_head.kernel, h_BTD.astype(self.config.dtype)
        return project(h_BTD, kernel_DV, HEAD_AXES, preferred_element_type=jnp.float32)

    def decode(
        self, tokens_BT: jax.Array, cache: dict[str, Latents], cached_length_B: jax.Array
    ) -> tuple[jax.Array, dict[str, Latents]]:
        """Logits [B, T, V] after `forward_cached` over a cache with a row for each sequence, and the latents."""
        h_BTD, latents = self.forward_cached(tokens_BT, cache, CacheMetadata(cached_length_B))
        return self.head(h_BTD), latents

    def forward_cached(
        self, tokens_BT: jax.Array, cache: dict[str, Latents] | None, metadata: CacheMetadata
    ) -> tuple[jax.Array, dict[str, Latents]]:
        """The model over T new tokens of each sequence, given the latents of those before.

        Args:
          tokens_BT: the new tokens, at positions cached_length_B, cached_length_B + 1, ...
          cache: per layer or stack, the latents of earlier tokens: rows [(L,) B, S, ...], or pages [(L,) Y, Z, ...];
            None if these are the first.
          places: where in it each sequence's are.

        Returns:
          The states after the final norm [B, T, D], and the latents of the new tokens [(L,) B, T, ...], keyed as the cache,
          for the caller to store.
        """
        angles = self._angles_after(metadata, tokens_BT)
        h_BTD, outputs = self._stacks(self.embed(tokens_BT), cache, angles, metadata, ("latents",))
        return self.norm(h_BTD), {name: output.latents for name, output in outputs.items()}

    def draft(
        self, h_BTD: jax.Array, ahead_BT: jax.Array, cache: Latents | None, metadata: CacheMetadata
    ) -> tuple[jax.Array, Latents]:
        """The first MTP depth as a drafter: over T rows of each sequence, given its latents of the rows before.

        Args:
          h_BTD: states of the tokens at positions cached_length_B, ...: after the final norm, or what this returned for the row
            before (section 2.2 of the report has a depth for each token ahead; one depth is recycled).
          ahead_BT: the token after each of these.
          cache: latents of the depth's earlier rows; None if there are none.
          places: where in it each sequence's are.

        Returns:
          The states that `head` turns into logits of the token after the one ahead [B, T, D], and the latents [B, T, ...].
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
    def _stacks(  # type: ignore[no-untyped-def]
        self, h_BTD, cache, angles, metadata, return_intermediates, segment_starts_BT=None
    ) -> tuple[jax.Array, dict[str, BlockOutput]]:
        run = run_unrolled if self.unrolled else run_scanned
        shared = angles, metadata, None if segment_starts_BT is None else segment_starts_BT >= 0, segment_starts_BT
        outputs: dict[str, BlockOutput] = {}
        for name, size in stack_sizes(self.config).items():
            h_BTD, more = run(
                self.config,
                name,
                size,
                h_BTD,
                cache,
                *shared,
                return_intermediates=return_intermediates,
                absorbed=self.absorbed,
            )
            outputs |= more
        return h_BTD, outputs


def check_tokens(tokens_BT: Any, config: ModelConfig) -> None:
    """Raises ValueError on what `__call__` names; the ids themselves can be looked at outside jit only."""
    if tokens_BT.ndim != 2:
        raise ValueError(f"tokens have shape {tokens_BT.shape}; the model takes [batch, length]")
    length, longest = tokens_BT.shape[1], config.max_position_embeddings
    if length > longest:
        raise ValueError(f"{length} tokens exceed max_position_embeddings ({longest}); shorten the sequence")
    if not isinstance(tokens_BT, jax.core.Tracer):
        ids = np.asarray(tokens_BT)
        bad = ids[(ids < 0) | (ids >= config.vocab_size)]
        if bad.size:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary of {config.vocab_size}")


def check_starts(segment_starts_BT: Any, tokens_BT: Any) -> None:
    """Raises ValueError if these are no starts of the tokens' documents; the numbers can be looked at outside jit only."""
    if segment_starts_BT.shape != tokens_BT.shape or not jnp.issubdtype(segment_starts_BT.dtype, jnp.integer):
        raise ValueError(
            f"starts of documents are {segment_starts_BT.dtype} {segment_starts_BT.shape}; "
            f"give one integer for each token, {tokens_BT.shape}"
        )
    if isinstance(segment_starts_BT, jax.core.Tracer):
        return
    starts = np.asarray(segment_starts_BT)
    before = np.pad(starts, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    # A token is padding, begins a document, or goes on with that of the token before.
    wrong = np.argwhere((starts != -1) & (starts != np.arange(starts.shape[1])) & (starts != before))
    if wrong.size:
        row, place = wrong[0]
        raise ValueError(
            f"row {row} has start {starts[row, place]} at position {place}, after {before[row, place]}; give each token the "
            "position of the first one of its document, and padding -1"
        )


def _inspected(features: Features) -> tuple[jax.Array, jax.Array | None]:
    """Hidden states and routes of the main model, stacked over layers."""
    outputs = [output for name, output in features.outputs.items() if not name.startswith("mtp_")]

    def over_layers(arrays: list[jax.Array | None], ndim: int) -> list[jax.Array]:
        return [array if array.ndim == ndim else array[None] for array in arrays if array is not None]

    blocks_LBTD = jnp.concatenate(over_layers([output.hidden_BTD for output in outputs], 4))
    routes = over_layers([output.chosen_BTK for output in outputs], 4)
    hidden_LBTD = jnp.concatenate([features.embedded_BTD[None], blocks_LBTD[:-1], features.h_BTD[None]])
    return hidden_LBTD, jnp.concatenate(routes) if routes else None


def init_variables(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh variables: `params` (normal with `initializer_range`, norms one) and `router` (biases zero).

    Plain nested dicts of arrays; works under `jax.jit` and `jax.eval_shape`. Keys of a parameter depend on its path
    alone, so that a model has the same main parameters with and without MTP depths.
    """
    return nn.meta.unbox(_init_boxed(config, key))


def abstract_variables(config: ModelConfig) -> dict[str, Any]:
    """Shapes and dtypes of `init_variables`' tree, as `jax.ShapeDtypeStruct`s."""
    return nn.meta.unbox(_abstract_boxed(config))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """The logical axis names of every variable: a tree like `init_variables`' with tuples of names as leaves."""
    boxed = _abstract_boxed(config)
    return jax.tree.map(lambda leaf: leaf.names, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


@functools.lru_cache(maxsize=64)
def _abstract_boxed(config: ModelConfig) -> dict[str, Any]:
    """Traced once for a config: the whole model takes a second or more."""
    return jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))


def _init_boxed(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    tokens_BT = jnp.zeros((1, config.num_nextn_predict_layers + 1), jnp.int32)
    # Nothing of this pass is computed, and kernels are for the platform of the run, not for the one that lays it out.
    config = dataclasses.replace(config, attention_backend="chunked", expert_backend="tiles")
    with without_mesh():  # It is only the shapes of this pass that matter, and one row would not divide over a mesh.
        variables = DeepSeekV3(config).init(key, tokens_BT, mtp=True)
    return {"params": variables["params"], "router": variables.get("router", {})}
