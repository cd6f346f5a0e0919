"""What is served, and what the programs of generation take: arrays that have a shape and a place, and no content."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dsv3_jax.checkpoint.fp8 import EXPORT_BLOCK, scale_shape
from dsv3_jax.checkpoint.names import Leaf, leaves
from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.infer.cache import ROWS, SMALLEST_CHUNK, chunk_sizes, empty_cache, pages_for
from dsv3_jax.infer.runner import Slots, laid_out
from dsv3_jax.kernels.quantized import QuantizedArray, is_quantized
from dsv3_jax.model import abstract_variables
from dsv3_jax.model.sharding import scale_sharding, unrolled_axes
from dsv3_jax.parallel.mesh import AXES
from dsv3_jax.parallel.sharding import SERVING, named_shardings
from dsv3_jax.plan.program import device_bytes, placed

PAGE_SIZE = 128
Weights = Literal["bfloat16", "fp8"]


@dataclasses.dataclass(frozen=True)
class Serving:
    """What is to be served at a time."""

    batch: int = 128
    """Sequences that are decoded together; a multiple of mesh.data * mesh.fsdp * mesh.expert."""
    context: int = 4096
    """Tokens of each of them, which the cache has room for."""
    chunk: int = 4096
    """Tokens of a prompt that prefill works through at a time, a power of two; one prompt for each part of the batch."""
    drafts: int = 0
    """Tokens that the first MTP depth drafts a step: 0 or 1."""
    weights: Weights | None = None
    """What the weights are kept in, bfloat16 or fp8 (blocks, as published); None reports both."""

    def __post_init__(self) -> None:
        for name in ("batch", "context", "chunk"):
            check(getattr(self, name) >= 1, f"--serve.{name} is {getattr(self, name)}; it must be at least 1")
        check(self.drafts in (0, 1), f"--serve.drafts is {self.drafts}; choose 0 or 1")
        check(
            self.chunk <= self.context,
            f"--serve.chunk is {self.chunk}, more than --serve.context ({self.context}); make it that at most",
        )
        # The engine pads chunks to these.
        is_size = self.chunk in chunk_sizes(self.chunk)
        check(is_size, f"--serve.chunk is {self.chunk}; it must be a power of two from {SMALLEST_CHUNK}")

    @property
    def start(self) -> int:
        """Where the last chunk of a context begins, which costs most of all."""
        return self.context - self.chunk

    @property
    def pages_of_one(self) -> int:
        """Pages of a sequence, with room for what a step writes beyond the last token."""
        return pages_for(self.context, self.drafts, PAGE_SIZE)


class Arguments(NamedTuple):
    """What both programs take, as shapes that know where they live."""

    variables: Any
    cache: Any
    slots: Any


def abstract_arguments(config: ModelConfig, serving: Serving, mesh: Mesh | AbstractMesh) -> Arguments:
    """Variables, cache and slots of an engine on a mesh.

    Raises:
      ValueError: naming the variable, if a dimension is no multiple of the mesh axes it is split along.
    """
    make_cache = functools.partial(empty_cache, config, serving.batch * serving.pages_of_one, PAGE_SIZE)
    cache = jax.eval_shape(functools.partial(make_cache, drafting=serving.drafts > 0))
    slots = jax.eval_shape(lambda: Slots.empty(serving.batch, serving.drafts, config.vocab_size))
    variables = _placed_variables(config, mesh, serving.weights == "fp8")
    return Arguments(variables, *(by_rows(tree, mesh) for tree in (cache, slots)))


@functools.cache
def _variables(config: ModelConfig, fp8: bool) -> Any:
    """Shapes of the variables."""
    shapes = abstract_variables(config)
    if fp8:
        flat = traverse_util.flatten_dict(shapes)
        shapes = traverse_util.unflatten_dict(flat | {leaf.path: _in_blocks(leaf) for leaf in leaves(config) if leaf.is_fp8})
    return jax.eval_shape(functools.partial(laid_out, config, placement={}), shapes)


def _placed_variables(config: ModelConfig, mesh: Mesh | AbstractMesh, fp8: bool) -> Any:
    shapes = _variables(config, fp8)
    arrays = jax.tree.map(lambda leaf: leaf.values if is_quantized(leaf) else leaf, shapes, is_leaf=is_quantized)

    def place(shape: Any, sharding: NamedSharding) -> Any:
        if not isinstance(shape, QuantizedArray):
            return placed(shape, sharding)
        scale_inv: Any = placed(shape.scale_inv, scale_sharding(sharding, shape.depth))
        values: Any = placed(shape.values, sharding)
        return dataclasses.replace(shape, values=values, scale_inv=scale_inv)

    shardings = named_shardings(unrolled_axes(config), arrays, mesh, SERVING)
    return jax.tree.map(place, shapes, shardings, is_leaf=is_quantized)


def _in_blocks(leaf: Leaf) -> QuantizedArray:
    """What `load_hf` makes of an array that the published checkpoint has in FP8."""
    rows, columns = scale_shape(leaf.stored)
    values: Any = jax.ShapeDtypeStruct(leaf.shape, np.uint8)
    scale_inv: Any = jax.ShapeDtypeStruct((*leaf.stack, columns, rows), np.float32)
    return QuantizedArray(values=values, scale_inv=scale_inv, block=EXPORT_BLOCK, num_in=leaf.num_in)


def by_rows(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shapes with one row or page for each sequence, split as the batch."""
    return jax.tree.map(lambda leaf: placed(leaf, NamedSharding(mesh, ROWS)), tree)


