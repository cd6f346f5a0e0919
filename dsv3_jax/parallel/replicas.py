"""Redundant copies of hot experts (section 3.4 of the report): tables of slots, and the weights in them.

The most loaded shard of the `expert` axis sets the pace of all, so several shards hold a copy of an expert that many tokens
choose, and share its tokens evenly. The router still chooses *logical* experts, E of them; a token goes to one of P *slots*,
equally many on every shard, with one copy each. The placement is computed on the host from observed loads
(`dsv3_jax/rebalance.py`); the copy that a token takes depends only on its position in the batch.

Axes: P slots, shard by shard; C copies of an expert, at most; L layers; p and e slots and experts of one shard.
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

# 2^32 over the golden ratio. Its multiples modulo 2^32 are spread evenly, over all tokens and over every n-th one. A position
# modulo the number of copies is not: in a text that alternates between two kinds of token, each kind would load one copy.
_GOLDEN = np.uint32(2654435769)


Array = jax.Array | np.ndarray


class Replicas(NamedTuple):
    """Tables of the copies of each expert; the model reads a layer's from the collection `placement` of its variables."""

    expert_P: Array  # int32, the expert in each slot.
    slot_EC: Array  # int32, the slots of each expert's copies; the last one repeated up to C.
    copies_E: Array  # int32, the number of copies.

    def slots(self, chosen_BTK: jax.Array) -> jax.Array:
        """Return a slot with a copy of each chosen expert, int32 [B, T, K]; token positions spread evenly over the copies."""
        B, T, _ = chosen_BTK.shape
        fraction_BT1 = (jnp.arange(B * T, dtype=jnp.uint32).reshape(B, T, 1) * _GOLDEN) >> 16
        copies_BTK = jnp.asarray(self.copies_E).at[chosen_BTK].get(mode="promise_in_bounds")
        copy_BTK = ((fraction_BT1 * copies_BTK.astype(jnp.uint32)) >> 16).astype(jnp.int32)
        return jnp.asarray(self.slot_EC).at[chosen_BTK, copy_BTK].get(mode="promise_in_bounds")


def replicas_of(placement: np.ndarray, num_experts: int) -> Replicas:
    """Return the `Replicas` of a placement, which is the expert in each slot: [P], or [L, P] with an axis L in every table.

    Raises:
      ValueError: if an expert is in no slot, or a slot's expert is not one of `num_experts`.
    """
    outside = placement[(placement < 0) | (placement >= num_experts)]
    if outside.size:
        raise ValueError(f"a slot holds expert {outside[0]}, not in 0..{num_experts - 1}; rebalance with this model's loads")
    copies_E = np.apply_along_axis(np.bincount, -1, placement, minlength=num_experts)
    if not copies_E.all():
        raise ValueError(f"expert {np.argwhere(copies_E == 0)[0, -1]} is in no slot; give every expert at least one")
    slot_P, start_E = np.argsort(placement, axis=-1, kind="stable"), np.cumsum(copies_E, axis=-1) - copies_E
    copy_EC = np.minimum(np.arange(copies_E.max()), copies_E[..., None] - 1)
    slot_EC = np.take_along_axis(slot_P[..., None, :], start_E[..., None] + copy_EC, axis=-1)
    return Replicas(*(table.astype(np.int32) for table in (placement, slot_EC, copies_E)))


# ----------------------------------------------------------------------------------------------------------------------
# Weights of redundant experts: every slot's copy, moved to the shard of the slot.


def place_experts(variables: dict[str, Any], placements: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the variables with the routed experts of some layers in slots; `DeepSeekV3` computes the same with them.

    Experts that are already in slots can be placed again, for other loads. Layers without a placement stay as they are.

    Args:
      variables: of a scanned or an unrolled model, on one device or split over a mesh. All arrays but the experts are reused.
      placements: results of `rebalance_experts` by the names of the model's loads: "moe_layers" [L, P] if scanned,
        "moe_layers_0" [P], ... if unrolled, and "mtp_0" [P], ...

    Raises:
      ValueError: naming the layer, if it has no routed experts, if its placement does not fit it, or if the `expert` axis does
        not divide the slots.
    """
    flat = traverse_util.flatten_dict(variables, keep_empty_nodes=True)
    for name, placement in placements.items():
        mlp = (name, "block", "mlp") if name.startswith("mtp_") else (name, "mlp")
        bias = flat.get(("router", *mlp, "gate", "e_score_correction_bias"))
        if bias is None:
            known = ", ".join(sorted(path[1] for path in flat if path[-1] == "e_score_correction_bias"))
            raise ValueError(f"{name} has no routed experts to place; those that have: {known}")
        if placement.shape[:-1] != bias.shape[:-1]:
            raise ValueError(f"the placement of {name} is {list(placement.shape)}; give shape {[*bias.shape[:-1], 'slots']}")
        try:
            replicas = replicas_of(placement, bias.shape[-1])
        except ValueError as error:
            raise ValueError(f"the placement of {name}: {error}") from None
        at = "placement", *mlp, "experts", "copies"
        # The present index of each expert in the stack: its number, or its first slot.
        source = placement if at not in flat else np.take_along_axis(np.asarray(flat[at].slot_EC[..., 0]), placement, -1)
        for path in [path for path in flat if path[:-1] == ("params", *mlp, "experts")]:
            flat[path] = jax.tree.map(functools.partial(_in_slots, source=source, where="/".join(path)), flat[path])
        sharding = getattr(jax.tree.leaves(flat["params", *mlp, "experts", "gate_proj"])[0], "sharding", None)
        if isinstance(sharding, NamedSharding):
            flat[at] = jax.device_put(replicas, NamedSharding(sharding.mesh, PartitionSpec()))
        else:
            flat[at] = jax.tree.map(jnp.asarray, replicas)
    return traverse_util.unflatten_dict(flat)


def _in_slots(leaf: Any, source: np.ndarray, where: str) -> jax.Array:
    """Return the experts `source` [(L,) P] of a stack [(L,) E, ...], sharded like it; ValueError if shards do not divide P."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return _take(leaf, source)
    stack_axis = source.ndim - 1
    if sharding.spec[stack_axis : stack_axis + 1] != (EXPERT_AXIS,):
        return jax.jit(_take, out_shardings=sharding)(leaf, source)
    num_shards = sharding.mesh.shape[EXPERT_AXIS]
    if source.shape[-1] % num_shards:
        raise ValueError(
            f"{where}: {source.shape[-1]} slots are no multiple of mesh.expert ({num_shards}); use a multiple of it"
        )
    return _take_from_shards(leaf, source, sharding)


def _take(stack_EX: Array, source_P: Array) -> jax.Array:
    take = functools.partial(jnp.take, axis=0)
    return (take if source_P.ndim == 1 else jax.vmap(take))(jnp.asarray(stack_EX), source_P)


@functools.partial(jax.jit, static_argnames="sharding")
def _take_from_shards(stack_EX: jax.Array, source_P: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Compute `_take` of experts split over shards: each holds one other shard's experts at a time, never all of them."""
    collect = _collect if source_P.ndim == 1 else jax.vmap(_collect)
    specs = sharding.spec, PartitionSpec()
    return jax.shard_map(collect, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)(stack_EX, source_P)


def _collect(held_eX: jax.Array, source_P: jax.Array) -> jax.Array:
    """Pass the shards' experts around the ring, in `jax.shard_map`; return those for this shard's slots, [p, ...]."""
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

    # The first pick is wrong for a slot with another shard's expert; the hop from that shard replaces it.
    return jax.lax.fori_loop(1, num_shards, hop, (held_eX, held_eX[source_p % local]))[1]
