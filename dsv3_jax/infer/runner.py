"""Device side of the engine: the model, the cache, the slots, and the programs of prefill and decode that run over them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer import sampling
from dsv3_jax.infer.cache import DRAFTER, ROWS, Cache, EngineConfig, append, chunk_sizes, empty_cache
from dsv3_jax.infer.request import Chunk, Sequence
from dsv3_jax.infer.sampling import Sampler, SamplingParams, Stream
from dsv3_jax.kernels.quantized import in_dtype, is_quantized
from dsv3_jax.model import DeepSeekV3, unstack, with_absorbed_weights
from dsv3_jax.model.mla import CacheMetadata
from dsv3_jax.model.sharding import place_variables
from dsv3_jax.parallel.devices import release, replicate
from dsv3_jax.parallel.mesh import current_mesh
from dsv3_jax.parallel.replicas import place_experts
from dsv3_jax.parallel.sharding import SERVING, use_rules


class Runner:
    """Runs steps. The weights are placed once; each step sends only new prompt tokens and changed page tables to the device."""

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, Any],
        sizes: EngineConfig,
        mesh: Mesh | None = None,
        placement: Mapping[str, np.ndarray] | None = None,
        donate: bool = False,
    ) -> None:
        """Lay out the weights on the devices and allocate the cache. Arguments as for `Engine`; no `mesh` is one device."""
        self._config, self._mesh, self._sizes = config, mesh, sizes
        self._prefill_model, self._decode_model = models(config, mesh)
        if mesh is not None:
            variables = place_variables(variables, config, mesh, SERVING, donate=donate)
        self._variables = laid_out(config, variables, placement or {}, donate=donate)
        self._home = SingleDeviceSharding(next(iter(jax.tree.leaves(self._variables)[0].devices())))
        self.clear()

    def clear(self) -> None:
        """Free the cache and allocate an empty one; also replace the slots by empty ones."""
        self.forget_tables()
        config, sizes, rows = self._config, self._sizes, self._sharding(ROWS)
        self._cache: Cache = {}  # Freed first, since two caches may not fit.
        self._cache = empty_cache(config, sizes.pages, sizes.page_size, drafting=sizes.drafts > 0, sharding=rows)
        slots = functools.partial(Slots.empty, sizes.slots, sizes.drafts, config.vocab_size)
        self._slots = jax.jit(slots, out_shardings=rows)()

    def forget_tables(self) -> None:
        """Mark the page tables on the device as outdated, so that the next `decode` sends all of them again."""
        self._decoding: tuple[int, ...] | None = None
        """Slots whose page tables are on the device; None if these are outdated."""
        self._tables: tuple[Any, ...] = ()

    def set_sampler(self, slot: int, params: SamplingParams, text: list[int]) -> None:
        """Write a slot's sampling parameters to the device, and mark the tokens of `text` as its seen ones."""
        row = Sampler.row(params, text, self._config.vocab_size)
        self._slots = _with_sampler(self._slots, *self._put((np.int32(slot), row), PartitionSpec()))

    def warm_up(self) -> None:
        """Compile all programs without log-probabilities by running them without sequences; resets the sampler of slot 0."""
        self.set_sampler(0, SamplingParams(), [])
        for length in self._sizes.chunk_sizes:
            for first in (True, False):
                self._prefill([], length, first, report=False)
        jax.block_until_ready(self.decode([], report=False))

    def prefill(self, chunks: list[Chunk], report: bool) -> Drawn:
        """Prefill the chunks, at most one of each shard; return a row for each shard, with a token if a prompt ends in it."""
        longest = max(len(chunk.tokens) for chunk in chunks)
        return self._prefill(chunks, chunk_sizes(longest)[-1], all(chunk.start == 0 for chunk in chunks), report)

    def _prefill(self, chunks: list[Chunk], length: int, first: bool, report: bool) -> Drawn:
        num_shards = self._sizes.num_shards
        tokens = np.zeros((num_shards, length), np.int32)
        count, start, following, slot = (np.full(num_shards, value, np.int32) for value in (1, 0, -1, -1))
        for chunk in chunks:
            row = chunk.sequence.place[0]
            tokens[row, : len(chunk.tokens)] = chunk.tokens
            count[row], start[row], slot[row] = len(chunk.tokens), chunk.start, chunk.sequence.place[1]
            if chunk.following is not None:
                following[row] = chunk.following
        table = self._table(num_shards, {chunk.sequence.place[0]: chunk.sequence for chunk in chunks})
        arrays = self._put((Chunks(tokens, count, start, following, slot), table))
        return self._run(prefill, self._prefill_model, *arrays, first=first, report=report)

    def decode(self, sequences: list[Sequence], report: bool) -> Drawn:
        """Dispatch one decode step of these sequences; return a row for each slot, with 0 tokens for all other slots."""
        slots = tuple(sequence.place[1] for sequence in sequences)
        if slots != self._decoding:
            table = self._table(self._sizes.slots, dict(zip(slots, sequences, strict=True)))
            self._tables = self._put((table, np.isin(np.arange(self._sizes.slots), slots)))
            self._decoding = slots
        return self._run(decode, self._decode_model, *self._tables, report=report)

    def _run(self, program: Callable[..., tuple[Cache, Slots, Drawn]], model: DeepSeekV3, *args: Any, **options: bool) -> Drawn:
        with on_mesh(self._mesh):
            self._cache, self._slots, drawn = program(model, self._variables, self._cache, self._slots, *args, **options)
        return drawn

    def _table(self, num_rows: int, sequences: dict[int, Sequence]) -> np.ndarray:
        """Return page numbers, int32 [num_rows, pages_of_one]; unused entries are pages_per_shard, outside the pool."""
        table = np.full((num_rows, self._sizes.pages_of_one), self._sizes.pages_per_shard, np.int32)
        for row, sequence in sequences.items():
            table[row, : len(sequence.pages)] = sequence.pages
        return table

    def _put(self, tree: Any, spec: PartitionSpec = ROWS) -> Any:
        return replicate(tree, self._sharding(spec))

    def _sharding(self, spec: PartitionSpec) -> Sharding:
        # Never None: programs would be compiled twice, for arrays without a device and for those with one.
        return self._home if self._mesh is None else NamedSharding(self._mesh, spec)


