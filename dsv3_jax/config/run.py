"""A whole run as one frozen dataclass: the model, and the groups `mesh`, `data`, `optimizer`, `train`,
`checkpoint` and `infer`. A file in `configs/` exposes one as `config`; every field can be set on the command
line under its dotted name, and the docstring under a field is its `--help`.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import math
import typing
from typing import Any, Literal, NamedTuple

import numpy as np

from dsv3_jax.config.checks import check, check_positive, check_seed
from dsv3_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh: 1 everywhere is one device; else their product is the number of devices, and one of them may
    be -1, "the rest"."""

    data: int = 1
    """Replicas of the parameters; splits the batch (between slices or hosts)."""
    fsdp: int = 1
    """Splits the batch, every parameter and the optimizer state."""
    expert: int = 1
    """Splits the experts, and the batch for the dense parts."""
    context: int = 1
    """Splits the sequence."""
    tensor: int = 1
    """Splits heads, FFN hidden and vocabulary."""

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            check(size == -1 or size >= 1, f"mesh.{name} is {size}; use a positive size, or -1 once for the rest")
        check(list(sizes.values()).count(-1) <= 1, f"mesh has -1 more than once: {sizes}; only one axis can be the rest")

    def resolve(self, num_devices: int) -> dict[str, int]:
        """Axis sizes for `num_devices` devices, -1 replaced.

        Raises:
          ValueError: if the sizes do not multiply to `num_devices`.
        """
        sizes = dataclasses.asdict(self)
        known = math.prod(size for size in sizes.values() if size != -1)
        for name, size in sizes.items():
            if size == -1:
                check(
                    num_devices % known == 0,
                    f"mesh {sizes}: {num_devices} devices are not a multiple of the known sizes ({known})",
                )
                sizes[name] = num_devices // known
        product = math.prod(sizes.values())
        check(
            product == num_devices,
            f"mesh {sizes} has {product} places for {num_devices} devices; let the sizes multiply to it, or set one to -1",
        )
        return sizes


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "stdlib"
    """A text file, a .jsonl file with a "text" field, a folder of such files (also gzipped), a folder made by
    dsv3_jax.data.prepare, or "stdlib": that of the running Python."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Several sources in place of `source`, each followed by its weight: shares of the rows, whatever they sum to."""
    kind: Literal["text", "chat"] = "text"
    """What the sources hold: texts, or conversations, of which what the assistant says is learnt (.jsonl of "messages")."""
    tokenizer: str | None = None
    """A tokenizer.json, or its folder; None trains a byte-level BPE of the model's vocab_size on the source and caches it."""
    fim_rate: float = 0.0
    """Share of the documents that are written as prefix, suffix, middle, to be filled in (section 4.1 of the report: 0.1)."""
    fim_tokens: tuple[str, str, str] = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    """The special tokens before the prefix, the suffix and the middle."""
    cross_document_attention: bool = True
    """Whether tokens attend to the documents before theirs in a row, as in the report; padding is never attended to."""
    cache_dir: str = ".cache"
    """Where trained tokenizers and tokenised text are kept between runs."""
    heldout_fraction: float = 0.02
    """Share of your own documents held out (by hash of their names; of a lone one, its end); "stdlib" and prepared folders
    have their own split."""

    def __post_init__(self) -> None:
        check(self.source != "", 'data.source is empty; name a file, a folder or "stdlib"')
        _check_mixture(self.mixture)
        check(self.kind in ("text", "chat"), f"data.kind is {self.kind!r}; choose text or chat")
        check(
            self.kind == "text" or not self.cross_document_attention,
            "data.kind is chat and data.cross_document_attention True; conversations stand in rows with padding, which nothing "
            "may attend to, so set it to False",
        )
        check(0.0 <= self.fim_rate <= 1.0, f"data.fim_rate is {self.fim_rate}; it must lie in 0..1")
        check(
            self.kind == "text" or self.fim_rate == 0,
            f"data.fim_rate is {self.fim_rate}, but conversations (data.kind chat) are not filled in; set it to 0",
        )
        check(
            len(set(self.fim_tokens)) == len(self.fim_tokens) == 3 and all(self.fim_tokens),
            f"data.fim_tokens is {self.fim_tokens}; name three special tokens, for begin, hole and end",
        )
        # What is kept there is mapped into memory.
        check("://" not in self.cache_dir, f"data.cache_dir is {self.cache_dir!r}; name a folder of this machine")
        check(
            0.0 < self.heldout_fraction < 1.0, f"data.heldout_fraction is {self.heldout_fraction}; it must lie between 0 and 1"
        )

    @property
    def shares(self) -> dict[str, float]:
        """The sources and the share of the rows that each gives; they sum to 1."""
        if not self.mixture:
            return {self.source: 1.0}
        total = sum(weight for _, weight in self.mixture)
        return {name: weight / total for name, weight in self.mixture}


