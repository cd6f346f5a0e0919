"""A whole run as a frozen dataclass (model, mesh, data, optimizer, train, checkpoint, infer), and its schedules.

A file in `configs/` exposes one as `config`; every field can be set on the command line under its dotted name, and
the docstring under a field is its `--help`.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import math
import typing
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from etils import epath

from dsv3_jax.config.checks import (
    Bound,
    NonNegativeFloat,
    NonNegativeInt,
    OpenShare,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    check,
    check_fields,
)
from dsv3_jax.config.model import ModelConfig


def _is_growing(changes: tuple[tuple[float, float], ...]) -> bool:
    return all(earlier < later for earlier, later in itertools.pairwise([0.0, *(tokens for tokens, _ in changes)]))


Decay = Annotated[float, Bound(lambda decay: 0 <= decay < 1, "it must lie in [0, 1)")]
AxisSize = Annotated[int, Bound(lambda size: size == -1 or size >= 1, "use a positive size, or -1 once for the rest")]
FimTokens = Annotated[
    tuple[str, str, str],
    Bound(lambda tokens: len({*tokens, ""}) == len(tokens) + 1 == 4, "name three different special tokens, begin, hole, end"),
]
Changes = Annotated[
    tuple[tuple[float, float], ...],
    Bound(_is_growing, "write pairs of tokens and value, the tokens growing from above 0"),
    Bound(lambda changes: all(0 <= value < math.inf for _, value in changes), "its values cannot be negative or infinite"),
]
"""Later values of a constant: pairs (tokens seen, value from then on), by growing tokens."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh, whose product is the number of devices; at most one is -1, computed from the others."""

    data: AxisSize = 1
    """Replicas of the parameters; splits the batch (between slices or hosts)."""
    fsdp: AxisSize = 1
    """Splits the batch, every parameter and the optimizer state."""
    expert: AxisSize = 1
    """Splits the experts, and the batch for the dense parts."""
    context: AxisSize = 1
    """Splits the sequence."""
    tensor: AxisSize = 1
    """Splits attention heads, hidden units of FFNs and vocabulary."""

    def __post_init__(self) -> None:
        check_fields(self, "mesh.")
        sizes = dataclasses.asdict(self)
        check(list(sizes.values()).count(-1) <= 1, f"mesh has -1 more than once: {sizes}; only one axis can be the rest")

    def resolve(self, num_devices: int) -> dict[str, int]:
        """Return the axis sizes for `num_devices` devices, with -1 replaced.

        Raises:
          ValueError: if the sizes do not multiply to `num_devices`.
        """
        sizes = dataclasses.asdict(self)
        known = math.prod(size for size in sizes.values() if size != -1)
        for name, size in sizes.items():
            if size == -1:
                remedy = f"{num_devices} devices are not a multiple of the known sizes ({known}); change these"
                check(num_devices % known == 0, f"mesh {sizes}: {remedy}")
                sizes[name] = num_devices // known
        product = math.prod(sizes.values())
        check(
            product == num_devices,
            f"mesh {sizes} has {product} places for {num_devices} devices; choose sizes with that product, or set one to -1",
        )
        return sizes


