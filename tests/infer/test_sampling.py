"""The distribution against a float64 NumPy reference, transform by transform and combined; draws; the checks of params."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dsv3_jax.infer import sampling
from dsv3_jax.infer.sampling import Sampler, SamplingParams, Stream, distribution, draw, seen_along, with_row
from tests.tolerances import TOLERANCE

V, T = 50, 3
DRAWN = SamplingParams(temperature=1.0)
BIAS = {3: 4.0, 7: -6.5, 20: 1.25}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 7.0},
    {"logit_bias": BIAS},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.05},
    {"top_p": 0.8},
    {"min_p": 0.15},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.7},
    {"top_p": 0.9, "min_p": 0.2, "temperature": 1.6},
    {"logit_bias": BIAS, "repetition_penalty": 2.5, "temperature": 0.7},
    {"logit_bias": BIAS, "repetition_penalty": 1.3, "temperature": 1.8, "top_k": 20, "top_p": 0.85, "min_p": 0.05},
    {"temperature": 0.0, "logit_bias": BIAS, "repetition_penalty": 1.3, "top_k": 20, "top_p": 0.85, "min_p": 0.05},
]
PARAMS = [dataclasses.replace(DRAWN, **setting) for setting in SETTINGS]


def logits(*shape: int, scale: float = 2.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((*shape, V))).astype(np.float32)


def sampler_of(params: list[SamplingParams], vocab_size: int = V) -> Sampler:
    rows = [Sampler.row(one, (), vocab_size) for one in params]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)


distributed = jax.jit(distribution)


def probabilities(logits_BTV: Any, params: list[SamplingParams], seen_BTV: Any = None) -> np.ndarray:
    seen_BTV = np.zeros(logits_BTV.shape, bool) if seen_BTV is None else seen_BTV
    probs_BTV = distributed(logits_BTV, sampler_of(params, logits_BTV.shape[-1]), seen_BTV)
    chex.assert_type(probs_BTV, jnp.float32)
    return np.asarray(probs_BTV)


def softmax(logits_V: np.ndarray) -> np.ndarray:
    p_V = np.exp(logits_V - logits_V.max())
    return p_V / p_V.sum()


def reference(logits_V: np.ndarray, seen_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    """One transform after another, as Hugging Face's processors are called; float64."""
    z_V = logits_V.astype(np.float64)
    for token, bias in params.logit_bias.items():
        z_V[token] += bias
    for token in np.flatnonzero(seen_V):
        z_V[token] = z_V[token] / params.repetition_penalty if z_V[token] > 0 else z_V[token] * params.repetition_penalty
    if params.temperature == 0:
        return np.eye(V)[z_V.argmax()]
    z_V /= params.temperature
    if params.top_k:
        z_V[np.argsort(-z_V, kind="stable")[params.top_k :]] = -math.inf
    z_V[~np.isin(np.arange(V), list(smallest_set(softmax(z_V), params.top_p)))] = -math.inf
    p_V = softmax(z_V)
    z_V[p_V < params.min_p * p_V.max()] = -math.inf
    return softmax(z_V)


def smallest_set(p_V: np.ndarray, top_p: float) -> set[int]:
    """The most likely tokens, one after another, until they have `top_p`."""
    chosen: set[int] = set()
    mass = 0.0
    for token in np.argsort(-p_V, kind="stable"):
        if top_p < 1 and mass >= top_p:
            break
        chosen.add(int(token))
        mass += p_V[token]
    return chosen


def test_the_distribution_is_the_references_with_other_params_in_every_row() -> None:
    rng = np.random.default_rng(1)
    logits_BTV, seen_BTV = logits(len(PARAMS), T, seed=1), rng.random((len(PARAMS), T, V)) < 0.3
    found_BTV = probabilities(logits_BTV, PARAMS, seen_BTV)
    chex.assert_shape(found_BTV, logits_BTV.shape)
    for b, params in enumerate(PARAMS):
        for t in range(T):
            expected_V = reference(logits_BTV[b, t], seen_BTV[b, t], params)
            np.testing.assert_array_equal(found_BTV[b, t] > 0, expected_V > 0, err_msg=str(SETTINGS[b]))
            np.testing.assert_allclose(found_BTV[b, t], expected_V, **TOLERANCE["float32"], err_msg=str(SETTINGS[b]))


