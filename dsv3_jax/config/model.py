"""The architecture as a frozen dataclass: Hugging Face's field names, DeepSeek-V3's numbers, checked when built.

The defaults are the published DeepSeek-V3 (arXiv 2412.19437, section 4.2). The docstring under a field is its
documentation and its `--help`; its type holds its bounds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

import jax.numpy as jnp

from dsv3_jax.config.checks import (
    Bound,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check,
    check_fields,
    check_value,
)
from dsv3_jax.config.hugging_face import fields_from_hf, fields_to_hf

# ----------------------------------------------------------------------------------------------------------------------
# YaRN, with the field names of `rope_scaling` in a Hugging Face config


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN context extension (arXiv 2309.00071; section 4.3 of the report). Static: it applies at every length."""

    factor: float = 40.0
    """Ratio of the extended context length to the original one."""
    original_max_position_embeddings: PositiveInt = 4096
    """Context length before the extension."""
    beta_fast: float = 32.0
    """Rotary pairs with more rotations than this within the original context keep their frequency."""
    beta_slow: float = 1.0
    """Rotary pairs with fewer rotations than this have their frequency divided by factor."""
    mscale: float | None = 1.0
    """cos and sin are scaled by m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1; by m(1) if either is None or 0."""
    mscale_all_dim: float | None = 1.0
    """Attention logits are scaled by m(mscale_all_dim)^2 in addition; not if it is None or 0."""

    def __post_init__(self) -> None:
        check_fields(self, "rope_scaling.")
        check(self.factor >= 1.0, f"rope_scaling.factor is {self.factor}; it must be at least 1")
        check(
            self.beta_fast >= self.beta_slow > 0,
            f"rope_scaling.beta_fast ({self.beta_fast}) must be at least beta_slow ({self.beta_slow}), which must be positive",
        )

    def attention_scale(self, mscale: float | None) -> float:
        """Return YaRN's temperature correction m(mscale) = 0.1 * mscale * ln(factor) + 1 (its eq. 22); None counts as 1."""
        return 0.1 * (1.0 if mscale is None else mscale) * math.log(self.factor) + 1.0


ScaleFormat = Literal["ue8m0"]
RematPolicy = Literal["none", "save_latents", "full"]
ExpertBackend = Literal["auto", "pallas_tpu", "pallas_gpu", "tiles", "ragged_dot", "reference"]
ExpertExchange = Literal["auto", "ragged", "dense", "all_gather"]
FORMER_EXCHANGES = {"ring": "all_gather"}
"""Names that `ExpertExchange` had until version 0.1, and their present names; readers of configs still accept the old ones."""
AttentionBackend = Literal["auto", "splash", "pallas_gpu", "chunked"]
CacheBackend = Literal["auto", "pallas_tpu", "pallas_gpu", "chunked"]
_DTYPES = "float32", "bfloat16", "float16", "float64"
DType = Annotated[str, Bound(lambda name: name in _DTYPES, f"choose {' or '.join(_DTYPES)}")]


