"""Training steps compiled for machines that are not there: what the compiler says, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh

from dsv3_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from dsv3_jax.kernels.grouped import KERNELS
from dsv3_jax.parallel.devices import CHIPS
from dsv3_jax.parallel.mesh import AXES, make_mesh
from dsv3_jax.plan import program as program_module
from dsv3_jax.plan.program import GIB, Compiled, bound, compile_program, least_hbm_bytes, state_on
from dsv3_jax.plan.topology import device_bytes, tpu_devices
from tests.h100 import h100_devices

SMALL = Config(
    model=ModelConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        max_position_embeddings=256,
        remat="full",
    ),
    mesh=MeshConfig(fsdp=2, expert=2),
    train=TrainConfig(batch_size=4, sequence_length=256),
)


ONE_LAYER = dataclasses.replace(SMALL.model, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)


@functools.cache
def compiled_for_cpu(micro_batches: int) -> Compiled:
    """The step where there is no TPU compiler, of one MoE layer."""
    train, size = SMALL.train, SMALL.train.batch_size
    if micro_batches > 1:
        train = dataclasses.replace(train, batch_size=micro_batches * size, micro_batch_size=size)
    config = dataclasses.replace(SMALL, model=dataclasses.replace(ONE_LAYER, dtype="float32"), train=train)
    return compile_program(config, make_mesh(SMALL.mesh, jax.devices()[:4]), None)


@pytest.mark.parametrize("depths", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.nightly)])
def test_a_step_with_the_ragged_exchange_compiles_for_tpu(tpu_compiler: str, depths: int) -> None:
    """The very step of train.py, forward and backward, for four chips of a v5p."""
    model = dataclasses.replace(ONE_LAYER, num_hidden_layers=2, num_nextn_predict_layers=depths)
    config = dataclasses.replace(SMALL, model=model)
    mesh = make_mesh(SMALL.mesh, tpu_devices("v5p:2x2x1"))
    program = compile_program(config, mesh, CHIPS["v5p"])
    assert program.fits is True
    assert device_bytes(state_on(config, mesh)) <= program.argument_bytes < program.total_bytes
    assert program.temporary_bytes is not None
    assert program.total_bytes >= program.argument_bytes + program.temporary_bytes
    assert program.collectives is not None
    found = {(one.kind, one.axis): one for one in program.collectives}
    # The scan over MoE layers and each MTP depth have the experts in the exchange's first round and in the loop over more,
    # and both passes have the forward kernels.
    experts = {"gate_up": 4, "down": 4, "dhidden": 2, "dx": 2, "dw_gate_up": 2, "dw_down": 2}
    assert {name: n for name, n in program.kernels.items() if "splash" not in name} == {
        f"expert_{k}": n * (1 + depths) for k, n in experts.items()
    }
    assert {"splash_mha_fwd_residuals", "splash_mha_dkv_no_residuals"} <= set(program.kernels)
    ragged = found["ragged-all-to-all", "expert"]
    # Two MoE layers and the MTP depths: a forward pass of two exchanges, and a backward of three, whose two further
    # ones carry a number for each row.
    assert ragged.count == (2 + depths) * (2 + 5)
    assert ragged.data_dependent
    assert found["all-gather", "fsdp"].bytes > 0
    assert found["reduce-scatter", "fsdp"].bytes > 0


@pytest.mark.slow
def test_attention_split_along_sequence_and_heads_compiles_for_tpu(tpu_compiler: str) -> None:
    """A device's place in the sequence is known only while it runs, and the table that splash is given depends on it."""
    dense = dataclasses.replace(SMALL.model, num_hidden_layers=1, num_nextn_predict_layers=0)
    run = dataclasses.replace(SMALL, model=dense, mesh=MeshConfig(context=2, tensor=2))
    program = compile_program(run, make_mesh(run.mesh, tpu_devices("v5p:2x2x1")), CHIPS["v5p"])
    assert {"splash_mha_fwd_residuals", "splash_mha_dkv_no_residuals"} <= set(program.kernels)


@pytest.mark.slow
def test_a_step_compiles_for_gpus(cuda_compiler: str) -> None:
    """The very step of train.py for four H100s, with every kernel for them in it."""
    # Keys as wide as the kernels take them.
    model = dataclasses.replace(ONE_LAYER, qk_rope_head_dim=64)
    config = dataclasses.replace(SMALL, model=model)
    mesh = make_mesh(config.mesh, h100_devices(4))
    program = compile_program(config, mesh, None)
    assert device_bytes(state_on(config, mesh)) <= program.argument_bytes < program.total_bytes
    kernels = {"attention", "attention_dk_dv", "attention_dq"} | {f"expert_{kernel}" for kernel in KERNELS}
    assert set(program.kernels) == kernels


