"""`load_hf` and `save_hf`: every value against slices of the published tensors, and back to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.checkpoint import hugging_face, loading
from dsv3_jax.checkpoint.hugging_face import load_hf, save_hf
from dsv3_jax.checkpoint.loading import CheckpointError
from dsv3_jax.config import ModelConfig
from tests.checkpoint.tiny import (
    BF16,
    BIAS,
    BLOCK,
    CONFIG,
    FP8,
    Tensors,
    assert_identical,
    load,
    make_mesh,
    may_be_fp8,
    quantization_config,
    random_tensors,
    with_fp8,
    write,
)

_N, _H, _P, _W, _Q, _C, _D, _E = 3, 10, 6, 8, 20, 28, 40, 6
"""The letters of `CONFIG`."""


def _heads(matrix: np.ndarray, width: int) -> np.ndarray:
    """[N * width, in] -> [in, N, width], a head at a time."""
    return np.stack([matrix[n * width : (n + 1) * width].T for n in range(_N)], axis=1)


def _expected_block(tensors: Tensors, i: int, direct_queries: bool) -> dict[str, Any]:
    """(params of block i) as the tree has them, and its router bias under "bias" if it is an MoE block."""
    at = {name.removeprefix(f"model.layers.{i}."): t for name, t in tensors.items() if name.startswith(f"model.layers.{i}.")}
    attention: dict[str, Any] = {
        "kv_a_proj_with_mqa": {"kernel": at["self_attn.kv_a_proj_with_mqa.weight"].T},
        "kv_a_layernorm": {"scale": at["self_attn.kv_a_layernorm.weight"]},
        "kv_b_proj": {"kernel": _heads(at["self_attn.kv_b_proj.weight"], _H + _W)},
        "o_proj": {
            "kernel": np.stack([at["self_attn.o_proj.weight"][:, n * _W : (n + 1) * _W].T for n in range(_N)]),
        },
    }
    if direct_queries:
        attention["q_proj"] = {"kernel": _heads(at["self_attn.q_proj.weight"], _H + _P)}
    else:
        attention["q_a_proj"] = {"kernel": at["self_attn.q_a_proj.weight"].T}
        attention["q_a_layernorm"] = {"scale": at["self_attn.q_a_layernorm.weight"]}
        attention["q_b_proj"] = {"kernel": _heads(at["self_attn.q_b_proj.weight"], _H + _P)}
    projections = ("gate_proj", "up_proj", "down_proj")
    if "mlp.gate.weight" in at:
        mlp: dict[str, Any] = {
            "gate": {"kernel": at["mlp.gate.weight"].T},
            "experts": {p: np.stack([at[f"mlp.experts.{e}.{p}.weight"].T for e in range(_E)]) for p in projections},
            "shared_experts": {p: {"kernel": at[f"mlp.shared_experts.{p}.weight"].T} for p in projections},
        }
    else:
        mlp = {p: {"kernel": at[f"mlp.{p}.weight"].T} for p in projections}
    params = {
        "input_layernorm": {"scale": at["input_layernorm.weight"]},
        "post_attention_layernorm": {"scale": at["post_attention_layernorm.weight"]},
        "self_attn": attention,
        "mlp": mlp,
    }
    bias = {"mlp": {"gate": {BIAS: at[f"mlp.gate.{BIAS}"]}}} if "mlp.gate.weight" in at else None
    return {"params": params, "bias": bias}


def _expected(tensors: Tensors, direct_queries: bool = False) -> dict[str, Any]:
    """The variables of a checkpoint of `CONFIG`: dense layers 0 and 1, MoE layers 2 and 3, MTP layers 4 and 5."""
    blocks = [_expected_block(tensors, i, direct_queries) for i in range(6)]

    def stacked(kind: str, *layers: int) -> Any:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(blocks[i][kind] for i in layers))

    params = {
        "embed": {"embedding": tensors["model.embed_tokens.weight"]},
        "dense_layers": stacked("params", 0, 1),
        "moe_layers": stacked("params", 2, 3),
        "norm": {"scale": tensors["model.norm.weight"]},
        "lm_head": {"kernel": tensors["lm_head.weight"].T},
    }
    router = {"moe_layers": stacked("bias", 2, 3)}
    for k in range(2):
        layer = f"model.layers.{4 + k}"
        params[f"mtp_{k}"] = {
            "enorm": {"scale": tensors[f"{layer}.enorm.weight"]},
            "hnorm": {"scale": tensors[f"{layer}.hnorm.weight"]},
            "norm": {"scale": tensors[f"{layer}.shared_head.norm.weight"]},
            "eh_proj": {"kernel": tensors[f"{layer}.eh_proj.weight"].T},
            "block": blocks[4 + k]["params"],
        }
        router[f"mtp_{k}"] = {"block": blocks[4 + k]["bias"]}
    return {"params": params, "router": router}


def _in_dtype(tree: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """`tree` with params in `dtype` and biases float32."""
    return {
        "params": jax.tree.map(lambda leaf: leaf.astype(dtype), tree["params"]),
        "router": jax.tree.map(lambda leaf: leaf.astype(np.float32), tree["router"]),
    }


def _assert_equal(variables: dict[str, Any], expected: dict[str, Any]) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, expected)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, variables), expected)


@pytest.mark.parametrize("files", [1, 5])
@pytest.mark.parametrize("stored", [BF16, np.dtype(np.float16), np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_every_value_is_where_it_belongs(tmp_path: Path, files: int, stored: np.dtype, dtype: Any) -> None:
    tensors = random_tensors(dtype=stored)
    config, variables = load_hf(write(tmp_path, tensors, files=files), dtype)
    _assert_equal(variables, _in_dtype(_expected(tensors), dtype))
    assert all(type(leaf) is type(jnp.zeros(1)) for leaf in jax.tree.leaves(variables))
    assert config == ModelConfig.from_hf(CONFIG).with_dtype(dtype)
    assert (config.dtype, config.param_dtype) == (jnp.dtype(dtype).name, jnp.dtype(dtype).name)


def test_without_a_query_latent(tmp_path: Path) -> None:
    file_config = {**CONFIG, "q_lora_rank": None}
    tensors = random_tensors(file_config)
    _, variables = load_hf(write(tmp_path, tensors, file_config))
    _assert_equal(variables, _in_dtype(_expected(tensors, direct_queries=True), np.float32))


def test_all_dense_and_no_mtp(tmp_path: Path) -> None:
    file_config = {**CONFIG, "first_k_dense_replace": 4, "num_nextn_predict_layers": 0}
    _, variables = load_hf(write(tmp_path, random_tensors(file_config), file_config))
    assert variables["router"] == {}
    assert variables["params"].keys() == {"embed", "dense_layers", "norm", "lm_head"}
    chex.assert_shape(variables["params"]["dense_layers"]["mlp"]["up_proj"]["kernel"], (4, 40, 56))


def test_biases_are_float32_however_they_are_stored(tmp_path: Path) -> None:
    """transformers rounds them when a bfloat16 model is saved; what is left of them is kept, in float32."""
    tensors = {n: t.astype(BF16) if n.endswith(BIAS) else t for n, t in random_tensors().items()}
    _, variables = load_hf(write(tmp_path, tensors), jnp.bfloat16)
    _assert_equal(variables, _in_dtype(_expected(tensors), BF16))


def test_rows_beyond_one_band_are_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_BAND", 16)
    tensors = random_tensors()
    _, variables = load_hf(write(tmp_path, tensors))
    _assert_equal(variables, _in_dtype(_expected(tensors), np.float32))


def _dequantised(tensors: Tensors) -> Tensors:
    """Each FP8 element times the scale of its block, looked up one by one."""
    values = {}
    for name, tensor in tensors.items():
        if tensor.dtype == FP8:
            scale = tensors[f"{name}_scale_inv"]
            rows = [
                [np.float32(tensor[i, j]) * scale[i // BLOCK[0], j // BLOCK[1]] for j in range(tensor.shape[1])]
                for i in range(tensor.shape[0])
            ]
            values[name] = np.array(rows, np.float32)
        elif not name.endswith("_scale_inv"):
            values[name] = tensor
    return values


@pytest.mark.parametrize("band", [512, 32, 8], ids=["one band", "two blocks a band", "one block a band"])
def test_fp8_blocks_with_partial_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, band: int) -> None:
    monkeypatch.setattr(loading, "_BAND", band)
    tensors = with_fp8(random_tensors())
    partial = [n for n, t in tensors.items() if t.dtype == FP8 and t.shape[0] % BLOCK[0] and t.shape[1] % BLOCK[1]]
    assert any("kv_a_proj_with_mqa" in name for name in partial)
    file_config = {**CONFIG, "quantization_config": quantization_config()}
    _, variables = load_hf(write(tmp_path, tensors, file_config, files=3))
    _assert_equal(variables, _in_dtype(_expected(_dequantised(tensors)), np.float32))


def test_fp8_is_dequantised_in_float32_before_it_is_rounded(tmp_path: Path) -> None:
    tensors = with_fp8(random_tensors())
    folder = write(tmp_path, tensors, {**CONFIG, "quantization_config": quantization_config()})
    _, variables = load_hf(folder, jnp.bfloat16)
    _assert_equal(variables, _in_dtype(_expected(_dequantised(tensors)), BF16))


@pytest.mark.parametrize("copy", ["model.layers.4.embed_tokens.weight", "model.layers.5.shared_head.head.weight"])
def test_a_copy_that_differs_is_an_error(tmp_path: Path, copy: str) -> None:
    tensors = random_tensors()
    tensors[copy][69, 39] += 1
    with pytest.raises(CheckpointError, match="MTP copies that differ") as caught:
        load_hf(write(tmp_path, tensors))
    ((kind, problems),) = caught.value.problems.items()
    assert [problem.split(" from ")[0] for problem in problems] == [copy]
    assert "set num_nextn_predict_layers to 0 in config.json" in kind


def test_what_load_hf_refuses(tmp_path: Path) -> None:
    dense = {**CONFIG, "first_k_dense_replace": 4, "num_nextn_predict_layers": 0}
    folder = write(tmp_path / "model", random_tensors(dense), dense)
    with pytest.raises(ValueError, match="no multiple"):
        load_hf(folder, mesh=make_mesh(tensor=8))
    with pytest.raises(ValueError, match="jax_enable_x64"):
        load_hf(folder, jnp.float64)
    with pytest.raises(ValueError, match="int32"):
        load_hf(folder, jnp.int32)
    write(tmp_path / "other", {}, {**CONFIG, "moe_layer_freq": 2})
    with pytest.raises(ValueError, match=r"other/config\.json: moe_layer_freq is 2"):
        load_hf(tmp_path / "other")


# Saving.


def _all_tensors(folder: Path) -> Tensors:
    """Every tensor of a saved folder, after checking that the index and the files agree."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    tensors: Tensors = {}
    for file in files:
        content = load(file)
        assert content.keys() == {name for name, where in index["weight_map"].items() if where == file.name}
        tensors |= content
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors


@pytest.mark.parametrize("stored", [BF16, np.dtype(np.float16), np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 20_000])
def test_load_then_save_gives_the_same_bits(tmp_path: Path, stored: np.dtype, max_shard_bytes: int) -> None:
    tensors = random_tensors(dtype=stored)
    config, variables = load_hf(write(tmp_path / "in", tensors), stored)
    save_hf(tmp_path / "out", config, variables, max_shard_bytes=max_shard_bytes)
    assert_identical(_all_tensors(tmp_path / "out"), tensors)
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) == 1 if max_shard_bytes > 10**6 else len(sizes) > 5
    assert max(sizes) < max_shard_bytes + 10_000  # The header is not counted.
    saved_config, saved = load_hf(tmp_path / "out", stored)
    assert saved_config == config
    chex.assert_trees_all_equal(saved, variables)


def test_the_written_config_is_the_one_that_was_read(tmp_path: Path) -> None:
    file_config = {**CONFIG, "torch_dtype": "bfloat16"}
    config, variables = load_hf(write(tmp_path / "in", random_tensors(), file_config), jnp.bfloat16)
    save_hf(tmp_path / "out", config, variables)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config.to_hf()
    both = written.keys() & file_config.keys()
    assert both >= {"architectures", "model_type", "hidden_size", "rope_theta", "torch_dtype"}
    assert {name: written[name] for name in both} == {name: file_config[name] for name in both}


