"""Prefill and decode compiled for devices that need not exist: best mesh, memory, least time (`plan --mode serve`)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json as json_format
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dsv3_jax.checkpoint.fp8 import EXPORT_BLOCK, scale_shape
from dsv3_jax.checkpoint.names import Leaf, leaves
from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.config.checks import Bound, PositiveInt, check, check_fields
from dsv3_jax.infer.cache import ROWS, SMALLEST_CHUNK, bytes_per_token, chunk_sizes, empty_cache, num_shards, pages_for
from dsv3_jax.infer.runner import Chunks, Slots, decode, laid_out, models, on_mesh, prefill
from dsv3_jax.kernels.experts import choose_backend
from dsv3_jax.kernels.quantized import QuantizedArray, is_quantized
from dsv3_jax.model import abstract_variables
from dsv3_jax.model.mla import expanding_pays
from dsv3_jax.model.sharding import scale_sharding, unrolled_axes
from dsv3_jax.parallel.devices import Chip
from dsv3_jax.parallel.mesh import AXES, current_platform, describe
from dsv3_jax.parallel.sharding import SERVING, named_shardings
from dsv3_jax.plan.program import GIB, PROVES, Compiled, compile_for, rows_sent
from dsv3_jax.plan.tables import amount, print_memory
from dsv3_jax.plan.topology import device_bytes, device_values, gathered, mesh_of_all, named_leaves, placed

PAGE_SIZE = 128
Weights = Literal["bfloat16", "fp8"]
FORMATS: tuple[Weights, ...] = ("bfloat16", "fp8")


@dataclasses.dataclass(frozen=True)
class Serving:
    """Load that the plan is for (--serve.*): sequences and their lengths, drafts, format of the weights."""

    batch: PositiveInt = 128
    """Sequences decoded together on all devices; a multiple of mesh.data * mesh.fsdp * mesh.expert."""
    context: PositiveInt = 4096
    """Tokens per sequence that the cache has room for."""
    chunk: PositiveInt = 4096
    """Tokens of a prompt per prefill step, a power of two; each of data * fsdp * expert parts prefills one prompt."""
    drafts: Annotated[int, Bound(lambda value: value in (0, 1), "choose 0 or 1")] = 0
    """Tokens that the first MTP depth drafts a step: 0 or 1."""
    weights: Weights | None = None
    """Format of the weights, bfloat16 or fp8 (blocks, as published); None reports both."""

    def __post_init__(self) -> None:
        check_fields(self, "--serve.")
        given = f"--serve.chunk is {self.chunk}"
        check(self.chunk <= self.context, f"{given}, more than --serve.context ({self.context}); lower it or raise the latter")
        # The engine pads chunks to these.
        check(self.chunk in chunk_sizes(self.chunk), f"{given}; it must be a power of two from {SMALLEST_CHUNK}")

    @property
    def start(self) -> int:
        """Tokens in the cache before the last, and most expensive, prefill chunk of a context."""
        return self.context - self.chunk

    @property
    def pages_of_one(self) -> int:
        """Cache pages of one sequence of `context` tokens and of the positions that a step writes beyond them."""
        return pages_for(self.context, self.drafts, PAGE_SIZE)


# ----------------------------------------------------------------------------------------------------------------------
# Abstract arguments of the programs.


class Arguments(NamedTuple):
    """Arguments that prefill and decode have in common, as abstract arrays on a mesh."""

    variables: Any
    cache: Any
    slots: Any


def abstract_arguments(config: ModelConfig, serving: Serving, mesh: Mesh | AbstractMesh) -> Arguments:
    """Return the variables, cache and slots of an engine as abstract arrays on a mesh; nothing is allocated.

    Raises:
      ValueError: naming the variable, if a dimension is no multiple of the mesh axes it is split along.
    """
    num_pages, drafting = serving.batch * serving.pages_of_one, serving.drafts > 0
    cache = jax.eval_shape(functools.partial(empty_cache, config, num_pages, PAGE_SIZE, drafting=drafting))
    slots = jax.eval_shape(lambda: Slots.empty(serving.batch, serving.drafts, config.vocab_size))
    shapes = _variables(config, serving.weights == "fp8")
    values = jax.tree.map(lambda leaf: leaf.values if is_quantized(leaf) else leaf, shapes, is_leaf=is_quantized)

    def place(shape: Any, sharding: NamedSharding) -> Any:
        if not is_quantized(shape):
            return placed(shape, sharding)
        scale_inv = placed(shape.scale_inv, scale_sharding(sharding, shape.depth))
        return dataclasses.replace(shape, values=placed(shape.values, sharding), scale_inv=scale_inv)

    shardings = named_shardings(unrolled_axes(config), values, mesh, SERVING)
    variables = jax.tree.map(place, shapes, shardings, is_leaf=is_quantized)
    return Arguments(variables, by_rows(cache, mesh), by_rows(slots, mesh))


@functools.cache
def _variables(config: ModelConfig, fp8: bool) -> Any:
    """Return the variables as shapes, laid out for the programs (`laid_out`), with `fp8` those in FP8 blocks as published."""
    shapes = abstract_variables(config)
    if fp8:
        flat = traverse_util.flatten_dict(shapes)
        shapes = traverse_util.unflatten_dict(flat | {leaf.path: _in_blocks(leaf) for leaf in leaves(config) if leaf.is_fp8})
    return jax.eval_shape(functools.partial(laid_out, config, placement={}), shapes)


def _in_blocks(leaf: Leaf) -> QuantizedArray:
    """Return the shapes of the `QuantizedArray` that `load_hf` makes of a weight published in FP8."""
    rows, columns = scale_shape(leaf.stored)
    values: Any = jax.ShapeDtypeStruct(leaf.shape, np.uint8)
    scale_inv: Any = jax.ShapeDtypeStruct((*leaf.stack, columns, rows), np.float32)
    return QuantizedArray(values=values, scale_inv=scale_inv, block=EXPORT_BLOCK, num_in=leaf.num_in)


def by_rows(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return a tree of abstract arrays with their first axis (sequences or pages) split over the batch axes of `mesh`."""
    return jax.tree.map(lambda leaf: placed(leaf, NamedSharding(mesh, ROWS)), tree)


