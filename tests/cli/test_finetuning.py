"""Fine-tuning a Hugging Face checkpoint on conversations, by the command that the README gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from dsv3_jax.checkpoint.hugging_face import load_hf
from dsv3_jax.checkpoint.run import load_run
from dsv3_jax.config.cli import parse_run
from dsv3_jax.convert import main as convert
from dsv3_jax.data.batches import TrainBatches
from dsv3_jax.data.text import build_dataset
from dsv3_jax.model import training_loss
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
    assert (run / "chat_template.jinja").read_text() == TEMPLATE
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
