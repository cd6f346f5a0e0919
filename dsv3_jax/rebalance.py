"""Expert-parallel load balancing (EPLB): placement of redundant experts by the loads that a run has counted.

`python -m dsv3_jax.rebalance RUN --shards 32 --slots 9 --output placement.npz` reads RUN/expert_load.npz and prints, for
every layer, the load of the busiest shard over the mean before and after; `infer.py --placement placement.npz` serves with it.

Axes beyond the project's legend: P slots, shard after shard; Z shards; S the slots of one shard.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.config.cli import OneLineParser, cli_main
from dsv3_jax.files import read_arrays, write_arrays
from dsv3_jax.model import abstract_variables
from dsv3_jax.parallel.replicas import place_experts

_GOOD_ENOUGH = 1.005
"""A largest load up to this factor above the lower bound of all placements is good enough."""


def rebalance_experts(counts: np.ndarray, num_shards: int, slots_per_shard: int) -> np.ndarray:
    """Return the expert in each slot that minimises, approximately, the load of the busiest shard.

    Every expert has a copy, and no shard has two of one expert. Copies go, one after the other, to the expert with the largest
    load per copy; they are dealt to the shards from the heaviest to the lightest, and then swapped between the busiest
    shard and others for as long as that helps. If the result is far from the bound, the last copies go to the lightest experts
    instead: a shard with a hot expert needs slots with next to no load.

    Args:
      counts: [E], tokens that chose each expert, or [L, E] for a stack of layers, each placed by itself.
      num_shards: size of the mesh's `expert` axis.
      slots_per_shard: experts that each shard has memory for: E / num_shards and some more.

    Returns:
      int32 [P], or [L, P], with P = num_shards * slots_per_shard.

    Raises:
      ValueError: if a count is negative or not finite, or for fewer slots than experts, or more in a shard than experts.
    """
    counts = np.asarray(counts, np.float64)
    _check_sizes(counts, num_shards, slots_per_shard)
    if counts.ndim == 2:
        return np.stack([rebalance_experts(counts_E, num_shards, slots_per_shard) for counts_E in counts])
    return _best_placement(counts, num_shards, slots_per_shard).reshape(-1).astype(np.int32)


def _best_placement(counts_E: np.ndarray, num_shards: int, slots_per_shard: int) -> np.ndarray:
    """Return the expert in each slot, [Z, S]: the best over the copies that go to heavy experts, or the first good enough."""
    spare = num_shards * slots_per_shard - len(counts_E)
    # Lower bound of all placements: an even share, and the largest load per copy with all copies given to heavy experts.
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


def _check_sizes(counts: np.ndarray, num_shards: int, slots_per_shard: int) -> None:
    one_or_two = counts.ndim in (1, 2) and counts.size > 0
    check(one_or_two, f"counts have shape {list(counts.shape)}; give one for each expert, [E], or [L, E] for a stack")
    wrong = counts[~(np.isfinite(counts) & (counts >= 0))]
    if wrong.size:
        raise ValueError(f"a count of {wrong[0]} tokens is no load of an expert; give finite counts of at least 0")
    E, slots = counts.shape[-1], f"{num_shards} shards of {slots_per_shard} slots"
    enough = min(num_shards, slots_per_shard) >= 1 and num_shards * slots_per_shard >= E
    check(enough, f"{slots} do not hold {E} experts; give at least {-(-E // max(num_shards, 1))} slots a shard")
    twice = f"a shard of {slots_per_shard} slots would hold one of {E} experts twice; give at most {E} slots a shard"
    check(slots_per_shard <= E, twice)


def _copies(counts_E: np.ndarray, num_shards: int, heavy: int, light: int) -> np.ndarray:
    """Return the copies of each expert, at most one per shard: 1, and `heavy` more to the heaviest, `light` to the lightest."""
    copies_E = np.ones(len(counts_E), np.int64)
    for sign in [-1] * heavy + [1] * light:
        key_E = np.where(copies_E < num_shards, sign * counts_E / copies_E, np.inf)
        # On ties, the expert with fewest copies.
        copies_E[np.lexsort((copies_E, key_E))[0]] += 1
    return copies_E


def _dealt(share_E: np.ndarray, copies_E: np.ndarray, num_shards: int) -> np.ndarray:
    """Deal copies to shards in turn, the heaviest first, [Z, S]; copies of an expert in a row, so that no shard gets two."""
    heaviest_E = np.argsort(-share_E, kind="stable")
    return np.repeat(heaviest_E, copies_E[heaviest_E]).reshape(-1, num_shards).T.copy()


def _swapped(expert_ZS: np.ndarray, share_E: np.ndarray) -> np.ndarray:
    """Swap a slot of the busiest shard for one of another, the best pair first, until no swap lowers the larger load."""
    while True:
        load_ZS = share_E[expert_ZS]
        load_Z = load_ZS.sum(1)
        busiest = load_Z.argmax()
        ours_S = expert_ZS[busiest]
        # [slot of the busiest, other shard, its slot]: load that the busiest loses by a swap, and the larger load after it.
        less = load_ZS[busiest][:, None, None] - load_ZS
        larger = np.maximum(load_Z[busiest] - less, load_Z[:, None] + less)
        # No shard may get an expert that it has.
        larger[(expert_ZS[:, :, None] == ours_S).any(1).T] = np.inf
        larger[:, np.isin(expert_ZS, ours_S)] = np.inf
        i, other, j = np.unravel_index(larger.argmin(), larger.shape)
        # By more than a rounding error, else two shards could swap for ever.
        if larger[i, other, j] >= load_Z[busiest] * (1 - 1e-9):
            return expert_ZS
        ours_S[i], expert_ZS[other, j] = expert_ZS[other, j], ours_S[i]


def shard_loads(expert_P: np.ndarray, counts_E: np.ndarray, num_shards: int) -> np.ndarray:
    """Return the expected tokens of each shard, float64 [Z], with an expert's split evenly over its copies."""
    copies_E = np.bincount(expert_P, minlength=len(counts_E))
    return (np.asarray(counts_E, np.float64) / copies_E)[expert_P].reshape(num_shards, -1).sum(1)


