"""Expert parallelism (sections 2.1.2 and 3.2 of the report): tokens to the devices of their experts and back.

One `jax.shard_map` region over the whole mesh. The tokens' choices travel along the `expert` axis in as many rounds as the
fullest device needs, nearly always one; each round is one call of `expert_ffn` on a buffer of fixed size. The experts' weights
are gathered along the fsdp axes inside the region, in the computation dtype, and their gradients leave by reduce-scatter.

The number of rounds is known only at run time, so the gradient is written by hand. It stores nothing but the inputs: the
backward pass sends the tokens again, together with the gradients of their sums.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels.backend import Backends
from dsv3_jax.kernels.experts import ExpertOrder, expert_ffn, rows_at, sort_by_expert, sum_over_choices
from dsv3_jax.kernels.vma import varying_alike, zeros_beside
from dsv3_jax.parallel.mesh import TOKEN_AXES, current_mesh, current_platform
from dsv3_jax.parallel.sharding import TOKEN_SPEC, Weight, all_gather_weight, reduce_scatter_grad, shard_map_spec

ExpertWeights = tuple[Weight, Weight, Weight]
"""Parameters of the routed experts, gate, up and down: [E, D, F] twice and [E, F, D]."""
WEIGHT_AXES = (
    ("experts", "expert_embed", "expert_mlp"),
    ("experts", "expert_embed", "expert_mlp"),
    ("experts", "expert_mlp", "expert_embed"),
)
"""Logical axis names of the three arrays of `ExpertWeights`, in its order."""


def routed_experts_on_mesh(
    x_BTD: jax.Array, chosen_BTK: jax.Array, weight_BTK: jax.Array, weights: ExpertWeights, config: ModelConfig, backend: str
) -> tuple[jax.Array, jax.Array]:
    """Return sum_k weight_k * Expert_{chosen_k}(x) on the current mesh, [B, T, D], and the number of rounds, an int32 scalar.

    The sum over the choices is in float32 and rounded to x's dtype once. Along `tensor` each device has the sum over its own
    hidden units: each of these is rounded, and they are added in x's dtype. All devices take the same number of rounds.

    Args:
      x_BTD, chosen_BTK, weight_BTK: tokens, their experts (indices of the stacks) and weights, split as `TOKEN_SPEC`.
      weights: parameters, split as `WEIGHT_AXES`.
      config: gives the exchange and the size of its buffer.
      backend: of `expert_ffn`.
    """
    mesh = current_mesh()
    assert mesh is not None
    exchange = EXCHANGES[choose_exchange(config.expert_exchange, current_platform(), mesh.shape[EXPERT_AXIS])]
    num_experts = weights[0].shape[0]

    def on_device(
        x_BTD: jax.Array, chosen_BTK: jax.Array, weight_BTK: jax.Array, weights: ExpertWeights
    ) -> tuple[jax.Array, jax.Array]:
        x_TD, chosen_TK, weight_TK = (array.reshape(-1, array.shape[-1]) for array in (x_BTD, chosen_BTK, weight_BTK))
        plan = exchange.plan(chosen_TK, num_experts, config.receive_factor)
        # All devices run one program, so the fullest device of the whole mesh sets the number of rounds.
        rounds = jax.lax.pmax(plan.rounds(), TOKEN_AXES)
        y_TD = _weighted_sums(*varying_alike(x_TD, weight_TK, weights, plan, rounds), backend, config.dtype)
        # Along `tensor` every device has summed over its own hidden units.
        return jax.lax.psum(y_TD, "tensor").reshape(x_BTD.shape), rounds

    split, weight_specs = zip(*map(shard_map_spec, weights, WEIGHT_AXES), strict=True)
    specs = TOKEN_SPEC, TOKEN_SPEC, TOKEN_SPEC, weight_specs
    region = jax.shard_map(on_device, in_specs=specs, out_specs=(TOKEN_SPEC, PartitionSpec()))
    return region(x_BTD, chosen_BTK, weight_BTK, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _weighted_sums(
    x_TD: jax.Array, weight_TK: jax.Array, weights: ExpertWeights, plan: Exchange, rounds: jax.Array, backend: str, dtype: str
) -> jax.Array:
    """Run all rounds; return sum_k weight_k * Expert_k(x) of this device's tokens over its own hidden units, [T, D] like x."""
    whole = _gather_weights(weights, dtype)

    def one_round(r: jax.Array, sum_TD: jax.Array) -> jax.Array:
        y_RD = expert_ffn(plan.send_tokens(r, x_TD), *whole, group_sizes_E=plan.group_sizes(r), backend=backend)
        return sum_TD + plan.return_sums(r, y_RD, weight_TK)

    start = zeros_beside(x_TD, x_TD.shape, jnp.promote_types(x_TD.dtype, jnp.float32))
    return _over_rounds(one_round, start, plan, rounds).astype(x_TD.dtype)


