"""The inference engine: takes prompts and returns completions, generated in batches.

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
    """A dispatched program whose output is not read yet, and the sequences that wait for its rows."""

    drawn: Drawn
    rows: list[tuple[int, Scheduled, int]]
    """(row of the output, sequence, the sequence's epoch at the dispatch)."""
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
        """Lay the weights out on the devices and allocate the cache. Programs compile at their first use, or in `warm_up`.

        Args:
          config: the architecture.
          variables: `params` and `router` of the model, from training or `load_hf`.
          tokenizer: for prompts and completions as text; None allows token ids only.
          max_batch: sequences decoded at a time; a mesh rounds it up to a multiple of data * fsdp * expert.
          max_length: longest prompt and completion together; None is min(4096, context), or less if `cache_tokens` is.
          mesh: the devices, with `context` 1; None is the first device.
          drafts: tokens that the first MTP depth drafts in a step (speculative decoding); 0 decodes one token a step.
          chunk: most tokens of a prompt prefilled in one step, a power of two.
          page_size: tokens in a page of the cache; None is 128 on a TPU and 64 elsewhere.
          cache_tokens: capacity of the cache, in tokens; None is `max_batch` sequences of `max_length`.
          prefix_cache: let prompts that begin with the same tokens share cached pages.
          placement: expert in each slot, if experts are replicated: {"moe_layers": [L, P], "mtp_0": [P]} (`place_experts`).
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
        """Hook called with the name of each call of the engine, and its request if any; `multihost.leader` replaces it."""
        self.digest = 0
        """CRC-32 of all tokens read from the device so far, to compare processes."""
        self.steps = self.step_tokens = 0
        """Decode steps summed over sequences (one of n sequences counts n), and the tokens that they yielded."""

    # Properties and counts.

    @property
    def cache_bytes(self) -> int:
        """Bytes of the latent cache on all devices; its copies along the mesh axis `tensor` count once."""
        return self.sizes.cache_tokens * bytes_per_token(self.config, self.sizes.drafts > 0)

    def describe(self) -> list[str]:
        """Return two lines of text: sizes of the cache, and programs that will be compiled."""
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
        """Free and cached pages now; preemptions, decode steps and their tokens since the engine was created."""
        scheduler = self._scheduler
        return {
            "free_pages": scheduler.free_pages,
            "cached_pages": scheduler.cached_pages,
            "preemptions": scheduler.preemptions,
            "steps": self.steps,
            "step_tokens": self.step_tokens,
        }

    def warm_up(self) -> None:
        """Compile all programs but those that report log-probabilities. Call it while no request is in the engine."""
        check(self.idle, "warm_up is called while requests are active, whose sampling it would change; call it before them")
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
        """Return an iterator of the completions, in the order of the prompts; closing it cancels the unfinished ones.

        Args:
          prompts: texts, or lists of token ids.
          params: one object for all prompts, of which the i-th then uses seed + i; or one for each prompt.

        Raises:
          ValueError: from the call itself, for an empty prompt, one that leaves no room in the context or the cache, an id
            outside the vocabulary, text or stop texts without a tokenizer, or a different number of params than prompts.
        """
        check(not isinstance(prompts, str), "prompts is one string; pass a list of prompts")
        prompts = list(prompts)
        if isinstance(params, SamplingParams):
            params = [dataclasses.replace(params, seed=(params.seed + i) % 2**32) for i in range(len(prompts))]
        same = len(params) == len(prompts)
        check(same, f"there are {len(params)} params for {len(prompts)} prompts; give one each, or one for all")
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
        """Return an iterator of one completion's tokens as they are produced; closing it cancels. Raises as `generate`."""
        return (token for update in self.stream_text(prompt, params) for token in update.tokens)

    def stream_text(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Iterator[Update]:
        """Return an iterator of one completion's tokens and text, step by step; closing it cancels. Raises as `generate`."""
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
        """Queue a prompt; return its request, which further calls of `step` advance. Raises ValueError as `generate`."""
        request = self._request(prompt, params)
        self._submit(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request as "cancelled" and release its slot and pages; one that has ended stays unchanged."""
        if request.finish_reason is None:
            self.tell("cancel", request)
        request.cancel()
        self._scheduler.finish(request.sequence)
        self._requests.pop(request.sequence, None)

    @property
    def idle(self) -> bool:
        """True if no request waits or has a slot, and the outputs of all programs have been read."""
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
        """Dispatch the next step of all requests; wait for the previous step and return its updates, one a request.

        Any exception, such as Ctrl-C or lack of memory, ends all requests as "cancelled", empties the cache, whose state is
        unknown, and is raised again. Later requests find the engine as new; but with several processes, which may still
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
        """Wait for a program's output; yield an update for each request that kept its slot. Requests that end are removed."""
        if not dispatched.rows:
            return
        token_BT, count_B, report = jax.device_get(dispatched.drawn)
        self.digest = zlib.crc32(token_BT.tobytes(), zlib.crc32(count_B.tobytes(), self.digest))
        for row, sequence, epoch in dispatched.rows:
            if not count_B[row]:
                if epoch == sequence.epoch:
                    yield self._fail(sequence)
                continue
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

    def _fail(self, sequence: Scheduled) -> Update:
        """End the request of a sequence whose logits are not finite."""
        self._scheduler.finish(sequence)
        return self._requests.pop(sequence).fail(
            f"the model's logits after {sequence.length} tokens are not finite (NaN or infinity); "
            "check the weights, or compute in float32"
        )

    def _reports(self, sequences: Iterable[Scheduled]) -> bool:
        return any(self._requests[sequence].params.logprobs is not None for sequence in sequences)


def _refuse(*_: Any) -> None:
    raise RuntimeError("an earlier call was interrupted, and other processes may wait in it; start all of them again")


def _logprobs(report: Report, row: int, tokens: list[int], num: int) -> list[TokenLogprobs]:
    """Return for each of one row's `tokens` its log-probability and the `num` most likely tokens at its position."""
    chosen, ids, top = (values[row].tolist() for values in (report.chosen_BT, report.top_id_BTR, report.top_BTR))
    best = [list(zip(*pair, strict=True))[:num] for pair in zip(ids, top, strict=True)]
    return [TokenLogprobs(token, chosen[i], best[i]) for i, token in enumerate(tokens)]


def _check_arrays_of(config: ModelConfig, variables: dict[str, Any]) -> None:
    """Raise ValueError for the first array that is missing or has another shape than `config` asks for."""
    arrays = traverse_util.flatten_dict(variables)
    for path, expected in traverse_util.flatten_dict(abstract_variables(config)).items():
        shape = arrays[path].shape if path in arrays else None
        found = f"{'/'.join(path)} is {'missing' if shape is None else list(shape)}"
        check(shape == expected.shape, f"{found}, not {list(expected.shape)}; give the config and the variables of one model")
