"""How rows travel to the devices that hold their experts, and back: three exchanges along the `expert` axis.

| name | how | for |
|---|---|---|
| ragged | `jax.lax.ragged_all_to_all`, a slice for each expert: rows land sorted by expert | TPU, GPU |
| dense | `jax.lax.all_to_all` of equal blocks, padded | any platform; XLA:CPU has no ragged one |
| ring | all-gather of the tokens, reduce-scatter of their sums | few devices, or few tokens |
| local | nothing travels | an `expert` axis of size 1 |

Shapes are static and routing is not, so a receiver has room for so many rows at a time and the rest follows in further
*rounds*: nothing is ever dropped. `ragged` and `ring` number the rows that each receiver is due (by expert, then by
source) and move row n in round n // R; `dense` numbers the rows of each pair of devices, R / |expert| a round. All
devices know the traffic of their expert group, so they agree on every offset and on the number of rounds.

The methods below run inside `jax.shard_map`, and none is differentiated: `dispatch.py` writes the gradient out.

Axes beyond the project's legend: A devices of the expert group as sources, Z as destinations, e experts of one device,
X any second axis.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dsv3_jax.kernels.choice import Choice
from dsv3_jax.kernels.permute import ExpertOrder, rows_at, sort_by_expert, sum_over_choices
from dsv3_jax.kernels.varying import zeros_beside

EXPERT_AXIS = "expert"
_ROW_TILE = 8

ragged_all_to_all = jax.lax.ragged_all_to_all


_CHOICE = Choice(
    "expert_exchange",
    auto={"cpu": "dense", "gpu": "ragged", "tpu": "ragged"},
    anywhere=("dense", "ring"),
    only_on={"ragged": ("gpu", "tpu")},
)


def choose_exchange(name: str, platform: str, num_devices: int) -> str:
    """The exchange that `name` stands for: "auto" by platform, and "local" whenever the expert axis has size 1.

    Raises:
      ValueError: if the platform does not have it.
    """
    return "local" if num_devices == 1 else _CHOICE.of(name, platform)


def receive_rows(num_choices: int, receive_factor: float) -> int:
    """Rows of the receive buffer: `receive_factor` times what a device sends, rounded up to a tile."""
    return math.ceil(receive_factor * num_choices / _ROW_TILE) * _ROW_TILE


class Exchange(abc.ABC):
    """One device's view of the exchange. A row is a choice: a token on its way to one of its K experts."""

    @abc.abstractmethod
    def rounds(self) -> jax.Array:
        """Rounds that this expert group needs, an int32 scalar."""

    def fits_one_round(self) -> bool:
        """Whether there is room for every choice at once, wherever they go."""
        return False

    @abc.abstractmethod
    def group_sizes(self, r: jax.Array) -> jax.Array:
        """Rows of each local expert in round r, int32 [e]."""

    @abc.abstractmethod
    def send_tokens(self, r: jax.Array, array_TX: jax.Array) -> jax.Array:
        """The token of each row that this device receives in round r, sorted by expert: [R, X]; the rest is arbitrary."""

    @abc.abstractmethod
    def send_choices(self, r: jax.Array, value_TK: jax.Array) -> jax.Array:
        """The value of each row that this device receives in round r: [R]."""

    @abc.abstractmethod
    def return_sums(self, r: jax.Array, y_RX: jax.Array, weight_TK: jax.Array | None) -> jax.Array:
        """Round r's rows, weighted (or not) and summed over each token's choices, back with the tokens: [T, X] float32."""

    @abc.abstractmethod
    def return_choices(self, r: jax.Array, value_R: jax.Array) -> jax.Array:
        """Round r's values back with their choices: [T, K]; zero for the choices of other rounds."""


