"""The tokenizer: any text comes back, special tokens are never made of text, caches hang on the corpus."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors

from dsv3_jax.config import DataConfig, ModelConfig
from dsv3_jax.data.corpus import Corpus, load_corpus
from dsv3_jax.data.tokenizer import (
    Tokenizer,
    document_marks,
    load_tokenizer,
    named_tokens,
    prepare_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from dsv3_jax.infer.request import StreamDecoder

TEXTS = [f"def function_{i}(argument_{i * i}):\n    return argument_{i * i} + {i**3}\n\n" * 3 for i in range(100)]
AWKWARD = [
    "",
    " ",
    "\t\r\n\x00\x7f",
    "<bos><eos> and <eos>",
    "naïve café — ﬁ ﷽ 👩‍👩‍👧‍👦 e\u0301 \ufeff\u2028\ufffd",
    "漢字かな交じり文 한국어 हिन्दी العربية",
    "".join(map(chr, itertools.chain(range(0x20, 0x250), range(0xFFF0, 0x10010), range(0x10FFF0, 0x110000)))),
]


def trained(vocab_size: int = 400) -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size, ["<bos>", "<eos>"])


def random_text(generator: random.Random, length: int) -> str:
    points = (
        generator.choice((generator.randrange(128), generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)))
        for _ in range(length)
    )
    return "".join(map(chr, points))


def corpus_in(folder: Path, texts: list[str]) -> Corpus:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return load_corpus(DataConfig(source=str(folder)))


def distinct_corpus(folder: Path, prefix: str) -> Corpus:
    return corpus_in(folder, [" ".join(f"{prefix}{number}x{i}" for i in range(150)) for number in range(20)])


def test_every_text_comes_back() -> None:
    tokenizer = trained()
    generator = random.Random(0)
    for text in [*AWKWARD, *TEXTS, *(random_text(generator, length) for length in range(60))]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(2 <= id_ < tokenizer.vocab_size for id_ in ids)


def test_training_merges_and_keeps_every_byte() -> None:
    assert trained().vocab_size == 400
    assert len(trained().encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert trained(258).encode("ab")  # bytes alone
    assert len(trained(258).encode(TEXTS[0])) == len(TEXTS[0])
    few = train_tokenizer(["abab"], 4096, ["<bos>", "<eos>"])
    assert 258 < few.vocab_size < 270
    assert few.special_tokens == {0: "<bos>", 1: "<eos>"}
    with pytest.raises(ValueError, match=r"vocab_size is 257; .* at least 258"):
        trained(257)


def test_lone_surrogates_are_refused() -> None:
    for encode in (trained().encode, lambda text: trained().encode_documents(["whole", text])):
        with pytest.raises(ValueError, match="lone surrogate"):
            encode("half \ud800")


def test_encode_documents_is_encode() -> None:
    tokenizer = trained()
    assert tokenizer.encode_documents(TEXTS + AWKWARD) == [tokenizer.encode(text) for text in TEXTS + AWKWARD]


def test_decode_leaves_special_tokens_out() -> None:
    tokenizer = trained()
    assert tokenizer.decode([0, *tokenizer.encode("text"), 1]) == "text"


def test_save_and_load(tmp_path: Path) -> None:
    tokenizer = trained()
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.vocab_size == 400
        assert [loaded.encode(text) for text in AWKWARD] == [tokenizer.encode(text) for text in AWKWARD]


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tiktoken.model").write_text("IQ== 0")
    with pytest.raises(ValueError, match=r"holds tiktoken\.model but no tokenizer\.json"):
        load_tokenizer(tmp_path)
    for content in (b"{", b'{"model": 3}', b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match="is not a tokenizer"):
            load_tokenizer(tmp_path)


def metaspace_tokenizer() -> Tokenizer:
    """A tokenizer whose decoder drops the space before its first token, as those made from SentencePiece do."""
    vocabulary = {piece: id_ for id_, piece in enumerate(["<unk>", "▁one", "▁two", "▁three"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


@pytest.mark.parametrize(
    ("tokenizer", "text"), [(trained(), "".join(AWKWARD)), (trained(258), AWKWARD[5]), (metaspace_tokenizer(), "one two three")]
)
def test_stream_gives_the_text_as_characters_complete(tokenizer: Tokenizer, text: str) -> None:
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode(text)
    shown = ""
    for count, id_ in enumerate(ids, start=1):
        shown += stream.feed([id_])
        whole = tokenizer.decode(ids[:count])
        assert shown == whole if not whole.endswith("\ufffd") else text.startswith(shown)
    assert shown + stream.finish() == text


def test_stream_of_broken_bytes_gives_the_text_of_all_ids() -> None:
    tokenizer = trained(258)
    generator = random.Random(1)
    for _ in range(50):
        ids = [generator.randrange(258) for _ in range(40)]
        stream = StreamDecoder(tokenizer)
        shown = "".join([stream.feed(ids[:3]), *(stream.feed([id_]) for id_ in ids[3:]), stream.finish()])
        assert shown == tokenizer.decode(ids)
    assert StreamDecoder(tokenizer).finish() == ""


def test_cache_is_used_remade_when_broken_and_never_shared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, model = DataConfig(cache_dir=str(tmp_path / "cache")), ModelConfig(vocab_size=300)
    one, other = distinct_corpus(tmp_path / "one", "a"), distinct_corpus(tmp_path / "other", "b")
    first = prepare_tokenizer(data, model, one).to_json()
    (file,) = (tmp_path / "cache").iterdir()
    stamp = file.stat().st_mtime_ns
    assert prepare_tokenizer(data, model, one).to_json() == first
    assert file.stat().st_mtime_ns == stamp
    assert caplog.text == ""

    file.write_text(first[: len(first) // 2])
    assert prepare_tokenizer(data, model, one).to_json() == first
    assert file.read_text() == first
    assert "again" in caplog.text

    assert prepare_tokenizer(data, model, other).to_json() != first
    assert prepare_tokenizer(data, ModelConfig(vocab_size=301), one).vocab_size == 301
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_training_is_the_same_in_every_process(tmp_path: Path) -> None:
    texts = [f"{word} {number}\n" * (number % 7 + 1) for number, word in enumerate(["alpha", "beta", "gamma", "delta"] * 50)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    program = (
        "import json, pathlib, sys\n"
        "from dsv3_jax.data.tokenizer import train_tokenizer\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "train_tokenizer(json.loads((folder / 'texts.json').read_text()), 320, ['<bos>', '<eos>']).save(folder / 'out.json')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "out.json").read_text() == train_tokenizer(texts, 320, ["<bos>", "<eos>"]).to_json()


def test_cache_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    corpus = distinct_corpus(tmp_path / "one", "a")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"data\.cache_dir .* cannot be written"):
        prepare_tokenizer(DataConfig(cache_dir=str(tmp_path / "file")), ModelConfig(vocab_size=300), corpus)


def test_given_tokenizer_must_fit_the_model(tmp_path: Path) -> None:
    corpus = distinct_corpus(tmp_path / "one", "a")
    trained(400).save(tmp_path / "tokenizer.json")
    data = DataConfig(tokenizer=str(tmp_path / "tokenizer.json"))
    assert prepare_tokenizer(data, ModelConfig(vocab_size=400), corpus).vocab_size == 400
    with pytest.raises(ValueError, match=r"has 400 ids; raise model\.vocab_size \(399\) to that"):
        prepare_tokenizer(data, ModelConfig(vocab_size=399), corpus)
    with pytest.raises(ValueError, match=r"eos_token_id 7 is an ordinary token of data\.tokenizer .*'<bos>'"):
        prepare_tokenizer(data, ModelConfig(vocab_size=400, eos_token_id=7), corpus)
    # An id that the tokenizer does not use is as good as a special token.
    prepare_tokenizer(data, ModelConfig(vocab_size=500, eos_token_id=450), corpus)


@pytest.mark.parametrize(
    ("bos", "eos", "specials"), [(0, 1, {0: "<bos>", 1: "<eos>"}), (1, 0, {0: "<eos>", 1: "<bos>"}), (None, 0, {0: "<eos>"})]
)
def test_special_tokens_take_the_ids_of_the_model(tmp_path: Path, bos: int | None, eos: int, specials: dict[int, str]) -> None:
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    model = ModelConfig(vocab_size=300, bos_token_id=bos, eos_token_id=eos)
    assert prepare_tokenizer(data, model, distinct_corpus(tmp_path / "one", "a")).special_tokens == specials
    assert document_marks(model) == (bos, eos)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"bos_token_id": 5, "eos_token_id": 6}, "use 0 and 1, or None and 0"),
        ({"bos_token_id": 0, "eos_token_id": 0}, "use 0 and 1, or None and 0"),
        ({"eos_token_id": [1, 2]}, "use 0 and 1, or None and 0"),
        ({"eos_token_id": None}, "eos_token_id is None"),
    ],
)
def test_special_ids_a_trained_tokenizer_cannot_have_are_refused(
    tmp_path: Path, fields: dict[str, int], complaint: str
) -> None:
    corpus = distinct_corpus(tmp_path / "one", "a")
    with pytest.raises(ValueError, match=complaint):
        prepare_tokenizer(DataConfig(cache_dir=str(tmp_path / "cache")), ModelConfig(vocab_size=300, **fields), corpus)


def tokenizer_of(folder: Path, **beside: Any) -> Tokenizer:
    """A trained tokenizer in a folder with other files, of which each keyword is one, without .json."""
    trained().save(folder / "tokenizer.json")
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "plain", "expected"),
    [
        ("def x", False, [0, "def x"]),
        ("<bos>def x", False, [0, "def x"]),
        ("<bos><bos>def<eos>x", False, [0, 0, "def", 1, "x"]),
        ("def x<eos>", False, [0, "def x", 1]),
        ("", False, [0]),
        ("<eos>", False, [0, 1]),
        ("def x", True, [0, "def x"]),
        ("<bos>def x", True, [0, "<bos>def x"]),
    ],
)
def test_a_raw_prompt_reads_special_tokens_behind_one_bos(text: str, plain: bool, expected: list[Any]) -> None:
    tokenizer = trained()
    ids = [i for part in expected for i in ([part] if isinstance(part, int) else tokenizer.encode(part))]
    assert tokenizer.encode_raw(text, 0, plain=plain) == ids
    if not plain:
        assert tokenizer.encode_raw(text, None) == (ids if text.startswith("<bos>") else ids[1:])


@pytest.mark.parametrize(
    ("beside", "model", "added"),
    [
        ({}, 0, 0),
        ({}, None, None),
        ({"tokenizer_config": {"add_bos_token": False, "tokenizer_class": "LlamaTokenizerFast"}}, 0, None),
        ({"tokenizer_config": {"add_bos_token": True, "bos_token": "<eos>"}}, None, 1),
        ({"tokenizer_config": {"add_bos_token": True}, "special_tokens_map": {"bos_token": {"content": "<bos>"}}}, None, 0),
        ({"tokenizer_config": {"add_bos_token": True, "bos_token": "<eos>"}}, 0, 0),
        ({"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}}, 0, 0),
        ({"tokenizer_config": {"tokenizer_class": "TikTokenTokenizer"}}, 0, None),
        ({"tokenizer_config": {"bos_token": "<bos>"}}, 0, 0),
    ],
)
def test_a_bos_token_goes_in_front_if_the_folder_does_not_say_otherwise(
    tmp_path: Path, beside: dict[str, Any], model: int | None, added: int | None
) -> None:
    tokenizer = tokenizer_of(tmp_path, **beside)
    assert tokenizer.encode_raw("def x", model) == ([] if added is None else [added]) + tokenizer.encode("def x")


def test_a_post_processor_that_adds_the_bos_token_says_so(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(trained().to_json())
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>"}')
    assert load_tokenizer(tmp_path).encode_raw("x", None) == [0, *trained().encode("x")]


def test_the_map_names_the_tokens_that_the_config_does_not(tmp_path: Path) -> None:
    config = {"bos_token": "<a>", "eos_token": None, "x": 1}
    tokenizer_of(tmp_path, tokenizer_config=config, special_tokens_map={"bos_token": "<b>", "eos_token": {"content": "<c>"}})
    assert named_tokens(tmp_path) == {"bos_token": "<a>", "eos_token": "<c>"}


def test_a_run_gets_the_files_that_travel_with_its_tokenizer(tmp_path: Path) -> None:
    for name in ("source", "other", "run", "alone"):
        (tmp_path / name).mkdir()
    tokenizer = tokenizer_of(tmp_path / "source", tokenizer_config={"a": 1}, generation_config={"b": 2}, unrelated={"c": 3})
    train_tokenizer(TEXTS, 300, ["<bos>", "<eos>"]).save(tmp_path / "other" / "tokenizer.json")
    save_tokenizer(tokenizer, epath.Path(tmp_path / "run"), None, str(tmp_path / "other"), str(tmp_path / "source"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for path in (tmp_path / "run").iterdir():
        assert path.read_bytes() == (tmp_path / "source" / path.name).read_bytes()
    save_tokenizer(tokenizer, epath.Path(tmp_path / "run"), str(tmp_path / "run"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    save_tokenizer(tokenizer, epath.Path(tmp_path / "alone"), None, str(tmp_path / "broken"))
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["tokenizer.json"]
