"""Text to token ids and back: a byte-level BPE trained on the corpus, or any `tokenizer.json`.

The report uses byte-level BPE of 128K tokens (arXiv 2412.19437, section 4.1). Every byte has a token, so decoding the ids of
any text gives the text unchanged. Text is never encoded to the special tokens <bos> and <eos>: a document that spells "<eos>"
becomes those five characters. In a tokenizer trained here <bos>, <eos> and, for fill-in-the-middle (`data.fim_rate`), the
three `data.fim_tokens` have the lowest ids, in this order; bytes and merges follow.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv3_jax.config import DataConfig, ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.sources import Document
from dsv3_jax.data.storage import digest, load_or_make, read_json
from dsv3_jax.files import tokenizer_files, write_whole

TOKENIZER = "tokenizer.json"
# Merges are counted on at most this much text (about 20 s of work): a sample has the frequent pairs of the corpus.
TRAINING_CHARACTERS = 64_000_000


class Tokenizer:
    """Encoder of text to ids and decoder of ids to text, around a `tokenizers.Tokenizer`."""

    def __init__(self, backend: tokenizers.Tokenizer, *, adds_bos: bool | None = None, bos: str | None = None) -> None:
        """Wrap a tokenizer.

        Args:
          backend: of the tokenizers library.
          adds_bos: its folder says that raw prompts begin with the BOS token, or that they do not; None if it does not say.
          bos: spelling of that token, if the folder names it.
        """
        backend.no_padding()
        backend.no_truncation()
        # "Encode special tokens as text", not as their ids; tokenizer.json does not store this.
        backend.encode_special_tokens = True
        self._backend = backend
        self._adds_bos, self._bos = adds_bos, bos

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def special_tokens(self) -> dict[int, str]:
        """Ids that no text is encoded to, with their spelling."""
        return {id_: token.content for id_, token in self._backend.get_added_tokens_decoder().items() if token.special}

    @functools.cached_property
    def added_tokens(self) -> dict[int, str]:
        """The special tokens, and those that a tokenizer.json adds as ordinary ones, such as DeepSeek's <｜User｜>."""
        return {id_: token.content for id_, token in sorted(self._backend.get_added_tokens_decoder().items())}

    @functools.cached_property
    def added_ids(self) -> dict[str, int]:
        """Ids of the added tokens by their spelling."""
        return {text: id_ for id_, text in self.added_tokens.items()}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without special tokens; ValueError if it contains a lone surrogate."""
        return _encode_batch(self._backend, [text])[0]

    def encode_raw(self, text: str, bos_token_id: int | None, *, plain: bool = False) -> list[int]:
        """Return the ids of a raw prompt: special tokens that it spells are tokens, with one BOS token in front.

        Args:
          text: the prompt.
          bos_token_id: the model's; the token goes in front unless the text begins with it, or the tokenizer adds none.
          plain: spelt special tokens, and added ones, are text.
        """
        named = self.added_ids.get(self._bos or "")
        bos = None if self._adds_bos is False else named if bos_token_id is None and self._adds_bos else bos_token_id
        ids = _encode_batch(self._plain_backend if plain else self._reading_backend, [text])[0]
        return ids if bos is None or (not plain and ids[:1] == [bos]) else [bos, *ids]

    @functools.cached_property
    def _reading_backend(self) -> tokenizers.Tokenizer:
        """The tokenizer that reads special tokens in texts."""
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores; no text becomes an added token, even if it spells one."""
        return _encode_batch(self._plain_backend, texts)

    @functools.cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The tokenizer with every added token marked special, so that no text is encoded to one."""
        if self.added_tokens == self.special_tokens:
            return self._backend
        content = json.loads(self._backend.to_str())
        for token in content["added_tokens"]:
            token["special"] = True
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        backend.encode_special_tokens = True
        return backend

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(id_) for id_ in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        """Return the content of the tokenizer.json that `load_tokenizer` reads."""
        return self._backend.to_str(pretty=True)

    def save(self, path: str | epath.PathLike) -> None:
        """Write the tokenizer as a `tokenizer.json`, atomically: a run overwrites the one that it resumes from."""
        write_whole(epath.Path(path), self.to_json())


def document_marks(model: ModelConfig) -> tuple[int | None, int]:
    """Return the ids before and after a document: bos_token_id, or None, and the first eos_token_id."""
    check(bool(model.eos_token_ids), "model.eos_token_id is None; training needs a token that ends a document, such as 1")
    return model.bos_token_id, model.eos_token_ids[0]


def prepare_tokenizer(data: DataConfig, model: ModelConfig, *corpora: Corpus) -> Tokenizer:
    """Return `data.tokenizer`, or one trained on all training documents and kept in `data.cache_dir`.

    Raises:
      ValueError: if the tokenizer does not fit the model's vocab_size, bos_token_id and eos_token_id.
    """
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer)
        check_fits(tokenizer, model, f"data.tokenizer {data.tokenizer!r}")
        return tokenizer
    specials = _trained_specials(model, data)
    key = digest(*(corpus.train_digest for corpus in corpora), str(model.vocab_size), *specials, tokenizers.__version__)

    def write(path: Path) -> None:
        documents = [document for corpus in corpora for document in corpus.train]
        train_tokenizer(_training_texts(documents), model.vocab_size, specials).save(path)

    return load_or_make(Path(data.cache_dir) / f"tokenizer-{key}.json", load_tokenizer, write)


def load_tokenizer(path: str | epath.PathLike) -> Tokenizer:
    """Read a `tokenizer.json`, or the one in a folder; ValueError if there is none, or it cannot be read."""
    file = _file_of(path)
    others = [name for name in ("tiktoken.model", "tokenizer.model") if (file.parent / name).exists()]
    if others and not file.exists():
        raise ValueError(
            f"{path} holds {others[0]} but no tokenizer.json, the only form read here; convert it with "
            "transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...)) or pass a tokenizer.json"
        )
    check(file.exists(), f"{file} does not exist; name a tokenizer.json, or a folder that holds one")
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text())
    except Exception as error:  # The library raises a bare Exception for every defect of the file.
        raise ValueError(f"{file} is not a tokenizer that the tokenizers library reads ({error})") from error
    return Tokenizer(backend, adds_bos=_adds_bos(backend, file), bos=named_tokens(file).get("bos_token"))


def _adds_bos(backend: tokenizers.Tokenizer, file: epath.Path) -> bool | None:
    """Return whether transformers puts the BOS token before a text; None if the folder does not say."""
    config = tokenizer_config(file)
    stated, name = config.get("add_bos_token"), config.get("tokenizer_class")
    if isinstance(stated, bool):
        return stated
    if isinstance(name, str) and name.startswith("LlamaTokenizer"):
        return True
    is_added = bool(backend.post_processor) and bool(backend.encode("").ids)
    return True if is_added else False if isinstance(name, str) else None


def _file_of(path: str | epath.PathLike) -> epath.Path:
    """Return the tokenizer.json that a path names: itself, or the one in it."""
    file = epath.Path(path).expanduser()
    return file / TOKENIZER if file.is_dir() else file


def _holds(path: str, tokenizer: Tokenizer) -> bool:
    """Return True if a tokenizer.json, or the one in a folder, is this tokenizer."""
    try:
        return load_tokenizer(path).to_json() == tokenizer.to_json()
    except ValueError:  # A checkpoint to start from may have none, or one of another kind.
        return False


def save_tokenizer(tokenizer: Tokenizer, folder: epath.Path, *sources: str | None) -> None:
    """Write a run's tokenizer, with the files that travel with it from the first of `sources` with the same tokenizer."""
    for source in sources:
        if source is None or not _holds(source, tokenizer):
            continue
        if tokenizer_folder(source).resolve() == folder.resolve():
            return
        for file in tokenizer_files(tokenizer_folder(source)):
            write_whole(folder / file.name, file.read_bytes())
        if _file_of(source).name == TOKENIZER:
            return
    tokenizer.save(folder / TOKENIZER)


