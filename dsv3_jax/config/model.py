"""The architecture as one frozen dataclass that refuses contradictions when it is built.

`ModelConfig` keeps the names of the Hugging Face `config.json`, so the two can be laid side by side; its
defaults are the published DeepSeek-V3 (arXiv 2412.19437, section 4.2). The docstring under a field is its
documentation and its `--help`.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any, Literal

import jax.numpy as jnp

from dsv3_jax.config.checks import check, check_numbers, check_positive

# ----------------------------------------------------------------------------------------------------------------------
# YaRN's numbers, as the `rope_scaling` of a Hugging Face config names them.


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN context extension (arXiv 2309.00071; section 4.3 of the report). Static: it applies at every length."""

    factor: float = 40.0
    """By how much the context is stretched."""
    original_max_position_embeddings: int = 4096
    """Context length before stretching."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this within the original context are left alone."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are interpolated in full."""
    mscale: float | None = 1.0
    """Scales cos and sin, relative to mscale_all_dim; None if the checkpoint does not name it."""
    mscale_all_dim: float | None = 1.0
    """Scales the attention logits (squared); 0 or None leaves them alone."""

    def __post_init__(self) -> None:
        check_numbers(self, "rope_scaling.")
        check(self.factor >= 1.0, f"rope_scaling.factor is {self.factor}; it must be at least 1")
        check_positive(self, "original_max_position_embeddings")
        check(
            self.beta_fast >= self.beta_slow > 0,
            f"rope_scaling.beta_fast ({self.beta_fast}) must be at least beta_slow ({self.beta_slow}), which must be positive",
        )

    def attention_scale(self, mscale: float | None) -> float:
        """0.1 * mscale * ln(factor) + 1: the temperature correction of YaRN, eq. 22."""
        return 0.1 * (1.0 if mscale is None else mscale) * math.log(self.factor) + 1.0


RematPolicy = Literal["none", "save_latents", "full"]
ExpertBackend = Literal["auto", "pallas_tpu", "pallas_gpu", "tiles", "ragged_dot", "reference"]
ExpertExchange = Literal["auto", "ragged", "dense", "all_gather"]
FORMER_EXCHANGES = {"ring": "all_gather"}
"""Names of exchanges until version 0.1, accepted wherever one is read."""
AttentionBackend = Literal["auto", "splash", "pallas_gpu", "chunked"]
CacheBackend = Literal["auto", "pallas_tpu", "pallas_gpu", "chunked"]
_NAMED = {
    "remat": RematPolicy,
    "expert_backend": ExpertBackend,
    "expert_exchange": ExpertExchange,
    "attention_backend": AttentionBackend,
    "cache_backend": CacheBackend,
}