_LEAST_SHARE = 1e-6  # A smaller one would take blocks of more rows than can be shuffled at once.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text or conversations to train on, their tokenizer, and the way from documents to rows of tokens."""

    source: Annotated[str, Bound(bool, 'name a file, a folder or "stdlib"')] = "stdlib"
    """A text file, a .jsonl file with a "text" field, a folder of such files (also gzipped), a folder made by
    dsv3_jax.data.prepare, or "stdlib": the standard library of the running Python."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Several sources in place of `source`, each followed by its weight: shares of the rows, which need not sum to 1."""
    kind: Literal["text", "chat"] = "text"
    """Content of the sources: texts, or conversations (.jsonl of "messages") trained on what the assistant says."""
    tokenizer: str | None = None
    """A tokenizer.json, or its folder; None trains a byte-level BPE of the model's vocab_size on the source and caches it."""
    fim_rate: Share = 0.0
    """Share of the training documents rearranged as prefix, suffix, middle, to learn filling in (section 4.1: 0.1)."""
    fim_tokens: FimTokens = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    """The special tokens before the prefix, the suffix and the middle."""
    cross_document_attention: bool = True
    """Let tokens attend to the documents before their own in a row, as in the report's pre-training."""
    # Its files are memory-mapped.
    cache_dir: Annotated[str, Bound(lambda path: "://" not in path, "name a folder of this machine")] = ".cache"
    """Folder that keeps trained tokenizers and tokenised text between runs."""
    heldout_fraction: OpenShare = 0.02
    """Share of the documents held out from training (by a hash of their names; of a single document, its end); "stdlib" and
    prepared folders have their own split."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        if self.kind == "chat":
            check(
                not self.cross_document_attention,
                "data.kind is chat and data.cross_document_attention True; conversations are padded to rows, and padding must "
                "not be attended to: set it to False",
            )
            remedy = "conversations (data.kind chat) are not filled in; set it to 0"
            check(self.fim_rate == 0, f"data.fim_rate is {self.fim_rate}, but {remedy}")
        names = [name for name, _ in self.mixture]
        check(all(names), f"data.mixture is {self.mixture}; every source needs a name")
        check(len(set(names)) == len(names), f"data.mixture names a source twice: {names}; add up its weights")
        total = sum(weight for _, weight in self.mixture)
        remedy = f"it must be positive, and at least {_LEAST_SHARE} of the sum"
        for name, weight in self.mixture:
            is_large = math.isfinite(total) and weight > 0 and weight >= _LEAST_SHARE * total
            check(is_large, f"data.mixture gives {name!r} the weight {weight}; {remedy}")

    @property
    def shares(self) -> dict[str, float]:
        """Share of the rows by source, summing to 1: the weights of `mixture` over their sum, else 1 for `source`."""
        if not self.mixture:
            return {self.source: 1.0}
        total = sum(weight for _, weight in self.mixture)
        return {name: weight / total for name, weight in self.mixture}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay (section 4.2 of the report)."""

    learning_rate: PositiveFloat = 2.2e-4
    """Peak learning rate."""
    final_learning_rate: float = 2.2e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: NonNegativeInt = 2000
    """Steps of linear warm-up from 0."""
    constant_tokens: NonNegativeInt = 0
    """Tokens, from the start of the run, up to which the peak is held after the warm-up."""
    decay_tokens: PositiveInt | None = None
    """Tokens of the cosine that follows; None lets it last to the end of the run."""
    learning_rate_after: Changes = ()
    """Later constants, in place of the cosine: pairs of tokens seen and the rate from there on."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.95
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of every matrix; norm scales do not decay."""
    clip_norm: PositiveFloat = 1.0
    """Global norm to which a larger gradient is scaled down."""
    moment_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype both moments are stored in."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")
        final, peak = self.final_learning_rate, self.learning_rate
        check(0 <= final <= peak, f"optimizer.final_learning_rate ({final}) must lie in 0..learning_rate ({peak})")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Steps, batches and seed of the run, weights of its losses, intervals of logging and evaluation."""

    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt = 8
    """Sequences per step, over all devices; with a ramp, those of the steps after it."""
    initial_batch_size: int | None = None
    """Sequences of the first step, from which batches grow linearly with the tokens; None for batches of one size."""
    batch_ramp_tokens: NonNegativeInt = 0
    """Tokens, from the start of the run, over which batches grow; 0 without a ramp."""
    batch_ramp_unit: PositiveInt = 1
    """Batches grow by multiples of this many sequences, itself a multiple of the micro-batch."""
    micro_batch_size: int | None = None
    """Sequences that are computed at once, over all devices; gradients are accumulated over a step. None: batch_size."""
    sequence_length: PositiveInt = 4096
    """Tokens per sequence."""
    mtp_loss_weight: NonNegativeFloat = 0.3
    """Weight lambda of the multi-token-prediction loss (eq. 25)."""
    mtp_loss_weight_after: Changes = ()
    """Later values of lambda: pairs of tokens seen and the value from then on."""
    bias_update_speed: NonNegativeFloat = 0.001
    """gamma: change of a router bias in one step (section 2.1.2)."""
    bias_update_speed_after: Changes = ()
    """Later values of gamma: pairs of tokens seen and the value from then on."""
    aux_loss_alpha_after: Changes = ()
    """Later values of model.aux_loss_alpha: pairs of tokens seen and the value from then on."""
    log_every: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: NonNegativeInt = 0
    """Steps between losses on a sample of held-out windows; 0 for none. The end of a run scores every held-out byte."""
    eval_batches: PositiveInt = 8
    """Batches of each source in the sample of held-out windows."""
    init_from: str | None = None
    """Hugging Face folder or run directory whose model the run starts from; None starts from random parameters."""
    max_skipped: PositiveInt = 10
    """The run stops after this many steps in a row were skipped for a loss or gradient that is not finite."""
    seed: Seed = 0
    """Seed of the initial parameters, of the order of the data and of fill-in-the-middle."""

    def __post_init__(self) -> None:
        check_fields(self, "train.")
        initial, ramp = self.initial_batch_size, self.batch_ramp_tokens
        check(
            (ramp > 0) == (initial is not None),
            f"train.initial_batch_size is {initial} and train.batch_ramp_tokens {ramp}; a ramp of the batch takes both",
        )
        for name, size in (("micro_batch_size", self.micro_batch_size), ("initial_batch_size", initial)):
            remedy = f"it must lie in 1..train.batch_size ({self.batch_size})"
            check(size is None or 0 < size <= self.batch_size, f"train.{name} is {size}; {remedy}")
        for name in ("batch_size", *(("initial_batch_size", "batch_ramp_unit") if initial is not None else ())):
            size, remedy = (
                getattr(self, name),
                f"no multiple of train.micro_batch_size ({self.micro_batch}); change one of them",
            )
            check(size % self.micro_batch == 0, f"train.{name} is {size}, {remedy}")

    @property
    def micro_batch(self) -> int:
        """Sequences per micro-batch, over all devices: `micro_batch_size`, or `batch_size` if that is None."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in a step of `batch_size` sequences, the largest."""
        return self.batch_size // self.micro_batch


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Interval of checkpoints, and the number of them that are kept."""

    every: PositiveInt = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept; older ones are deleted."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many steps are never deleted; None for none."""

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint.")
        kept = self.keep_every
        remedy = f"it must be a multiple of checkpoint.every ({self.every}), or None"
        check(kept is None or (kept > 0 and kept % self.every == 0), f"checkpoint.keep_every is {kept}; {remedy}")


