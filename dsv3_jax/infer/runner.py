"""The device's side of the engine: the model, the cache and the slots, and the programs dispatched over them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.cache import DRAFTER, ROWS, Cache, EngineConfig, append, chunk_sizes, empty_cache
from dsv3_jax.infer.request import Chunk, Sequence
from dsv3_jax.infer.sampling import (
    MOST_LOGPROBS,
    Sampler,
    SamplingParams,
    Stream,
    distribution,
    draw,
    logprobs,
    rejection_sample,
    seen_along,
    with_row,
)
from dsv3_jax.kernels.quantized import in_dtype, is_quantized
from dsv3_jax.model import DeepSeekV3, unstack, with_absorbed_weights
from dsv3_jax.model.mla import CacheMetadata
from dsv3_jax.model.sharding import place_variables
from dsv3_jax.parallel.devices import release, replicate
from dsv3_jax.parallel.mesh import current_mesh
from dsv3_jax.parallel.replicas import place_experts
from dsv3_jax.parallel.sharding import SERVING, use_rules

WHOLE = PartitionSpec()


class Runner:
    """Runs steps. Its arguments are placed once; between steps nothing but tables of pages travels to the device."""

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, Any],
        sizes: EngineConfig,
        mesh: Mesh | None = None,
        placement: Mapping[str, np.ndarray] | None = None,
        donate: bool = False,
    ) -> None:
        """Places the model, and makes an empty cache.

        Args:
          config: the architecture.
          variables: its `params` and `router`.
          sizes: of the engine.
          mesh: None for one device.
          placement: as `place_experts` takes it; None leaves every expert where it is, once.
          donate: the arrays of `variables` may be deleted, so that no weight is held twice.
        """
        self._mesh, self._sizes, self._vocab_size = mesh, sizes, config.vocab_size
        self._prefill_model, self._decode_model = models(config, mesh)
        if mesh is not None:
            variables = place_variables(variables, config, mesh, SERVING, donate=donate)
        self._variables = laid_out(config, variables, placement or {}, donate=donate)
        self._home = SingleDeviceSharding(next(iter(jax.tree.leaves(self._variables)[0].devices())))
        self._empty_cache = functools.partial(
            empty_cache, config, sizes.pages, sizes.page_size, drafting=sizes.drafts > 0, sharding=self._sharding(ROWS)
        )
        make = functools.partial(Slots.empty, sizes.slots, sizes.drafts, config.vocab_size)
        self._empty_slots = jax.jit(make, out_shardings=self._sharding(ROWS))
        self._decoding: tuple[int, ...] | None = None
        self._tables: tuple = ()
        """What the device has of pages: of the sequences in these slots."""
        self._cache, self._slots = self._empty_cache(), self._empty_slots()

    def clear(self) -> None:
        """Empties the cache and the slots, whatever has become of them."""
        self.forget_tables()
        self._cache = {}  # Two caches may not fit.
        self._cache, self._slots = self._empty_cache(), self._empty_slots()

    def forget_tables(self) -> None:
        """Has the pages of all sequences sent to the device anew."""
        self._decoding, self._tables = None, ()

    def set_up(self, slot: int, row: Sampler) -> None:
        """Tells how the sequence that gets a slot is sampled; `row` is one of `Sampler.row`."""
        self._slots = _with_sampler(self._slots, *replicate((np.int32(slot), row), self._sharding(WHOLE)))

    def warm_up(self) -> None:
        """Runs every program that reports no log-probabilities once, for nobody: it is compiled, and nothing changes."""
        self.set_up(0, Sampler.row(SamplingParams(), (), self._vocab_size))
        for length in self._sizes.chunk_sizes:
            for first in (True, False):
                self._prefill([], length, first, report=False)
        jax.block_until_ready(self.decode([], report=False))

    def prefill(self, chunks: list[Chunk], report: bool) -> Drawn:
        """Works through the chunks, at most one of each shard; the results' rows are the shards."""
        longest = max(len(chunk.tokens) for chunk in chunks)
        return self._prefill(chunks, chunk_sizes(longest)[-1], all(chunk.start == 0 for chunk in chunks), report)

    def _prefill(self, chunks: list[Chunk], length: int, first: bool, report: bool) -> Drawn:
        tokens = np.zeros((self._sizes.num_shards, length), np.int32)
        count, start, following, slot = (np.full(self._sizes.num_shards, value, np.int32) for value in (1, 0, -1, -1))
        sequences: list[Sequence | None] = [None] * self._sizes.num_shards
        for chunk in chunks:
            row = chunk.sequence.place[0]
            sequences[row] = chunk.sequence
            tokens[row, : len(chunk.tokens)] = chunk.tokens
            count[row], start[row], slot[row] = len(chunk.tokens), chunk.start, chunk.sequence.place[1]
            if chunk.following is not None:
                following[row] = chunk.following
        arrays = self._put((Chunks(tokens, count, start, following, slot), self._table(sequences)))
        with on_mesh(self._mesh):
            self._cache, self._slots, drawn = prefill(
                self._prefill_model, self._variables, self._cache, self._slots, *arrays, first=first, report=report
            )
        return drawn

    def decode(self, sequences: list[Sequence], report: bool) -> Drawn:
        """One step of these sequences; the results' rows are the slots."""
        slots = tuple(sequence.place[1] for sequence in sequences)
        if slots != self._decoding:
            rows: list[Sequence | None] = [None] * self._sizes.slots
            for slot, sequence in zip(slots, sequences, strict=True):
                rows[slot] = sequence
            self._tables = self._put((self._table(rows), np.array([sequence is not None for sequence in rows])))
            self._decoding = slots
        with on_mesh(self._mesh):
            self._cache, self._slots, drawn = decode(
                self._decode_model, self._variables, self._cache, self._slots, *self._tables, report=report
            )
        return drawn

    def _table(self, rows: Many[Sequence | None]) -> np.ndarray:
        """The pages of each row's sequence, and nowhere for the rest."""
        table = np.full((len(rows), self._sizes.pages_of_one), self._sizes.pages_per_shard, np.int32)
        for row, sequence in zip(table, rows, strict=True):
            if sequence is not None:
                row[: len(sequence.pages)] = sequence.pages
        return table

    def _put(self, tree: Any) -> Any:
        return replicate(tree, self._sharding(ROWS))

    def _sharding(self, spec: PartitionSpec) -> Sharding:
        # Never none: arrays that belong to no device yet, and later do, would have programs compiled twice.
        return self._home if self._mesh is None else NamedSharding(self._mesh, spec)


