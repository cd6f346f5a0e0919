"""The inference engine: prompts in, completions out.

Requests share a fixed number of slots and a pool of pages (continuous batching). `scheduler.py` decides on the host who runs;
`steps.py` holds the two programs that run on the device. The host is always a step behind: a step is dispatched before the
tokens of the one before are read, so that the device does not wait for Python.
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
from dsv3_jax.infer.cache import EngineConfig, bytes_per_token
from dsv3_jax.infer.request import Chunk, Completion, Prompt, Request, TextCodec, TokenLogprobs, Update, check_id, prompt_ids
from dsv3_jax.infer.request import Sequence as Scheduled
from dsv3_jax.infer.runner import Drawn, Runner
from dsv3_jax.infer.sampling import Sampler, SamplingParams
from dsv3_jax.infer.scheduler import Scheduler
from dsv3_jax.model import abstract_variables

GREEDY = SamplingParams()


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
        donate: bool = False,
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
          donate: the arrays of `variables` are the engine's from now on, and deleted as it lays them out for decoding. Else
            both layouts are held for as long as the caller holds his.

        Raises:
          ValueError: if one of these is out of range, the model has no MTP depth to draft with, or an array is not that of
            `config`.
        """
        self.sizes = EngineConfig.of(
            config,
            mesh,
            max_batch=max_batch,
            max_length=max_length,
            drafts=drafts,
            chunk=chunk,
            page_size=page_size,
            cache_tokens=cache_tokens,
        )
        _check_arrays_of(config, variables)
        self.config, self.tokenizer = config, tokenizer
        self._new_scheduler = functools.partial(Scheduler, self.sizes, prefix_cache=prefix_cache)
        self._scheduler = self._new_scheduler()
        self._requests: dict[int, Request] = {}
        self._in_flight: list[_Dispatched] = []
        self._set_up_for: dict[int, tuple[Scheduled, int]] = {}
        self._runner = Runner(
            config, variables, self.sizes, mesh if mesh is not None and mesh.size > 1 else None, placement, donate
        )
        self.tell: Callable[..., None] = lambda call, request=None: None
        """Hears what is asked of the engine: for the engines of other processes (`lockstep.py`)."""
        self.digest = 0
        """Of what the programs have brought so far; processes in lockstep have the same."""
        self.steps = self.step_tokens = 0
        """Decoding steps of single sequences so far, and the tokens they gave."""

    # What it is.

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, on all devices together (along `tensor` each holds a copy)."""
        return self.sizes.cache_tokens * bytes_per_token(self.config, self.sizes.drafts > 0)

    def describe(self) -> list[str]:
        """The cache and the programs, in words."""
        sizes = self.sizes
        each = bytes_per_token(self.config, sizes.drafts > 0)
        chunks = ", ".join(map(str, sizes.chunk_sizes))
        return [
            f"cache: {self.cache_bytes / 1e6:.1f} MB for {sizes.cache_tokens} tokens, {each} bytes each, in {sizes.pages} "
            f"pages of {sizes.page_size}; slots: {sizes.slots}; drafts a step: {sizes.drafts}",
            f"programs: one to decode; to prefill {chunks} tokens, two each: for a prompt's first chunk and for later ones; "
            "as many again with log-probabilities",
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

    def warm_up(self) -> None:
        """Compiles every program but those that report log-probabilities, so that no request waits for it."""
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
        if request.finish_reason is None:
            self.tell("cancel", request)
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
        self.tell("submit", request)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = prompt_ids(prompt, self.config, self.tokenizer, self.sizes.max_length)
        for i in (*params.logit_bias, *params.stop_token_ids):
            check_id(i, self.config)
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop is {list(params.stop)}, but the engine has no tokenizer; use stop_token_ids")
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(self.config.eos_token_ids))
        return Request(ids, params, min(params.max_tokens, self.sizes.max_length - len(ids)), ends, self.tokenizer)

    # Steps.

    def step(self) -> list[Update]:
        """Dispatches the next step of everything, and gives what the one before has brought.

        One that is broken off, by Ctrl-C or for want of memory say, ends all requests as "cancelled" and empties the cache: how
        far it came cannot be known. What is submitted later finds the engine as new; that of one of several processes raises
        RuntimeError from then on, for the others may wait inside the step.
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
        self._requests, self._in_flight, self._set_up_for = {}, [], {}
        if jax.process_count() == 1:
            self._runner.clear()
        else:  # They would have to do it together, and none knows where the others are.
            self.tell = _refuse

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
        self.digest = zlib.crc32(token_BT.tobytes(), zlib.crc32(count_B.tobytes(), self.digest))
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


def _refuse(*_: Any) -> None:
    raise RuntimeError("a step was broken off, which the other processes may wait in for ever; start all of them anew")


def _told(report: Any, row: int, i: int, token: int, num: int) -> TokenLogprobs:
    top = zip(report.top_id_BTR[row, i, :num].tolist(), report.top_BTR[row, i, :num].tolist(), strict=True)
    return TokenLogprobs(token, float(report.chosen_BT[row, i]), list(top))


def _check_arrays_of(config: ModelConfig, variables: dict[str, Any]) -> None:
    arrays = traverse_util.flatten_dict(variables)
    for path, expected in traverse_util.flatten_dict(abstract_variables(config)).items():
        shape = arrays[path].shape if path in arrays else None
        if shape != expected.shape:
            found = "missing" if shape is None else list(shape)
            raise ValueError(
                f"{'/'.join(path)} is {found}, not {list(expected.shape)}; give the config and the variables of one model"
            )
