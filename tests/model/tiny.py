"""A DeepSeek-V3 of a few thousand weights, every width another, and the bridge from it to the numpy oracle."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.model import DeepSeekV3, Losses, ModelOutput, init_variables, training_loss
from tests.parity.compare import published_tensors

CONFIG = ModelConfig(
    vocab_size=29,
    hidden_size=24,
    num_hidden_layers=3,
    num_nextn_predict_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=3,
    q_lora_rank=10,
    kv_lora_rank=14,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    intermediate_size=20,
    moe_intermediate_size=7,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    aux_loss_alpha=0.05,
    # Bends the frequencies within the context, with temperatures and amplitudes other than one.
    rope_scaling=RopeScaling(factor=8.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.2),
    max_position_embeddings=64,
    # Large enough that a norm with another epsilon shows; those of the latents keep 1e-6.
    rms_norm_eps=0.05,
    dtype="float32",
    attention_chunk=8,
    loss_chunk=8,
)
"""One dense and two MoE layers, two MTP depths; balance loss and YaRN large enough to be seen."""

DENSE_ONLY = dataclasses.replace(CONFIG, num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0)
MOE_ONLY = dataclasses.replace(CONFIG, num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=1)

Tree = Any


def random_variables(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, Any]:
    """Variables with activations of unit scale, norms that differ from one another, and biases as large as the scores."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _draw(rng, path, leaf), abstract_variables(config))


@functools.cache
def abstract_variables(config: ModelConfig) -> dict[str, Any]:
    """Shapes and dtypes of the variables."""
    return jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))


def _draw(rng: np.random.Generator, path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    name = path[-1].key
    if name == "scale":
        array = rng.uniform(0.6, 1.4, leaf.shape)
    elif name == "e_score_correction_bias":
        array = rng.normal(0, 0.3, leaf.shape)
    else:
        array = rng.normal(0, 1, leaf.shape) * (1 if name == "embedding" else _inputs(path, leaf.shape) ** -0.5)
    return array.astype(leaf.dtype)


def _inputs(path: tuple, shape: tuple[int, ...]) -> int:
    keys = [key.key for key in path]
    own = shape[1:] if keys[1] in ("dense_layers", "moe_layers") else shape
    if "experts" in keys:
        return own[1]
    return own[0] * own[1] if "o_proj" in keys else own[0]


def random_tokens(batch: int, length: int, config: ModelConfig = CONFIG, seed: int = 0) -> np.ndarray:
    """Token ids [batch, length], int32."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length), np.int32)


def published(config: ModelConfig) -> dict[str, Any]:
    """The configuration as the oracle reads it."""
    fields = dataclasses.asdict(config)
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {name: value for name, value in fields["rope_scaling"].items() if value is not None}
    return fields


def oracle_tensors(config: ModelConfig, variables: Tree) -> dict[str, np.ndarray]:
    """The variables as the oracle reads them: float64, under their published names."""
    return published_tensors(config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables))


def balance_by_sequence(score_BTE: np.ndarray, token_mask_BT: np.ndarray, num_chosen: int) -> float:
    """The balance loss of eqs. 17-20, a sequence and an expert at a time, without alpha."""
    losses = []
    for sequence_TE, token_mask_T in zip(score_BTE, token_mask_BT, strict=True):
        score_TE = sequence_TE[token_mask_T]
        T, E = score_TE.shape
        share_TE = score_TE / score_TE.sum(-1, keepdims=True)
        best_TK = np.argsort(-score_TE, axis=-1)[:, :num_chosen]
        losses.append(sum(E / (num_chosen * T) * np.sum(best_TK == i) * share_TE[:, i].mean() for i in range(E)))
    return float(np.mean(losses))


def assert_gradient(
    gradient: Tree, oracle: Callable[[Tree], float], point: Tree, rtol: float = 1e-4, step: float = 1e-6
) -> None:
    """Holds a gradient to central differences of a float64 oracle, along a random direction for each leaf.

    Args:
      gradient: what is tested, a tree like `point`.
      oracle: the function, in numpy.
      point: where it is differentiated.
      rtol: error allowed, relative to the norm of the leaf's gradient.
      step: half the distance of the two evaluations, per unit of direction; no choice of experts may flip within it.
    """
    rng = np.random.default_rng(7)
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), point))
    found, found_structure = jax.tree.flatten(gradient)
    assert structure == found_structure
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(point)]
    for i, (leaf, leaf_gradient) in enumerate(zip(leaves, found, strict=True)):
        assert leaf.shape == leaf_gradient.shape, paths[i]
        direction = rng.standard_normal(leaf.shape)
        above, below = (
            oracle(jax.tree.unflatten(structure, [*leaves[:i], leaf + sign * step * direction, *leaves[i + 1 :]]))
            for sign in (1, -1)
        )
        slope, expected = float(np.sum(np.asarray(leaf_gradient, np.float64) * direction)), (above - below) / (2 * step)
        size = max(float(np.linalg.norm(np.asarray(leaf_gradient, np.float64))), abs(expected), 1e-4)
        assert abs(slope - expected) <= rtol * size, f"{paths[i]}: slope {slope}, by differences {expected}"


@functools.cache
def compiled_model(config: ModelConfig = CONFIG) -> Callable[..., ModelOutput]:
    """(variables, tokens) -> everything the model can be asked for; compiled once for all test files."""
    return jax.jit(lambda variables, tokens_BT: DeepSeekV3(config).apply(variables, tokens_BT, mtp=True, hidden_states=True))


@functools.cache
def compiled_gradient(config: ModelConfig = CONFIG) -> Callable[..., tuple[Tree, Losses]]:
    """(variables, tokens, targets, lambda) -> the gradient of the training loss by parameter, and its parts."""

    def loss(params: Tree, router: Tree, *args: Any) -> tuple[jax.Array, Losses]:
        losses = training_loss(params, router, config, *args)
        return losses.loss, losses

    differentiated = jax.jit(jax.grad(loss, has_aux=True))
    return lambda variables, *args: differentiated(variables["params"], variables["router"], *args)


@functools.cache
def initialised(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Fresh variables, from a key whose kind compiles fastest."""
    return jax.jit(lambda: init_variables(config, jax.random.key(seed, impl="unsafe_rbg")))()


def perturbed(length: int, config: ModelConfig = CONFIG) -> np.ndarray:
    """Tokens [length + 1, length]: a sequence in row 0, and in row j + 1 the same one with another token at j."""
    tokens_BT = np.tile(random_tokens(1, length, config), (length + 1, 1))
    changed = np.arange(length)
    tokens_BT[changed + 1, changed] = (tokens_BT[0] + 1 + changed % (config.vocab_size - 1)) % config.vocab_size
    return tokens_BT
