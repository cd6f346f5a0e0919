"""A device without a model, and an engine that drives it one step behind, to see what a schedule does to texts.

The next token is a function of the whole text so far. The device keeps in each place what a latent there would depend
on: the token for the main layers, the token and the next one for the MTP layer. It checks all of them before it goes on,
so a page that is shared wrongly, recycled too early or never written is found where it is read.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections import Counter
from typing import Any

from dsv3_jax.infer.cache import EngineConfig
from dsv3_jax.infer.request import Chunk, Sequence, Step
from dsv3_jax.infer.scheduler import Scheduler

VOCAB = 3
JUNK = (-1, -1)

Result = tuple[Sequence, int, list[int]]


def next_token(text: list[int]) -> int:
    return zlib.crc32(bytes(text)) % VOCAB


def complete(prompt: list[int], max_tokens: int, stop: int | None = None) -> list[int]:
    """What a sequence must get, whatever shares the device with it."""
    text = list(prompt)
    while len(text) < len(prompt) + max_tokens and (len(text) == len(prompt) or text[-1] != stop):
        text.append(next_token(text))
    return text[len(prompt) :]


@dataclasses.dataclass
class Slot:
    text: list[int]
    """All but the last of it are in the cache."""
    table: list[int]


class Device:
    """Pages that hold tokens; chunks and decode steps that check and write them."""

    def __init__(self, sizes: dict[str, Any], rng: random.Random) -> None:
        self.page_size, self.drafts = sizes["page_size"], sizes["drafts"]
        self.main: dict[tuple[int, int, int], int] = {}
        self.mtp: dict[tuple[int, int, int], tuple[int, int]] = {}
        self.slots = [Slot([], []) for _ in range(sizes["num_shards"] * sizes["slots_per_shard"])]
        self.rng = rng

    def dispatch(self, step: Step, live: list[Sequence]) -> list[Result]:
        if step.tables_changed:
            for sequence in live:
                if sequence.slot is not None:
                    self.slots[sequence.slot].table = list(sequence.pages)
        for sequence in [*step.decoding, *(chunk.sequence for chunk in step.chunks)]:
            assert self.slots[sequence.slot].table == sequence.pages
        sampled = [(chunk.sequence, chunk.sequence.epoch, self.prefill(chunk)) for chunk in step.chunks]
        decoded = [(sequence, sequence.epoch, self.decode(sequence)) for sequence in step.decoding]
        return [result for result in sampled if result[2]] + decoded

    def prefill(self, chunk: Chunk) -> list[int]:
        sequence, stop = chunk.sequence, chunk.start + len(chunk.tokens)
        text = sequence.prompt + sequence.tokens
        assert chunk.tokens == text[chunk.start : stop]
        self.check(sequence, text, chunk.start)
        last = stop == len(text)
        assert chunk.following == (None if last else text[stop])
        if last:
            text = [*text, next_token(text)]
            self.slots[sequence.slot].text = text
        for position in range(chunk.start, stop):
            self.write(sequence, position, main=text[position], mtp=(text[position], text[position + 1]))
        if last:
            for position in range(stop, stop + self.drafts - 1):
                self.write(sequence, position, mtp=JUNK)
        return text[stop:] if last else []

    def decode(self, sequence: Sequence) -> list[int]:
        slot = self.slots[sequence.slot]
        length = len(slot.text) - 1
        most = len(sequence.prompt) + sequence.max_tokens
        self.check(sequence, slot.text, min(length, most))
        assert len(slot.table) * self.page_size >= min(length + 2 * self.drafts + 1, most + 2 * self.drafts + 1)
        new = complete(slot.text, self.rng.randint(1, self.drafts + 1))
        slot.text = slot.text + new
        for position in range(length, length + 2 * self.drafts + 1):
            if position < length + len(new):
                self.write(sequence, position, main=slot.text[position], mtp=(slot.text[position], slot.text[position + 1]))
            else:
                self.write(sequence, position, main=JUNK[0] if position <= length + self.drafts else None, mtp=JUNK)
        return new

    def check(self, sequence: Sequence, text: list[int], count: int) -> None:
        """The first `count` places hold the latents of `text`."""
        for position in range(count):
            where = self.where(sequence, position)
            assert self.main.get(where) == text[position], f"place {position} of {text}"
            assert self.mtp.get(where) == (text[position], text[position + 1]), f"MTP place {position} of {text}"

    def write(self, sequence: Sequence, position: int, *, mtp: tuple[int, int], main: int | None = None) -> None:
        if position < len(sequence.pages) * self.page_size:
            self.mtp[self.where(sequence, position)] = mtp
            if main is not None:
                self.main[self.where(sequence, position)] = main

    def where(self, sequence: Sequence, position: int) -> tuple[int, int, int]:
        return sequence.shard, self.slots[sequence.slot].table[position // self.page_size], position % self.page_size


class Engine:
    """The loop around a scheduler, with all that must hold after every step."""

    def __init__(self, sizes: dict[str, Any], seed: int = 0) -> None:
        self.sizes = sizes
        options = dict(sizes)
        prefix_cache = options.pop("prefix_cache", True)
        self.scheduler = Scheduler(EngineConfig(**options), prefix_cache=prefix_cache)
        self.device = Device(sizes, random.Random(seed))
        self.live: list[Sequence] = []
        self.stops: dict[Sequence, int | None] = {}
        self.pending: list[Result] = []
        self.seen: Counter[str] = Counter()

    def submit(self, prompt: list[int], max_tokens: int, stop: int | None = None) -> Sequence:
        sequence = Sequence(prompt, max_tokens)
        self.scheduler.submit(sequence)
        self.live.append(sequence)
        self.stops[sequence] = stop
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.live.remove(sequence)
        expected = complete(sequence.prompt, sequence.max_tokens, self.stops[sequence])
        assert sequence.tokens == expected[: len(sequence.tokens)]

    def step(self) -> Step:
        before = {sequence: dataclasses.replace(sequence) for sequence in self.live}
        step = self.scheduler.schedule()
        self.check_order(before, step)
        dispatched = self.device.dispatch(step, self.live)
        for sequence, epoch, tokens in self.pending:
            self.receive(sequence, epoch, tokens)
        self.pending = dispatched
        self.check_pages()
        return step

    def receive(self, sequence: Sequence, epoch: int, tokens: list[int]) -> None:
        old, stop = list(sequence.tokens), self.stops[sequence]
        taken = self.scheduler.accept(sequence, epoch, tokens)
        assert taken == (epoch == sequence.epoch)
        if not taken:
            assert sequence.tokens == old
            self.seen["dropped"] += 1
            return
        assert sequence.tokens == (old + tokens)[: sequence.max_tokens]
        new = sequence.tokens[len(old) :]
        if stop in new:
            sequence.tokens = old + new[: new.index(stop) + 1]
        if stop in new or len(sequence.tokens) == sequence.max_tokens:
            assert sequence.tokens == complete(sequence.prompt, sequence.max_tokens, stop)
            self.scheduler.finish(sequence)
            self.live.remove(sequence)
            self.seen["finished"] += 1

    def drain(self) -> None:
        """Everything ends, and leaves nothing behind."""
        work = sum(len(sequence.prompt) + sequence.max_tokens for sequence in self.live)
        steps = 0
        while not self.scheduler.idle:
            self.step()
            steps += 1
            assert steps <= 3 * work, "no end"
        assert not self.live
        self.step()
        pages = self.sizes["num_shards"] * self.sizes["pages_per_shard"]
        assert self.scheduler.free_pages + self.scheduler.cached_pages == pages

    def check_order(self, before: dict[Sequence, Sequence], step: Step) -> None:
        """Who was admitted, preempted, decoded and prefilled is who should be."""
        preempted = {sequence for sequence, old in before.items() if old.epoch != sequence.epoch}
        admitted = [s for s in self.live if s.slot is not None and (before[s].slot is None or s in preempted)]
        waiting = [sequence.arrival for sequence in self.live if sequence.state == "waiting"]
        assert all(sequence.arrival < arrival for sequence in admitted for arrival in waiting), "overtaken"
        for shard in range(self.sizes["num_shards"]):
            here = sorted((s for s, old in before.items() if old.shard == shard), key=lambda s: s.arrival)
            stayed = [sequence for sequence in here if sequence not in preempted]
            assert stayed == here[: len(stayed)], "an older one was preempted"
            assert not here or stayed, "nobody was left"
            chunks = [chunk for chunk in step.chunks if chunk.sequence.shard == shard]
            prefilling = [s.arrival for s in self.live if s.shard == shard and s.state == "prefilling"]
            assert len(chunks) <= 1
            assert all(chunk.sequence.arrival <= arrival for chunk in chunks for arrival in prefilling)
            assert chunks or not prefilling
            assert all(1 <= len(chunk.tokens) <= self.sizes["chunk"] for chunk in chunks)
        in_flight = Counter(sequence for sequence, epoch, _ in self.pending if epoch == sequence.epoch)
        due = [
            sequence
            for sequence, old in before.items()
            if old.state == "running" and sequence not in preempted
            if len(sequence.tokens) + in_flight[sequence] < sequence.max_tokens
        ]
        assert step.decoding == sorted(due, key=lambda sequence: sequence.arrival)
        self.seen["preempted"] += len(preempted)
        self.seen["reused"] += sum(sequence.reused for sequence in admitted)
        self.seen["chunks"] += len(step.chunks)

    def check_pages(self) -> None:
        """Pages are conserved, and shared only where they are full of the same text."""
        size = self.sizes["page_size"]
        held: dict[tuple[int, int], tuple[int, list[int]]] = {}
        for sequence in self.live:
            placed = sequence.state in ("prefilling", "running")
            assert placed == (sequence.slot is not None) == (sequence.shard is not None) == bool(sequence.pages)
            if placed:
                assert sequence.slot // self.sizes["slots_per_shard"] == sequence.shard
            in_flight = any(other is sequence and epoch == sequence.epoch for other, epoch, _ in self.pending)
            if sequence.state == "running" and not in_flight:
                assert sequence.cached == len(sequence.prompt) + len(sequence.tokens) - 1
            text = sequence.prompt + sequence.tokens
            for i, page in enumerate(sequence.pages):
                full = (i + 1) * size <= min(sequence.cached, len(text) - 1)
                mine = (i, text[: (i + 1) * size + 1] if full else [])
                other = held.setdefault((sequence.shard, page), mine)
                assert other is mine or (full and other == mine), "shared, but not full of the same text"
                self.seen["shared"] += other is not mine
        slots = [sequence.slot for sequence in self.live if sequence.slot is not None]
        assert len(slots) == len(set(slots))
        pages = self.sizes["num_shards"] * self.sizes["pages_per_shard"]
        assert self.scheduler.free_pages + self.scheduler.cached_pages + len(held) == pages
