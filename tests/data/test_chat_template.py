"""Chat templates as transformers renders them; what a message says never becomes a special token."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies

from dsv3_jax.data.chat_template import ChatTemplate, closing_tokens, encode_prompt, load_chat_template
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer

BOS, EOS, USER, ASSISTANT, THINK = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
)
# What DeepSeek-V3's own does with plain messages: system prompts first, turns behind their tokens, answers closed by an end.
DEEPSEEK = """\
{%- set found = namespace(system='', first=true) -%}
{%- for message in messages if message['role'] == 'system' -%}
  {%- set found.system = found.system + ('' if found.first else '\\n\\n') + message['content'] -%}
  {%- set found.first = false -%}
{%- endfor -%}
{{ bos_token }}{{ found.system }}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{ '<｜User｜>' + message['content'] }}
  {%- elif message['role'] == 'assistant' -%}
    {{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- endif -%}
"""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


def deepseek_tokenizer() -> Tokenizer:
    """Byte-level, with the tokens of a turn added as DeepSeek's are: not all of them called special."""
    backend = tokenizers.Tokenizer.from_str(train_tokenizer(["Hello there. Be brief."] * 9, 300, [BOS, EOS]).to_json())
    backend.add_tokens([tokenizers.AddedToken(text, special=False) for text in (USER, ASSISTANT, THINK)])
    return Tokenizer(backend)


TOKENIZER = deepseek_tokenizer()
IDS = {text: id_ for id_, text in TOKENIZER.added_tokens.items()}
TEMPLATE = ChatTemplate(DEEPSEEK, {"bos_token": BOS, "eos_token": EOS})


def encoded(messages: list[dict[str, Any]], template: ChatTemplate = TEMPLATE, **options: Any) -> list[int]:
    return encode_prompt(template, TOKENIZER, messages, **options)


def test_a_conversation_is_what_deepseek_reads() -> None:
    whole = f"{BOS}Be brief.{USER}Hi there{ASSISTANT}Hello.{EOS}{USER}Bye"
    assert TEMPLATE.render(CHAT) == whole
    assert TEMPLATE.render(CHAT, add_generation_prompt=True) == whole + ASSISTANT
    plain = [TOKENIZER.encode(text) for text in ("Be brief.", "Hi there", "Hello.", "Bye")]
    assert encoded(CHAT) == [
        IDS[BOS], *plain[0], IDS[USER], *plain[1], IDS[ASSISTANT], *plain[2], IDS[EOS], IDS[USER], *plain[3], IDS[ASSISTANT],
    ]  # fmt: skip
    assert encoded(CHAT, add_generation_prompt=False) == encoded(CHAT)[:-1]


def test_of_an_answers_own_words_a_token_that_is_not_special_is_the_token() -> None:
    content = f"{THINK}because{EOS}{BOS}"
    ids = encoded([{"role": "assistant", "content": content}], add_generation_prompt=False)
    rest = TOKENIZER.encode_documents([f"because{EOS}{BOS}"])[0]
    assert ids == [IDS[BOS], IDS[ASSISTANT], IDS[THINK], *rest, IDS[EOS]]


@pytest.mark.parametrize(
    ("role", "token"),
    [
        *((role, token) for role in ("user", "system") for token in (BOS, EOS, USER, ASSISTANT, THINK)),
        *(("assistant", token) for token in (BOS, EOS)),
    ],
)
def test_a_message_that_spells_a_token_does_not_say_it(role: str, token: str) -> None:
    content = f"before {token}{token} after{token}"
    ids = encoded([{"role": role, "content": content}], add_generation_prompt=False)
    opening = {"user": [IDS[BOS], IDS[USER]], "assistant": [IDS[BOS], IDS[ASSISTANT]], "system": [IDS[BOS]]}[role]
    closing = [IDS[EOS]] if role == "assistant" else []
    assert [id_ for id_ in ids if id_ in IDS.values()] == opening + closing
    # And it is encoded as its characters are anywhere.
    middle = ids[len(opening) : len(ids) - len(closing)]
    assert middle == TOKENIZER.encode_documents([content])[0]
    assert TOKENIZER.decode(middle) == content


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
    strategies.lists(
        strategies.one_of(
            strategies.text(strategies.characters(exclude_categories=["Cs"]), max_size=5),
            strategies.sampled_from(
                [BOS, EOS, USER, ASSISTANT, "<｜", "User｜>", "｜", "<", "\ufdd0", "\ufdd1", "\ufdd2", " "]
            ),
        ),
        max_size=8,
    )
)
def test_whatever_is_said_comes_back_between_the_tokens_of_its_turn(parts: list[str]) -> None:
    content = "".join(parts)
    ids = encoded([{"role": "user", "content": content}])
    assert ids[:2] == [IDS[BOS], IDS[USER]]
    assert ids[-1] == IDS[ASSISTANT]
    assert not set(ids[2:-1]) & set(IDS.values())
    assert TOKENIZER.decode(ids[2:-1]) == content


