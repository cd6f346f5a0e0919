"""The inference engine: prompts in, completions out.

Requests share a fixed number of slots and a pool of pages (continuous batching). The scheduler plans each step on the host;
the runner holds the programs of the device. The host is always one step behind: it dispatches a step before it reads the
tokens of the one before, so that the device does not wait for Python.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import traverse_util
from jax.sharding import Mesh

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.infer.cache import EngineConfig, bytes_per_token
from dsv3_jax.infer.request import Completion, Prompt, Request, TextCodec, TokenLogprobs, Update, check_id, prompt_ids
from dsv3_jax.infer.request import Sequence as Scheduled
from dsv3_jax.infer.runner import Drawn, Report, Runner
from dsv3_jax.infer.sampling import SamplingParams
from dsv3_jax.infer.scheduler import Scheduler
from dsv3_jax.model import abstract_variables

GREEDY = SamplingParams()


class _Dispatched(NamedTuple):
    """A program in flight and the rows of its output that sequences wait for."""

    drawn: Drawn
    rows: list[tuple[int, Scheduled, int]]
    """Row, sequence, and the sequence's epoch at the dispatch."""
    decoding: bool


class Engine:
    """Text generation with a model, on one device or on a mesh."""

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
        donate: bool = False,
    ) -> None:
        """Create an engine.

        Args:
          config: the architecture.
          variables: `params` and `router` of the model, from training or `load_hf`.
          tokenizer: for prompts and completions as text; None allows token ids only.
          max_batch: sequences decoded at a time; a mesh rounds it up to a multiple of data * fsdp * expert.
          max_length: longest prompt and completion together, in tokens; None is the model's context, at most 4096.
          mesh: the devices, with `context` 1; None is the first device.
          drafts: tokens that the first MTP depth drafts in a step (speculative decoding); 0 decodes one token a step.
          chunk: most tokens of a prompt prefilled in one step, a power of two.
          page_size: tokens in a page of the cache; None is 128 on a TPU and 64 elsewhere.
          cache_tokens: capacity of the cache, in tokens; None is `max_batch` sequences of `max_length`.
          prefix_cache: share the pages of equal beginnings between prompts.
          placement: slots of replicated experts, {"moe_layers": [L, P], "mtp_0": [P]}, see `place_experts`.
          donate: delete the arrays of `variables` once they are laid out for decoding. Otherwise both layouts are held for as
            long as the caller keeps `variables`.

        Raises:
          ValueError: for a size out of range, drafts without an MTP depth, or an array that does not fit `config`.
        """
        self.sizes = EngineConfig.of(config, mesh, max_batch, max_length, drafts, chunk, page_size, cache_tokens)
        _check_arrays_of(config, variables)
        self.config, self.tokenizer = config, tokenizer
        self._new_scheduler = functools.partial(Scheduler, self.sizes, prefix_cache=prefix_cache)
        self._scheduler = self._new_scheduler()
        self._requests: dict[Scheduled, Request] = {}
        self._in_flight: list[_Dispatched] = []
        mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._runner = Runner(config, variables, self.sizes, mesh, placement, donate)
        self.tell: Callable[..., None] = lambda call, request=None: None
        """Called with the name of each call of the engine, which `multihost.py` sends to the other processes."""
        self.digest = 0
        """Checksum of all tokens so far, equal on all processes."""
        self.steps = self.step_tokens = 0
        """Decode steps, counted for each sequence, and their tokens."""

    # Properties and counts.

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, summed over all devices but the copies along `tensor`."""
        return self.sizes.cache_tokens * bytes_per_token(self.config, self.sizes.drafts > 0)

    def describe(self) -> list[str]:
        """Return lines about the cache and the programs."""
        sizes = self.sizes
        chunks = ", ".join(map(str, sizes.chunk_sizes))
        return [
            f"cache: {self.cache_bytes / 1e6:.1f} MB for {sizes.cache_tokens} tokens, "
            f"{self.cache_bytes // sizes.cache_tokens} bytes each, in {sizes.pages} pages of {sizes.page_size}; "
            f"slots: {sizes.slots}; drafts a step: {sizes.drafts}",
            f"programs: one to decode; to prefill {chunks} tokens, two each: for a prompt's first chunk and for later ones; "
            "as many again with log-probabilities",
        ]

    @property
    def counts(self) -> dict[str, int]:
        """Current pages, and totals of preemptions and decode steps."""
        scheduler = self._scheduler
        return {
            "free_pages": scheduler.free_pages,
            "cached_pages": scheduler.cached_pages,
            "preemptions": scheduler.preemptions,
            "steps": self.steps,
            "step_tokens": self.step_tokens,
        }

    def warm_up(self) -> None:
        """Compile every program but those that report log-probabilities, so that no request waits for it."""
        try:
            self.tell("warm_up")
            self._runner.warm_up()
        except BaseException:
            self.tell("broken")
            raise

    # Requests.

    def generate(
        self, prompts: Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] = GREEDY
    ) -> Iterator[Completion]:
        """Complete every prompt; yield the completions in the order of the prompts.

        Args:
          prompts: texts, or lists of token ids.
          params: one for all prompts, of which the i-th then uses seed + i, or one for each.

        Raises:
          ValueError: before anything is generated, for an empty prompt, one that leaves no room in the context or the cache,
            an id outside the vocabulary, or a different number of params than prompts.
        """
        check(not isinstance(prompts, str), "prompts is one string; pass a list of prompts")
        prompts = list(prompts)
        if isinstance(params, SamplingParams):
            params = [dataclasses.replace(params, seed=(params.seed + i) % 2**32) for i in range(len(prompts))]
        numbers = f"{len(params)} params for {len(prompts)} prompts"
        check(len(params) == len(prompts), f"there are {numbers}; give one each, or one for all")
        return self._completions([self._request(*each) for each in zip(prompts, params, strict=True)])

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
        """Yield the tokens of one completion as they are produced. Raises as `generate`."""
        return (token for update in self.stream_text(prompt, params) for token in update.tokens)

    def stream_text(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[Update]:
        """Yield the tokens and text of each step for one completion. Raises as `generate`."""
        return self._updates(self._request(prompt, params))

    def _updates(self, request: Request) -> Iterator[Update]:
        self._submit(request)
        num_yielded = 0
        try:
            # From the request and not from `step`: another caller's step may have brought its tokens.
            while request.finish_reason is None or num_yielded < len(request.pieces):
                if num_yielded == len(request.pieces):
                    self.step()
                else:
                    num_yielded += 1
                    yield Update(request, *request.pieces[num_yielded - 1])
        finally:
            self.cancel(request)

    def submit(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Request:
        """Queue a request, which `step` works on. Raises as `generate`."""
        request = self._request(prompt, params)
        self._submit(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request and release its slot and pages; one that has ended is left unchanged."""
        if request.finish_reason is None:
            self.tell("cancel", request)
        request.cancel()
        self._scheduler.finish(request.sequence)
        self._requests.pop(request.sequence, None)

    @property
    def idle(self) -> bool:
        """True if no request is left and no program in flight."""
        return self._scheduler.idle and not self._in_flight

    def _submit(self, request: Request) -> None:
        self._scheduler.submit(request.sequence)
        self._requests[request.sequence] = request
        self.tell("submit", request)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = prompt_ids(prompt, self.config, self.tokenizer, self.sizes.max_length)
        for i in (*params.logit_bias, *params.stop_token_ids):
            check_id(i, self.config)
        has_codec = self.tokenizer is not None
        check(has_codec or not params.stop, f"stop is {list(params.stop)}, but the engine has no tokenizer; use stop_token_ids")
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(self.config.eos_token_ids))
        request = Request(ids, params, min(params.max_tokens, self.sizes.max_length - len(ids)), ends, self.tokenizer)
        self._scheduler.check(request.sequence)
        return request

    # Steps.

    def step(self) -> list[Update]:
        """Dispatch the next step of all requests, and return the updates of the one before.

        If it is interrupted, by Ctrl-C or lack of memory for example, all requests end as "cancelled" and the cache is
        emptied, since its state is unknown. Later requests find the engine as new; with several processes, which may still
        wait inside the step, every later call raises RuntimeError.
        """
        try:
            self.tell("step")
            return self._step()
        except BaseException:
            self.tell("broken")
            self._start_over()
            raise

    def _start_over(self) -> None:
        for request in self._requests.values():
            request.cancel()
            request.sequence.state = "done"
        preemptions = self._scheduler.preemptions
        self._scheduler = self._new_scheduler()
        self._scheduler.preemptions = preemptions
        self._requests, self._in_flight = {}, []
        if jax.process_count() == 1:
            self._runner.clear()
        else:  # The other processes would have to clear theirs in the same program order, which is unknown.
            self.tell = _refuse

    def _step(self) -> list[Update]:
        step = self._scheduler.schedule()
        before, self._in_flight = self._in_flight, []
        if step.tables_changed:
            self._runner.forget_tables()
        if step.chunks:
            for sequence, start, *_ in step.chunks:
                if start == sequence.reused:  # The first chunk since the sequence got its slot.
                    self._runner.set_sampler(sequence.place[1], self._requests[sequence].params, sequence.text())
            drawn = self._runner.prefill(step.chunks, self._reports(chunk.sequence for chunk in step.chunks))
            last = [chunk.sequence for chunk in step.chunks if chunk.following is None]
            self._in_flight.append(_Dispatched(drawn, [(s.place[0], s, s.epoch) for s in last], False))
        if step.decoding:
            drawn = self._runner.decode(step.decoding, self._reports(step.decoding))
            self._in_flight.append(_Dispatched(drawn, [(s.place[1], s, s.epoch) for s in step.decoding], True))
        return [update for dispatched in before for update in self._collect(dispatched)]

    def _collect(self, dispatched: _Dispatched) -> Iterator[Update]:
        """Read the output of a program; yield an update for each request that still waits for it."""
        if not dispatched.rows:
            return
        token_BT, count_B, report = jax.device_get(dispatched.drawn)
        self.digest = zlib.crc32(token_BT.tobytes(), zlib.crc32(count_B.tobytes(), self.digest))
        for row, sequence, epoch in dispatched.rows:
            tokens = token_BT[row, : count_B[row]].tolist()
            tokens = tokens[: sequence.max_tokens - len(sequence.tokens)]
            if not self._scheduler.accept(sequence, epoch, tokens):
                continue
            if dispatched.decoding:
                self.steps += 1
                self.step_tokens += len(tokens)
            request = self._requests[sequence]
            num = request.params.logprobs
            update = request.take(tokens, None if num is None else _logprobs(report, row, tokens, num))
            if request.finish_reason is not None:
                self._scheduler.finish(sequence)
                del self._requests[sequence]
            yield update

    def _reports(self, sequences: Iterable[Scheduled]) -> bool:
        return any(self._requests[sequence].params.logprobs is not None for sequence in sequences)


def _refuse(*_: Any) -> None:
    raise RuntimeError("a step was broken off, which the other processes may wait in for ever; start all of them again")


def _logprobs(report: Report, row: int, tokens: list[int], num: int) -> list[TokenLogprobs]:
    """Return the log-probabilities of one row's tokens, with the `num` most likely ones at each position."""
    chosen, ids, top = (values[row].tolist() for values in (report.chosen_BT, report.top_id_BTR, report.top_BTR))
    best = [list(zip(*pair, strict=True))[:num] for pair in zip(ids, top, strict=True)]
    return [TokenLogprobs(token, chosen[i], best[i]) for i, token in enumerate(tokens)]


def _check_arrays_of(config: ModelConfig, variables: dict[str, Any]) -> None:
    """Raise ValueError for the first array that is missing or has another shape than `config` asks for."""
    arrays = traverse_util.flatten_dict(variables)
    for path, expected in traverse_util.flatten_dict(abstract_variables(config)).items():
        shape = arrays[path].shape if path in arrays else None
        found = f"{'/'.join(path)} is {'missing' if shape is None else list(shape)}, not {list(expected.shape)}"
        check(shape == expected.shape, f"{found}; give the config and the variables of one model")