def _over_rounds(one_round: Callable[[jax.Array, Any], Any], start: Any, plan: Exchange, rounds: jax.Array) -> Any:
    """Return the carry after `one_round(r, carry)` for r = 0, ..., rounds - 1, from `start`; round 0 always runs.

    The first round, mostly the only one, stands outside the loop, so that the compiler can overlap its communication with
    other work, above all the shared expert. Where one round always suffices, no loop is compiled.
    """
    first = one_round(zeros_beside(rounds, (), jnp.int32), start)
    return first if plan.fits_one_round() else jax.lax.fori_loop(1, rounds, one_round, first)


def _forward(*arguments: Any) -> tuple[jax.Array, tuple]:
    return _weighted_sums(*arguments), arguments[:5]


def _backward(backend: str, dtype: str, residuals: tuple, dsum_TD: jax.Array) -> tuple:
    x_TD, weight_TK, weights, plan, rounds = residuals
    whole = _gather_weights(weights, dtype)

    def one_round(r: jax.Array, carry: tuple) -> tuple:
        dx_TD, dweight_TK, dwhole = carry
        sizes_e = plan.group_sizes(r)
        dsum_RD, weight_R = plan.send_tokens(r, dsum_TD), plan.send_choices(r, weight_TK)
        ffn = functools.partial(expert_ffn, group_sizes_E=sizes_e, backend=backend)
        y_RD, transpose = jax.vjp(ffn, plan.send_tokens(r, x_TD), *whole)
        wide_RD = dsum_RD.astype(dx_TD.dtype)
        dx_RD, *more = transpose((weight_R[:, None] * wide_RD).astype(y_RD.dtype))
        return (
            dx_TD + plan.return_sums(r, dx_RD, None),
            dweight_TK + plan.return_choices(r, jnp.sum(y_RD * wide_RD, axis=1)),
            tuple(a + b for a, b in zip(dwhole, more, strict=True)),
        )

    start = (
        zeros_beside(x_TD, x_TD.shape, jnp.promote_types(x_TD.dtype, jnp.float32)),
        zeros_beside(x_TD, weight_TK.shape, weight_TK.dtype),
        tuple(zeros_beside(x_TD, w.shape, w.dtype) for w in whole),
    )
    dx_TD, dweight_TK, dwhole = _over_rounds(one_round, start, plan, rounds)
    # The weights' gradients, summed over the fsdp axes and split along them, in the dtype of the parameters.
    triples = zip(dwhole, WEIGHT_AXES, weights, strict=True)
    dweights = tuple(reduce_scatter_grad(dw, axes).astype(w.dtype) for dw, axes, w in triples)
    return dx_TD.astype(x_TD.dtype), dweight_TK, dweights, None, None


_weighted_sums.defvjp(_forward, _backward)


