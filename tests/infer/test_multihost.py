"""What is asked of one engine, repeated by another: a dict stands for the processes' store, one process after the other."""

from __future__ import annotations

import dataclasses
import json
import re
import signal

import jax
import pytest

from dsv3_jax.infer import Engine, SamplingParams, multihost
from dsv3_jax.infer.request import Request
from dsv3_jax.infer.runner import Runner
from tests.model.tiny import MOE_ONLY, random_variables

MODEL = dataclasses.replace(MOE_ONLY, num_hidden_layers=1, eos_token_id=None)
# Log-probabilities are asked for everywhere, so that there is one set of programs.
TWENTY = SamplingParams(max_tokens=20, logprobs=2)
SIZES = {"max_batch": 2, "max_length": 48, "page_size": 16, "chunk": 16, "cache_tokens": 96, "drafts": 1}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two processes, of which this is the first."""
    told: dict[str, str] = {}

    def forget(folder: str) -> None:
        for key in [key for key in told if key.startswith(folder)]:
            del told[key]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "kv_set", told.__setitem__)
    monkeypatch.setattr(multihost, "kv_get", lambda key, *_: told[key])
    monkeypatch.setattr(multihost, "kv_delete", forget)
    return told


def make_engine(seed: int = 0) -> Engine:
    return Engine(MODEL, random_variables(MODEL, seed), **SIZES)


@pytest.fixture(scope="module")
def engines() -> tuple[Engine, Engine]:
    return make_engine(), make_engine()


def _follow(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Everything that a follower is asked for, in order."""
    requests, submit = [], engine.submit

    def noted(*args: object) -> object:
        requests.append(submit(*args))
        return requests[-1]

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(engine, "submit", noted)
    multihost.follower(engine)
    return requests


def test_every_call_is_repeated(store: dict[str, str], engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and drawn, biased and stopped, more requests than slots and pages, one cancelled on its way."""
    first, other = engines
    drawn = SamplingParams(
        max_tokens=9, temperature=0.8, top_p=0.9, seed=3, logit_bias={4: 2.5}, stop_token_ids=(7,), logprobs=2
    )
    warmed = []
    monkeypatch.setattr(Runner, "warm_up", lambda runner: warmed.append(runner))
    with multihost.leader(first):
        first.warm_up()
        requests = [first.submit([1 + i, 2, 3, 4 * i], params) for i, params in enumerate((drawn, TWENTY, drawn))]
        for _ in range(5):
            first.step()
        first.cancel(requests[1])
        streamed = list(first.stream([5] * 20, dataclasses.replace(TWENTY, max_tokens=6)))
        four = dataclasses.replace(TWENTY, max_tokens=4)
        generated = [completion.tokens for completion in first.generate([[1, 2], [3]], four)]
        assert requests[1].finish_reason == "cancelled"
        assert 0 < len(requests[1].tokens) < TWENTY.max_tokens
    repeated = _follow(other, monkeypatch)
    assert [request.tokens for request in repeated] == [*(request.tokens for request in requests), streamed, *generated]
    assert [request.params for request in repeated[:3]] == [request.params for request in requests]
    assert other.idle
    assert other.counts == first.counts
    assert warmed == [first._runner, other._runner]


def test_what_all_have_read_is_removed(
    store: dict[str, str], engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multihost, "CALLS_OF_A_PAGE", 4)
    monkeypatch.setattr(multihost, "kv_get", lambda key, *_: store[key] if "/read/" not in key else store.get(key, "read"))
    with multihost.leader(engines[0]):
        tokens = list(engines[0].stream([1, 2, 3], TWENTY))
    assert len(tokens) == 20
    pages = {int(key.split("/")[2]) for key in store}
    assert max(pages) >= 3
    assert pages == {max(pages) - 1, max(pages)}


def test_a_process_that_reads_says_how_far(
    store: dict[str, str], engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with multihost.leader(engines[0]):
        list(engines[0].stream([1, 2, 3], dataclasses.replace(TWENTY, max_tokens=3)))
    calls = list(store.values())
    monkeypatch.setattr(multihost, "CALLS_OF_A_PAGE", 2)
    store.clear()
    store |= {f"dsv3_jax/lockstep/{i // 2}/{i % 2}": call for i, call in enumerate(calls)}
    _follow(engines[1], monkeypatch)
    assert {key for key in store if "/read/" in key} == {
        f"dsv3_jax/lockstep/{page}/read/1" for page in range((len(calls) - 1) // 2)
    }


def test_after_a_step_that_was_broken_off_nothing_goes_on(
    store: dict[str, str], engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor without `leader`, where each process asks its own engine."""
    engine = make_engine()

    def broken_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_step", broken_off)
    with multihost.leader(engine):
        engine.submit([1, 2, 3], TWENTY)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        with pytest.raises(RuntimeError, match="start all of them"):
            engine.submit([1])
    assert [json.loads(call)[0] for call in store.values()] == ["submit", "step", "end"]
    with pytest.raises(ValueError, match="process 0 broke off a step"):
        _follow(engines[1], monkeypatch)
    engines[1].cancel(next(iter(engines[1]._requests.values())))
    alone = make_engine()
    monkeypatch.setattr(alone, "_step", broken_off)
    with pytest.raises(KeyboardInterrupt):
        alone.step()
    with pytest.raises(RuntimeError, match="start all of them"):
        alone.submit([1])


def test_a_call_that_may_not_have_been_told_is_the_last(
    store: dict[str, str], engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def interrupted(*_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(multihost, "kv_set", interrupted)
    with multihost.leader(engine):
        with pytest.raises(KeyboardInterrupt):
            engine.submit([1])
        with pytest.raises(RuntimeError, match="start all of them"):
            engine.step()


def test_an_error_of_input_ends_the_others_in_the_same_line(
    store: dict[str, str], engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary") as error, multihost.leader(engines[0]):
        engines[0].submit([10**6])
    with pytest.raises(ValueError, match=f"^{re.escape(str(error.value))}$"):
        _follow(engines[1], monkeypatch)


def test_other_tokens_are_noticed(
    store: dict[str, str], engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of a model with other weights."""
    first = make_engine(seed=1)
    with multihost.leader(first):
        list(first.stream([1, 2, 3], TWENTY))
    other = make_engine()
    with pytest.raises(RuntimeError, match="process 1 has come to other tokens than process 0"):
        _follow(other, monkeypatch)


def test_signals_are_left_to_process_0(
    store: dict[str, str], engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = signal.SIGTERM, signal.SIGINT
    before, during = [signal.getsignal(number) for number in numbers], []
    monkeypatch.setattr(engines[1], "step", lambda: during.append([signal.getsignal(number) for number in numbers]))
    with multihost.leader(engines[0]):
        engines[0].step()
    _follow(engines[1], monkeypatch)
    assert during == [[signal.SIG_IGN] * 2]
    assert [signal.getsignal(number) for number in numbers] == before


def test_one_process_tells_nobody(engines: tuple[Engine, Engine]) -> None:
    tell = engines[0].tell
    with multihost.leader(engines[0]):
        assert engines[0].tell is tell
