"""Redundant copies of hot experts (section 3.4 of the report): which shard of the `expert` axis holds which expert, how often.

The busiest shard sets the pace of all, so an expert that many tokens choose is held by several shards, which share its
tokens evenly. Choosing stays *logical*, among E experts; what a token is sent to is a *slot*, of which there are P, the
same number on every shard, each with one copy. Who holds what is decided here from observed loads, on the host; which
copy a token takes is decided in the program, by nothing but the token's place in the batch.

Axes beyond the project's legend: P slots, shard after shard; Z shards; S the slots of one shard; C the most copies of any
expert.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.parallel.all_to_all import EXPERT_AXIS

# 2^32 over the golden ratio. Its multiples modulo 2^32 fall evenly, for every token of a run and for every n-th alike:
# the parity of a token's place would follow a text in which every second token is of a kind.
_GOLDEN = np.uint32(2654435769)


Array = jax.Array | np.ndarray


class Replicas(NamedTuple):
    """Where the copies of each expert are: the model reads a layer's from the collection `placement` of its variables."""

    expert_P: Array
    """int32, the expert in each slot."""
    slot_EC: Array
    """int32, the slots of each expert's copies; past the last of them that one again."""
    copies_E: Array
    """int32, how many there are."""

    def slots(self, chosen_BTK: jax.Array) -> jax.Array:
        """The slot of each choice, int32 [B, T, K]: expert e's choices take its copies in turn, by the tokens' places."""
        B, T, _ = chosen_BTK.shape
        fraction_BT1 = (jnp.arange(B * T, dtype=jnp.uint32).reshape(B, T, 1) * _GOLDEN) >> 16
        copies_BTK = jnp.asarray(self.copies_E).at[chosen_BTK].get(mode="promise_in_bounds")
        copy_BTK = ((fraction_BT1 * copies_BTK.astype(jnp.uint32)) >> 16).astype(jnp.int32)
        return jnp.asarray(self.slot_EC).at[chosen_BTK, copy_BTK].get(mode="promise_in_bounds")


def replicas_of(placement: np.ndarray, num_experts: int) -> Replicas:
    """Where the copies of each expert are, given the expert in each slot: [P], or [L, P] with tables that gain an axis L.

    Raises:
      ValueError: if an expert is in no slot, or a slot's is none of `num_experts`.
    """
    if placement.ndim == 2:
        layers = [replicas_of(expert_P, num_experts) for expert_P in placement]
        width = max(layer.slot_EC.shape[1] for layer in layers)
        return jax.tree.map(lambda *tables: np.stack(tables), *(_widened(layer, width) for layer in layers))
    outside = placement[(placement < 0) | (placement >= num_experts)]
    if outside.size:
        raise ValueError(f"a slot holds expert {outside[0]}, but there are {num_experts}; give counts of this model's experts")
    copies_E = np.bincount(placement, minlength=num_experts)
    if not copies_E.all():
        raise ValueError(f"expert {copies_E.argmin()} is in no slot; give every expert one")
    slot_P, start_E = np.argsort(placement, kind="stable"), np.cumsum(copies_E) - copies_E
    copy_EC = np.minimum(np.arange(copies_E.max()), copies_E[:, None] - 1)
    slot_EC = slot_P[start_E[:, None] + copy_EC]
    return Replicas(*(table.astype(np.int32) for table in (placement, slot_EC, copies_E)))


def _widened(copies: Replicas, width: int) -> Replicas:
    missing = width - copies.slot_EC.shape[1]
    return copies._replace(slot_EC=np.pad(copies.slot_EC, ((0, 0), (0, missing)), mode="edge"))


# ----------------------------------------------------------------------------------------------------------------------
# The weights of redundant experts (section 3.4 of the report): every slot's copy, brought to the shard that is to hold
# it.