def _gather_weights(weights: ExpertWeights, dtype: str) -> ExpertWeights:
    """All-gather the weights of this device's experts along the fsdp axes, cast to `dtype`; those in 8 bits stay in 8 bits."""
    gate, up, down = (all_gather_weight(w, axes, dtype) for w, axes in zip(weights, WEIGHT_AXES, strict=True))
    return gate, up, down


# ----------------------------------------------------------------------------------------------------------------------
# The exchanges along the `expert` axis: rows to the devices that hold their experts, and back.
#
# Axes: A devices as sources of rows, Z as destinations, e local experts, R rows of a round, X features or none.


EXPERT_AXIS = "expert"
_ROW_TILE = 8

ragged_all_to_all = jax.lax.ragged_all_to_all

_OPTIONS = Backends(
    "expert_exchange",
    auto={"cpu": "dense", "gpu": "ragged", "tpu": "ragged"},
    anywhere=("dense", "all_gather"),
    only_on={"ragged": ("gpu", "tpu")},
)


def choose_exchange(name: str, platform: str, num_devices: int) -> str:
    """Return a key of `EXCHANGES`: "local" for one device on the expert axis, else `name`, with "auto" resolved by platform.

    Raises:
      ValueError: if `name` is unknown, or does not run on the platform.
    """
    return "local" if num_devices == 1 else _OPTIONS.resolve_backend(name, platform)


def receive_rows(num_choices: int, receive_factor: float) -> int:
    """Return the number of rows in the receive buffer: receive_factor * num_choices, rounded up to a multiple of 8."""
    return math.ceil(receive_factor * num_choices / _ROW_TILE) * _ROW_TILE


