"""infer.py on the run of train.py: completions, chats, batch files, and what it refuses."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import infer
from dsv3_jax import Completion, Engine, SamplingParams, rebalance
from dsv3_jax.data.chat_template import ChatTemplate, encode_prompt
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.infer.cli import DEFAULT_DRAFTS, DEFAULT_MAX_BATCH
from dsv3_jax.infer.load import load_model
from dsv3_jax.serve import ServeOptions
from tests.cli.conftest import CONFIG, ROOT, Done, plain_environment

PROGRAM = str(ROOT / "infer.py")


def generated(run: Path, prompts: list, params: list[SamplingParams]) -> list[Completion]:
    """Completions by an engine of our own, which speculates as infer.py does: what is drawn hangs on the drafts."""
    return list(engine_of(run, 1 if len(prompts) == 1 else DEFAULT_MAX_BATCH).generate(prompts, params))


@functools.cache
def engine_of(run: Path, slots: int) -> Engine:
    """An engine of the sizes that infer.py takes, so that each of its programs is compiled once."""
    model = load_model(str(run))
    return Engine(model.config, model.variables, model.tokenizer, drafts=DEFAULT_DRAFTS, max_batch=slots)


def completed(run: Path, prompt: str, params: SamplingParams) -> tuple[str, int]:
    """Prompt and completion as one text, and the number of new tokens."""
    (completion,) = generated(run, [prompt], [params])
    return f"{prompt}{completion.text}\n", len(completion.tokens)


def test_a_prompt_is_completed(straight: tuple[Path, Done], called: Callable[..., Done]) -> None:
    expected, count = completed(straight[0], "import ", SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, seed=5))
    flags = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "5", "--max-tokens", "20"]
    done = called(infer.main, "--checkpoint", "runs/straight", "--prompt", "import ", *flags)
    assert (done.code, done.stdout) == (0, expected), done.stderr
    first, cache, programs, last = done.stderr.splitlines()
    assert first.startswith("run runs/straight at step 12, in float32 on ")
    assert cache.startswith("cache: ")
    assert programs.startswith("programs: ")
    speed = rf"{count} tokens; the first after .* s, then .* tokens/s; .* tokens a step, .*% of drafts accepted"
    assert re.fullmatch(speed, last), last


def test_the_runs_own_prompt_and_limits_are_the_defaults(straight: tuple[Path, Done], called: Callable[..., Done]) -> None:
    expected, _ = completed(straight[0], CONFIG.infer.prompt, SamplingParams(max_tokens=CONFIG.infer.max_tokens))
    done = called(infer.main, "--checkpoint", "runs/straight")
    assert (done.code, done.stdout) == (0, expected)


def test_the_whole_context_of_the_model_may_be_used(
    straight: tuple[Path, Done], called: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3_jax.infer.cache.DEFAULT_MAX_LENGTH", 16)
    monkeypatch.setattr("infer.DEFAULT_MAX_LENGTH", 16)
    longest = CONFIG.model.max_position_embeddings - len(load_tokenizer(straight[0]).encode("x = 1\n")) - 1
    expected, _ = completed(straight[0], "x = 1\n", SamplingParams(max_tokens=longest))
    done = called(infer.main, "--checkpoint", "runs/straight", "--prompt", "x = 1\n", "--max-tokens", str(longest))
    assert (done.code, done.stdout) == (0, expected), done.stderr


@pytest.mark.slow
def test_a_mesh_with_redundant_experts_gives_the_same_text(
    straight: tuple[Path, Done], called: Callable[..., Done], tmp_path: Path
) -> None:
    expected, _ = completed(straight[0], "import ", SamplingParams(max_tokens=12))
    placement = str(tmp_path / "placement.npz")
    slots = CONFIG.model.n_routed_experts // 2 + 1
    done = called(rebalance.main, "runs/straight", "--shards", "2", "--slots", str(slots), "--output", placement)
    assert done.code == 0, done.stderr
    mesh = ["--mesh.data", "2", "--mesh.expert", "2", "--mesh.tensor", "2", "--placement", placement]
    done = called(infer.main, "--checkpoint", "runs/straight", "--prompt", "import ", "--max-tokens", "12", *mesh)
    assert (done.code, done.stdout) == (0, expected), done.stderr
    assert "in float32 on 8 cpu devices (data 2 x expert 2 x tensor 2)" in done.stderr


# Serving, which tests/serve does with a client.


def test_a_server_gets_the_engine_and_is_named_after_the_folder(
    straight: tuple[Path, Done], called: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    served: list[Any] = []

    def serve(engine: Engine, name: str, template: ChatTemplate | None, options: ServeOptions, switches: Any) -> int:
        served.append((engine.sizes.slots, name, template, options, switches))
        return 3

    monkeypatch.setattr("infer.serve", serve)
    checkpoint = f"{workplace}/runs/../runs/straight/."
    done = called(infer.main, "--checkpoint", checkpoint, "--serve", "--port", "0", "--max-queue", "3")
    assert (done.code, served.pop()) == (3, (8, "straight", None, ServeOptions(port=0, max_queue=3), {}))
    assert "slots: 8" in done.stderr
    flags = "--served-model-name", "a/b", "--chat-template-kwargs", '{"thinking": true}'
    assert called(infer.main, "--checkpoint", checkpoint, "--serve", "--port", "0", *flags).code == 3
    assert served.pop()[1:] == ("a/b", None, ServeOptions(port=0, served_model_name="a/b"), {"thinking": True})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/tiny", "tiny"),
        ("hub/models--deepseek-ai--DeepSeek-V3/snapshots/0123abc", "deepseek-ai/DeepSeek-V3"),
        ("hub/models--gpt2/snapshots/0123abc/", "gpt2"),
        ("snapshots/0123abc", "0123abc"),
    ],
)
def test_a_snapshot_is_named_after_its_repository(path: str, name: str) -> None:
    assert infer.model_name(path) == name


def test_an_address_and_a_key_are_refused_before_weights_are_read(
    straight: tuple[Path, Done], called: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("infer.load_model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = called(infer.main, "--checkpoint", "runs/straight", "--serve", "--port", port)
        done.assert_refused(f"cannot listen on port {port} of 127.0.0.1")
    monkeypatch.setenv("DSV3_JAX_API_KEY", "")
    called(infer.main, "--checkpoint", "runs/straight", "--serve", "--port", "0").assert_refused("the API key is empty")


# Chats.


@pytest.fixture(scope="module")
def talking(straight: tuple[Path, Done], workplace: Path) -> ChatTemplate:
    """The template of runs/talking, a copy of the run that has one."""
    source = "{% for message in messages %}# {{ message.role }}\n{{ message.content }}\n{% endfor %}"
    template = ChatTemplate(source, {"bos_token": "<bos>", "eos_token": "<eos>"})
    shutil.copytree(straight[0], workplace / "runs" / "talking")
    template.save(workplace / "runs" / "talking")
    return template


def test_a_chat_over_a_pipe(
    straight: tuple[Path, Done], talking: ChatTemplate, called: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = encode_prompt(talking, load_tokenizer(straight[0]), [{"role": "user", "content": "import"}])
    (expected,) = generated(straight[0], [prompt], [SamplingParams(max_tokens=9)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("import\n/reset\nimport\n"))
    done = called(infer.main, "--checkpoint", "runs/talking", "--interactive", "--max-tokens", "9")
    assert (done.code, done.stdout) == (0, 2 * f"{expected.text}\n"), done.stderr
    assert re.match(r"\d+ tokens; the first after ", done.stderr.splitlines()[-1])


def test_a_chat_without_a_template_is_refused(
    straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path
) -> None:
    done = called(infer.main, "--checkpoint", "runs/straight", "--interactive")
    done.assert_refused("runs/straight has no chat template", "put the checkpoint's own there")
    (workplace / "chats.in").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    done = called(infer.main, "--checkpoint", "runs/straight", "--batch-file", "chats.in", "chats.out")
    done.assert_refused("runs/straight has no chat template")


# Batch files.

BATCH = "--checkpoint", "runs/straight", "--max-tokens", "40", "--temperature", "0.9", "--seed", "3"


def test_a_batch_killed_and_begun_again_is_every_line_alone(
    straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path
) -> None:
    """Drawn and greedy lines, killed once some are done: the one start of infer.py in a process of its own here."""
    prompts = [f"def f{i}(" for i in range(40)]
    lines: list[dict] = [{"prompt": prompt, "id": f"line {i}"} for i, prompt in enumerate(prompts)]
    for line in lines[::3]:
        line["temperature"] = 0
    (workplace / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = workplace / "out.jsonl"
    arguments = *BATCH, "--batch-file", "in.jsonl", "out.jsonl"
    child = subprocess.Popen(
        [sys.executable, PROGRAM, *arguments], cwd=workplace, env=plain_environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not out.exists() or b"\n" not in out.read_bytes():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.kill()
    child.communicate()
    whole = out.read_bytes().count(b"\n")
    assert 0 < whole < len(prompts)
    done = called(infer.main, *arguments)
    assert done.code == 0, done.stderr
    assert f"{whole} of 40 lines are in out.jsonl already" in done.stderr
    params = [SamplingParams(40, line.get("temperature", 0.9), seed=3 + i) for i, line in enumerate(lines)]
    found = sorted(map(json.loads, out.read_text().splitlines()), key=lambda line: line["index"])
    assert found == [
        {"index": i, "id": f"line {i}", "text": one.text, "tokens": one.tokens, "finish_reason": one.finish_reason}
        for i, one in enumerate(generated(straight[0], prompts, params))
    ]
    # Other settings are another batch, and so is another input.
    called(infer.main, *arguments, "--seed", "4").assert_refused("out.jsonl was made with seed 3, not 4")
    called(infer.main, *arguments, "--drafts", "0").assert_refused("out.jsonl was made with drafts 1, not 0")
    (workplace / "in.jsonl").write_text(json.dumps(lines[0]))
    called(infer.main, *arguments).assert_refused("out.jsonl was made with prompts ")


@pytest.mark.parametrize(
    ("lines", "fragment"),
    [
        ('{"prompt": "x"}\n{"prompt": "x", "top_q": 1}', 'bad.jsonl:2 has the unknown key "top_q"; the nearest is "top_p"'),
        ('{"prompt": "x"}\n\n{"prompt": ""}\n{"prompt": [300]}', "bad.jsonl:4: token id 300 is outside the vocabulary of 300"),
    ],
)
def test_a_wrong_line_ends_the_batch_before_it_begins(
    straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path, lines: str, fragment: str
) -> None:
    (workplace / "bad.jsonl").write_text(lines)
    called(infer.main, *BATCH, "--batch-file", "bad.jsonl", "bad.out").assert_refused(fragment)
    assert not (workplace / "bad.out").exists() or not (workplace / "bad.out").stat().st_size


@pytest.mark.slow
def test_of_damaged_checkpoints_the_one_before_is_used_and_the_last_refused(
    straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path
) -> None:
    damaged = workplace / "runs" / "damaged"
    shutil.copytree(straight[0], damaged)

    def damage(step: str) -> None:
        for file in (damaged / "checkpoints" / step / "variables" / "d").iterdir():
            file.write_bytes(b"")

    damage("12")
    done = called(infer.main, "--checkpoint", "runs/damaged")
    assert done.code == 0, done.stderr
    warning = done.stderr.splitlines()[0]
    assert re.fullmatch(r"warning: .*/12 is damaged \(.*\); step 6 is used instead", warning), warning
    damage("6")
    done = called(infer.main, "--checkpoint", "runs/damaged")
    assert (done.code, done.stdout) == (2, "")
    assert re.match(r"error: no checkpoint is whole: .*/12 is damaged .*/6 is damaged .*; restore one", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--max-length", "65"], "max_length is 65; it must lie in 2..64"),
        (["--max-length", "4", "--prompt", "x = 1\n" * 8], "leave no room in max_length 4"),
        (["--prompt", "x = 1\n" * 50], "tokens leave no room in max_length 64 (the model's context is 64); shorten it"),
        (["--cache-tokens", "3"], "cache_tokens is 3, and in pages of 64"),
        (["--mesh.data", "4", "--mesh.context", "2"], "mesh.context is 2; inference does not"),
    ],
)
def test_what_no_engine_takes_is_refused_before_weights_are_read(
    straight: tuple[Path, Done],
    called: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    fragment: str,
) -> None:
    monkeypatch.delattr("infer.load_model")
    called(infer.main, "--checkpoint", "runs/straight", *arguments).assert_refused(fragment)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (
            ["--checkpoint", "nowhere"],
            "nowhere holds no config.json; name a run directory of train.py or a Hugging Face folder",
        ),
        (["--checkpoint", "text"], "text holds no config.json"),
        (["--checkpoint", "foreign"], "is neither a run's config nor a Hugging Face one"),
        ([], "--checkpoint is missing"),
        (["--checkpoint", "runs/straight", "--temperature", "-1"], "temperature is -1.0; it cannot be negative"),
        (["--checkpoint", "runs/straight", "--max-tokens", "0"], "max_tokens is 0; it must be at least 1"),
        (["--checkpoint", "runs/straight", "--dtype", "int8"], "--dtype is 'int8'; give"),
        (["--checkpoint", "runs/straight", "--promt", "x"], "--promt does not exist; the nearest is --prompt"),
        (
            ["--checkpoint", "runs/straight", "--interactive", "--prompt", "x"],
            "--prompt and --interactive are different things",
        ),
        (["--checkpoint", "runs/straight", "--batch-file", "nowhere", "out"], "--batch-file nowhere does not exist"),
        (["--checkpoint", "runs/straight", "--mesh.expert", "8"], "make these mesh axes smaller"),
        (["--checkpoint", "runs/straight", "--mesh.tensor", "3"], "has 3 places for 8 devices"),
    ],
)
def test_what_cannot_be_completed_is_refused(
    straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path, arguments: list[str], fragment: str
) -> None:
    (workplace / "foreign").mkdir(exist_ok=True)
    (workplace / "foreign" / "config.json").write_text(json.dumps({"hidden_size": 3}))
    called(infer.main, *arguments).assert_refused(fragment)