def check_model(config: ModelConfig, serving: Serving) -> None:
    """Raises ValueError for what the model does not do on any mesh."""
    longest = config.max_position_embeddings
    check(
        serving.context <= longest,
        f"--serve.context is {serving.context}, and the model goes to {longest} tokens; lower it (and --serve.chunk)",
    )
    has_depth = config.num_nextn_predict_layers > 0
    check(has_depth or not serving.drafts, "--serve.drafts is 1, and the model has no MTP depth; set it to 0")


def check_serves(config: ModelConfig, serving: Serving, sizes: dict[str, int]) -> None:
    """Raises ValueError, naming both, where a mesh does not divide what it splits, or the model does not go so far."""
    check_model(config, serving)
    check(sizes["context"] == 1, f"mesh.context is {sizes['context']}; generation does not split sequences, use 1")
    shards = math.prod(sizes[axis] for axis in ("data", "fsdp", "expert"))
    splits = [
        ("--serve.batch", serving.batch, "mesh.data * mesh.fsdp * mesh.expert", shards),
        ("model.n_routed_experts", config.n_routed_experts, "mesh.expert", sizes["expert"]),
        ("model.num_attention_heads", config.num_attention_heads, "mesh.tensor", sizes["tensor"]),
        ("model.vocab_size", config.vocab_size, "mesh.tensor", sizes["tensor"]),
        ("model.moe_intermediate_size", config.moe_intermediate_size, "mesh.tensor", sizes["tensor"]),
        ("model.intermediate_size", config.intermediate_size, "mesh.tensor", sizes["tensor"]),
    ]
    for name, size, axes, places in splits:
        check(size % places == 0, f"{name} is {size}, which {axes} ({places}) does not divide; change one of them")


def smallest_mesh(config: ModelConfig, serving: Serving, devices: int) -> MeshConfig:
    """The mesh expert x tensor on which a device holds fewest bytes, and so reads fewest in a step.

    Along `expert` dense weights are repeated, along `tensor` the cache is.

    Raises:
      ValueError: if no such mesh divides what it splits, or the model does not go so far.
    """
    check_model(config, serving)
    found = []
    for tensor in range(1, devices + 1):
        if devices % tensor == 0:
            mesh = AbstractMesh((1, 1, devices // tensor, 1, tensor), AXES)
            try:
                check_serves(config, serving, dict(mesh.shape))
                found.append((device_bytes(abstract_arguments(config, serving, mesh)), tensor))
            except ValueError:
                continue
    if not found:
        raise ValueError(
            f"no mesh expert x tensor of {devices} devices divides --serve.batch ({serving.batch}), experts, heads and widths; "
            "name one by --mesh.data, --mesh.expert and --mesh.tensor"
        )
    return MeshConfig(expert=devices // min(found)[1], tensor=min(found)[1])