def test_a_row_does_not_depend_on_the_others() -> None:
    """Not even on whether others need a sort, or a softmax at all."""
    logits_BTV = logits(len(PARAMS), T)
    seen_BTV = np.random.default_rng(0).random(logits_BTV.shape) < 0.3
    together_BTV = probabilities(logits_BTV, PARAMS, seen_BTV)
    for b, params in enumerate(PARAMS):
        alone_BTV = probabilities(logits_BTV[b : b + 1], [params], seen_BTV[b : b + 1])
        np.testing.assert_array_equal(alone_BTV[0], together_BTV[b], err_msg=str(SETTINGS[b]))


@pytest.mark.parametrize("top_p", [1e-9, 0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_the_nucleus_is_the_smallest_set(top_p: float, scale: float) -> None:
    logits_BTV = logits(1, 64, scale=scale)
    p_TV = np.stack([softmax(row.astype(np.float64)) for row in logits_BTV[0]])
    cumulated_TV = np.cumsum(-np.sort(-p_TV, axis=-1), axis=-1)
    clear = np.abs(cumulated_TV - top_p).min(-1) > 1e-6  # where float32 cannot fall to the other side
    assert clear.mean() > 0.9
    kept_TV = probabilities(logits_BTV, [dataclasses.replace(DRAWN, top_p=top_p)])[0] > 0
    for t in np.flatnonzero(clear):
        assert set(np.flatnonzero(kept_TV[t])) == smallest_set(p_TV[t], top_p)
    assert (kept_TV.sum(-1) == 1).all() or top_p > 1e-9


@pytest.mark.parametrize("setting", [{"top_p": 0.5}, {"top_k": 4}], ids=str)
def test_of_equals_the_lower_ids_stay_and_a_bound_that_is_met_exactly_ends_there(setting: dict[str, Any]) -> None:
    params = [dataclasses.replace(DRAWN, **setting)]
    np.testing.assert_array_equal(probabilities(np.zeros((1, 1, 8), np.float32), params)[0, 0], [0.25] * 4 + [0] * 4)
    # One is above the rest, and the others that stay are the first of them.
    p_V = np.array([0.125, 0.0625, 0.125, 0.1875, 0.125, 0.125, 0.125, 0.125])
    kept_V = probabilities(np.log(p_V).astype(np.float32)[None, None], params)[0, 0] > 0
    np.testing.assert_array_equal(np.flatnonzero(kept_V), [0, 2, 3, 4])


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_bounds_at_their_limits_keep_every_token_of_a_large_vocabulary(scale: float) -> None:
    logits_BTV = (scale * np.random.default_rng(0).standard_normal((2, 1, 129_280))).astype(np.float32)
    # The other row brings the sort about.
    assert (probabilities(logits_BTV, [DRAWN, dataclasses.replace(DRAWN, top_k=5)])[0] > 0).all()
    assert (probabilities(logits_BTV, [dataclasses.replace(DRAWN, top_k=129_280)] * 2) > 0).all()


def test_temperature_0_is_all_on_the_most_likely_and_the_first_of_equals() -> None:
    logits_BTV = logits(2, 64)
    logits_BTV[:, 0, [3, 7]] = 100.0
    greedy = SamplingParams(top_p=0.5, top_k=9, min_p=0.3)
    expected_BTV = np.eye(V)[logits_BTV.argmax(-1)]
    assert expected_BTV[0, 0, 3] == 1
    np.testing.assert_array_equal(probabilities(logits_BTV, [greedy, greedy]), expected_BTV)
    np.testing.assert_array_equal(probabilities(logits_BTV, [greedy, DRAWN])[0], expected_BTV[0])


def test_bias_and_penalty_move_the_greedy_choice() -> None:
    logits_BTV = np.array([[[-1.0, 2.0, 1.5, -2.0]] * 2] * 2, np.float32)
    seen_BTV = np.array([[[0, 1, 0, 0], [1, 1, 1, 0]]] * 2, bool)
    params = [SamplingParams(repetition_penalty=2.0), SamplingParams(logit_bias={3: 5.0})]
    np.testing.assert_array_equal(probabilities(logits_BTV, params, seen_BTV).argmax(-1), [[2, 1], [3, 3]])


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 1e-40, 1e-300])
def test_a_temperature_near_0_is_greedy(temperature: float) -> None:
    logits_BTV = logits(1, 64, scale=20.0)
    best_two = np.sort(logits_BTV, axis=-1)[..., -2:]
    assert (best_two[..., 1] - best_two[..., 0]).min() > 0.05
    found_BTV = probabilities(logits_BTV, [dataclasses.replace(DRAWN, temperature=temperature)])
    np.testing.assert_array_equal(found_BTV, np.eye(V)[logits_BTV.argmax(-1)])


