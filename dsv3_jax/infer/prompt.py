"""A prompt, as text or as token ids, and whether a model can complete it."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.request import TextCodec

Prompt = str | Sequence[int]


def prompt_ids(prompt: Prompt, config: ModelConfig, tokenizer: TextCodec | None, max_length: int) -> list[int]:
    """What `token_ids` gives. Raises ValueError also for a prompt that leaves no room in `max_length`."""
    ids = token_ids(prompt, config, tokenizer)
    if len(ids) >= max_length:
        context = config.max_position_embeddings
        raise ValueError(
            f"the prompt's {len(ids)} tokens leave no room in max_length {max_length} (the model's context is {context}); "
            "shorten it" + (" or raise max_length" if max_length < context else "")
        )
    return ids


def token_ids(prompt: Prompt, config: ModelConfig, tokenizer: TextCodec | None) -> list[int]:
    """A prompt's token ids; a text begins with `bos_token_id`.

    Raises:
      ValueError: for an empty prompt, what is no id of the vocabulary, and text without a tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("the prompt is text, but the engine has no tokenizer; pass token ids, or a tokenizer")
        bos = config.bos_token_id
        ids = ([] if bos is None else [bos]) + tokenizer.encode(prompt)
    else:
        try:
            ids = [operator.index(i) for i in prompt]
        except TypeError:
            raise ValueError(
                f"the prompt {prompt!r:.100} is neither text nor a list of token ids, which are integers; pass a list of such "
                "prompts"
            ) from None
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    for i in ids:
        require_id(i, config)
    return ids


def require_id(i: int, config: ModelConfig) -> None:
    """Raises ValueError for what is no id of the vocabulary."""
    if not 0 <= i < config.vocab_size:
        raise ValueError(f"token id {i} is outside the vocabulary of {config.vocab_size}")
