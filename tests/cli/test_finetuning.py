"""Fine-tuning a Hugging Face checkpoint on conversations, by the command that the README gives."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer
import train
from dsv3_jax.checkpoint.hugging_face import load_hf
from dsv3_jax.checkpoint.run import load_run
from dsv3_jax.config.cli import parse_run
from dsv3_jax.convert import main as convert
from dsv3_jax.data.batches import TrainBatches
from dsv3_jax.data.chat_template import load_chat_template
from dsv3_jax.data.text import build_dataset
from dsv3_jax.infer import Engine, SamplingParams
from dsv3_jax.infer.load import load_model
from dsv3_jax.model import training_loss
from dsv3_jax.serve.requests import ModelInfo, read_chat
from tests.cli.conftest import ROOT, Done

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}def {{ message.content }}:\n{% else %}"
    "return {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}return {% endif %}"
)
FLAGS = (
    "--config", str(ROOT / "configs/chat.py"), "--init-from", "chat_model",
    "--data.source", "chats.jsonl", "--data.cache-dir", "cache", "--optimizer.learning-rate", "3e-3",
    "--optimizer.warmup-steps", "2", "--checkpoint.every", "10", "--train.batch-size", "8", "--train.steps", "20",
    "--train.log-every", "1", "--train.eval-every", "10", "--train.seed", "1", "--train.sequence-length", "64",
)  # fmt: skip


@pytest.fixture(scope="module")
def chats(straight: tuple[Path, Done], workplace: Path) -> Path:
    """A Hugging Face folder with a chat template, and conversations beside it."""
    folder = workplace / "chat_model"
    convert([str(straight[0]), str(folder)])
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, **special}))
    with (workplace / "chats.jsonl").open("w") as file:
        for number in range(60):
            said = [("user", f"f{number}(x)"), ("assistant", f"x + {number % 7}"), ("user", "g()"), ("assistant", "f(3)")]
            file.write(json.dumps({"messages": [{"role": role, "content": content} for role, content in said]}) + "\n")
    return folder


@pytest.mark.slow
def test_the_loss_on_what_the_assistant_says_falls(chats: Path, workplace: Path, called: Callable[..., Done]) -> None:
    done = called(train.main, *FLAGS, "--run-dir", "runs/chat")
    assert done.code == 0, done.stderr
    run = workplace / "runs" / "chat"
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["main_loss"] < 0.7 * logged[0]["main_loss"]
    assert logged[-1]["heldout_loss"] < 0.95 * logged[9]["heldout_loss"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (run / name).read_bytes() == (chats / name).read_bytes()
    # All parameters are trained, from those of the checkpoint on; the biases, without the rule, stay as they were.
    _, before = load_hf(str(chats))
    _, after, step = load_run(str(run))
    assert step == 20
    moved = jax.tree.map(lambda new, old: bool(np.any(new != old)), after["params"], before["params"])
    assert all(jax.tree.leaves(moved)), moved
    for new, old in zip(jax.tree.leaves(after["router"]), jax.tree.leaves(before["router"]), strict=True):
        np.testing.assert_array_equal(new, old)

    # What the run started from may be gone when it goes on.
    chats.rename(workplace / "moved")
    try:
        done = called(train.main, "--config", "runs/chat/config.json", "--resume", "--train.steps", "21")
    finally:
        (workplace / "moved").rename(chats)
    assert done.code == 0, done.stderr
    assert "continuing after step 20 of 21" in done.stdout


@pytest.mark.slow
def test_chats_learnt_by_heart_end_wherever_they_are_asked(
    chats: Path, workplace: Path, called: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the terminal, in a batch file, over HTTP and of an engine, whichever file names the token that ends a turn."""
    with (workplace / "by_heart.jsonl").open("w") as file:
        for number in range(16):
            said = [{"role": "user", "content": f"f{number}(x)"}, {"role": "assistant", "content": "x"}]
            file.write(json.dumps({"messages": said}) + "\n")
    flags = (
        "--data.source",
        "by_heart.jsonl",
        "--data.heldout-fraction",
        "0.2",
        "--train.steps",
        "40",
        "--run-dir",
        "runs/heart",
    )
    done = called(train.main, *FLAGS, *flags, "--train.eval-every", "0")
    assert done.code == 0, done.stderr
    convert(["runs/heart", "heart_folder"])
    # A folder in which generation_config.json alone names the token.
    shutil.copytree(workplace / "heart_folder", workplace / "heart_elsewhere")
    for name, ends in (("config.json", 0), ("generation_config.json", [1])):
        file_ = workplace / "heart_elsewhere" / name
        file_.write_text(json.dumps(json.loads(file_.read_text()) | {"eos_token_id": ends}))
    asked = [{"role": "user", "content": "f3(x)"}]
    for checkpoint in ("runs/heart", "heart_folder", "heart_elsewhere"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("f3(x)\n"))
        done = called(infer.main, "--checkpoint", checkpoint, "--interactive", "--max-tokens", "20")
        assert (done.code, done.stdout) == (0, "x\n"), done.stderr
        assert "(cut after" not in done.stderr
        (workplace / "asked.jsonl").write_text(json.dumps({"messages": asked, "max_tokens": 20}) + "\n")
        done = called(infer.main, "--checkpoint", checkpoint, "--batch-file", "asked.jsonl", f"{Path(checkpoint).name}.out")
        assert done.code == 0, done.stderr
        (answer,) = map(json.loads, (workplace / f"{Path(checkpoint).name}.out").read_text().splitlines())
        assert (answer["text"], answer["finish_reason"]) == ("x", "stop")
        model, template = load_model(checkpoint), load_chat_template(checkpoint)
        engine = Engine(model.config, model.variables, model.tokenizer, max_batch=1)
        served = ModelInfo("m", model.config, model.tokenizer, template, 64, 8)
        request = read_chat({"model": "m", "messages": asked, "temperature": 0}, served)
        (completion,) = engine.generate(request.prompts, request.params)
        assert (completion.text, completion.finish_reason) == ("x", "stop")
        # Without a template, too.
        (completion,) = engine.generate(request.prompts, SamplingParams(max_tokens=20))
        assert (completion.text, completion.finish_reason) == ("x", "stop")
    config, variables = load_hf("heart_elsewhere")
    (completion,) = Engine(config, variables, model.tokenizer, max_batch=1).generate(
        request.prompts, SamplingParams(max_tokens=20)
    )
    assert (completion.text, completion.finish_reason) == ("x", "stop")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (workplace / "heart_folder" / name).read_bytes() == (chats / name).read_bytes()