@struct.dataclass
class Local(Exchange):
    """Every expert is here."""

    sorted: ExpertOrder
    num_choices: int = struct.field(pytree_node=False)

    @classmethod
    def plan(cls, chosen_TK: jax.Array, num_experts: int, receive_factor: float) -> Local:
        del receive_factor  # The rows are known to fit.
        return cls(sort_by_expert(chosen_TK, num_experts), chosen_TK.shape[1])

    def rounds(self) -> jax.Array:
        return zeros_beside(self.sorted.order, (), jnp.int32, 1)

    def fits_one_round(self) -> bool:
        return True

    def group_sizes(self, r: jax.Array) -> jax.Array:
        return self.sorted.group_sizes_E

    def send_tokens(self, r: jax.Array, array_TX: jax.Array) -> jax.Array:
        return rows_at(array_TX, self.sorted.order // self.num_choices)

    def send_choices(self, r: jax.Array, value_TK: jax.Array) -> jax.Array:
        return rows_at(value_TK.reshape(-1), self.sorted.order)

    def return_sums(self, r: jax.Array, y_RX: jax.Array, weight_TK: jax.Array | None) -> jax.Array:
        return sum_over_choices(y_RX, self.sorted.inverse.reshape(-1, self.num_choices), weight_TK)

    def return_choices(self, r: jax.Array, value_R: jax.Array) -> jax.Array:
        return rows_at(value_R, self.sorted.inverse).reshape(-1, self.num_choices)


@struct.dataclass
class Ragged(Exchange):
    """Slices of any size, one for each pair of devices and expert."""

    sorted: ExpertOrder
    """This device's choices by (global) expert."""
    counts_AZe: jax.Array
    """The traffic of the group: rows from source A to the experts e of Z."""
    num_choices: int = struct.field(pytree_node=False)
    num_rows: int = struct.field(pytree_node=False)

    @classmethod
    def plan(cls, chosen_TK: jax.Array, num_experts: int, receive_factor: float) -> Ragged:
        ordered = sort_by_expert(chosen_TK, num_experts)
        return cls(ordered, _traffic(ordered), chosen_TK.shape[1], receive_rows(chosen_TK.size, receive_factor))

    def rounds(self) -> jax.Array:
        return _ceil_divide(self.counts_AZe.sum((0, 2)).max(), self.num_rows)

    def group_sizes(self, r: jax.Array) -> jax.Array:
        return self._slices(r).size_AZe[:, _here()].sum(0)

    def send_tokens(self, r: jax.Array, array_TX: jax.Array) -> jax.Array:
        return self._there(r, rows_at(array_TX, self.sorted.order // self.num_choices))

    def send_choices(self, r: jax.Array, value_TK: jax.Array) -> jax.Array:
        return self._there(r, rows_at(value_TK.reshape(-1), self.sorted.order)[:, None])[:, 0]

    def return_sums(self, r: jax.Array, y_RX: jax.Array, weight_TK: jax.Array | None) -> jax.Array:
        return sum_over_choices(self._back(r, y_RX), self.sorted.inverse.reshape(-1, self.num_choices), weight_TK)

    def return_choices(self, r: jax.Array, value_R: jax.Array) -> jax.Array:
        return rows_at(self._back(r, value_R[:, None])[:, 0], self.sorted.inverse).reshape(-1, self.num_choices)

    def _there(self, r: jax.Array, rows_RX: jax.Array) -> jax.Array:
        slices, here = self._slices(r), _here()
        return ragged_all_to_all(
            rows_RX,
            zeros_beside(rows_RX, (self.num_rows, rows_RX.shape[1]), rows_RX.dtype),
            slices.at_source_AZe[here].reshape(-1),
            slices.size_AZe[here].reshape(-1),
            slices.at_destination_AZe[here].reshape(-1),
            slices.size_AZe[:, here].reshape(-1),
            axis_name=EXPERT_AXIS,
        )

    def _back(self, r: jax.Array, rows_RX: jax.Array) -> jax.Array:
        slices, here = self._slices(r), _here()
        return ragged_all_to_all(
            rows_RX,
            zeros_beside(rows_RX, (self.sorted.order.shape[0], rows_RX.shape[1]), rows_RX.dtype),
            slices.at_destination_AZe[:, here].reshape(-1),
            slices.size_AZe[:, here].reshape(-1),
            slices.at_source_AZe[:, here].reshape(-1),
            slices.size_AZe[here].reshape(-1),
            axis_name=EXPERT_AXIS,
        )

    def _slices(self, r: jax.Array) -> _Slices:
        """The part of every slice that round r moves: the rows whose number at the receiver lies in [r R, (r + 1) R)."""
        counts_AZe = self.counts_AZe
        first = r * self.num_rows
        start_AZe = _starts(counts_AZe.transpose(1, 2, 0)).transpose(2, 0, 1)  # Receivers count by expert, then source.
        low_AZe = jnp.clip(first - start_AZe, 0, counts_AZe)
        size_AZe = jnp.clip(first + self.num_rows - start_AZe, 0, counts_AZe) - low_AZe
        # A slice of no rows may point anywhere, but it must point into the array.
        at_source_AZe = jnp.where(size_AZe > 0, _starts(counts_AZe) + low_AZe, 0)
        at_destination_AZe = jnp.where(size_AZe > 0, start_AZe + low_AZe - first, 0)
        return _Slices(at_source_AZe, at_destination_AZe, size_AZe)


@struct.dataclass
class _Slices:
    at_source_AZe: jax.Array
    at_destination_AZe: jax.Array
    size_AZe: jax.Array


@struct.dataclass
class Dense(Exchange):
    """A block of B rows for each pair of devices, padded; the receiver sorts what it gets."""

    sorted: ExpertOrder
    counts_AZe: jax.Array
    num_choices: int = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False)

    @classmethod
    def plan(cls, chosen_TK: jax.Array, num_experts: int, receive_factor: float) -> Dense:
        ordered = sort_by_expert(chosen_TK, num_experts)
        counts_AZe = _traffic(ordered)
        rows = receive_rows(chosen_TK.size, receive_factor)
        return cls(ordered, counts_AZe, chosen_TK.shape[1], -(-rows // counts_AZe.shape[0]))

    def rounds(self) -> jax.Array:
        return _ceil_divide(self.counts_AZe.sum(2).max(), self.block)

    def group_sizes(self, r: jax.Array) -> jax.Array:
        return self._received(r).group_sizes_E[:-1]

    def send_tokens(self, r: jax.Array, array_TX: jax.Array) -> jax.Array:
        return rows_at(self._swap(rows_at(array_TX, self._sent(r) // self.num_choices)), self._received(r).order)

    def send_choices(self, r: jax.Array, value_TK: jax.Array) -> jax.Array:
        return rows_at(self._swap(rows_at(value_TK.reshape(-1), self._sent(r))), self._received(r).order)

    def return_sums(self, r: jax.Array, y_RX: jax.Array, weight_TK: jax.Array | None) -> jax.Array:
        sent_TK, moved_TK = self._place_sent(r)
        weight_TK = moved_TK if weight_TK is None else jnp.where(moved_TK, weight_TK, 0)
        return sum_over_choices(self._swap(rows_at(y_RX, self._received(r).inverse)), sent_TK, weight_TK)

    def return_choices(self, r: jax.Array, value_R: jax.Array) -> jax.Array:
        sent_TK, moved_TK = self._place_sent(r)
        return jnp.where(moved_TK, rows_at(self._swap(rows_at(value_R, self._received(r).inverse)), sent_TK), 0)

    def _swap(self, rows: jax.Array) -> jax.Array:
        """Block z of rows [Z * B, ...] to device z; block a of the result is from device a. Its own inverse."""
        return jax.lax.all_to_all(rows, EXPERT_AXIS, 0, 0, tiled=True)

    def _start_Z(self) -> jax.Array:
        return _starts(self.counts_AZe[_here()].sum(1))

    def _sent(self, r: jax.Array) -> jax.Array:
        """The choice in every place of the blocks that this device sends: int32 [Z * B]; some choice where there is none."""
        place_ZB = self._start_Z()[:, None] + r * self.block + jnp.arange(self.block)
        order = self.sorted.order
        return rows_at(order, jnp.minimum(place_ZB.reshape(-1), order.shape[0] - 1))

    def _place_sent(self, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The place of each choice among the blocks, and whether it is in those of round r."""
        end_Z = jnp.cumsum(self.counts_AZe[_here()].sum(1))
        inverse = self.sorted.inverse.reshape(-1, self.num_choices)
        to_TK = jnp.searchsorted(end_Z, inverse, side="right", method="compare_all").astype(jnp.int32)
        within_TK = inverse - rows_at(self._start_Z(), to_TK) - r * self.block
        moved_TK = (within_TK >= 0) & (within_TK < self.block)
        return jnp.where(moved_TK, to_TK * self.block + within_TK, 0), moved_TK

    def _received(self, r: jax.Array) -> ExpertOrder:
        """The order that sorts the blocks received in round r by expert; the padding counts as one more expert, the last."""
        end_Ae = jnp.cumsum(self.counts_AZe[:, _here()], axis=1)
        place_B = r * self.block + jnp.arange(self.block)
        expert_AB = jnp.sum(end_Ae[:, None] <= place_B[:, None], axis=2, dtype=jnp.int32)
        return sort_by_expert(expert_AB, end_Ae.shape[1] + 1)


@struct.dataclass
class Ring(Exchange):
    """Every device sees the tokens of its whole group, works on the rows of its experts, and the sums are scattered."""

    sorted: ExpertOrder
    """The group's choices by local expert, those for other devices last."""
    num_devices: int = struct.field(pytree_node=False)
    num_choices: int = struct.field(pytree_node=False)
    num_rows: int = struct.field(pytree_node=False)

    @classmethod
    def plan(cls, chosen_TK: jax.Array, num_experts: int, receive_factor: float) -> Ring:
        num_devices = jax.lax.axis_size(EXPERT_AXIS)
        local = num_experts // num_devices
        expert = jax.lax.all_gather(chosen_TK, EXPERT_AXIS, tiled=True) - _here() * local
        expert = jnp.where((expert >= 0) & (expert < local), expert, local)
        rows = receive_rows(chosen_TK.size, receive_factor)
        return cls(sort_by_expert(expert, local + 1), num_devices, chosen_TK.shape[1], rows)

    def rounds(self) -> jax.Array:
        mine = self.sorted.group_sizes_E[:-1].sum()
        return _ceil_divide(jax.lax.all_gather(mine, EXPERT_AXIS).max(), self.num_rows)

    def fits_one_round(self) -> bool:
        return self.num_rows >= self.sorted.order.size

    def group_sizes(self, r: jax.Array) -> jax.Array:
        sizes_e = self.sorted.group_sizes_E[:-1]
        end_e = jnp.cumsum(sizes_e)
        first = r * self.num_rows
        return (jnp.clip(end_e, first, first + self.num_rows) - jnp.clip(end_e - sizes_e, first, first + self.num_rows)).astype(
            jnp.int32
        )

    def send_tokens(self, r: jax.Array, array_TX: jax.Array) -> jax.Array:
        return rows_at(jax.lax.all_gather(array_TX, EXPERT_AXIS, tiled=True), self._choices(r) // self.num_choices)

    def send_choices(self, r: jax.Array, value_TK: jax.Array) -> jax.Array:
        return rows_at(jax.lax.all_gather(value_TK, EXPERT_AXIS, tiled=True).reshape(-1), self._choices(r))

    def return_sums(self, r: jax.Array, y_RX: jax.Array, weight_TK: jax.Array | None) -> jax.Array:
        row_TK, mine_TK = self._rows(r)
        if weight_TK is None:
            weight_TK = mine_TK
        else:
            weight_TK = jnp.where(mine_TK, jax.lax.all_gather(weight_TK, EXPERT_AXIS, tiled=True), 0)
        return self._scatter(sum_over_choices(y_RX, row_TK, weight_TK))

    def return_choices(self, r: jax.Array, value_R: jax.Array) -> jax.Array:
        row_TK, mine_TK = self._rows(r)
        return self._scatter(jnp.where(mine_TK, rows_at(value_R, row_TK), 0))

    def _scatter(self, partial: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(partial, EXPERT_AXIS, scatter_dimension=0, tiled=True)

    def _choices(self, r: jax.Array) -> jax.Array:
        """The choice, among the group's, of every row of round r; some choice where there is none."""
        order = self.sorted.order
        return rows_at(order, jnp.minimum(r * self.num_rows + jnp.arange(self.num_rows), order.shape[0] - 1))

    def _rows(self, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The row of each of the group's choices, and whether it is one of this device's in round r."""
        place = self.sorted.inverse.reshape(-1, self.num_choices)
        row = place - r * self.num_rows
        mine = (row >= 0) & (row < self.num_rows) & (place < self.sorted.group_sizes_E[:-1].sum())
        return jnp.where(mine, row, 0), mine


EXCHANGES: dict[str, Any] = {"local": Local, "ragged": Ragged, "dense": Dense, "ring": Ring}


def _here() -> jax.Array:
    return jax.lax.axis_index(EXPERT_AXIS)


def _traffic(ordered: ExpertOrder) -> jax.Array:
    """Everybody's rows for everybody's experts, int32 [A, Z, e]."""
    counts_AE = jax.lax.all_gather(ordered.group_sizes_E, EXPERT_AXIS)
    return counts_AE.reshape(counts_AE.shape[0], counts_AE.shape[0], -1)


def _starts(sizes: jax.Array) -> jax.Array:
    """Exclusive running sum over all axes but the first, or over the only one."""
    flat = sizes.reshape(sizes.shape[0], -1) if sizes.ndim > 1 else sizes
    return (jnp.cumsum(flat, axis=-1) - flat).reshape(sizes.shape).astype(jnp.int32)


def _ceil_divide(number: jax.Array, by: int) -> jax.Array:
    return ((number + by - 1) // by).astype(jnp.int32)
