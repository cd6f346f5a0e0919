"""Generation compiled for machines that are not there: meshes, what is refused, and what the report says."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh

import dsv3_jax.plan.__main__ as command
from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.infer.cache import bytes_per_token
from dsv3_jax.parallel.devices import CHIPS
from dsv3_jax.parallel.mesh import AXES, make_mesh
from dsv3_jax.plan import serving as serving_module
from dsv3_jax.plan.program import GIB, Compiled
from dsv3_jax.plan.serving import (
    PAGE_SIZE,
    Part,
    Plan,
    Serving,
    Work,
    abstract_arguments,
    check_serves,
    report_serving,
    smallest_mesh,
)
from dsv3_jax.plan.topology import device_bytes, tpu_devices
from tests.plan.test_program import SMALL
from tests.plan.test_tables_parameters import ROOT, run, test_bad_input_is_one_line_and_exit_2

MODEL = dataclasses.replace(SMALL.model, num_hidden_layers=2, remat="none")
MOE_LAYER = dataclasses.replace(MODEL, num_hidden_layers=1, first_k_dense_replace=0)
ASKED = Serving(batch=8, context=256, chunk=256)


def reported(
    capsys: pytest.CaptureFixture,
    serving: Serving,
    devices: list[Any],
    mesh: MeshConfig | None,
    chip: str | None,
    model: ModelConfig = MODEL,
) -> Any:
    report_serving(model, serving, devices, mesh, CHIPS[chip] if chip else None, title="small", json=True)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    return json.loads(out)


def test_report_on_cpu_devices(capsys: pytest.CaptureFixture) -> None:
    """Both programs, the weights in 8 bits; what a device holds, and nothing that only an accelerator has."""
    asked = dataclasses.replace(ASKED, drafts=1, weights="fp8")
    found = reported(capsys, asked, jax.devices()[:4], MeshConfig(expert=2, tensor=2), None, MOE_LAYER)
    assert {name: found[name] for name in ("mode", "devices", "batch", "context", "chunk", "drafts", "hbm_bytes")} == {
        "mode": "serve", "devices": 4, "batch": 8, "context": 256, "chunk": 256, "drafts": 1, "hbm_bytes": None,
    }  # fmt: skip
    (plan,) = found["weights"].values()
    assert (plan["mesh"]["expert"], plan["mesh"]["tensor"], plan["fits"]) == (2, 2, None)
    # Half of eight sequences, of three pages each (one for what a step writes beyond), in a layer and the depth.
    assert plan["cache_bytes"] == 4 * 3 * PAGE_SIZE * bytes_per_token(MOE_LAYER, True)
    tokens = {"decode": 8, "prefill": 2 * 256}
    for name, part in ((name, plan[name]) for name in tokens):
        assert part["tokens"] == tokens[name]
        assert part["total_bytes"] > plan["weight_bytes"] + plan["cache_bytes"]
        assert part["roofline_seconds"] is part["fits"] is None
        assert part["weight_bytes_copied"] == 0  # Tiles make an expert wide while they visit it.
        assert part["compile_seconds"] > 0
    exchanges = {"decode": ("all-gather", "reduce-scatter"), "prefill": ("all-to-all",)}
    for name, kinds in exchanges.items():
        along = {one["kind"] for one in plan[name]["collectives"] if one["axis"] == "expert"}
        assert along >= set(kinds)


def test_the_printed_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A total of more than the compiler counts is not said to be the compiler's."""
    compiled = Compiled(0, 2 * GIB, 3 * GIB, True, [], {}, 1.0)
    idle = Work(flops=0.0, weight_bytes=0.0, cache_bytes=0.0, copied_bytes=0.0, unused_bytes=GIB)
    part = Part(compiled, idle, None, 8, 4 * GIB, True)
    plan = Plan(make_mesh(MeshConfig(expert=4, tensor=2), jax.devices()), GIB, GIB, {"decode": part, "prefill": part})
    monkeypatch.setattr(serving_module, "plan_serving", lambda *_: plan)
    asked = dataclasses.replace(ASKED, weights="fp8")
    report_serving(MODEL, asked, jax.devices(), MeshConfig(expert=4, tensor=2), CHIPS["v5p"], title="small", json=False)
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["weights", "1.00", "1.00"],
        ["cache of 8 x 256 tokens", "1.00", "1.00"],
        ["temporaries", "2.00", "2.00"],
        ["in all, with the weights it does not take", "4.00", "4.00"],
        ["HBM a program can use", "95.74", "95.74"],
    ]
    assert "It fits." in out


