"""Held-out scores against whole logits looked at one by one, bits per byte, and several sources.

The acceptance of MTP drafts is also scored on meshes of eight devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

import chex
import jax
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.data.sources import Document
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.data.tokens import ValidationWindows, document_windows
from dsv3_jax.model.losses import ValidationBatch
from dsv3_jax.model.sharding import variable_shardings
from dsv3_jax.parallel.devices import BatchPlacement
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.evaluation import (
    Evaluation,
    Evaluator,
    SourceScores,
    ValidationReport,
    evaluate_sources,
    validation_scores,
)
from tests import reference_model
from tests.intermediates import intermediate_shapes
from tests.model.tiny import DENSE_ONLY, oracle_tensors, published, random_tokens, random_variables
from tests.parallel.ragged_emulation import emulate_ragged
from tests.parallel.test_all_to_all import MESHES
from tests.train.test_on_mesh import MODEL as MESH_MODEL

B, T = 3, 128
CONFIG = dataclasses.replace(
    DENSE_ONLY, num_hidden_layers=1, first_k_dense_replace=1, vocab_size=300, max_position_embeddings=T
)


def batches(count: int) -> list[ValidationBatch]:
    """Random windows with random tokens unscored, the last window all padding."""
    rng = np.random.default_rng(0)
    made = []
    for seed in range(count):
        tokens_BX = random_tokens(B, T + 1, seed=seed)
        loss_weight_BT = rng.integers(0, 2, (B, T)).astype(np.float32)
        made.append(ValidationBatch(tokens_BX[:, :-1], tokens_BX[:, 1:], loss_weight_BT))
    made[-1].loss_weight_BT[-1] = 0
    return made


def by_the_oracle(config: ModelConfig, variables: dict, tokens_BT: np.ndarray) -> reference_model.Reference:
    return reference_model.forward(published(config), oracle_tensors(config, variables), tokens_BT)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """Of CONFIG and batches [B, T]."""
    return Evaluator(CONFIG)


def test_nats_and_tokens_are_those_of_every_scored_token(evaluator: Evaluator) -> None:
    variables, scored = random_variables(CONFIG), batches(3)
    nats, count = 0.0, 0
    for tokens_BT, targets_BT, loss_weight_BT, _ in scored:
        logits_BTV = by_the_oracle(CONFIG, variables, tokens_BT).logits_BTV
        for b, t in zip(*np.nonzero(loss_weight_BT), strict=True):
            row_V = logits_BTV[b, t]
            nats -= row_V[targets_BT[b, t]] - math.log(np.exp(row_V).sum())
            count += 1
    evaluation = evaluator(variables, scored)
    assert evaluation.tokens == count
    assert evaluation.nats == pytest.approx(nats, rel=1e-5)
    assert evaluation.loss == pytest.approx(nats / count, rel=1e-5)
    assert evaluator._score._cache_size() == 1
    # Without MTP there are no drafts.
    assert (evaluation.accepted, evaluation.drafted, evaluation.acceptance) == (None, None, None)
    # Batches add up, whatever feeds them.
    parts = [evaluator(variables, iter([batch])) for batch in scored]
    assert evaluation.nats == pytest.approx(math.fsum(part.nats for part in parts))
    assert evaluation.tokens == sum(part.tokens for part in parts)


def test_sums_keep_their_digits_over_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, 2^24 + 1 is 2^24."""
    evaluator = Evaluator(CONFIG)

    def score(variables: dict, tokens: jax.Array, targets: jax.Array, weights: jax.Array, starts: None) -> tuple:
        return np.float32(tokens[0, 0]), np.int32(1), np.int32(2)

    monkeypatch.setattr(evaluator, "_score", score)
    ones = np.ones((1, 1), np.float32)
    parts = [ValidationBatch(np.full((1, 1), nats), np.zeros((1, 1), np.int32), ones) for nats in (2**24, 1, 1)]
    assert evaluator({}, parts) == Evaluation(2**24 + 2, 3, 3, 6)


