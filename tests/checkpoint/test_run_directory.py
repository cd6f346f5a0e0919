"""Run directories: what may be continued, and that whatever is refused is left as it was, to the byte."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
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
from tests.checkpoint import tiny

RUN = Config(model=ModelConfig(rope_scaling=RopeScaling(factor=8.0), eos_token_id=(1, 2)))


def changed(group: str, **fields: Any) -> Config:
    return dataclasses.replace(RUN, **{group: dataclasses.replace(getattr(RUN, group), **fields)})


def contents(folder: Path) -> dict[str, bytes | None]:
    """`tiny.contents` without the lock, which says who held it."""
    return {path: content for path, content in tiny.contents(folder).items() if not path.endswith("run.lock")}


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


@pytest.mark.parametrize("resume", [False, True])
def test_a_start_that_was_killed_before_it_had_a_config_is_made_again(tmp_path: Path, resume: bool) -> None:
    """A lock, and half a config under the name it is written under, are what such a process leaves."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "run.lock").write_text("process 7 on there\n")
    (path / "config.json.part").write_text(RUN.to_json()[:100])
    RunDirectory.create_or_resume(str(path), RUN, resume=resume, text_digest="0123")
    assert contents(path) == {"config.json": RUN.to_json().encode(), "text.digest": b"0123\n"}


def test_a_disk_that_is_full_at_the_first_start_is_in_no_way_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"cannot be made or written .*No space left on device"):
            RunDirectory.create_or_resume(str(path), RUN, resume=True, text_digest="0123")
    assert contents(path) == {}
    RunDirectory.create_or_resume(str(path), RUN, resume=True, text_digest="0123")
    assert contents(path) == {"config.json": RUN.to_json().encode(), "text.digest": b"0123\n"}


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


# Every field of these groups with another value: a new field has to be given one here.
OTHER = {
    "data": DataConfig(
        source="other.txt", mixture=(("a", 1.0), ("b", 2.0)), tokenizer="t.json", fim_rate=0.1, fim_tokens=("a", "b", "c"),
        cross_document_attention=False, cache_dir="elsewhere", heldout_fraction=0.1,
    ),
    "optimizer": OptimizerConfig(
        learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=7, constant_tokens=10, decay_tokens=20,
        learning_rate_after=((9.0, 1e-5),), beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.2, clip_norm=2.0,
        moment_dtype="float32",
    ),
    "train": TrainConfig(
        steps=7, batch_size=12, micro_batch_size=4, sequence_length=64, mtp_loss_weight=0.1,
        mtp_loss_weight_after=((9.0, 0.2),), bias_update_speed=0.01, bias_update_speed_after=((9.0, 0.0),),
        aux_loss_alpha_after=((9.0, 1e-3),), batch_ramp_unit=4, log_every=3, eval_every=5, eval_batches=2,
        init_from="elsewhere", max_skipped=3, seed=1,
    ),
    "mesh": MeshConfig(2, 3, 4, 5, 6),
    "checkpoint": CheckpointConfig(every=1, keep=9, keep_every=1000),
    "infer": InferConfig("x", 3, 0.5, 0.9),
}  # fmt: skip
# These have another value only together with others.
TOGETHER = {("data", "kind"), ("train", "initial_batch_size"), ("train", "batch_ramp_tokens")}
FREE = {
    *(f"{group}.{field.name}" for group in ("mesh", "checkpoint", "infer") for field in dataclasses.fields(OTHER[group])),
    *("train.steps", "train.log_every", "train.eval_every", "train.eval_batches", "train.max_skipped", "train.init_from"),
    *("train.micro_batch_size", "data.cache_dir", "data.tokenizer"),
}
FIELDS = [
    (group, field.name, getattr(OTHER[group], field.name))
    for group in OTHER
    for field in dataclasses.fields(OTHER[group])
    if (group, field.name) not in TOGETHER
]
OF_MODEL = {
    "hidden_size": 4096, "rope_scaling": None, "eos_token_id": 1, "q_lora_rank": None, "dtype": "float32",
    "param_dtype": "bfloat16", "aux_loss_alpha": 1e-3, "rms_norm_eps": 1e-5, "initializer_range": 0.02,
}  # fmt: skip
HOW_IT_IS_COMPUTED = {
    "remat": "full", "expert_backend": "reference", "attention_backend": "chunked", "cache_backend": "chunked",
    "attention_chunk": 64, "loss_chunk": 64,
}  # fmt: skip


