"""The scheduler, rule by rule, and at length against a device that checks every place it reads."""

from __future__ import annotations

import random
from typing import Any

import hypothesis
import pytest
from hypothesis import stateful, strategies

from dsv3_jax.infer.cache import EngineConfig
from dsv3_jax.infer.request import Chunk, Sequence
from dsv3_jax.infer.scheduler import Scheduler
from tests.infer.fake_engine import VOCAB, Engine, complete

SIZES: dict[str, Any] = {
    "num_shards": 1,
    "slots_per_shard": 4,
    "pages_per_shard": 32,
    "page_size": 4,
    "max_length": 64,
    "chunk": 8,
    "drafts": 1,
}


def scheduler(**changes: Any) -> Scheduler:
    options = SIZES | changes
    prefix_cache = options.pop("prefix_cache", True)
    return Scheduler(EngineConfig(**options), prefix_cache=prefix_cache)


def submit(scheduler: Scheduler, prompt: list[int], max_tokens: int = 8) -> Sequence:
    sequence = Sequence(prompt, max_tokens)
    scheduler.submit(sequence)
    return sequence


def text(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


def test_what_can_never_fit_is_refused_at_once() -> None:
    small = scheduler(pages_per_shard=6)
    with pytest.raises(ValueError, match="the prompt is empty"):
        submit(small, [])
    with pytest.raises(ValueError, match="max_tokens is 0; it must be at least 1"):
        submit(small, [1], 0)
    with pytest.raises(ValueError, match="60 prompt tokens and max_tokens 5 are 65, more than max_length 64; shorten"):
        submit(small, text(60), 5)
    # 6 pages of 4 are 24 places: prompt + max_tokens + 2 * drafts + 1 = 22 + 3 is one too many.
    with pytest.raises(ValueError, match="14 prompt tokens and max_tokens 8 need 7 pages of 4 tokens, more than the 6"):
        submit(small, text(14), 8)
    assert small.idle
    submit(small, text(13), 8)
    assert not small.idle


def test_a_prompt_is_prefilled_in_chunks_and_decoded_from_the_next_step_on() -> None:
    engine = scheduler()
    sequence = submit(engine, text(18))
    assert engine.schedule().chunks == [Chunk(sequence, 0, text(8), 8)]
    assert engine.schedule().chunks == [Chunk(sequence, 8, text(8, 8), 16)]
    assert (sequence.state, sequence.cached) == ("prefilling", 16)
    step = engine.schedule()
    assert step.chunks == [Chunk(sequence, 16, [16, 17], None)]
    assert (sequence.state, sequence.cached, step.decoding) == ("running", 18, [])
    step = engine.schedule()
    assert (step.chunks, step.decoding) == ([], [sequence])


def test_a_chunk_that_ends_the_text_exactly_is_the_last() -> None:
    engine = scheduler()
    sequence = submit(engine, text(16))
    assert engine.schedule().chunks == [Chunk(sequence, 0, text(8), 8)]
    assert engine.schedule().chunks == [Chunk(sequence, 8, text(8, 8), None)]


def test_each_shard_prefills_one_sequence_a_step_oldest_first() -> None:
    engine = scheduler(num_shards=2)
    a, b, c, d = (submit(engine, [i] * 12) for i in range(4))
    chunks = [[(chunk.sequence, len(chunk.tokens)) for chunk in engine.schedule().chunks] for _ in range(4)]
    assert chunks == [[(a, 8), (b, 8)], [(a, 4), (b, 4)], [(c, 8), (d, 8)], [(c, 4), (d, 4)]]
    assert [(sequence.shard, sequence.slot) for sequence in (a, b, c, d)] == [(0, 0), (1, 4), (0, 1), (1, 5)]


def test_the_cache_holds_all_but_the_last_token_when_nothing_is_in_flight() -> None:
    engine = scheduler()
    sequence = submit(engine, text(6))
    engine.schedule()
    assert sequence.cached == 6
    assert engine.accept(sequence, 0, [20])
    assert (sequence.cached, sequence.tokens) == (6, [20])
    engine.schedule()
    assert engine.accept(sequence, 0, [21, 22])
    assert (sequence.cached, sequence.tokens) == (8, [20, 21, 22])


def test_tokens_past_max_tokens_are_cut_off() -> None:
    engine = scheduler(drafts=3)
    sequence = submit(engine, text(6), 3)
    engine.schedule()
    engine.accept(sequence, 0, [20])
    engine.schedule()
    engine.accept(sequence, 0, [21, 22, 23, 24])
    assert sequence.tokens == [20, 21, 22]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4])