def _dtype_name(dtype: Any) -> Any:
    """Return the name of a dtype, such as "bfloat16"; None, text and what is no dtype unchanged."""
    if dtype is None or isinstance(dtype, str):  # None is float64 to numpy.
        return dtype
    try:
        return jnp.dtype(dtype).name
    except (TypeError, ValueError):
        return dtype


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. Every field above "Computation" has its Hugging Face name."""

    vocab_size: PositiveInt = 129280
    """Rows of the embedding and columns of the head."""
    hidden_size: PositiveInt = 7168
    """Width of the residual stream (D)."""
    num_hidden_layers: PositiveInt = 61
    """Decoder blocks of the main model, dense and MoE."""
    num_nextn_predict_layers: NonNegativeInt = 1
    """Multi-token-prediction depths; 0 for none."""
    first_k_dense_replace: int = 3
    """Number of blocks, counted from the first, that have a dense FFN; all later ones are MoE."""

    num_attention_heads: PositiveInt = 128
    """Attention heads (N)."""
    q_lora_rank: PositiveInt | None = 1536
    """Width of the query latent (Q); None projects queries directly."""
    kv_lora_rank: PositiveInt = 512
    """Width of the key-value latent (C): the cache holds it and the rotary key."""
    qk_nope_head_dim: PositiveInt = 128
    """Per-head query/key dims without position (H)."""
    qk_rope_head_dim: PositiveInt = 64
    """Per-head query dims with rotary position, and width of the rotary key that all heads share (P); even."""
    v_head_dim: PositiveInt = 128
    """Per-head value dims (W)."""

    intermediate_size: PositiveInt = 18432
    """Hidden width of the dense FFN."""
    moe_intermediate_size: PositiveInt = 2048
    """Hidden width of one expert (F)."""
    n_routed_experts: PositiveInt = 256
    """Routed experts (E)."""
    n_shared_experts: NonNegativeInt = 1
    """Shared experts, which every token visits; together one SwiGLU of width n_shared_experts * moe_intermediate_size."""
    num_experts_per_tok: PositiveInt = 8
    """Routed experts a token visits (K)."""
    n_group: PositiveInt = 8
    """Groups (G) of consecutive experts; a token stays within topk_group of them."""
    topk_group: PositiveInt = 4
    """Groups from which the experts of a token are chosen."""
    norm_topk_prob: bool = True
    """Normalise the K gate values to sum to one before scaling."""
    routed_scaling_factor: PositiveFloat = 2.5
    """Factor on the routed experts' weights."""
    aux_loss_alpha: NonNegativeFloat = 1e-4
    """Weight alpha of the sequence-wise balance loss (eq. 17). V3 was trained with 1e-4; its config.json says 1e-3."""

    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """YaRN, or None for plain rotary embedding."""
    max_position_embeddings: PositiveInt = 4096
    """Longest sequence the model accepts, in tokens."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm (the latent norms are fixed at 1e-6, as in the reference)."""
    initializer_range: PositiveFloat = 0.006
    """Standard deviation of the initial weights."""
    bos_token_id: int | None = 0
    """Id that opens a document; None for none."""
    eos_token_id: int | tuple[int, ...] | None = 1
    """Id (or ids) that end a completion; the first one separates training documents. None for none."""

    # Computation.
    dtype: DType = "bfloat16"
    """Dtype of the computation; router logits, softmax, norms and losses are always float32."""
    param_dtype: DType = "float32"
    """Dtype of the stored parameters; router biases are always float32."""
    scale_fmt: ScaleFormat | None = None
    """FP8 weight scales that `save_hf` writes: "ue8m0" for powers of two, None for any float32; not to change on --resume."""
    remat: RematPolicy = "none"
    """Recomputation in the backward pass: "none", "save_latents" (all but latents and FFN input), or "full" (whole block)."""
    expert_backend: ExpertBackend = "auto"
    """Implementation of the expert FFN; "auto" is chosen by platform and printed at start."""
    expert_exchange: ExpertExchange = "auto"
    """Exchange of rows between the experts of a mesh; "auto" is chosen by platform and printed at start."""
    receive_factor: PositiveFloat = 1.5
    """Receive buffer of the expert exchange, as a multiple of the rows a device sends; rows beyond it take another round."""
    attention_backend: AttentionBackend = "auto"
    """Implementation of attention in training and prefill; "auto" is chosen by platform and printed at start."""
    cache_backend: CacheBackend = "auto"
    """Implementation of attention over the cache, in decoding; "auto" is chosen by platform and printed at start."""
    attention_chunk: PositiveInt = 512
    """Queries and keys per tile of the chunked attention loop; the T x S matrix is never built."""
    loss_chunk: PositiveInt = 512
    """Positions of every sequence per step of the chunked cross entropy; the [B, T, V] logits never exist in training."""

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, _dtype_name(getattr(self, name)))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if self.q_lora_rank == 0:
            object.__setattr__(self, "q_lora_rank", None)
        object.__setattr__(self, "expert_exchange", FORMER_EXCHANGES.get(self.expert_exchange, self.expert_exchange))
        check_fields(self)
        self._check_combinations()

    def _check_combinations(self) -> None:
        check(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim is {self.qk_rope_head_dim}; rotary pairs need an even number")
        dense = self.first_k_dense_replace
        check(0 <= dense <= self.num_hidden_layers, f"first_k_dense_replace is {dense}; it must lie in 0..num_hidden_layers")
        experts, groups = self.n_routed_experts, self.n_group
        check(experts % groups == 0, f"n_routed_experts ({experts}) is not a multiple of n_group ({groups})")
        check(self.topk_group <= groups, f"topk_group ({self.topk_group}) exceeds n_group ({groups})")
        check(
            groups == 1 or experts // groups >= 2,
            f"n_group ({groups}) leaves {experts // groups} expert a group; a group is scored by its best two, so it needs two",
        )
        chosen, reachable = self.num_experts_per_tok, self.topk_group * experts // groups
        kept = f"topk_group ({self.topk_group}) groups"
        check(chosen <= reachable, f"num_experts_per_tok ({chosen}) exceeds the {reachable} experts of {kept}")
        check(self.eos_token_id != (), "eos_token_id is empty; name a token id, or use None")
        for name, ids in (("bos_token_id", [self.bos_token_id]), ("eos_token_id", self.eos_token_ids)):
            for token in ids:
                check_value(name, token, int | None)
                is_known = token is None or 0 <= token < self.vocab_size
                check(is_known, f"{name} {token} is outside the vocabulary of {self.vocab_size}; use an id inside, or None")

    @property
    def num_moe_layers(self) -> int:
        """MoE blocks of the main model."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def qk_head_dim(self) -> int:
        """Per-head width of queries and keys: H + P."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def eos_token_ids(self) -> list[int]:
        """Ids of `eos_token_id` as a list, which end a completion; empty for None."""
        if self.eos_token_id is None:
            return []
        return list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else [self.eos_token_id]

    @property
    def softmax_scale(self) -> float:
        """Factor on attention logits: (H + P)^-1/2, times the squared YaRN correction if mscale_all_dim is set and not 0."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= self.rope_scaling.attention_scale(self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def with_dtype(self, dtype: Any) -> ModelConfig:
        """Return a copy whose `dtype` (computation) and `param_dtype` (storage) are both `dtype`."""
        return dataclasses.replace(self, dtype=dtype, param_dtype=dtype)

    def with_auto_backends(self) -> ModelConfig:
        """Return a copy with the expert exchange and the expert, attention and cache backends "auto", to run on any machine."""
        return dataclasses.replace(
            self, expert_backend="auto", expert_exchange="auto", attention_backend="auto", cache_backend="auto"
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Return the model of a Hugging Face `config.json`, a dict in either spelling; see `dsv3_jax.config.hugging_face`.

        Raises:
          ValueError: naming the field, if it is missing, contradicts another, or asks for a feature that is not implemented.
        """
        fields = fields_from_hf(config, {field.name: field.default for field in dataclasses.fields(cls)})
        if fields["rope_scaling"] is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """Return the dict of the `config.json` that transformers loads this model from."""
        return fields_to_hf(dataclasses.asdict(self))