def read_placement(path: str, config: ModelConfig, num_shards: int) -> dict[str, np.ndarray]:
    """Read a placement file: stack name -> expert in each slot, int32 [L, P] or [P].

    Raises:
      ValueError: if the file cannot be read, or does not fit `config` on `num_shards` shards.
    """
    placement = read_arrays(epath.Path(path))
    for name, expert_P in placement.items():
        slots = f"{path}: {name} has {expert_P.shape[-1]} slots"
        check(expert_P.shape[-1] % num_shards == 0, f"{slots}, no multiple of mesh.expert ({num_shards}); place for that many")
    try:
        jax.eval_shape(lambda variables: place_experts(variables, placement), abstract_variables(config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return placement


def _busiest(expert_P: np.ndarray, counts_E: np.ndarray, num_shards: int) -> float:
    """Return the load of the busiest shard over the mean."""
    loads_Z = shard_loads(expert_P, counts_E, num_shards)
    return float(loads_Z.max() / max(loads_Z.mean(), 1e-30))


def _report(name: str, counts: np.ndarray, placement: np.ndarray, num_shards: int) -> None:
    """Print for each layer the busiest shard's load over the mean, without copies and with the placement."""
    E = counts.shape[-1]
    for layer, (counts_E, expert_P) in enumerate(zip(np.atleast_2d(counts), np.atleast_2d(placement), strict=True)):
        before = f"{_busiest(np.arange(E), counts_E, num_shards):.2f} -> " if E % num_shards == 0 else ""
        label = name if counts.ndim == 1 else f"{name}[{layer}]"
        print(f"{label}: busiest shard {before}{_busiest(expert_P, counts_E, num_shards):.2f} times the mean")


@cli_main
def main(arguments: Sequence[str] | None = None) -> None:
    """Compute a placement from the loads of a run, print the busiest shards before and after, and write the file."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="python -m dsv3_jax.rebalance", description=__doc__, formatter_class=formatter)
    parser.add_argument("load", help="run directory of train.py, or an expert_load.npz: loads by stack, [L, E] or [E]")
    parser.add_argument("--shards", type=int, required=True, help="size of the mesh's expert axis")
    parser.add_argument("--slots", type=int, required=True, help="experts that each shard holds, copies included")
    parser.add_argument("--output", required=True, help="placement file to write, .npz")
    parsed = parser.parse_args(arguments)
    path = epath.Path(parsed.load)
    loads = read_arrays(path / "expert_load.npz" if path.is_dir() else path)
    check(bool(loads), f"{parsed.load} holds no loads; give a run of a model with routed experts")
    placements = {name: rebalance_experts(counts, parsed.shards, parsed.slots) for name, counts in loads.items()}
    for name, placement in placements.items():
        _report(name, loads[name], placement, parsed.shards)
    write_arrays(epath.Path(parsed.output), placements)


if __name__ == "__main__":
    main()
