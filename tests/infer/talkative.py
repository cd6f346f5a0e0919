"""A tiny model that reads text and conversations, for the front ends of the engine."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.infer import Engine
from tests.data.test_chat_template import TEMPLATE, TOKENIZER
from tests.model.tiny import CONFIG, random_variables

MODEL = dataclasses.replace(
    CONFIG,
    vocab_size=TOKENIZER.vocab_size,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    num_nextn_predict_layers=0,
    bos_token_id=0,
    eos_token_id=1,
    max_position_embeddings=128,
)
BROKEN = 7
"""A token whose embedding `broken` sets to NaN."""
__all__ = ["BROKEN", "MODEL", "TEMPLATE", "TOKENIZER", "broken", "make_broken_engine", "make_engine"]


@functools.cache
def _variables() -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, random_variables(MODEL))


def make_engine(**options: Any) -> Engine:
    """An engine of its own; all of them share their programs."""
    return Engine(MODEL, _variables(), TOKENIZER, **({"max_batch": 2, "chunk": 16, "page_size": 4} | options))


def broken(variables: dict[str, Any]) -> dict[str, Any]:
    """Variables with NaN in the embedding of `BROKEN`."""
    variables = jax.tree.map(lambda leaf: leaf, variables)
    embedding = variables["params"]["embed"]
    embedding["embedding"] = embedding["embedding"].at[BROKEN].set(jnp.nan)
    return variables


def make_broken_engine(**options: Any) -> Engine:
    """An engine whose logits are not finite once a text holds the token `BROKEN`."""
    return Engine(MODEL, broken(_variables()), TOKENIZER, **({"max_batch": 2, "chunk": 16, "page_size": 4} | options))
