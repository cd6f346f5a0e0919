"""The engine against the model run over the whole sequence again for every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer
from dsv3_jax.infer import Completion, Engine, SamplingParams
from dsv3_jax.infer.runner import decode, prefill
from dsv3_jax.model import DeepSeekV3
from tests.infer.talkative import BROKEN, make_broken_engine, make_engine
from tests.model.tiny import CONFIG, random_variables

# An MoE layer, and a token for every byte; without an end token, so that completions have the length that is asked for.
ENDLESS = dataclasses.replace(
    CONFIG, vocab_size=270, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, eos_token_id=None
)
CONTEXT = ENDLESS.max_position_embeddings
# Of every engine that generates here: all of them share their programs.
SIZES: dict[str, Any] = {"max_batch": 4, "chunk": 32, "page_size": 5}
PROMPTS = [[5], [3, 8, 21, 2], [int(i) for i in np.random.default_rng(0).integers(0, 29, 17)]]
TEN = SamplingParams(max_tokens=10)
TEXTS = ["def f(x):", "for i in range(3): print(i)"]

Greedy = Callable[[list[int], int], list[int]]


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    """They belong to a device, as those of a checkpoint do."""
    return jax.device_put(random_variables(ENDLESS), jax.devices()[0])


def programs() -> np.ndarray:
    """Entries in jax's caches of prefill and decode: one more is one more compilation."""
    return np.array([prefill._cache_size(), decode._cache_size()])


@pytest.fixture(scope="module")
def counted(variables: dict[str, Any]) -> tuple[Engine, list[list[int]]]:
    """The module's first engine, and how many programs it had after each of the first things asked of it."""
    before, engine, counts = programs(), Engine(ENDLESS, variables, **SIZES), []
    drawn = SamplingParams(max_tokens=20, temperature=0.7, top_p=0.9, seed=3, logit_bias={3: 1.0}, repetition_penalty=1.2)
    asked = (PROMPTS[:2], SamplingParams(max_tokens=25)), ([PROMPTS[2][:9], PROMPTS[0]], drawn), ([PROMPTS[2]], TEN)
    for prompts, params in asked:
        assert all(len(completion.tokens) == params.max_tokens for completion in engine.generate(prompts, params))
        counts.append((programs() - before).tolist())
    engine.warm_up()
    return engine, [*counts, (programs() - before).tolist()]


@pytest.fixture(scope="module")
def engine(counted: tuple[Engine, list[list[int]]]) -> Engine:
    return counted[0]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 3, 270, ["<bos>", "<eos>"])


