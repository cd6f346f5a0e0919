"""Temporary memory of one layer, forward and backward, at the published widths, by backend; needs no TPU.

    python benchmarks/layer_memory.py [--topology v5p:2x2x1] [--length 4096] [--experts 256]

Prints one JSON line for each kind of layer and backend. The layer is compiled for one device of the topology, with one
sequence and parameters in bfloat16, and nothing in it is computed again; `temporary_bytes` excludes its inputs and outputs.
Where the compiler refuses a program, it has `refused` instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import SingleDeviceSharding
from machine import machine

from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.config.cli import load_config
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.rope import rope_angles
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.plan.topology import tpu_devices

LAYERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "attention": ("attention_backend", ("chunked", "splash")),
    "moe": ("expert_backend", ("ragged_dot", "tiles", "pallas_tpu")),
}
"""The field of the config that chooses, and its values."""


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:2x2x1", help="topology to compile for")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the sequence")
    parser.add_argument("--experts", type=int, default=256, help="routed experts of the layer")
    flags = parser.parse_args()
    device = tpu_devices(flags.topology)[0]
    published = dataclasses.replace(
        load_config(str(pathlib.Path(__file__).parent.parent / "configs" / "v3_671b.py")).model,
        n_routed_experts=flags.experts,
        max_position_embeddings=flags.length,
        param_dtype="bfloat16",
    )
    for layer, (field, backends) in LAYERS.items():
        for backend in backends:
            where = {"benchmark": "layer_memory", "topology": flags.topology, "layer": layer, "backend": backend}
            config = dataclasses.replace(published, **{field: backend})
            print(json.dumps(where | memory(layer, config, flags.length, device) | machine()), flush=True)


def memory(layer: str, config: ModelConfig, length: int, device: Any) -> dict[str, Any]:
    """Bytes of one layer's forward and backward pass on `device`."""

    def apply(config: ModelConfig, variables: Any, x_BTD: jax.Array) -> jax.Array:
        if layer == "moe":
            return MoE(config).apply(variables, x_BTD)[0]
        return MLA(config).apply(variables, x_BTD, rope_angles(config, jnp.arange(length)[None]))[0]

    def gradients(variables: Any, x_BTD: jax.Array, dy_BTD: jax.Array) -> Any:
        others = {name: tree for name, tree in variables.items() if name != "params"}
        y_BTD, pullback = jax.vjp(lambda params, x: apply(config, others | {"params": params}, x), variables["params"], x_BTD)
        return y_BTD, pullback(dy_BTD)

    def init() -> Any:
        plain = dataclasses.replace(config, attention_backend="chunked", expert_backend="tiles")
        x_BTD = jnp.zeros((1, 1, config.hidden_size), config.dtype)
        module = MoE(plain) if layer == "moe" else MLA(plain)
        more = () if layer == "moe" else (rope_angles(plain, jnp.arange(1)[None]),)
        return nn.meta.unbox(module.init(jax.random.key(0), x_BTD, *more))

    on_device = SingleDeviceSharding(device)
    x_BTD = jax.ShapeDtypeStruct((1, length, config.hidden_size), config.dtype, sharding=on_device)
    variables = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on_device), jax.eval_shape(init))
    with jax.set_mesh(make_mesh(MeshConfig(), [device])):
        lowered = jax.jit(gradients).lower(variables, x_BTD, x_BTD)
        try:
            found = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            return {"refused": str(error)[:200]}
    return {"temporary_bytes": found.temp_size_in_bytes, "argument_bytes": found.argument_size_in_bytes}


if __name__ == "__main__":
    main()