def place_experts(variables: dict[str, Any], placements: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The variables with some layers' routed experts in slots; a `DeepSeekV3` of the same config computes the same with them.

    What was placed before may be placed anew, as loads change. Layers that are not named stay as they are.

    Args:
      variables: of a scanned or an unrolled model, on one device or split over a mesh by the sharding rules.
      placements: what `rebalance_experts` made of the model's loads, under the names of these: "moe_layers" [L, P] if scanned,
        "moe_layers_0" [P], ... if unrolled, and "mtp_0" [P], ...

    Returns:
      A new tree; the arrays that are not experts are those of the old one.

    Raises:
      ValueError: naming the layer, if it has no routed experts, if its placement is not one of them, or if the `expert` axis
        does not divide the slots.
    """
    flat = traverse_util.flatten_dict(variables, keep_empty_nodes=True)
    for name, placement in placements.items():
        mlp = (name, "block", "mlp") if name.startswith("mtp_") else (name, "mlp")
        bias = flat.get(("router", *mlp, "gate", "e_score_correction_bias"))
        if bias is None:
            known = ", ".join(sorted(path[1] for path in flat if path[-1] == "e_score_correction_bias"))
            raise ValueError(f"{name} has no routed experts to place; those that have: {known}")
        if placement.shape[:-1] != bias.shape[:-1]:
            raise ValueError(f"the placement of {name} is {list(placement.shape)}; give {[*bias.shape[:-1], 'slots']}")
        try:
            copies = replicas_of(placement, bias.shape[-1])
        except ValueError as error:
            raise ValueError(f"the placement of {name}: {error}") from None
        at = "placement", *mlp, "experts", "copies"
        # Where the experts are by now: each in the place of its number, or in its first slot.
        source = placement if at not in flat else np.take_along_axis(np.asarray(flat[at].slot_EC[..., 0]), placement, -1)
        for path in [path for path in flat if path[:-1] == ("params", *mlp, "experts")]:
            where = "/".join(path)
            flat[path] = jax.tree.map(lambda leaf, where=where, source=source: _in_slots(leaf, source, where), flat[path])
        flat[at] = _beside(flat["params", *mlp, "experts", "gate_proj"], copies)
    return traverse_util.unflatten_dict(flat)


def _in_slots(leaf: Any, source: np.ndarray, where: str) -> jax.Array:
    """The experts [(L,) E, ...] at `source` [(L,) P], split as before."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return _taken(leaf, source)
    stack_axis = source.ndim - 1
    if sharding.spec[stack_axis : stack_axis + 1] != (EXPERT_AXIS,):
        return jax.jit(_taken, out_shardings=sharding)(leaf, source)
    num_shards = sharding.mesh.shape[EXPERT_AXIS]
    if source.shape[-1] % num_shards:
        raise ValueError(
            f"{where}: {source.shape[-1]} slots are no multiple of mesh.expert ({num_shards}); place for that many"
        )
    return _around(leaf, source, sharding)


def _taken(stack_EX: Array, source_P: Array) -> jax.Array:
    take = functools.partial(jnp.take, axis=0)
    return (take if source_P.ndim == 1 else jax.vmap(take))(jnp.asarray(stack_EX), source_P)


@functools.partial(jax.jit, static_argnames="sharding")
def _around(stack_EX: jax.Array, source_P: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`_taken` of experts that are split over shards, which see one other shard's experts at a time and never all."""
    collect = _collected if source_P.ndim == 1 else jax.vmap(_collected)
    specs = sharding.spec, PartitionSpec()
    return jax.shard_map(collect, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)(stack_EX, source_P)


def _collected(held_eX: jax.Array, source_P: jax.Array) -> jax.Array:
    """Passes every shard's experts around the ring; each picks out what its slots are to hold."""
    num_shards, here = jax.lax.axis_size(EXPERT_AXIS), jax.lax.axis_index(EXPERT_AXIS)
    slots, local = source_P.shape[0] // num_shards, held_eX.shape[0]
    source_p = jax.lax.dynamic_slice_in_dim(source_P, here * slots, slots)
    next_shard = [(shard, (shard + 1) % num_shards) for shard in range(num_shards)]

    def hop(r: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        passing_eX, slot_pX = carry
        passing_eX = jax.lax.ppermute(passing_eX, EXPERT_AXIS, next_shard)
        among_p = source_p // local == (here - r) % num_shards
        among_pX = among_p.reshape(-1, *(1 for _ in held_eX.shape[1:]))
        return passing_eX, jnp.where(among_pX, passing_eX[source_p % local], slot_pX)

    # Where a slot's expert is another shard's, the first pick is a wrong one, and gives way to that shard's.
    return jax.lax.fori_loop(1, num_shards, hop, (held_eX, held_eX[source_p % local]))[1]


def _beside(like: Any, copies: Replicas) -> Replicas:
    """The tables on the devices of the weights, whole on each."""
    sharding = getattr(jax.tree.leaves(like)[0], "sharding", None)
    if isinstance(sharding, NamedSharding):
        return jax.device_put(copies, NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.tree.map(jnp.asarray, copies)