def test_arrays_on_an_accelerator_are_fetched_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugging_face, "_host_view", lambda array: array)
    tensors = random_tensors()
    config, variables = load_hf(write(tmp_path / "in", tensors), jnp.bfloat16)
    save_hf(tmp_path / "out", config, variables)
    assert_identical(_all_tensors(tmp_path / "out"), tensors)


def test_numpy_variables_can_be_saved_too(tmp_path: Path) -> None:
    tensors = random_tensors()
    config, variables = load_hf(write(tmp_path / "in", tensors), jnp.bfloat16)
    save_hf(tmp_path / "out", config, jax.tree.map(np.asarray, variables))
    assert_identical(_all_tensors(tmp_path / "out"), tensors)


def test_fp8_export(tmp_path: Path) -> None:
    file_config = {**CONFIG, "hidden_size": 200, "kv_lora_rank": 190}  # More than one block, the last one partial.
    tensors = random_tensors(file_config)
    config, variables = load_hf(write(tmp_path / "in", tensors, file_config), jnp.bfloat16)
    save_hf(tmp_path / "out", config, variables, fp8=True, max_shard_bytes=200_000)
    written = _all_tensors(tmp_path / "out")

    quantised = {name for name in tensors if may_be_fp8(name)}
    assert written.keys() == tensors.keys() | {f"{name}_scale_inv" for name in quantised}
    assert_identical({n: written[n] for n in tensors.keys() - quantised}, {n: tensors[n] for n in tensors.keys() - quantised})
    for name in quantised:
        weight, scale = written[name], written[f"{name}_scale_inv"]
        rows, columns = tensors[name].shape
        assert (weight.dtype, weight.shape, scale.dtype) == (FP8, (rows, columns), np.float32)
        assert scale.shape == (-(-rows // 128), -(-columns // 128))
        spread = np.kron(scale, np.ones((128, 128), np.float32))[:rows, :columns]
        error = np.abs(weight.astype(np.float32) * spread - tensors[name].astype(np.float32))
        assert (error <= np.maximum(np.abs(tensors[name].astype(np.float32)) * 2.0**-4, spread * 2.0**-10) * 1.00001).all()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    _, again = load_hf(tmp_path / "out", jnp.bfloat16)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), again),
        jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), variables),
        rtol=2.0**-4 + 2.0**-8,  # Half a step of E4M3, and the rounding to bfloat16.
        atol=1e-4,
    )


