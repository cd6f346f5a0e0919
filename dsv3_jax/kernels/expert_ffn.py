"""The routed experts' feed-forward over rows sorted by expert (section 2.1.2 of the report): contract and choice.

This is where DeepSeek-V3 spends its arithmetic. `reference.py` says what is computed; every other backend computes
the same faster: `pallas_tpu.py` on TPUs, `pallas_gpu.py` on Hopper GPUs, `tiles.py` elsewhere, `ragged_dot.py` by XLA's own
grouped product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.block_scaled import BlockScaled
from dsv3_jax.kernels.choice import Choice
from dsv3_jax.kernels.hopper import refusal
from dsv3_jax.kernels.pallas_gpu import expert_ffn_pallas_gpu
from dsv3_jax.kernels.pallas_tpu import expert_ffn_pallas_tpu
from dsv3_jax.kernels.ragged_dot import expert_ffn_ragged_dot
from dsv3_jax.kernels.reference import expert_ffn_reference
from dsv3_jax.kernels.tiles import expert_ffn_tiles
from dsv3_jax.kernels.varying import varying_alike

_BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "pallas_tpu": expert_ffn_pallas_tpu,
    "pallas_gpu": expert_ffn_pallas_gpu,
    "tiles": expert_ffn_tiles,
    "ragged_dot": expert_ffn_ragged_dot,
    "reference": expert_ffn_reference,
}
# XLA's grouped product multiplies every row with every expert and masks, on a CPU as on a TPU (libtpu 0.0.42) and a GPU.
_CHOICE = Choice(
    "expert_backend",
    auto={"cpu": "tiles", "gpu": "pallas_gpu", "tpu": "pallas_tpu"},
    anywhere=("tiles", "ragged_dot", "reference"),
    only_on={"pallas_tpu": "tpu", "pallas_gpu": "gpu"},
)


def choose_backend(name: str, dtype: Any, platform: str | None = None) -> str:
    """The backend of `expert_ffn` that `name` stands for.

    Args:
      name: a backend, or "auto" for the one that suits the machine: on a GPU that is "pallas_gpu" for bfloat16 on Hopper, and
        "tiles" for everything else.
      dtype: what the experts compute in.
      platform: what the program will run on ("cpu", "gpu", "tpu"); None for JAX's default backend. Name it when
        compiling for a machine that is not there.

    Raises:
      ValueError: for any other name, an unknown platform, and a backend that the platform cannot run.
    """
    return _CHOICE.of(name, platform, {"pallas_gpu": lambda: refusal(dtype)})


def expert_ffn(
    x_RD: jax.Array,
    w_gate_EDF: jax.Array | BlockScaled,
    w_up_EDF: jax.Array | BlockScaled,
    w_down_EFD: jax.Array | BlockScaled,
    group_sizes_E: jax.Array,
    *,
    backend: str,
) -> jax.Array:
    """Every row through its own expert: y = (silu(x w_gate[e]) * (x w_up[e])) w_down[e].

    Differentiable in x and the weights. Products accumulate in float32 and the hidden activations are float32 until
    they enter the down product, whatever the dtype of the operands.

    Args:
      x_RD: rows sorted by expert. Those past the last group may hold anything, NaN too.
      w_gate_EDF, w_up_EDF, w_down_EFD: the experts' weights, of x's dtype or in 8 bits. Of these, "tiles" dequantises one
        expert after the other, and only those that have rows; every other backend is given all of them in x's dtype.
      group_sizes_E: int32, rows of each expert; their sum is at most R.
      backend: a name that `choose_backend` knows.

    Returns:
      y_RD in x's dtype. Rows past the last group are exactly zero, in y and in the gradient of x.

    Raises:
      ValueError: for an unknown backend, one that cannot run here or with this dtype, and for shapes or dtypes that do not
        fit together.
    """
    # A backend that is named was chosen for a platform that need not be the default one.
    ffn = _BACKENDS[backend if backend in _BACKENDS else choose_backend(backend, x_RD.dtype)]
    if ffn is not expert_ffn_tiles:
        w_gate_EDF, w_up_EDF, w_down_EFD = (_unscaled(w, x_RD.dtype) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))
    _check(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E)
    return ffn(*varying_alike(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E))


def _unscaled(weight: jax.Array | BlockScaled, dtype: Any) -> jax.Array:
    return weight.astype(dtype) if isinstance(weight, BlockScaled) else weight


def _check(x_RD: jax.Array, w_gate_EDF: Any, w_up_EDF: Any, w_down_EFD: Any, group_sizes_E: jax.Array) -> None:
    arrays: dict[str, Any] = {
        "x": x_RD,
        "w_gate": w_gate_EDF,
        "w_up": w_up_EDF,
        "w_down": w_down_EFD,
        "group_sizes": group_sizes_E,
    }
    floats = {a.dtype for name, a in arrays.items() if name != "group_sizes" and not isinstance(a, BlockScaled)}
    fits = x_RD.ndim == 2 and w_gate_EDF.ndim == 3 and min(x_RD.shape + w_gate_EDF.shape) >= 1
    if fits:
        E, D, F = w_gate_EDF.shape
        fits = (x_RD.shape[1], w_up_EDF.shape, w_down_EFD.shape, group_sizes_E.shape) == (D, (E, D, F), (E, F, D), (E,))
    if not fits or len(floats) > 1 or not jnp.issubdtype(x_RD.dtype, jnp.floating) or group_sizes_E.dtype != jnp.int32:
        raise ValueError(
            "expert_ffn got "
            + ", ".join(f"{name} {a.dtype.name}{list(a.shape)}" for name, a in arrays.items())
            + "; it needs x [R, D], w_gate and w_up [E, D, F] and w_down [E, F, D] of one float dtype and no empty axis, "
            "and group_sizes int32[E]"
        )