def test_a_sequence_that_is_sure_to_be_done_is_not_decoded_again(max_tokens: int) -> None:
    """The last chunk yields one token, each decode step at least one; none of their results has been read."""
    engine = scheduler()
    sequence = submit(engine, text(6), max_tokens)
    decoded = [engine.schedule().decoding == [sequence] for _ in range(6)]
    assert decoded == [False] + [True] * (max_tokens - 1) + [False] * (6 - max_tokens)


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_pages_are_there_for_the_most_places_that_may_be_filled(drafts: int) -> None:
    engine = scheduler(drafts=drafts, page_size=1)
    sequence = submit(engine, text(6), 5)
    owned = []
    for _ in range(5):
        engine.schedule()
        owned.append(len(sequence.pages))
    bounds = [6 + (drafts + 1) * in_flight + 2 * drafts + 1 for in_flight in range(4)]
    most = 6 + 5 + 2 * drafts + 1
    assert owned == [6 + 2 * drafts + 2] + [max(6 + 2 * drafts + 2, min(bound, most)) for bound in bounds]


def test_pages_are_kept_when_fewer_tokens_come_than_there_could() -> None:
    engine = scheduler(drafts=3, page_size=1)
    sequence = submit(engine, text(6), 18)
    for _ in range(3):
        engine.schedule()
    owned = list(sequence.pages)
    for tokens in ([20], [21], [22]):
        engine.accept(sequence, 0, tokens)
    assert sequence.pages == owned
    # One more decode from 8 cached places needs no more than what is there.
    assert not engine.schedule().tables_changed
    assert sequence.pages == owned


def test_tables_change_when_a_slot_is_taken_grows_or_is_left() -> None:
    engine = scheduler(page_size=8, drafts=0)
    sequence = submit(engine, text(6), 20)
    changes = [engine.schedule().tables_changed for _ in range(4)]
    # 8 places at admission, for the prompt and two decode steps; the third needs the next page.
    assert changes == [True, False, False, True]
    engine.finish(sequence)
    assert [engine.schedule().tables_changed for _ in range(2)] == [True, False]


def test_results_after_the_end_are_ignored_and_a_second_end_does_nothing() -> None:
    engine = scheduler(prefix_cache=False)
    first, second, third = submit(engine, text(6)), submit(engine, text(6, 10)), submit(engine, text(6, 20))
    engine.schedule()
    engine.finish(first)
    assert (first.state, first.epoch, first.pages, first.slot, first.shard) == ("done", 1, [], None, None)
    assert not engine.accept(first, 0, [1])
    assert first.tokens == []
    engine.finish(first)
    engine.finish(first)
    assert first.epoch == 1
    engine.finish(second)
    engine.finish(third)
    assert engine.idle
    assert (engine.free_pages, engine.cached_pages) == (32, 0)


def test_one_that_waits_can_be_cancelled() -> None:
    engine = scheduler(slots_per_shard=1)
    first, second, third = (submit(engine, [i] * 4) for i in range(3))
    engine.schedule()
    engine.finish(second)
    engine.finish(first)
    assert [chunk.sequence for chunk in engine.schedule().chunks] == [third]


