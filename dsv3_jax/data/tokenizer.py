"""Text to token ids and back: a byte-level BPE trained on the corpus, or any `tokenizer.json`.

The report uses byte-level BPE of 128K tokens (arXiv 2412.19437, section 4.1). Every byte has a token, so any
text comes back from its ids unchanged. The special tokens <bos> and <eos> are never made out of text: a
document that spells "<eos>" is encoded as those five characters. A tokenizer trained here gives <bos>, <eos> and, where
documents are filled in (`data.fim_rate`), the three `data.fim_tokens` the lowest ids, in this order, and bytes and merges the
ids that follow.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv3_jax.config import DataConfig, ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.sources import Document
from dsv3_jax.data.storage import digest, load_or_make
from dsv3_jax.files import write_whole

# Merges are counted on at most this much text (some 20 s of work): the frequent pairs of a corpus show in a sample.
TRAINING_CHARACTERS = 64_000_000


class Tokenizer:
    """Encodes text to ids and decodes ids to text; a thin face on a `tokenizers.Tokenizer`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_padding()
        backend.no_truncation()
        # "Encode special tokens as text", not as their ids; tokenizer.json does not store this.
        backend.encode_special_tokens = True
        self._backend = backend

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def special_tokens(self) -> dict[int, str]:
        """The ids that no text is encoded to, and how they are written."""
        return {id_: token.content for id_, token in self._backend.get_added_tokens_decoder().items() if token.special}

    @functools.cached_property
    def added_tokens(self) -> dict[int, str]:
        """The special tokens, and those that a tokenizer.json adds without calling them so, as DeepSeek's does <｜User｜>."""
        return {id_: token.content for id_, token in sorted(self._backend.get_added_tokens_decoder().items())}

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens.

        Raises:
          ValueError: if `text` holds a lone surrogate, which no UTF-8 text can.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        return _encode_batch(self._backend, texts)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """The same, without any added token: what a document or a message says never becomes one, whatever it spells."""
        return _encode_batch(self._plain_backend, texts)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """One that takes every added token for a special one, which it does not make out of text."""
        if self.added_tokens == self.special_tokens:
            return self._backend
        content = json.loads(self._backend.to_str())
        for token in content["added_tokens"]:
            token["special"] = True
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.encode_special_tokens = True
        return backend

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(id_) for id_ in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        """The content of the tokenizer.json that `load_tokenizer` reads."""
        return self._backend.to_str(pretty=True)

    def save(self, path: str | epath.PathLike) -> None:
        """Writes the tokenizer as a `tokenizer.json`."""
        write_whole(epath.Path(path), self.to_json())  # A run writes its own again while it depends on it.


class Decodes(Protocol):
    """Whatever turns ids into text."""

    def decode(self, ids: Sequence[int]) -> str: ...


def document_marks(model: ModelConfig) -> tuple[int | None, int]:
    """The ids before and after each document: bos_token_id (or None) and the first eos_token_id.

    Raises:
      ValueError: if the model has no eos_token_id.
    """
    check(bool(model.eos_token_ids), "model.eos_token_id is None; training needs a token that ends a document, such as 1")
    return model.bos_token_id, model.eos_token_ids[0]


def prepare_tokenizer(data: DataConfig, model: ModelConfig, *corpora: Corpus) -> Tokenizer:
    """The tokenizer of a run: `data.tokenizer`, or one trained on all training documents and kept in `data.cache_dir`.

    Raises:
      ValueError: if the tokenizer does not fit the model's vocab_size, bos_token_id and eos_token_id.
    """
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
        check_fits(tokenizer, model, f"data.tokenizer {data.tokenizer!r}")
        return tokenizer
    specials = _trained_specials(model, data)
    key = digest(*(corpus.train_digest for corpus in corpora), str(model.vocab_size), *specials, tokenizers.__version__)
    texts = functools.partial(_training_texts, [document for corpus in corpora for document in corpus.train])
    return load_or_make(
        Path(data.cache_dir) / f"tokenizer-{key}.json",
        load=load_tokenizer,
        write=lambda path: train_tokenizer(texts(), model.vocab_size, specials).save(path),
    )