def train_tokenizer(texts: Iterable[str], vocab_size: int, specials: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens; `specials` get the ids from 0 on.

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


def check_fits(tokenizer: Tokenizer, model: ModelConfig, name: str) -> None:
    """Raise ValueError if the tokenizer `name` has more ids than the model, or encodes text to a document mark."""
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


def _encode_batch(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    except TypeError:  # The library raises it for a lone surrogate too.
        try:
            "".join(texts).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text cannot be encoded as UTF-8 ({error}); remove the lone surrogate") from error
        raise


def _trained_specials(model: ModelConfig, data: DataConfig) -> list[str]:
    """Return the special tokens in the order of their ids: the document marks, then those of fill-in-the-middle."""
    bos, eos = document_marks(model)
    marks = {eos: "<eos>"} if bos is None else {bos: "<bos>", eos: "<eos>"}
    check(
        sorted(marks) == list(range(2 if bos is not None else 1)) and len(model.eos_token_ids) == 1,
        f"model.bos_token_id {model.bos_token_id} and model.eos_token_id {model.eos_token_id} do not fit a tokenizer "
        "trained here, whose special tokens come first; use 0 and 1, or None and 0, or name a data.tokenizer",
    )
    return [*(marks[id_] for id_ in sorted(marks)), *(data.fim_tokens if data.fim_rate > 0 else ())]


def _training_texts(documents: Sequence[Document]) -> Iterable[str]:
    """Yield the training documents, or a sample of a large corpus: documents by the hash of their names."""
    left = TRAINING_CHARACTERS
    for document in sorted(documents, key=lambda document: digest(document.name)):
        if left <= 0:
            return
        yield document.text[:left]
        left -= len(document.text)


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer_config.json of a Hugging Face folder, which names the special tokens.


def tokenizer_folder(tokenizer: str | epath.PathLike) -> epath.Path:
    """Return the folder of a tokenizer given as a tokenizer.json or as its folder."""
    path = epath.Path(tokenizer).expanduser()
    return path if path.is_dir() else path.parent


def tokenizer_config(tokenizer: str | epath.PathLike) -> dict[str, Any]:
    """Return the content of tokenizer_config.json; empty if there is none; ValueError if it is not a JSON object."""
    file = tokenizer_folder(tokenizer) / "tokenizer_config.json"
    return read_json(file, "copy it from the checkpoint again") if file.exists() else {}


def named_tokens(tokenizer: str | epath.PathLike) -> dict[str, str]:
    """Return the special tokens by role, "bos_token", "eos_token" and others.

    They are those of tokenizer_config.json, and of special_tokens_map.json where that file names none.
    """
    file = tokenizer_folder(tokenizer) / "special_tokens_map.json"
    others = read_json(file, "copy it from the checkpoint again") if file.exists() else {}
    contents = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in {**others, **{k: v for k, v in tokenizer_config(tokenizer).items() if v is not None}}.items()
        if name.endswith("_token")
    }
    return {name: content for name, content in contents.items() if isinstance(content, str)}
