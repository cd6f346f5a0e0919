"""Speed of the experts' feed-forward on this machine, compared with `ragged_dot` and with one dense expert.

    python benchmarks/expert_ffn.py [--repeats 15] [--case tiny]

Prints one JSON line per case and direction. The three are timed in turn, `--repeats` times over, and the figures are
medians of the ratios within a turn, so other work on the machine slows both sides of a ratio: `speedup_over_ragged_dot`
and `time_over_dense`. "dense" sends every row through one expert, the same floating-point operations without groups.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from machine import machine

from dsv3_jax.kernels import choose_backend, expert_ffn

# Rows, experts, hidden size, expert hidden size.
_CASES = {"middle": (2048, 32, 512, 256), "tiny": (8192, 16, 256, 128), "decode": (8, 32, 512, 256)}


def _inputs(num_rows: int, num_experts: int, hidden: int, expert_hidden: int) -> tuple[jax.Array, ...]:
    """Return x, the three weights, and uneven group sizes as in training."""
    rng = np.random.default_rng(0)
    shapes = (num_rows, hidden), *[(num_experts, hidden, expert_hidden)] * 2, (num_experts, expert_hidden, hidden)
    arrays = [jnp.asarray(rng.standard_normal(shape, np.float32) / np.sqrt(shape[-2])) for shape in shapes]
    group_sizes_E = rng.multinomial(num_rows, rng.dirichlet(np.full(num_experts, 4.0)))
    return *arrays, jnp.asarray(group_sizes_E, jnp.int32)


def _dense(x_RD: jax.Array, w_gate_EDF: jax.Array, w_up_EDF: jax.Array, w_down_EFD: jax.Array, _: jax.Array) -> jax.Array:
    return (jax.nn.silu(x_RD @ w_gate_EDF[0]) * (x_RD @ w_up_EDF[0])) @ w_down_EFD[0]


def _with_gradients(ffn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def run(*inputs: jax.Array) -> jax.Array:
        *differentiated, group_sizes_E = inputs
        y_RD, gradient = jax.vjp(lambda *args: ffn(*args, group_sizes_E), *differentiated)
        return y_RD, gradient(differentiated[0])

    return run


def _milliseconds(functions: dict[str, Callable], inputs: tuple[jax.Array, ...], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function(*inputs))
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*inputs))
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(numerators, denominators, strict=True)), 2)


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="timed turns per case")
    parser.add_argument("--case", choices=_CASES, action="append", help="only this case (may be given several times)")
    args = parser.parse_args()
    if args.repeats < 1:
        print(f"error: --repeats is {args.repeats}; it must be at least 1", file=sys.stderr)
        sys.exit(2)

    backend = choose_backend("auto", jnp.float32)

    def named(name: str) -> Callable[..., jax.Array]:
        return lambda *inputs: expert_ffn(*inputs, backend=name)

    functions = {"ours": named(backend), "ragged_dot": named("ragged_dot"), "dense": _dense}
    for case in args.case or _CASES:
        inputs = _inputs(*_CASES[case])
        for direction in ("forward", "forward+backward"):
            jitted = {n: jax.jit(f if direction == "forward" else _with_gradients(f)) for n, f in functions.items()}
            times = _milliseconds(jitted, inputs, args.repeats)
            result = {
                "benchmark": "expert_ffn",
                "case": case,
                "direction": direction,
                "backend": backend,
                **dict(zip("REDF", _CASES[case], strict=True)),
                "dtype": "float32",
                "largest_group": int(inputs[-1].max()),
                "speedup_over_ragged_dot": _median_ratio(times["ragged_dot"], times["ours"]),
                "time_over_dense": _median_ratio(times["ours"], times["dense"]),
                "milliseconds": {name: round(statistics.median(t), 3) for name, t in times.items()},
                "repeats": args.repeats,
                **machine(),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