# ----------------------------------------------------------------------------------------------------------------------
# Meshes: checks, and the mesh that takes the least memory.


def check_serves(config: ModelConfig, serving: Serving, sizes: dict[str, int]) -> None:
    """Raise ValueError if mesh axes of these sizes do not divide batch or model, or the model lacks the context or drafts."""
    longest, context = config.max_position_embeddings, f"--serve.context is {serving.context}"
    check(serving.context <= longest, f"{context}, and the model goes to {longest} tokens; lower it (and --serve.chunk)")
    has_depth = config.num_nextn_predict_layers > 0
    check(has_depth or not serving.drafts, "--serve.drafts is 1, and the model has no MTP depth; set it to 0")
    check(sizes["context"] == 1, f"mesh.context is {sizes['context']}; generation does not split sequences, use 1")
    shards = math.prod(sizes[axis] for axis in ("data", "fsdp", "expert"))
    splits = [
        ("--serve.batch", serving.batch, "mesh.data * mesh.fsdp * mesh.expert", shards),
        ("model.n_routed_experts", config.n_routed_experts, "mesh.expert", sizes["expert"]),
    ]
    for name in ("num_attention_heads", "vocab_size", "moe_intermediate_size", "intermediate_size"):
        splits.append((f"model.{name}", getattr(config, name), "mesh.tensor", sizes["tensor"]))
    for name, size, axes, parts in splits:
        check(size % parts == 0, f"{name} is {size}, which {axes} ({parts}) does not divide; change one of them")


