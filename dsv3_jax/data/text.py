"""Everything that a run makes of its text before it trains."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsv3_jax.config import DataConfig, ModelConfig, TrainConfig
from dsv3_jax.data.cache import digest
from dsv3_jax.data.corpus import Corpus, load_corpus
from dsv3_jax.data.heldout import HeldoutWindows
from dsv3_jax.data.pipeline import tokenize_corpus
from dsv3_jax.data.tokenizer import Tokenizer, prepare_tokenizer


class Text(NamedTuple):
    """The text of a run."""

    corpus: Corpus
    tokenizer: Tokenizer
    tokens: np.ndarray
    """The training documents as ids [N]."""
    heldout: HeldoutWindows
    digest: str
    """Of the training text and its tokenizer: what a continued run has to share."""


def prepare_text(data: DataConfig, model: ModelConfig, train: TrainConfig) -> Text:
    """Reads the source, trains or loads the tokenizer, and tokenises both parts of the text; cached in `data.cache_dir`.

    Raises:
      ValueError: on whatever is wrong with the source, the tokenizer or the cache folder.
    """
    corpus = load_corpus(data)
    tokenizer = prepare_tokenizer(data, model, corpus)
    tokens = tokenize_corpus(corpus, tokenizer, data, model)
    shape = {"batch_size": train.batch_size, "sequence_length": train.sequence_length}
    heldout = HeldoutWindows(corpus.heldout, tokenizer, model, **shape)
    return Text(corpus, tokenizer, tokens, heldout, digest(corpus.train_digest, tokenizer.to_json()))