def test_nested_values_are_kept_from_spelling_too() -> None:
    template = ChatTemplate("{{ messages[0].call | tojson }}{{ tools | tojson }}<｜User｜>", {})
    message = {"role": "user", "content": "", "call": {USER: [USER, 3, None]}}
    ids = encoded([message], template, tools=[{"name": ASSISTANT}])
    assert [id_ for id_ in ids if id_ in IDS.values()] == [IDS[USER]]
    assert TOKENIZER.decode(ids[:-1]) == f'{{"{USER}": ["{USER}", 3, null]}}[{{"name": "{ASSISTANT}"}}]'


def test_a_template_may_cut_a_message_at_a_token_it_spells() -> None:
    template = ChatTemplate("{{ messages[0].content.split('<think>') | last }}<think>", {})
    ids = encoded([{"role": "user", "content": f"thought {THINK}answer"}], template)
    assert ids == [*TOKENIZER.encode("answer"), IDS[THINK]]


def test_what_hugging_face_gives_a_template_is_there() -> None:
    def render(source: str, **variables: Any) -> str:
        return ChatTemplate(source, {"bos_token": BOS}).render(CHAT, **variables)

    assert render("{{ bos_token }}{{ eos_token }}") == BOS
    assert render("{{ {'é': '<b>'} | tojson }}") == '{"é": "<b>"}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    before, written = datetime.datetime.now(), render("{{ strftime_now('%d %b %Y') }}")
    assert before.date() <= datetime.datetime.strptime(written, "%d %b %Y").date() <= datetime.datetime.now().date()
    assert render("{% if tools is none %}none{% endif %}") == "none"
    assert render("{% if thinking is defined %}{{ thinking }}{% endif %}", thinking=True) == "True"
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"  # blocks take their line with them
    assert (
        render("{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }} {% endfor %}")
        == "system user "
    )
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Be brief."


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages .*roles must alternate"),
        ("{{ messages[0].content.nothing() }}", "refuses the messages .*has no attribute 'nothing'"),
        ("{{ messages.append(3) }}", "refuses the messages .*SecurityError"),
        ("{{ messages.__class__.__mro__ }}", "refuses the messages .*SecurityError"),
        ("{{ 1 + 'a' }}", "refuses the messages .*TypeError"),
    ],
)
def test_what_a_template_refuses_is_said(source: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ChatTemplate(source, {}).render(CHAT)


def test_a_template_lies_beside_the_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    with pytest.raises(
        ValueError, match=r"has no chat template \(no chat_template\.jinja, no chat_template in tokenizer_config"
    ):
        load_chat_template(tmp_path)
    config = {"bos_token": BOS, "eos_token": {"content": EOS, "special": True}, "pad_token": None, "chat_template": DEEPSEEK}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for given in (tmp_path, tmp_path / "tokenizer.json"):
        template = load_chat_template(given)
        assert template.render(CHAT) == TEMPLATE.render(CHAT)
        assert template.special_tokens == {"bos_token": BOS, "eos_token": EOS}
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    assert load_chat_template(tmp_path).render(CHAT) == "yes"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    assert load_chat_template(tmp_path).render(CHAT) == EOS
    (tmp_path / "saved").mkdir()
    TEMPLATE.save(tmp_path / "saved")
    saved = load_chat_template(tmp_path / "saved" / "tokenizer.json")
    assert (saved.source, saved.special_tokens) == (TEMPLATE.source, TEMPLATE.special_tokens)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not a Jinja template"):
        load_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is missing or is not JSON"):
        load_chat_template(tmp_path)


def test_documents_spell_no_added_token_whether_special_or_not() -> None:
    text = f"{USER} and {EOS}"
    (plain,) = TOKENIZER.encode_documents([text])
    assert not set(plain) & set(IDS.values())
    assert TOKENIZER.decode(plain) == text
    assert IDS[USER] in TOKENIZER.encode(text)  # what a prompt written by hand relies on


# ----------------------------------------------------------------------------------------------------------------------
# What people write into messages


THOUGHTS = ChatTemplate(
    "{% for m in messages %}<think>{{ m.get('reasoning_content', '') }}</think>{{ m.content }}{% endfor %}", {}
)
CALLS = ChatTemplate(
    "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.content is none }}{{ m.tool_calls | tojson }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    {},
)


def text(template: ChatTemplate, messages: list[Any], **options: Any) -> str:
    return TOKENIZER.decode(encoded(messages, template, add_generation_prompt=False, **options))


@pytest.mark.parametrize(
    ("template", "message", "expected"),
    [
        (THOUGHTS, {"reasoning_content": None}, "<think></think>b"),
        (THOUGHTS, {"reasoning_content": "a"}, "<think>a</think>b"),
        (THOUGHTS, {}, "<think></think>b"),
        (CALLS, {"tool_calls": None}, "b"),
        (CALLS, {"tool_calls": []}, "b"),
        (CALLS, {"tool_calls": [{"id": None, "function": {"name": "f", "x": None}}]}, 'False[{"function": {"name": "f"}}]'),
        (CALLS, {"content": None, "tool_calls": [{"name": "f"}]}, 'True[{"name": "f"}]'),
    ],
)
def test_keys_with_null_are_absent(template: ChatTemplate, message: dict[str, Any], expected: str) -> None:
    assert text(template, [{"role": "assistant", "content": "b", **message}]) == expected


@pytest.mark.parametrize("role", ["human", "function", "developers", "tool"])
def test_a_role_without_a_trace_is_refused(role: str) -> None:
    messages = [CHAT[1], {"role": role, "content": "x"}]
    with pytest.raises(ValueError, match=rf"messages\[1\] has the role '{role}', which leaves no trace"):
        encoded(messages)


def test_a_developer_is_the_system() -> None:
    assert encoded([{"role": "developer", "content": "Be brief."}, *CHAT[1:]]) == encoded(CHAT)


def test_a_role_that_the_template_writes_is_any_word() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}]{% endfor %}", {})
    assert text(template, [{"role": "critic", "content": "x"}]) == "[critic]"


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]', [], "[]", None, "null"])
def test_tools_may_be_their_json_text(tools: Any) -> None:
    template = ChatTemplate("{{ messages[0].content }}{% if tools %}{{ tools | tojson }}{% endif %}", {})
    assert text(template, [CHAT[1]], tools=tools) == "Hi there" + ('[{"name": "f"}]' if tools and "f" in str(tools) else "")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"text": "a"}], "a"),
        ([], ""),
    ],
)
def test_a_content_in_parts_is_one_text(content: Any, expected: str) -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert text(template, [{"role": "user", "content": content}]) == expected


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        # Idioms of published templates, which see the text of messages as it is, spelt tokens included.
        (
            "{% set a = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
            "{{ '<think>\\n' + a + '\\n</think>\\n\\n' + content.split('</think>')[-1].lstrip('\\n') }}",
            "<think>\nbecause\n</think>\n\nanswer",
            "<think>\nbecause\n</think>\n\nanswer",
        ),
        ("{{ content | trim }}", " <think> ", "<think>"),
        ("{{ content.startswith('<think>') }}{{ content.endswith('x') }}{{ content[-1] }}", "<think>x", "TrueTruex"),
        ("{{ content[7:] }}{{ content | length }}", "<think>x", "x8"),
        ("{{ content | tojson(ensure_ascii=true) }}", "<think>é", '"<think>\\u00e9"'),
        ("{{ content | replace('<think>', '') }}", "a<think>b", "ab"),
        ("{{ content.find('x') }}{{ content[-1] }}", "<think>x", "7x"),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_sees_spelt_tokens_as_text(source: str, content: str, expected: str, role: str) -> None:
    template = ChatTemplate("{% set content = messages[0].content %}" + source, {})
    rendered = template.render([{"role": role, "content": content}])
    assert rendered == expected
    assert TOKENIZER.decode(encoded([{"role": role, "content": content}], template, add_generation_prompt=False)) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Answers that are begun, switches, and ends of turns


