"""The dataset of a run: its sources read or opened, tokenised, mixed into rows, and their held-out text cut into windows."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dsv3_jax.config import DataConfig, ModelConfig, TrainConfig
from dsv3_jax.config.checks import check
from dsv3_jax.data.chat import ChatRows, chat_windows, encode_conversations, load_chat_corpus, tokenize_chat
from dsv3_jax.data.chat_template import ChatTemplate, load_chat_template
from dsv3_jax.data.corpus import Corpus, load_corpus
from dsv3_jax.data.rows import MixedRows, PackedRows, Rows, TokenStream
from dsv3_jax.data.shards import Prepared, is_prepared, open_prepared
from dsv3_jax.data.sources import Document
from dsv3_jax.data.storage import Part, digest
from dsv3_jax.data.tokenizer import Tokenizer, check_fits, document_marks, load_tokenizer, prepare_tokenizer
from dsv3_jax.data.tokens import FillInTheMiddle, ValidationWindows, check_reproduced, document_windows, tokenize_corpus

# Sources by name, tokenizer, chat template, and for the digest the options of the encoding.
_Tokenized = tuple[dict[str, "Source"], Tokenizer, ChatTemplate | None, str]


class Source(NamedTuple):
    """One tokenised source of a run: its rows, held-out windows and text, digests, and a line for the log."""

    rows: Rows
    windows: ValidationWindows
    documents: list[Document]
    """Held-out text that the windows score."""
    train_digest: str
    validation_digest: str
    report: str
    """One line about the training and held-out text."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The sources of a run by name, and their rows mixed by their shares."""

    sources: dict[str, Source]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """Chat template, to be saved with the tokenizer; None for texts."""
    rows: MixedRows
    """Every row of the run."""
    digest: str
    """Digest of training texts, shares, tokenizer and its use; a resumed run must have the same."""

    @property
    def validation(self) -> dict[str, ValidationWindows]:
        """Held-out windows by source."""
        return {name: source.windows for name, source in self.sources.items()}

    @property
    def validation_digest(self) -> str:
        """Digest of all held-out text, on which the processes of a run have to agree."""
        return digest(*(source.validation_digest for source in self.sources.values()))

    @property
    def report(self) -> str:
        """Training and held-out text: one line, for several sources one line each."""
        if len(self.sources) == 1:
            return next(iter(self.sources.values())).report
        lines = [f"  {name}: {source.report}" for name, source in self.sources.items()]
        return "\n".join([f"{len(self.sources)} sources", *lines])

    def epochs(self, rows: int) -> dict[str, float]:
        """Return the epochs of each source in the first `rows` rows."""
        return self.rows.epochs_by_source(rows)

    def epochs_in_words(self, rows: int) -> str:
        """Return the epochs of each source as text."""
        shown = {name: f"{count:.3g}" for name, count in self.epochs(rows).items()}
        if len(shown) == 1:
            return f"{next(iter(shown.values()))} epochs"
        return "epochs: " + ", ".join(f"{name} {count}" for name, count in shown.items())


def build_dataset(data: DataConfig, model: ModelConfig, train: TrainConfig) -> Dataset:
    """Read the sources, train or load the tokenizer, and tokenize both parts of each; cached in `data.cache_dir`.

    Raises:
      ValueError: for every defect of the sources, the tokenizer or the cache folder.
    """
    build = _chat_sources if data.kind == "chat" else _document_sources
    sources, tokenizer, template, encoding = build(data, model, train)
    rows = MixedRows({name: source.rows for name, source in sources.items()}, data.shares, train.seed)
    parts = (part for name, share in data.shares.items() for part in (sources[name].train_digest, repr(share)))
    return Dataset(sources, tokenizer, template, rows, digest(data.kind, *parts, tokenizer.to_json(), encoding))


def _document_sources(data: DataConfig, model: ModelConfig, train: TrainConfig) -> _Tokenized:
    opened = {
        name: open_prepared(name, data.cache_dir) if is_prepared(name) else load_corpus(_alone(data, name))
        for name in data.shares
    }
    tokenizer = _tokenizer(data, model, opened)
    fim = FillInTheMiddle.of(data.fim_rate, data.fim_tokens, train.seed, tokenizer)
    eos = document_marks(model)[1]
    sources = {}
    for name, source in opened.items():
        if isinstance(source, Prepared):
            _check_prepared(name, source.meta, data, model)
            parts = source.parts
        else:
            parts = [Part.closed_by(eos, tokenize_corpus(source, tokenizer, data, model, fim))]
        with _naming(data, name):
            rows = PackedRows(TokenStream(parts, eos, train.seed), train.sequence_length, train.seed)
            windows = document_windows(source.validation, tokenizer, model, **_shape(data, train))
        digests = source.train_digest, source.validation_digest
        sources[name] = Source(rows, windows, source.validation, *digests, source.report)
    return sources, tokenizer, None, str(fim)


