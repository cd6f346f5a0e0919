"""Which tensors of a Hugging Face checkpoint make up which array of the parameter tree.

A checkpoint stores one [out, in] matrix per layer and expert under torch's module names; the tree stores kernels
[in, out] with heads apart, stacked over layers and experts. `leaves` lists every array of the tree with the tensors
in it, in stack order; nothing else in the project knows a checkpoint name. MTP depth k (section 2.2 of the report) is
stored as layer `num_hidden_layers + k`, with copies of the embedding and the head that are shared here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from dsv3_jax.config import ModelConfig

IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Frequencies that some files carry; they follow from the config."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the tree, and the tensors stacked in it."""

    path: tuple[str, ...]
    """Keys from the root of the variables."""
    names: tuple[str, ...]
    """The tensors, one for each index of `stack`, in row-major order."""
    stack: tuple[int, ...]
    """Leading axes: (), (layers,), (experts,) or (layers, experts)."""
    part: tuple[int, ...]
    """Shape of one tensor's part of the array."""
    stored: tuple[int, ...]
    """Shape of one tensor in the file."""
    is_matrix: bool = False
    """Whether the file holds it transposed: [out, in] for a kernel whose axes flatten to [in, out]."""
    is_fp8: bool = False
    """Whether the published FP8 recipe quantises it (section 3.3 of the report): neither embedding, head nor gate."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.stack + self.part

    @property
    def num_in(self) -> int:
        """Of a matrix: how many of the axes of `part` are inputs, columns of the file."""
        return next(n for n in range(len(self.part) + 1) if math.prod(self.part[:n]) == self.stored[1])

    @property
    def is_bias(self) -> bool:
        """Whether it is a router bias, float32 whatever the other parameters are."""
        return self.path[0] == "router"

    def dtype(self, config: ModelConfig) -> np.dtype:
        """Type of the array."""
        return np.dtype("float32" if self.is_bias else config.param_dtype)


def leaves(config: ModelConfig) -> list[Leaf]:
    """Every array of the variables of `config`."""
    D, V, first_moe = config.hidden_size, config.vocab_size, config.first_k_dense_replace
    dense_layers = [f"model.layers.{i}" for i in range(first_moe)]
    moe_layers = [f"model.layers.{i}" for i in range(first_moe, config.num_hidden_layers)]
    found = [
        Leaf(("params", "embed", "embedding"), ("model.embed_tokens.weight",), (), (V, D), (V, D)),
        Leaf(("params", "norm", "scale"), ("model.norm.weight",), (), (D,), (D,)),
        Leaf(("params", "lm_head", "kernel"), ("lm_head.weight",), (), (D, V), (V, D), is_matrix=True),
    ]
    dense_block = [*_attention(config), *_dense_ffn(config)]
    moe_block = [*_attention(config), *_moe_ffn(config)]
    if dense_layers:
        found += [_placed(leaf, "dense_layers", dense_layers, (len(dense_layers),)) for leaf in dense_block]
    if moe_layers:
        found += [_placed(leaf, "moe_layers", moe_layers, (len(moe_layers),)) for leaf in moe_block]
    for k, layer in enumerate(mtp_layers(config)):
        found += [_placed(leaf, f"mtp_{k}", [layer], ()) for leaf in _mtp_projection(config)]
        found += [_placed(leaf, f"mtp_{k}/block", [layer], ()) for leaf in moe_block]
    return found


def mtp_layers(config: ModelConfig) -> list[str]:
    """Module names of the MTP depths in a checkpoint."""
    return [f"model.layers.{config.num_hidden_layers + k}" for k in range(config.num_nextn_predict_layers)]


def copies(config: ModelConfig) -> dict[str, str]:
    """The tensors of the MTP depths that repeat one of the main model: copy -> original."""
    repeated = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    return {f"{layer}.{name}": original for layer in mtp_layers(config) for name, original in repeated.items()}


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts `layers.2` before `layers.10`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


# Below: one block as `Leaf`s whose path and names are relative to it, not yet stacked over layers.


def _attention(config: ModelConfig) -> Iterator[Leaf]:
    D, N, C, P = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    yield _scale("input_layernorm", D)
    yield _scale("post_attention_layernorm", D)
    if config.q_lora_rank is None:
        yield _kernel("self_attn/q_proj", (D,), (N, config.qk_head_dim))
    else:
        yield _kernel("self_attn/q_a_proj", (D,), (config.q_lora_rank,))
        yield _scale("self_attn/q_a_layernorm", config.q_lora_rank)
        yield _kernel("self_attn/q_b_proj", (config.q_lora_rank,), (N, config.qk_head_dim))
    yield _kernel("self_attn/kv_a_proj_with_mqa", (D,), (C + P,))
    yield _scale("self_attn/kv_a_layernorm", C)
    yield _kernel("self_attn/kv_b_proj", (C,), (N, config.qk_nope_head_dim + config.v_head_dim))
    yield _kernel("self_attn/o_proj", (N, config.v_head_dim), (D,))


def _dense_ffn(config: ModelConfig) -> Iterator[Leaf]:
    yield from _swiglu("mlp", config.hidden_size, config.intermediate_size)


def _moe_ffn(config: ModelConfig) -> Iterator[Leaf]:
    D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    yield _kernel("mlp/gate", (D,), (E,), is_fp8=False)
    bias = "mlp/gate/e_score_correction_bias"
    yield Leaf(("router", *bias.split("/")), (bias.replace("/", "."),), (), (E,), (E,))
    for projection, inputs, outputs in (("gate_proj", D, F), ("up_proj", D, F), ("down_proj", F, D)):
        names = tuple(f"mlp.experts.{e}.{projection}.weight" for e in range(E))
        path = ("params", "mlp", "experts", projection)
        yield Leaf(path, names, (E,), (inputs, outputs), (outputs, inputs), is_matrix=True, is_fp8=True)
    if config.n_shared_experts:
        yield from _swiglu("mlp/shared_experts", D, F * config.n_shared_experts)


def _mtp_projection(config: ModelConfig) -> Iterator[Leaf]:
    D = config.hidden_size
    yield _scale("enorm", D)
    yield _scale("hnorm", D)
    # The inference engines that read these files keep it out of FP8.
    yield _kernel("eh_proj", (2 * D,), (D,), is_fp8=False)
    yield dataclasses.replace(_scale("norm", D), names=("shared_head.norm.weight",))


def _swiglu(module: str, width: int, hidden: int) -> Iterator[Leaf]:
    yield _kernel(f"{module}/gate_proj", (width,), (hidden,))
    yield _kernel(f"{module}/up_proj", (width,), (hidden,))
    yield _kernel(f"{module}/down_proj", (hidden,), (width,))


def _kernel(module: str, inputs: tuple[int, ...], outputs: tuple[int, ...], is_fp8: bool = True) -> Leaf:
    path = ("params", *module.split("/"), "kernel")
    stored = (math.prod(outputs), math.prod(inputs))
    return Leaf(path, (f"{module.replace('/', '.')}.weight",), (), inputs + outputs, stored, is_matrix=True, is_fp8=is_fp8)


def _scale(module: str, width: int) -> Leaf:
    return Leaf(("params", *module.split("/"), "scale"), (f"{module.replace('/', '.')}.weight",), (), (width,), (width,))


def _placed(leaf: Leaf, module: str, layers: list[str], stack: tuple[int, ...]) -> Leaf:
    """`leaf` under a module of the tree, stacked over those layers of the checkpoint."""
    collection, *path = leaf.path
    names = tuple(f"{layer}.{name}" for layer in layers for name in leaf.names)
    return dataclasses.replace(leaf, path=(collection, *module.split("/"), *path), names=names, stack=stack + leaf.stack)