def test_fp8_export_names_the_weight_it_cannot_hold(tmp_path: Path) -> None:
    config, variables = load_hf(write(tmp_path / "in", random_tensors()))
    experts = variables["params"]["moe_layers"]["mlp"]["experts"]
    experts["up_proj"] = experts["up_proj"].at[1, 4, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.experts\.4\.up_proj\.weight .* infinite or NaN"):
        save_hf(tmp_path / "out", config, variables, fp8=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in"]


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    config, variables = load_hf(write(tmp_path / "in", random_tensors()))
    for name in ("tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (tmp_path / "in" / name).write_text(name)
    save_hf(tmp_path / "out", config, variables, tokenizer_from=tmp_path / "in")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "tokenizer_config.json"
    assert not (tmp_path / "out" / "notes.txt").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no tokenizer file"):
        save_hf(tmp_path / "out2", config, variables, tokenizer_from=tmp_path / "empty")
    assert not (tmp_path / "out2").exists()


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    config, variables = load_hf(write(tmp_path / "in", random_tensors()))
    before = {file: file.read_bytes() for file in (tmp_path / "in").iterdir()}
    with pytest.raises(ValueError, match="in exists and is not an empty folder"):
        save_hf(tmp_path / "in", config, variables)
    with pytest.raises(ValueError, match=r"config\.json exists and is not an empty folder"):
        save_hf(tmp_path / "in" / "config.json", config, variables)
    assert {file: file.read_bytes() for file in (tmp_path / "in").iterdir()} == before
    (tmp_path / "new" / "empty").mkdir(parents=True)
    save_hf(tmp_path / "new" / "empty", config, variables)
    save_hf(tmp_path / "new" / "deep" / "folder", config, variables)
    assert_identical(_all_tensors(tmp_path / "new" / "empty"), _all_tensors(tmp_path / "new" / "deep" / "folder"))


def test_a_failure_midway_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, variables = load_hf(write(tmp_path / "in", random_tensors()))
    write_file = hugging_face.write_file
    written = []

    def full_disk(file: Any, tensors: Any, arrays: Any) -> None:
        if len(written) == 2:
            raise OSError("no space left on device")
        write_file(file, tensors, arrays)
        written.append(file)

    monkeypatch.setattr(hugging_face, "write_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_hf(tmp_path / "out", config, variables, max_shard_bytes=20_000)
    assert written
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in"]


def _drop_bias(variables: dict[str, Any]) -> None:
    del variables["router"]["mtp_1"]


def _add(variables: dict[str, Any]) -> None:
    variables["params"]["adapter"] = {"kernel": jnp.zeros((2, 2))}


def _reshape(variables: dict[str, Any]) -> None:
    variables["params"]["norm"]["scale"] = jnp.ones(41)


def _round(variables: dict[str, Any]) -> None:
    variables["router"] = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), variables["router"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_bias, r"missing arrays \(1\): router/mtp_1/block/mlp/gate/e_score_correction_bias"),
        (_add, r"unexpected arrays \(1\): params/adapter/kernel"),
        (_reshape, r"misshapen arrays \(1\): params/norm/scale is \[41\], not \[40\]"),
        (_round, r"arrays of a wrong type \(3\): router/.* is bfloat16, not float32"),
    ],
)
def test_variables_of_another_model_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    config, variables = load_hf(write(tmp_path / "in", random_tensors()))
    change(variables)
    with pytest.raises(CheckpointError, match=message):
        save_hf(tmp_path / "out", config, variables)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save_hf(tmp_path / "out", *load_hf(tmp_path / "in"), max_shard_bytes=0)