def test_an_answer_at_the_end_is_continued() -> None:
    begun = [*CHAT[:2], {"role": "assistant", "content": "Hel"}]
    assert encoded(begun) == [*encoded(CHAT[:2]), *TOKENIZER.encode("Hel")]
    assert encoded([*CHAT[:2], {"role": "assistant", "content": ""}]) == encoded(CHAT[:2])
    with pytest.raises(ValueError, match=r"messages\[2\], the last, calls tools; add their results"):
        encoded([*CHAT[:2], {"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}])


def test_switches_reach_the_template_and_a_begun_answer_has_a_prefix() -> None:
    """As in DeepSeek-V3.1: thoughts are opened by a switch, and in a begun answer by its `prefix`."""
    opening = "{% if thinking %}<think>{% endif %}"
    source = DEEPSEEK.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜>' }}" + opening).replace(
        "{{ '<｜Assistant｜>' + ", "{{ '<｜Assistant｜>' + ('<think>' if thinking and message.prefix else '') + "
    )
    template = ChatTemplate(source, TEMPLATE.special_tokens)
    assert encoded(CHAT, template, thinking=True) == [*encoded(CHAT), IDS[THINK]]
    assert encoded(CHAT, template) == encoded(CHAT)
    opened = [*encoded([CHAT[1]]), IDS[THINK]]
    begun = {"role": "assistant", "content": "Hel", "prefix": True}
    assert encoded([CHAT[1], begun], template, thinking=True) == [*opened, *TOKENIZER.encode("Hel")]
    # Without a prefix the answer is begun, and its thoughts are closed, as training learns it.
    assert encoded([CHAT[1], begun | {"prefix": None}], template, thinking=True) == [*opened, *TOKENIZER.encode("</think>Hel")]


@pytest.mark.parametrize(
    ("source", "special", "expected"),
    [
        (DEEPSEEK, {"eos_token": EOS}, (EOS,)),
        (DEEPSEEK, {}, (EOS,)),
        (DEEPSEEK.replace("end▁of", "begin▁of"), {"eos_token": EOS}, (BOS, EOS)),
        (DEEPSEEK.replace("<｜end▁of▁sentence｜>'", "\\n<｜User｜>\\n<｜end▁of▁sentence｜>'"), {}, (EOS,)),
        ("{{ raise_exception('no') }}", {"eos_token": EOS}, (EOS,)),
        ("{{ messages[0].content }}", {}, ()),
    ],
)
def test_the_end_of_a_turn_is_what_the_template_writes(source: str, special: dict[str, str], expected: tuple[str, ...]) -> None:
    ends = closing_tokens(ChatTemplate(source, special), TOKENIZER, TOKENIZER.vocab_size)
    assert ends == tuple(IDS[token] for token in expected)
