"""Loading of a model for inference from a run directory of train.py or a Hugging Face checkpoint."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.sharding import Mesh

from dsv3_jax.checkpoint.hugging_face import is_fp8, load_hf, named_dtype
from dsv3_jax.checkpoint.run import load_run
from dsv3_jax.config import InferConfig, ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.config.run import is_hugging_face
from dsv3_jax.data.chat_template import with_closing_tokens
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer


class LoadedModel(NamedTuple):
    """A model for inference, with its tokenizer and the settings of its run."""

    config: ModelConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer
    origin: str
    """Kind, path and step of its source, as text for messages."""
    sequence_length: int
    """Tokens of a training sequence (train.sequence_length); for a Hugging Face folder min(4096, context)."""
    infer: InferConfig
    """The run's sampling defaults; for a Hugging Face folder those of `InferConfig`."""
    across_documents: bool = True
    """True unless training kept attention within each document (data.cross_document_attention False)."""


def load_model(path: str, dtype: str | None = None, mesh: Mesh | None = None, keep_fp8: bool | None = None) -> LoadedModel:
    """Load config, variables and tokenizer of a Hugging Face folder, or of the newest checkpoint of a run directory.

    Kernel backends in a run's config become "auto"; a folder's generation_config.json adds end-of-text tokens.

    Args:
      path: the folder; its config.json decides which kind it is.
      dtype: dtype to compute and store in; None is the run's own, or that of the Hugging Face config.
      mesh: the devices to lay the variables out over; None, or a mesh of one, is the first device.
      keep_fp8: keep the FP8 blocks of a Hugging Face folder (`load_hf`); None keeps them if there are some.

    Raises:
      ValueError: if the folder is of neither kind, a file is missing or invalid, or there is no FP8 for `keep_fp8`.
    """
    from_hugging_face, tokenizer = is_hugging_face(path), load_tokenizer(path)
    mesh = mesh if mesh is not None and mesh.size > 1 else None
    if from_hugging_face:
        kept = is_fp8(path) if keep_fp8 is None else keep_fp8
        config, variables = load_hf(path, dtype=dtype or named_dtype(path), mesh=mesh, keep_fp8=kept)
        config = with_closing_tokens(config, path, tokenizer)
        length = min(config.max_position_embeddings, 4096)
        return LoadedModel(config, variables, tokenizer, f"Hugging Face checkpoint {path}", length, InferConfig())
    check(not keep_fp8, f"keep_fp8 is set, but {path} is a run, which holds no FP8 blocks; leave it out")
    run, variables, step = load_run(path, dtype, mesh)
    across = run.data.cross_document_attention
    model = with_closing_tokens(run.model.with_auto_backends(), path, tokenizer)
    return LoadedModel(model, variables, tokenizer, f"run {path} at step {step}", run.train.sequence_length, run.infer, across)