@pytest.fixture(scope="module")
def greedy(variables: dict[str, Any]) -> Greedy:
    """The most likely tokens, each from the whole sequence's logits; padded to one length, so that it compiles once."""
    model = jax.jit(DeepSeekV3(ENDLESS).apply)

    def complete(prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            padded = np.zeros((1, CONTEXT), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(np.argmax(model(variables, padded).logits[0, len(tokens) - 1])))
        return tokens[len(prompt) :]

    return complete


def test_greedy_completions_of_a_mixed_batch_are_those_of_the_whole_sequences(engine: Engine, greedy: Greedy) -> None:
    """Three prompts in four rows: the fourth is padding."""
    completions = list(engine.generate(PROMPTS, TEN))
    assert completions == [Completion(greedy(prompt, 10), None, "length") for prompt in PROMPTS]
    assert len({tuple(completion.tokens) for completion in completions}) == 3


def test_a_batch_gives_each_prompt_what_it_gets_alone(engine: Engine) -> None:
    together = [completion.tokens for completion in engine.generate(PROMPTS, TEN)]
    assert together == [list(engine.stream(prompt, TEN)) for prompt in PROMPTS]
    assert together == [next(engine.generate([prompt], TEN)).tokens for prompt in PROMPTS]


def test_decode_compiles_once_and_prefill_once_a_length(counted: tuple[Engine, list[list[int]]]) -> None:
    """Nor does another length, way of sampling or seed make another program; warming up makes those that are left.

    Prefill has programs for 16 and for 32 tokens, as a first chunk and as a later one.
    """
    assert counted[1] == [[1, 1], [1, 1], [2, 1], [4, 1]]


def test_a_warm_engine_compiles_nothing_more(
    engine: Engine, variables: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing has come of warming it up."""
    compiled, fresh = programs(), Engine(ENDLESS, variables, **SIZES)
    fresh.warm_up()
    prompts = [[5], list(range(20)), [7] * 40, [7] * 40, [*range(20), 3, 4]]
    with jax.log_compiles():
        found = list(fresh.generate(prompts, TEN))
    assert [record.getMessage() for record in caplog.records if "XLA compilation" in record.getMessage()] == []
    assert programs().tolist() == compiled.tolist()
    assert found == list(Engine(ENDLESS, variables, **SIZES).generate(prompts, TEN))


def test_only_tokens_leave_the_device(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads an array's values goes through `_value`; a CPU, whose memory is the host's, heeds no transfer guard."""
    kind, read = type(jnp.ones(1)), []
    value = kind._value
    monkeypatch.setattr(kind, "_value", property(lambda array: read.append(array) or value.fget(array)))
    assert float(jnp.ones(1)[0]) == 1
    assert len(read) == 1
    read.clear()
    with jax.transfer_guard_device_to_host("disallow"):
        assert len(next(engine.generate([PROMPTS[1]], TEN)).tokens) == 10
    # The tokens of a prefill and of nine steps, and how many they are.
    assert sorted(array.shape for array in read) == [(1,), (1, 1), *[(4,)] * 9, *[(4, 1)] * 9]
    assert {array.dtype for array in read} == {jnp.dtype("int32")}


def test_more_prompts_than_rows_come_in_order(engine: Engine, greedy: Greedy) -> None:
    prompts = [[i, i + 1] for i in range(6)]
    completions = engine.generate(iter(prompts), SamplingParams(max_tokens=3))
    assert [completion.tokens for completion in completions] == [greedy(prompt, 3) for prompt in prompts]


@pytest.mark.parametrize("length", [40, CONTEXT - 3, CONTEXT - 1])
def test_a_completion_ends_with_the_context(engine: Engine, greedy: Greedy, length: int) -> None:
    prompt = (PROMPTS[2] * 4)[:length]
    (completion,) = engine.generate([prompt], SamplingParams(max_tokens=1000))
    assert completion == Completion(greedy(prompt, CONTEXT - length), None, "length")


def test_a_short_and_a_long_prompt_end_at_their_own_limits(engine: Engine, greedy: Greedy) -> None:
    long = (PROMPTS[2] * 4)[: CONTEXT - 2]
    completions = list(engine.generate([[5], long], SamplingParams(max_tokens=30)))
    assert [len(completion.tokens) for completion in completions] == [30, 2]
    assert [completion.tokens for completion in completions] == [greedy([5], 30), greedy(long, 2)]


def test_max_length_is_the_context_of_an_engine(variables: dict[str, Any], greedy: Greedy) -> None:
    short = Engine(ENDLESS, variables, **SIZES, max_length=60)
    assert next(short.generate([[5, 3]], SamplingParams(max_tokens=1000))).tokens == greedy([5, 3], 58)
    message = r"60 tokens leave no room in max_length 60 \(the model's context is 64\); shorten it or raise max_length$"
    with pytest.raises(ValueError, match=message):
        short.generate([[1] * 60])


@pytest.mark.parametrize(("dtype", "drafts"), [("float32", 2), ("bfloat16", 0)])
def test_the_cache_takes_what_its_formula_says(dtype: str, drafts: int) -> None:
    config = dataclasses.replace(ENDLESS, num_nextn_predict_layers=1, dtype=dtype)
    engine = Engine(config, random_variables(config), max_batch=3, max_length=50, page_size=16, drafts=drafts)
    layers, values = config.num_hidden_layers + (drafts > 0), config.kv_lora_rank + config.qk_rope_head_dim
    # A sequence may be 50 tokens long, and a step writes up to 2 n + 1 places further.
    assert engine.sizes.cache_tokens == 3 * 16 * -(-(50 + 2 * drafts + 1) // 16)
    assert engine.cache_bytes == engine.sizes.cache_tokens * layers * values * jnp.dtype(dtype).itemsize
    assert engine.cache_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(engine._runner._cache))
    assert f"for {engine.sizes.cache_tokens} tokens" in engine.describe()[0]
    # Of up to 49 tokens of a prompt.
    assert "to prefill 16, 32, 64 tokens" in engine.describe()[1]


def first_met(tokens: list[int]) -> int:
    """An index, 2 or more, of a token that appears there for the first time."""
    return next(i for i in range(2, len(tokens)) if tokens[i] not in tokens[:i])


@pytest.fixture
def ending(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Gives the engine's model other tokens that end a text, of which no program knows."""
    return lambda ends: monkeypatch.setattr(engine, "config", dataclasses.replace(ENDLESS, eos_token_id=ends))


@pytest.mark.parametrize("several", [False, True])
def test_an_end_token_stops_its_sequence_and_is_left_out(
    engine: Engine, greedy: Greedy, ending: Callable[[Any], None], several: bool
) -> None:
    expected = [greedy(prompt, 10) for prompt in PROMPTS]
    index = first_met(expected[1])
    end = expected[1][index]
    unused = next(i for i in range(ENDLESS.vocab_size) if not any(i in tokens for tokens in expected))
    ending((unused, end) if several else end)
    completions = list(engine.generate(PROMPTS, TEN))
    assert completions[1] == Completion(expected[1][:index], None, "stop")
    for completion, tokens in zip(completions, expected, strict=True):
        cut = tokens.index(end) if end in tokens else 10
        assert completion == Completion(tokens[:cut], None, "stop" if cut < 10 else "length")


def test_an_end_token_at_once_leaves_an_empty_completion(engine: Engine, greedy: Greedy, ending: Callable[[Any], None]) -> None:
    ending(greedy(PROMPTS[0], 1)[0])
    assert list(engine.generate([PROMPTS[0]], TEN)) == [Completion([], None, "stop")]
    assert list(engine.stream(PROMPTS[0], TEN)) == []


def test_an_end_token_in_place_of_the_last_is_a_stop(engine: Engine, greedy: Greedy, ending: Callable[[Any], None]) -> None:
    tokens = greedy(PROMPTS[1], 10)
    index = first_met(tokens)
    ending(tokens[index])
    limits = SamplingParams(max_tokens=index), SamplingParams(max_tokens=index + 1)
    completions = [next(engine.generate([PROMPTS[1]], params)) for params in limits]
    assert completions == [Completion(tokens[:index], None, "length"), Completion(tokens[:index], None, "stop")]


def test_draws_depend_on_the_seed_and_not_on_what_shares_the_batch(engine: Engine) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.5, top_p=0.95, seed=40)
    prompts = [*PROMPTS, [7], [9, 9], [1, 2, 3]]
    together = [completion.tokens for completion in engine.generate(prompts, params)]
    for i, prompt in enumerate(prompts):
        alone = dataclasses.replace(params, seed=40 + i)
        assert list(engine.stream(prompt, alone)) == together[i]
    same_prompt = [completion.tokens for completion in engine.generate([[5]] * 4, params)]
    assert len({tuple(tokens) for tokens in same_prompt}) > 1
    assert [completion.tokens for completion in engine.generate([[5]] * 4, params)] == same_prompt


def test_stream_gives_tokens_as_they_come(engine: Engine) -> None:
    before = engine.steps
    stream = engine.stream(PROMPTS[1], TEN)
    for taken in range(10):
        next(stream)
        # The first token is prefill's.
        assert engine.steps == before + taken
    assert next(stream, None) is None
    assert engine.steps == before + 9
    assert engine.idle


def test_streams_that_take_turns_each_get_all_of_theirs(engine: Engine) -> None:
    alone = [list(engine.stream(prompt, TEN)) for prompt in PROMPTS]
    in_turn = zip(*(engine.stream(prompt, TEN) for prompt in PROMPTS), strict=True)
    assert [list(tokens) for tokens in zip(*in_turn, strict=True)] == alone


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_a_step_that_is_broken_off_ends_all_and_leaves_nothing_behind(
    variables: dict[str, Any], greedy: Greedy, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """Its pages, published when the step was planned, hold nothing; arrays that were given away are gone."""
    engine = Engine(ENDLESS, variables, **SIZES)

    def breaks(*_: Any, **__: Any) -> None:
        jax.tree.map(lambda leaf: leaf.delete(), engine._runner._cache)
        raise KeyboardInterrupt

    # Two of them wait.
    requests = [engine.submit(prompt, TEN) for prompt in PROMPTS * 2]
    with monkeypatch.context() as broken:
        broken.setattr(engine._runner, program, breaks)
        if program == "decode":
            engine.step()
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert engine.idle
    assert {request.finish_reason for request in requests} == {"cancelled"}
    for request in requests:
        engine.cancel(request)
    assert [each.tokens for each in engine.generate(PROMPTS, TEN)] == [greedy(prompt, 10) for prompt in PROMPTS]


def test_a_stream_that_is_left_frees_what_it_held(engine: Engine) -> None:
    stream = engine.stream(PROMPTS[1], TEN)
    next(stream)
    assert not engine.idle
    stream.close()
    engine.step()
    assert engine.idle


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty; give at least one token"),
        (list(range(25)) * 3, r"75 tokens leave no room in max_length 64 \(the model's context is 64\); shorten it$"),
        ([1] * CONTEXT, "64 tokens leave no room"),
        ([3, 270], "token id 270 is outside the vocabulary of 270"),
        ([-1], "token id -1 is outside the vocabulary"),
        ([1.0, 2.0], r"the prompt \[1.0, 2.0\] is neither text nor a list of token ids, which are integers; pass a list"),
        (["1"], r"the prompt \['1'\] is neither text nor a list of token ids"),
        (7, "the prompt 7 is neither text nor a list of token ids"),
        ([[1, 2]], r"the prompt \[\[1, 2\]\] is neither text nor a list of token ids"),
        ("text", "the prompt is text, but the engine has no tokenizer; pass token ids, or a tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_completed_is_refused_before_anything_is_generated(
    engine: Engine, prompt: Any, message: str
) -> None:
    before = prefill._cache_size()
    with pytest.raises(ValueError, match=message):
        engine.generate([[5], prompt])
    with pytest.raises(ValueError, match=message):
        engine.stream(prompt)
    assert prefill._cache_size() == before


def test_one_string_is_no_list_of_prompts(engine: Engine) -> None:
    with pytest.raises(ValueError, match="prompts is one string; pass a list of prompts"):
        engine.generate("text")


def test_an_engine_that_cannot_be_is_refused(variables: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_batch is 0; it must be at least 1"):
        Engine(ENDLESS, variables, max_batch=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 20},
            r"params/embed/embedding is \[270, 24\], not \[270, 20\]; give the config and the variables of one",
        ),
        ({"num_hidden_layers": 2}, r"params/moe_layers/.* is \[1, .*\], not \[2, "),
        ({"num_nextn_predict_layers": 1}, r"params/mtp_0/.* is missing, not \["),
    ],
)
def test_variables_of_another_model_are_refused(variables: dict[str, Any], changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Engine(dataclasses.replace(ENDLESS, **changes), variables)


def test_ids_of_other_kinds_of_integers_will_do(engine: Engine) -> None:
    expected = list(engine.stream([5, 3], TEN))
    for prompt in (np.array([5, 3], np.uint16), jnp.array([5, 3]), (np.int64(5), 3)):
        assert list(engine.stream(prompt, TEN)) == expected


def test_weights_are_held_in_the_computation_dtype(variables: dict[str, Any]) -> None:
    engine = Engine(dataclasses.replace(ENDLESS, dtype="bfloat16"), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(engine._runner._variables["params"])} == {jnp.dtype("bfloat16")}
    chex.assert_trees_all_equal(
        engine._runner._variables["router"]["moe_layers_0"],
        jax.tree.map(lambda leaf: leaf[0], variables["router"]["moe_layers"]),
    )


def test_text_goes_in_after_the_bos_token_and_comes_out(
    engine: Engine, tokenizer: Tokenizer, variables: dict[str, Any]
) -> None:
    with_text = Engine(ENDLESS, variables, tokenizer, **SIZES)
    expected = list(engine.generate([[0, *tokenizer.encode(text)] for text in TEXTS], TEN))
    found = list(with_text.generate(TEXTS, TEN))
    assert [completion.tokens for completion in found] == [completion.tokens for completion in expected]
    assert [completion.text for completion in found] == [tokenizer.decode(completion.tokens) for completion in expected]
    assert any(completion.text for completion in found)
    assert list(with_text.stream(TEXTS[0], TEN)) == expected[0].tokens
    # Token ids are taken as they are.
    assert list(with_text.stream([0, *tokenizer.encode(TEXTS[0])], TEN)) == expected[0].tokens


def test_text_without_a_bos_token_goes_in_as_it_is(engine: Engine, tokenizer: Tokenizer, variables: dict[str, Any]) -> None:
    bare = Engine(ENDLESS, variables, tokenizer, **SIZES)
    bare.config = dataclasses.replace(ENDLESS, bos_token_id=None)
    assert list(bare.stream(TEXTS[0], TEN)) == list(engine.stream(tokenizer.encode(TEXTS[0]), TEN))
    with pytest.raises(ValueError, match="the prompt is empty"):
        bare.stream("")


def test_a_tokenizer_too_large_for_the_model_is_noticed(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "tokenizer", tokenizer)
    monkeypatch.setattr(engine, "config", dataclasses.replace(ENDLESS, vocab_size=29))
    with pytest.raises(ValueError, match="is outside the vocabulary of 29"):
        engine.generate(["~"])


@pytest.mark.parametrize("several", [False, True])
def test_logits_that_are_not_finite_end_a_request_and_no_other(several: bool) -> None:
    """Nor those that get its pages later; in prefill, and in decode of a sequence that draws the broken token."""
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    drawing = dataclasses.replace(params, logit_bias={BROKEN: 100.0})
    options: dict[str, Any] = {"max_batch": 4 if several else 1, "max_length": 64, "cache_tokens": 64 * 4}
    good = [[5, 9, 3], [3] * 20, [11, 4]]
    alone = [completion.tokens for completion in make_engine(**options).generate(good, params)]
    engine = make_broken_engine(**options)
    prompts = [good[0], [BROKEN] + [5] * 30, good[1], [8, 9], good[2]]
    found = list(engine.generate(prompts, [params, params, params, drawing, params]))
    assert [one.finish_reason for one in found] == ["length", "error", "length", "error", "length"]
    assert [found[i].tokens for i in (0, 2, 4)] == alone
    assert "the model's logits after 31 tokens are not finite" in found[1].error
    assert found[3].tokens == [BROKEN]
    assert [one.error for one in found[::2]] == [None] * 3
    # Every page of the pool has been used by now, those of the broken ones too.
    for _ in range(4):
        assert [completion.tokens for completion in engine.generate(good, params)] == alone


def test_programs_are_compiled_before_requests_and_not_among_them() -> None:
    engine = make_engine()
    request = engine.submit([5, 9], SamplingParams(max_tokens=3))
    with pytest.raises(ValueError, match="warm_up is called while requests are active"):
        engine.warm_up()
    engine.cancel(request)