@functools.partial(jax.jit, donate_argnames="slots")
def _with_sampler(slots: Slots, slot: jax.Array, row: Sampler) -> Slots:
    return dataclasses.replace(slots, sampler=sampling.with_row(slots.sampler, slot, row))


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Trace and run programs on the mesh, with the sharding rules of generation."""
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh), use_rules(SERVING):
            yield


def models(config: ModelConfig, mesh: Mesh | None) -> tuple[DeepSeekV3, DeepSeekV3]:
    """Return the models for prefill and for decode; on a mesh, the latter turns expert_exchange "auto" into "all_gather"."""
    decoding = config
    if mesh is not None and config.expert_exchange == "auto":
        decoding = dataclasses.replace(config, expert_exchange="all_gather", receive_factor=float(mesh.shape["expert"]))
    return DeepSeekV3(config, unrolled=True), DeepSeekV3(decoding, unrolled=True)


def laid_out(
    config: ModelConfig, variables: dict[str, Any], placement: Mapping[str, np.ndarray], *, donate: bool = False
) -> dict[str, Any]:
    """Return the variables for both programs: weights in the computation dtype or 8 bits, experts in the slots of `placement`.

    Stacks become single layers, and W_kvb is added in two parts. `donate` deletes each array that is replaced by another.
    """

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
# The two programs of generation: prefill of a chunk of a prompt, and one decode step of all slots.


@struct.dataclass
class Slots:
    """State of every slot on the device. Axes: n drafts."""

    token_B: jax.Array
    """The newest token, not in the cache yet, int32."""
    cached_length_B: jax.Array
    """Number of tokens in the cache, int32."""
    draft_Bn: jax.Array
    """Drafts of the tokens after the newest, int32."""
    draft_probs_BnV: jax.Array
    """Probabilities that the drafts were drawn from, float32."""
    sampler: Sampler

    @classmethod
    def empty(cls, slots: int, drafts: int, vocab_size: int) -> Slots:
        """Return slots without sequences: zeros, and greedy samplers."""
        zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
        probs = jnp.zeros((slots, drafts, vocab_size), jnp.float32)
        return cls(zeros(slots), zeros(slots), zeros((slots, drafts)), probs, Sampler.empty(slots, vocab_size))


class Chunks(NamedTuple):
    """Parts of prompts, one row for each shard of the slots; a row without a sequence has slot -1."""

    tokens_BT: Any
    """Token ids, padded on the right with any valid id."""
    count_B: Any
    """Number of tokens in the chunk, at least 1."""
    start_B: Any
    """Number of the sequence's tokens before the chunk."""
    following_B: Any
    """The token after the chunk; -1 to draw that token, which makes the slot ready to decode."""
    slot_B: Any


