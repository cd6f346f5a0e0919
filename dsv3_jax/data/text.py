"""Everything that a run makes of its text before it trains."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from dsv3_jax.config import DataConfig, ModelConfig, TrainConfig
from dsv3_jax.config.checks import check
from dsv3_jax.data.chat import ChatCorpus, ChatRows, chat_windows, encode_conversations, load_chat_corpus, tokenize_chat
from dsv3_jax.data.chat_template import ChatTemplate, load_chat_template
from dsv3_jax.data.corpus import Corpus, load_corpus
from dsv3_jax.data.rows import MixedRows, PackedRows, Rows, TokenStream
from dsv3_jax.data.shards import Prepared, is_prepared, open_prepared
from dsv3_jax.data.sources import Document
from dsv3_jax.data.storage import ArrayPart, digest
from dsv3_jax.data.tokenizer import Tokenizer, check_fits, document_marks, load_tokenizer, prepare_tokenizer
from dsv3_jax.data.tokens import ValidationWindows, check_reproduced, fill_in_the_middle, tokenize_corpus


class Split(Protocol):
    """What every kind of source says of itself: a `Corpus`, a `Prepared` or a `ChatCorpus`."""

    @property
    def validation(self) -> list[Document]:
        """Held-out documents: the bytes that are scored."""

    @property
    def train_digest(self) -> str:
        """Of the training documents, in order."""

    @property
    def validation_digest(self) -> str:
        """Of the held-out ones."""


@dataclasses.dataclass(frozen=True)
class Corpora:
    """The sources of a run, by the names they were given."""

    sources: Mapping[str, Split]
    reports: Mapping[str, str]
    """A line, or a few, about each."""

    @property
    def report(self) -> str:
        """What is trained on and what is held out; for a lone source in one line."""
        if len(self.reports) == 1:
            return next(iter(self.reports.values()))
        return "\n".join([f"{len(self.reports)} sources", *(f"  {name}: {report}" for name, report in self.reports.items())])

    @property
    def validation(self) -> dict[str, list[Document]]:
        """Held-out documents by source."""
        return {name: source.validation for name, source in self.sources.items()}

    @property
    def validation_digest(self) -> str:
        """Of all held-out documents, on which the processes of a run have to agree."""
        return digest(*(source.validation_digest for source in self.sources.values()))


class Dataset(NamedTuple):
    """The text of a run."""

    corpus: Corpora
    tokenizer: Tokenizer
    rows: Rows
    """Every row of the run."""
    validation: dict[str, ValidationWindows]
    """By source, under the name it was given by."""
    digest: str
    """Of the training texts, their shares, the tokenizer and what is made of them: what a continued run has to share."""
    template: ChatTemplate | None = None
    """That of conversations, to be kept beside the tokenizer; None for texts."""

    def epochs_in_words(self, rows: int) -> str:
        """The same, as a run says it."""
        counts = self.epochs(rows)
        shown = {name: f"{count:.3g}" for name, count in counts.items()}
        one = len(shown) == 1
        return f"{next(iter(shown.values()))} epochs" if one else "epochs: " + ", ".join(f"{n} {c}" for n, c in shown.items())

    def epochs(self, rows: int) -> dict[str, float]:
        """How often the first `rows` rows go through each source."""
        if isinstance(self.rows, MixedRows):
            return self.rows.epochs_by_source(rows)
        return dict.fromkeys(self.corpus.sources, self.rows.epochs(rows))


def build_dataset(data: DataConfig, model: ModelConfig, train: TrainConfig) -> Dataset:
    """Reads the sources, trains or loads the tokenizer, and tokenises both parts of each; cached in `data.cache_dir`.

    Raises:
      ValueError: on whatever is wrong with the sources, the tokenizer or the cache folder.
    """
    return _prepare_chat(data, model, train) if data.kind == "chat" else _prepare_documents(data, model, train)


def _prepare_documents(data: DataConfig, model: ModelConfig, train: TrainConfig) -> Dataset:
    opened: dict[str, Corpus | Prepared] = {}
    for name in data.shares:
        if is_prepared(name):
            opened[name] = open_prepared(name, data.cache_dir)
        else:
            opened[name] = load_corpus(dataclasses.replace(data, source=name, mixture=()))
    tokenizer = _tokenizer(data, model, opened)
    fim = fill_in_the_middle(data, train.seed, tokenizer)
    eos = document_marks(model)[1]
    rows: dict[str, Rows] = {}
    windows: dict[str, ValidationWindows] = {}
    for name, source in opened.items():
        if isinstance(source, Prepared):
            _check_prepared(name, source, data, model, train)
            parts = source.parts
        else:
            parts = [ArrayPart.closed_by(eos, tokenize_corpus(source, tokenizer, data, model, fim))]
        with _naming(data, name):
            rows[name] = PackedRows(TokenStream(parts, eos, train.seed), train.sequence_length, train.seed)
            windows[name] = ValidationWindows(source.validation, tokenizer, model, **_shape(data, train))
    corpora = Corpora(opened, {name: str(source.report) for name, source in opened.items()})
    return _text(data, train, corpora, tokenizer, rows, windows, str(fim))


def _prepare_chat(data: DataConfig, model: ModelConfig, train: TrainConfig) -> Dataset:
    check(
        data.tokenizer is not None,
        "data.tokenizer is None, but conversations (data.kind chat) take the tokenizer and the chat template of a checkpoint; "
        "name its folder",
    )
    assert data.tokenizer is not None
    tokenizer = load_tokenizer(data.tokenizer)
    check_fits(tokenizer, model, f"data.tokenizer {data.tokenizer!r}")
    template = load_chat_template(data.tokenizer)
    opened: dict[str, ChatCorpus] = {}
    reports: dict[str, str] = {}
    rows: dict[str, Rows] = {}
    windows: dict[str, ValidationWindows] = {}
    for name in data.shares:
        corpus = opened[name] = load_chat_corpus(dataclasses.replace(data, source=name, mixture=()))
        conversations = tokenize_chat(corpus.train, template, tokenizer, data.cache_dir)
        with _naming(data, name):
            rows[name] = packed = ChatRows(conversations, train.sequence_length, train.seed)
            encoded = list(encode_conversations(corpus.validation_conversations, template, tokenizer))
            scored = [Document(one.name, ids.said) for one, ids in zip(corpus.validation_conversations, encoded, strict=True)]
            check_reproduced(scored, [ids.ids[ids.is_text] for ids in encoded], tokenizer)
            windows[name] = chat_windows(encoded, **_shape(data, train))
        opened[name] = dataclasses.replace(corpus, validation=scored)
        reports[name] = f"{corpus.report}; {packed.report}"
    made = f"{template.source} {template.special_tokens}"
    text = _text(data, train, Corpora(opened, reports), tokenizer, rows, windows, made)
    return text._replace(template=template)


def _text(
    data: DataConfig,
    train: TrainConfig,
    corpora: Corpora,
    tokenizer: Tokenizer,
    rows: dict[str, Rows],
    validation: dict[str, ValidationWindows],
    made: str,
) -> Dataset:
    """Puts together what was made of each source; `made` says how, as far as sources and tokenizer do not."""
    mixed = next(iter(rows.values())) if len(rows) == 1 else MixedRows(rows, data.shares, train.seed)
    sources = (part for name, share in data.shares.items() for part in (corpora.sources[name].train_digest, repr(share)))
    return Dataset(corpora, tokenizer, mixed, validation, digest(data.kind, *sources, tokenizer.to_json(), made))


def _shape(data: DataConfig, train: TrainConfig) -> dict[str, Any]:
    """Of held-out windows."""
    return {
        "batch_size": train.micro_batch,
        "sequence_length": train.sequence_length,
        "across_documents": data.cross_document_attention,
    }


@contextlib.contextmanager
def _naming(data: DataConfig, name: str) -> Iterator[None]:
    """Puts the source before what is said against it, where there are several."""
    try:
        yield
    except ValueError as error:
        if not data.mixture:
            raise
        raise ValueError(f"data.mixture {name!r}: {error}") from error


def _tokenizer(data: DataConfig, model: ModelConfig, sources: Mapping[str, Corpus | Prepared]) -> Tokenizer:
    """The one tokenizer of all sources: that of the prepared ones, where there are any."""
    prepared = [(name, source) for name, source in sources.items() if isinstance(source, Prepared)]
    if not prepared:
        return prepare_tokenizer(data, model, *(source for source in sources.values() if isinstance(source, Corpus)))
    name, first = prepared[0]
    content = first.tokenizer.to_json()
    for other, source in prepared[1:]:
        check(
            source.tokenizer.to_json() == content,
            f"the prepared folders {name!r} and {other!r} have different tokenizers; prepare one of them again, with that of "
            "the other (--tokenizer)",
        )
    if data.tokenizer is not None:
        check(
            load_tokenizer(data.tokenizer).to_json() == content,
            f"data.tokenizer {data.tokenizer!r} is not the one that {name!r} was prepared with; prepare the folder "
            "again with it (--tokenizer), or name no data.tokenizer",
        )
    check_fits(first.tokenizer, model, f"the tokenizer of {name!r}")
    return first.tokenizer


def _check_prepared(name: str, source: Prepared, data: DataConfig, model: ModelConfig, train: TrainConfig) -> None:
    meta = source.meta
    marks = meta["bos_token_id"], meta["eos_token_id"]
    check(
        marks == document_marks(model),
        f"{name!r} was prepared with documents between the ids {marks[0]} and {marks[1]}, but model.bos_token_id and "
        f"model.eos_token_id are {document_marks(model)}; set them alike, or prepare it again (--bos-token, --eos-token)",
    )
    check(
        meta["fim_rate"] == data.fim_rate,
        f"{name!r} was prepared with --fim-rate {meta['fim_rate']}, but data.fim_rate is {data.fim_rate}; set it alike, or "
        "prepare the folder again",
    )
    check(
        not data.fim_rate or meta["fim_tokens"] == list(data.fim_tokens),
        f"{name!r} was prepared with --fim-tokens {meta['fim_tokens']}, but data.fim_tokens is {list(data.fim_tokens)}; set "
        "them alike",
    )
