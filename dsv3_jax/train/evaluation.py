"""Held-out text: its loss, its bits per byte by source, and how much of what the MTP module drafts would be accepted."""

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
    """The summed loss of some held-out tokens, and what became of the tokens drafted for them."""

    nats: float
    """Sum of their losses."""
    tokens: int
    """How many were scored."""
    accepted: int | None = None
    """Drafts of the first MTP depth that greedy verification accepts; None of a model without MTP."""
    drafted: int | None = None
    """How many there were."""

    @property
    def loss(self) -> float:
        """Mean loss, in nats a token."""
        return self.nats / self.tokens

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that is accepted; None if there were none."""
        return self.accepted / self.drafted if self.accepted is not None and self.drafted else None


class Evaluator:
    """Scores batches of one shape with one compiled program."""

    def __init__(self, config: ModelConfig, place: Callable[[np.ndarray], Any] = jnp.asarray) -> None:
        """Args: config: the model; place: puts an array [B, T] of a batch where the model runs."""
        self._place = place
        self._score = jax.jit(functools.partial(validation_scores, config=config))

    def __call__(self, variables: dict[str, Any], batches: Iterable[ValidationBatch]) -> Evaluation:
        """The loss of the batches' scored tokens under `variables`, and the drafts for them."""
        # Summed in Python's numbers: float32 would lose digits over a million tokens.
        nats, tokens, accepted, drafted = 0.0, 0, None, None
        for batch in batches:
            scores = self._score(variables, *jax.tree.map(self._place, batch))
            nats += float(scores.nats)
            tokens += int(np.count_nonzero(batch.loss_weight_BT))
            if scores.accepted is not None:
                accepted = int(scores.accepted) + (accepted or 0)
                drafted = int(scores.drafted) + (drafted or 0)
        return Evaluation(nats, tokens, accepted, drafted)


class ValidationScores(NamedTuple):
    """What one batch of held-out windows comes to, as scalars on the device."""

    nats: jax.Array
    """Sum of the scored tokens' losses, float32."""
    accepted: jax.Array | None
    """int32; None without MTP."""
    drafted: jax.Array | None
    """int32; None without MTP."""


def validation_scores(
    variables: dict[str, Any],
    tokens_BT: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    segment_starts_BT: jax.Array | None = None,
    *,
    config: ModelConfig,
) -> ValidationScores:
    """Scores held-out windows, for `jax.jit`; [B, T, V] logits never exist.

    The loss is the weighted sum of the next-token cross entropies. Of the first MTP depth (section 2.2 of the report), row i
    drafts the token at i + 2 from the text up to i + 1; verification accepts it if it is the token that the main model, at row
    i + 1, finds most likely. Every scored row but the first of a window has such a draft.

    Args:
      variables: the model's.
      tokens_BT: windows of text.
      target_BT: the tokens one further on.
      weight_BT: 1 where the target is scored, else 0.
      segment_starts_BT: where the document of each token begins, as in training; None where attention crosses documents.
      config: the model.
    """
    has_mtp = config.num_nextn_predict_layers > 0
    features = DeepSeekV3(config).apply(
        variables, tokens_BT, mtp=has_mtp, segment_starts_BT=segment_starts_BT, method="features"
    )
    head_DV = variables["params"]["lm_head"]["kernel"]
    if not has_mtp:
        nats = cross_entropy(features.h_BTD, head_DV, target_BT, weight_BT, config.loss_chunk)
        return ValidationScores(nats, None, None)
    nats, verified_BT = cross_entropy_and_greedy(features.h_BTD, head_DV, target_BT, weight_BT, config.loss_chunk)
    # Of the drafts' loss nothing is asked, so the compiler leaves it out.
    _, draft_BT = cross_entropy_and_greedy(features.mtp_h_BTD[0], head_DV, target_BT, weight_BT, config.loss_chunk)
    # Row i + 1 may live on another device than row i: it is the tokens that travel.
    counts_BT = depth_weights(weight_BT, segment_starts_BT, 1) > 0
    accepted_BT = counts_BT & (draft_BT == jnp.roll(verified_BT, -1, axis=1))
    return ValidationScores(nats, jnp.sum(accepted_BT, dtype=jnp.int32), jnp.sum(counts_BT, dtype=jnp.int32))


class SourceScores(NamedTuple):
    """What the held-out text of one source, or of all of them together, comes to."""

    loss: float
    """Mean loss, in nats a token."""
    bits_per_byte: float
    acceptance: float | None
    """Share of the MTP drafts that is accepted; None of a model without MTP."""


class ValidationWindows(Protocol):
    """Batches of one held-out text; `dsv3_jax.data.tokens` has the implementation."""

    num_tokens: int
    """Scored tokens."""
    num_bytes: int
    """UTF-8 bytes that the scored tokens spell."""

    def __iter__(self) -> Iterator[ValidationBatch]: ...

    def sample(self, num_batches: int) -> Iterator[ValidationBatch]:
        """Batches spread evenly over the text."""

    def bits_per_byte(self, nats: float) -> float:
        """Bits per byte of the text, for the summed loss of its tokens."""


class ValidationReport(NamedTuple):
    """The scores of all held-out text, and of each of its sources."""

    total: SourceScores
    sources: dict[str, SourceScores]

    @property
    def row(self) -> dict[str, float]:
        """What a logged row says: `heldout_loss`, `heldout_bits_per_byte`, and `mtp_acceptance` of a model with MTP.

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
    """Scores the held-out text of every source, or a sample of each.

    What a sample does not score is taken to be like what it does: its loss a token, its drafts a token, and the bytes a token
    of the whole source. So bits per byte of a sample are

      mean loss of the scored tokens / ln 2 * tokens of the source / bytes of the source

    and in the total every source weighs as much as it has text, however little of it was in the sample. With all batches
    scored every figure is exact.

    Args:
      evaluate: an `Evaluator`.
      variables: what it is to score.
      heldout: the windows of each source.
      num_batches: batches of each source, spread evenly over it; None for all.
    """
    sources, parts = {}, []
    for name, windows in validation.items():
        scored = evaluate(variables, windows if num_batches is None else windows.sample(num_batches))
        stands_for = windows.num_tokens / scored.tokens
        nats = scored.nats * stands_for
        sources[name] = SourceScores(scored.loss, windows.bits_per_byte(nats), scored.acceptance)
        drafts = (scored.accepted or 0) * stands_for, (scored.drafted or 0) * stands_for
        parts.append((nats, windows.num_tokens, windows.bits_per_byte(nats) * windows.num_bytes, windows.num_bytes, *drafts))
    nats, tokens, bits, num_bytes, accepted, drafted = map(sum, zip(*parts, strict=True))
    return ValidationReport(SourceScores(nats / tokens, bits / num_bytes, accepted / drafted if drafted else None), sources)