@pytest.mark.parametrize("temperature", [1e9, 1e300])
def test_a_high_temperature_forgets_the_logits(temperature: float) -> None:
    found_BTV = probabilities(logits(1, 64), [dataclasses.replace(DRAWN, temperature=temperature)])
    np.testing.assert_allclose(found_BTV, 1 / V, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1e-37, 1.0, 1e300])
@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_no_parameter_makes_nan(temperature: float, penalty: float) -> None:
    logits_BTV = logits(1, 64)
    logits_BTV[..., 5] = 0
    extreme = SamplingParams(
        temperature=temperature, repetition_penalty=penalty, logit_bias={1: 1e300, 2: -1e300, 3: 3.4e38, 4: -3.4e38}, top_p=0.9
    )
    found_BTV = probabilities(logits_BTV, [extreme], np.ones(logits_BTV.shape, bool))
    np.testing.assert_allclose(found_BTV.sum(-1), 1, rtol=1e-5)
    assert found_BTV.min() >= 0


def test_the_sort_is_left_out_where_no_row_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[list[dict[str, Any]], int]] = [
        ([{"temperature": 0.0, "top_p": 0.5, "top_k": 3}] * 2, 0),
        ([{}, {"min_p": 0.1}], 0),
        ([{"temperature": 0.0, "top_p": 0.5}, {}], 0),
        ([{"top_k": 3}, {}], 1),
        ([{"temperature": 0.0}, {"top_p": 0.9}], 1),
    ]
    calls: list[None] = []
    most_likely = sampling._most_likely

    def counted(*arguments: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(None))
        return most_likely(*arguments)

    monkeypatch.setattr(sampling, "_most_likely", counted)
    # A function of its own, so that no compiled program of another test is taken.
    fresh = jax.jit(lambda *arguments: distribution(*arguments))
    for settings, sorts in cases:
        calls.clear()
        sampler = sampler_of([dataclasses.replace(DRAWN, **setting) for setting in settings])
        jax.block_until_ready(fresh(logits(2, T), sampler, np.zeros((2, T, V), bool)))
        jax.effects_barrier()
        assert len(calls) == sorts, settings


drawn = jax.jit(draw)


def test_draws_are_distributed_as_they_should_be() -> None:
    """Pearson's chi-square over 20,000 draws, of every stream: seeds differ, then places."""
    count = 20_000
    p_V = np.array([0.3, 0.02, 0.0, 0.18, 0.25, 0.05, 0.1, 0.1])
    probs_BV = np.tile(p_V.astype(np.float32), (count, 1))
    many, one = np.arange(count, dtype=np.uint32), np.full(count, 7, np.uint32)
    for seed_B, position_B in [(many, one), (one, many)]:
        for stream in Stream:
            counts = np.bincount(drawn(probs_BV, seed_B, position_B, stream), minlength=8)
            assert counts[2] == 0
            statistic = np.sum((counts - count * p_V)[p_V > 0] ** 2 / (count * p_V)[p_V > 0])
            assert scipy.special.chdtrc(6, statistic) > 1e-3