@dataclasses.dataclass(frozen=True)
class InferConfig:
    """Prompt and sampling that infer.py uses by default for checkpoints of the run."""

    prompt: str = "def main("
    """Prompt of infer.py if none is given."""
    max_tokens: PositiveInt = 64
    """Largest number of tokens of the completion."""
    temperature: NonNegativeFloat = 0.0
    """Divisor of the logits before sampling; 0 takes the most likely token each time."""
    top_p: Annotated[float, Bound(lambda share: 0 < share <= 1, "it must lie in (0, 1]")] = 1.0
    """Samples from the smallest set of tokens that holds this much probability; 1 for all tokens."""

    def __post_init__(self) -> None:
        check_fields(self, "infer.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that defines a run: model, mesh, data, optimizer, training, checkpoints and sampling."""

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
        """Learning rate, batch size, lambda, gamma and alpha as functions of the step."""
        return Schedules(self.optimizer, self.train, self.model.aux_loss_alpha)

    def to_json(self) -> str:
        """Return the resolved config as JSON text, for `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Build a Config from the text of `to_json`; absent fields get their defaults.

        Raises:
          ValueError: on text that is not JSON, unknown fields, or values that the config refuses.
        """
        return _build(cls, json.loads(text), "config")


def group_type(hint: Any) -> Any:
    """Return the dataclass that a field's type is, or that is an arm of a union such as `X | None`; None if there is none."""
    return next((arm for arm in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(arm)), None)


def _build(cls: Any, values: dict[str, Any], path: str) -> Any:
    """Build the dataclass `cls` from nested dicts, with JSON's lists as tuples; refuse unknown fields."""
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    check(not unknown, f"{path} has unknown fields {sorted(unknown)}; correct or remove them; known: {sorted(hints)}")
    built = {}
    for name, value in values.items():
        group = group_type(hints[name])
        built[name] = _build(group, value, f"{path}.{name}") if group and isinstance(value, dict) else _tuples(value)
    return cls(**built)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------------------------
# Schedules (section 4.2 of the report): learning rate, batch size, lambda, gamma and alpha


class StepHyperparams(NamedTuple):
    """Values of one step: float32 scalars, and an int32 count."""

    learning_rate: Any
    mtp_loss_weight: Any
    """lambda, the weight of the multi-token-prediction loss."""
    bias_update_speed: Any
    """gamma, the change of a router bias."""
    aux_loss_alpha: Any
    """alpha, the weight of the balance loss."""
    micro_batches: Any
    """Number of micro-batches of the step's arrays that are filled."""


class Schedules:
    """The schedules of a run, by the number of the step, counted from 0."""

    def __init__(self, optimizer: OptimizerConfig, train: TrainConfig, aux_loss_alpha: float) -> None:
        self._optimizer = optimizer
        self._train = train
        self._alpha = aux_loss_alpha
        self._ramp_rows = _ramp_rows(train)

    def batch_size(self, step: int) -> int:
        """Return the number of sequences in the step, over all devices."""
        return self.rows_before(step + 1) - self.rows_before(step)

    def rows_before(self, step: int) -> int:
        """Return the number of sequences in all steps before this one."""
        ramp = len(self._ramp_rows) - 1
        return self._ramp_rows[min(step, ramp)] + max(step - ramp, 0) * self._train.batch_size

    def tokens_before(self, step: int) -> int:
        """Return the number of tokens in all steps before this one."""
        return self.rows_before(step) * self._train.sequence_length

    def steps_for(self, tokens: float) -> int:
        """Return the smallest number of steps, from the start, that together see at least `tokens` tokens."""
        rows = math.ceil(tokens / self._train.sequence_length)
        ramp = len(self._ramp_rows) - 1
        if rows <= self._ramp_rows[ramp]:
            return bisect.bisect_left(self._ramp_rows, rows)
        return ramp + -(-(rows - self._ramp_rows[ramp]) // self._train.batch_size)

    def learning_rate(self, step: int) -> float:
        """Return the rate: linear over `warmup_steps`, constant, a cosine to `final_learning_rate`, then `learning_rate_after`.

        The warm-up counts from 1, so that no step has rate 0, and the cosine goes by the tokens seen after the step.
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
        """Return all scheduled values of the step, as numpy scalars."""
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
    """Return the number of sequences before each step of the batch ramp and before the step after it; [0] without a ramp."""
    rows = [0]
    if train.initial_batch_size is None:
        return rows
    growth = train.batch_size - train.initial_batch_size
    while rows[-1] * train.sequence_length < train.batch_ramp_tokens:
        done = rows[-1] * train.sequence_length / train.batch_ramp_tokens
        rows.append(rows[-1] + train.initial_batch_size + int(growth * done) // train.batch_ramp_unit * train.batch_ramp_unit)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The model of a checkpoint: of a run directory of train.py, or of a Hugging Face folder


def is_hugging_face(path: str) -> bool:
    """Return True for a Hugging Face folder, False for a run directory, as the config.json in it says.

    Raises:
      ValueError: if it is neither.
    """
    return "model_type" in _read_config(path)


def read_model(path: str) -> ModelConfig:
    """Return the model of a run directory or Hugging Face folder (with its generation_config.json), all backends "auto".

    Raises:
      ValueError: if it is neither, or its config.json or generation_config.json is refused.
    """
    content = _read_config(path)
    try:
        model = ModelConfig.from_hf(content) if "model_type" in content else Config.from_json(json.dumps(content)).model
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{epath.Path(path) / 'config.json'}: {error}") from error
    return (with_generation_config(model, path) if "model_type" in content else model).with_auto_backends()


def model_to_train(path: str) -> ModelConfig:
    """Return `read_model(path)` with `param_dtype` "float32", as a run trains it. Raises as `read_model`."""
    return dataclasses.replace(read_model(path), param_dtype="float32")


def with_generation_config(model: ModelConfig, path: str) -> ModelConfig:
    """Return `model` with the eos ids of the folder's generation_config.json added; unchanged if there is no such file.

    Raises:
      ValueError: if that file cannot be read, or holds other things than token ids.
    """
    file = epath.Path(path) / "generation_config.json"
    if not file.exists():
        return model
    try:
        named = json.loads(file.read_text()).get("eos_token_id")
        more = named if isinstance(named, list) else [] if named is None else [named]
        # One outside the vocabulary, as of a pruned model, ends nothing.
        ids = dict.fromkeys([*model.eos_token_ids, *(i for i in more if not _is_beyond(i, model))])
        known = len(ids) == len(model.eos_token_ids)
        return model if known else dataclasses.replace(model, eos_token_id=tuple(ids))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: {error}; copy it from the checkpoint again") from error


def _is_beyond(i: Any, model: ModelConfig) -> bool:
    return isinstance(i, int) and not isinstance(i, bool) and i >= model.vocab_size


def _read_config(path: str) -> dict[str, Any]:
    file = epath.Path(path) / "config.json"
    check(file.exists(), f"{path} holds no config.json; name a run directory of train.py or a Hugging Face folder")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    is_config = isinstance(content, dict) and ("model_type" in content or isinstance(content.get("model"), dict))
    check(is_config, f"{file} is neither a run's config nor a Hugging Face one (no model_type); name another folder")
    return content
