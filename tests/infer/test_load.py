"""Loading a model to run from either kind of folder, and every folder that is neither."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.checkpoint.hugging_face import save_hf
from dsv3_jax.checkpoint.run import Checkpoints
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import Config, InferConfig, MeshConfig, TrainConfig
from dsv3_jax.config.run import is_hugging_face, model_to_train, read_model
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.infer.load import load_model
from dsv3_jax.kernels.quantized import QuantizedArray
from dsv3_jax.parallel.mesh import make_mesh
from tests.model.tiny import CONFIG, random_variables

MODEL = dataclasses.replace(CONFIG, vocab_size=270, num_hidden_layers=2, num_nextn_predict_layers=1)
RUN = Config(model=MODEL, train=TrainConfig(steps=9, sequence_length=24), infer=InferConfig(prompt="for ", max_tokens=3))
TOKENIZER = train_tokenizer(["for i in range(3):"], 270, ["<bos>", "<eos>"])


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, random_variables(MODEL))


def save_run(path: Path, config: Config, variables: dict[str, Any]) -> RunDirectory:
    opened = RunDirectory.create_or_resume(str(path), config, resume=False)
    TOKENIZER.save(opened.tokenizer_file)
    with Checkpoints(opened, config.checkpoint) as checkpoints:
        checkpoints.save(6, variables, {"count": jnp.zeros(())})
    return opened


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, variables: dict[str, Any]) -> Path:
    """Both kinds of folders. Not to be written to."""
    path = tmp_path_factory.mktemp("saved")
    save_run(path / "run", RUN, variables)
    save_hf(path / "published", MODEL, variables)
    TOKENIZER.save(path / "published" / "tokenizer.json")
    return path


@pytest.fixture
def run(tmp_path: Path, saved: Path) -> Path:
    return Path(shutil.copytree(saved / "run", tmp_path / "run"))


@pytest.fixture
def published(tmp_path: Path, saved: Path) -> Path:
    return Path(shutil.copytree(saved / "published", tmp_path / "published"))


def test_a_run_is_loaded_with_its_defaults(run: Path, variables: dict[str, Any]) -> None:
    assert not is_hugging_face(str(run))
    loaded = load_model(str(run))
    assert loaded.config == MODEL
    chex.assert_trees_all_equal(loaded.variables, variables)
    assert loaded.tokenizer.to_json() == TOKENIZER.to_json()
    assert loaded.origin == f"run {run} at step 6"
    assert (loaded.sequence_length, loaded.infer) == (24, RUN.infer)


def test_backends_of_another_machine_are_forgotten(tmp_path: Path, variables: dict[str, Any]) -> None:
    """A run that was trained with TPU kernels, by name, is read on a CPU."""
    elsewhere = {"expert_backend": "pallas_tpu", "attention_backend": "splash", "cache_backend": "pallas_tpu"}
    elsewhere["expert_exchange"] = "ragged"
    trained = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, **elsewhere))
    assert save_run(tmp_path / "run", trained, variables).config() == trained
    forgotten = dataclasses.replace(MODEL, **dict.fromkeys(elsewhere, "auto"))
    assert load_model(str(tmp_path / "run")).config == read_model(str(tmp_path / "run")) == forgotten
    assert model_to_train(str(tmp_path / "run")) == dataclasses.replace(forgotten, param_dtype="float32")


def test_a_hugging_face_folder_is_loaded(published: Path, variables: dict[str, Any]) -> None:
    assert is_hugging_face(str(published))
    loaded = load_model(str(published))
    assert dataclasses.replace(loaded.config, attention_chunk=MODEL.attention_chunk, loss_chunk=MODEL.loss_chunk) == MODEL
    chex.assert_trees_all_equal(loaded.variables, variables)
    assert loaded.tokenizer.to_json() == TOKENIZER.to_json()
    assert loaded.origin == f"Hugging Face checkpoint {published}"
    assert (loaded.sequence_length, loaded.infer) == (64, InferConfig())


@pytest.mark.parametrize(("named", "expected"), [(5, (1, 5)), ([5, 1, 6], (1, 5, 6)), (1, 1), (None, 1)])
def test_generation_config_adds_tokens_that_end(published: Path, named: Any, expected: Any) -> None:
    """As Hugging Face publishes chat models, whose turns end by another token than a document."""
    assert MODEL.eos_token_id == 1
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": named, "temperature": 0.6}))
    assert load_model(str(published)).config.eos_token_id == expected


def test_an_end_outside_the_vocabulary_ends_nothing(published: Path) -> None:
    """As of a model whose vocabulary was cut."""
    (published / "generation_config.json").write_text('{"eos_token_id": [5, 100000]}')
    assert load_model(str(published)).config.eos_token_id == (1, 5)


@pytest.mark.parametrize("content", ["{", "[1]", '{"eos_token_id": "x"}'])
def test_a_generation_config_that_cannot_be_read_is_refused(published: Path, content: str) -> None:
    (published / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json: .*; copy it from the checkpoint again"):
        load_model(str(published))


@pytest.mark.parametrize("kind", ["run", "published"])
def test_dtype_is_that_of_computing_and_storing(kind: str, variables: dict[str, Any], request: pytest.FixtureRequest) -> None:
    loaded = load_model(str(request.getfixturevalue(kind)), "bfloat16")
    assert (loaded.config.dtype, loaded.config.param_dtype) == ("bfloat16", "bfloat16")
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])
    chex.assert_trees_all_equal(loaded.variables, {"params": expected, "router": variables["router"]})


def test_fp8_blocks_are_kept_unless_told_otherwise(tmp_path: Path, variables: dict[str, Any]) -> None:
    path = str(tmp_path / "fp8")
    save_hf(path, MODEL, variables, fp8=True)
    TOKENIZER.save(tmp_path / "fp8" / "tokenizer.json")
    kept, wide = load_model(path).variables, load_model(path, keep_fp8=False).variables
    chex.assert_trees_all_equal_structs(wide, variables)
    gate, wide_gate = (tree["params"]["moe_layers"]["mlp"]["experts"]["gate_proj"] for tree in (kept, wide))
    assert isinstance(gate, QuantizedArray)
    chex.assert_trees_all_equal(gate.astype(jnp.float32), wide_gate)


@pytest.mark.parametrize("kind", ["run", "published"])
def test_there_has_to_be_fp8_to_keep(kind: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match=r"no FP8 blocks.*; leave .* out"):
        load_model(str(request.getfixturevalue(kind)), keep_fp8=True)


@pytest.mark.parametrize("kind", ["run", "published"])
def test_on_a_mesh(kind: str, variables: dict[str, Any], request: pytest.FixtureRequest) -> None:
    mesh = make_mesh(MeshConfig(data=4, expert=2), jax.devices())
    loaded = load_model(str(request.getfixturevalue(kind)), mesh=mesh)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, loaded.variables), jax.tree.map(np.asarray, variables))
    experts = loaded.variables["params"]["moe_layers"]["mlp"]["experts"]["gate_proj"]
    assert experts.sharding.spec == PartitionSpec(None, "expert", ("fsdp", "context"), "tensor")


@pytest.mark.parametrize("kind", ["run", "published"])
def test_a_mesh_of_one_is_the_first_device(kind: str, request: pytest.FixtureRequest) -> None:
    path = str(request.getfixturevalue(kind))
    loaded, plain = load_model(path, mesh=make_mesh(MeshConfig())), load_model(path)
    shardings = [[leaf.sharding for leaf in jax.tree.leaves(model.variables)] for model in (loaded, plain)]
    assert shardings[0] == shardings[1]


@pytest.mark.parametrize("kind", ["run", "published"])
def test_a_folder_without_a_tokenizer_is_refused(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=re.escape(f"{path}/tokenizer.json does not exist")):
        load_model(str(path))


def test_a_run_without_a_checkpoint_is_refused(run: Path) -> None:
    (run / "checkpoints").rename(run / "elsewhere")
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        load_model(str(run))


def test_a_hugging_face_folder_without_weights_is_refused(published: Path) -> None:
    for file in published.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ValueError, match="safetensors"):
        load_model(str(published))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no config.json; name a run directory of train.py or a Hugging Face folder"),
        ("{", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[1, 2]", "is neither a run's config nor a Hugging Face one"),
        (json.dumps({"hidden_size": 7168}), r"is neither a run's config nor a Hugging Face one \(no model_type\)"),
        (json.dumps({"model": "deepseek"}), "is neither"),
        (json.dumps({"model": {}, "train": {}, "mine": 1}), "is not a run's config: config has unknown fields"),
        (json.dumps({"model_type": "llama"}), r"config\.json: model_type is 'llama'"),
    ],
)
def test_a_foreign_folder_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    if text is not None:
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))


def test_what_does_not_exist_or_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    for name in ("missing", "file"):
        with pytest.raises(ValueError, match=f"{name} holds no config.json"):
            load_model(str(tmp_path / name))