def names(value: Any) -> str | None:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [
        *[case for case in FIELDS if f"{case[0]}.{case[1]}" in FREE],
        *[("model", *item) for item in HOW_IT_IS_COMPUTED.items()],
        ("train", "steps", 10**6),
    ],
    ids=names,
)
def test_what_does_not_change_the_losses_may_differ(path: Path, group: str, field: str, value: Any) -> None:
    before, config = contents(path), changed(group, **{field: value})
    assert config != RUN
    run = RunDirectory.create_or_resume(str(path), config, resume=True, text_digest="0123")
    assert run.config() == config
    assert contents(path) == before | {"config.json": config.to_json().encode()}


@pytest.mark.parametrize(
    ("group", "field", "value"),
    [*[case for case in FIELDS if f"{case[0]}.{case[1]}" not in FREE], *[("model", *item) for item in OF_MODEL.items()]],
    ids=names,
)
def test_what_changes_the_losses_may_not_differ(path: Path, group: str, field: str, value: Any) -> None:
    before = dataclasses.asdict(RUN)[group][field]
    message = f"{group}.{field} {before!r}, not {value!r}; continue it with its own value, or name another --run-dir"
    refused(path, re.escape(message), changed(group, **{field: value}), resume=True)


@pytest.mark.parametrize(
    ("group", "fields"),
    [
        ("data", {"kind": "chat", "cross_document_attention": False}),
        ("train", {"initial_batch_size": 4, "micro_batch_size": 4, "batch_ramp_unit": 4, "batch_ramp_tokens": 9}),
    ],
    ids=names,
)
def test_nor_may_what_changes_with_others(path: Path, group: str, fields: dict[str, Any]) -> None:
    refused(path, f"{group}.*continue it with its own value", changed(group, **fields), resume=True)


def test_fewer_steps_than_were_taken_are_refused(path: Path) -> None:
    # What Orbax has not finished is no step.
    (path / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    message = "has taken 5 steps, more than train.steps 4; raise train.steps, or name another --run-dir"
    refused(path, message, changed("train", steps=4), resume=True)
    RunDirectory.create_or_resume(str(path), changed("train", steps=5), resume=True, text_digest="0123")


def test_another_text_under_the_same_name_is_refused(path: Path) -> None:
    refused(path, "trained on another text, or with another tokenizer", resume=True, text_digest="4567")


def test_a_run_that_has_seen_no_text_takes_any(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunDirectory.create_or_resume(str(path), RUN, resume=False)
    assert not (path / "text.digest").exists()
    RunDirectory.create_or_resume(str(path), RUN, resume=True, text_digest="0123")
    refused(path, "another text", resume=True, text_digest="4567")


def test_a_run_that_has_seen_no_text_is_bound_by_its_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunDirectory.create_or_resume(str(path), RUN, resume=False)
    refused(path, "model.hidden_size 7168, not 4096", changed("model", hidden_size=4096), resume=True)
    other = dataclasses.replace(RUN, data=OTHER["data"], optimizer=OTHER["optimizer"], train=OTHER["train"])
    assert RunDirectory.create_or_resume(str(path), other, resume=True, text_digest="0123").config() == other
    refused(
        path,
        "train.batch_size 12, not 8",
        dataclasses.replace(other, train=dataclasses.replace(RUN.train, init_from="elsewhere")),
        resume=True,
    )


def test_a_folder_that_cannot_be_written_is_refused(path: Path) -> None:
    (path / "config.json.part").mkdir()
    refused(path, "cannot be made or written .*; name another --run-dir", resume=True)


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
