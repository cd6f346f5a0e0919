"""Every structural fault of a Hugging Face folder is found from headers, and all of them are reported at once."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from dsv3_jax.checkpoint.hugging_face import load_hf
from dsv3_jax.checkpoint.loading import CheckpointError, find_tensors, read_config
from dsv3_jax.config import ModelConfig
from tests.checkpoint.tiny import BLOCK, CONFIG, Tensors, quantization_config, random_tensors, with_fp8, write

_QUERY = "model.layers.0.self_attn.q_a_proj.weight"
_EXPERT = "model.layers.3.mlp.experts.5.down_proj.weight"
_BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


def _problems(folder: Path, config: dict[str, Any] = CONFIG, block: tuple[int, int] | None = None) -> dict[str, list[str]]:
    """What is wrong with the folder, as `load_hf` says it too, without having made an array."""
    with pytest.raises(CheckpointError) as caught:
        find_tensors(epath.Path(folder), ModelConfig.from_hf(config), block)
    before = len(jax.live_arrays())
    with pytest.raises(CheckpointError) as from_load:
        load_hf(folder)
    assert len(jax.live_arrays()) <= before  # Garbage of other tests may go meanwhile.
    assert str(from_load.value) == str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert str(folder) in str(caught.value)
    return caught.value.problems


@pytest.mark.parametrize("files", [1, 3])
def test_a_whole_folder_is_accepted(tmp_path: Path, files: int) -> None:
    tensors = random_tensors()
    found = find_tensors(epath.Path(write(tmp_path, tensors, files=files)), ModelConfig.from_hf(CONFIG), None)
    assert found.keys() == tensors.keys()
    assert {name: tensor.shape for name, tensor in found.items()} == {name: array.shape for name, array in tensors.items()}


@pytest.mark.parametrize("files", [1, 3])
def test_missing_unexpected_misshapen_and_mistyped_are_listed_together(tmp_path: Path, files: int) -> None:
    tensors = random_tensors()
    del tensors[_QUERY], tensors[_EXPERT], tensors[_BIAS]
    tensors["model.layers.9.input_layernorm.weight"] = np.ones(40, np.float32)
    tensors["visual.proj.weight"] = np.ones((2, 2), np.float32)
    tensors["model.norm.weight"] = np.ones(41, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    tensors["model.layers.4.eh_proj.weight"] = np.ones((40, 80), np.int8)
    problems = _problems(write(tmp_path, tensors, files=files))
    assert problems == {
        "missing tensors": [_QUERY, _BIAS, _EXPERT],
        "unexpected tensors": ["model.layers.9.input_layernorm.weight", "visual.proj.weight"],
        "misshapen tensors": ["lm_head.weight is [40, 70], not [70, 40]", "model.norm.weight is [41], not [40]"],
        "tensors of a wrong type": ["model.layers.4.eh_proj.weight is I8; only F64, F32, F16, BF16, F8_E4M3 can be read"],
    }


def test_a_long_list_is_counted_and_cut(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in random_tensors().items() if ".experts." not in name}
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"missing tensors \(72\): model\.layers\.2\.\S+, .* and 52 more") as caught:
        load_hf(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(caught.value.problems["missing tensors"]) == 4 * 6 * 3


def test_frequencies_are_ignored_and_copies_may_be_absent(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    del tensors["model.layers.5.embed_tokens.weight"], tensors["model.layers.5.shared_head.head.weight"]
    find_tensors(epath.Path(write(tmp_path, tensors)), ModelConfig.from_hf(CONFIG), None)


def test_a_file_saved_without_its_mtp_layers_is_told_the_remedy(tmp_path: Path) -> None:
    tensors = {n: t for n, t in random_tensors().items() if not n.startswith(("model.layers.4.", "model.layers.5."))}
    problems = _problems(write(tmp_path, tensors))
    assert list(problems) == ["missing MTP layers"]
    assert "model.layers.4, model.layers.5" in problems["missing MTP layers"][0]
    assert "set num_nextn_predict_layers to 0 in config.json" in problems["missing MTP layers"][0]
    # And the remedy works.
    load_hf(write(tmp_path, tensors, {**CONFIG, "num_nextn_predict_layers": 0}))


def test_one_missing_mtp_layer_of_two_is_missing_tensors(tmp_path: Path) -> None:
    tensors = {n: t for n, t in random_tensors().items() if not n.startswith("model.layers.5.")}
    problems = _problems(write(tmp_path, tensors))
    assert list(problems) == ["missing tensors"]
    assert all(name.startswith("model.layers.5.") for name in problems["missing tensors"])


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _garbage(file: Path) -> None:
    file.write_bytes(b"not a checkpoint at all, " * 40)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _garbage, _empty])
@pytest.mark.parametrize("files", [1, 3])
def test_a_damaged_file_is_the_one_problem(tmp_path: Path, files: int, damage: Callable[[Path], None]) -> None:
    write(tmp_path, random_tensors(), files=files)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    damage(file)
    problems = _problems(tmp_path)
    assert list(problems) == ["unusable files"]
    assert file.name in problems["unusable files"][0]


def test_damaged_files_and_faults_in_the_others_are_reported_together(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.norm.weight"] = np.ones(41, np.float32)
    write(tmp_path, tensors, files=4)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    damaged, absent = sorted(set(index.values()) - {index["model.norm.weight"]})[:2]
    _truncate(tmp_path / damaged)
    (tmp_path / absent).unlink()
    problems = _problems(tmp_path)
    assert problems.keys() == {"unusable files", "missing files", "misshapen tensors"}
    assert problems["missing files"] == [absent]
    assert problems["misshapen tensors"] == ["model.norm.weight is [41], not [40]"]


def test_an_index_that_points_elsewhere(tmp_path: Path) -> None:
    write(tmp_path, random_tensors(), files=2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first, second = sorted(set(index["weight_map"].values()))
    index["weight_map"][_QUERY] = second if index["weight_map"][_QUERY] == first else first
    file.write_text(json.dumps(index))
    problems = _problems(tmp_path)
    assert problems == {"tensors not where the index says": [f"{_QUERY} in {index['weight_map'][_QUERY]}"]}


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    write(tmp_path, random_tensors(), files=2)
    repeated = {"model.norm.weight": random_tensors()["model.norm.weight"]}
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", repeated)
    (tmp_path / "more" / "model.safetensors").rename(tmp_path / "model-extra.safetensors")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = "model-extra.safetensors"
    file.write_text(json.dumps(index))
    problems = _problems(tmp_path)
    assert problems["tensors in two files"][0].startswith("model.norm.weight in model-")


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../model.safetensors"}}', "{}"]
)
def test_an_unusable_index(tmp_path: Path, index: str) -> None:
    write(tmp_path, random_tensors(), files=2)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    problems = _problems(tmp_path)
    assert list(problems) == ["unusable files"]
    assert "has no weight_map" in problems["unusable files"][0]


class _Bomb:
    """Unpickling this raises in a way no other path does."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, ("raise SystemExit('a pickle was opened')",)


