"""The table of checkpoint names against the model's own tree, and against the published checkpoint's counts."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from dsv3_jax.checkpoint.names import copies, leaves, natural_order
from dsv3_jax.config import ModelConfig, RopeScaling
from dsv3_jax.model import init_variables
from tests.checkpoint.tiny import CONFIG
from tests.parity.reference_checkpoints import tensor_shapes

_VARIANTS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "no query latent": {"q_lora_rank": None},
    "no MTP": {"num_nextn_predict_layers": 0},
    "no dense layer": {"first_k_dense_replace": 0},
    "all dense": {"first_k_dense_replace": 4, "num_nextn_predict_layers": 0},
    "no shared expert": {"n_shared_experts": 0},
}


@pytest.mark.parametrize("change", _VARIANTS.values(), ids=_VARIANTS.keys())
def test_leaves_are_the_variables_of_the_model(change: dict[str, Any]) -> None:
    config = ModelConfig.from_hf({**CONFIG, **change})
    abstract = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    expected = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract).items()}
    assert {leaf.path: leaf.shape for leaf in leaves(config)} == expected
    assert all(math.prod(leaf.stack) == len(leaf.names) for leaf in leaves(config))


@pytest.mark.parametrize("change", list(_VARIANTS.values())[:5], ids=list(_VARIANTS)[:5])
def test_names_are_the_published_ones(change: dict[str, Any]) -> None:
    file_config = {**CONFIG, **change}
    named = {name: leaf.stored for leaf in leaves(ModelConfig.from_hf(file_config)) for name in leaf.names}
    assert named == dict(tensor_shapes(file_config))


def test_counts_of_the_published_model() -> None:
    config = ModelConfig(rope_scaling=RopeScaling(), max_position_embeddings=163840)
    main = [leaf for leaf in leaves(config) if "mtp_0" not in leaf.path]
    mtp = [leaf for leaf in leaves(config) if "mtp_0" in leaf.path]
    assert sum(math.prod(leaf.shape) for leaf in main) == 671_026_419_200
    assert sum(math.prod(leaf.shape) for leaf in main if leaf.path[0] == "router") == 14_848
    stored_with_copies = sum(math.prod(leaf.shape) for leaf in mtp) + 2 * config.vocab_size * config.hidden_size
    assert stored_with_copies == 13_463_426_304
    tensors = sum(len(leaf.names) for leaf in main + mtp) + len(copies(config))
    scales = sum(len(leaf.names) for leaf in main + mtp if leaf.is_fp8)
    assert tensors + scales == 91_991


def test_copies_are_those_of_embedding_and_head() -> None:
    assert copies(ModelConfig.from_hf(CONFIG)) == {
        "model.layers.4.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.4.shared_head.head.weight": "lm_head.weight",
        "model.layers.5.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.5.shared_head.head.weight": "lm_head.weight",
    }


def test_natural_order_counts_layers() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in (2, 10) for e in (3, 20)]
    shuffled = [names[i] for i in np.random.default_rng(0).permutation(4)]
    assert sorted(shuffled, key=natural_order) == names
