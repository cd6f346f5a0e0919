"""The inference engine: prompts in, completions out.

Prompts are padded to a power of two and worked on in batches; each padded shape compiles once and then serves every
step.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dsv3_jax.checkpoint.names import leaves
from dsv3_jax.config import ModelConfig
from dsv3_jax.infer.sampling import SamplingParams
from dsv3_jax.infer.steps import Draw, decode, prefill
from dsv3_jax.kernels.block_scaled import in_dtype
from dsv3_jax.model import DeepSeekV3, unstack, with_absorbed_weights

SMALLEST_BUCKET = 32
# Places of a cache come in multiples of this: a TPU then reads it as it lies (kernels/latent_attention_tpu.py).
PLACES = 128
LONGEST_BY_DEFAULT = 4096
GREEDY = SamplingParams()

Prompt = str | Sequence[int]


class TextCodec(Protocol):
    """What the engine asks of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Completion:
    """One finished completion."""

    tokens: list[int]
    """The new tokens, without the one that ended it."""
    text: str | None
    """The same as text; None without a tokenizer."""
    finish_reason: Literal["stop", "length"]
    """"stop" at an end-of-text token, "length" at max_tokens or at the end of the context."""


class _Sequence:
    """A prompt and what has come of it."""

    def __init__(self, prompt: list[int], max_tokens: int, ends: set[int]) -> None:
        self.prompt, self.max_tokens, self.ends = prompt, max_tokens, ends
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None

    def accept(self, token: int) -> bool:
        """Takes the next token; False if it was not for the sequence, which has ended."""
        if self.finish_reason is None and token in self.ends:
            self.finish_reason = "stop"
        if self.finish_reason is not None:
            return False
        self.tokens.append(token)
        if len(self.tokens) == self.max_tokens:
            self.finish_reason = "length"
        return True


