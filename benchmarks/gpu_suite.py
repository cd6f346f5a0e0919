"""All measurements on one GPU in one table: kernels compared with the float32 reference, then their speed.

    python benchmarks/gpu_suite.py [--out runs/gpu_suite.jsonl] [--only experts] [--toy]

Prints one JSON line per row, appends it to --out, and prints a table at the end. A second start measures only the rows that
--out lacks for this card, commit and jax. Nothing is downloaded; rows for tokamax and torch appear if these are installed.
`--toy` runs everything at sizes for a CPU, where the figures mean nothing. Each part runs in its own process, so that a
kernel that crashes or hangs ends no other part.

`of_dense` is arithmetic a second over that of a bfloat16 product of 8192 x 7168 x 4096 in the same run, `of_copy` bytes a
second over those of a copy of 2 GiB. Model FLOPs utilisation is tokens a second times the FLOPs of a token (`flops_per_token`
of `dsv3_jax.model.flops`: attention causal, the backward twice the forward), over the dense product's. A time is the median
of five turns of as many calls as take a fifth of a second.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of the memory, too.

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from machine import machine

from dsv3_jax import Engine, SamplingParams
from dsv3_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from dsv3_jax.config.cli import load_config
from dsv3_jax.kernels.attention import attend, choose_attention
from dsv3_jax.kernels.experts import choose_backend, expert_ffn
from dsv3_jax.kernels.latent_attention import CachedLatents, choose_latent_backend, latent_attention
from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.model.losses import Batch
from dsv3_jax.parallel.mesh import current_platform
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import train_step

LIMIT = 1e-2
"""Tolerance of a bfloat16 kernel: norm of its difference from the float32 reference over the norm of the reference."""
PATIENCE = 300
"""Seconds for a part, compilation included."""
CONFIGS = Path(__file__).parent.parent / "configs"
Row = dict[str, Any]


class EngineConfig(NamedTuple):
    """Sizes of the measured problems."""

    experts: tuple[int, int, int] = (8, 7168, 2048)
    """E, D, F."""
    rows: tuple[int, ...] = (256, 1024, 4096)
    heads: int = 16
    widths: tuple[int, int] = (192, 128)
    lengths: tuple[int, ...] = (4096, 32768)
    cache: tuple[int, int, int] = (128, 512, 64)
    """Query heads, C, P."""
    batch: int = 128
    contexts: tuple[int, ...] = (4096, 32768)
    page: int = 64
    dense: tuple[int, int, int] = (8192, 7168, 4096)
    copied: int = 1 << 30
    """Values of bfloat16."""
    train: tuple[int, int] = (4, 4096)
    """Sequences and their length."""
    decode: tuple[int, int, int] = (64, 512, 64)
    """Prompts, their length, new tokens."""
    seconds: float = 0.2
    turns: int = 5


TOY = EngineConfig(
    experts=(2, 24, 16),
    rows=(8, 16),
    heads=2,
    widths=(24, 16),
    lengths=(64,),
    cache=(2, 32, 8),
    batch=2,
    contexts=(128,),
    page=16,
    dense=(64, 64, 64),
    copied=1 << 12,
    train=(1, 32),
    decode=(2, 8, 4),
    seconds=0.0,
    turns=1,
)


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_suite.jsonl"), help="file of rows, added to")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="only this part (may be given several times)")
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU")
    arguments = parser.parse_args()
    platform = current_platform()
    if platform != "gpu" and not arguments.toy:
        print(f"error: JAX runs on {platform} here; the suite measures a GPU, and --toy runs it anywhere", file=sys.stderr)
        sys.exit(2)

    parts = arguments.only or list(PARTS)
    if len(parts) > 1:
        sys.exit(_part_by_part(parts, ["--out", str(arguments.out), *(["--toy"] if arguments.toy else [])]))
    here = machine()
    same = ("device", "commit", "jax")
    done = {row["row"]: row for row in _read(arguments.out) if all(row[name] == here[name] for name in same)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    suite = Suite(TOY if arguments.toy else EngineConfig(), done)
    with arguments.out.open("a", encoding="utf-8") as file:
        if arguments.out.stat().st_size and not arguments.out.read_text(encoding="utf-8").endswith("\n"):
            file.write("\n")  # After a partly written line.
        for part in parts:
            for name, measure in PARTS[part](suite):
                if name in done:
                    continue
                started = time.perf_counter()
                try:
                    row = measure()
                except Exception as error:  # A failure becomes a row, and the other rows are still measured.
                    row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
                done[name] = {"row": name, **row, "took_seconds": round(time.perf_counter() - started, 1), **machine()}
                line = json.dumps(done[name])
                print(line, flush=True)
                if "error" not in row:
                    file.write(line + "\n")
                    file.flush()
    print(table(done.values()))
    wrong = [name for name, row in done.items() if "error" in row or row.get("correct") is False]
    if wrong:
        print(f"error: not measured, or wrong: {', '.join(wrong)}", file=sys.stderr)
        sys.exit(1)


def _part_by_part(parts: list[str], arguments: list[str]) -> int:
    """Run each part in its own process, so that a kernel that crashes or hangs ends only its part.

    The last one prints the table of all. Returns 1 if any failed.
    """
    failed = False
    for part in parts:
        command = [sys.executable, __file__, "--only", part, *arguments]
        try:
            failed |= subprocess.run(command, check=False, timeout=PATIENCE).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"error: {part} took longer than {PATIENCE} s and was ended", file=sys.stderr)
            failed = True
    return int(failed)


def _read(path: Path) -> Iterator[Row]:
    """Return the rows of a file, without a partly written last line."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def table(rows: Any) -> str:
    """Rows as a Markdown table."""
    hidden = {"row", *machine()}
    shown = [[row["row"], ", ".join(f"{k} {_short(v)}" for k, v in row.items() if k not in hidden)] for row in rows]
    width = max((len(name) for name, _ in shown), default=0)
    lines = [f"| {name:{width}} | {figures} |" for name, figures in [["row", "figures"], ["---", "---"], *shown]]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Suite:
    """Sizes, and the rows measured so far."""

    def __init__(self, sizes: EngineConfig, done: dict[str, Row]) -> None:
        self.sizes, self.done = sizes, done

    def seconds(self, run: Callable[[], Any], ready: Callable[[Any], Any] = jax.block_until_ready) -> float:
        """Seconds of a call: the median of turns of many calls, of which the last is waited for."""
        ready(run())
        started = time.perf_counter()
        ready(run())
        once = time.perf_counter() - started
        calls = max(1, min(1000, math.ceil(self.sizes.seconds / once)))

        def turn() -> float:
            started = time.perf_counter()
            for _ in range(calls):
                result = run()
            ready(result)
            return (time.perf_counter() - started) / calls

        return statistics.median(turn() for _ in range(self.sizes.turns))

    def arithmetic(self, flops: float, run: Callable[[], Any], **kwargs: Any) -> Row:
        """A row of time and arithmetic a second."""
        seconds = self.seconds(run, **kwargs)
        dense = self.done.get("dense product", {}).get("tflops")
        row = {"milliseconds": 1e3 * seconds, "tflops": flops / seconds / 1e12}
        return row | ({"of_dense": row["tflops"] / dense} if dense else {})


