"""The map from the arrays of the parameter tree to the tensors of a Hugging Face checkpoint.

A checkpoint stores one [out, in] matrix per layer and expert under torch's module names; the tree stores kernels
[in, out] with a separate axis for heads, stacked over layers and experts. `leaves` lists every array of the tree with the
tensors in it, in stack order; no other module knows a checkpoint name. MTP depth k (section 2.2 of the report) is
stored as layer `num_hidden_layers + k`, with copies of the embedding and the head that are shared here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from dsv3_jax.config import ModelConfig

IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""End of the names of RoPE frequencies in some files; these tensors are ignored, for they follow from the config."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the variables, and the checkpoint's tensors that are stacked in it."""

    path: tuple[str, ...]
    """Keys from the root of the variables."""
    names: tuple[str, ...]
    """Names of its tensors in the checkpoint, one for each index of `stack`, in row-major order."""
    stack: tuple[int, ...]
    """Sizes of the array's leading axes: (), (layers,), (experts,) or (layers, experts)."""
    part: tuple[int, ...]
    """Shape of the array without its stack axes, which one tensor fills: [in, out] for a matrix, heads an axis of their own."""
    stored: tuple[int, ...]
    """Shape of one tensor in the file: [out, in] for a matrix."""
    is_matrix: bool = False
    """True if the file holds it transposed: [out, in] for a kernel whose axes flatten to [in, out]."""
    is_fp8: bool = False
    """True if the published FP8 recipe quantises it (section 3.3 of the report): no embedding, head, gate or `eh_proj`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array: `stack`, then `part`."""
        return self.stack + self.part

    @property
    def num_in(self) -> int:
        """For a matrix, the number of leading axes of `part` that are inputs (the columns of the stored tensor)."""
        return next(n for n in range(len(self.part) + 1) if math.prod(self.part[:n]) == self.stored[1])

    def dtype(self, config: ModelConfig) -> np.dtype:
        """Return the dtype of the array: float32 for a router bias, `config.param_dtype` for all others."""
        return np.dtype("float32" if self.path[0] == "router" else config.param_dtype)


def leaves(config: ModelConfig) -> list[Leaf]:
    """Return a `Leaf` for every array of the variables of `config`: embedding, final norm, head, layers, MTP depths."""
    D, V, first_moe = config.hidden_size, config.vocab_size, config.first_k_dense_replace
    dense_layers = [f"model.layers.{i}" for i in range(first_moe)]
    moe_layers = [f"model.layers.{i}" for i in range(first_moe, config.num_hidden_layers)]
    found = [
        Leaf(("params", "embed", "embedding"), ("model.embed_tokens.weight",), (), (V, D), (V, D)),
        Leaf(("params", "norm", "scale"), ("model.norm.weight",), (), (D,), (D,)),
        Leaf(("params", "lm_head", "kernel"), ("lm_head.weight",), (), (D, V), (V, D), is_matrix=True),
    ]
    dense_block = [*_attention(config), *_swiglu("mlp", D, config.intermediate_size)]
    moe_block = [*_attention(config), *_moe_ffn(config)]
    for module, layers, block in (("dense_layers", dense_layers, dense_block), ("moe_layers", moe_layers, moe_block)):
        if layers:
            found += [_placed(leaf, module, layers, (len(layers),)) for leaf in block]
    for k, layer in enumerate(mtp_layers(config)):
        found += [_placed(leaf, f"mtp_{k}", [layer], ()) for leaf in _mtp_projection(config)]
        found += [_placed(leaf, f"mtp_{k}/block", [layer], ()) for leaf in moe_block]
    return found


def mtp_layers(config: ModelConfig) -> list[str]:
    """Return the names, such as `model.layers.61`, under which a checkpoint stores the MTP depths."""
    return [f"model.layers.{config.num_hidden_layers + k}" for k in range(config.num_nextn_predict_layers)]


def copies(config: ModelConfig) -> dict[str, str]:
    """Return copy -> original: names of the embedding and head that a checkpoint repeats in each MTP depth."""
    repeated = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    return {f"{layer}.{name}": original for layer in mtp_layers(config) for name, original in repeated.items()}


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts `layers.2` before `layers.10`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


# ----------------------------------------------------------------------------------------------------------------------
# One block as `Leaf`s with paths and names relative to it, not yet stacked over layers.


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


def _moe_ffn(config: ModelConfig) -> Iterator[Leaf]:
    D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    yield _kernel("mlp/gate", (D,), (E,), is_fp8=False)
    path = "mlp", "gate", "e_score_correction_bias"
    yield Leaf(("router", *path), (".".join(path),), (), (E,), (E,))
    for projection, inputs, outputs in (("gate_proj", D, F), ("up_proj", D, F), ("down_proj", F, D)):
        names = tuple(f"mlp.experts.{e}.{projection}.weight" for e in range(E))
        part, stored = (inputs, outputs), (outputs, inputs)
        yield Leaf(("params", "mlp", "experts", projection), names, (E,), part, stored, is_matrix=True, is_fp8=True)
    if config.n_shared_experts:
        yield from _swiglu("mlp/shared_experts", D, F * config.n_shared_experts)


def _mtp_projection(config: ModelConfig) -> Iterator[Leaf]:
    D = config.hidden_size
    yield _scale("enorm", D)
    yield _scale("hnorm", D)
    # Not in FP8: the inference engines that read these files expect it so.
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
    """Return `leaf` with `module` before its path, its names prefixed by each of `layers`, and `stack` before its stack."""
    collection, *path = leaf.path
    names = tuple(f"{layer}.{name}" for layer in layers for name in leaf.names)
    return dataclasses.replace(leaf, path=(collection, *module.split("/"), *path), names=names, stack=stack + leaf.stack)