@pytest.mark.slow
def test_a_program_that_does_not_fit_is_an_answer(tpu_compiler: str) -> None:
    model = dataclasses.replace(ONE_LAYER, hidden_size=8192, moe_intermediate_size=32768)
    run = dataclasses.replace(SMALL, model=model)
    program = compile_program(run, make_mesh(run.mesh, tpu_devices("v5e:2x2")), CHIPS["v5e"])
    assert program.fits is False
    assert program.total_bytes > CHIPS["v5e"].hbm_gib * GIB
    assert program.collectives is None


@pytest.mark.slow
def test_on_cpu_devices() -> None:
    """What it sends, by the CPU's exchange."""
    program = compiled_for_cpu(1)
    assert program.fits is None
    kinds = {one.kind for one in program.collectives or []}
    assert "all-to-all" in kinds
    assert "ragged-all-to-all" not in kinds


@pytest.mark.slow
def test_what_micro_batches_send_is_counted_as_often_as_there_are_any() -> None:
    """Their loop's length is an argument of the step, which the program's text does not tell."""

    def sent(micro_batches: int) -> dict[tuple[str, str], int]:
        program = compiled_for_cpu(micro_batches)
        assert program.collectives is not None
        return {(one.kind, one.axis): one.count for one in program.collectives}

    one, three = sent(1), sent(3)
    exchanges = {key for key in three if key[0] == "all-to-all"}
    assert exchanges
    for key in exchanges:
        assert three[key] == 3 * one[key] > 0


D, V, N, Q, C, H, P, W, F, E = 256, 512, 4, 128, 128, 64, 32, 64, 128, 8
ATTENTION = D * Q + Q * N * (H + P) + D * (C + P) + C * N * (H + W) + N * W * D
NORMS = 2 * D + Q + C
"""Values of a block's attention, and of its norms."""


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Config, AbstractMesh], int]:
    """Traces a state once for all that is asked about it, and gives its bytes on a device."""

    def trace(config: Config, mesh: AbstractMesh) -> int:
        state = state_on(config, mesh)
        monkeypatch.setattr("dsv3_jax.plan.program.state_on", lambda *_: state)
        return device_bytes(state)

    return trace


def test_least_hbm_bytes_by_hand(traced: Callable[[Config, AbstractMesh], int]) -> None:
    """Everything recomputed, weights over four devices. Of a weight are read or written two for its gradient, and more.

    In blocks three reads and two gathers, one read less of what makes their output; no gather of a norm; outside of blocks two
    reads and one gather; of the embedding nothing.
    """
    mesh = AbstractMesh((1, 2, 2, 1, 1), AXES)
    experts = 3 * D * F * E // 2
    sevens = 4 * ATTENTION + 2 * D * 512 + 3 * (D * E + 2 * D * F + experts)
    sixes = D * 512 + 3 * D * F
    fives = 4 * NORMS + 2 * D * D + V * D
    fours = 3 * D + D
    state = traced(SMALL, mesh)
    once = 7 * sevens + 6 * sixes + 5 * fives + 4 * fours
    assert least_hbm_bytes(SMALL, mesh) == 2 * state + 2 * once
    train = dataclasses.replace(SMALL.train, batch_size=12, micro_batch_size=4)
    assert least_hbm_bytes(dataclasses.replace(SMALL, train=train), mesh) == 2 * state + 3 * 2 * once


def test_least_hbm_bytes_of_one_device(traced: Callable[[Config, AbstractMesh], int]) -> None:
    """It gathers nothing and recomputes nothing but its experts."""
    config = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, remat="none"), mesh=MeshConfig())
    mesh = AbstractMesh((1,) * 5, AXES)
    experts = 3 * 3 * D * F * E
    ends, depth = V * D + D, 2 * D * D + 3 * D
    others = 4 * (ATTENTION + NORMS) + 3 * D * 512 + 3 * (D * E + 3 * D * F) + ends + depth
    state = traced(config, mesh)
    assert least_hbm_bytes(config, mesh) == 2 * state + 2 * (5 * experts + 4 * others)


def test_rows_of_an_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 tokens a device, two choices each, half of them to the other device of two."""
    traffic: list[dict[str, Any]] = []
    monkeypatch.setattr(program_module, "compile_for", lambda *_, **options: traffic.append(options))
    compile_program(SMALL, make_mesh(SMALL.mesh, jax.devices()[:4]), None)
    assert [options["ragged_rows"] for options in traffic] == [256 * 2 / 2]


@pytest.mark.slow
def test_bounds() -> None:
    mesh = make_mesh(SMALL.mesh, jax.devices()[:4])
    limits = bound(SMALL, mesh, compiled_for_cpu(1), CHIPS["v5p"])
    assert limits.hbm_seconds == pytest.approx(least_hbm_bytes(SMALL, mesh) / CHIPS["v5p"].hbm_bytes)
    assert limits.step_seconds == max(limits[:3])
