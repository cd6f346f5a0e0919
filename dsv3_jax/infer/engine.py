"""The inference engine: prompts in, completions out.

Requests share a fixed number of slots and a pool of pages (continuous batching). `scheduler.py` decides on the host who runs;
`steps.py` holds the two programs that run on the device. The host is always a step behind: a step is dispatched before the
tokens of the one before are read, so that the device does not wait for Python.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import traverse_util
from jax.sharding import Mesh

from dsv3_jax.checkpoint.names import leaves
from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import require
from dsv3_jax.infer.cache import bytes_per_token, num_shards
from dsv3_jax.infer.request import Completion, Request, TextCodec, TokenLogprobs, Update
from dsv3_jax.infer.runner import SMALLEST_CHUNK, Runner, chunk_sizes
from dsv3_jax.infer.sampling import Sampler, SamplingParams
from dsv3_jax.infer.scheduler import Scheduler
from dsv3_jax.infer.sequence import Chunk
from dsv3_jax.infer.sequence import Sequence as Scheduled
from dsv3_jax.infer.steps import Drawn

LONGEST_BY_DEFAULT = 4096
GREEDY = SamplingParams()

Prompt = str | Sequence[int]


class _Dispatched(NamedTuple):
    """A program under way, and whose rows of it are awaited."""

    drawn: Drawn
    rows: list[tuple[int, Scheduled, int]]
    """Row, sequence, and the sequence's epoch at that time."""
    decoding: bool


