"""What a step of generation takes at least: its arithmetic, memory traffic and link traffic, each at the chip's peak.

A bound, as that of training (`roofline.py`). The weights are counted from the very arrays that the programs take: each is
read once, and every value of a matrix is a multiply-add for every row that comes through it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.cache import bytes_per_token, cached_layers
from dsv3_jax.model.mla import expanding_pays
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.plan.program import Compiled, device_bytes, device_values, gathered
from dsv3_jax.plan.serving import Arguments, Serving

KV_B = "kv_b_proj"
VISITING = "pallas_tpu", "pallas_gpu", "tiles"
"""Backends of `expert_ffn` that leave experts without rows alone."""


class Work(NamedTuple):
    """Of one device, in one step."""

    flops: float
    weight_bytes: float
    """Read from HBM as they are held: of routed experts that are used so those that somebody visits, on average."""
    cache_bytes: float
    """Read from HBM."""
    copied_bytes: float
    """Written to HBM and read again: weights made whole, and experts in 8 bits made wide for a kernel."""
    unused_bytes: int
    """Of weights that the program does not take."""


class Limits(NamedTuple):
    """Least seconds of a step, by what limits it."""

    compute_seconds: float
    weight_seconds: float
    """Reading weights from HBM, and writing and reading what of them is made whole or wide."""
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


def work(config: ModelConfig, serving: Serving, step: Step, arguments: Arguments, backend: str) -> Work:
    """What one device does in a step.

    With t rows, S cached tokens and X devices of an expert group, and the heads and hidden units split along `tensor`:

      experts       t X K / E rows each, of which there are none with probability (1 - K / E)^(t X)
      dense         t rows each; head: `step.heads`; embedding: none, and next to no bytes
      attention     absorbed 2 N (2 C + P) a query and key, or expanded 2 N (H + P + W) and W_kvb for every cached token too

    Queries attend to all of the cache and, causally, to the step's own rows. Of the experts, kernels and "tiles" read those
    that have rows, other backends all. A weight that is split along `fsdp` is gathered, written whole and read again. Experts
    in 8 bits are all written to memory in bfloat16 and read again, but by "tiles"; of other weights XLA can keep such copies on
    the chip.

    Args:
      config: the model.
      serving: what is served.
      step: what comes through a device.
      arguments: of the program.
      backend: of `expert_ffn`, a name that is not "auto".
    """
    mesh = jax.tree.leaves(arguments.variables)[0].sharding.mesh
    drafting = serving.drafts > 0
    flops = _attention_flops(config, step, mesh.shape["tensor"], len(cached_layers(config, drafting)))
    weight_bytes = copied_bytes = 0.0
    for names, leaf in _weights(config, step, arguments.variables, drafting=drafting):
        flops += 2 * _multiplied(names, leaf) * _rows(config, step, mesh.shape["expert"], names)
        held, *copies = _forms(names, leaf, backend)
        share = _share_read(config, step, mesh.shape["expert"], names, backend)
        weight_bytes += held * (1.0 if copies else share)
        copied_bytes += sum(copies) + sum(copies[:-1]) + share * sum(copies[-1:])
    cache_bytes = step.start * step.sequences * bytes_per_token(config, drafting)
    return Work(flops, weight_bytes, cache_bytes, copied_bytes, unused_bytes(config, serving, step, arguments))


def unused_bytes(config: ModelConfig, serving: Serving, step: Step, arguments: Arguments) -> int:
    """Bytes on one device of the weights that a step's program does not take."""
    taken = [leaf for _, leaf in _weights(config, step, arguments.variables, drafting=serving.drafts > 0)]
    return device_bytes(arguments.variables) - device_bytes(taken)


def _weights(config: ModelConfig, step: Step, variables: Any, *, drafting: bool) -> Iterator[tuple[list[str], Any]]:
    """Names and array of each variable that the step's program takes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if _takes(names, drafting=drafting, expanded=_expands(config, step)):
            yield names, leaf


def _expands(config: ModelConfig, step: Step) -> bool:
    """Whether attention expands keys and values."""
    return step.start == 0 or expanding_pays(config, step.rows // step.sequences)


def _multiplied(names: list[str], leaf: Any) -> int:
    """Values of a variable that rows are multiplied with: all of a matrix, none of what is looked up, added or scaled by."""
    return 0 if "embed" in names or names[-1] == "scale_inv" or leaf.ndim < 2 else device_values(gathered(leaf))


def _rows(config: ModelConfig, step: Step, group: int, names: list[str]) -> float:
    """Rows that come through a matrix, on average; `group` is the number of devices of an expert group."""
    if "experts" in names:
        return step.rows * group * config.num_experts_per_tok / config.n_routed_experts
    if KV_B in names and _expands(config, step):
        return step.rows + step.start * step.sequences
    return step.heads if "lm_head" in names else step.rows


def _share_read(config: ModelConfig, step: Step, group: int, names: list[str], backend: str) -> float:
    """The share of a variable that is read to be multiplied with: of experts, on average, those that have rows."""
    used_by_all = names[-1] == "scale_inv" and backend != "tiles"  # To make every expert wide.
    if "experts" not in names or used_by_all or backend not in VISITING:
        return 1.0
    return 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** (step.rows * group)


def _forms(names: list[str], leaf: Any, backend: str) -> list[float]:
    """Bytes of a variable in every form that it has in memory, each made of all of the one before; the last is used."""
    if "embed" in names:
        return [0]
    whole = gathered(leaf)
    forms: list[float] = [device_bytes(leaf)]
    if device_values(whole) > device_values(leaf):
        forms.append(device_bytes(whole))
    if "experts" in names and names[-1] == "values" and backend != "tiles":  # Of a weight in 8 bits.
        forms.append(2 * device_values(whole))
    return forms


def _attention_flops(config: ModelConfig, step: Step, tensor: int, layers: int) -> float:
    """Of scores and sums."""
    own = step.rows // step.sequences
    keys = step.rows * (step.start + (own + 1) / 2)
    C, H, P, W = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    width = H + P + W if _expands(config, step) else 2 * C + P
    return layers * keys * 2 * config.num_attention_heads / tensor * width


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
