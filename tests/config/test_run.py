"""`Config` and its groups, and the configs that are shipped."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from pathlib import Path

import pytest

from dsv3_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    InferConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    TrainConfig,
)
from dsv3_jax.config.cli import load_config, parse_run
from tests.shipped import SHIPPED, shipped

ROOT = pathlib.Path(__file__).parent.parent.parent


CHAT = {"kind": "chat", "cross_document_attention": False}


@pytest.fixture
def config() -> Config:
    """One that differs from the defaults in every group."""
    return Config(
        model=ModelConfig(rope_scaling=RopeScaling(factor=8.0), eos_token_id=(1, 2), q_lora_rank=None),
        mesh=MeshConfig(expert=4, fsdp=-1),
        data=DataConfig(source="text.jsonl", tokenizer="t.json"),
        optimizer=OptimizerConfig(learning_rate=1e-3, moment_dtype="float32"),
        train=TrainConfig(steps=3, sequence_length=64),
        checkpoint=CheckpointConfig(every=7),
        infer=InferConfig(prompt='"\n', temperature=0.5),
    )


def test_json_is_read_back(config: Config):
    assert Config.from_json(config.to_json()) == config
    assert Config.from_json(Config().to_json()) == Config()
    assert json.loads(config.to_json())["model"]["rope_scaling"]["factor"] == 8.0


def test_json_with_unknown_fields_is_refused(config: Config):
    values = json.loads(config.to_json())
    values["model"]["num_layers"] = 3
    with pytest.raises(ValueError, match=r"config\.model has unknown fields \['num_layers'\]"):
        Config.from_json(json.dumps(values))


def test_json_that_contradicts_itself_is_refused(config: Config):
    values = json.loads(config.to_json())
    values["model"]["n_group"] = 3
    with pytest.raises(ValueError, match=r"n_routed_experts \(256\) is not a multiple of n_group \(3\)"):
        Config.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        (MeshConfig, {"data": 0}, "mesh.data is 0"),
        (MeshConfig, {"fsdp": -2}, "mesh.fsdp is -2"),
        (MeshConfig, {"fsdp": -1, "data": -1}, "mesh has -1 more than once"),
        (DataConfig, {"source": ""}, "data.source is ''; name a file"),
        (
            DataConfig,
            {"cache_dir": "gs://bucket/cache"},
            "data.cache_dir is 'gs://bucket/cache'; name a folder of this machine",
        ),
        (DataConfig, {"heldout_fraction": 0.0}, "data.heldout_fraction is 0.0"),
        (DataConfig, {"heldout_fraction": 1.0}, "data.heldout_fraction is 1.0"),
        (DataConfig, {"kind": "code"}, "data.kind is 'code'; choose text or chat"),
        (DataConfig, {"fim_rate": 1.1}, "data.fim_rate is 1.1; it must lie in 0..1"),
        (DataConfig, {"fim_rate": 0.1, **CHAT}, "conversations (data.kind chat) are not filled in; set it to 0"),
        (DataConfig, {"kind": "chat"}, "data.kind is chat and data.cross_document_attention True"),
        (DataConfig, {"fim_tokens": ("a", "a", "b")}, "data.fim_tokens is ('a', 'a', 'b'); name three different"),
        (DataConfig, {"mixture": (("a", 1.0), ("a", 2.0))}, "data.mixture names a source twice: ['a', 'a']"),
        (DataConfig, {"mixture": (("", 1.0),)}, "every source needs a name"),
        (DataConfig, {"mixture": (("a", 1.0), ("b", 0.0))}, "data.mixture gives 'b' the weight 0.0; it must be positive"),
        (DataConfig, {"mixture": (("a", 1.0), ("b", 1e-7))}, "data.mixture gives 'b' the weight 1e-07; it must be positive"),
        (DataConfig, {"mixture": (("a", float("inf")),)}, "data.mixture gives 'a' the weight inf"),
        (DataConfig, {"mixture": (("a", float("nan")),)}, "data.mixture gives 'a' the weight nan"),
        (
            OptimizerConfig,
            {"learning_rate": 1e-6},
            "optimizer.final_learning_rate (2.2e-05) must lie in 0..learning_rate (1e-06)",
        ),
        (OptimizerConfig, {"final_learning_rate": -1.0}, "optimizer.final_learning_rate (-1.0)"),
        (OptimizerConfig, {"learning_rate": 0.0, "final_learning_rate": 0.0}, "optimizer.learning_rate is 0.0"),
        (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps is -1"),
        (OptimizerConfig, {"beta1": 1.0}, "optimizer.beta1 is 1.0"),
        (OptimizerConfig, {"beta2": -0.1}, "optimizer.beta2 is -0.1"),
        (OptimizerConfig, {"epsilon": 0.0}, "optimizer.epsilon is 0.0"),
        (OptimizerConfig, {"weight_decay": -1.0}, "optimizer.weight_decay is -1.0"),
        (OptimizerConfig, {"clip_norm": 0.0}, "optimizer.clip_norm is 0.0"),
        (OptimizerConfig, {"moment_dtype": "float16"}, "optimizer.moment_dtype is 'float16'"),
        (TrainConfig, {"steps": 0}, "steps is 0"),
        (TrainConfig, {"batch_size": 0}, "batch_size is 0"),
        (TrainConfig, {"sequence_length": 0}, "sequence_length is 0"),
        (TrainConfig, {"log_every": 0}, "log_every is 0"),
        (TrainConfig, {"eval_batches": 0}, "eval_batches is 0"),
        (TrainConfig, {"eval_every": -1}, "train.eval_every is -1"),
        (TrainConfig, {"seed": -1}, "train.seed is -1; it must be an integer in 0..4294967295"),
        (TrainConfig, {"seed": 2**32}, "train.seed is 4294967296; it must be an integer in 0..4294967295"),
        (TrainConfig, {"seed": 1.5}, "train.seed is 1.5; use an integer"),
        (TrainConfig, {"mtp_loss_weight": -1.0}, "train.mtp_loss_weight is -1.0"),
        (TrainConfig, {"bias_update_speed": -1.0}, "train.bias_update_speed is -1.0"),
        (CheckpointConfig, {"every": 0}, "every is 0"),
        (CheckpointConfig, {"keep": 0}, "keep is 0"),
        (InferConfig, {"max_tokens": 0}, "max_tokens is 0"),
        (InferConfig, {"temperature": -0.1}, "infer.temperature is -0.1"),
        (InferConfig, {"top_p": 0.0}, "infer.top_p is 0.0"),
        (InferConfig, {"top_p": 1.1}, "infer.top_p is 1.1"),
    ],
)
def test_contradictions_are_refused_by_name(group: type, changes: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        group(**changes)


def test_groups_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"train.sequence_length \(4097\) exceeds model.max_position_embeddings \(4096\)"):
        Config(train=TrainConfig(sequence_length=4097))
    with pytest.raises(ValueError, match=r"train.sequence_length \(2\) must exceed model.num_nextn_predict_layers \(2\)"):
        Config(model=ModelConfig(num_nextn_predict_layers=2), train=TrainConfig(sequence_length=2))


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        ({}, 1, (1, 1, 1, 1, 1)),
        ({"fsdp": -1}, 8, (1, 8, 1, 1, 1)),
        ({"expert": 8, "fsdp": -1}, 512, (1, 64, 8, 1, 1)),
        ({"expert": 8, "fsdp": -1}, 8, (1, 1, 8, 1, 1)),
        ({"data": 2, "fsdp": 3, "expert": 2, "context": 2, "tensor": 2}, 48, (2, 3, 2, 2, 2)),
    ],
)
def test_mesh_is_resolved(mesh: dict, devices: int, sizes: tuple[int, ...]):
    resolved = MeshConfig(**mesh).resolve(devices)
    assert list(resolved) == ["data", "fsdp", "expert", "context", "tensor"]
    assert tuple(resolved.values()) == sizes


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        ({}, 2, "has 1 places for 2 devices"),
        ({"expert": 8}, 4, "has 8 places for 4 devices"),
        ({"expert": 3, "fsdp": -1}, 8, r"8 devices are not a multiple of the known sizes \(3\)"),
    ],
)
def test_mesh_that_does_not_fit_is_refused(mesh: dict, devices: int, message: str):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**mesh).resolve(devices)


def test_shares_of_a_mixture_sum_to_one_and_survive_json():
    data = DataConfig(mixture=(("a.jsonl", 3.0), ("b", 1.0)))
    assert data.shares == {"a.jsonl": 0.75, "b": 0.25}
    assert DataConfig(source="c").shares == {"c": 1.0}
    assert Config.from_json(Config(data=data).to_json()).data == data


def test_configs_are_frozen(config: Config):
    for group in (config, *(getattr(config, field.name) for field in dataclasses.fields(config))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, dataclasses.fields(group)[0].name, None)


def test_these_are_shipped():
    assert SHIPPED == ["chat", "tiny", "v3_16b", "v3_671b", "v3_671b_128k", "v3_671b_32k"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_can_be_stored_and_runs_on_its_machine(name: str):
    config = shipped(name)
    assert Config.from_json(config.to_json()) == config
    sizes = config.mesh.resolve({"tiny": 1, "chat": 8, "v3_16b": 8}.get(name, 512))
    assert config.train.micro_batch % (sizes["data"] * sizes["fsdp"] * sizes["expert"]) == 0
    assert config.train.sequence_length % sizes["context"] == 0
    assert config.model.n_routed_experts % sizes["expert"] == 0


def test_v3_671b_is_the_published_run():
    """Its schedules are checked in test_schedules.py."""
    config = load_config(str(ROOT / "configs/v3_671b.py"))
    assert config.model == ModelConfig(remat="full")  # The defaults are checked against the report in test_model.py.
    assert config.mesh.resolve(2048) == {"data": 1, "fsdp": 32, "expert": 64, "context": 1, "tensor": 1}
    optimizer, train = config.optimizer, config.train
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (train.initial_batch_size, train.batch_size, train.sequence_length) == (3072, 15360, 4096)


@pytest.mark.parametrize(("name", "length", "batch"), [("32k", 32_768, 1920), ("128k", 131_072, 480)])
def test_the_phases_of_long_context_are_the_published_ones(name: str, length: int, batch: int):
    config = shipped(f"v3_671b_{name}")
    scaling = RopeScaling(40.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0)
    longer = {"rope_scaling": scaling, "max_position_embeddings": length}
    assert config.model == dataclasses.replace(ModelConfig(remat="full"), **longer)
    train = config.train
    assert (train.steps, train.batch_size, train.sequence_length) == (1000, batch, length)
    assert [config.schedules.learning_rate(step) for step in range(19, 1000)] == pytest.approx([7.3e-6] * 981)


def test_a_config_that_is_a_function_takes_a_checkpoint(tmp_path: Path):
    pretrained = str(ROOT / "tests/fixtures/published")
    file = tmp_path / "longer.py"
    file.write_text("from dsv3_jax.config import Config\n\ndef config(model):\n    return Config(model=model)\n")
    message = "makes its config from the model of a checkpoint; name the checkpoint with --init-from"
    with pytest.raises(ValueError, match=message):
        parse_run(["--config", str(file)])
    with pytest.raises(SystemExit) as help_:
        parse_run(["--config", str(file), "--help"])
    assert help_.value.code == 0
    arguments = parse_run(["--config", str(file), "--init-from", pretrained, "--train.steps", "7"])
    assert arguments.config.model.n_routed_experts == 8
    assert (arguments.config.train.init_from, arguments.config.train.steps) == (pretrained, 7)
    assert arguments.config.data.tokenizer == pretrained
    with pytest.raises(ValueError, match=r"holds no config\.json; name a run directory of train.py or a Hugging Face folder"):
        parse_run(["--config", str(file), "--init-from", str(tmp_path)])