def test_nobody_overtakes_the_oldest_that_waits() -> None:
    engine = scheduler(pages_per_shard=10)
    # 16 + 4 places are 5 pages, 20 + 4 are 6, 1 + 4 are 2.
    first, large, small = submit(engine, text(16), 4), submit(engine, text(20, 20), 4), submit(engine, [1], 1)
    engine.schedule()
    assert [sequence.state for sequence in (first, large, small)] == ["prefilling", "waiting", "waiting"]
    engine.finish(first)
    engine.schedule()
    assert [sequence.state for sequence in (large, small)] == ["prefilling", "prefilling"]


def test_the_shard_with_most_room_is_chosen() -> None:
    engine = scheduler(num_shards=3)
    for length, shard in ((20, 0), (10, 1), (4, 2), (4, 2), (4, 1)):
        sequence = submit(engine, text(length, 100 * length))
        engine.schedule()
        assert sequence.shard == shard


def test_the_shard_that_knows_most_of_the_text_is_chosen_before_that_with_most_room() -> None:
    engine = scheduler(num_shards=2, slots_per_shard=2)
    first = submit(engine, text(20))
    for _ in range(3):
        engine.schedule()
    second = submit(engine, [*text(9), 50])
    engine.schedule()
    assert (first.shard, second.shard, second.reused) == (0, 0, 8)
    # No slot is left where it is known.
    third = submit(engine, [*text(9), 51])
    engine.schedule()
    assert (third.shard, third.reused) == (1, 0)


def test_the_youngest_gives_way_and_resumes_with_what_it_had() -> None:
    engine = scheduler(pages_per_shard=10, page_size=2, drafts=0, prefix_cache=False)
    # 8 + 2 places are 5 pages, 5 + 2 are 4.
    old, young = submit(engine, text(8), 8), submit(engine, text(5, 20), 4)
    engine.schedule()
    engine.accept(old, 0, [10])
    assert [chunk.sequence for chunk in engine.schedule().chunks] == [young]
    engine.accept(old, 0, [11])
    engine.accept(young, 0, [30])
    for token in (12, 13, 14):
        assert engine.schedule().decoding == [old, young]
        engine.accept(old, 0, [token])
    # `old` needs its seventh page. What `young` has in flight is lost with its own.
    step = engine.schedule()
    assert (step.decoding, step.chunks, engine.preemptions) == ([old], [], 1)
    assert (young.state, young.epoch, young.pages, young.tokens, young.cached) == ("waiting", 1, [], [30], 0)
    assert not engine.accept(young, 0, [31])
    newcomer = submit(engine, [1], 1)
    engine.finish(old)
    assert engine.schedule().chunks == [Chunk(young, 0, [*text(5, 20), 30], None)]
    assert newcomer.state == "prefilling"
    assert engine.accept(young, 1, [31])
    assert young.tokens == [30, 31]


def test_the_one_that_asks_gives_way_itself_if_it_is_the_youngest() -> None:
    engine = scheduler(pages_per_shard=10, page_size=2, drafts=0, prefix_cache=False)
    # 8 + 2 places are 5 pages, 6 + 2 are 4; the older one gets its only token from its chunk, and does not grow.
    old, young = submit(engine, text(8), 1), submit(engine, text(6, 20), 8)
    engine.schedule()
    engine.schedule()
    for _ in range(4):
        engine.accept(young, 0, [30])
        assert engine.schedule().decoding == [young]
    engine.accept(young, 0, [30])
    assert engine.schedule() == ([], [], True)
    assert (old.state, young.state, young.epoch, engine.preemptions) == ("running", "waiting", 1, 1)


def test_a_prefilling_one_gives_way_too() -> None:
    engine = scheduler(pages_per_shard=21, page_size=2, chunk=6, drafts=0, prefix_cache=False)
    # 6 + 2 places are 4 pages, 30 + 2 are 16.
    old, young = submit(engine, text(6), 8), submit(engine, text(30, 20), 1)
    for _ in range(5):
        engine.schedule()
    assert (young.state, young.cached) == ("prefilling", 24)
    step = engine.schedule()
    assert (step.decoding, step.chunks) == ([old], [])
    assert (young.state, young.cached, young.epoch) == ("waiting", 0, 1)