def _chat_sources(data: DataConfig, model: ModelConfig, train: TrainConfig) -> _Tokenized:
    if data.tokenizer is None:
        raise ValueError(
            "data.tokenizer is None, but conversations (data.kind chat) take the tokenizer and the chat template of a "
            "checkpoint; name its folder"
        )
    tokenizer = load_tokenizer(data.tokenizer)
    check_fits(tokenizer, model, f"data.tokenizer {data.tokenizer!r}")
    template = load_chat_template(data.tokenizer)
    sources, encodings = {}, set()
    for name in data.shares:
        corpus = load_chat_corpus(_alone(data, name))
        tokens = tokenize_chat(corpus.train, template, tokenizer, data.cache_dir)
        with _naming(data, name):
            rows = ChatRows(tokens, train.sequence_length, train.seed)
            encoded = list(encode_conversations(corpus.validation, template, tokenizer))
            names = itertools.accumulate(encoded[:-1], lambda number, ids: number + ids.is_complete, initial=0)
            scored = [Document(corpus.validation[number].name, ids.said) for number, ids in zip(names, encoded, strict=True)]
            check_reproduced(scored, [ids.ids[ids.is_text] for ids in encoded], tokenizer)
            windows = chat_windows(encoded, **_shape(data, train))
        encodings.add(rows.encoding)
        report = f"{corpus.report}; {rows.report}"
        sources[name] = Source(rows, windows, scored, corpus.train_digest, corpus.validation_digest, report)
    return sources, tokenizer, template, f"{template.source} {template.special_tokens}{max(encodings)}"


def _alone(data: DataConfig, name: str) -> DataConfig:
    """Return the config of a run with this one source."""
    return dataclasses.replace(data, source=name, mixture=())


def _shape(data: DataConfig, train: TrainConfig) -> dict[str, Any]:
    """Return batch size, sequence length and attention across documents as keyword arguments of held-out windows."""
    return {
        "batch_size": train.micro_batch,
        "sequence_length": train.sequence_length,
        "across_documents": data.cross_document_attention,
    }


@contextlib.contextmanager
def _naming(data: DataConfig, name: str) -> Iterator[None]:
    """Prefix errors with the source if there are several."""
    try:
        yield
    except ValueError as error:
        if not data.mixture:
            raise
        raise ValueError(f"data.mixture {name!r}: {error}") from error


def _tokenizer(data: DataConfig, model: ModelConfig, sources: Mapping[str, Corpus | Prepared]) -> Tokenizer:
    """Return the tokenizer of all sources: that of the prepared ones, if there are any."""
    prepared = {name: source.tokenizer for name, source in sources.items() if isinstance(source, Prepared)}
    if not prepared:
        return prepare_tokenizer(data, model, *(source for source in sources.values() if isinstance(source, Corpus)))
    name, first = next(iter(prepared.items()))
    content = first.to_json()
    for other, tokenizer in prepared.items():
        check(
            tokenizer.to_json() == content,
            f"the prepared folders {name!r} and {other!r} have different tokenizers; prepare one of them again, with that of "
            "the other (--tokenizer)",
        )
    check(
        data.tokenizer is None or load_tokenizer(data.tokenizer).to_json() == content,
        f"data.tokenizer {data.tokenizer!r} is not the one that {name!r} was prepared with; prepare the folder "
        "again with it (--tokenizer), or name no data.tokenizer",
    )
    check_fits(first, model, f"the tokenizer of {name!r}")
    return first


def _check_prepared(name: str, meta: dict[str, Any], data: DataConfig, model: ModelConfig) -> None:
    """Raise ValueError if a folder was prepared with other marks or other fill-in-the-middle than the run's."""
    bos, eos = document_marks(model)
    options: dict[str, Any] = {"model.bos_token_id": bos, "model.eos_token_id": eos, "data.fim_rate": data.fim_rate}
    if data.fim_rate:
        options["data.fim_tokens"] = list(data.fim_tokens)
    for option, value in options.items():
        prepared = meta[option.split(".")[1]]
        remedy = "set it to the same, or prepare the folder again (--bos-token, --eos-token, --fim-rate, --fim-tokens)"
        check(prepared == value, f"{option} is {value}, but {name!r} was prepared with {prepared}; {remedy}")