@functools.partial(jax.jit, donate_argnames="slots")
def _with_sampler(slots: Slots, slot: jax.Array, row: Sampler) -> Slots:
    return dataclasses.replace(slots, sampler=with_row(slots.sampler, slot, row))


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Where the programs are traced and run: on the mesh, weights laid out for generation."""
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh), use_rules(SERVING):
            yield


def models(config: ModelConfig, mesh: Mesh | None) -> tuple[DeepSeekV3, DeepSeekV3]:
    """The models that prefill and decode run."""
    return DeepSeekV3(config, unrolled=True), DeepSeekV3(_for_few_tokens(config, mesh), unrolled=True)


def _for_few_tokens(config: ModelConfig, mesh: Mesh | None) -> ModelConfig:
    """The config of decoding: of a token or a few for each sequence all devices may see all, and one round will do."""
    if mesh is None or config.expert_exchange != "auto":
        return config
    return dataclasses.replace(config, expert_exchange="all_gather", receive_factor=float(mesh.shape["expert"]))


def laid_out(
    config: ModelConfig, variables: dict[str, Any], placement: Mapping[str, np.ndarray], *, donate: bool = False
) -> dict[str, Any]:
    """The variables as the programs take them: in the computation dtype, layer by layer, W_kvb also split in two."""

    def convert(weight: Any) -> Any:
        converted = in_dtype(weight, config.dtype)
        if donate and converted is not weight:
            release(weight, converted)
        return converted

    # Stored in the computation dtype (or in 8 bits), so that no step converts weights again.
    params = jax.tree.map(convert, variables["params"], is_leaf=is_quantized)
    variables = place_experts({"params": params, "router": variables["router"]}, placement)
    return with_absorbed_weights(unstack(variables, donate=donate), config)


# ----------------------------------------------------------------------------------------------------------------------
# The two programs of generation: prefill of a chunk of a prompt, and one step of decoding for all slots.


@struct.dataclass
class Slots:
    """What the device knows of every slot. Axes: n drafts."""

    token_B: jax.Array
    """The newest token, int32."""
    cached_length_B: jax.Array
    """Tokens in the cache, int32."""
    draft_Bn: jax.Array
    """Drafts of the tokens after the newest, int32."""
    draft_probs_BnV: jax.Array
    """What they were drawn from, float32."""
    sampler: Sampler

    @classmethod
    def empty(cls, slots: int, drafts: int, vocab_size: int) -> Slots:
        """Slots without sequences."""
        zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
        probs = jnp.zeros((slots, drafts, vocab_size), jnp.float32)
        return cls(zeros(slots), zeros(slots), zeros((slots, drafts)), probs, Sampler.empty(slots, vocab_size))


class Chunks(NamedTuple):
    """Parts of prompts, one row for each part of the slots (of a mesh); a row of nobody has slot -1."""

    tokens_BT: Any
    """Padded on the right with any valid id."""
    count_B: Any
    """Tokens of the chunk, at least 1."""
    start_B: Any
    """Tokens of the text before it."""
    following_B: Any
    """The token after it; -1 if that is to be drawn, which makes the slot ready to decode."""
    slot_B: Any


class Report(NamedTuple):
    """Log-probabilities of the model itself, before any of the sampler's changes."""

    chosen_BT: jax.Array
    top_BTR: jax.Array
    top_id_BTR: jax.Array


