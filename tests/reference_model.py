"""DeepSeek-V3 in plain numpy, from the formulas of the paper: a reference that needs no torch.

Nothing is shared with `dsv3_jax`: the configuration is the dict of a published `config.json`, the weights are the
arrays of its safetensors under their published names, [out, in], and everything is computed in float64, one expert
and one T x S matrix at a time. `tests/parity` compares it with transformers, to 1e-9; the other tests use it.

Sections 2.1.1 (attention), 2.1.2 (router) and 2.2 (multi-token prediction) of arXiv 2412.19437.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Config = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]


class Routing(NamedTuple):
    """Decisions of the gate for every token."""

    chosen_BTK: np.ndarray
    weight_BTK: np.ndarray
    margin_BT: np.ndarray
    """Smallest difference between a chosen and a rejected expert, or group."""


class Reference(NamedTuple):
    """Logits and intermediate results of the model; L stands for the layers (of the kind in question)."""

    logits_BTV: np.ndarray
    hidden_states: list[np.ndarray]
    """The embedding, then every block's output, the last one after the final norm: L + 1 arrays [B, T, D]."""
    routings: list[Routing]
    mtp_logits: list[np.ndarray]
    """For depth k, at index k - 1: [B, T - k, V]."""

    @property
    def routes_LBTK(self) -> np.ndarray:
        """Chosen experts of the MoE layers in ascending order, so that ties do not matter."""
        return np.sort([routing.chosen_BTK for routing in self.routings], axis=-1)

    @property
    def margin(self) -> float:
        """Smallest margin of any choice of the main model."""
        return min((float(routing.margin_BT.min()) for routing in self.routings), default=math.inf)


def forward(config: Config, tensors: Tensors, tokens_BT: np.ndarray) -> Reference:
    """Run the main model and every MTP depth that has rows."""
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    h_BTD = tensors["model.embed_tokens.weight"][tokens_BT]
    hidden_states, routings = [h_BTD], []
    for i in range(config["num_hidden_layers"]):
        is_moe = i >= config["first_k_dense_replace"]
        h_BTD, routing = block(config, layer_tensors(tensors, i), h_BTD, is_moe)
        hidden_states.append(h_BTD)
        routings += [routing] if routing is not None else []
    hidden_states[-1] = h_BTD = rms_norm(h_BTD, tensors["model.norm.weight"], config["rms_norm_eps"])
    logits_BTV = h_BTD @ tensors["lm_head.weight"].T
    return Reference(logits_BTV, hidden_states, routings, mtp_logits(config, tensors, tokens_BT, h_BTD))


def mtp_logits(config: Config, tensors: Tensors, tokens_BT: np.ndarray, h_BTD: np.ndarray) -> list[np.ndarray]:
    """Return the logits of each depth k: row i joins h^{k-1} with the embedding of token i + k and predicts token i + k + 1.

    Args:
      h_BTD: h^0, the main model's state after its final norm.
    """
    logits = []
    for depth in range(1, config["num_nextn_predict_layers"] + 1):
        if tokens_BT.shape[1] <= depth:
            break
        layer = layer_tensors(tensors, config["num_hidden_layers"] + depth - 1)
        ahead_BTD = tensors["model.embed_tokens.weight"][tokens_BT[:, depth:]]
        joined = [
            rms_norm(ahead_BTD, layer["enorm.weight"], config["rms_norm_eps"]),
            rms_norm(h_BTD[:, : ahead_BTD.shape[1]], layer["hnorm.weight"], config["rms_norm_eps"]),
        ]
        h_BTD, _ = block(config, layer, np.concatenate(joined, axis=-1) @ layer["eh_proj.weight"].T, is_moe=True)
        normed_BTD = rms_norm(h_BTD, layer["shared_head.norm.weight"], config["rms_norm_eps"])
        logits.append(normed_BTD @ tensors["lm_head.weight"].T)
    return logits


