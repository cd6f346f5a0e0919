"""Run directories: what may be continued, and that whatever is refused is left as it was, to the byte."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv3_jax.checkpoint.run_directory import RunDirectory
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

RUN = Config(model=ModelConfig(rope_scaling=RopeScaling(factor=8.0), eos_token_id=(1, 2)))


def changed(group: str, **fields: Any) -> Config:
    return dataclasses.replace(RUN, **{group: dataclasses.replace(getattr(RUN, group), **fields)})


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its bytes (None for a folder)."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run that has come some way."""
    path = tmp_path / "runs" / "a"
    RunDirectory.create_or_resume(str(path), RUN, resume=False, text_digest="0123")
    (path / "checkpoints" / "5").mkdir(parents=True)
    (path / "checkpoints" / "5" / "data").write_bytes(b"\0\1\2")
    (path / "metrics.jsonl").write_text('{"step": 5}\n')
    (path / "summary.json").write_text("{}\n")
    return path


def refused(path: Path, message: str, config: Config = RUN, *, resume: bool, text_digest: str | None = "0123") -> None:
    """Holds that the folder is refused with `message`, and nothing beside it is touched either."""
    before = contents(path.parent)
    with pytest.raises(ValueError, match=message) as error:
        RunDirectory.create_or_resume(str(path), config, resume=resume, text_digest=text_digest)
    assert "\n" not in str(error.value)
    assert contents(path.parent) == before


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir], ids=["missing", "empty"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_new_or_empty_folder_becomes_a_run(tmp_path: Path, make: Callable[[Path], None], resume: bool) -> None:
    path = tmp_path / "run"
    make(path)
    run = RunDirectory.create_or_resume(str(path), RUN, resume=resume, text_digest="0123")
    assert contents(path) == {"config.json": RUN.to_json().encode(), "text.digest": b"0123\n"}
    assert run.config() == RUN
    assert RunDirectory.existing(str(path)).config() == RUN


def test_folders_above_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "run"
    RunDirectory.create_or_resume(str(path), RUN, resume=False)
    assert (path / "config.json").is_file()


def test_a_run_is_not_started_again(path: Path) -> None:
    refused(path, "already holds a run; continue it with --resume, or name another --run-dir", resume=False)


def test_a_run_is_continued(path: Path) -> None:
    before = contents(path)
    RunDirectory.create_or_resume(str(path), RUN, resume=True, text_digest="0123")
    assert contents(path) == before


ALLOWED = {
    "more steps": changed("train", steps=2000),
    "fewer steps": changed("train", steps=10),
    "logging": changed("train", log_every=1, eval_every=5, eval_batches=1),
    "mesh": dataclasses.replace(RUN, mesh=MeshConfig(expert=4, fsdp=-1)),
    "checkpoints": dataclasses.replace(RUN, checkpoint=CheckpointConfig(every=1, keep=9)),
    "sample": dataclasses.replace(RUN, infer=InferConfig(prompt="x")),
    "cache": changed("data", cache_dir="elsewhere"),
    "computation": changed("model", remat="full", expert_backend="reference", attention_chunk=64, loss_chunk=64),
}


@pytest.mark.parametrize("config", ALLOWED.values(), ids=ALLOWED)
def test_what_does_not_change_the_losses_may_differ(path: Path, config: Config) -> None:
    before = contents(path)
    run = RunDirectory.create_or_resume(str(path), config, resume=True, text_digest="0123")
    assert run.config() == config
    assert contents(path) == before | {"config.json": config.to_json().encode()}


@pytest.mark.parametrize(
    ("group", "fields"),
    [
        ("model", {"hidden_size": 4096}),
        ("model", {"rope_scaling": None}),
        ("model", {"eos_token_id": 1}),
        ("model", {"q_lora_rank": None}),
        ("model", {"dtype": "float32"}),
        ("model", {"param_dtype": "bfloat16"}),
        ("model", {"aux_loss_alpha": 1e-3}),
        ("data", {"source": "other.txt"}),
        ("data", {"tokenizer": "tokenizer.json"}),
        ("data", {"heldout_fraction": 0.1}),
        ("train", {"batch_size": 9}),
        ("train", {"sequence_length": 64}),
        ("train", {"seed": 1}),
        ("train", {"mtp_loss_weight": 0.1}),
        ("train", {"bias_update_speed": 0.01}),
        *[("optimizer", {field.name: None}) for field in dataclasses.fields(OptimizerConfig)],
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_changes_the_losses_may_not_differ(path: Path, group: str, fields: dict[str, Any]) -> None:
    others = OptimizerConfig(1e-3, 1e-4, 7, 0.8, 0.9, 1e-6, 0.2, 2.0, "float32")
    fields = {name: getattr(others, name) if group == "optimizer" else value for name, value in fields.items()}
    ((name, after),) = fields.items()
    before = dataclasses.asdict(RUN)[group][name]
    message = f"{group}.{name} {before!r}, not {after!r}; continue it with its own value, or name another --run-dir"
    refused(path, re.escape(message), changed(group, **fields), resume=True)


def test_every_field_either_binds_or_is_free(path: Path) -> None:
    """The two tests above leave out no group: a new field of Config needs a decision here."""
    free = {"train": {"steps", "log_every", "eval_every", "eval_batches"}, "data": {"cache_dir"}}
    for group in (TrainConfig, DataConfig):
        name = group.__name__.removesuffix("Config").lower()
        for field in dataclasses.fields(group):
            value = getattr(getattr(RUN, name), field.name)
            other = f"{value}x" if isinstance(value, str | None) else value * 2 + 1 if value != 0.02 else 0.5
            if field.name in free[name]:
                RunDirectory.create_or_resume(str(path), changed(name, **{field.name: other}), resume=True, text_digest="0123")
            else:
                refused(path, f"{name}.{field.name}", changed(name, **{field.name: other}), resume=True)


def test_another_text_under_the_same_name_is_refused(path: Path) -> None:
    refused(path, "trained on another text, or with another tokenizer", resume=True, text_digest="4567")


def test_a_run_that_has_seen_no_text_takes_any(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunDirectory.create_or_resume(str(path), RUN, resume=False)
    assert not (path / "text.digest").exists()
    RunDirectory.create_or_resume(str(path), RUN, resume=True, text_digest="0123")
    refused(path, "another text", resume=True, text_digest="4567")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.txt", "mine", "is not empty and holds no run (no config.json); name another --run-dir"),
        (".hidden", "mine", "is not empty and holds no run"),
        ("config.json", json.dumps({"model_type": "deepseek_v3"}), "is not a run's config"),
        ("config.json", "{", "is not a run's config"),
        ("config.json", "[1]", "is not a run's config"),
        ("config.json", '{"model": 3}', "is not a run's config"),
        ("config.json", '{"train": {"steps": -1}}', "is not a run's config"),
    ],
)
def test_a_foreign_folder_is_refused(tmp_path: Path, name: str, text: str, message: str, resume: bool) -> None:
    path = tmp_path / "mine"
    path.mkdir()
    (path / name).write_text(text)
    refused(path, re.escape(message), resume=resume)


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_is_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "is a file; name a folder", resume=resume)
    refused(tmp_path / "file" / "run", "cannot be made .*name another --run-dir", resume=resume)


@pytest.mark.parametrize(
    "make", [lambda path: None, Path.mkdir, lambda path: path.write_text("x")], ids=["missing", "empty", "file"]
)
def test_reading_what_is_no_run_is_refused(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds no run \(no config.json\); name the --run-dir of a training run"):
        RunDirectory.existing(str(tmp_path / "run"))


def test_summary_is_one_line_of_json(path: Path) -> None:
    before = contents(path)
    RunDirectory.existing(str(path)).write_summary({"steps": 5, "final_loss": 0.1 + 0.2})
    assert contents(path) == before | {"summary.json": b'{"steps": 5, "final_loss": 0.30000000000000004}\n'}