def test_a_draw_is_told_by_seed_place_and_stream_and_nothing_else() -> None:
    probs_BV = np.stack([softmax(row) for row in logits(64)])
    seed_B, position_B = np.arange(64, dtype=np.uint32) % 5, np.arange(64) // 5
    together_B = np.asarray(drawn(probs_BV, seed_B, position_B, Stream.TARGET))
    assert together_B.dtype == np.int32
    for b in range(0, 64, 9):
        row = slice(b, b + 1)
        assert drawn(probs_BV[row], seed_B[row], position_B[row], Stream.TARGET)[0] == together_B[b]
    mixed_B = np.where(np.arange(64) % 2, Stream.DRAFT, Stream.TARGET)
    np.testing.assert_array_equal(drawn(probs_BV, seed_B, position_B, mixed_B)[::2], together_B[::2])
    others = [
        drawn(probs_BV, seed_B + 5, position_B, Stream.TARGET),
        drawn(probs_BV, seed_B, position_B + 20, Stream.TARGET),
        *(drawn(probs_BV, seed_B, position_B, stream) for stream in Stream if stream != Stream.TARGET),
    ]
    for other_B in others:
        assert np.mean(np.asarray(other_B) == together_B) < 0.5


@pytest.mark.parametrize("beside_drawn_ones", [False, True])
def test_a_row_with_one_possible_token_gives_that_token(beside_drawn_ones: bool) -> None:
    token_B = np.random.default_rng(0).integers(0, V, 200)
    probs_BV = np.eye(V, dtype=np.float32)[token_B]
    if beside_drawn_ones:
        probs_BV[::2] = 1 / V
    drawn_B = np.asarray(drawn(probs_BV, np.arange(200, dtype=np.uint32), np.arange(200), Stream.RESIDUAL))
    np.testing.assert_array_equal(drawn_B[1::2], token_B[1::2])
    assert np.array_equal(drawn_B, token_B) == (not beside_drawn_ones)


def test_a_row_is_set_in_a_compiled_program_and_leaves_the_others_alone() -> None:
    params = SamplingParams(
        temperature=0.5, top_p=0.75, seed=2**32 - 1, top_k=2**40, min_p=0.25, repetition_penalty=1.5, logit_bias={1: -2, 4: 0.5}
    )
    row = Sampler.row(params, [2, 0, 2], 6)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(row))
    empty, compiled = jax.tree.map(np.asarray, Sampler.empty(3, 6)), jax.jit(with_row)
    changed = compiled(empty, 1, row)
    chex.assert_trees_all_equal_shapes_and_dtypes(changed, empty)
    chex.assert_tree_shape_prefix(changed, (3,))
    expected = Sampler(
        seed_B=np.array([0, 2**32 - 1, 0], np.uint32),
        temperature_B=np.array([0, 0.5, 0]),
        top_k_B=np.array([0, 6, 0]),
        top_p_B=np.array([1, 0.75, 1]),
        min_p_B=np.array([0, 0.25, 0]),
        repetition_penalty_B=np.array([1, 1.5, 1]),
        bias_BV=np.array([[0] * 6, [0, -2, 0, 0, 0.5, 0], [0] * 6]),
        seen_BV=np.array([[0] * 6, [1, 0, 1, 0, 0, 0], [0] * 6], bool),
    )
    jax.tree.map(np.testing.assert_array_equal, changed, expected)
    jax.tree.map(np.testing.assert_array_equal, compiled(changed, 1, Sampler.row(SamplingParams(), [], 6)), empty)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="logit_bias has the token 6; the vocabulary ends at 5"):
        Sampler.row(SamplingParams(logit_bias={0: 1.0, 6: 1.0}), [], 6)


def test_what_has_been_seen_grows_token_by_token() -> None:
    seen_BV = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    found_BTV = jax.jit(seen_along)(seen_BV, np.array([[3, 0, 1], [2, 2, 4]]))
    expected = [[{0}, {0, 3}, {0, 3}, {0, 1, 3}], [set(), {2}, {2}, {2, 4}]]
    assert [[set(np.flatnonzero(row).tolist()) for row in rows] for rows in np.asarray(found_BTV)] == expected
    np.testing.assert_array_equal(seen_along(seen_BV, np.zeros((2, 0), np.int32)), seen_BV[:, None])