def test_bits_per_byte_of_a_text(evaluator: Evaluator) -> None:
    """Of windows of a text, and of its whole stream of tokens in one go."""
    text = "for x in range(3):\n    print(x, 'ünï')\n" * 3
    tokenizer = train_tokenizer([text], 270, ["<bos>", "<eos>"])
    variables = random_variables(CONFIG)
    windows = document_windows([Document("a", text)], tokenizer, CONFIG, batch_size=B, sequence_length=T)
    evaluation = evaluator(variables, windows)

    ids = [1, 0, *tokenizer.encode(text)]
    chex.assert_axis_dimension_lt(np.array([ids]), 1, T)
    logits_TV = by_the_oracle(CONFIG, variables, np.array([ids[:-1]])).logits_BTV[0, 1:]
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    bits = -log_p_TV[np.arange(len(ids) - 2), ids[2:]].sum() / math.log(2)
    assert evaluation.tokens == len(ids) - 2
    assert windows.bits_per_byte(evaluation.nats) == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert len(text.encode()) > len(text)


# --- Drafts of the MTP module ------------------------------------------------------------------------------------------

# So few tokens that chance accepts an eighth of the drafts.
DRAFTING = dataclasses.replace(MESH_MODEL, vocab_size=8, num_hidden_layers=1, first_k_dense_replace=0)
WIDE, LONG = 8, 32


def drafting_batches(count: int) -> list[ValidationBatch]:
    rng = np.random.default_rng(1)
    made = []
    for seed in range(count):
        tokens_BX = random_tokens(WIDE, LONG + 1, DRAFTING, seed=seed)
        made.append(ValidationBatch(tokens_BX[:, :-1], tokens_BX[:, 1:], rng.integers(0, 2, (WIDE, LONG)).astype(np.float32)))
    return made


def looked_at(config: ModelConfig, variables: dict, batches: list[ValidationBatch]) -> Evaluation:
    """Every draft verified by itself, in whole logits."""
    nats, tokens, accepted, drafted = 0.0, 0, 0, 0
    for tokens_BT, targets_BT, loss_weight_BT, _ in batches:
        output = by_the_oracle(config, variables, tokens_BT)
        main_BTV, draft_BTV = output.logits_BTV, output.mtp_logits[0]
        for b, t in zip(*np.nonzero(loss_weight_BT), strict=True):
            tokens += 1
            nats += math.log(np.exp(main_BTV[b, t]).sum()) - main_BTV[b, t, targets_BT[b, t]]
            if t > 0:  # Drafted a row earlier, for the same place in the text.
                drafted += 1
                accepted += int(draft_BTV[b, t - 1].argmax() == main_BTV[b, t].argmax())
    return Evaluation(nats, tokens, accepted, drafted)


def assert_equal(found: Evaluation, expected: Evaluation) -> None:
    assert found[1:] == expected[1:]
    assert found.nats == pytest.approx(expected.nats, rel=1e-5)


@pytest.mark.parametrize("depths", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_drafts_are_verified_as_greedy_decoding_would(depths: int) -> None:
    config = dataclasses.replace(DRAFTING, num_nextn_predict_layers=depths)
    variables, batches = random_variables(config), drafting_batches(2)
    found, expected = Evaluator(config)(variables, batches), looked_at(config, variables, batches)
    assert_equal(found, expected)
    assert found.acceptance == expected.accepted / expected.drafted
    assert 0.05 < found.acceptance < 0.3
    # Nothing is drafted for the first row of a window.
    assert found.drafted == sum(int(batch.loss_weight_BT[:, 1:].sum()) for batch in batches) < found.tokens


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("context, expert, tensor", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("fsdp, expert", "data, expert, tensor")),
    ],
)
def test_on_a_mesh_the_same_drafts_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_ragged(monkeypatch)
    variables, batches = random_variables(DRAFTING), drafting_batches(1)
    mesh = make_mesh(MeshConfig(**MESHES[name]))
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables, variable_shardings(DRAFTING, mesh))
        found = Evaluator(DRAFTING, BatchPlacement(mesh, WIDE, LONG).place)(placed, batches)
    assert_equal(found, looked_at(DRAFTING, variables, batches))


def test_a_window_of_one_token_has_no_drafts() -> None:
    batch = ValidationBatch(*(np.zeros((2, 1), np.int32),) * 2, np.ones((2, 1), np.float32))
    found = Evaluator(DRAFTING)(random_variables(DRAFTING), [batch])
    assert (found.tokens, found.accepted, found.drafted, found.acceptance) == (2, 0, 0, None)


def test_logits_of_whole_windows_never_exist() -> None:
    config = dataclasses.replace(DRAFTING, vocab_size=56)  # a size that nothing else has
    score = functools.partial(validation_scores, config=config)
    shapes = intermediate_shapes(score, random_variables(config), *drafting_batches(1)[0])
    assert {shape for shape in shapes if shape[-1:] == (56,) and WIDE in shape} == {(WIDE, config.loss_chunk, 56)}