def load_tokenizer(path: str | epath.PathLike) -> Tokenizer:
    """Reads a `tokenizer.json`, or the one in a folder.

    Raises:
      ValueError: if there is none, or it cannot be read.
    """
    file = epath.Path(path).expanduser()
    if file.is_dir():
        others = [name for name in ("tiktoken.model", "tokenizer.model") if (file / name).exists()]
        file = file / "tokenizer.json"
        if others and not file.exists():
            raise ValueError(
                f"{path} holds {others[0]} but no tokenizer.json, the only form read here; convert it with "
                "transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...)) or pass a tokenizer.json"
            )
    if not file.exists():
        raise ValueError(f"{file} does not exist; name a tokenizer.json, or a folder that holds one")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_str(file.read_text()))
    except Exception as error:  # the library raises bare Exception, whatever is wrong with the file
        raise ValueError(f"{file} is not a tokenizer that the tokenizers library reads ({error})") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, specials: Sequence[str]) -> Tokenizer:
    """Trains a byte-level BPE of at most `vocab_size` tokens; `specials` take the ids from 0 on.

    Raises:
      ValueError: if the vocabulary has no room for every byte and the special tokens.
    """
    least = 256 + len(specials)
    check(
        vocab_size >= least,
        f"model.vocab_size is {vocab_size}; a byte-level tokenizer with {list(specials)} needs at least {least}",
    )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def _encode_batch(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    except TypeError as error:  # which the library raises for a lone surrogate too
        for text in texts:
            _check_encodable(text)
        raise error


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text cannot be encoded as UTF-8 ({error}); remove the lone surrogate") from error


def _trained_specials(model: ModelConfig, data: DataConfig) -> list[str]:
    """The special tokens in the order of their ids: those of the model, then the three to fill in the middle with."""
    bos, eos = document_marks(model)
    named = {eos: "<eos>"} if bos is None else {bos: "<bos>", eos: "<eos>"}
    check(
        sorted(named) == list(range(2 if bos is not None else 1)) and len(model.eos_token_ids) == 1,
        f"model.bos_token_id {model.bos_token_id} and model.eos_token_id {model.eos_token_id} do not fit a tokenizer "
        "trained here, whose special tokens come first; use 0 and 1, or None and 0, or name a data.tokenizer",
    )
    return [*(named[id_] for id_ in sorted(named)), *(data.fim_tokens if data.fim_rate > 0 else ())]


def _training_texts(documents: Sequence[Document]) -> Iterable[str]:
    """The training documents, or of a large corpus a sample: documents by the hash of their names."""
    left = TRAINING_CHARACTERS
    for document in sorted(documents, key=lambda document: digest(document.name)):
        if left <= 0:
            return
        yield document.text[:left]
        left -= len(document.text)


def check_fits(tokenizer: Tokenizer, model: ModelConfig, name: str) -> None:
    """Raises ValueError unless the ids of the tokenizer `name` are the model's, and the document marks none of its texts'."""
    check(
        tokenizer.vocab_size <= model.vocab_size,
        f"{name} has {tokenizer.vocab_size} ids; raise model.vocab_size ({model.vocab_size}) to that",
    )
    for field, id_ in zip(("bos_token_id", "eos_token_id"), document_marks(model), strict=True):
        check(
            id_ is None or id_ in tokenizer.special_tokens or id_ >= tokenizer.vocab_size,
            f"model.{field} {id_} is an ordinary token of {name}; "
            f"use one of its special tokens: {dict(sorted(tokenizer.special_tokens.items())[:8])}",
        )


# ----------------------------------------------------------------------------------------------------------------------
# What lies beside a tokenizer.json in a Hugging Face folder: tokenizer_config.json, which names the special tokens.


def tokenizer_folder(tokenizer: str | epath.PathLike) -> epath.Path:
    """The folder of a tokenizer given as a tokenizer.json or as its folder."""
    path = epath.Path(tokenizer).expanduser()
    return path if path.is_dir() else path.parent


def tokenizer_config(tokenizer: str | epath.PathLike) -> dict[str, Any]:
    """The content of tokenizer_config.json; empty if there is none.

    Raises:
      ValueError: if it is no JSON object.
    """
    file = tokenizer_folder(tokenizer) / "tokenizer_config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it from the checkpoint again") from error
    check(isinstance(config, dict), f"{file} holds no JSON object; copy it from the checkpoint again")
    return config


def named_tokens(tokenizer: str | epath.PathLike) -> dict[str, str]:
    """The special tokens by what they are for, "bos_token", "eos_token" and others, as tokenizer_config.json names them."""
    named = {}
    for name, token in tokenizer_config(tokenizer).items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            named[name] = content
    return named