class Drawn(NamedTuple):
    """What a program has for the host."""

    token_BT: jax.Array
    """New tokens of each row, of which the first `count_B` are valid."""
    count_B: jax.Array
    report: Report | None = None


@functools.partial(jax.jit, static_argnames=("model", "first", "report"), donate_argnames=("cache", "slots"))
def prefill(
    model: DeepSeekV3,
    variables: Any,
    cache: Cache,
    slots: Slots,
    chunks: Chunks,
    page_table_BJ: jax.Array,
    *,
    first: bool,
    report: bool = False,
) -> tuple[Cache, Slots, Drawn]:
    """Works through a chunk of a prompt in every row.

    Args:
      model: the unrolled model.
      variables: its variables, as `unstack` lays them out.
      cache: the cache; given away.
      slots: all slots; given away.
      chunks: the chunks.
      page_table_BJ: pages of each row's sequence.
      first: no row has tokens before its chunk: attention needs no cache.
      report: also report log-probabilities.

    Returns:
      The cache with the chunks in it; the slots, those ready whose chunk was the last; and the tokens drawn for these.
    """
    tokens_BT, count_B, start_B, following_B, slot_B = chunks
    num_slots, n = slots.draft_Bn.shape
    metadata, last = CacheMetadata(start_B, page_table_BJ), (count_B - 1)[:, None, None]
    h_BTD, new = model.apply(variables, tokens_BT, None if first else cache, metadata, method="forward_cached")
    cache = append(cache, new, metadata)
    logits_B1V = model.apply(variables, jnp.take_along_axis(h_BTD, last, axis=1), method="head")
    sampler = jax.tree.map(lambda rows: rows[jnp.maximum(slot_B, 0)], slots.sampler)
    cached_length_B = start_B + count_B
    token_B, _ = _choose(logits_B1V, sampler, cached_length_B, Stream.TARGET)
    sampler = _having_seen(sampler, token_B[:, None], jnp.ones_like(token_B))

    draft_Bn, probs_BnV = jnp.zeros((len(token_B), 0), jnp.int32), jnp.zeros((len(token_B), 0, logits_B1V.shape[-1]))
    if n:
        next_B = jnp.where(following_B >= 0, following_B, token_B)
        ahead_BT = jnp.roll(tokens_BT, -1, axis=1).at[jnp.arange(len(next_B)), count_B - 1].set(next_B)
        own = None if first else cache[DRAFTER]
        normed_BTD, new_own = model.apply(variables, h_BTD, ahead_BT, own, metadata, method="draft")
        cache = append(cache, {DRAFTER: new_own}, metadata)
        state_B1D = jnp.take_along_axis(normed_BTD, last, axis=1)
        after = CacheMetadata(cached_length_B, page_table_BJ)
        cache, draft_Bn, probs_BnV = _drafts(model, variables, cache, state_B1D, after, sampler, n)

    ready_B = (slot_B >= 0) & (following_B < 0)
    to_B = jnp.where(ready_B, slot_B, num_slots)
    rows = Slots(token_B, cached_length_B, draft_Bn, probs_BnV, sampler)
    slots = jax.tree.map(lambda old, new: old.at[to_B].set(new, mode="drop"), slots, rows)
    token_BT = token_B[:, None]
    return cache, slots, _for_hosts(token_BT, ready_B.astype(jnp.int32), logits_B1V if report else None)


