"""What a step of generation takes at least: its arithmetic, memory traffic and link traffic, each at the chip's peak.

A bound, as that of training (`roofline.py`). The weights are counted from the very arrays that the programs take: each is
read once, and every value of a matrix is a multiply-add for every row that comes through it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.cache import bytes_per_token, cached_layers
from dsv3_jax.model.mla import expanding_pays
from dsv3_jax.parallel.chips import Chip
from dsv3_jax.plan.arrays import device_bytes, device_values
from dsv3_jax.plan.compiled import Compiled
from dsv3_jax.plan.serving import Arguments, Serving

KV_B = "kv_b_proj"


class Work(NamedTuple):
    """Of one device, in one step."""

    flops: float
    weight_bytes: float
    """Read from HBM: of the routed experts those that somebody visits, on average."""
    cache_bytes: float
    """Read from HBM."""
    copied_bytes: float
    """Written to HBM and read again: experts in 8 bits, made bfloat16 for a kernel."""
    unused_bytes: int
    """Of weights that the program does not take."""


class Limits(NamedTuple):
    """Least seconds of a step, by what limits it."""

    compute_seconds: float
    weight_seconds: float
    """Reading weights from HBM, and writing and reading what of them is made wide."""
    cache_seconds: float
    """Reading the cache from HBM."""
    link_seconds: float
    step_seconds: float
    """The largest of arithmetic, HBM (weights and cache together) and links."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What comes through a device in one step."""

    rows: int
    """Tokens that run through the model."""
    heads: int
    """Rows that run through the head."""
    start: int
    """Tokens of each sequence that are in the cache before."""
    sequences: int
    """Sequences that are the device's own."""

    @classmethod
    def of_decode(cls, serving: Serving, shards: int) -> Step:
        """Each sequence's newest token and its drafts, at the end of the context; each draft comes through the head again."""
        own = serving.batch // shards
        return cls(own * (1 + serving.drafts), own * (1 + 2 * serving.drafts), serving.context, own)

    @classmethod
    def of_prefill(cls, serving: Serving) -> Step:
        """A chunk at the end of the context, of whose tokens the last is sampled from, and drafted after."""
        return cls(serving.chunk, 1 + serving.drafts, serving.start, 1)


def work(config: ModelConfig, serving: Serving, step: Step, arguments: Arguments) -> Work:
    """What one device does in a step.

    With t rows, S cached tokens and X devices of an expert group, and the heads and hidden units split along `tensor`:

      experts       t X K / E rows each, of which there are none with probability (1 - K / E)^(t X)
      dense         t rows each; head: `step.heads`; embedding: none, and next to no bytes
      attention     absorbed 2 N (2 C + P) a query and key, or expanded 2 N (H + P + W) and W_kvb for every cached token too

    Queries attend to all of the cache and, causally, to the step's own rows. Experts in 8 bits are all written
    to memory in bfloat16 and read again, as kernels take them; of other weights XLA can keep such copies on the chip.
    """
    mesh = jax.tree.leaves(arguments.variables)[0].sharding.mesh
    own = step.rows // step.sequences
    expanded = step.start == 0 or expanding_pays(config, own)
    flops = weight_bytes = copied_bytes = 0.0
    unused = 0
    group_rows = step.rows * mesh.shape["expert"]
    share = config.num_experts_per_tok / config.n_routed_experts
    visited = 1 - (1 - share) ** group_rows
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments.variables):
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        values, size = device_values(leaf), device_bytes(leaf)
        if not _takes(names, drafting=serving.drafts > 0, expanded=expanded):
            unused += size
            continue
        if "embed" in names:
            continue
        if "experts" in names:
            rows = group_rows * share
        elif KV_B in names and expanded:
            rows = step.rows + step.start * step.sequences
        else:
            rows = step.heads if "lm_head" in names else step.rows
        if leaf.ndim > 1 and names[-1] != "scale_inv":
            flops += 2 * values * rows
        weight_bytes += size * (visited if "experts" in names else 1)
        if "experts" in names and names[-1] == "values":  # Of a weight in 8 bits.
            copied_bytes += 2 * 2 * values
    layers = len(cached_layers(config, serving.drafts > 0))
    keys = step.rows * (step.start + (own + 1) / 2)
    C, H, P, W = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    width = H + P + W if expanded else 2 * C + P
    flops += layers * keys * 2 * config.num_attention_heads / mesh.shape["tensor"] * width
    cache_bytes = step.start * step.sequences * bytes_per_token(config, serving.drafts > 0)
    return Work(flops, weight_bytes, cache_bytes, copied_bytes, unused)


def _takes(names: list[str], *, drafting: bool, expanded: bool) -> bool:
    """Whether a program takes a variable: W_kvb or its two parts, and of the MTP depths the first if it drafts."""
    if any(name.startswith("mtp_") for name in names) and not (drafting and "mtp_0" in names):
        return False
    return KV_B not in names or expanded == ("absorbed" not in names)


def limits(work: Work, compiled: Compiled, chip: Chip) -> Limits:
    """Seconds of a step in which everything runs at its peak and overlaps; links as in `roofline`."""
    compute = work.flops / chip.bf16_flops
    weights, cache = (work.weight_bytes + work.copied_bytes) / chip.hbm_bytes, work.cache_bytes / chip.hbm_bytes
    links = sum(one.bytes for one in compiled.collectives or []) / chip.ici_bytes
    return Limits(compute, weights, cache, links, max(compute, weights + cache, links))