@struct.dataclass
class Exchange(abc.ABC):
    """Base of the exchanges, for one batch and as one device sees it. A row is a choice: a token on its way to one expert.

    Rows leave in the order of `_sent`, move with `_to_experts` and arrive sorted by expert. They come back with `_to_tokens`,
    and `_returned` finds the row of each choice. These methods, `_gather` and `_scatter` move nothing unless overridden.
    """

    sorted: ExpertOrder  # This device's choices by (global) expert.
    num_choices: int = struct.field(pytree_node=False)  # K.

    @classmethod
    @abc.abstractmethod
    def plan(cls, chosen_TK: jax.Array, num_experts: int, receive_factor: float) -> Exchange:
        """Return an exchange for these expert choices, sorted by expert and counted; no token is sent yet. Abstract here."""

    @abc.abstractmethod
    def rounds(self) -> jax.Array:
        """Return the number of rounds that this expert group needs, an int32 scalar."""

    def fits_one_round(self) -> bool:
        """Return True if one round has room for every choice under any routing; False unless a subclass overrides it."""
        return False

    @abc.abstractmethod
    def group_sizes(self, r: jax.Array) -> jax.Array:
        """Return the number of rows that each expert of this device receives in round r, int32 [e]."""

    def send_tokens(self, r: jax.Array, array_TX: jax.Array) -> jax.Array:
        """Send this device's tokens of round r; return those it receives, [R, X] sorted by expert, arbitrary in unused rows."""
        return self._to_experts(r, rows_at(self._gather(array_TX), self._sent(r) // self.num_choices))

    def send_choices(self, r: jax.Array, value_TK: jax.Array) -> jax.Array:
        """Send a value for each choice of round r; return those this device receives, [R], in the rows of `send_tokens`."""
        return self._to_experts(r, rows_at(self._gather(value_TK).reshape(-1), self._sent(r)))

    def return_sums(self, r: jax.Array, y_RX: jax.Array, weight_TK: jax.Array | None) -> jax.Array:
        """Send round r's results back; return each token's (weighted) sum over its choices of that round, [T, X] float32."""
        row_TK, moved_TK = self._returned(r)
        if moved_TK is not None:
            weight_TK = moved_TK if weight_TK is None else jnp.where(moved_TK, self._gather(weight_TK), 0)
        return self._scatter(sum_over_choices(self._to_tokens(r, y_RX), row_TK, weight_TK))

    def return_choices(self, r: jax.Array, value_R: jax.Array) -> jax.Array:
        """Send round r's values back to the devices of their choices; return them, [T, K], 0 for choices of other rounds."""
        row_TK, moved_TK = self._returned(r)
        value_TK = rows_at(self._to_tokens(r, value_R), row_TK)
        return self._scatter(value_TK if moved_TK is None else jnp.where(moved_TK, value_TK, 0))

    def _sent(self, r: jax.Array) -> jax.Array:
        """Return the index t * K + k of the choice in each row sent in round r, any in unused rows; here all, by expert."""
        return self.sorted.order

    def _returned(self, r: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return each choice's row in the result of `_to_tokens`, [T, K], and a mask of round r's choices (None: all)."""
        return self.sorted.inverse.reshape(-1, self.num_choices), None

    def _to_experts(self, r: jax.Array, rows_RX: jax.Array) -> jax.Array:
        return rows_RX

    def _to_tokens(self, r: jax.Array, rows_RX: jax.Array) -> jax.Array:
        return rows_RX

    def _gather(self, array_TX: jax.Array) -> jax.Array:
        return array_TX

    def _scatter(self, partial_TX: jax.Array) -> jax.Array:
        return partial_TX


@struct.dataclass
class Local(Exchange):
    """No exchange: every expert is on this device."""

    @classmethod
    def plan(cls, chosen_TK: jax.Array, num_experts: int, receive_factor: float) -> Local:
        del receive_factor  # The rows always fit.
        return cls(sort_by_expert(chosen_TK, num_experts), chosen_TK.shape[1])

    def rounds(self) -> jax.Array:
        return zeros_beside(self.sorted.order, (), jnp.int32, 1)

    def fits_one_round(self) -> bool:
        return True

    def group_sizes(self, r: jax.Array) -> jax.Array:
        return self.sorted.group_sizes_E


@struct.dataclass
class Ragged(Exchange):
    """Exchange by XLA's ragged all-to-all: one slice, of any size, for each source, destination and expert."""

    counts_AZe: jax.Array  # Rows from source A to the experts e of Z.
    num_rows: int = struct.field(pytree_node=False)  # R, rows of the receive buffer.

    @classmethod
    def plan(cls, chosen_TK: jax.Array, num_experts: int, receive_factor: float) -> Ragged:
        ordered = sort_by_expert(chosen_TK, num_experts)
        return cls(ordered, chosen_TK.shape[1], _traffic(ordered), receive_rows(chosen_TK.size, receive_factor))

    def rounds(self) -> jax.Array:
        return _ceil_divide(self.counts_AZe.sum((0, 2)).max(), self.num_rows)

    def group_sizes(self, r: jax.Array) -> jax.Array:
        return self._slices(r)[2][:, _here()].sum(0)

    def _to_experts(self, r: jax.Array, rows_RX: jax.Array) -> jax.Array:
        (source, destination, size), here = self._slices(r), _here()
        return _exchange_slices(rows_RX, self.num_rows, source[here], size[here], destination[here], size[:, here])

    def _to_tokens(self, r: jax.Array, rows_RX: jax.Array) -> jax.Array:
        (source, destination, size), here = self._slices(r), _here()
        num_sent = self.sorted.order.shape[0]
        return _exchange_slices(rows_RX, num_sent, destination[:, here], size[:, here], source[:, here], size[here])

    def _slices(self, r: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return each slice's start at the source, start at the destination, and number of rows, in round r: [A, Z, e] each.

        Round r moves the rows whose number at the receiver lies in [r R, (r + 1) R).
        """
        counts_AZe = self.counts_AZe
        first = r * self.num_rows
        start_AZe = _starts(counts_AZe.transpose(1, 2, 0)).transpose(2, 0, 1)  # Receivers count by expert, then source.
        low_AZe = jnp.clip(first - start_AZe, 0, counts_AZe)
        size_AZe = jnp.clip(first + self.num_rows - start_AZe, 0, counts_AZe) - low_AZe
        # Even an empty slice must start inside of the array.
        source_AZe = jnp.where(size_AZe > 0, _starts(counts_AZe) + low_AZe, 0)
        destination_AZe = jnp.where(size_AZe > 0, start_AZe + low_AZe - first, 0)
        return source_AZe, destination_AZe, size_AZe


def _exchange_slices(rows_RX: jax.Array, num_rows: int, *offsets_and_sizes: jax.Array) -> jax.Array:
    """Send slices of rows; return the `num_rows` rows received, 0 if unused; offsets and sizes as of `ragged_all_to_all`."""
    if rows_RX.ndim == 1:
        return _exchange_slices(rows_RX[:, None], num_rows, *offsets_and_sizes)[:, 0]
    received_RX = zeros_beside(rows_RX, (num_rows, rows_RX.shape[1]), rows_RX.dtype)
    return ragged_all_to_all(rows_RX, received_RX, *(part.reshape(-1) for part in offsets_and_sizes), axis_name=EXPERT_AXIS)


@struct.dataclass
class Dense(Exchange):
    """Exchange by plain all-to-all: a padded block of B rows for each pair of devices; receivers sort their rows by expert."""

    counts_AZe: jax.Array  # Rows from source A to the experts e of Z.
    block: int = struct.field(pytree_node=False)  # B.

    @classmethod
    def plan(cls, chosen_TK: jax.Array, num_experts: int, receive_factor: float) -> Dense:
        ordered = sort_by_expert(chosen_TK, num_experts)
        counts_AZe = _traffic(ordered)
        rows = receive_rows(chosen_TK.size, receive_factor)
        return cls(ordered, chosen_TK.shape[1], counts_AZe, -(-rows // counts_AZe.shape[0]))

    def rounds(self) -> jax.Array:
        return _ceil_divide(self.counts_AZe.sum(2).max(), self.block)

    def group_sizes(self, r: jax.Array) -> jax.Array:
        return self._received(r).group_sizes_E[:-1]

    def _to_experts(self, r: jax.Array, rows_RX: jax.Array) -> jax.Array:
        return rows_at(self._swap(rows_RX), self._received(r).order)

    def _to_tokens(self, r: jax.Array, rows_RX: jax.Array) -> jax.Array:
        return self._swap(rows_at(rows_RX, self._received(r).inverse))

    def _swap(self, rows: jax.Array) -> jax.Array:
        """Send block z of rows [Z * B, ...] to device z; block a of the result is from device a. Its own inverse."""
        return jax.lax.all_to_all(rows, EXPERT_AXIS, 0, 0, tiled=True)

    def _start_Z(self) -> jax.Array:
        return _starts(self.counts_AZe[_here()].sum(1))

    def _sent(self, r: jax.Array) -> jax.Array:
        row_ZB = self._start_Z()[:, None] + r * self.block + jnp.arange(self.block)
        order = self.sorted.order
        return rows_at(order, jnp.minimum(row_ZB.reshape(-1), order.shape[0] - 1))

    def _returned(self, r: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        end_Z = jnp.cumsum(self.counts_AZe[_here()].sum(1))
        inverse = self.sorted.inverse.reshape(-1, self.num_choices)
        to_TK = jnp.searchsorted(end_Z, inverse, side="right", method="compare_all").astype(jnp.int32)
        within_TK = inverse - rows_at(self._start_Z(), to_TK) - r * self.block
        moved_TK = (within_TK >= 0) & (within_TK < self.block)
        return jnp.where(moved_TK, to_TK * self.block + within_TK, 0), moved_TK

    def _received(self, r: jax.Array) -> ExpertOrder:
        """Return the order by expert of the blocks received in round r; the padding counts as one more expert, the last."""
        end_Ae = jnp.cumsum(self.counts_AZe[:, _here()], axis=1)
        row_B = r * self.block + jnp.arange(self.block)
        expert_AB = jnp.sum(end_Ae[:, None] <= row_B[:, None], axis=2, dtype=jnp.int32)
        return sort_by_expert(expert_AB, end_Ae.shape[1] + 1)


@struct.dataclass
class AllGatherExchange(Exchange):
    """All-gather of the group's tokens, and reduce-scatter of the sums that each device's experts add to them.

    `sorted` holds the whole group's choices by local expert, those for other devices last.
    """

    num_rows: int = struct.field(pytree_node=False)  # R, rows of a round.

    @classmethod
    def plan(cls, chosen_TK: jax.Array, num_experts: int, receive_factor: float) -> AllGatherExchange:
        local = num_experts // jax.lax.axis_size(EXPERT_AXIS)
        expert = jax.lax.all_gather(chosen_TK, EXPERT_AXIS, tiled=True) - _here() * local
        expert = jnp.where((expert >= 0) & (expert < local), expert, local)
        rows = receive_rows(chosen_TK.size, receive_factor)
        return cls(sort_by_expert(expert, local + 1), chosen_TK.shape[1], rows)

    def rounds(self) -> jax.Array:
        mine = self.sorted.group_sizes_E[:-1].sum()
        return _ceil_divide(jax.lax.all_gather(mine, EXPERT_AXIS).max(), self.num_rows)

    def fits_one_round(self) -> bool:
        return self.num_rows >= self.sorted.order.size

    def group_sizes(self, r: jax.Array) -> jax.Array:
        sizes_e = self.sorted.group_sizes_E[:-1]
        end_e = jnp.cumsum(sizes_e)
        first = r * self.num_rows
        last = first + self.num_rows
        return (jnp.clip(end_e, first, last) - jnp.clip(end_e - sizes_e, first, last)).astype(jnp.int32)

    def _gather(self, array_TX: jax.Array) -> jax.Array:
        return jax.lax.all_gather(array_TX, EXPERT_AXIS, tiled=True)

    def _scatter(self, partial_TX: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(partial_TX, EXPERT_AXIS, scatter_dimension=0, tiled=True)

    def _sent(self, r: jax.Array) -> jax.Array:
        order = self.sorted.order
        return rows_at(order, jnp.minimum(r * self.num_rows + jnp.arange(self.num_rows), order.shape[0] - 1))

    def _returned(self, r: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        sorted_TK = self.sorted.inverse.reshape(-1, self.num_choices)
        row_TK = sorted_TK - r * self.num_rows
        mine_TK = (row_TK >= 0) & (row_TK < self.num_rows) & (sorted_TK < self.sorted.group_sizes_E[:-1].sum())
        return jnp.where(mine_TK, row_TK, 0), mine_TK


EXCHANGES: dict[str, type[Exchange]] = {"local": Local, "ragged": Ragged, "dense": Dense, "all_gather": AllGatherExchange}


def _here() -> jax.Array:
    """Return the index of this device along the expert axis."""
    return jax.lax.axis_index(EXPERT_AXIS)


def _traffic(ordered: ExpertOrder) -> jax.Array:
    """All-gather this device's group sizes; return the rows from each device A to the experts e of each device Z, int32."""
    counts_AE = jax.lax.all_gather(ordered.group_sizes_E, EXPERT_AXIS)
    return counts_AE.reshape(counts_AE.shape[0], counts_AE.shape[0], -1)


def _starts(sizes: jax.Array) -> jax.Array:
    """Return exclusive running sums of the same shape, int32: over all later axes, flattened, or over the only axis."""
    flat = sizes.reshape(sizes.shape[0], -1) if sizes.ndim > 1 else sizes
    return (jnp.cumsum(flat, axis=-1) - flat).reshape(sizes.shape).astype(jnp.int32)


def _ceil_divide(number: jax.Array, by: int) -> jax.Array:
    return ((number + by - 1) // by).astype(jnp.int32)