def test_a_later_sequence_computes_only_what_is_new() -> None:
    engine = scheduler()
    first = submit(engine, text(11))
    for _ in range(2):
        engine.schedule()
    second = submit(engine, [*text(10), 99])
    step = engine.schedule()
    assert step.chunks == [Chunk(second, 8, [8, 9, 99], None)]
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] not in first.pages
    assert second.reused == 8


def test_a_page_is_not_shared_before_the_token_that_follows_it() -> None:
    """Eight tokens fill two pages, but the second one's last MTP latent depends on the token still to be sampled."""
    engine = scheduler()
    first = submit(engine, text(8))
    engine.schedule()
    early = submit(engine, [*text(8), 49, 49])
    engine.schedule()
    assert early.reused == 4
    engine.accept(first, 0, [50])
    late, other = submit(engine, [*text(8), 50, 52]), submit(engine, [*text(8), 53, 54])
    engine.schedule()
    engine.schedule()
    assert (late.reused, other.reused) == (8, 4)
    assert late.pages[:2] == first.pages[:2]
    assert other.pages[:1] == first.pages[:1]


def test_generated_tokens_are_found_again_after_the_end() -> None:
    engine = scheduler(drafts=3)
    first = submit(engine, text(6))
    engine.schedule()
    for tokens in ([20], [21, 22, 23, 24], [25, 26]):
        engine.accept(first, 0, tokens)
        engine.schedule()
    engine.finish(first)
    # 13 tokens are known, and 12 latents: three pages, each with the token that follows it.
    assert engine.cached_pages == 3
    second = submit(engine, [*text(6), *text(7, 20), 99])
    engine.schedule()
    assert second.reused == 12


def test_of_those_that_arrive_together_only_the_first_computes_the_common_beginning() -> None:
    engine = scheduler()
    sequences = [submit(engine, [*text(20), 90 + i]) for i in range(3)]
    chunks = [(chunk.sequence, chunk.start) for _ in range(5) for chunk in engine.schedule().chunks]
    first, second, third = sequences
    # The fifth page is followed by a token of each one's own.
    assert chunks == [(first, 0), (first, 8), (first, 16), (second, 16), (third, 16)]
    assert [sequence.reused for sequence in sequences] == [0, 16, 16]
    assert second.pages[:4] == third.pages[:4] == first.pages[:4]
    assert len({page for sequence in sequences for page in sequence.pages}) == 32 - engine.free_pages


def test_without_a_prefix_cache_nothing_is_shared_or_kept() -> None:
    engine = scheduler(prefix_cache=False)
    first = submit(engine, text(20))
    for _ in range(3):
        engine.schedule()
    second = submit(engine, text(20))
    assert [chunk.start for chunk in engine.schedule().chunks] == [0]
    assert second.reused == 0
    assert not set(first.pages) & set(second.pages)
    engine.finish(first)
    engine.finish(second)
    assert (engine.free_pages, engine.cached_pages) == (32, 0)


def test_a_preempted_sequence_finds_its_own_pages() -> None:
    engine = scheduler(pages_per_shard=10, page_size=2, drafts=0)
    # 6 + 2 places are 4 pages, 8 + 2 are 5.
    old, young = submit(engine, text(6), 10), submit(engine, text(8, 20), 1)
    while young.epoch == 0:
        engine.schedule()
    engine.finish(old)
    # Of its 8 tokens, the last one is still to be computed: it was not known what follows the fourth page.
    assert engine.schedule().chunks == [Chunk(young, 6, [26, 27], None)]


