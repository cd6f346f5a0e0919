"""Evaluation on held-out text: loss, bits per byte by source, and acceptance rate of the MTP module's drafts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.model.losses import ValidationBatch, cross_entropy, cross_entropy_and_greedy, depth_weights


class Evaluation(NamedTuple):
    """Summed loss and draft counts of some held-out tokens."""

    nats: float
    """Sum of the scored tokens' cross entropies, in nats."""
    tokens: int
    """Number of scored tokens."""
    accepted: int | None = None
    """Drafts of the first MTP depth that greedy verification accepts; None for a model without MTP."""
    drafted: int | None = None
    """Number of drafts of the first MTP depth; None for a model without MTP."""

    @property
    def loss(self) -> float:
        """Mean loss, in nats a token."""
        return self.nats / self.tokens

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that is accepted; None without drafts."""
        return self.accepted / self.drafted if self.accepted is not None and self.drafted else None


class Evaluator:
    """Scorer of held-out batches, all of one shape, with one compiled program."""

    def __init__(self, config: ModelConfig, place: Callable[[np.ndarray], Any] = jnp.asarray) -> None:
        """Args: config: the model; place: puts an array [B, T] of a batch on the model's devices."""
        self._place = place
        self._score = jax.jit(functools.partial(validation_scores, config=config))

    def __call__(self, variables: dict[str, Any], batches: Iterable[ValidationBatch]) -> Evaluation:
        """Score all batches under `variables`; return the sum of their losses and their counts of tokens and drafts."""
        # Sums in Python: float32 would lose digits over a million tokens.
        nats, tokens, accepted, drafted = 0.0, 0, None, None
        for batch in batches:
            batch_nats, batch_accepted, batch_drafted = self._score(variables, *jax.tree.map(self._place, batch))
            nats += float(batch_nats)
            tokens += int(np.count_nonzero(batch.loss_weight_BT))
            if batch_accepted is not None:
                accepted = int(batch_accepted) + (accepted or 0)
                drafted = int(batch_drafted) + (drafted or 0)
        return Evaluation(nats, tokens, accepted, drafted)


def validation_scores(
    variables: dict[str, Any],
    tokens_BT: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    segment_starts_BT: jax.Array | None = None,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Score held-out windows, for `jax.jit`; [B, T, V] logits never exist.

    The loss is the weighted sum of the next-token cross entropies. The first MTP depth (section 2.2 of the report) drafts at
    row i the token at i + 2, from the text up to i + 1; verification accepts the draft if it is the main model's most likely
    token at row i + 1. Every scored row has a draft, except the first of a window (or of its document).

    Args:
      tokens_BT, target_BT: windows of text, and their next tokens.
      weight_BT: 1 where the target is scored, else 0.
      segment_starts_BT: first position of each token's document, as in training; None lets attention cross documents.

    Returns:
      Sum of the scored tokens' losses, float32; accepted and drafted tokens, int32, None without MTP.
    """
    has_mtp = config.num_nextn_predict_layers > 0
    features = DeepSeekV3(config).apply(
        variables, tokens_BT, mtp=has_mtp, segment_starts_BT=segment_starts_BT, method="features"
    )
    head_DV = variables["params"]["lm_head"]["kernel"]
    if not has_mtp:
        nats = cross_entropy(features.h_BTD, head_DV, target_BT, weight_BT, config.loss_chunk)
        return nats, None, None
    nats, verified_BT = cross_entropy_and_greedy(features.h_BTD, head_DV, target_BT, weight_BT, config.loss_chunk)
    # The compiler drops the unused loss of the drafts.
    _, draft_BT = cross_entropy_and_greedy(features.mtp_h_BTD[0], head_DV, target_BT, weight_BT, config.loss_chunk)
    # Row i + 1 may be on another device than row i, so the tokens are moved.
    counts_BT = depth_weights(weight_BT, segment_starts_BT, 1) > 0
    accepted_BT = counts_BT & (draft_BT == jnp.roll(verified_BT, -1, axis=1))
    return nats, jnp.sum(accepted_BT, dtype=jnp.int32), jnp.sum(counts_BT, dtype=jnp.int32)


class SourceScores(NamedTuple):
    """Scores of the held-out text of one source, or of all sources."""

    loss: float
    """Mean loss, in nats a token."""
    bits_per_byte: float
    acceptance: float | None
    """Share of the MTP drafts that is accepted, 0 to 1; None without drafts, as for a model without MTP."""


class ValidationWindows(Protocol):
    """Batches of one held-out text; implemented in `dsv3_jax.data.tokens`."""

    num_tokens: int
    """Number of scored tokens."""
    num_bytes: int
    """Number of UTF-8 bytes of the scored tokens."""

    def __iter__(self) -> Iterator[ValidationBatch]: ...

    def sample(self, num_batches: int) -> Iterator[ValidationBatch]:
        """Return `num_batches` of the batches, spread evenly over the text."""

    def bits_per_byte(self, nats: float) -> float:
        """Return the bits per byte of the text, given the summed loss of its tokens."""


class ValidationReport(NamedTuple):
    """Scores of all held-out text, and of each source."""

    total: SourceScores
    sources: dict[str, SourceScores]

    @property
    def row(self) -> dict[str, float]:
        """Metrics for a logged row: `heldout_loss`, `heldout_bits_per_byte`, and `mtp_acceptance` of a model with MTP.

        With several sources also the first two of each, as `heldout_loss/<source>`.
        """
        row = {"heldout_loss": self.total.loss, "heldout_bits_per_byte": self.total.bits_per_byte}
        if self.total.acceptance is not None:
            row["mtp_acceptance"] = self.total.acceptance
        if len(self.sources) > 1:
            for name, scores in self.sources.items():
                row |= {f"heldout_loss/{name}": scores.loss, f"heldout_bits_per_byte/{name}": scores.bits_per_byte}
        return row


def evaluate_sources(
    evaluate: Callable[[dict[str, Any], Iterable[ValidationBatch]], Evaluation],
    variables: dict[str, Any],
    validation: Mapping[str, ValidationWindows],
    num_batches: int | None = None,
) -> ValidationReport:
    """Score the held-out text of every source, or a sample of each; return the scores of each and the total.

    A sample stands for its whole source: same loss and drafts per token, so its bits per byte are

      mean loss of the scored tokens / ln 2 * tokens of the source / bytes of the source

    and in the total every source weighs as much as it has text. With all batches scored every figure is exact.

    `evaluate` is an `Evaluator`; `num_batches` are taken of each source, spread evenly over it, None for all.
    """
    sources, parts = {}, []
    for name, windows in validation.items():
        scored = evaluate(variables, windows if num_batches is None else windows.sample(num_batches))
        scale = windows.num_tokens / scored.tokens
        nats = scored.nats * scale
        bits_per_byte = windows.bits_per_byte(nats)
        sources[name] = SourceScores(scored.loss, bits_per_byte, scored.acceptance)
        drafts = (scored.accepted or 0) * scale, (scored.drafted or 0) * scale
        parts.append((nats, windows.num_tokens, bits_per_byte * windows.num_bytes, windows.num_bytes, *drafts))
    nats, tokens, bits, num_bytes, accepted, drafted = map(sum, zip(*parts, strict=True))
    return ValidationReport(SourceScores(nats / tokens, bits / num_bytes, accepted / drafted if drafted else None), sources)