def smallest_mesh(config: ModelConfig, serving: Serving, devices: int) -> MeshConfig:
    """Return the mesh expert x tensor, other axes 1, on which a device holds the fewest bytes of weights, cache and slots.

    Dense weights are replicated along `expert`, the cache along `tensor`.

    Raises:
      ValueError: if no such mesh divides what it splits, or the model does not support the load.
    """
    check_serves(config, serving, dict.fromkeys(AXES, 1))  # Else a load that no mesh supports would be blamed on the meshes.
    found = []
    for tensor in range(1, devices + 1):
        if devices % tensor == 0:
            mesh = AbstractMesh((1, 1, devices // tensor, 1, tensor), AXES)
            with contextlib.suppress(ValueError):
                check_serves(config, serving, dict(mesh.shape))
                found.append((device_bytes(abstract_arguments(config, serving, mesh)), tensor))
    if not found:
        raise ValueError(
            f"no mesh expert x tensor of {devices} devices divides --serve.batch ({serving.batch}), experts, heads and widths; "
            "change the batch, or give all of --mesh.data, --mesh.expert, --mesh.tensor"
        )
    _, tensor = min(found)
    return MeshConfig(expert=devices // tensor, tensor=tensor)


# ----------------------------------------------------------------------------------------------------------------------
# Lower bound of the time of a step.


KV_B = "kv_b_proj"
VISITING = "pallas_tpu", "pallas_gpu", "tiles"
"""Backends of `expert_ffn` that read the weights only of experts with tokens."""


class Work(NamedTuple):
    """Work of one device in one step."""

    flops: float
    weight_bytes: float
    """Weights read from HBM as stored; of routed experts used in that form, the expected share that has tokens."""
    cache_bytes: float
    """Latents of earlier tokens, read from HBM."""
    copied_bytes: float
    """Written to HBM and read again: gathered weights, and FP8 experts converted to 16 bits for a kernel."""
    unused_bytes: int
    """Bytes of weights on the device that only the other program, or neither, takes as arguments."""


class Limits(NamedTuple):
    """Least seconds of a step, by resource."""

    compute_seconds: float
    weight_seconds: float
    """Reading weights from HBM, and writing and reading copies of them."""
    cache_seconds: float
    """Reading the cache from HBM."""
    link_seconds: float
    step_seconds: float
    """The largest of arithmetic, HBM (weights and cache together) and links."""


class Step(NamedTuple):
    """Size of one step on one device."""

    rows: int
    """Tokens that run through the model."""
    heads: int
    """Rows that run through the head."""
    start: int
    """Cached tokens of each sequence before the step."""
    sequences: int
    """Sequences that the device works on."""

    @classmethod
    def of_decode(cls, serving: Serving, shards: int) -> Step:
        """Return a step of each sequence's newest token and drafts, at the end of the context; drafts use the head twice."""
        own = serving.batch // shards
        return cls(own * (1 + serving.drafts), own * (1 + 2 * serving.drafts), serving.context, own)

    @classmethod
    def of_prefill(cls, serving: Serving) -> Step:
        """Return a step of the last chunk of one sequence's context; the head runs for the sampled token and drafts."""
        return cls(serving.chunk, 1 + serving.drafts, serving.start, 1)


def work(config: ModelConfig, serving: Serving, step: Step, arguments: Arguments, backend: str) -> Work:
    """Return the work of one device in a step, with the experts' `backend` of `expert_ffn` (not "auto").

    It is counted from the arrays that the program takes: each weight is read once, and each value of a matrix is a
    multiply-add for every row. With t rows, S cached tokens and X devices of an expert group, and the heads and hidden units
    split along `tensor`:

      experts       t X K / E rows each, of which there are none with probability (1 - K / E)^(t X)
      dense         t rows each; head: `step.heads`; embedding: none, and next to no bytes
      attention     absorbed 2 N (2 C + P) a query and key, or expanded 2 N (H + P + W) and W_kvb for every cached token too

    Queries attend to all of the cache and, causally, to the step's own rows. Kernels and "tiles" read the experts that have
    rows, other backends all. A weight that is split along `fsdp` is gathered: written whole and read again. All FP8 experts
    are written in bfloat16 and read again, except by "tiles"; XLA can keep such copies of other weights on the chip.
    """
    mesh = jax.tree.leaves(arguments.variables)[0].sharding.mesh
    group, drafting = mesh.shape["expert"], serving.drafts > 0
    K, E, own = config.num_experts_per_tok, config.n_routed_experts, step.rows // step.sequences
    C, H, P, W = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    expands = step.start == 0 or expanding_pays(config, own)
    keys = step.rows * (step.start + (own + 1) / 2)
    width = H + P + W if expands else 2 * C + P
    flops = (config.num_hidden_layers + drafting) * keys * 2 * config.num_attention_heads / mesh.shape["tensor"] * width
    visited = 1 - (1 - K / E) ** (step.rows * group) if backend in VISITING else 1.0
    weight_bytes = copied_bytes = 0.0
    taken_bytes = 0
    for names, leaf in named_leaves(arguments.variables):
        if not _takes(names, drafting=drafting, expanded=expands):
            continue
        taken_bytes += device_bytes(leaf)
        if "embed" in names:
            continue
        is_expert, whole = "experts" in names, gathered(leaf)
        if is_expert:
            rows = step.rows * group * K / E
        elif KV_B in names and expands:
            rows = step.rows + step.start * step.sequences
        else:
            rows = step.heads if "lm_head" in names else step.rows
        if names[-1] != "scale_inv" and leaf.ndim >= 2:
            flops += 2 * device_values(whole) * rows
        # Every form of the weight in memory, each made of all of the one before; the last is used.
        widened = is_expert and backend != "tiles"
        forms: list[float] = [device_bytes(leaf)]
        if device_values(whole) > device_values(leaf):
            forms.append(device_bytes(whole))
        if widened and names[-1] == "values":
            forms.append(2 * device_values(whole))
        share = visited if is_expert and not (widened and names[-1] == "scale_inv") else 1.0
        first, *others = [*forms[:-1], share * forms[-1]]
        weight_bytes += first
        copied_bytes += sum([*forms[1:], *others])
    cache_bytes = step.start * step.sequences * bytes_per_token(config, drafting)
    return Work(flops, weight_bytes, cache_bytes, copied_bytes, device_bytes(arguments.variables) - taken_bytes)


def _takes(names: tuple[str, ...], *, drafting: bool, expanded: bool) -> bool:
    """Return True if a program takes a variable: all but unused MTP depths and, of W_kvb and its absorbed parts, one form."""
    if any(name.startswith("mtp_") for name in names) and not (drafting and "mtp_0" in names):
        return False
    return KV_B not in names or expanded == ("absorbed" not in names)


def limits(work: Work, compiled: Compiled, chip: Chip) -> Limits:
    """Return the seconds of a step in which arithmetic, HBM and links (all as ICI) run at their peak and overlap."""
    compute = work.flops / chip.bf16_flops
    weights, cache = (work.weight_bytes + work.copied_bytes) / chip.hbm_bytes, work.cache_bytes / chip.hbm_bytes
    links = sum(one.bytes for one in compiled.collectives or []) / chip.ici_bytes
    return Limits(compute, weights, cache, links, max(compute, weights + cache, links))


# ----------------------------------------------------------------------------------------------------------------------
# Compiled prefill and decode.


class Part(NamedTuple):
    """Figures of one compiled program, prefill or decode; `limits` is None on CPU devices or if it was refused as too large."""

    compiled: Compiled
    work: Work
    limits: Limits | None
    tokens: int
    """Tokens of the whole machine in one step; of decode, without drafts."""
    total_bytes: int
    """Bytes on a device: the compiler's total for the program, and the weights that it does not take."""
    fits: bool | None


class Plan(NamedTuple):
    """Prefill and decode by name on one mesh, and the bytes of weights and cache on a device."""

    mesh: Mesh
    weight_bytes: int
    cache_bytes: int
    parts: dict[str, Part]

    @property
    def fits(self) -> bool | None:
        """True if both programs fit, False if one does not; None on CPU devices."""
        known = [part.fits for part in self.parts.values()]
        return None if None in known else all(known)


def plan_serving(model: ModelConfig, serving: Serving, mesh: Mesh, chip: Chip | None) -> Plan:
    """Compile prefill and decode for a mesh, and return their figures. Raises ValueError as `report_serving`."""
    check_serves(model, serving, dict(mesh.shape))
    arguments = abstract_arguments(model, serving, mesh)
    parts = {name: plan_part(name, model, serving, mesh, chip, arguments) for name in ("decode", "prefill")}
    return Plan(mesh, device_bytes(arguments.variables), device_bytes(arguments.cache), parts)


def plan_part(name: str, config: ModelConfig, serving: Serving, mesh: Mesh, chip: Chip | None, arguments: Arguments) -> Part:
    """Compile `name`, a "decode" step of all sequences or the "prefill" of a context's last chunk; return its figures."""
    shards, (prefill_model, decode_model) = num_shards(mesh), models(config, mesh)
    table = jax.ShapeDtypeStruct((serving.batch if name == "decode" else shards, serving.pages_of_one), jnp.int32)
    if name == "decode":
        step, tokens = Step.of_decode(serving, shards), serving.batch
        more = by_rows((table, jax.ShapeDtypeStruct((serving.batch,), bool)), mesh)
        lower = functools.partial(decode.lower, decode_model, *arguments, *more)
    else:
        step, tokens = Step.of_prefill(serving), shards * serving.chunk
        row = jax.ShapeDtypeStruct((shards,), jnp.int32)
        chunks = Chunks(jax.ShapeDtypeStruct((shards, serving.chunk), jnp.int32), row, row, row, row)
        lower = functools.partial(
            prefill.lower, prefill_model, *arguments, *by_rows((chunks, table), mesh), first=serving.start == 0
        )
    with on_mesh(mesh):
        done = work(config, serving, step, arguments, choose_backend(config.expert_backend, config.dtype, current_platform()))
        taken = device_bytes(arguments) - done.unused_bytes
        # The first round of the exchange is outside its loop over rounds, and under even routing it is the only one.
        compiled = compile_for(lower, mesh, chip, taken, open_trips=0, ragged_rows=rows_sent(step.rows, config, mesh))
    total = compiled.total_bytes + done.unused_bytes
    fits = None if chip is None else compiled.fits is not False and total <= chip.hbm_gib * GIB
    bound = None if chip is None or compiled.collectives is None else limits(done, compiled, chip)
    return Part(compiled, done, bound, tokens, total, fits)


# ----------------------------------------------------------------------------------------------------------------------
# Report of both programs, with the weights in 16 and in 8 bits.


def report_serving(
    model: ModelConfig, serving: Serving, devices: list[Any], mesh: MeshConfig | None, chip: Chip | None, title: str, json: bool
) -> None:
    """Compile prefill and decode for each requested format of the weights, and print their memory, traffic and least time.

    Args:
      model: the architecture; it is served in bfloat16.
      serving: load to serve.
      devices: all devices of the machine; they need not exist.
      mesh: None takes for each format the mesh on which a device holds fewest bytes.
      chip: None for CPU devices.
      title: name of the model.
      json: print one JSON object, and nothing else.

    Raises:
      ValueError: if the mesh does not take all devices or divide what it splits, or the model does not support the load.
    """
    model = model.with_dtype("bfloat16")
    plans = {}
    for weights in FORMATS if serving.weights is None else (serving.weights,):
        asked = dataclasses.replace(serving, weights=weights)
        sizes = mesh or smallest_mesh(model, asked, len(devices))
        plans[weights] = plan_serving(model, asked, mesh_of_all(sizes, devices, "tensor"), chip)
        if not json:
            _print(f"{title}, weights in {weights}", asked, plans[weights], chip)
    if json:
        about = {name: size for name, size in dataclasses.asdict(serving).items() if name != "weights"}
        hbm = None if chip is None else int(chip.hbm_gib * GIB)
        shown = {weights: _json(plan) for weights, plan in plans.items()}
        print(json_format.dumps({"mode": "serve", "devices": len(devices), **about, "hbm_bytes": hbm, "weights": shown}))
    else:
        print(PROVES)


def _json(plan: Plan) -> dict[str, Any]:
    sizes = {"mesh": dict(plan.mesh.shape), "weight_bytes": plan.weight_bytes, "cache_bytes": plan.cache_bytes}
    return {**sizes, "fits": plan.fits, **{name: _part_json(part) for name, part in plan.parts.items()}}


def _part_json(part: Part) -> dict[str, Any]:
    figures, bound = dataclasses.asdict(part.compiled), part.limits
    return {
        "temporary_bytes": figures["temporary_bytes"],
        "total_bytes": part.total_bytes,
        "fits": part.fits,
        "kernels": figures["kernels"],
        "collectives": figures["collectives"],
        "flops": part.work.flops,
        "weight_bytes_read": part.work.weight_bytes,
        "cache_bytes_read": part.work.cache_bytes,
        "weight_bytes_copied": part.work.copied_bytes,
        "tokens": part.tokens,
        "roofline_seconds": None if bound is None else bound._asdict(),
        "roofline_seconds_per_token": None if bound is None else bound.step_seconds / part.tokens,
        "compile_seconds": figures["compile_seconds"],
    }


def _print(title: str, serving: Serving, plan: Plan, chip: Chip | None) -> None:
    rich.print(f"\n[bold]{title}[/bold], on {describe(plan.mesh)}")
    parts = plan.parts.values()
    rows: dict[str, Sequence[int | None]] = {
        "weights": [plan.weight_bytes] * len(parts),
        f"cache of {serving.batch} x {serving.context} tokens": [plan.cache_bytes] * len(parts),
        "temporaries": [part.compiled.temporary_bytes for part in parts],
        "in all, with the weights it does not take": [part.total_bytes for part in parts],
    }
    print_memory(("GiB a device", *plan.parts), rows, chip, plan.fits, title=None)
    for name, part in plan.parts.items():
        _print_part(name, part, ", if no draft stands" if serving.drafts and name == "decode" else "")
    if chip is None:
        rich.print("No least time: CPU devices have no peak figures here; --topology compiles for a TPU, which has them.")


def _print_part(name: str, part: Part, if_none: str) -> None:
    compiled, bound, done = part.compiled, part.limits, part.work
    sent = ", ".join(
        f"{one.kind} along {one.axis} {amount(one.bytes / 1e6)} MB in {one.count}" for one in compiled.collectives or []
    )
    if_empty = "nothing" if compiled.collectives == [] else "unknown, since the compiler refused the program as too large"
    rich.print(f"{name}, compiled in {compiled.compile_seconds:.0f} s. In a step a device sends: {sent or if_empty}.")
    if compiled.kernels:
        rich.print(f"Pallas kernels: {', '.join(compiled.kernels)}.")
    if bound is not None:
        ms = {limit: f"{amount(1e3 * seconds)} ms" for limit, seconds in bound._asdict().items()}
        per_token, second = amount(1e6 * bound.step_seconds / part.tokens), part.tokens / bound.step_seconds
        copied = f", and {amount(done.copied_bytes / 1e9)} GB to make some whole or wide" if done.copied_bytes else ""
        rich.print(
            f"Least time of a step, without latencies: arithmetic {ms['compute_seconds']} ({amount(done.flops / 1e12)} TFLOP); "
            f"HBM {ms['weight_seconds']} for weights ({amount(done.weight_bytes / 1e9)} GB to read{copied}) and "
            f"{ms['cache_seconds']} for the cache ({amount(done.cache_bytes / 1e9)} GB); links {ms['link_seconds']}. If all "
            f"overlap, {ms['step_seconds']}: {per_token} us for each of {part.tokens} tokens{if_none}, {second:,.0f} tokens/s "
            "on all devices."
        )