def test_a_page_is_left_for_each_other_sequence_to_grow() -> None:
    """A newcomer that fits to the last page would have to give way as soon as another grows."""
    engine = scheduler(pages_per_shard=9, page_size=2, drafts=0)
    first, second = submit(engine, text(6), 4), submit(engine, text(8, 20), 2)
    engine.schedule()
    assert (len(first.pages), second.state) == (4, "waiting")
    engine.finish(first)
    engine.schedule()
    assert (len(second.pages), second.state) == (5, "running")


SHAPES = strategies.fixed_dictionaries(
    {
        "num_shards": strategies.integers(1, 2),
        "slots_per_shard": strategies.integers(1, 5),
        "pages_per_shard": strategies.integers(8, 14),
        "page_size": strategies.integers(1, 3),
        "max_length": strategies.integers(12, 24),
        "chunk": strategies.integers(1, 9),
        "drafts": strategies.integers(0, 3),
        "prefix_cache": strategies.sampled_from([True, True, False]),
    }
)
# Which of two texts the prompt is a beginning of, its length, max_tokens, and the token to stop at.
REQUESTS = strategies.tuples(
    strategies.integers(0, 1), strategies.integers(1, 14), strategies.integers(1, 12), strategies.sampled_from([None, None, 0])
)


class Traffic(stateful.RuleBasedStateMachine):
    """Any order of arrivals, cancellations and steps."""

    @stateful.initialize(sizes=SHAPES, seed=strategies.integers(0, 999))
    def start(self, sizes: dict[str, Any], seed: int) -> None:
        self.engine = Engine(sizes, seed)

    @stateful.rule(requests=strategies.lists(REQUESTS, min_size=1, max_size=6))
    def submit(self, requests: list[tuple[int, int, int, int | None]]) -> None:
        sizes = self.engine.sizes
        room = min(sizes["max_length"], sizes["page_size"] * sizes["pages_per_shard"] - 2 * sizes["drafts"] - 1)
        for first, length, max_tokens, stop in requests:
            prompt = [first, *complete([0], 13)][:length]
            if length + max_tokens > room:
                with pytest.raises(ValueError, match="shorten the prompt"):
                    self.engine.submit(prompt, max_tokens, stop)
            else:
                self.engine.submit(prompt, max_tokens, stop)

    @stateful.rule(which=strategies.integers(0, 20))
    def cancel(self, which: int) -> None:
        for sequence in self.engine.live[which : which + 1]:
            self.engine.cancel(sequence)

    @stateful.rule(count=strategies.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.drain()


TestTraffic = Traffic.TestCase
TestTraffic.settings = hypothesis.settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)


@pytest.mark.nightly
class TestMuchTraffic(TestTraffic):
    settings = hypothesis.settings(TestTraffic.settings, max_examples=600)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(("num_shards", "drafts"), [(1, 0), (1, 2), (2, 1)])
def test_a_busy_day(num_shards: int, drafts: int, prefix_cache: bool) -> None:
    """More to do than there is room for, so that everything happens: waiting, preemption, sharing, late results."""
    sizes = SIZES | {"num_shards": num_shards, "drafts": drafts, "prefix_cache": prefix_cache}
    sizes |= {"pages_per_shard": 18, "page_size": 2, "max_length": 28, "chunk": 5}
    rng = random.Random(7)
    engine = Engine(sizes, seed=7)
    for _ in range(600):
        if len(engine.live) < 6 * num_shards and rng.random() < 0.5:
            prompt = [rng.randrange(VOCAB), *complete([0], rng.randint(0, 13))]
            engine.submit(prompt, rng.randint(1, 14), rng.choice([None, None, 0]))
        if engine.live and rng.random() < 0.03:
            engine.cancel(rng.choice(engine.live))
        engine.step()
    engine.drain()
    seen = engine.seen
    assert min(seen["finished"], seen["preempted"], seen["dropped"], seen["chunks"]) > 10, seen
    assert seen["preempted"] == engine.scheduler.preemptions
    assert (seen["reused"] > 100 and seen["shared"] > 100) if prefix_cache else (seen["reused"] == seen["shared"] == 0), seen