def test_params_take_a_single_stop_and_lists_and_keep_copies() -> None:
    bias, ids = {5: 1}, [1, 2]
    params = SamplingParams(3, 0.5, 0.9, 7, stop="end", stop_token_ids=ids, logit_bias=bias, logprobs=0)  # type: ignore[arg-type]
    bias[6], ids[0] = 2, 9
    assert (params.max_tokens, params.temperature, params.top_p, params.seed) == (3, 0.5, 0.9, 7)
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("end",), (1, 2), {5: 1})
    assert dataclasses.replace(params, stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert dataclasses.replace(params, seed=8) == SamplingParams(
        3, 0.5, 0.9, 8, 0, 0.0, 1.0, {5: 1}, 0, ("end",), (1, 2), False
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens is 0; it must be at least 1"),
        ("max_tokens", 2.5, "max_tokens is 2.5; use an integer"),
        ("max_tokens", True, "max_tokens is True; use an integer"),
        ("seed", -1, "seed is -1; it must be an integer in 0..4294967295"),
        ("seed", 2**32, "seed is 4294967296; it must be an integer in 0..4294967295"),
        ("temperature", -0.1, r"temperature is -0.1; it cannot be negative \(0 is greedy\)"),
        ("temperature", math.nan, "temperature is nan; use a finite number"),
        ("temperature", math.inf, "temperature is inf; use a finite number"),
        ("temperature", "1", "temperature is '1'; use a finite number"),
        ("temperature", None, "temperature is None; use a finite number"),
        ("top_p", 0.0, r"top_p is 0.0; it must lie in \(0, 1\]"),
        ("top_p", 1.1, "top_p is 1.1"),
        ("top_p", math.nan, "top_p is nan; use a finite number"),
        ("top_k", -1, r"top_k is -1; it cannot be negative \(0 keeps every token\)"),
        ("top_k", 5.0, "top_k is 5.0; use an integer"),
        ("min_p", -0.1, r"min_p is -0.1; it must lie in \[0, 1\]"),
        ("min_p", 1.5, "min_p is 1.5"),
        ("repetition_penalty", 0.0, r"repetition_penalty is 0.0; it must be above 0 \(1 changes nothing\)"),
        ("repetition_penalty", False, "repetition_penalty is False; use a finite number"),
        ("logprobs", -1, r"logprobs is -1; it must lie in 0..20, or be None"),
        ("logprobs", 21, "logprobs is 21"),
        ("logprobs", True, "logprobs is True; use an integer"),
        ("ignore_eos", 1, "ignore_eos is 1; use True or False"),
        ("stop", None, "stop is None; use a string or a list of strings"),
        ("stop", ["a", 3], r"stop is \['a', 3\]; use a string or a list of strings"),
        ("stop", "", "stop is ''; an empty string would end every completion"),
        ("stop", ("a", "\ud83d\ude00"), r"stop has '\\ud83d\\ude00', which is no text"),
        ("stop", ("a", ""), r"stop is \('a', ''\); an empty string would end every completion"),
        ("stop_token_ids", 5, "stop_token_ids is 5; use a list of token ids"),
        ("stop_token_ids", "5", "stop_token_ids is '5'"),
        ("stop_token_ids", [1, -2], r"stop_token_ids is \[1, -2\]"),
        ("stop_token_ids", [True], r"stop_token_ids is \[True\]"),
        ("stop_token_ids", [1.0], r"stop_token_ids is \[1.0\]"),
        ("logit_bias", None, "logit_bias is None; use a dict from token id"),
        ("logit_bias", [(1, 2.0)], r"logit_bias is \[\(1, 2.0\)\]"),
        ("logit_bias", {"12": 1.0}, "logit_bias has the token '12'; token ids are integers from 0"),
        ("logit_bias", {-1: 1.0}, "logit_bias has the token -1"),
        ("logit_bias", {True: 1.0}, "logit_bias has the token True"),
        ("logit_bias", {4: -math.inf}, "logit_bias of token 4 is -inf; use a finite number"),
        ("logit_bias", {4: math.nan}, "logit_bias of token 4 is nan"),
        ("logit_bias", {4: True}, "logit_bias of token 4 is True"),
        ("logit_bias", {4: 10**400}, "logit_bias of token 4 is 1000"),
    ],
)
def test_params_that_make_no_sense_are_refused_in_one_line(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        SamplingParams(**{field: value})
    assert "\n" not in str(raised.value)