def test_a_folder_of_pickles_is_named_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    problems = _problems(tmp_path)
    assert list(problems) == ["pickle files"]
    assert "pytorch_model.bin; pickles are never opened" in problems["pickle files"][0]


def test_a_pickle_under_a_safetensors_name_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(_Bomb()) + bytes(100))
    assert list(_problems(tmp_path)) == ["unusable files"]


def test_folders_without_the_files_they_need(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "neither model.safetensors nor" in _problems(tmp_path)["missing files"][0]
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert "model.safetensors.index.json, which says" in _problems(tmp_path)["missing files"][0]
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "both model.safetensors and" in _problems(tmp_path)["ambiguous files"][0]


def _fp8_folder(tmp_path: Path, change: Callable[[Tensors], None], config: dict[str, Any]) -> Path:
    tensors = with_fp8(random_tensors())
    change(tensors)
    return write(tmp_path, tensors, config)


def test_fp8_tensors_and_their_scales_are_checked(tmp_path: Path) -> None:
    def break_some(tensors: Tensors) -> None:
        del tensors[f"{_QUERY}_scale_inv"]
        tensors[f"{_EXPERT}_scale_inv"] = np.ones((2, 1), np.float32)
        tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = np.ones((4, 2), np.int32)
        tensors["model.layers.2.mlp.gate.weight_scale_inv"] = np.ones((1, 2), np.float32)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(ml_dtypes.float8_e4m3fn)

    config = {**CONFIG, "quantization_config": quantization_config()}
    problems = _problems(_fp8_folder(tmp_path, break_some, config), config, BLOCK)
    assert problems == {
        "missing tensors": ["model.embed_tokens.weight_scale_inv", f"{_QUERY}_scale_inv"],
        "unexpected tensors": ["model.layers.2.mlp.gate.weight_scale_inv"],
        "misshapen tensors": [f"{_EXPERT}_scale_inv is [2, 1], not [3, 1]"],
        "tensors of a wrong type": [
            "model.embed_tokens.weight is F8_E4M3; only matrices of linear layers can be FP8",
            "model.layers.1.mlp.up_proj.weight_scale_inv is I32",
        ],
    }


def test_fp8_without_a_quantization_config(tmp_path: Path) -> None:
    problems = _problems(_fp8_folder(tmp_path, lambda tensors: None, CONFIG))
    assert list(problems) == ["tensors of a wrong type"]
    assert all("no quantization_config" in problem for problem in problems["tensors of a wrong type"])


def test_config_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        read_config(epath.Path(tmp_path / "deepseek-ai" / "DeepSeek-V3"))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        read_config(epath.Path(tmp_path))
    file = tmp_path / "config.json"
    file.write_text("[1]")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        read_config(epath.Path(file))
    with pytest.raises(ValueError, match="holds list, not a JSON object"):
        read_config(epath.Path(tmp_path))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(epath.Path(tmp_path))
    file.write_text(json.dumps({"model": {}, "train": {}}))
    with pytest.raises(ValueError, match="no model_type"):
        load_hf(tmp_path)


def test_without_depths_their_layers_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIG | {"num_nextn_predict_layers": 0}
    tensors = random_tensors()
    found = find_tensors(epath.Path(write(tmp_path / "whole", tensors, config)), ModelConfig.from_hf(config), None)
    left = {name for name in tensors if name.startswith(("model.layers.4.", "model.layers.5."))}
    assert tensors.keys() - found.keys() <= left
    assert f"passed over {len(left)} tensors of the MTP layers 4, 5" in capsys.readouterr().err
    # A layer that is no MTP depth is still unexpected.
    tensors = {name: tensor for name, tensor in tensors.items() if "eh_proj" not in name}
    problems = _problems(write(tmp_path / "layers", tensors, config), config)
    assert set(problems["unexpected tensors"]) == left & tensors.keys()