class Report(NamedTuple):
    """Log-probabilities of the model itself, before the sampler's transforms. Axes: R most likely tokens."""

    chosen_BT: jax.Array
    top_BTR: jax.Array
    top_id_BTR: jax.Array


class Drawn(NamedTuple):
    """Output of one run of `prefill` or `decode`, read by the host."""

    token_BT: jax.Array
    """New tokens of each row, of which the first `count_B` are valid."""
    count_B: jax.Array
    """0 for a row without a sequence, and for one whose logits are not finite."""
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
    """Prefill one chunk of a prompt in each row, and draw the token after a last chunk. The cache and the slots are donated.

    Args:
      model: the unrolled model.
      variables: its variables, from `laid_out`.
      cache: the pages of all shards.
      slots: all slots.
      chunks: one row for each shard.
      page_table_BJ: pages of each row's sequence.
      first: no row has tokens before its chunk, so that attention needs no cache.
      report: also return log-probabilities.

    Returns:
      The cache with the chunks in it; the slots, of which those with a last chunk are ready; and the tokens drawn for these.
    """
    tokens_BT, count_B, start_B, following_B, slot_B = chunks
    apply, metadata = functools.partial(model.apply, variables), CacheMetadata(start_B, page_table_BJ)
    h_BTD, new = apply(tokens_BT, None if first else cache, metadata, method="forward_cached")
    cache = append(cache, new, metadata)
    logits_B1V = apply(jnp.take_along_axis(h_BTD, (count_B - 1)[:, None, None], axis=1), method="head")
    rows = jax.tree.map(lambda leaf: leaf[jnp.maximum(slot_B, 0)], slots)
    token_B, _ = _choose(logits_B1V, rows.sampler, start_B + count_B, Stream.TARGET)
    sampler = _having_seen(rows.sampler, token_B[:, None], jnp.ones_like(token_B))
    rows = dataclasses.replace(rows, token_B=token_B, cached_length_B=start_B + count_B, sampler=sampler)
    next_B = jnp.where(following_B >= 0, following_B, token_B)
    ahead_BT = jnp.roll(tokens_BT, -1, axis=1).at[jnp.arange(len(next_B)), count_B - 1].set(next_B)
    cache, rows = _draft(apply, cache, h_BTD, ahead_BT, metadata, rows, first)

    ready_B = (slot_B >= 0) & (following_B < 0)
    to_B = jnp.where(ready_B, slot_B, len(slots.token_B))
    slots = jax.tree.map(lambda old, new: old.at[to_B].set(new, mode="drop"), slots, rows)
    count_B = ready_B & jnp.isfinite(logits_B1V).all((1, 2))
    return cache, slots, _for_hosts(token_B[:, None], count_B.astype(jnp.int32), logits_B1V if report else None)


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
    """Run one step of all slots: 1 to n + 1 new tokens for each active one, 0 without finite logits; others stay unchanged.

    Arguments as for `prefill`; the table rows of inactive slots hold a page number outside the pool.
    """
    before_B = jnp.where(active_B, slots.cached_length_B, 0)
    apply, metadata = functools.partial(model.apply, variables), CacheMetadata(before_B, page_table_BJ)
    tokens_BT = jnp.concatenate([slots.token_B[:, None], slots.draft_Bn], axis=1)
    h_BTD, new = apply(tokens_BT, cache, metadata, method="forward_cached")
    cache = append(cache, new, metadata)
    logits_BTV = apply(h_BTD, method="head")
    seen_BTV = sampling.seen_along(slots.sampler.seen_BV, slots.draft_Bn)
    target_BTV = sampling.distribution(logits_BTV, slots.sampler, seen_BTV)
    token_BT, count_B = sampling.rejection_sample(
        target_BTV, slots.draft_probs_BnV, slots.draft_Bn, slots.sampler.seed_B, before_B + 1
    )
    newest_B = jnp.take_along_axis(token_BT, (count_B - 1)[:, None], axis=1)[:, 0]
    sampler = _having_seen(slots.sampler, token_BT, count_B)
    after = dataclasses.replace(slots, token_B=newest_B, cached_length_B=before_B + count_B, sampler=sampler)
    cache, after = _draft(apply, cache, h_BTD, token_BT, metadata, after, first=False)

    def kept(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(active_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    # Rows behind the last accepted draft count for nothing. No draft is accepted by probabilities that are NaN.
    behind_BT = jnp.arange(token_BT.shape[1]) >= count_B[:, None]
    is_finite_B = (jnp.isfinite(logits_BTV).all(-1) | behind_BT).all(-1)
    drawn = _for_hosts(token_BT, jnp.where(active_B & is_finite_B, count_B, 0), logits_BTV if report else None)
    return cache, jax.tree.map(kept, slots, after), drawn


def _draft(
    apply: Any, cache: Cache, state_BTD: jax.Array, ahead_BT: jax.Array, metadata: CacheMetadata, after: Slots, first: bool
) -> tuple[Cache, Slots]:
    """Draw n drafts after the newest token with the MTP depth; return the cache, and `after` with the drafts.

    Args:
      apply: the model's `apply` with its variables.
      cache: its entries for drafts are provisional, and written again once the tokens are known.
      state_BTD: the model's states of the new tokens.
      ahead_BT: the token after each of these.
      metadata: the cache without the new tokens.
      after: the slots with the new tokens; returned unchanged if n is 0.
      first: no row has tokens before the new ones.
    """
    last_B, sampler = after.cached_length_B - metadata.cached_length_B - 1, after.sampler
    drafts, probs = [], []
    for i in range(after.draft_Bn.shape[1]):
        own = None if first and i == 0 else cache[DRAFTER]
        state_BTD, new = apply(state_BTD, ahead_BT, own, metadata, method="draft")
        cache = append(cache, {DRAFTER: new}, metadata)
        if i == 0:  # From here on, the state of the last new token alone.
            state_BTD = jnp.take_along_axis(state_BTD, last_B[:, None, None], axis=1)
        metadata = CacheMetadata(after.cached_length_B + i, metadata.page_table_BJ)
        logits_B1V = apply(state_BTD, method="head")
        # Any drafts will do, and what is not a number must not get into a probability.
        logits_B1V = jnp.where(jnp.isfinite(logits_B1V), logits_B1V, 0)
        token_B, probs_BV = _choose(logits_B1V, sampler, metadata.cached_length_B + 1, Stream.DRAFT)
        sampler = _having_seen(sampler, token_B[:, None], jnp.ones_like(token_B))
        ahead_BT = token_B[:, None]
        drafts.append(token_B)
        probs.append(probs_BV)
    if drafts:
        after = dataclasses.replace(after, draft_Bn=jnp.stack(drafts, axis=1), draft_probs_BnV=jnp.stack(probs, axis=1))
    return cache, after


def _choose(logits_B1V: jax.Array, sampler: Sampler, position_B: jax.Array, stream: Stream) -> tuple[jax.Array, jax.Array]:
    """Draw a token for `position_B` of every row; return it and the probabilities that it was drawn from."""
    probs_BV = sampling.distribution(logits_B1V, sampler, sampler.seen_BV[:, None])[:, 0]
    return sampling.draw(probs_BV, sampler.seed_B, position_B, stream), probs_BV


def _having_seen(sampler: Sampler, token_BT: jax.Array, count_B: jax.Array) -> Sampler:
    """Return `sampler` with the first `count_B` tokens of each row among the seen."""
    V = sampler.seen_BV.shape[1]
    token_BT = jnp.where(jnp.arange(token_BT.shape[1]) < count_B[:, None], token_BT, V)
    row_B1 = jnp.arange(len(token_BT))[:, None]
    return dataclasses.replace(sampler, seen_BV=sampler.seen_BV.at[row_B1, token_BT].set(True, mode="drop"))


def _for_hosts(token_BT: jax.Array, count_B: jax.Array, logits_BTV: jax.Array | None) -> Drawn:
    """Return the program's output, with log-probabilities if there are logits; on a mesh it is replicated to all devices."""
    report = None
    if logits_BTV is not None:
        report = Report(*sampling.logprobs(logits_BTV, token_BT, min(sampling.MOST_LOGPROBS, logits_BTV.shape[-1])))
    drawn = Drawn(token_BT, count_B, report)
    return drawn if current_mesh() is None else jax.lax.with_sharding_constraint(drawn, PartitionSpec())