def test_no_prompt_token_is_learnt(chats: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ids in place of the targets that are prompt or padding leave loss and gradient as they are, to the bit."""
    monkeypatch.chdir(workplace)
    config = parse_run(FLAGS).config
    text = build_dataset(config.data, config.model, config.train)
    batch = TrainBatches(text.rows, config.train, config.schedules, across_documents=False)[0]
    tokens, targets, weights, starts = (array[0] for array in batch)
    assert 0.1 < weights.mean() < 0.8
    others = np.where(weights == 0, np.random.default_rng(0).integers(0, config.model.vocab_size, targets.shape), targets)
    assert np.mean(others != targets) > 0.1
    _, variables = load_hf(str(chats))

    def objective(params: Any, targets: Any, weights: Any) -> jax.Array:
        rows = tokens, targets, 0.1, weights, jnp.asarray(starts)
        return training_loss(params, variables["router"], config.model, *rows).loss

    value_and_gradient = jax.jit(jax.value_and_grad(objective))
    plain, changed = (value_and_gradient(variables["params"], jnp.int32(ids), weights) for ids in (targets, others))
    jax.tree.map(np.testing.assert_array_equal, plain, changed)
    everything = value_and_gradient(variables["params"], jnp.int32(others), np.ones_like(weights))
    assert everything[0] != plain[0]


def test_another_model_than_the_checkpoints_is_refused(chats: Path, called: Callable[..., Done]) -> None:
    done = called(train.main, *FLAGS, "--run-dir", "runs/other", "--model.hidden-size", "48")
    done.assert_refused("train.init_from 'chat_model' has another model than the config", "[300, 32] there and [300, 48] here")
    assert not Path("runs/other").exists()