@functools.partial(jax.jit, static_argnames=("model", "report"), donate_argnames=("cache", "slots"))
def decode(
    model: DeepSeekV3,
    variables: Any,
    cache: Cache,
    slots: Slots,
    page_table_BJ: jax.Array,
    active_B: jax.Array,
    *,
    report: bool = False,
) -> tuple[Cache, Slots, Drawn]:
    """One step of all slots: 1 to n + 1 new tokens for each that is active; the others stay as they are.

    Args as `prefill`'s; the table's rows of slots that are not active name no page of the pool.
    """
    n = slots.draft_Bn.shape[1]
    sampler, before_B = slots.sampler, jnp.where(active_B, slots.cached_length_B, 0)
    tokens_BT = jnp.concatenate([slots.token_B[:, None], slots.draft_Bn], axis=1)
    metadata = CacheMetadata(before_B, page_table_BJ)
    h_BTD, new = model.apply(variables, tokens_BT, cache, metadata, method="forward_cached")
    cache = append(cache, new, metadata)
    logits_BTV = model.apply(variables, h_BTD, method="head")
    target_BTV = distribution(logits_BTV, sampler, seen_along(sampler.seen_BV, slots.draft_Bn))
    token_BT, count_B = rejection_sample(target_BTV, slots.draft_probs_BnV, slots.draft_Bn, sampler.seed_B, before_B + 1)
    newest_B = jnp.take_along_axis(token_BT, (count_B - 1)[:, None], axis=1)[:, 0]
    sampler = _having_seen(sampler, token_BT, count_B)

    after = Slots(newest_B, before_B + count_B, slots.draft_Bn, slots.draft_probs_BnV, sampler)
    if n:
        normed_BTD, new_own = model.apply(variables, h_BTD, token_BT, cache[DRAFTER], metadata, method="draft")
        cache = append(cache, {DRAFTER: new_own}, metadata)
        state_B1D = jnp.take_along_axis(normed_BTD, (count_B - 1)[:, None, None], axis=1)
        cache, draft_Bn, probs_BnV = _drafts(
            model, variables, cache, state_B1D, CacheMetadata(after.cached_length_B, page_table_BJ), sampler, n
        )
        after = dataclasses.replace(after, draft_Bn=draft_Bn, draft_probs_BnV=probs_BnV)

    def kept(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(active_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    drawn = _for_hosts(token_BT, jnp.where(active_B, count_B, 0), logits_BTV if report else None)
    return cache, jax.tree.map(kept, slots, after), drawn


def _drafts(
    model: DeepSeekV3, variables: Any, cache: Cache, state_B1D: jax.Array, metadata: CacheMetadata, sampler: Sampler, n: int
) -> tuple[Cache, jax.Array, jax.Array]:
    """n drafts after the newest token, each from the state that the one before gave; and what they were drawn from.

    Args:
      cache: its rows for drafts are written for now, and again when the tokens are known.
      state_B1D: the depth's state in the row that knows the newest token.
      places: the cache without that token.
      sampler: with the newest token among the seen.
    """
    tokens, probs = [], []
    for i in range(n):
        cached_length_B = metadata.cached_length_B + i
        logits_B1V = model.apply(variables, state_B1D, method="head")
        token_B, probs_BV = _choose(logits_B1V, sampler, cached_length_B + 1, Stream.DRAFT)
        tokens.append(token_B)
        probs.append(probs_BV)
        if i < n - 1:
            at = CacheMetadata(cached_length_B, metadata.page_table_BJ)
            state_B1D, new = model.apply(variables, state_B1D, token_B[:, None], cache[DRAFTER], at, method="draft")
            cache = append(cache, {DRAFTER: new}, at)
            sampler = _having_seen(sampler, token_B[:, None], jnp.ones_like(token_B))
    return cache, jnp.stack(tokens, axis=1), jnp.stack(probs, axis=1)


def _choose(logits_B1V: jax.Array, sampler: Sampler, place_B: jax.Array, stream: Stream) -> tuple[jax.Array, jax.Array]:
    """A token for position `place_B` of every row, and what it was drawn from."""
    probs_BV = distribution(logits_B1V, sampler, sampler.seen_BV[:, None])[:, 0]
    return draw(probs_BV, sampler.seed_B, place_B, stream), probs_BV


def _having_seen(sampler: Sampler, token_BT: jax.Array, count_B: jax.Array) -> Sampler:
    """`sampler` with the first `count_B` tokens of each row among the seen."""
    V = sampler.seen_BV.shape[1]
    token_BT = jnp.where(jnp.arange(token_BT.shape[1]) < count_B[:, None], token_BT, V)
    row_B1 = jnp.arange(len(token_BT))[:, None]
    return dataclasses.replace(sampler, seen_BV=sampler.seen_BV.at[row_B1, token_BT].set(True, mode="drop"))


def _for_hosts(token_BT: jax.Array, count_B: jax.Array, logits_BTV: jax.Array | None) -> Drawn:
    """What leaves the device, log-probabilities too if there are logits; on a mesh every process can read all of it."""
    report = None
    if logits_BTV is not None:
        report = Report(*logprobs(logits_BTV, token_BT, min(MOST_LOGPROBS, logits_BTV.shape[-1])))
    drawn = Drawn(token_BT, count_B, report)
    return drawn if current_mesh() is None else jax.lax.with_sharding_constraint(drawn, PartitionSpec())