def _dtype_name(field: str, dtype: Any) -> str:
    try:
        # To numpy None is float64.
        name: Any = dtype if dtype is None or isinstance(dtype, str) else jnp.dtype(dtype).name
    except (TypeError, ValueError):
        name = dtype
    check(
        name in ("float32", "bfloat16", "float16", "float64"),
        f"{field} is {name!r}; choose float32, bfloat16, float16 or float64",
    )
    return name


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture. Every field but those under "How it is computed" has its Hugging Face name."""

    vocab_size: int = 129280
    """Rows of the embedding and columns of the head."""
    hidden_size: int = 7168
    """Width of the residual stream (D)."""
    num_hidden_layers: int = 61
    """Decoder blocks of the main model, dense and MoE."""
    num_nextn_predict_layers: int = 1
    """Multi-token-prediction depths; 0 for none."""
    first_k_dense_replace: int = 3
    """Blocks from the bottom that keep a dense FFN."""

    num_attention_heads: int = 128
    """Attention heads (N)."""
    q_lora_rank: int | None = 1536
    """Width of the query latent (Q); None projects queries directly."""
    kv_lora_rank: int = 512
    """Width of the key-value latent (C): what the cache holds beside the rotary key."""
    qk_nope_head_dim: int = 128
    """Per-head query/key dims without position (H)."""
    qk_rope_head_dim: int = 64
    """Per-head query dims with rotary position, and the one shared rotary key (P); even."""
    v_head_dim: int = 128
    """Per-head value dims (W)."""

    intermediate_size: int = 18432
    """Hidden width of the dense FFN."""
    moe_intermediate_size: int = 2048
    """Hidden width of one expert (F)."""
    n_routed_experts: int = 256
    """Routed experts (E)."""
    n_shared_experts: int = 1
    """Experts every token visits; together one SwiGLU of width n_shared_experts * moe_intermediate_size."""
    num_experts_per_tok: int = 8
    """Routed experts a token visits (K)."""
    n_group: int = 8
    """Groups (G) of consecutive experts; a token stays within topk_group of them."""
    topk_group: int = 4
    """Groups a token may draw its experts from."""
    norm_topk_prob: bool = True
    """Whether the K gate values are normalised to sum to one before scaling."""
    routed_scaling_factor: float = 2.5
    """Factor on the routed experts' weights."""
    aux_loss_alpha: float = 1e-4
    """Weight alpha of the sequence-wise balance loss (eq. 17); trained with 1e-4, though the published file says 1e-3."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """YaRN, or None for plain rotary embedding."""
    max_position_embeddings: int = 4096
    """Longest sequence the model accepts, in tokens."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm (the latent norms are fixed at 1e-6, as in the reference)."""
    initializer_range: float = 0.006
    """Standard deviation of the initial weights."""
    bos_token_id: int | None = 0
    """Id that opens a document."""
    eos_token_id: int | tuple[int, ...] | None = 1
    """Id (or ids) that end a completion; the first one separates training documents."""

    # How it is computed.
    dtype: str = "bfloat16"
    """Computation dtype; router logits, softmax, norms and losses are float32 whatever it says."""
    param_dtype: str = "float32"
    """Dtype the parameters are stored in; router biases are always float32."""
    remat: RematPolicy = "none"
    """What the backward pass recomputes: "none", all but the latents and the MoE input, or the "full" block."""
    expert_backend: ExpertBackend = "auto"
    """Implementation of the expert FFN; "auto" is chosen by platform and printed at start."""
    expert_exchange: ExpertExchange = "auto"
    """How rows travel to their experts on a mesh; "auto" is chosen by platform and printed at start."""
    receive_factor: float = 1.5
    """Rows a device receives in one round of that exchange, over the rows it sends; what does not fit takes another round."""
    attention_backend: AttentionBackend = "auto"
    """Implementation of attention in training and prefill; "auto" is chosen by platform and printed at start."""
    cache_backend: CacheBackend = "auto"
    """Implementation of attention over the cache, in decoding; "auto" is chosen by platform and printed at start."""
    attention_chunk: int = 512
    """Queries and keys per tile of the chunked attention loop; the T x S matrix is never built."""
    loss_chunk: int = 512
    """Positions of every sequence per step of the chunked cross entropy; the [B, T, V] logits never exist in training."""

    def __post_init__(self) -> None:
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, _dtype_name(name, getattr(self, name)))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if self.q_lora_rank == 0:
            object.__setattr__(self, "q_lora_rank", None)
        object.__setattr__(self, "expert_exchange", FORMER_EXCHANGES.get(self.expert_exchange, self.expert_exchange))
        self._check()

    def _check(self) -> None:
        check_numbers(self)
        check_positive(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
            "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "moe_intermediate_size",
            "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings",
            "attention_chunk", "loss_chunk",
        )  # fmt: skip
        check(
            self.q_lora_rank is None or self.q_lora_rank > 0,
            f"q_lora_rank is {self.q_lora_rank}; use a positive width, or None for a direct query projection",
        )
        check(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim is {self.qk_rope_head_dim}; rotary pairs need an even number")
        check(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace is {self.first_k_dense_replace}; it must lie in 0..num_hidden_layers",
        )
        check(self.n_shared_experts >= 0, f"n_shared_experts is {self.n_shared_experts}; it cannot be negative")
        check(
            self.num_nextn_predict_layers >= 0,
            f"num_nextn_predict_layers is {self.num_nextn_predict_layers}; it cannot be negative",
        )
        experts, groups = self.n_routed_experts, self.n_group
        check(experts % groups == 0, f"n_routed_experts ({experts}) is not a multiple of n_group ({groups})")
        check(self.topk_group <= groups, f"topk_group ({self.topk_group}) exceeds n_group ({groups})")
        check(
            groups == 1 or experts // groups >= 2,
            f"n_group ({groups}) leaves {experts // groups} expert a group; a group is scored by its best two, so it needs two",
        )
        reachable, chosen = self.topk_group * experts // groups, self.num_experts_per_tok
        kept = f"topk_group ({self.topk_group}) groups"
        check(chosen <= reachable, f"num_experts_per_tok ({chosen}) exceeds the {reachable} experts of {kept}")
        for name in ("rope_theta", "rms_norm_eps", "routed_scaling_factor", "initializer_range"):
            check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive")
        check(self.aux_loss_alpha >= 0, f"aux_loss_alpha is {self.aux_loss_alpha}; it cannot be negative")
        for name, kind in _NAMED.items():
            value, names = getattr(self, name), typing.get_args(kind)
            check(value in names, f"{name} is {value!r}; choose from {names}")
        check(self.receive_factor > 0, f"receive_factor is {self.receive_factor}; it must be positive")
        check(self.eos_token_id != (), "eos_token_id is empty; name a token id, or use None")
        for name, ids in (("bos_token_id", [self.bos_token_id]), ("eos_token_id", self.eos_token_ids)):
            for token in ids:
                check(
                    token is None or 0 <= token < self.vocab_size,
                    f"{name} {token} is outside the vocabulary of {self.vocab_size}",
                )

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
        """The ids that end a completion, as a list."""
        if self.eos_token_id is None:
            return []
        return list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else [self.eos_token_id]

    @property
    def softmax_scale(self) -> float:
        """sigma = (H + P)^-1/2, times the squared YaRN correction when mscale_all_dim asks for it."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= self.rope_scaling.attention_scale(self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def with_dtype(self, dtype: Any) -> ModelConfig:
        """The same model computing and storing in `dtype`."""
        return dataclasses.replace(self, dtype=_dtype_name("dtype", dtype), param_dtype=_dtype_name("dtype", dtype))

    def with_auto_backends(self) -> ModelConfig:
        """The same model on another machine: what its config names to compute with suits the machine it was written for."""
        return dataclasses.replace(
            self, expert_backend="auto", expert_exchange="auto", attention_backend="auto", cache_backend="auto"
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Reads the dict of a Hugging Face `config.json` with `model_type: deepseek_v3`.

        Both spellings are accepted: `rope_theta` and `rope_scaling`, or the newer `rope_parameters`; `torch_dtype`
        or `dtype`; `num_nextn_predict_layers` or `num_mtp_layers`.

        Raises:
          ValueError: naming the field, where the file asks for something the architecture here does not have.
        """
        from dsv3_jax.config import hugging_face  # It imports this class.

        return cls(**hugging_face.fields_from_hf(config))

    def to_hf(self) -> dict[str, Any]:
        """The dict of the `config.json` that transformers loads this model from."""
        from dsv3_jax.config import hugging_face

        return hugging_face.fields_to_hf(self)
