"""A model to run, from either kind of folder: a run directory of train.py, or a Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dsv3_jax.checkpoint.hugging_face import load_hf, named_dtype
from dsv3_jax.checkpoint.orbax import load_run
from dsv3_jax.config import InferConfig, ModelConfig
from dsv3_jax.config.checkpoint_model import is_hugging_face
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer


class LoadedModel(NamedTuple):
    """A model with its tokenizer."""

    config: ModelConfig
    variables: dict[str, Any]
    tokenizer: Tokenizer
    origin: str
    """What it was loaded from, in words."""
    sequence_length: int
    """Tokens a sequence it was trained with; for a Hugging Face folder its context, at most 4096."""
    infer: InferConfig
    """The run's defaults for sampling."""
    across_documents: bool = True
    """Whether attention crosses the documents of a row, as it was trained."""


def load_model(path: str, dtype: str | None = None, mesh: Mesh | None = None) -> LoadedModel:
    """Loads config, variables and tokenizer of either kind of folder.

    Backends that a run names are those of the machine it was trained on; here they are "auto" again.

    Args:
      path: the folder.
      dtype: dtype to compute and store in; None is the run's own, or that of the Hugging Face config.
      mesh: devices to lay the variables out over; None, or a mesh of one, puts them on the first device.

    Raises:
      ValueError: naming what is missing or wrong, or does not divide over the mesh.
    """
    from_hugging_face = is_hugging_face(path)
    tokenizer = load_tokenizer(path)
    mesh = mesh if mesh is not None and mesh.size > 1 else None
    if from_hugging_face:
        config, variables = load_hf(path, dtype=dtype or named_dtype(path), mesh=mesh)
        length = min(config.max_position_embeddings, 4096)
        return LoadedModel(config, variables, tokenizer, f"Hugging Face checkpoint {path}", length, InferConfig())
    run, variables, step = load_run(path, dtype, mesh)
    across = run.data.cross_document_attention
    model = dataclasses.replace(run.model, expert_backend="auto", attention_backend="auto", cache_backend="auto")
    return LoadedModel(model, variables, tokenizer, f"run {path} at step {step}", run.train.sequence_length, run.infer, across)