@pytest.mark.slow
def test_both_formats_compile_for_tpu(tpu_compiler: str, capsys: pytest.CaptureFixture) -> None:
    model = dataclasses.replace(MOE_LAYER, num_nextn_predict_layers=0)
    found = reported(capsys, ASKED, tpu_devices("v5p:2x2x1"), None, "v5p", model)
    assert found["weights"].keys() == {"bfloat16", "fp8"}
    assert found["hbm_bytes"] == int(CHIPS["v5p"].hbm_gib * GIB)
    for plan in found["weights"].values():
        assert plan["fits"] is True
        decode, prefill = plan["decode"], plan["prefill"]
        assert "latent_attention" in decode["kernels"]
        assert "splash_mha_fwd_no_residuals" in prefill["kernels"]
        assert {one["kind"] for one in prefill["collectives"]} >= {"ragged-all-to-all"}
        assert not {one["kind"] for one in decode["collectives"]} & {"ragged-all-to-all"}
        for part in (decode, prefill):
            seconds = part["roofline_seconds"]
            hbm = seconds["weight_seconds"] + seconds["cache_seconds"]
            assert seconds["step_seconds"] == max(seconds["compute_seconds"], hbm, seconds["link_seconds"]) > 0
            assert part["roofline_seconds_per_token"] == seconds["step_seconds"] / part["tokens"]
    sizes = [plan["weight_bytes"] for plan in found["weights"].values()]
    assert sizes[1] < 0.65 * sizes[0]  # Embedding, head and the absorbed parts of W_kvb stay as they are.


@pytest.mark.slow
def test_what_does_not_fit_is_said(tpu_compiler: str, capsys: pytest.CaptureFixture) -> None:
    """Experts larger than the memory: the compiler refuses, and the report goes on."""
    asked = dataclasses.replace(ASKED, weights="bfloat16")
    large = dataclasses.replace(MODEL, first_k_dense_replace=0, hidden_size=8192, moe_intermediate_size=2**17)
    plan = reported(capsys, asked, tpu_devices("v5e:2x2"), MeshConfig(expert=4), "v5e", large)["weights"]["bfloat16"]
    assert plan["fits"] is plan["decode"]["fits"] is False
    assert plan["decode"]["total_bytes"] > CHIPS["v5e"].hbm_gib * GIB
    assert plan["decode"]["collectives"] is plan["decode"]["roofline_seconds"] is None