def layer_tensors(tensors: Tensors, index: int) -> dict[str, np.ndarray]:
    """Return the tensors of one layer, without the prefix `model.layers.{index}.`."""
    prefix = f"model.layers.{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def block(config: Config, layer: Tensors, h_BTD: np.ndarray, is_moe: bool) -> tuple[np.ndarray, Routing | None]:
    """h += Attention(norm(h)); h += FFN(norm(h))."""
    eps = config["rms_norm_eps"]
    h_BTD = h_BTD + attention(config, layer, rms_norm(h_BTD, layer["input_layernorm.weight"], eps))
    x_BTD = rms_norm(h_BTD, layer["post_attention_layernorm.weight"], eps)
    if not is_moe:
        return h_BTD + swiglu(layer, "mlp", x_BTD), None
    routing = route(config, layer, x_BTD)
    return h_BTD + experts(config, layer, x_BTD, routing), routing


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def swiglu(layer: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    gate = x @ layer[f"{name}.gate_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ layer[f"{name}.up_proj.weight"].T)) @ layer[f"{name}.down_proj.weight"].T


# --- Attention -------------------------------------------------------------------------------------------------------


def attention(config: Config, layer: Tensors, x_BTD: np.ndarray) -> np.ndarray:
    """Return multi-head latent attention in the materialised form, with the keys and values of every head."""
    B, T, _ = x_BTD.shape
    N, H, C = config["num_attention_heads"], config["qk_nope_head_dim"], config["kv_lora_rank"]
    query_in, query_proj = x_BTD, "q_proj"
    if config["q_lora_rank"]:
        latent_BTQ = x_BTD @ layer["self_attn.q_a_proj.weight"].T
        query_in, query_proj = rms_norm(latent_BTQ, layer["self_attn.q_a_layernorm.weight"], 1e-6), "q_b_proj"
    q_BTNX = (query_in @ layer[f"self_attn.{query_proj}.weight"].T).reshape(B, T, N, -1)
    joint_BTX = x_BTD @ layer["self_attn.kv_a_proj_with_mqa.weight"].T
    latent_BSC = rms_norm(joint_BTX[..., :C], layer["self_attn.kv_a_layernorm.weight"], 1e-6)
    kv_BSNX = (latent_BSC @ layer["self_attn.kv_b_proj.weight"].T).reshape(B, T, N, -1)

    angles = rotary_angles(config, T)
    q_rotated_BTNP = apply_rope(q_BTNX[..., H:], angles)
    k_rotated_BSP = apply_rope(joint_BTX[..., None, C:], angles)[:, :, 0]
    score_BNTS = np.einsum("BTNH,BSNH->BNTS", q_BTNX[..., :H], kv_BSNX[..., :H])
    score_BNTS = softmax_scale(config) * (score_BNTS + np.einsum("BTNP,BSP->BNTS", q_rotated_BTNP, k_rotated_BSP))
    score_BNTS = np.where(np.tri(T, dtype=bool), score_BNTS, -np.inf)
    weight_BNTS = np.exp(score_BNTS - score_BNTS.max(-1, keepdims=True))
    weight_BNTS /= weight_BNTS.sum(-1, keepdims=True)
    o_BTNW = np.einsum("BNTS,BSNW->BTNW", weight_BNTS, kv_BSNX[..., H:])
    return o_BTNW.reshape(B, T, -1) @ layer["self_attn.o_proj.weight"].T


def softmax_scale(config: Config) -> float:
    """Return (H + P)^-1/2, under YaRN times the square of its temperature."""
    scaling = config["rope_scaling"] or {}
    width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    return width**-0.5 * temperature(scaling, scaling.get("mscale_all_dim", 0)) ** 2


def temperature(scaling: Config, mscale: float) -> float:
    return 0.1 * mscale * math.log(scaling.get("factor", 1)) + 1


def rotary_angles(config: Config, length: int) -> np.ndarray:
    """Return the complex factors of the rotary pairs, by position and pair, scaled under YaRN: [T, P / 2]."""
    P, theta, scaling = config["qk_rope_head_dim"], config["rope_theta"], config["rope_scaling"]
    pair = np.arange(P // 2)
    frequency, amplitude = theta ** (-2 * pair / P), 1.0
    if scaling:
        original = scaling["original_max_position_embeddings"]
        edges = np.array([scaling["beta_fast"], scaling["beta_slow"]])
        low, high = P * np.log(original / (2 * math.pi * edges)) / (2 * math.log(theta))
        low, high = max(math.floor(low), 0), min(math.ceil(high), P - 1)
        ramp = np.clip((pair - low) / (high - low or 0.001), 0, 1)
        frequency = frequency * (1 - ramp) + frequency / scaling["factor"] * ramp
        stated = [scaling.get("mscale"), scaling.get("mscale_all_dim")]
        above, below = (temperature(scaling, m) for m in (stated if all(stated) else (1, 0)))
        amplitude = above / below
    return amplitude * np.exp(1j * np.arange(length)[:, None] * frequency)


def apply_rope(x_BTNP: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotate the neighbouring pairs (0, 1), (2, 3), ... as complex numbers."""
    turned = (x_BTNP[..., 0::2] + 1j * x_BTNP[..., 1::2]) * angles[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x_BTNP.shape)


# --- Mixture of experts ----------------------------------------------------------------------------------------------


def route(config: Config, layer: Tensors, x_BTD: np.ndarray) -> Routing:
    """Choose K experts by biased score within the best groups, and weight them by the plain score."""
    score_BTE = 1 / (1 + np.exp(-(x_BTD @ layer["mlp.gate.weight"].T)))
    choice_BTE = score_BTE + layer["mlp.gate.e_score_correction_bias"]
    choice_BTGe = choice_BTE.reshape(*choice_BTE.shape[:-1], config["n_group"], -1)
    kept_BTG, group_margin_BT = top(group_score(choice_BTGe), config["topk_group"])
    is_kept_BTG = (kept_BTG[..., None] == np.arange(config["n_group"])).any(-2)
    choice_BTE = drop_groups(choice_BTGe, is_kept_BTG).reshape(choice_BTE.shape)
    chosen_BTK, margin_BT = top(choice_BTE, config["num_experts_per_tok"])
    weight_BTK = np.take_along_axis(score_BTE, chosen_BTK, -1)
    if config["norm_topk_prob"]:
        weight_BTK = weight_BTK / (weight_BTK.sum(-1, keepdims=True) + 1e-20)
    return Routing(chosen_BTK, weight_BTK * config["routed_scaling_factor"], np.minimum(margin_BT, group_margin_BT))


def group_score(choice_BTGe: np.ndarray) -> np.ndarray:
    """Return the sum of a group's best two."""
    return np.sort(choice_BTGe, axis=-1)[..., -2:].sum(-1)


def drop_groups(choice_BTGe: np.ndarray, is_kept_BTG: np.ndarray) -> np.ndarray:
    return np.where(is_kept_BTG[..., None], choice_BTGe, -np.inf)


def top(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the `count` largest, best first, and the margin of the last one over the next."""
    order = np.argsort(-values, axis=-1, kind="stable")
    if count == values.shape[-1]:
        return order, np.full(values.shape[:-1], np.inf)
    edge = np.take_along_axis(values, order[..., count - 1 : count + 1], -1)
    return order[..., :count], edge[..., 0] - edge[..., 1]


def experts(config: Config, layer: Tensors, x_BTD: np.ndarray, routing: Routing) -> np.ndarray:
    """Return sum_k w_k E_k(x) + Shared(x)."""
    y_BTD = swiglu(layer, "mlp.shared_experts", x_BTD) if config["n_shared_experts"] else np.zeros_like(x_BTD)
    for e in range(config["n_routed_experts"]):
        weight_BT = np.where(routing.chosen_BTK == e, routing.weight_BTK, 0).sum(-1)
        here = weight_BT != 0
        y_BTD[here] += weight_BT[here, None] * swiglu(layer, f"mlp.experts.{e}", x_BTD[here])
    return y_BTD
