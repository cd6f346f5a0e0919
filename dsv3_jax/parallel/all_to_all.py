"""The expert all-to-all (sections 2.1.2 and 3.2 of the report): tokens to the devices of their experts and back.

One `jax.shard_map` region over the whole mesh. The tokens' choices travel along the `expert` axis in as many rounds as the
fullest device needs, nearly always one (`exchange.py`); each round is one call of `expert_ffn` on a buffer of fixed size.
Weights are gathered along the fsdp axes in here, in the computation dtype, and their gradients leave by reduce-scatter.

The number of rounds is known only at run time, so the gradient is written out. It keeps nothing but the inputs: the
backward pass sends the tokens again, together with the gradients of their sums.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
"""The routed experts' parameters, gate, up and down: [E, D, F] twice and [E, F, D]."""
WEIGHT_AXES = (
    ("experts", "expert_embed", "expert_mlp"),
    ("experts", "expert_embed", "expert_mlp"),
    ("experts", "expert_mlp", "expert_embed"),
)
"""Their logical axes."""


class _KernelConfig(NamedTuple):
    """What is fixed before the program runs."""

    backend: str
    dtype: str


def routed_experts_on_mesh(
    x_BTD: jax.Array, chosen_BTK: jax.Array, weight_BTK: jax.Array, weights: ExpertWeights, config: ModelConfig, backend: str
) -> tuple[jax.Array, jax.Array]:
    """sum_k weight_k * Expert_{chosen_k}(x) on the current mesh.

    The sum over the choices is in float32, rounded to x's dtype once; along `tensor`, where every device has one over its own
    hidden units, each is rounded, and they are added up in x's dtype.

    Args:
      x_BTD, chosen_BTK, weight_BTK: tokens, their experts (indices of the stacks) and the weights of these, split as
        `TOKEN_SPEC`.
      weights: split as `WEIGHT_AXES`.
      config: gives the exchange and the size of its buffer.
      backend: of `expert_ffn`.

    Returns:
      The sums, [B, T, D] in x's dtype, and the number of rounds it took, an int32 scalar.
    """
    mesh = current_mesh()
    assert mesh is not None
    exchange = choose_exchange(config.expert_exchange, current_platform(), mesh.shape[EXPERT_AXIS])
    region = functools.partial(
        _on_device,
        num_experts=weights[0].shape[0],
        exchange=exchange,
        receive_factor=config.receive_factor,
        kernel_config=_KernelConfig(backend, config.dtype),
    )
    split, weight_specs = zip(*map(shard_map_spec, weights, WEIGHT_AXES), strict=True)
    specs = TOKEN_SPEC, TOKEN_SPEC, TOKEN_SPEC, weight_specs
    return jax.shard_map(region, in_specs=specs, out_specs=(TOKEN_SPEC, PartitionSpec()))(x_BTD, chosen_BTK, weight_BTK, split)


def _on_device(
    x_BTD: jax.Array,
    chosen_BTK: jax.Array,
    weight_BTK: jax.Array,
    weights: ExpertWeights,
    *,
    num_experts: int,
    exchange: str,
    receive_factor: float,
    kernel_config: _KernelConfig,
) -> tuple[jax.Array, jax.Array]:
    """The share of one device: its own tokens, and the experts it holds."""
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    chosen_TK, weight_TK = (array.reshape(-1, array.shape[-1]) for array in (chosen_BTK, weight_BTK))
    plan = EXCHANGES[exchange].plan(chosen_TK, num_experts, receive_factor)
    # The fullest device of the whole mesh sets the number: all of them run one program.
    rounds = jax.lax.pmax(plan.rounds(), TOKEN_AXES)
    y_TD = _weighted_sums(*varying_alike(x_TD, weight_TK, weights, plan, rounds), kernel_config)
    # Along `tensor` every device has summed over its own hidden units.
    return jax.lax.psum(y_TD, "tensor").reshape(x_BTD.shape), rounds


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _weighted_sums(
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: ExpertWeights,
    plan: Exchange,
    rounds: jax.Array,
    kernel_config: _KernelConfig,
) -> jax.Array:
    whole = _gather(weights, kernel_config)

    def one_round(r: jax.Array, sum_TD: jax.Array) -> jax.Array:
        y_RD = expert_ffn(plan.send_tokens(r, x_TD), *whole, group_sizes_E=plan.group_sizes(r), backend=kernel_config.backend)
        return sum_TD + plan.return_sums(r, y_RD, weight_TK)

    start = zeros_beside(x_TD, x_TD.shape, jnp.promote_types(x_TD.dtype, jnp.float32))
    return _over_rounds(one_round, start, plan, rounds).astype(x_TD.dtype)