_LEAST_SHARE = 1e-6


def _check_mixture(mixture: tuple[tuple[str, float], ...]) -> None:
    names = [name for name, _ in mixture]
    check(all(names), f"data.mixture is {mixture}; every source needs a name")
    check(len(set(names)) == len(names), f"data.mixture names a source twice: {names}; add up its weights")
    total = sum(weight for _, weight in mixture)
    for name, weight in mixture:
        # A share below this would take blocks of more rows than can be shuffled at once.
        check(
            math.isfinite(total) and weight > 0 and weight >= _LEAST_SHARE * total,
            f"data.mixture gives {name!r} the weight {weight}; it must be positive, and at least {_LEAST_SHARE} of the sum",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay (section 4.2 of the report)."""

    learning_rate: float = 2.2e-4
    """Peak learning rate."""
    final_learning_rate: float = 2.2e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0."""
    constant_tokens: int = 0
    """Tokens, from the start of the run, up to which the peak is held after the warm-up."""
    decay_tokens: int | None = None
    """Tokens of the cosine that follows; None lets it last to the end of the run."""
    learning_rate_after: tuple[tuple[float, float], ...] = ()
    """Later constants, whatever the cosine says: pairs of tokens seen and the rate from there on."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of every matrix; norm scales are left alone."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    moment_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype both moments are stored in."""

    def __post_init__(self) -> None:
        check(
            0 <= self.final_learning_rate <= self.learning_rate,
            f"optimizer.final_learning_rate ({self.final_learning_rate}) must lie in 0..learning_rate ({self.learning_rate})",
        )
        check(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        for name in ("warmup_steps", "constant_tokens"):
            check(getattr(self, name) >= 0, f"optimizer.{name} is {getattr(self, name)}; it cannot be negative")
        check(
            self.decay_tokens is None or self.decay_tokens > 0,
            f"optimizer.decay_tokens is {self.decay_tokens}; it must be positive, or None for the rest of the run",
        )
        _check_changes("optimizer.learning_rate_after", self.learning_rate_after)
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"optimizer.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        check(self.epsilon > 0, f"optimizer.epsilon is {self.epsilon}; it must be positive")
        check(self.weight_decay >= 0, f"optimizer.weight_decay is {self.weight_decay}; it cannot be negative")
        check(self.clip_norm > 0, f"optimizer.clip_norm is {self.clip_norm}; it must be positive")
        check(
            self.moment_dtype in ("float32", "bfloat16"),
            f"optimizer.moment_dtype is {self.moment_dtype!r}; choose float32 or bfloat16",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and shape of the run, and the weights of its losses."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch_size: int = 8
    """Sequences a step, over all devices; at the end of a ramp."""
    initial_batch_size: int | None = None
    """Sequences of the first step, from which batches grow linearly with the tokens; None for batches all alike."""
    batch_ramp_tokens: int = 0
    """Tokens over which batches grow."""
    batch_ramp_unit: int = 1
    """Sequences by which they grow; a multiple of the micro-batch."""
    micro_batch_size: int | None = None
    """Sequences that are computed at once, over all devices; gradients of a step's micro-batches are accumulated. None: all."""
    sequence_length: int = 4096
    """Tokens a sequence."""
    mtp_loss_weight: float = 0.3
    """Weight lambda of the multi-token-prediction loss (eq. 25)."""
    mtp_loss_weight_after: tuple[tuple[float, float], ...] = ()
    """Later values of lambda: pairs of tokens seen and the value from there on."""
    bias_update_speed: float = 0.001
    """gamma: how far a router bias moves each step (section 2.1.2)."""
    bias_update_speed_after: tuple[tuple[float, float], ...] = ()
    """Later values of gamma, in such pairs."""
    aux_loss_alpha_after: tuple[tuple[float, float], ...] = ()
    """Later values of model.aux_loss_alpha, in such pairs."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between held-out losses on a sample of windows; 0 for none. The end of a run scores every held-out byte."""
    eval_batches: int = 8
    """Batches in that sample."""
    init_from: str | None = None
    """Hugging Face folder or run directory whose model the run starts from; None starts from random parameters."""
    max_skipped: int = 10
    """Steps in a row that may be skipped for a loss or gradient that is not finite; the run then stops."""
    seed: int = 0
    """Seed of the parameters and of the order of the data."""

    def __post_init__(self) -> None:
        check_positive(
            self, "steps", "batch_size", "sequence_length", "log_every", "eval_batches", "max_skipped", "batch_ramp_unit"
        )
        check(
            (self.batch_ramp_tokens > 0) == (self.initial_batch_size is not None),
            f"train.initial_batch_size is {self.initial_batch_size} and train.batch_ramp_tokens {self.batch_ramp_tokens}; a "
            "ramp of the batch takes both",
        )
        for name in ("micro_batch_size", "initial_batch_size"):
            size = getattr(self, name)
            check(
                size is None or 0 < size <= self.batch_size,
                f"train.{name} is {size}; it must lie in 1..train.batch_size ({self.batch_size})",
            )
        sizes = {"batch_size": self.batch_size}
        if self.initial_batch_size is not None:
            sizes |= {"initial_batch_size": self.initial_batch_size, "batch_ramp_unit": self.batch_ramp_unit}
        for name, size in sizes.items():
            check(
                size % self.micro_batch == 0,
                f"train.{name} is {size}, no multiple of train.micro_batch_size ({self.micro_batch}); change one of them",
            )
        for name in ("mtp_loss_weight_after", "bias_update_speed_after", "aux_loss_alpha_after"):
            _check_changes(f"train.{name}", getattr(self, name))
        check(self.eval_every >= 0, f"train.eval_every is {self.eval_every}; it cannot be negative")
        check(self.mtp_loss_weight >= 0, f"train.mtp_loss_weight is {self.mtp_loss_weight}; it cannot be negative")
        check(self.bias_update_speed >= 0, f"train.bias_update_speed is {self.bias_update_speed}; it cannot be negative")
        check_seed("train.seed", self.seed)

    @property
    def micro_batch(self) -> int:
        """Sequences that are computed at once."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the largest step."""
        return self.batch_size // self.micro_batch


def _check_changes(name: str, changes: tuple[tuple[float, float], ...]) -> None:
    tokens = [at for at, _ in changes]
    check(
        tokens == sorted(set(tokens)) and all(at > 0 for at in tokens),
        f"{name} is {changes}; write pairs of tokens and value, the tokens growing from above 0",
    )
    check(
        all(math.isfinite(value) and value >= 0 for _, value in changes), f"{name} is {changes}; its values cannot be negative"
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_every: int | None = None
    """Checkpoints of every that many steps are kept for good; None for none."""

    def __post_init__(self) -> None:
        check_positive(self, "every", "keep")
        check(
            self.keep_every is None or (self.keep_every > 0 and self.keep_every % self.every == 0),
            f"checkpoint.keep_every is {self.keep_every}; it must be a multiple of checkpoint.every ({self.every}), or None",
        )


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """The sample that train.py shows at its end, and the defaults of infer.py."""

    prompt: str = "def main("
    """Prompt of the sample."""
    max_tokens: int = 64
    """Longest completion, in tokens."""
    temperature: float = 0.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    """Samples from the smallest set of tokens that holds this much probability."""

    def __post_init__(self) -> None:
        check_positive(self, "max_tokens")
        check(self.temperature >= 0, f"infer.temperature is {self.temperature}; it cannot be negative")
        check(0 < self.top_p <= 1, f"infer.top_p is {self.top_p}; it must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: what is trained, on what, and how."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    infer: InferConfig = dataclasses.field(default_factory=InferConfig)

    def __post_init__(self) -> None:
        length, longest = self.train.sequence_length, self.model.max_position_embeddings
        check(length <= longest, f"train.sequence_length ({length}) exceeds model.max_position_embeddings ({longest})")
        depths = self.model.num_nextn_predict_layers
        check(length > depths, f"train.sequence_length ({length}) must exceed model.num_nextn_predict_layers ({depths})")

    @property
    def schedules(self) -> Schedules:
        """What changes from step to step."""
        return Schedules(self.optimizer, self.train, self.model.aux_loss_alpha)

    def to_json(self) -> str:
        """The resolved config as JSON text; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Reads what `to_json` wrote.

        Raises:
          ValueError: on unknown fields, or on values the config refuses.
        """
        return _build(cls, json.loads(text), "config")


def _build(cls: Any, values: dict[str, Any], path: str) -> Any:
    """Builds the dataclass `cls` from nested dicts, refusing unknown fields."""
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    check(not unknown, f"{path} has unknown fields {sorted(unknown)}; known: {sorted(hints)}")
    built = {}
    for name, value in values.items():
        nested = [t for t in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(t)]
        built[name] = _build(nested[0], value, f"{path}.{name}") if nested and isinstance(value, dict) else _tuples(value)
    return cls(**built)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------------------------
# What changes while a run goes on (section 4.2 of the report): learning rate, batch size, lambda, gamma and alpha.


Changes = tuple[tuple[float, float], ...]
"""Later values of a constant: pairs of tokens seen and the value from there on."""


class StepHyperparams(NamedTuple):
    """What one step is taken with: float32 scalars, and an int32 count."""

    learning_rate: Any
    mtp_loss_weight: Any
    """lambda."""
    bias_update_speed: Any
    """gamma."""
    aux_loss_alpha: Any
    """alpha."""
    micro_batches: Any
    """How many micro-batches of the step's arrays are filled."""


class Schedules:
    """The schedules of a run, by the number of the step, counted from 0."""

    def __init__(self, optimizer: OptimizerConfig, train: TrainConfig, aux_loss_alpha: float) -> None:
        self._optimizer = optimizer
        self._train = train
        self._alpha = aux_loss_alpha
        self._ramp_rows = _ramp_rows(train)

    def batch_size(self, step: int) -> int:
        """Sequences of the step, over all devices."""
        return self.rows_before(step + 1) - self.rows_before(step)

    def rows_before(self, step: int) -> int:
        """Sequences of all steps before this one."""
        ramp = len(self._ramp_rows) - 1
        return self._ramp_rows[min(step, ramp)] + max(step - ramp, 0) * self._train.batch_size

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before this one."""
        return self.rows_before(step) * self._train.sequence_length

    def steps_for(self, tokens: float) -> int:
        """The fewest steps that see this many tokens."""
        rows = math.ceil(tokens / self._train.sequence_length)
        ramp = len(self._ramp_rows) - 1
        if rows <= self._ramp_rows[ramp]:
            return bisect.bisect_left(self._ramp_rows, rows)
        return ramp + -(-(rows - self._ramp_rows[ramp]) // self._train.batch_size)

    def learning_rate(self, step: int) -> float:
        """Linear over `warmup_steps`, constant, a cosine to `final_learning_rate`, then constants.

        The warm-up counts from 1, so that no step is taken at rate 0, and the cosine goes by the tokens seen after the step.
        """
        o = self._optimizer
        seen, warm = self.tokens_before(step), self.tokens_before(o.warmup_steps)
        changed = [rate for tokens, rate in o.learning_rate_after if seen >= tokens]
        if changed:
            return changed[-1]
        if step < o.warmup_steps:
            return o.learning_rate * (step + 1) / o.warmup_steps
        start = max(warm, o.constant_tokens)
        whole = self.tokens_before(self._train.steps) - start if o.decay_tokens is None else o.decay_tokens
        done = min(max((self.tokens_before(step + 1) - start) / whole, 0.0), 1.0) if whole > 0 else 1.0
        return o.final_learning_rate + (o.learning_rate - o.final_learning_rate) * (1 + math.cos(math.pi * done)) / 2

    def at(self, step: int) -> StepHyperparams:
        """Everything the step is taken with."""
        train, seen = self._train, self.tokens_before(step)
        return StepHyperparams(
            np.float32(self.learning_rate(step)),
            np.float32(_value(train.mtp_loss_weight, train.mtp_loss_weight_after, seen)),
            np.float32(_value(train.bias_update_speed, train.bias_update_speed_after, seen)),
            np.float32(_value(self._alpha, train.aux_loss_alpha_after, seen)),
            np.int32(self.batch_size(step) // train.micro_batch),
        )


def _value(first: float, after: Changes, seen: int) -> float:
    return next((value for tokens, value in reversed(after) if seen >= tokens), first)


@functools.lru_cache(maxsize=8)
def _ramp_rows(train: TrainConfig) -> list[int]:
    """Sequences before each step of the batch ramp, and before the first step after it."""
    rows = [0]
    if train.initial_batch_size is None:
        return rows
    growth = train.batch_size - train.initial_batch_size
    while rows[-1] * train.sequence_length < train.batch_ramp_tokens:
        done = rows[-1] * train.sequence_length / train.batch_ramp_tokens
        rows.append(rows[-1] + train.initial_batch_size + int(growth * done) // train.batch_ramp_unit * train.batch_ramp_unit)
    return rows
