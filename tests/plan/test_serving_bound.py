"""The bound of a step of generation, counted by hand and against the count of training."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from jax.sharding import AbstractMesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.plan.hlo import Collective
from dsv3_jax.plan.program import Compiled
from dsv3_jax.plan.serving import Arguments, Limits, Serving, Step, Weights, Work, abstract_arguments, limits, work

# Wide enough that a chunk of 16 is cheaper in expanded form, 16 (2 C - H - W) > C (H + W), and a token or two are not.
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    num_hidden_layers=3,
    num_nextn_predict_layers=1,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=32,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=8,
    intermediate_size=128,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    max_position_embeddings=256,
).with_dtype("bfloat16")
D, V, N, Q, C, H, P, W, F, E, K = 256, 64, 4, 128, 32, 4, 2, 8, 16, 8, 2
EIGHT = (1, 1, 4, 1, 2)


@functools.cache
def arguments(serving: Serving, sizes: tuple[int, ...]) -> Arguments:
    return abstract_arguments(CONFIG, serving, AbstractMesh(sizes, AXES))


def worked(serving: Serving, step: Step, sizes: tuple[int, ...], backend: str = "pallas_tpu") -> Work:
    return work(CONFIG, serving, step, arguments(serving, sizes), backend)


@pytest.mark.parametrize("expert", [1, 4])
def test_a_whole_context_costs_the_forward_pass_of_training(expert: int) -> None:
    """Of which the head sees one token. Along `expert` a device has its own chunk, and all of its dense part."""
    serving = Serving(batch=4, context=128, chunk=128)
    forward = 128 * flops_per_token(dataclasses.replace(CONFIG, num_nextn_predict_layers=0), 128).causal / 3
    found = worked(serving, Step.of_prefill(serving), (1, 1, expert, 1, 1))
    assert found.flops == pytest.approx(forward - 127 * 2 * V * D, rel=1e-12)
    assert found.cache_bytes == 0


def test_decode_by_hand() -> None:
    """One of two sequences a device, all of 4 x 2 devices; half of the heads, hidden units and vocabulary on each."""
    serving = Serving(batch=8, context=100, chunk=16)
    step = Step.of_decode(serving, 4)
    assert step == Step(rows=2, heads=2, start=100, sequences=2)
    found = worked(serving, step, EIGHT)
    whole = D * Q + D * (C + P)  # q_a and kv_a, on every device
    halved = Q * N * (H + P) + N * C * (H + W) + N * W * D  # q_b, W_UK, W_UV and o
    dense = 3 * D * 128 // 2
    moe = D * E + 3 * D * F // 2  # gate and shared expert
    rows = 3 * (whole + halved // 2) + dense + 2 * moe + V * D // 2
    experts = 2 * 3 * (E // 4) * D * F // 2  # two layers' two experts a device, each with 8 K / E rows
    keys = 2 * (100 + 1)
    attention = 3 * keys * 2 * (N // 2) * (2 * C + P)
    assert found.flops == 2 * 2 * rows + 2 * experts * 8 * K / E + attention
    norms = (2 * D + Q + C) * 3 + D
    biases = 2 * E * 4
    assert found.weight_bytes == pytest.approx(2 * (rows + norms) + biases + 2 * experts * (1 - (1 - K / E) ** 8))
    assert found.cache_bytes == 2 * 100 * 3 * (C + P) * 2
    assert found.copied_bytes == 0
    mtp = whole + halved // 2 + N * C * (H + W) // 2 + moe + 3 * (E // 4) * D * F // 2 + 2 * D * D + 5 * D + Q + C
    assert found.unused_bytes == 2 * (mtp + 3 * N * C * (H + W) // 2) + E * 4


def test_weights_split_along_fsdp_are_used_whole() -> None:
    """The arithmetic is that of replicas; each device reads its half, and writes and reads what is gathered."""
    serving = Serving(batch=8, context=100, chunk=16)
    step = Step.of_decode(serving, 4)
    split, replicas = (worked(serving, step, sizes) for sizes in ((1, 2, 2, 1, 2), (2, 1, 2, 1, 2)))
    assert (split.flops, split.cache_bytes) == (replicas.flops, replicas.cache_bytes)
    norms_and_biases = 2 * ((2 * D + Q + C) * 3 + D) + 2 * E * 4
    experts = 2 * 2 * 3 * (E // 2) * D * F // 2
    visited = 1 - (1 - K / E) ** 4
    dense = replicas.weight_bytes - norms_and_biases - visited * experts
    assert split.weight_bytes == pytest.approx(norms_and_biases + dense / 2 + experts / 2)
    assert split.copied_bytes == pytest.approx(2 * dense + (1 + visited) * experts)


def test_8_bits_are_gathered_before_they_are_made_wide() -> None:
    """Each device reads its half, all are written whole in 8 bits, and the experts of these once more in 16."""
    serving = Serving(batch=8, context=100, chunk=16, weights="fp8")
    step = Step.of_decode(serving, 4)
    split, replicas = (worked(serving, step, sizes) for sizes in ((1, 2, 2, 1, 2), (2, 1, 2, 1, 2)))
    assert split.flops == replicas.flops
    values, visited = 2 * 3 * (E // 2) * D * F // 2, 1 - (1 - K / E) ** 4
    scales = 4 * (3 * (2 + 1 + 2 + 2) + 3 * 2 + 2 * 3 * 2 + 2 * 3 * (E // 2) * 2)  # Of no weight are they split along fsdp.
    dense = replicas.weight_bytes - (2 * ((2 * D + Q + C) * 3 + D) + 2 * E * 4) - scales - values
    assert split.weight_bytes == pytest.approx(replicas.weight_bytes - (dense + values) / 2)
    assert split.copied_bytes == pytest.approx(2 * dense + 2 * values + 2 * values * (1 + visited))


def test_a_draft_is_one_token_more_and_one_layer_more() -> None:
    drafting = Serving(batch=8, context=100, chunk=16, drafts=1)
    assert Step.of_decode(drafting, 4) == Step(rows=4, heads=6, start=100, sequences=2)
    assert Step.of_prefill(drafting) == Step(rows=16, heads=2, start=84, sequences=1)
    without = dataclasses.replace(drafting, drafts=0)
    found, plain = (worked(each, Step.of_decode(each, 4), EIGHT) for each in (drafting, without))
    assert found.cache_bytes == plain.cache_bytes * 4 / 3
    assert found.unused_bytes == 2 * 4 * N * C * (H + W) // 2  # W_kvb of three layers and the depth
    block = D * Q + D * (C + P) + D * E + (Q * N * (H + P) + N * C * (H + W) + N * W * D + 3 * D * F) // 2
    depth = 4 * (block + 2 * D * D) + 3 * (E // 4) * D * F // 2 * 16 * K / E
    scores = (4 * 4 * 101.5 - 2 * 3 * 2 * 101) * (N // 2) * (2 * C + P)
    assert found.flops - 2 * plain.flops == 2 * (depth + 2 * V * D // 2 + scores)


def test_a_later_chunk_expands_what_is_cached() -> None:
    """W_kvb for 84 tokens before a chunk of 16, and their scores and sums."""
    late = Serving(batch=4, context=100, chunk=16)
    first = Serving(batch=4, context=16, chunk=16)
    sizes = (1, 1, 4, 1, 1)
    after, alone = (worked(each, Step.of_prefill(each), sizes) for each in (late, first))
    expanding = 84 * 2 * N * C * (H + W)
    assert after.flops - alone.flops == 3 * (expanding + 16 * 84 * 2 * N * (H + P + W))
    assert after.cache_bytes == 84 * 3 * (C + P) * 2


@pytest.mark.parametrize("backend", ["pallas_tpu", "tiles", "ragged_dot"])
def test_weights_in_8_bits(backend: str) -> None:
    """A byte a value and a number a block, and the same arithmetic.

    A kernel reads the experts that have rows, from a copy of all in 16 bits. Tiles take them as they are. XLA's own product
    reads all, from such a copy too.
    """

    def decoded(weights: Weights) -> Work:
        serving = Serving(batch=8, context=100, chunk=16, weights=weights)
        return worked(serving, Step.of_decode(serving, 4), (1, 1, 1, 1, 1), backend)

    eight, sixteen = decoded("fp8"), decoded("bfloat16")
    assert eight.flops == sixteen.flops
    experts = 2 * 3 * E * D * F
    scales_of_experts = 2 * 3 * E * 2 * 4
    visited = 1 - (1 - K / E) ** 2
    q, o, rest = D * Q + Q * N * (H + P) + D * (C + P), N * W * D, 3 * D * 128 + 2 * 3 * D * F
    scales = 3 * (2 + 1 + 2 + 2) + 3 * 2 + 2 * 3 * 2  # blocks of q_a, q_b, kv_a and o; of the dense FFN; of the shared experts
    dense = 3 * (q + o) + rest - 4 * scales
    before, after, copied = {
        "pallas_tpu": (visited * 2 * experts, experts + scales_of_experts, 2 * experts * (1 + visited)),
        "tiles": (visited * 2 * experts, visited * (experts + scales_of_experts), 0),
        "ragged_dot": (2 * experts, experts + scales_of_experts, 4 * experts),
    }[backend]
    assert sixteen.weight_bytes - eight.weight_bytes == pytest.approx(dense + before - after)
    assert eight.copied_bytes == pytest.approx(copied)
    assert sixteen.copied_bytes == 0


def test_limits_by_hand() -> None:
    chip = Chip(bf16_flops=1000.0, hbm_bytes=100.0, hbm_gib=1.0, ici_bytes=10.0, dcn_bytes=2.0)
    sent = [Collective("all-gather", "expert", 30, 1, False), Collective("all-reduce", "tensor", 8, 1, False)]
    compiled = Compiled(0, 0, 0, True, sent, {}, 1.0)
    done = Work(flops=500.0, weight_bytes=120.0, cache_bytes=50.0, copied_bytes=40.0, unused_bytes=7)
    assert limits(done, compiled, chip) == Limits(0.5, 1.6, 0.5, 3.8, 3.8)
    assert limits(done, dataclasses.replace(compiled, collectives=[]), chip).step_seconds == pytest.approx(2.1)
    assert limits(done._replace(flops=9000.0), compiled, chip).step_seconds == 9.0
