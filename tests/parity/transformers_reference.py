"""What transformers (torch, CPU, eager attention, one expert at a time) makes of a checkpoint folder, as numpy arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV3ForCausalLM, modeling_layers, modeling_rope_utils
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.utils import logging

from tests.reference_model import Config, Tensors


def load(folder: Path, dtype: torch.dtype = torch.float32) -> DeepseekV3ForCausalLM:
    """The main model of a checkpoint; transformers leaves the MTP layers where they are, as it would tell at length."""
    torch.set_num_threads(1)  # Matrices this small gain nothing from a second, and lose much when it has to wait.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Lets transformers compute in float64 what it pins to float32: norms, router, softmax, rotary angles."""

    class Float64Torch(ModuleType):
        float32 = float = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    modules = modeling_deepseek_v3, modeling_rope_utils
    for module in modules:
        module.torch = Float64Torch("torch")
    try:
        yield
    finally:
        for module in modules:
            module.torch = torch


def forward(model: DeepseekV3ForCausalLM, tokens_BT: np.ndarray) -> dict[str, np.ndarray | list[np.ndarray]]:
    """Returns `logits` [B, T, V], `hidden_states` (L + 1 arrays), and `routes` [L_moe, B, T, K], experts ascending."""
    chosen: list[np.ndarray] = []
    routers = [m for m in model.modules() if isinstance(m, modeling_deepseek_v3.DeepseekV3TopkRouter)]
    hooks = [router.register_forward_hook(lambda _, __, out: chosen.append(out[2].numpy())) for router in routers]
    with torch.no_grad():
        out = model(torch.tensor(tokens_BT), output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    shape = len(routers), *tokens_BT.shape, model.config.num_experts_per_tok
    return {
        "logits": out.logits.numpy(),
        "hidden_states": [h.numpy() for h in out.hidden_states],
        "routes": np.sort(np.array(chosen, np.int32).reshape(shape), axis=-1),
    }


def greedy(model: DeepseekV3ForCausalLM, prompt: np.ndarray, count: int) -> list[int]:
    """The `count` tokens that follow a prompt [T], decoded with transformers' own latent cache."""
    ids = torch.tensor(prompt)[None]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def loss_and_gradients(model: DeepseekV3ForCausalLM, tokens_BT: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Mean next-token cross entropy, and its gradient by published tensor name, [out, in], experts apart."""
    model.zero_grad()
    tokens = torch.tensor(tokens_BT)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    gradients: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        gradient = np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy().copy()
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            gradients[name] = gradient
            continue
        experts, fused = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else (fused,)
        for e, one in enumerate(gradient):
            split = zip(parts, np.split(one, len(parts)), strict=True)
            gradients |= {f"{experts}.{e}.{part}.weight": array for part, array in split}
    return loss.item(), gradients


def mtp_logits(
    model: DeepseekV3ForCausalLM, config: Config, tensors: Tensors, tokens_BT: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, T - 1, V] of the first MTP depth by transformers' `MtpModel`, and the token [B] it drafts after each row.

    Its loader knows only the published number of layers, so the weights are handed over here.
    """
    mtp = modeling_layers.MtpModel(model, 1).to(model.dtype).eval()
    mtp.layers[0].load_state_dict(_mtp_state(config, tensors, config["num_hidden_layers"]))
    tokens = torch.tensor(tokens_BT)
    positions = torch.arange(1, tokens.shape[1])[None].expand(len(tokens), -1)
    with torch.no_grad():
        h_BTD = model(tokens, output_hidden_states=True, use_cache=False).hidden_states[-1][:, :-1]
        arguments = h_BTD, positions, None
        logits_BTV = model.lm_head(mtp.forward_layer(0, *arguments, input_ids=tokens[:, 1:]))
        draft_B1, *_ = mtp(tokens[:, 1:], h_BTD, None, positions, None)
    return logits_BTV.numpy(), draft_B1[:, 0].numpy()


def _mtp_state(config: Config, tensors: Tensors, index: int) -> dict[str, torch.Tensor]:
    prefix, E = f"model.layers.{index}.", config["n_routed_experts"]
    layer = {name.removeprefix(prefix): torch.tensor(array) for name, array in tensors.items() if name.startswith(prefix)}
    state = {"post_norm.weight": layer.pop("shared_head.norm.weight")}
    state |= {name: layer.pop(name) for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight")}
    experts = {
        part: torch.stack([layer.pop(f"mlp.experts.{e}.{part}.weight") for e in range(E)])
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    state["mtp_block.mlp.experts.gate_up_proj"] = torch.cat([experts["gate_proj"], experts["up_proj"]], dim=1)
    state["mtp_block.mlp.experts.down_proj"] = experts["down_proj"]
    copies = "embed_tokens.weight", "shared_head.head.weight"
    return state | {f"mtp_block.{name}": array for name, array in layer.items() if name not in copies}