def test_the_smallest_mesh() -> None:
    """Of all that divide: a large cache is not repeated along `tensor`, and beside a small one no weight along `expert`."""
    model = dataclasses.replace(MOE_LAYER, num_nextn_predict_layers=0).with_dtype("bfloat16")
    asked = dataclasses.replace(ASKED, weights="fp8")

    def bytes_on(tensor: int) -> int:
        return device_bytes(abstract_arguments(model, asked, AbstractMesh((1, 1, 8 // tensor, 1, tensor), AXES)))

    best = smallest_mesh(model, asked, 8)
    assert best.expert * best.tensor == 8
    assert bytes_on(best.tensor) == min(bytes_on(tensor) for tensor in (1, 2, 4))
    large = smallest_mesh(model, dataclasses.replace(asked, batch=4096), 8)
    assert (large.expert, large.tensor) == (8, 1)
    assert smallest_mesh(model, dataclasses.replace(asked, context=16, chunk=16), 8).tensor == 4
    # What no mesh would mend is named as such.
    with pytest.raises(ValueError, match=r"--serve\.context is 4096, and the model goes to [0-9]+ tokens"):
        smallest_mesh(model, Serving(), 8)
    with pytest.raises(ValueError, match=re.escape("no mesh expert x tensor of 7 devices divides --serve.batch (8)")):
        smallest_mesh(model, asked, 7)


@pytest.mark.parametrize(
    ("asked", "sizes", "complaint"),
    [
        ({"batch": 6}, {"expert": 4}, "--serve.batch is 6, which mesh.data * mesh.fsdp * mesh.expert (4) does not divide"),
        ({"batch": 16}, {"expert": 16}, "model.n_routed_experts is 8, which mesh.expert (16) does not divide"),
        ({}, {"tensor": 8}, "model.num_attention_heads is 4, which mesh.tensor (8) does not divide"),
        ({}, {"context": 2}, "mesh.context is 2; generation does not split sequences"),
        ({"context": 512}, {}, "--serve.context is 512, and the model goes to 256 tokens"),
    ],
)
def test_what_does_not_divide_is_refused(asked: dict[str, int], sizes: dict[str, int], complaint: str) -> None:
    mesh = dict.fromkeys(AXES, 1) | sizes
    with pytest.raises(ValueError, match=re.escape(complaint)):
        check_serves(MODEL, dataclasses.replace(ASKED, **asked), mesh)


def test_drafts_take_a_depth() -> None:
    without = dataclasses.replace(MODEL, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=re.escape("--serve.drafts is 1, and the model has no MTP depth")):
        check_serves(without, dataclasses.replace(ASKED, drafts=1), dict.fromkeys(AXES, 1))


@pytest.mark.parametrize(
    ("named", "mesh"),
    [
        ([], None),
        (["--mesh.expert", "4", "--mesh.tensor", "-1"], MeshConfig(expert=4, tensor=-1)),
        (["--mesh.data=2", "--mesh.expert=2", "--mesh.tensor=2"], MeshConfig(data=2, expert=2, tensor=2)),
    ],
)
def test_the_mesh_is_the_one_named(
    named: list[str], mesh: MeshConfig | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And nothing of the config's own, which is for training: expert 64 and fsdp the rest."""
    asked: list[MeshConfig | None] = []
    monkeypatch.setattr(command, "report_serving", lambda model, serving, devices, mesh, *_, **__: asked.append(mesh))
    run(monkeypatch, "--config", str(ROOT / "configs/v3_671b.py"), "--mode", "serve", "--devices", "8", *named)
    assert asked == [mesh]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--serve.batch", "8"], "--serve.* belongs to --mode serve"),
        (["--mode", "serve"], "--mode serve takes --topology or --devices"),
        (["--mode", "serve", "--topology", "v5p:2x2x1", "--slices", "2"], "--slices is 2, but --mode serve plans one slice"),
        (["--mode", "serve", "--devices", "8", "--serve.drafts", "2"], "--serve.drafts is 2; choose 0 or 1"),
        (
            ["--mode", "serve", "--devices", "8", "--serve.context", "64"],
            "--serve.chunk is 4096, more than --serve.context",
        ),
        (
            ["--mode", "serve", "--devices", "8", "--serve.chunk", "3000"],
            "--serve.chunk is 3000; it must be a power of two from 16",
        ),
        (["--mode", "serve", "--devices", "8", "--serve.chunk", "8"], "--serve.chunk is 8; it must be a power of two from 16"),
        (["--mode", "serve", "--devices", "8", "--serve.batch", "0"], "--serve.batch is 0; it must be at least 1"),
        (["--mode", "serve", "--devices", "8", "--serve.weights", "int4"], "int4"),
        (["--mode", "infer"], "infer"),
        (
            ["--mode", "serve", "--devices", "8", "--train.micro-batch-size", "2"],
            "--train.micro-batch-size would change nothing of what --mode serve compiles",
        ),
        (["--mode", "serve", "--devices", "8", "--data.source=text"], "--data.source would change nothing"),
        (
            ["--config", "configs/tiny.py", "--mode", "serve", "--devices", "8", "--mesh.expert", "1"],
            "the mesh has 1 place for 8 devices; set mesh.tensor to -1",
        ),
        # What the config's training takes, fsdp -1 here, is no wish for serving.
        (
            ["--config", "configs/v3_671b.py", "--mode", "serve", "--devices", "8", "--mesh.expert", "4"],
            "4 places for 8 devices",
        ),
    ],
)
def test_bad_flags_are_one_line(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    test_bad_input_is_one_line_and_exit_2(arguments, complaint, monkeypatch, capsys)
