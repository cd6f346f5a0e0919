"""Prefill and decoding over pages against the model run over the whole sequence at once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.infer.cache import Cache, append, empty_cache
from dsv3_jax.infer.runner import Chunks, Drawn, Slots, decode, prefill
from dsv3_jax.model import DeepSeekV3, unstack
from dsv3_jax.model.mla import CacheMetadata, expanding_pays
from tests.model.tiny import CONFIG as WITH_MTP
from tests.model.tiny import random_tokens, random_variables
from tests.tolerances import TOLERANCE

CONFIG = dataclasses.replace(WITH_MTP, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=1)
MODEL = DeepSeekV3(CONFIG, unrolled=True)
B, T, PAGE, PAGES, DRAFTS = 2, 40, 4, 24, 1
TOKENS_BT = random_tokens(B, T)
TABLE_BJ = np.random.default_rng(5).permutation(PAGES).reshape(B, -1).astype(np.int32)
NOWHERE = np.full((1, TABLE_BJ.shape[1]), PAGES, np.int32)


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    """Layer by layer, as the programs take them."""
    return unstack(jax.tree.map(jnp.asarray, random_variables(CONFIG)))


@pytest.fixture(scope="module")
def whole(variables: dict[str, Any]) -> Any:
    """States, the depth's states and all latents of the whole sequences."""
    return features(variables, TOKENS_BT)


