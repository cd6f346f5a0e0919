"""Command-line flags of infer.py, but for those of its HTTP server (`serve/cli.py`)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from tyro.conf import FlagConversionOff

from dsv3_jax.config import DataConfig, InferConfig, MeshConfig, ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.config.cli import DistributedFlags
from dsv3_jax.data.chat_template import read_switches
from dsv3_jax.infer.cache import ENGINE_FIELDS, check_sizes
from dsv3_jax.infer.sampling import SamplingParams

DEFAULT_DRAFTS = 1
"""Default of --drafts for a model that has an MTP depth."""
DEFAULT_MAX_BATCH = 8
SAMPLING_FIELDS = "max_tokens", "temperature", "top_p", "seed", "top_k", "min_p", "repetition_penalty", "stop"
"""Names of the `SamplingParams` fields that have a flag."""


@dataclasses.dataclass(frozen=True)
class InferFlags:
    """Flags of infer.py: mode, sampling parameters, devices and sizes of the engine. Wrong values raise ValueError."""

    checkpoint: str
    """Run directory of train.py, or Hugging Face folder."""
    prompt: str | None = None
    """Text to continue; None is infer.prompt of the run."""
    interactive: bool = False
    """Chat by the checkpoint's chat template: each line of stdin is a user message, or /reset, /system TEXT or /quit."""
    batch_file: tuple[str, str] | None = None
    """Two files: prompts to complete, one JSON object a line; and the completions, which a second start continues."""

    max_tokens: int | None = None
    """Longest completion, in tokens; None is the run's infer.max_tokens, in a chat the room that max_length leaves."""
    temperature: float | None = None
    """Divides the logits, 0 takes the most likely token each time; None is the run's infer.temperature."""
    top_p: float | None = None
    """Draws from the smallest set of most likely tokens that together have this probability; None is the run's infer.top_p."""
    seed: int = 0
    """Seed of the draws; line n of a batch file, counted from 0, uses seed + n unless it sets its own."""
    top_k: int = 0
    """Draws from this many most likely tokens; 0 is all of them."""
    min_p: float = 0.0
    """Draws from the tokens with at least this share of the most likely one's probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and the completion so far less likely, below 1 more likely."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, whose text stops before them."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a text or a turn, in addition to those that the checkpoint's files name."""
    plain_prompt: bool = False
    """Special tokens that a prompt spells stay text; by default they are the tokens. Chats have a rule of their own."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template as a JSON object, such as '{"thinking": true}', for all chats."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of computation and weights, but for FP8 weights; None is the checkpoint's own."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Mesh of devices that the model is split over."""
    distributed: DistributedFlags = dataclasses.field(default_factory=DistributedFlags)
    """Rendezvous of several processes, each started with the same command; process 0 reads prompts and writes."""
    cache_dir: str = DataConfig.cache_dir
    """Folder that keeps compiled programs for later starts; of several processes only the first writes to it."""
    drafts: int | None = None
    """Tokens that the first MTP depth drafts in a step (speculative decoding); None is 1 if the model has one, else 0."""
    max_batch: int | None = None
    """Sequences decoded at a time; None is 8 for a batch file and for a server, else 1."""
    max_length: int | None = None
    """Longest prompt and completion together, in tokens; None is min(4096, context), or more if --prompt needs it."""
    chunk: int = 512
    """Most tokens of a prompt prefilled in one step, a power of two."""
    page_size: int | None = None
    """Tokens in a page of the cache; None is 128 on a TPU and 64 elsewhere."""
    cache_tokens: int | None = None
    """Capacity of the cache, in tokens; None is max_batch times max_length."""
    placement: str | None = None
    """Placement of replicated experts, a file of `python -m dsv3_jax.rebalance`; None holds every expert once."""
    prefix_cache: Annotated[bool, FlagConversionOff] = True
    """Share cached pages between prompts that begin with the same tokens."""

    def __post_init__(self) -> None:
        given = [f"--{name}" for name, is_given in self.modes().items() if is_given]
        check(len(given) <= 1, f"{' and '.join(given)} are different things to do; give one of them")
        # Values out of range are refused before a model is read.
        self.sampling(InferConfig(), 1)
        read_switches(self.chat_template_kwargs)
        check_sizes(*(getattr(self, name) for name in ENGINE_FIELDS))

    def modes(self) -> dict[str, bool]:
        """Return for each flag that selects a mode (without dashes): True if it was given."""
        return {"prompt": self.prompt is not None, "interactive": self.interactive, "batch-file": self.batch_file is not None}

    @property
    def one_shot(self) -> bool:
        """True if a single prompt is completed: no mode but --prompt was given."""
        return not any(asked for name, asked in self.modes().items() if name != "prompt")

    def sampling(self, of_run: InferConfig, longest: int) -> SamplingParams:
        """Return the sampling parameters: each flag if given, else the run's value, but `longest` for max_tokens in a chat."""
        max_tokens = longest if self.interactive else of_run.max_tokens
        defaults = SamplingParams(max_tokens, of_run.temperature, of_run.top_p)
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        return dataclasses.replace(defaults, **{name: value for name, value in given.items() if value is not None})

    @property
    def switches(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return read_switches(self.chat_template_kwargs)

    def sizes(self, config: ModelConfig) -> dict[str, Any]:
        """Return the size arguments of `Engine` by name (`ENGINE_FIELDS`): flags, or defaults, some of them None."""
        max_batch = 1 if self.batch_file is None else DEFAULT_MAX_BATCH
        defaults = {"max_batch": max_batch, "drafts": DEFAULT_DRAFTS if config.num_nextn_predict_layers else 0}
        given = {name: getattr(self, name) for name in ENGINE_FIELDS}
        return {name: defaults.get(name) if size is None else size for name, size in given.items()}
