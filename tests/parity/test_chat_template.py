"""Chat templates beside transformers' `apply_chat_template`: the same text and the same ids (`make parity`)."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dsv3_jax.data.chat_template import encode_prompt, load_chat_template
from dsv3_jax.data.tokenizer import load_tokenizer
from tests.data.test_chat_template import BOS, CHAT, DEEPSEEK, EOS, TOKENIZER

pytestmark = pytest.mark.parity

# Between them: loops with breaks, white space around blocks, JSON, tools, generation blocks and values that are missing.
TEMPLATES = {
    "deepseek": DEEPSEEK,
    "chatml": """\
{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}{{ 'system default' }}{% endif %}
    {{- '<｜User｜>' + message.role + '\n' + message.content | trim + '<｜end▁of▁sentence｜>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<｜Assistant｜>' }}
{% endif %}
""",
    "tools": """\
{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{{ tools | tojson }}{% endif %}
{% for message in messages %}
  {% if loop.index0 == 4 %}{% break %}{% endif %}
  {% generation %}{{ message['content'] }}{{ pad_token }}{% endgeneration %}
{% endfor %}
""",
}
TOOLS = [{"type": "function", "function": {"name": "é<b>", "description": "d", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return importlib.import_module("transformers")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("where", ["config", "file"])
@pytest.mark.parametrize("variables", [{}, {"add_generation_prompt": True}, {"tools": TOOLS}])
def test_text_and_ids_are_those_of_transformers(
    transformers: ModuleType, tmp_path: Path, name: str, where: str, variables: dict[str, Any]
) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    if where == "config":
        config["chat_template"] = TEMPLATES[name]
    else:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template, tokenizer = load_chat_template(tmp_path), load_tokenizer(tmp_path)
    for messages in (CHAT, CHAT[:1], CHAT[1:3], [{"role": "user", "content": "  é 漢字\n\n"}]):
        assert template.render(messages, **variables) == theirs.apply_chat_template(messages, tokenize=False, **variables)
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **variables)["input_ids"]
        if variables.get("add_generation_prompt") and messages[-1]["role"] == "assistant":
            asked = {"continue_final_message": True, "return_dict": True}
            ids = theirs.apply_chat_template(messages, tokenize=True, **asked)["input_ids"]
        assert encode_prompt(template, tokenizer, messages, **({"add_generation_prompt": False} | variables)) == ids
