"""The device's side of the engine: the model, the cache and the slots, and the programs dispatched over them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.cache import ROWS, empty_cache
from dsv3_jax.infer.redundancy import place_experts
from dsv3_jax.infer.sampling import Sampler, SamplingParams, with_row
from dsv3_jax.infer.sequence import Chunk, Sequence
from dsv3_jax.infer.sizes import Sizes, chunk_sizes
from dsv3_jax.infer.steps import Chunks, Drawn, Slots, decode, prefill
from dsv3_jax.kernels.quantized import in_dtype, is_block_scaled
from dsv3_jax.model import DeepSeekV3, unstack, with_absorbed_weights
from dsv3_jax.model.sharding import place_variables
from dsv3_jax.parallel.devices import place_alike, release
from dsv3_jax.parallel.sharding import SERVING, use_rules

WHOLE = PartitionSpec()


class Runner:
    """Runs steps. Its arguments are placed once; between steps nothing but tables of pages travels to the device."""

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, Any],
        sizes: Sizes,
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
        self._slots = _with_sampler(self._slots, *place_alike((np.int32(slot), row), self._sharding(WHOLE)))

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
        return place_alike(tree, self._sharding(ROWS))

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
    return dataclasses.replace(config, expert_exchange="ring", receive_factor=float(mesh.shape["expert"]))


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
    params = jax.tree.map(convert, variables["params"], is_leaf=is_block_scaled)
    variables = place_experts({"params": params, "router": variables["router"]}, placement)
    return with_absorbed_weights(unstack(variables, donate=donate), config)
