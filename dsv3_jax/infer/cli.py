"""The command line of infer.py: what to complete, how tokens are drawn, and what the engine is made of."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from tyro.conf import FlagConversionOff

from dsv3_jax.config import DataConfig, InferConfig, MeshConfig, ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.config.cli import DistributedFlags
from dsv3_jax.infer.cache import check_sizes
from dsv3_jax.infer.sampling import SamplingParams

DEFAULT_DRAFTS = 1
"""Of a model that can draft."""
DEFAULT_MAX_BATCH = 8
SAMPLING_FIELDS = (
    "max_tokens", "temperature", "top_p", "seed", "top_k", "min_p", "repetition_penalty", "stop",
)  # fmt: skip
"""What of `SamplingParams` has a flag."""
ENGINE_FIELDS = "max_batch", "max_length", "drafts", "chunk", "page_size", "cache_tokens"
"""What `Sizes.of` takes, each by its flag."""


@dataclasses.dataclass(frozen=True)
class InferFlags:
    """What infer.py is to do."""

    checkpoint: str
    """Run directory of train.py, or Hugging Face folder."""
    prompt: str | None = None
    """Text to continue; None is that of the run's `infer` group."""
    interactive: bool = False
    """Chat by the checkpoint's chat template: a line of stdin is a turn; /reset, /system TEXT, /quit."""
    batch_file: tuple[str, str] | None = None
    """Two files: prompts to complete, one JSON object a line, and where the completions go. A second start continues."""

    max_tokens: int | None = None
    """Longest completion, in tokens; None is the run's, and in a chat whatever max_length leaves."""
    temperature: float | None = None
    """Divides the logits, 0 takes the most likely token each time; None is the run's."""
    top_p: float | None = None
    """Draws from the smallest set of most likely tokens that together have this probability; None is the run's."""
    seed: int = 0
    """Seed of the draws; line n of a batch file, counted from 0, uses seed + n."""
    top_k: int = 0
    """Draws from this many most likely tokens; 0 is all of them."""
    min_p: float = 0.0
    """Draws from the tokens with at least this share of the most likely one's probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and the completion so far less likely, below 1 more likely."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype to compute in; None is the checkpoint's own."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The devices to lay the model out over."""
    distributed: DistributedFlags = dataclasses.field(default_factory=DistributedFlags)
    """How several processes find each other, each started with the same command; process 0 reads and writes."""
    cache_dir: str = DataConfig.cache_dir
    """Folder that keeps compiled programs; of several processes the first alone fills it."""
    drafts: int | None = None
    """Tokens that the first MTP depth drafts a step (speculative decoding); None is 1 if the model has one, else 0."""
    max_batch: int | None = None
    """Sequences decoded at a time; None is 8 for a batch file and for a server, else 1."""
    max_length: int | None = None
    """Longest prompt and completion together, in tokens; None is the model's context, at most 4096, or what --prompt needs."""
    chunk: int = 512
    """Most tokens of a prompt worked on at a time, a power of two."""
    page_size: int | None = None
    """Tokens in a page of the cache; None is 128 on a TPU and 64 elsewhere."""
    cache_tokens: int | None = None
    """Tokens the cache has room for; None is max_batch times max_length."""
    placement: str | None = None
    """Placement of redundant experts, a file of `python -m dsv3_jax.rebalance`; None holds every expert once."""
    prefix_cache: Annotated[bool, FlagConversionOff] = True
    """Whether prompts that begin alike share the cache of their beginning."""

    def __post_init__(self) -> None:
        given = [f"--{name}" for name, is_given in self.modes().items() if is_given]
        check(len(given) <= 1, f"{' and '.join(given)} are different things to do; give one of them")
        # What is out of range is refused before a model is read.
        self.sampling(InferConfig(), 1)
        check_sizes(**{name: getattr(self, name) for name in ENGINE_FIELDS})

    def modes(self) -> dict[str, bool]:
        """What can be done, and which of it is asked for."""
        return {"prompt": self.prompt is not None, "interactive": self.interactive, "batch-file": self.batch_file is not None}

    @property
    def one_shot(self) -> bool:
        """Whether it is one prompt that is to be completed."""
        return not any(asked for name, asked in self.modes().items() if name != "prompt")

    def sampling(self, of_run: InferConfig, longest: int) -> SamplingParams:
        """How completions are drawn: as was given, else as `of_run`; a chat's replies have up to `longest` tokens."""
        wanted = dataclasses.asdict(of_run) | ({"max_tokens": longest} if self.interactive else {})
        own = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        wanted |= {name: value for name, value in own.items() if value is not None}
        del wanted["prompt"]
        return SamplingParams(**wanted)

    def sizes(self, config: ModelConfig) -> dict[str, Any]:
        """What `Sizes.of` takes."""
        of_many = 1 if self.batch_file is None else DEFAULT_MAX_BATCH
        can_draft = config.num_nextn_predict_layers > 0
        chosen = {"max_batch": of_many, "drafts": DEFAULT_DRAFTS if can_draft else 0}
        given = {name: getattr(self, name) for name in ENGINE_FIELDS}
        return {name: chosen.get(name) if size is None else size for name, size in given.items()}