# --- Several sources ---------------------------------------------------------------------------------------------------


def windows_of(texts: list[str], length: int = 8) -> ValidationWindows:
    tokenizer = train_tokenizer(["abc abd abe\n" * 9], 260, ["<bos>", "<eos>"])
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    return document_windows(documents, tokenizer, CONFIG, batch_size=2, sequence_length=length)


def told(nats_per_token: float, accepted: float | None = None) -> Callable[..., Evaluation]:
    """An evaluation in which every scored token costs as much, and every second token has a draft."""

    def evaluate(_: dict, batches: Iterable[ValidationBatch]) -> Evaluation:
        tokens = sum(int(batch.loss_weight_BT.sum()) for batch in batches)
        drafts = (None, None) if accepted is None else (round(accepted * tokens), tokens)
        return Evaluation(nats_per_token * tokens, tokens, *drafts)

    return evaluate


def test_sources_and_their_total() -> None:
    """All of it: bits are summed over the bytes of both, whatever the share of each."""
    validation = {"prose": windows_of(["abc abd " * 40]), "code": windows_of(["ünï " * 30, "x"])}
    costs = {"prose": 2.0, "code": 0.5}
    by_windows = {id(windows): costs[name] for name, windows in validation.items()}
    found = evaluate_sources(lambda variables, windows: told(by_windows[id(windows)])(variables, windows), {}, validation)
    nats = {name: costs[name] * validation[name].num_tokens for name in validation}
    for name, windows in validation.items():
        assert found.sources[name] == (costs[name], pytest.approx(nats[name] / math.log(2) / windows.num_bytes), None)
    tokens, num_bytes = (sum(getattr(windows, of) for windows in validation.values()) for of in ("num_tokens", "num_bytes"))
    assert num_bytes == 320 + 30 * 6 + 1
    assert found.total.loss == pytest.approx(sum(nats.values()) / tokens)
    assert found.total.bits_per_byte == pytest.approx(sum(nats.values()) / math.log(2) / num_bytes)
    assert found.row == {
        "heldout_loss": found.total.loss,
        "heldout_bits_per_byte": found.total.bits_per_byte,
        "heldout_loss/prose": 2.0,
        "heldout_bits_per_byte/prose": found.sources["prose"].bits_per_byte,
        "heldout_loss/code": 0.5,
        "heldout_bits_per_byte/code": found.sources["code"].bits_per_byte,
    }


def test_a_sample_stands_for_its_source() -> None:
    """A long source weighs as much in the total as it has text, though no more of it is scored than of a short one."""
    validation = {"long": windows_of(["abc abd " * 400]), "short": windows_of(["abe " * 3])}
    cost, accepted = {"long": 3.0, "short": 1.0}, {"long": 0.5, "short": 0.0}
    names, seen = iter(validation), []

    def evaluate(_: dict, batches: Iterable[ValidationBatch]) -> Evaluation:
        name = next(names)
        seen.append(told(cost[name], accepted[name])({}, batches))
        return seen[-1]

    found = evaluate_sources(evaluate, {}, validation, 1)
    assert [part.tokens < windows.num_tokens for part, windows in zip(seen, validation.values(), strict=True)] == [True, False]
    weights = np.array([windows.num_tokens for windows in validation.values()])
    assert found.total.loss == pytest.approx(np.average([3.0, 1.0], weights=weights))
    assert found.total.acceptance == pytest.approx(np.average([seen[0].acceptance, 0.0], weights=weights))
    whole = validation["long"]
    assert found.sources["long"].bits_per_byte == pytest.approx(3.0 / math.log(2) * whole.num_tokens / whole.num_bytes)


def test_one_source_keeps_the_names_it_has_always_had() -> None:
    windows = windows_of(["abc abd " * 40])
    found = evaluate_sources(told(2.0, 0.25), {}, {"text": windows})
    scores = SourceScores(2.0, windows.bits_per_byte(2.0 * windows.num_tokens), pytest.approx(0.25, abs=0.01))
    assert found == ValidationReport(scores, {"text": scores})
    bits = {"heldout_bits_per_byte": found.total.bits_per_byte}
    assert found.row == {"heldout_loss": 2.0, **bits, "mtp_acceptance": found.total.acceptance}
