"""The tolerances of the comparison with transformers, and `dsv3_jax` seen through the names of a checkpoint."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsv3_jax import DeepSeekV3, Engine, ModelConfig, ModelOutput, SamplingParams
from tests.parity.cases import GREEDY_TOKENS

LOGITS = 5e-4
"""Absolute, float32, for logits of standard deviation about 2."""
HIDDEN_STATES = 1e-3
"""Absolute, float32."""
GRADIENT = 1e-4
"""Norm of the difference over the norm, for each tensor of the checkpoint."""
LOSS = 1e-5
"""Absolute, for a loss of about 6."""

Variables = dict[str, Any]


@functools.partial(jax.jit, static_argnames=("config", "absorbed"))
def run(config: ModelConfig, variables: Variables, tokens_BT: np.ndarray, absorbed: bool = False) -> ModelOutput:
    """The whole model, with everything it can be asked for."""
    return DeepSeekV3(config, absorbed=absorbed).apply(variables, tokens_BT, mtp=True, hidden_states=True)


def loss_and_gradients(config: ModelConfig, variables: Variables, tokens_BT: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Mean next-token cross entropy of the main logits, and its gradient by published tensor name."""

    def loss(params: Variables) -> jax.Array:
        logits_BTV = DeepSeekV3(config).apply(variables | {"params": params}, tokens_BT).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV[:, :-1], tokens_BT[:, 1:]).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(variables["params"])
    return float(value), published_tensors(config, {"params": gradient})


def cached_logits(config: ModelConfig, variables: Variables, tokens_BT: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Logits computed in pieces of those lengths, each upon the latents of the pieces before it: [B, T, V]."""
    model, capacity, start = DeepSeekV3(config), sum(pieces) + 5, pieces[0]
    prefill = jax.jit(lambda v, t: model.apply(v, t, return_intermediates=("latents",), method="features"))
    decode = jax.jit(lambda *args: model.apply(*args, method="decode"))

    features = prefill(variables, tokens_BT[:, :start])
    # Rows past the filled ones hold what must not matter.
    latents = {name: output.latents for name, output in features.outputs.items()}
    cache = jax.tree.map(lambda part: _padded(part, capacity, fill=100.0), latents)
    logits = [np.asarray(model.apply(variables, features.h_BTD, method="head"))]
    for length in pieces[1:]:
        tokens = tokens_BT[:, start : start + length]
        logits_BTV, new = decode(variables, tokens, cache, jnp.full(len(tokens), start))
        logits.append(np.asarray(logits_BTV))
        cache = jax.tree.map(lambda old, fresh, at=start: old.at[:, :, at : at + fresh.shape[2]].set(fresh), cache, new)
        start += length
    return np.concatenate(logits, axis=1)


def _padded(latents_LBSX: jax.Array, capacity: int, fill: float) -> jax.Array:
    rows = capacity - latents_LBSX.shape[2]
    return jnp.pad(latents_LBSX, ((0, 0), (0, 0), (0, rows), (0, 0)), constant_values=fill)


def greedy(config: ModelConfig, variables: Variables, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """The tokens that the engine (with these options) puts after each prompt, all of them decoded in one batch."""
    capacity = max(map(len, prompts)) + GREEDY_TOKENS
    engine = Engine(config, variables, max_batch=len(prompts), max_length=capacity, **options)
    params = SamplingParams(max_tokens=GREEDY_TOKENS, temperature=0.0)
    return [list(completion.tokens) for completion in engine.generate(prompts, params)]


def largest_difference(ours: Any, theirs: Any) -> float:
    """The largest absolute difference of two arrays of one shape."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert np.isfinite(ours).all()
    assert np.isfinite(theirs).all()
    return float(np.abs(ours - theirs).max(initial=0.0))


def gradient_errors(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """||ours - theirs|| / ||theirs|| by name; where theirs is nothing at all (an expert nobody chose), ||ours||."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    errors = {}
    for name, reference in theirs.items():
        assert ours[name].shape == reference.shape, name
        errors[name] = float(np.linalg.norm(ours[name] - reference) / (np.linalg.norm(reference) or 1.0))
    return errors


def published_tensors(config: ModelConfig, variables: Variables) -> dict[str, np.ndarray]:
    """The arrays of a tree under the names and in the layout of a checkpoint, without the copies in MTP layers.

    Written from the checkpoint's side, and on its own, so that a mistake in `dsv3_jax.checkpoint` cannot hide in it.
    """
    tensors: dict[str, np.ndarray] = {}
    for collection in jax.tree.map(np.asarray, variables).values():
        for module, tree in collection.items():
            match module.split("_"):
                case ["embed"]:
                    tensors["model.embed_tokens.weight"] = tree["embedding"]
                case ["norm"]:
                    tensors["model.norm.weight"] = tree["scale"]
                case ["lm", "head"]:
                    tensors["lm_head.weight"] = tree["kernel"].T
                case ["dense", "layers"]:
                    tensors |= _published_stack(0, config.first_k_dense_replace, tree)
                case ["moe", "layers"]:
                    tensors |= _published_stack(config.first_k_dense_replace, config.num_hidden_layers, tree)
                case ["mtp", depth]:
                    tensors |= _published_mtp(f"model.layers.{config.num_hidden_layers + int(depth)}", tree)
                case _:
                    raise AssertionError(f"unknown module {module}")
    return tensors


def _published_stack(first: int, end: int, stack: dict[str, Any]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for i in range(first, end):
        layer = jax.tree.map(lambda leaf_L, i=i: leaf_L[i - first], stack)
        tensors |= _published_module(f"model.layers.{i}", layer)
    return tensors


def _published_mtp(layer: str, depth: dict[str, Any]) -> dict[str, np.ndarray]:
    own = {("shared_head.norm" if name == "norm" else name): tree for name, tree in depth.items() if name != "block"}
    return _published_module(layer, own) | _published_module(layer, depth["block"])


def _published_module(name: str, tree: dict[str, Any]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            tensors |= _published_module(f"{name}.{key}", value)
        elif name.endswith(".experts"):
            tensors |= {f"{name}.{e}.{key}.weight": one.T for e, one in enumerate(value)}
        elif key == "kernel":
            inputs = value.shape[:2] if name.endswith("o_proj") else value.shape[:1]
            tensors[f"{name}.weight"] = value.reshape(int(np.prod(inputs)), -1).T
        elif key == "scale":
            tensors[f"{name}.weight"] = value
        else:
            tensors[f"{name}.{key}"] = value
    return tensors
