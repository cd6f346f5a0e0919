"""`python -m dsv3_jax.evaluate --checkpoint C --text FILE`: loss and bits per byte of a checkpoint on text.

For a checkpoint with MTP, also the share of the tokens drafted by its first depth that greedy verification would accept.
The checkpoint is a run directory of train.py or a Hugging Face folder with a tokenizer.json; the text is a file, a .jsonl
file or a folder. Every byte of its documents is scored; binary, hidden and empty files are skipped.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

from dsv3_jax.config import DataConfig
from dsv3_jax.config.checks import check
from dsv3_jax.config.cli import cli_main, parse_flags
from dsv3_jax.data.sources import read_source
from dsv3_jax.data.tokens import compressor_bits_per_byte, document_windows
from dsv3_jax.infer.load import load_model
from dsv3_jax.parallel.devices import cache_compilations
from dsv3_jax.train.evaluation import Evaluator


@dataclasses.dataclass(frozen=True)
class EvaluateFlags:
    """Flags of `python -m dsv3_jax.evaluate`."""

    checkpoint: str
    """Run directory of train.py, or Hugging Face folder."""
    text: str
    """Text file, .jsonl file with a "text" field, folder of such files, or "stdlib": the library of this Python."""
    sequence_length: int | None = None
    """Tokens per window; None is the sequence length of the run, or 4096 for a folder (at most the model's context)."""
    batch_size: int = 8
    """Windows per batch."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype to compute in; None is the checkpoint's own."""


@cli_main
def main() -> None:
    """Score the text with the checkpoint; print loss, bits per byte (gzip's and xz's too) and MTP acceptance as JSON."""
    flags = parse_flags(EvaluateFlags, description=__doc__ or "")
    documents, _ = read_source(flags.text, "--text")
    model = load_model(flags.checkpoint, flags.dtype)
    length = model.sequence_length if flags.sequence_length is None else flags.sequence_length
    context = model.config.max_position_embeddings
    check(1 <= length <= context, f"--sequence-length is {length}; it must lie in 1..{context} (max_position_embeddings)")
    check(flags.batch_size >= 1, f"--batch-size is {flags.batch_size}; it must be at least 1")
    cache_compilations(DataConfig.cache_dir)
    windows = document_windows(
        documents,
        model.tokenizer,
        model.config,
        batch_size=flags.batch_size,
        sequence_length=length,
        across_documents=model.across_documents,
    )
    scored = Evaluator(model.config)(model.variables, windows)
    compressors = compressor_bits_per_byte(documents)
    result = {
        "checkpoint": model.origin,
        "bytes": windows.num_bytes,
        "tokens": scored.tokens,
        "loss": scored.loss,
        "bits_per_byte": windows.bits_per_byte(scored.nats),
        "gzip_bits_per_byte": compressors["gzip"],
        "xz_bits_per_byte": compressors["xz"],
        "mtp_acceptance": scored.acceptance,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
