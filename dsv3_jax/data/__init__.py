"""Text to batches: sources, the held-out split, the tokenizer, packed training batches and held-out windows."""

from dsv3_jax.data.corpus import Corpus, CorpusReport, load_corpus
from dsv3_jax.data.heldout import HeldoutBatch, HeldoutWindows, compressor_bits_per_byte
from dsv3_jax.data.pipeline import Batch, TrainBatches, tokenize_corpus
from dsv3_jax.data.sources import Document
from dsv3_jax.data.text import Text, prepare_text
from dsv3_jax.data.tokenizer import StreamDecoder, Tokenizer, document_marks, load_tokenizer, prepare_tokenizer

__all__ = [
    "Batch",
    "Corpus",
    "CorpusReport",
    "Document",
    "HeldoutBatch",
    "HeldoutWindows",
    "StreamDecoder",
    "Text",
    "Tokenizer",
    "TrainBatches",
    "compressor_bits_per_byte",
    "document_marks",
    "load_corpus",
    "load_tokenizer",
    "prepare_text",
    "prepare_tokenizer",
    "tokenize_corpus",
]