class Engine:
    """Generates with a model, on one device or on a mesh."""

    def __init__(
        self,
        config: ModelConfig,
        variables: dict[str, Any],
        tokenizer: TextCodec | None = None,
        *,
        max_batch: int = 8,
        max_length: int | None = None,
        mesh: Mesh | None = None,
        drafts: int = 0,
        chunk: int = 512,
        page_size: int | None = None,
        cache_tokens: int | None = None,
        prefix_cache: bool = True,
        placement: Mapping[str, Any] | None = None,
    ) -> None:
        """Makes an engine.

        Args:
          config: the architecture.
          variables: its `params` and `router`, as training or `load_hf` gives them.
          tokenizer: for prompts and completions as text; None deals in token ids.
          max_batch: sequences decoded at a time; on a mesh rounded up to a multiple of data * fsdp * expert.
          max_length: longest prompt and completion together, in tokens; None is the model's context, at most 4096.
          mesh: the devices, with `context` 1; None is the first one.
          drafts: tokens that the first MTP depth drafts a step (speculative decoding); 0 decodes one token a step.
          chunk: most tokens of a prompt worked on at a time, a power of two.
          page_size: tokens in a page of the cache; None is 128 on a TPU and 64 elsewhere.
          cache_tokens: tokens the cache has room for; None is `max_batch` sequences of `max_length`.
          prefix_cache: prompts that begin alike share the pages of their beginning.
          placement: copies of experts in demand, {"moe_layers": [L, P], "mtp_0": [P]} as `place_experts` takes them.

        Raises:
          ValueError: if one of these is out of range, the model has no MTP depth to draft with, or an array is not that of
            `config`.
        """
        for name, size in {"max_length": max_length, "cache_tokens": cache_tokens}.items():
            _require_integer(name, size)
        require_sizes(max_batch=max_batch, drafts=drafts, chunk=chunk, page_size=page_size)
        context, platform = config.max_position_embeddings, jax.default_backend()
        self.max_length = min(LONGEST_BY_DEFAULT, context) if max_length is None else max_length
        if not 2 <= self.max_length <= context:
            raise ValueError(f"max_length is {max_length}; it must lie in 2..{context} (max_position_embeddings)")
        if drafts and not config.num_nextn_predict_layers:
            raise ValueError(f"drafts is {drafts}; the model has no MTP depth to draft with, use 0")
        if mesh is not None and mesh.shape["context"] > 1:
            raise ValueError(f"mesh.context is {mesh.shape['context']}; inference does not split sequences, use 1")
        _require_arrays_of(config, variables)

        self.config, self.tokenizer, self.drafts, self.chunk = config, tokenizer, drafts, chunk
        mesh = mesh if mesh is not None and mesh.size > 1 else None
        shards = num_shards(mesh)
        self.max_batch = -(-max_batch // shards) * shards
        self.page_size = (128 if platform == "tpu" else 64) if page_size is None else page_size
        # A step writes up to 2 n + 1 places from a sequence's last token on.
        pages_of_one = math.ceil((self.max_length + 2 * drafts + 1) / self.page_size)
        if cache_tokens is None:
            pages_per_shard = self.max_batch // shards * pages_of_one
        else:
            pages_per_shard = cache_tokens // shards // self.page_size
        if pages_per_shard < 1:
            raise ValueError(f"cache_tokens is {cache_tokens}; give each of {shards} parts a page of {self.page_size}, or more")
        self._new_scheduler = functools.partial(
            Scheduler,
            num_shards=shards,
            slots_per_shard=self.max_batch // shards,
            pages_per_shard=pages_per_shard,
            page_size=self.page_size,
            max_length=self.max_length,
            chunk=chunk,
            drafts=drafts,
            prefix_cache=prefix_cache,
        )
        self._scheduler = self._new_scheduler()
        self._shards, self._pages_per_shard = shards, pages_per_shard
        self._requests: dict[int, Request] = {}
        self._in_flight: list[_Dispatched] = []
        self._set_up_for: dict[int, tuple[Scheduled, int]] = {}

        self._runner = Runner(
            config,
            variables,
            slots=self.max_batch,
            drafts=drafts,
            pages_per_shard=pages_per_shard,
            page_size=self.page_size,
            pages_of_one=pages_of_one,
            mesh=mesh,
            placement=placement,
        )
        self.steps = self.step_tokens = 0
        """Decoding steps of single sequences so far, and the tokens they gave."""

    # What it is.

    @property
    def cache_tokens(self) -> int:
        """Tokens the cache has room for."""
        return self._shards * self._pages_per_shard * self.page_size

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, on all devices together (along `tensor` each holds a copy)."""
        return self.cache_tokens * bytes_per_token(self.config, self.drafts > 0)

    def describe(self) -> list[str]:
        """The cache and the programs, in words."""
        each = bytes_per_token(self.config, self.drafts > 0)
        pages = self._shards * self._pages_per_shard
        sizes = ", ".join(map(str, chunk_sizes(min(self.chunk, self.max_length - 1))))
        return [
            f"cache: {self.cache_bytes / 1e6:.1f} MB for {self.cache_tokens} tokens, {each} bytes each, in {pages} pages of "
            f"{self.page_size}; slots: {self.max_batch}; drafts a step: {self.drafts}",
            f"programs: one to decode; to prefill {sizes} tokens, two each: for a prompt's first chunk and for later ones; once "
            "more for log-probabilities",
        ]

    @property
    def counts(self) -> dict[str, int]:
        """Pages and requests of this moment, and what has happened so far."""
        scheduler = self._scheduler
        return {
            "free_pages": scheduler.free_pages,
            "cached_pages": scheduler.cached_pages,
            "preemptions": scheduler.preemptions,
            "steps": self.steps,
            "step_tokens": self.step_tokens,
        }

    # Requests.

    def generate(
        self, prompts: Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] = GREEDY
    ) -> Iterator[Completion]:
        """Completes every prompt; completions come in the order of the prompts.

        Args:
          prompts: texts, or lists of token ids.
          params: how completions are drawn: for all (the i-th prompt then uses seed + i), or one for each.

        Raises:
          ValueError: before anything is generated, for an empty prompt, one that leaves no room in the context or the cache,
            what is no id of the vocabulary, and another number of params than prompts.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one string; pass a list of prompts")
        prompts = list(prompts)
        if isinstance(params, SamplingParams):
            params = [dataclasses.replace(params, seed=(params.seed + i) % 2**32) for i in range(len(prompts))]
        if len(params) != len(prompts):
            raise ValueError(f"there are {len(params)} params for {len(prompts)} prompts; give one each, or one for all")
        requests = [self._request(*each) for each in zip(prompts, params, strict=True)]
        for request in requests:
            self._scheduler.check(request.sequence)
        return self._completions(requests)

    def _completions(self, requests: list[Request]) -> Iterator[Completion]:
        for request in requests:
            self._submit(request)
        try:
            for request in requests:
                while request.finish_reason is None:
                    self.step()
                yield request.completion
        finally:
            for request in requests:
                self.cancel(request)

    def stream(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[int]:
        """The tokens of one completion as they come. Raises as `generate`."""
        request = self._request(prompt, params)
        self._scheduler.check(request.sequence)
        return (token for update in self._updates(request) for token in update.tokens)

    def stream_text(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[Update]:
        """What each step brings for one completion, text included. Raises as `generate`."""
        request = self._request(prompt, params)
        self._scheduler.check(request.sequence)
        return self._updates(request)

    def _updates(self, request: Request) -> Iterator[Update]:
        self._submit(request)
        told = request.progress
        try:
            # Not from what `step` gives: whoever else steps the engine may have had what is for this one.
            while request.finish_reason is None or request.progress != told:
                if request.progress == told:
                    self.step()
                else:
                    update, told = request.since(told), request.progress
                    yield update
        finally:
            self.cancel(request)

    def submit(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Request:
        """Takes a request on; `step` works on it. Raises as `generate`."""
        request = self._request(prompt, params)
        self._submit(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request and frees what it holds; one that has ended already stays as it is."""
        request.cancel()
        self._scheduler.finish(request.sequence)
        self._requests.pop(id(request.sequence), None)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return self._scheduler.idle and not self._in_flight

    def _submit(self, request: Request) -> None:
        self._scheduler.submit(request.sequence)
        self._requests[id(request.sequence)] = request

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self._encode(prompt)
        for i in (*params.logit_bias, *params.stop_token_ids):
            self._check_id(i)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop is {list(params.stop)}, but the engine has no tokenizer; use stop_token_ids")
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(self.config.eos_token_ids))
        return Request(ids, params, min(params.max_tokens, self.max_length - len(ids)), ends, self.tokenizer)

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
            self._check_id(i)
        return ids

    def _check_id(self, i: int) -> None:
        if not 0 <= i < self.config.vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary of {self.config.vocab_size}")

    # Steps.

    def step(self) -> list[Update]:
        """Dispatches the next step of everything, and gives what the one before has brought.

        One that is broken off, by Ctrl-C or for want of memory say, ends all requests as "cancelled" and empties the cache: how
        far it came cannot be known. What is submitted later finds the engine as new.
        """
        try:
            return self._step()
        except BaseException:
            self._start_over()
            raise

    def _start_over(self) -> None:
        for request in self._requests.values():
            request.cancel()
            request.sequence.state = "done"
        preemptions = self._scheduler.preemptions
        self._scheduler = self._new_scheduler()
        self._scheduler.preemptions = preemptions
        self._requests, self._in_flight, self._set_up_for = {}, [], {}
        self._runner.clear()

    def _step(self) -> list[Update]:
        step = self._scheduler.schedule()
        before, self._in_flight = self._in_flight, []
        if step.tables_changed:
            self._runner.forget_tables()
        if step.chunks:
            for chunk in step.chunks:
                self._set_up(chunk)
            drawn = self._runner.prefill(step.chunks, self._reports(chunk.sequence for chunk in step.chunks))
            last = [chunk.sequence for chunk in step.chunks if chunk.following is None]
            self._in_flight.append(_Dispatched(drawn, [(s.place[0], s, s.epoch) for s in last], False))
        if step.decoding:
            drawn = self._runner.decode(step.decoding, self._reports(step.decoding))
            self._in_flight.append(_Dispatched(drawn, [(s.place[1], s, s.epoch) for s in step.decoding], True))
        return [update for dispatched in before for update in self._collect(dispatched)]

    def _collect(self, dispatched: _Dispatched) -> Iterator[Update]:
        """What a program has brought, for those who still wait for it."""
        if not dispatched.rows:
            return
        token_BT, count_B, report = jax.device_get(dispatched.drawn)
        for row, sequence, epoch in dispatched.rows:
            tokens = token_BT[row, : count_B[row]].tolist()
            tokens = tokens[: sequence.max_tokens - len(sequence.tokens)]
            if not self._scheduler.accept(sequence, epoch, tokens):
                continue
            if dispatched.decoding:
                self.steps += 1
                self.step_tokens += len(tokens)
            request = self._requests[id(sequence)]
            asked = request.params.logprobs
            told = None if asked is None else [_told(report, row, i, token, asked) for i, token in enumerate(tokens)]
            update = request.take(tokens, told)
            if request.finish_reason is not None:
                self._scheduler.finish(sequence)
                del self._requests[id(sequence)]
            yield update

    def _set_up(self, chunk: Chunk) -> None:
        """Tells the device how a sequence that has just got its slot is sampled."""
        sequence = chunk.sequence
        slot, now = sequence.place[1], (sequence, chunk.epoch)
        if self._set_up_for.get(slot) == now:
            return
        self._set_up_for[slot] = now
        params = self._requests[id(sequence)].params
        self._runner.set_up(slot, Sampler.row(params, sequence.text(0, sequence.length), self.config.vocab_size))

    def _reports(self, sequences: Iterable[Scheduled]) -> bool:
        return any(self._requests[id(sequence)].params.logprobs is not None for sequence in sequences)


def require_sizes(*, max_batch: int | None, drafts: int | None, chunk: int, page_size: int | None) -> None:
    """Raises ValueError for what is wrong with any model. None is what the engine, or the command line, chooses."""
    given = {"max_batch": max_batch, "drafts": drafts, "chunk": chunk, "page_size": page_size}
    for name, size in given.items():
        _require_integer(name, size)
    require(max_batch is None or max_batch >= 1, f"max_batch is {max_batch}; it must be at least 1")
    require(drafts is None or drafts >= 0, f"drafts is {drafts}; it cannot be negative, use 0")
    is_power = chunk >= SMALLEST_CHUNK and not chunk & (chunk - 1)
    require(is_power, f"chunk is {chunk}; it must be a power of two from {SMALLEST_CHUNK}")
    require(page_size is None or page_size >= 1, f"page_size is {page_size}; it must be at least 1")


def _require_integer(name: str, size: int | None) -> None:
    is_integer = isinstance(size, int) and not isinstance(size, bool)
    require(size is None or is_integer, f"{name} is {size!r}; use an integer")


def _told(report: Any, row: int, i: int, token: int, num: int) -> TokenLogprobs:
    top = zip(report.top_id_BTR[row, i, :num].tolist(), report.top_BTR[row, i, :num].tolist(), strict=True)
    return TokenLogprobs(token, float(report.chosen_BT[row, i]), list(top))


def _require_arrays_of(config: ModelConfig, variables: dict[str, Any]) -> None:
    arrays = traverse_util.flatten_dict(variables)
    for leaf in leaves(config):
        shape = arrays[leaf.path].shape if leaf.path in arrays else None
        if shape != leaf.shape:
            found = "missing" if shape is None else list(shape)
            name = "/".join(leaf.path)
            raise ValueError(f"{name} is {found}, not {list(leaf.shape)}; give the config and the variables of one model")
