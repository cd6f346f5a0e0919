"""FP8 checkpoints kept in 8 bits: what lies on the devices, and that a model computes the same with it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec

from dsv3_jax.checkpoint.fp8 import quantise
from dsv3_jax.checkpoint.hugging_face import is_fp8, load_hf, save_hf
from dsv3_jax.config import Config, MeshConfig, ModelConfig
from dsv3_jax.infer.engine import Engine
from dsv3_jax.kernels.quantized import QuantizedArray, is_quantized
from dsv3_jax.model import DeepSeekV3, unstack, with_absorbed_weights
from dsv3_jax.model.mla import CacheMetadata
from dsv3_jax.model.sharding import place_variables, variable_shardings
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.state import state_of
from tests.checkpoint.tiny import SHARDED_CONFIG, Tensors, load, may_be_fp8, quantization_config, random_tensors, write
from tests.tolerances import TOLERANCE

# Heads are 16 wide in the queries and 18 in the keys and values: blocks of 20 rows begin in one and end in another. The edge of
# a mesh's part cuts blocks, and so do those of the matrices.
BLOCK = (20, 24)
CONFIG: dict[str, Any] = {
    **SHARDED_CONFIG,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "quantization_config": quantization_config(BLOCK),
}
TOKENS_BT = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (4, 12), np.int32)
MESHES = {
    "expert 4, tensor 2": MeshConfig(expert=4, tensor=2),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def scaled_tensors() -> Tensors:
    """Tensors that keep activations at unit scale, the published ones of them in FP8."""
    tensors = {}
    for name, tensor in random_tensors(CONFIG, np.dtype(np.float32)).items():
        tensors[name] = tensor
        if tensor.ndim == 2 and "embed" not in name:
            tensors[name] = (tensor * tensor.shape[1] ** -0.5).astype(np.float32)
        if may_be_fp8(name):
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensors[name], BLOCK)
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fp8"), scaled_tensors(), CONFIG)


def kept(folder: Path) -> dict[tuple[str, ...], Any]:
    """Every variable by its path."""
    return traverse_util.flatten_dict(load_hf(folder, keep_fp8=True)[1])


@functools.cache
def kept_on(folder: Path, sizes: str | None) -> tuple[jax.sharding.Mesh, ModelConfig, Any]:
    """A mesh, and the model on it."""
    mesh = make_mesh(MeshConfig() if sizes is None else MESHES[sizes])
    return mesh, *load_hf(folder, mesh=mesh, keep_fp8=True)


@jax.jit
def wide(variables: Any) -> Any:
    """The same with float32 arrays only."""
    return jax.tree.map(lambda v: v.astype(jnp.float32) if is_quantized(v) else v, variables, is_leaf=is_quantized)


def test_a_byte_a_value_and_a_scale_a_block(folder: Path) -> None:
    stored = load(folder / "model.safetensors")
    variables = kept(folder)
    in_8_bits = {path: variable for path, variable in variables.items() if isinstance(variable, QuantizedArray)}
    assert sum(v.values.nbytes for v in in_8_bits.values()) == sum(t.size for n, t in stored.items() if may_be_fp8(n))
    assert sum(v.scale_inv.nbytes for v in in_8_bits.values()) == sum(4 * t.size for n, t in stored.items() if "scale_inv" in n)
    whole = {"/".join(path[1:]) for path in variables.keys() - in_8_bits.keys()}
    norms = {name for name in whole if "norm" in name}
    ends = {"embed/embedding", "lm_head/kernel", "mtp_0/eh_proj/kernel"}
    gates = {
        f"{block}/mlp/gate/{name}" for block in ("moe_layers", "mtp_0/block") for name in ("kernel", "e_score_correction_bias")
    }
    assert whole == norms | ends | gates
    chex.assert_type([variables["params", *name.split("/")] for name in norms | ends], jnp.float32)


def test_the_bits_are_those_of_the_file(folder: Path) -> None:
    stored = load(folder / "model.safetensors")
    kernel = kept(folder)["params", "moe_layers", "mlp", "experts", "down_proj"]
    assert (kernel.block, kernel.num_in) == (BLOCK[::-1], 1)
    for e in range(CONFIG["n_routed_experts"]):
        name = f"model.layers.1.mlp.experts.{e}.down_proj.weight"
        np.testing.assert_array_equal(kernel.values[0, e].T, stored[name].view(np.uint8), strict=True)
        np.testing.assert_array_equal(kernel.scale_inv[0, e].T, stored[f"{name}_scale_inv"], strict=True)


def test_dequantised_they_are_what_load_hf_gives(folder: Path) -> None:
    chex.assert_trees_all_equal(wide(load_hf(folder, keep_fp8=True)[1]), load_hf(folder)[1], strict=True)


def test_on_a_mesh_values_are_split_and_scales_by_experts(folder: Path) -> None:
    mesh, config, variables = kept_on(folder, "expert 4, tensor 2")
    _, alone = load_hf(folder, keep_fp8=True)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, variables), jax.tree.map(np.asarray, alone))
    placed = place_variables(alone, config, mesh)
    assert jax.tree.map(lambda array: array.sharding, placed) == jax.tree.map(lambda array: array.sharding, variables)
    shardings = traverse_util.flatten_dict(variable_shardings(config, mesh))
    for path, variable in traverse_util.flatten_dict(variables).items():
        assert (variable.values if is_quantized(variable) else variable).sharding == shardings[path]
    experts = variables["params"]["moe_layers"]["mlp"]["experts"]["gate_proj"]
    assert experts.scale_inv.sharding.spec == PartitionSpec(None, "expert")


def logits(folder: Path, **how: Any) -> list[np.ndarray]:
    """Of the main model and of the depth, over whole sequences on one device."""
    config, variables = load_hf(folder, **how)
    output = jax.jit(functools.partial(DeepSeekV3(config).apply, mtp=True))(variables, TOKENS_BT)
    return [np.asarray(output.logits), np.asarray(output.mtp_logits[0])]


@pytest.fixture(scope="module")
def wide_logits(folder: Path) -> list[np.ndarray]:
    return logits(folder)


@pytest.fixture
def whole_logits_BTV(wide_logits: list[np.ndarray]) -> np.ndarray:
    return wide_logits[0]


def test_logits_over_whole_sequences(folder: Path, wide_logits: list[np.ndarray]) -> None:
    assert 0.3 < np.std(wide_logits[0]) < 3, "the tolerance is for values of unit size"
    chex.assert_trees_all_close(logits(folder, keep_fp8=True), wide_logits, **TOLERANCE["float32"])


@pytest.mark.parametrize("sizes", ["data 2, fsdp 2, tensor 2", pytest.param("expert 4, tensor 2", marks=pytest.mark.nightly)])
def test_logits_over_whole_sequences_on_a_mesh(folder: Path, whole_logits_BTV: np.ndarray, sizes: str) -> None:
    mesh, config, variables = kept_on(folder, sizes)
    with jax.set_mesh(mesh):
        found = jax.jit(DeepSeekV3(config).apply)(variables, TOKENS_BT).logits
    chex.assert_trees_all_close(np.asarray(found), whole_logits_BTV, **TOLERANCE["float32"])


@pytest.mark.parametrize("sizes", [pytest.param(None, marks=pytest.mark.nightly), "expert 4, tensor 2"])
def test_logits_over_a_cache(folder: Path, whole_logits_BTV: np.ndarray, sizes: str | None) -> None:
    """Nine tokens fill the cache, and three more are decoded in the absorbed form."""
    mesh, config, variables = kept_on(folder, sizes)
    variables = with_absorbed_weights(unstack(variables), config)
    model = DeepSeekV3(config, unrolled=True)

    @jax.jit
    def run(variables: Any, tokens_BT: jax.Array) -> jax.Array:
        start_B = jnp.zeros(len(tokens_BT), jnp.int32)
        _, latents = model.apply(variables, tokens_BT[:, :9], None, CacheMetadata(start_B), method="forward_cached")
        h_BTD, _ = model.apply(variables, tokens_BT[:, 9:], latents, CacheMetadata(start_B + 9), method="forward_cached")
        return model.apply(variables, h_BTD, method="head")

    with jax.set_mesh(mesh):
        found = run(variables, TOKENS_BT)
    chex.assert_trees_all_close(np.asarray(found), whole_logits_BTV[:, 9:], **TOLERANCE["float32"])


@pytest.mark.parametrize(
    "sizes", [pytest.param(None, marks=pytest.mark.slow), pytest.param("expert 4, tensor 2", marks=pytest.mark.nightly)]
)
def test_the_engine_takes_them_as_they_are(folder: Path, sizes: str | None) -> None:
    config, variables = load_hf(folder, keep_fp8=True)
    prompts = [[3, 1, 4], [2, 7]]
    expected = [c.tokens for c in Engine(config, wide(variables), max_length=16).generate(prompts)]
    engine = Engine(config, variables, max_length=16, mesh=None if sizes is None else make_mesh(MESHES[sizes]))
    assert [c.tokens for c in engine.generate(prompts)] == expected


def test_variables_of_another_model_are_refused(folder: Path) -> None:
    config, variables = load_hf(folder, keep_fp8=True)
    other = dataclasses.replace(config, moe_intermediate_size=48)
    with pytest.raises(ValueError, match=r"experts/down_proj is \[1, 8, 40, 56\], not \[1, 8, 48, 56\]"):
        Engine(other, variables)


def test_what_cannot_be_done_with_them_is_refused(folder: Path, tmp_path: Path) -> None:
    config, variables = load_hf(folder, keep_fp8=True)
    with pytest.raises(
        ValueError, match=r"load the model without keep_fp8 to write it .*: params/dense_layers/self_attn/q_a_proj/kernel"
    ):
        save_hf(tmp_path / "out", config, variables)
    with pytest.raises(ValueError, match="in FP8 cannot be trained; load the model with keep_fp8=False"):
        state_of(Config(), variables)


def test_there_has_to_be_something_to_keep(folder: Path, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", random_tensors(SHARDED_CONFIG), SHARDED_CONFIG)
    assert (is_fp8(folder), is_fp8(plain)) == (True, False)
    with pytest.raises(ValueError, match=r"plain holds no FP8 blocks .*; leave keep_fp8 out"):
        load_hf(plain, keep_fp8=True)


def test_an_array_that_is_fp8_in_some_layers_only_is_dequantised(tmp_path: Path) -> None:
    tensors = scaled_tensors()
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[f"{name}_scale_inv"]
    tensors[name] = tensors[name].astype(np.float32)
    variables = kept(write(tmp_path, tensors, CONFIG))
    experts = "params", "moe_layers", "mlp", "experts"
    assert isinstance(variables[*experts, "gate_proj"], QuantizedArray)
    np.testing.assert_array_equal(variables[*experts, "up_proj"][0, 3], tensors[name].T)
