"""`python -m dsv3_jax.plan`: counts of whole models, from arithmetic of their own, and no array made."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.cli import load_config
from dsv3_jax.plan.__main__ import main
from dsv3_jax.plan.tables import count_parameters
from tests.model.tiny import CONFIG, DENSE_ONLY
from tests.shipped import SHIPPED, shipped

ROOT = pathlib.Path(__file__).parents[2]


def counted(c: ModelConfig) -> dict[str, int]:
    """Section 4.2 of the report, multiplied out."""
    D, N, H, P, W, C = (
        c.hidden_size,
        c.num_attention_heads,
        c.qk_nope_head_dim,
        c.qk_rope_head_dim,
        c.v_head_dim,
        c.kv_lora_rank,
    )
    query = D * N * (H + P) if c.q_lora_rank is None else c.q_lora_rank * (D + 1 + N * (H + P))
    attention = query + D * (C + P) + C + C * N * (H + W) + N * W * D
    expert, gate = 3 * D * c.moe_intermediate_size, (D + 1) * c.n_routed_experts
    dense = attention + 2 * D + 3 * D * c.intermediate_size

    def moe(experts: int) -> int:
        return attention + 2 * D + gate + experts * expert

    ends = 2 * c.vocab_size * D + D
    layers, shared = c.num_hidden_layers - c.first_k_dense_replace, c.n_shared_experts
    return {
        "parameters_main": ends + c.first_k_dense_replace * dense + layers * moe(c.n_routed_experts + shared),
        "parameters_mtp": c.num_nextn_predict_layers * (moe(c.n_routed_experts + shared) + 3 * D + 2 * D * D),
        "parameters_active": ends + c.first_k_dense_replace * dense + layers * moe(c.num_experts_per_tok + shared),
        "experts": layers * (c.n_routed_experts + shared),
        "experts_active": layers * (c.num_experts_per_tok + shared),
    }


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    main()


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        DENSE_ONLY,
        dataclasses.replace(CONFIG, q_lora_rank=None, n_shared_experts=0),
        *(shipped(name).model for name in SHIPPED),
    ],
)
def test_counts(config: ModelConfig) -> None:
    found = count_parameters(config)
    modules = found.pop("modules")
    assert found == counted(config)
    assert sum(modules.values()) == found["parameters_main"] + found["parameters_mtp"]


def test_modules() -> None:
    """Every module once, experts and gate apart from one another."""
    modules = count_parameters(CONFIG)["modules"]
    D, V, E, F = CONFIG.hidden_size, CONFIG.vocab_size, CONFIG.n_routed_experts, CONFIG.moe_intermediate_size
    assert modules["embed"] == modules["lm_head"] == V * D
    assert modules["moe_layers/mlp/experts"] == 2 * E * 3 * D * F
    assert modules["moe_layers/mlp/gate"] == 2 * E * (D + 1)
    assert {"norm", "dense_layers/mlp", "dense_layers/self_attn", "moe_layers/self_attn", "mtp_0", "mtp_1"} <= modules.keys()


def test_json_is_one_object_and_nothing_else(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The published model, whose numbers are in the report."""
    run(monkeypatch, "--config", str(ROOT / "configs/v3_671b.py"), "--json")
    out, err = capsys.readouterr()
    assert err == ""
    assert len(out.splitlines()) == 1
    found = json.loads(out)
    assert found["parameters_main"] == 671_026_419_200
    assert found["parameters_mtp"] + 2 * 129280 * 7168 == 13_463_426_304
    assert found["parameters_active"] == pytest.approx(37.55e9, abs=0.005e9)
    assert (found["experts"], found["experts_active"]) == (14_906, 522)


def test_table_and_overrides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fields of the config can be set; the table ends in the same numbers."""
    run(monkeypatch, "--config", str(ROOT / "configs/tiny.py"), "--model.num_nextn_predict_layers", "0")
    tiny = dataclasses.replace(load_config(str(ROOT / "configs/tiny.py")).model, num_nextn_predict_layers=0)
    rows = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.count("│") == 3]
    table = {name.strip(): number.strip() for name, number in rows}
    for name, number in counted(tiny).items():
        assert table[name.replace("_", " ")] == f"{number:,}"
    assert table["embed"] == f"{tiny.vocab_size * tiny.hidden_size:,}"
    assert not any(name.startswith("mtp_") for name in table)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--config", "configs/absent.py"], "configs/absent.py"),
        (["--model.num_experts_per_tok", "999"], "num_experts_per_tok (999)"),
        (["--jason"], "jason"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("DSV3_JAX_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert (exit_.value.code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert complaint in err


@pytest.mark.slow
def test_devices_from_a_shell() -> None:
    """The way a user runs it: JAX has one CPU device until the program asks for more."""
    sizes = "--mesh.fsdp 2 --mesh.expert 2 --train.batch_size 4 --train.sequence_length 32 --model.num_hidden_layers 1"
    sizes += " --model.first_k_dense_replace 0 --model.num_nextn_predict_layers 0"
    command = [sys.executable, "-m", "dsv3_jax.plan", "--config", "configs/tiny.py", "--devices", "4", "--json", *sizes.split()]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["devices"], found["mesh"]["fsdp"], found["mesh"]["expert"]) == (4, 2, 2)
    assert found["fits"] is None
    assert {one["axis"] for one in found["collectives"]} >= {"fsdp", "expert"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--devices", "4", "--topology", "v5p:2x2x1"], "--topology and --devices exclude each other"),
        (["--devices", "8"], "the mesh has 1 place for 8 devices; set mesh.fsdp to -1"),
        (["--devices", "0"], "--devices is 0; it must be at least 1"),
        (["--slices", "2"], "--slices belongs to --topology"),
        (["--topology", "v9:2x2"], "topology 'v9:2x2' is not chip:AxBxC"),
        (["--devices", "8", "--mesh.fsdp", "3"], "has 3 places for 8 devices"),
    ],
)
def test_bad_machines_are_one_line(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    test_bad_input_is_one_line_and_exit_2(arguments, complaint, monkeypatch, capsys)