def poisoned() -> Cache:
    """A cache of NaN."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.full(leaf.shape, np.nan, leaf.dtype)), empty_cache(CONFIG, PAGES, PAGE, drafting=True)
    )


def rows_of(cache: Cache, name: str, b: int) -> list[np.ndarray]:
    return [np.asarray(pages)[TABLE_BJ[b]].reshape(-1, pages.shape[-1]) for pages in cache[name]]


def assert_holds(cache: Cache, whole: Any, cached_length_B: list[int]) -> None:
    """The pages hold the latents of each sequence's first tokens; the depth's do too, whose last row knows one token more."""
    for name, output in whole.outputs.items():
        for b, length in enumerate(cached_length_B):
            for found, expected in zip(rows_of(cache, name, b), output.latents, strict=True):
                np.testing.assert_allclose(found[:length], expected[b, :length], **TOLERANCE["float32"], err_msg=name)


features = jax.jit(functools.partial(MODEL.apply, mtp=True, return_intermediates=("latents",), method="features"))
head = jax.jit(functools.partial(MODEL.apply, method="head"))


@jax.jit
def extend(
    variables: Any, tokens_BT: jax.Array, ahead_BT: jax.Array, cache: Cache, places: CacheMetadata
) -> tuple[jax.Array, jax.Array, Cache]:
    """The states of tokens and, with the tokens ahead of each, those of the depth; and the cache with both."""
    h_BTD, new = MODEL.apply(variables, tokens_BT, cache, places, method="forward_cached")
    normed_BTD, own = MODEL.apply(variables, h_BTD, ahead_BT, cache["mtp_0"], places, method="draft")
    return h_BTD, normed_BTD, append(cache, {**new, "mtp_0": own}, places)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.nightly), 5, 20])
def test_extending_in_pieces_is_the_whole_forward_pass(variables: dict, whole: Any, size: int) -> None:
    """Over NaN wherever nothing is written yet; the second sequence runs a piece behind the first."""
    assert not expanding_pays(CONFIG, 5)
    assert expanding_pays(CONFIG, 20), "the last case should take the materialised form"
    cache = poisoned()
    for start in range(0, T - size + 1, size):
        cached_length_B = np.array([start, max(start - size, 0)], np.int32)
        rows_BT = cached_length_B[:, None] + np.arange(size)
        # The depth sees the token ahead; the whole run's last row has none.
        ahead_BT = np.take_along_axis(TOKENS_BT, np.minimum(rows_BT + 1, T - 1), axis=1)
        tokens_BT = np.take_along_axis(TOKENS_BT, rows_BT, axis=1)
        h_BTD, normed_BTD, cache = extend(variables, tokens_BT, ahead_BT, cache, CacheMetadata(cached_length_B, TABLE_BJ))
        expected = np.take_along_axis(np.asarray(whole.h_BTD), rows_BT[..., None], axis=1)
        np.testing.assert_allclose(h_BTD, expected, **TOLERANCE["float32"])
        inside = rows_BT < T - 1
        expected = np.take_along_axis(np.asarray(whole.mtp_h_BTD[0]), rows_BT[..., None], axis=1)
        np.testing.assert_allclose(np.asarray(normed_BTD)[inside], expected[inside], **TOLERANCE["float32"])
    assert_holds(cache, whole, [T - 1, T - size])


def prefilled(variables: dict[str, Any], b: int, pieces: list[int], cache: Cache, slots: Slots) -> tuple[Cache, Slots, Drawn]:
    """Sequence b in pieces, each padded to 16 tokens; the last one makes its slot ready. Log-probabilities are reported."""
    start = 0
    for i, size in enumerate(pieces):
        tokens = np.full((1, 16), 28, np.int32)
        tokens[0, :size] = TOKENS_BT[b, start : start + size]
        following = TOKENS_BT[b, start + size] if i < len(pieces) - 1 else -1
        chunks = Chunks(tokens, *(np.array([n], np.int32) for n in (size, start, following, b)))
        cache, slots, drawn = prefill(
            MODEL, variables, cache, slots, chunks, TABLE_BJ[b : b + 1], first=start == 0, report=True
        )
        assert int(drawn.count_B[0]) == (i == len(pieces) - 1)
        start += size
    return cache, slots, drawn


@pytest.mark.parametrize("pieces", [[13], [6, 1, 6], [1, 12]])
def test_prefill_draws_from_the_last_logits_and_stores_latents(variables: dict, whole: Any, pieces: list[int]) -> None:
    cache, slots, drawn = prefilled(variables, 1, pieces, poisoned(), Slots.empty(B, DRAFTS, CONFIG.vocab_size))
    token = int(head(variables, whole.h_BTD)[1, 12].argmax())
    assert drawn.token_BT.tolist() == [[token]]
    assert slots.token_B.tolist() == [0, token]
    assert slots.cached_length_B.tolist() == [0, 13]
    # The depth's row 12 knows the token that was drawn, and not the one of the whole run.
    ahead = TOKENS_BT.copy()
    ahead[1, 13] = token
    known = features(variables, ahead)
    assert int(slots.draft_Bn[1, 0]) == int(head(variables, known.mtp_h_BTD[0])[1, 12].argmax())
    assert_holds(cache, known, [0, 13])


def test_a_row_of_nobody_changes_nothing(variables: dict) -> None:
    cache, slots = empty_cache(CONFIG, PAGES, PAGE, drafting=True), Slots.empty(B, DRAFTS, CONFIG.vocab_size)
    before = jax.tree.map(np.array, (cache, slots))
    chunks = Chunks(np.zeros((1, 16), np.int32), *(np.array([n], np.int32) for n in (1, 0, -1, -1)))
    after = prefill(MODEL, variables, cache, slots, chunks, NOWHERE, first=True, report=True)
    assert int(after[2].count_B[0]) == 0
    jax.tree.map(np.testing.assert_array_equal, before, after[:2])


@pytest.mark.parametrize(
    "drafts",
    [
        pytest.param(0, marks=pytest.mark.nightly),
        DRAFTS,
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(3, marks=pytest.mark.nightly),
    ],
)
def test_decode_is_greedy_over_the_whole_text_whatever_was_drafted(variables: dict, drafts: int) -> None:
    """A slot that is active and one that is not, which keeps what it has; accepted drafts only make it quicker."""
    cache, slots = poisoned(), Slots.empty(B, drafts, CONFIG.vocab_size)
    if not drafts:
        del cache["mtp_0"]
    text = TOKENS_BT[0, :9].tolist()
    cache, slots, drawn = prefilled(variables, 0, [9], cache, slots)
    text.append(int(drawn.token_BT[0, 0]))

    # A draft that is right, to be accepted whatever the depth would have said.
    def following(text: list[int]) -> int:
        padded = np.zeros((B, T), np.int32)
        padded[0, : len(text)] = text
        return int(head(variables, features(variables, padded).h_BTD)[0, len(text) - 1].argmax())

    if drafts:
        right = np.asarray(slots.draft_Bn).copy()
        right[0, 0] = following(text)
        certain = np.eye(CONFIG.vocab_size, dtype=np.float32)[right]
        slots = dataclasses.replace(slots, draft_Bn=jnp.asarray(right), draft_probs_BnV=jnp.asarray(certain))
    idle, counts = jax.tree.map(lambda leaf: np.array(leaf[1]), slots), []
    for _ in range(6):
        table = np.concatenate([TABLE_BJ[:1], NOWHERE])
        cache, slots, drawn = decode(MODEL, variables, cache, slots, table, np.array([True, False]))
        counts.append(int(drawn.count_B[0]))
        for token in drawn.token_BT[0, : counts[-1]].tolist():
            assert token == following(text)
            text.append(token)
        assert int(drawn.count_B[1]) == 0
        assert int(slots.cached_length_B[0]) == len(text) - 1
        jax.tree.map(np.testing.assert_array_equal, idle, jax.tree.map(lambda leaf: leaf[1], slots))
    assert counts[0] >= 1 + min(drafts, 1)
    # The cache holds the text's latents but its last token's, the depth's among them.
    padded = np.zeros((B, T), np.int32)
    padded[0, : len(text)] = text
    whole = features(variables, padded)
    whole = whole._replace(outputs={name: output for name, output in whole.outputs.items() if name in cache})
    assert_holds(cache, whole, [len(text) - 1, 0])


def test_programs_give_their_cache_away(variables: dict) -> None:
    cache, slots = empty_cache(CONFIG, PAGES, PAGE, drafting=True), Slots.empty(B, DRAFTS, CONFIG.vocab_size)
    table = np.repeat(NOWHERE, B, axis=0)
    decode(MODEL, variables, cache, slots, table, np.zeros(B, bool))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


def test_reported_logprobs_are_those_of_the_model(variables: dict, whole: Any) -> None:
    *_, drawn = prefilled(variables, 1, [13], poisoned(), Slots.empty(B, DRAFTS, CONFIG.vocab_size))
    logits = np.asarray(head(variables, whole.h_BTD)[1, 12], np.float64)
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert drawn.report is not None
    np.testing.assert_allclose(drawn.report.chosen_BT[0, 0], expected.max(), **TOLERANCE["float32"])
    np.testing.assert_allclose(drawn.report.top_BTR[0, 0], np.sort(expected)[::-1][:20], **TOLERANCE["float32"])
    np.testing.assert_array_equal(drawn.report.top_id_BTR[0, 0], np.argsort(-expected)[:20])