class Engine:
    """Generates with a model on one device."""

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, Any],
        tokenizer: TextCodec | None = None,
        *,
        max_batch: int = 8,
        max_length: int | None = None,
    ) -> None:
        """Makes an engine.

        Args:
          config: the architecture.
          variables: its `params` and `router`, as training or `load_hf` gives them.
          tokenizer: for prompts and completions as text; None deals in token ids.
          max_batch: prompts worked on at a time.
          max_length: longest prompt and completion together, in tokens; None is the model's context, at most 4096.

        Raises:
          ValueError: if `max_length` exceeds the model's context, `max_batch` is below 1, or an array is not that of `config`.
        """
        context = config.max_position_embeddings
        self.max_length = min(LONGEST_BY_DEFAULT, context) if max_length is None else max_length
        if not 2 <= self.max_length <= context:
            raise ValueError(f"max_length is {max_length}; it must lie in 2..{context} (max_position_embeddings)")
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1")
        _require_arrays_of(config, variables)
        self.max_batch = max_batch
        self.config, self.tokenizer = config, tokenizer
        self._model = DeepSeekV3(config, unrolled=True)
        # Stored in the computation dtype, so that no step converts weights again.
        params = in_dtype(variables["params"], config.dtype)
        variables = unstack({"params": params, "router": variables["router"]})
        self._variables = with_absorbed_weights(variables, config)

    def generate(self, prompts: Iterable[Prompt], params: SamplingParams = GREEDY) -> Iterator[Completion]:
        """Completes every prompt, in order; batches of `max_batch` run together.

        Args:
          prompts: texts, or lists of token ids.
          params: how completions are drawn; the i-th prompt uses seed + i.

        Raises:
          ValueError: before anything is generated, for an empty prompt, one that leaves no room in the context, or what is
            no id of the vocabulary.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one string; pass a list of prompts")
        sequences = [self._sequence(prompt, params) for prompt in prompts]
        return self._completions(sequences, params)

    def stream(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[int]:
        """The tokens of one completion as they come. Raises as `generate`."""
        sequence = self._sequence(prompt, params)
        return (token for (token,) in self._run([sequence], params, 0) if token is not None)

    def _completions(self, sequences: list[_Sequence], params: SamplingParams) -> Iterator[Completion]:
        for start in range(0, len(sequences), self.max_batch):
            batch = sequences[start : start + self.max_batch]
            for _ in self._run(batch, params, start):
                pass
            for done in batch:
                text = None if self.tokenizer is None else self.tokenizer.decode(done.tokens)
                assert done.finish_reason is not None
                yield Completion(done.tokens, text, done.finish_reason)

    def _sequence(self, prompt: Prompt, params: SamplingParams) -> _Sequence:
        ids = self._encode(prompt)
        return _Sequence(ids, min(params.max_tokens, self.max_length - len(ids)), set(self.config.eos_token_ids))

    def _encode(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids, checked; a text begins with `bos_token_id`."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the prompt is text, but the engine has no tokenizer; pass token ids, or a tokenizer")
            bos = self.config.bos_token_id
            ids = ([] if bos is None else [bos]) + self.tokenizer.encode(prompt)
        else:
            try:
                ids = [operator.index(i) for i in prompt]
            except TypeError:
                raise ValueError(
                    f"the prompt {prompt!r:.100} is neither text nor a list of token ids, which are integers; pass a list of "
                    "such prompts"
                ) from None
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(ids) >= self.max_length:
            context = self.config.max_position_embeddings
            raise ValueError(
                f"the prompt's {len(ids)} tokens leave no room in max_length {self.max_length} (the model's context is "
                f"{context}); shorten it" + (" or raise max_length" if self.max_length < context else "")
            )
        for i in ids:
            if not 0 <= i < self.config.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.config.vocab_size}")
        return ids

    def _run(self, batch: list[_Sequence], params: SamplingParams, offset: int) -> Iterator[list[int | None]]:
        """Drives a batch to its end; yields each step's new token of every sequence, None for those that have ended."""
        rows = _bucket(len(batch), 1, self.max_batch)
        longest = max(len(sequence.prompt) for sequence in batch)
        places = max(len(sequence.prompt) + sequence.max_tokens for sequence in batch)
        tokens_BT = np.zeros((rows, _bucket(longest, SMALLEST_BUCKET, self.max_length)), np.int32)
        length_B = np.ones(rows, np.int32)
        for i, sequence in enumerate(batch):
            tokens_BT[i, : len(sequence.prompt)] = sequence.prompt
            length_B[i] = len(sequence.prompt)
        seed_B = (params.seed + offset + np.arange(rows)).astype(np.uint32)
        draw = Draw(jnp.asarray(seed_B), jnp.float32(params.temperature), jnp.float32(params.top_p))

        capacity = _bucket(places, PLACES, -(-self.max_length // PLACES) * PLACES)
        token_B, cache = prefill(self._model, self._variables, tokens_BT, length_B, draw, capacity=capacity)
        for remaining in reversed(range(max(sequence.max_tokens for sequence in batch))):
            # The next step starts before this one's tokens are read, so that the device does not wait for Python.
            ahead = decode(self._model, self._variables, token_B, cache, draw) if remaining else None
            accepted = zip(batch, np.asarray(token_B), strict=False)
            yield [int(token) if sequence.accept(int(token)) else None for sequence, token in accepted]
            if ahead is None or all(sequence.finish_reason is not None for sequence in batch):
                return
            token_B, cache = ahead


def _require_arrays_of(config: ModelConfig, variables: dict[str, Any]) -> None:
    arrays = traverse_util.flatten_dict(variables)
    for leaf in leaves(config):
        shape = arrays[leaf.path].shape if leaf.path in arrays else None
        if shape != leaf.shape:
            found = "missing" if shape is None else list(shape)
            name = "/".join(leaf.path)
            raise ValueError(f"{name} is {found}, not {list(leaf.shape)}; give the config and the variables of one model")


def _bucket(size: int, smallest: int, largest: int) -> int:
    """`size` rounded up to a power of two within the bounds: few shapes, few compilations."""
    return min(max(smallest, 1 << (size - 1).bit_length()), largest)