def normal(seed: int, *shape: int, scale: float = 1.0, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Return random numbers with this standard deviation, created on the device."""
    return jax.jit(lambda: (jax.random.normal(jax.random.key(seed), shape, jnp.float32) * scale).astype(dtype))()


def against(found: Any, want: Any) -> Row:
    """Return a row with the largest deviation of arrays from the reference; infinite for a NaN."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
    apart = [float(jnp.linalg.norm(f.astype(jnp.float32) - w) / jnp.linalg.norm(w)) for f, w in pairs]
    worst = max(error if math.isfinite(error) else math.inf for error in apart)
    return {"error_of_norm": worst if worst < math.inf else "not finite", "correct": worst < LIMIT}


# --- Ceilings ------------------------------------------------------------------------------------------------------------


def ceilings(suite: Suite) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Measure the card's ceilings: a dense product and a copy."""
    M, K, N = suite.sizes.dense

    def dense() -> Row:
        product, a, b = jax.jit(jnp.dot), normal(0, M, K), normal(1, K, N)
        return suite.arithmetic(2.0 * M * K * N, lambda: product(a, b))

    def copy() -> Row:
        negate, values = jax.jit(lambda x: -x), normal(0, suite.sizes.copied)
        return {"gigabytes_per_second": 4 * suite.sizes.copied / suite.seconds(lambda: negate(values)) / 1e9}

    yield "dense product", dense
    yield "copy", copy


# --- Experts ---------------------------------------------------------------------------------------------------------------


def _with_gradients(ffn: Callable[..., jax.Array]) -> Callable[..., Any]:
    def both(x_RD: jax.Array, *rest: jax.Array) -> Any:
        *weights, sizes_E, dy_RD = rest
        y_RD, transpose = jax.vjp(lambda *a: ffn(*a, sizes_E), x_RD, *weights)
        return y_RD, transpose(dy_RD)

    return both


def group_sizes(rows: int, experts: int, skewed: bool) -> list[int]:
    """Rows of each expert: all the same, or the first half of them on one, a quarter on the next, and so on, with one idle."""
    total = rows * experts
    if not skewed:
        return [rows] * experts
    sizes = [total >> (i + 1) for i in range(experts - 1)]
    return [sizes[0] + total - sum(sizes), *sizes[1:], 0]


def experts(suite: Suite) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The expert FFN, correct and fast."""
    E, D, F = suite.sizes.experts
    backend = choose_backend("auto", jnp.bfloat16)

    @functools.cache
    def weights() -> list[jax.Array]:
        shapes = (E, D, F), (E, D, F), (E, F, D)
        return [normal(i, *shape, scale=shape[1] ** -0.5) for i, shape in enumerate(shapes)]

    def inputs(sizes: list[int], num_rows: int) -> list[jax.Array]:
        return [normal(7, num_rows, D), *weights(), jnp.asarray(sizes, jnp.int32), normal(8, num_rows, D)]

    def correct() -> Row:
        rows = max(suite.sizes.rows[0], 2)
        sizes = [rows + 1, 0, 1, rows - 1, *[rows // 2] * E][:E]
        arrays = inputs(sizes, sum(sizes) + 5)
        poisoned = [arrays[0].at[sum(sizes) :].set(jnp.nan), *arrays[1:-1], arrays[-1].at[sum(sizes) :].set(jnp.nan)]
        found = jax.jit(_with_gradients(functools.partial(expert_ffn, backend=backend)))(*poisoned)
        exact = [array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array for array in arrays]
        with jax.default_matmul_precision("highest"):
            want = jax.jit(_with_gradients(functools.partial(expert_ffn, backend="reference")))(*exact)
        return {"backend": backend} | against(found, want)

    @functools.cache
    def program(name: str, gradients: bool) -> Callable[..., Any]:
        ffn: Callable[..., Any] = _tokamax_ffn if name == "tokamax" else functools.partial(expert_ffn, backend=name)
        return jax.jit(_with_gradients(ffn)) if gradients else jax.jit(lambda *a: ffn(*a[:-1]))

    def timed(name: str, sizes: list[int], gradients: bool) -> Row:
        arrays, run = inputs(sizes, sum(sizes)), program(name, gradients)
        # Forward 3 products; with gradients 3 times as many.
        return suite.arithmetic((18.0 if gradients else 6.0) * sum(sizes) * D * F, lambda: run(*arrays))

    def timed_torch(sizes: list[int]) -> Row:
        import torch

        shapes = (sum(sizes), D), (E, D, F), (E, D, F), (E, F, D)
        x, gate, up, down = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
        ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")

        def run() -> Any:
            hidden = torch.nn.functional.silu(torch._grouped_mm(x, gate, offs=ends)) * torch._grouped_mm(x, up, offs=ends)
            return torch._grouped_mm(hidden, down, offs=ends)

        return suite.arithmetic(6.0 * sum(sizes) * D * F, run, ready=lambda _: torch.cuda.synchronize())

    yield "experts: correct", correct
    others = ["ragged_dot", *(["tokamax"] if importlib.util.find_spec("tokamax") else [])]
    for rows in suite.sizes.rows:
        for skewed in (False, True):
            sizes, kind = group_sizes(rows, E, skewed), "skewed" if skewed else "balanced"
            for name in [backend, *others]:
                for gradients in (False, True):
                    what = "forward and backward" if gradients else "forward"
                    yield f"experts: {rows} rows, {kind}, {what}, {name}", functools.partial(timed, name, sizes, gradients)
            if _torch_groups():
                yield f"experts: {rows} rows, {kind}, forward, torch", functools.partial(timed_torch, sizes)


def _tokamax_ffn(x_RD: jax.Array, w_gate_EDF: Any, w_up_EDF: Any, w_down_EFD: Any, group_sizes_E: Any) -> Any:
    import tokamax

    product = functools.partial(tokamax.ragged_dot, group_sizes=group_sizes_E)
    return product(jax.nn.silu(product(x_RD, w_gate_EDF)) * product(x_RD, w_up_EDF), w_down_EFD)


def _torch_groups() -> bool:
    """Return True if torch is installed with GPU support and its grouped product."""
    try:
        import torch
    except Exception:  # Missing, or incompatible with this machine's CUDA.
        return False
    return torch.cuda.is_available() and hasattr(torch, "_grouped_mm")


# --- Attention --------------------------------------------------------------------------------------------------------------


def attention(suite: Suite) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Causal attention over whole sequences, correct and fast."""
    (X, W), N = suite.sizes.widths, suite.sizes.heads
    backend = choose_attention("auto", jnp.bfloat16, (X, W))
    ours = functools.partial(attend, scale=X**-0.5, chunk=512, backend=backend)
    exact = functools.partial(attend, scale=X**-0.5, chunk=512, backend="chunked")

    def inputs(length: int, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
        return [normal(i, 1, length, N, width, dtype=dtype) for i, width in enumerate((X, X, W, W))]

    def with_gradients(f: Callable[..., jax.Array]) -> Callable[..., Any]:
        def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
            o, transpose = jax.vjp(f, q, k, v)
            return o, transpose(do)

        return jax.jit(both)

    def correct() -> Row:
        arrays = inputs(suite.sizes.lengths[0] // 4 + 1)
        found = with_gradients(ours)(*arrays)
        with jax.default_matmul_precision("highest"):
            want = with_gradients(exact)(*(array.astype(jnp.float32) for array in arrays))
        return {"backend": backend} | against(found, want)

    def timed(length: int, gradients: bool) -> Row:
        arrays, forward = inputs(length), jax.jit(ours)
        run = with_gradients(ours) if gradients else lambda *a: forward(*a[:3])
        # Products of queries with keys and of weights with values, over half of the matrix; the backward computes five.
        products = (X + W) + ((3 * X + 2 * W) if gradients else 0)
        return suite.arithmetic(2.0 * N * products * length * (length + 1) / 2, lambda: run(*arrays))

    yield "attention: correct", correct
    for length in suite.sizes.lengths:
        yield f"attention: {length} tokens, forward", functools.partial(timed, length, False)
        yield f"attention: {length} tokens, forward and backward", functools.partial(timed, length, True)


def cache(suite: Suite) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Attention of one token over a paged cache of latents, correct and fast."""
    N, C, P = suite.sizes.cache
    B, Z = suite.sizes.batch, suite.sizes.page
    backend = choose_latent_backend("auto", jnp.bfloat16, (C, P))

    def inputs(context: int, spare: int, dtype: Any = jnp.bfloat16) -> tuple[list[jax.Array], CachedLatents]:
        pages = B * context // Z
        page_table_BJ = np.random.default_rng(0).permutation(pages).reshape(B, -1).astype(np.int32)
        own = [normal(i, B, 1, *shape, dtype=dtype) for i, shape in enumerate(((N, C), (N, P), (C,), (P,)))]
        pools = [normal(9 + i, pages + spare, Z, width, dtype=dtype) for i, width in enumerate((C, P))]
        return own, CachedLatents(*pools, jnp.asarray(page_table_BJ))

    def run_with(name: str) -> Callable[..., jax.Array]:
        return jax.jit(functools.partial(latent_attention, scale=(C + P) ** -0.5, backend=name))

    def correct() -> Row:
        context = suite.sizes.contexts[0]
        own, cached = inputs(context, 1)
        cached_length_B = jnp.asarray(np.random.default_rng(1).integers(0, context + 1, B), jnp.int32).at[0].set(0)
        seen_BS = jnp.arange(context) < cached_length_B[:, None]
        seen = jnp.zeros((len(cached.latent_YZC), Z), bool).at[cached.page_table_BJ].set(seen_BS.reshape(B, -1, Z))
        poisoned = cached._replace(
            latent_YZC=jnp.where(seen[..., None], cached.latent_YZC, jnp.nan),
            rope_YZP=jnp.where(seen[..., None], cached.rope_YZP, jnp.nan),
        )
        found = run_with(backend)(*own, poisoned, cached_length_B)
        exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, (own, cached))
        with jax.default_matmul_precision("highest"):
            want = run_with("chunked")(*exact[0], exact[1], cached_length_B)
        return {"backend": backend} | against(found, want)

    def timed(context: int) -> Row:
        own, cached = inputs(context, 0)
        run, cached_length_B = run_with(backend), jnp.full(B, context, jnp.int32)
        seconds = suite.seconds(lambda: run(*own, cached, cached_length_B))
        gigabytes = 2e-9 * B * context * (C + P)
        copied = suite.done.get("copy", {}).get("gigabytes_per_second")
        row = {"milliseconds": 1e3 * seconds, "gigabytes_per_second": gigabytes / seconds}
        return row | ({"of_copy": row["gigabytes_per_second"] / copied} if copied else {})

    yield "cache: correct", correct
    for context in suite.sizes.contexts:
        yield f"cache: batch {B}, context {context}", functools.partial(timed, context)


# --- The model ---------------------------------------------------------------------------------------------------------------


def models(toy: bool) -> dict[str, ModelConfig]:
    """Cuts that fit a card: of the 671B model a dense and an MoE layer with 32 of the experts, of v3_16b three layers."""
    if toy:
        tiny, small = load_config(str(CONFIGS / "tiny.py")).model, {"num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 32}
        return {"tiny": dataclasses.replace(tiny, dtype="bfloat16", **small)}
    large, small = (load_config(str(CONFIGS / f"{name}.py")).model for name in ("v3_671b", "v3_16b"))
    cut = {"vocab_size": 16384, "num_nextn_predict_layers": 0, "param_dtype": "bfloat16", "first_k_dense_replace": 1}
    experts = {"n_routed_experts": 32, "n_group": 4, "topk_group": 2}
    return {
        "two layers of v3_671b": dataclasses.replace(large, num_hidden_layers=2, **experts, **cut),
        "three layers of v3_16b": dataclasses.replace(small, num_hidden_layers=3, **cut),
    }


def training(suite: Suite) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Training steps."""
    batch, length = suite.sizes.train

    def timed(model: ModelConfig) -> Row:
        optimizer = OptimizerConfig(moment_dtype="bfloat16")
        config = Config(model=model, optimizer=optimizer, train=TrainConfig(batch_size=batch, sequence_length=length))
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (batch, length + 1)).astype(np.int32)
        rows = Batch.of(tokens[:, :-1], tokens[:, 1:])
        step = jax.jit(functools.partial(train_step, config=config), donate_argnums=0)
        state, losses = jax.jit(lambda: init_state(config))(), []

        def run() -> jax.Array:
            nonlocal state
            state, metrics, _ = step(state, rows, config.schedules.at(0))
            losses.append(metrics["loss"])
            return metrics["loss"]

        row = suite.arithmetic(batch * length * flops_per_token(model, length).causal, run)
        finite = bool(np.isfinite(np.asarray(losses)).all())
        utilisation = {"model_flops_utilisation": row.pop("of_dense")} if "of_dense" in row else {}
        return row | utilisation | {"tokens_per_second": 1e3 * batch * length / row["milliseconds"], "correct": finite}

    for name, model in models(suite.sizes is TOY).items():
        yield f"training step: {name}", functools.partial(timed, model)


def decoding(suite: Suite) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Decoding with the engine, prompts included."""
    batch, prompt, new = suite.sizes.decode

    def timed(model: ModelConfig) -> Row:
        model = dataclasses.replace(model, eos_token_id=None)
        config = Config(model=model, train=TrainConfig(batch_size=batch, sequence_length=prompt))
        engine = Engine(model, jax.jit(lambda: init_state(config).variables)(), max_batch=batch, max_length=prompt + new)
        prompts = np.random.default_rng(0).integers(0, model.vocab_size, (batch, prompt)).tolist()

        def run() -> int:
            return sum(len(done.tokens) for done in engine.generate(prompts, SamplingParams(max_tokens=new)))

        seconds = suite.seconds(run, ready=lambda count: count)
        return {"seconds": seconds, "tokens_per_second": batch * new / seconds}

    for name, model in models(suite.sizes is TOY).items():
        yield f"decoding: {name}, batch {batch}, {prompt} + {new} tokens", functools.partial(timed, model)


PARTS: dict[str, Callable[[Suite], Iterator[tuple[str, Callable[[], Row]]]]] = {
    "ceilings": ceilings,
    "experts": experts,
    "attention": attention,
    "cache": cache,
    "training": training,
    "decoding": decoding,
}

if __name__ == "__main__":
    main()
