"""Redundant copies of hot experts (section 3.4 of the report): which shard of the `expert` axis holds which expert, how often.

The busiest shard sets the pace of all, so an expert that many tokens choose is held by several shards, which share its
tokens evenly. Choosing stays *logical*, among E experts; what a token is sent to is a *slot*, of which there are P, the
same number on every shard, each with one copy. Who holds what is decided here from observed loads, on the host; which
copy a token takes is decided in the program, by nothing but the token's place in the batch.

Axes beyond the project's legend: P slots, shard after shard; Z shards; S the slots of one shard; C the most copies of any
expert.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# 2^32 over the golden ratio. Its multiples modulo 2^32 fall evenly, for every token of a run and for every n-th alike:
# the parity of a token's place would follow a text in which every second token is of a kind.
_GOLDEN = np.uint32(2654435769)

_GOOD_ENOUGH = 1.005
"""A largest load is good enough at so many times the bound that no placement can be below."""

Array = jax.Array | np.ndarray


class Copies(NamedTuple):
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


def place_copies(counts: np.ndarray, num_shards: int, slots_per_shard: int) -> np.ndarray:
    """The expert in each slot, so that the busiest shard has as little to do as can be.

    Every expert has a copy, and no shard two of the same. Copies go, one after the other, to the expert with the largest
    load per copy; they are dealt to the shards from the heaviest to the lightest, and then swapped between the busiest
    shard and others for as long as that helps. Where that leaves much to gain, the last copies go to the lightest experts
    instead: a slot with next to nothing to do is what a hot expert wants beside it.

    Args:
      counts: [E], tokens seen to choose each expert, or [L, E] for a stack of layers, each placed by itself.
      num_shards: size of the mesh's `expert` axis.
      slots_per_shard: experts that each shard has memory for: E / num_shards and some more.

    Returns:
      int32 [P], or [L, P], with P = num_shards * slots_per_shard.

    Raises:
      ValueError: if a count is negative or not finite, or for fewer slots than experts, or more in a shard than experts.
    """
    counts = np.asarray(counts, np.float64)
    _check(counts, num_shards, slots_per_shard)
    if counts.ndim == 2:
        return np.stack([place_copies(counts_E, num_shards, slots_per_shard) for counts_E in counts])
    return _best_placement(counts, num_shards, slots_per_shard).reshape(-1).astype(np.int32)


def _best_placement(counts_E: np.ndarray, num_shards: int, slots_per_shard: int) -> np.ndarray:
    """The expert in each slot, [Z, S]: the best by any number of copies for the heaviest, or the first that is good enough."""
    spare = num_shards * slots_per_shard - len(counts_E)
    # No placement is below an even share, nor below the largest load per copy with all the copies against that.
    bound = max(counts_E.sum() / num_shards, (counts_E / _copies(counts_E, num_shards, spare, 0)).max())
    best, least = np.empty(0), np.inf
    for heavy in range(spare, -1, -1):
        copies_E = _copies(counts_E, num_shards, heavy, spare - heavy)
        share_E = counts_E / copies_E
        expert_ZS = _swapped(_dealt(share_E, copies_E, num_shards), share_E)
        largest = share_E[expert_ZS].sum(1).max()
        if largest < least:
            best, least = expert_ZS, largest
        if least <= _GOOD_ENOUGH * bound:
            break
    return best


def _check(counts: np.ndarray, num_shards: int, slots_per_shard: int) -> None:
    """Raises what `place_copies` says."""
    if counts.ndim not in (1, 2) or not counts.size:
        raise ValueError(f"counts have shape {list(counts.shape)}; give one for each expert, [E], or [L, E] for a stack")
    wrong = counts[~(np.isfinite(counts) & (counts >= 0))]
    if wrong.size:
        raise ValueError(f"a count of {wrong[0]} tokens is no load of an expert; give finite counts of at least 0")
    E = counts.shape[-1]
    if min(num_shards, slots_per_shard) < 1 or num_shards * slots_per_shard < E:
        raise ValueError(
            f"{num_shards} shards of {slots_per_shard} slots do not hold {E} experts; give at least "
            f"{-(-E // max(num_shards, 1))} slots a shard"
        )
    if slots_per_shard > E:
        raise ValueError(
            f"a shard of {slots_per_shard} slots would hold one of {E} experts twice; give at most {E} slots a shard"
        )


def _copies(counts_E: np.ndarray, num_shards: int, heavy: int, light: int) -> np.ndarray:
    """Copies of each expert, at most one a shard: one, `heavy` more to the heaviest per copy, and `light` to the lightest."""
    copies_E = np.ones(len(counts_E), np.int64)
    for sign in [-1] * heavy + [1] * light:
        key_E = np.where(copies_E < num_shards, sign * counts_E / copies_E, np.inf)
        # Of equal loads, the expert with fewest copies.
        copies_E[np.lexsort((copies_E, key_E))[0]] += 1
    return copies_E


def _dealt(share_E: np.ndarray, copies_E: np.ndarray, num_shards: int) -> np.ndarray:
    """Slots to shards in turn, the heaviest first, [Z, S]. An expert's stand together, so that no shard gets two of them."""
    heaviest_E = np.argsort(-share_E, kind="stable")
    return np.repeat(heaviest_E, copies_E[heaviest_E]).reshape(-1, num_shards).T.copy()


def _swapped(expert_ZS: np.ndarray, share_E: np.ndarray) -> np.ndarray:
    """Swaps one slot of the busiest shard for one of another, the best first, until none lowers the larger of the two loads."""
    while True:
        load_ZS = share_E[expert_ZS]
        load_Z = load_ZS.sum(1)
        busiest = load_Z.argmax()
        ours_S = expert_ZS[busiest]
        # [slot of the busiest, other shard, its slot]: what the busiest would be rid of, and the larger load afterwards.
        less = load_ZS[busiest][:, None, None] - load_ZS
        larger = np.maximum(load_Z[busiest] - less, load_Z[:, None] + less)
        # Neither may get an expert that it has.
        larger[(expert_ZS[:, :, None] == ours_S).any(1).T] = np.inf
        larger[:, np.isin(expert_ZS, ours_S)] = np.inf
        i, other, j = np.unravel_index(larger.argmin(), larger.shape)
        # Less by more than a rounding, or two shards could swap for ever.
        if larger[i, other, j] >= load_Z[busiest] * (1 - 1e-9):
            return expert_ZS
        ours_S[i], expert_ZS[other, j] = expert_ZS[other, j], ours_S[i]


def shard_loads(expert_P: np.ndarray, counts_E: np.ndarray, num_shards: int) -> np.ndarray:
    """The tokens that each shard is due, float64 [Z], where an expert's are split evenly over its copies."""
    copies_E = np.bincount(expert_P, minlength=len(counts_E))
    return (np.asarray(counts_E, np.float64) / copies_E)[expert_P].reshape(num_shards, -1).sum(1)


def copies_of(placement: np.ndarray, num_experts: int) -> Copies:
    """Where the copies of each expert are, given the expert in each slot: [P], or [L, P] with tables that gain an axis L.

    Raises:
      ValueError: if an expert is in no slot, or a slot's is none of `num_experts`.
    """
    if placement.ndim == 2:
        layers = [copies_of(expert_P, num_experts) for expert_P in placement]
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
    return Copies(*(table.astype(np.int32) for table in (placement, slot_EC, copies_E)))


def _widened(copies: Copies, width: int) -> Copies:
    missing = width - copies.slot_EC.shape[1]
    return copies._replace(slot_EC=np.pad(copies.slot_EC, ((0, 0), (0, missing)), mode="edge"))