def _over_rounds(one_round: Callable[[jax.Array, Any], Any], start: Any, plan: Exchange, rounds: jax.Array) -> Any:
    """Folds `one_round(r, carry)` over the rounds. The first, mostly the only one, stands outside of the loop.

    There the compiler can compute other things, the shared expert above all, while rows travel. Where one round is sure to
    do there is no loop, whose body would be compiled for nothing.
    """
    first = one_round(zeros_beside(rounds, (), jnp.int32), start)
    return first if plan.fits_one_round() else jax.lax.fori_loop(1, rounds, one_round, first)


def _forward(
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: ExpertWeights,
    plan: Exchange,
    rounds: jax.Array,
    kernel_config: _KernelConfig,
) -> tuple[jax.Array, tuple]:
    return _weighted_sums(x_TD, weight_TK, weights, plan, rounds, kernel_config), (x_TD, weight_TK, weights, plan, rounds)


def _backward(kernel_config: _KernelConfig, residuals: tuple, dsum_TD: jax.Array) -> tuple:
    x_TD, weight_TK, weights, plan, rounds = residuals
    whole = _gather(weights, kernel_config)

    def one_round(r: jax.Array, carry: tuple[jax.Array, jax.Array, ExpertWeights]) -> tuple:
        dx_TD, dweight_TK, dwhole = carry
        sizes_e = plan.group_sizes(r)
        dsum_RD, weight_R = plan.send_tokens(r, dsum_TD), plan.send_choices(r, weight_TK)
        ffn = functools.partial(expert_ffn, group_sizes_E=sizes_e, backend=kernel_config.backend)
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
    return dx_TD.astype(x_TD.dtype), dweight_TK, _scatter(dwhole, weights), None, None


_weighted_sums.defvjp(_forward, _backward)


def _gather(weights: ExpertWeights, kernel_config: _KernelConfig) -> ExpertWeights:
    """The local experts' weights, whole along the fsdp axes."""
    gate, up, down = (all_gather_weight(w, axes, kernel_config.dtype) for w, axes in zip(weights, WEIGHT_AXES, strict=True))
    return gate, up, down


def _scatter(dwhole: tuple[jax.Array, ...], weights: ExpertWeights) -> ExpertWeights:
    """Their gradients, summed over the fsdp axes and split along them again, in the dtype of the parameters."""
    triples = zip(dwhole, WEIGHT_AXES, weights, strict=True)
    gate, up, down = (reduce_scatter_grad(dw, axes).astype(w.dtype) for dw, axes, w in triples)
    return gate, up, down


# ----------------------------------------------------------------------------------------------------------------------
# How rows travel to the devices that hold their experts, and back: three exchanges along the `expert` axis.


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
    """The exchange that `name` stands for: "auto" by platform, and "local" whenever the expert axis has size 1.

    Raises:
      ValueError: if the platform does not have it.
    """
    return "local" if num_devices == 1 else _OPTIONS.resolve_backend(name, platform)


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
class AllGatherExchange(Exchange):
    """Every device sees the tokens of its whole group, works on the rows of its experts, and the sums are scattered."""

    sorted: ExpertOrder
    """The group's choices by local expert, those for other devices last."""
    num_devices: int = struct.field(pytree_node=False)
    num_choices: int = struct.field(pytree_node=False)
    num_rows: int = struct.field(pytree_node=False)

    @classmethod
    def plan(cls, chosen_TK: jax.Array, num_experts: int, receive_factor: float) -> AllGatherExchange:
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


EXCHANGES: dict[str, Any] = {"local": Local, "ragged": Ragged, "dense": Dense, "all_gather": AllGatherExchange}


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
