"""Text to batches: sources, the held-out split, the tokenizer, packed training batches and held-out windows."""

from dsv3_jax.data.batches import TrainBatches
from dsv3_jax.data.chat_template import ChatTemplate, encode_prompt, load_chat_template
from dsv3_jax.data.corpus import Corpus, CorpusReport, load_corpus
from dsv3_jax.data.rows import PackedRows, Row, Rows, TokenStream
from dsv3_jax.data.sources import Document
from dsv3_jax.data.text import Dataset, build_dataset
from dsv3_jax.data.tokenizer import Tokenizer, document_marks, load_tokenizer, prepare_tokenizer
from dsv3_jax.data.tokens import (
    FillInTheMiddle,
    ValidationWindows,
    compressor_bits_per_byte,
    fill_in_the_middle,
    tokenize_corpus,
)
from dsv3_jax.model.losses import Batch, ValidationBatch

__all__ = [
    "Batch",
    "ChatTemplate",
    "Corpus",
    "CorpusReport",
    "Dataset",
    "Document",
    "FillInTheMiddle",
    "PackedRows",
    "Row",
    "Rows",
    "TokenStream",
    "Tokenizer",
    "TrainBatches",
    "ValidationBatch",
    "ValidationWindows",
    "build_dataset",
    "compressor_bits_per_byte",
    "document_marks",
    "encode_prompt",
    "fill_in_the_middle",
    "load_chat_template",
    "load_corpus",
    "load_tokenizer",
    "prepare_tokenizer",
    "tokenize_corpus",
]
