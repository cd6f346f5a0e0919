"""Every backend of `expert_ffn` against the reference, and the reference against numpy."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.kernels import choose_backend, expert_ffn
from dsv3_jax.kernels.quantized import QuantizedArray
from tests.tolerances import TOLERANCE

# Group sizes by shape: rows, hidden size, expert hidden size, experts; cases of one shape are compiled once, which is what
# these tests cost. Rows past the sum of the sizes are poisoned with NaN.
SIZES = {
    # Tiles of 8 rows.
    (40, 13, 7, 6): {
        "some": [7, 0, 0, 19, 3, 11],
        "one expert has everything": [0, 40, 0, 0, 0, 0],
        "all rows in the last expert": [0, 0, 0, 0, 0, 40],
        "rows past the last group": [5, 0, 21, 3, 0, 0],
        "one row past the last group": [8, 8, 8, 8, 7, 0],
        "no rows at all": [0, 0, 0, 0, 0, 0],
    },
    # Tiles of 16 rows.
    (160, 16, 8, 17): {
        "sizes up to a tile and one more": list(range(1, 18)),
        "around twice a tile": [1, 31, 0, 32, 33, 0, 0, 63, *[0] * 9],
    },
    # Tiles of 256 and of 32 rows.
    (620, 8, 6, 5): {
        "around both tiles": [1, 289, 0, 255, 33],
        "the last large tile ends at the last row": [0, 108, 256, 0, 256],
        "the last small tile ends at the last row": [0, 300, 0, 0, 320],
    },
    (80, 8, 6, 256): {"256 experts": [(i % 7 == 0) * (1 + i % 3) for i in range(256)]},
    (21, 6, 8, 1): {"one expert": [20]},
    # A power of two would be four rows.
    (3, 6, 8, 1): {"fewer rows than a tile": [3]},
    (1, 6, 8, 2): {"one row": [0, 1]},
}
CASES = {case: (shape, sizes) for shape, cases in SIZES.items() for case, sizes in cases.items()}
OFTEN = {40: ["float32"], 620: ["float32"], 80: ["float32"], 3: ["float32"], 160: ["bfloat16"], 1: ["bfloat16"], 21: []}
"""By the number of rows: the dtypes whose tests are not left to the nightly run. Each shape and dtype has its turn."""


def cases_and_dtypes(often: dict[int, list[str]] = OFTEN) -> list[Any]:
    """Every case in float32, and in bfloat16 but for the smallest: these are about loop bounds, which no dtype changes."""
    pairs = [
        (case, shape[0], dtype)
        for case, (shape, _) in CASES.items()
        for dtype in ("float32", "bfloat16")
        if dtype == "float32" or shape[0] >= 40 or dtype in often[shape[0]]
    ]
    return [pytest.param(case, dtype, marks=() if dtype in often[rows] else pytest.mark.nightly) for case, rows, dtype in pairs]


def make_inputs(case: str, dtype: str) -> tuple[jax.Array, ...]:
    """x, weights, group sizes and the gradient of y, so that values and gradients are of about unit size."""
    (num_rows, hidden, expert_hidden, num_experts), sizes = CASES[case]
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(jnp.dtype(dtype))

    x_RD = normal(num_rows, hidden, scale=1.0)
    w_gate_EDF = normal(num_experts, hidden, expert_hidden, scale=hidden**-0.5)
    w_up_EDF = normal(num_experts, hidden, expert_hidden, scale=hidden**-0.5)
    w_down_EFD = normal(num_experts, expert_hidden, hidden, scale=expert_hidden**-0.5)
    dy_RD = normal(num_rows, hidden, scale=max(*sizes, 1) ** -0.5)
    x_RD[sum(sizes) :] = dy_RD[sum(sizes) :] = np.nan
    return tuple(map(jnp.asarray, (x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, np.asarray(sizes, np.int32), dy_RD)))


@functools.partial(jax.jit, static_argnames="backend")
def value_and_gradients(
    x_RD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    dy_RD: jax.Array,
    backend: str,
) -> dict[str, jax.Array]:
    def ffn(*differentiated: jax.Array) -> jax.Array:
        return expert_ffn(*differentiated, group_sizes_E, backend=backend)

    y_RD, gradient = jax.vjp(ffn, x_RD, w_gate_EDF, w_up_EDF, w_down_EFD)
    return {"y": y_RD} | dict(zip(("dx", "dw_gate", "dw_up", "dw_down"), gradient(dy_RD), strict=True))


@functools.cache
def expected(case: str, dtype: str) -> dict[str, jax.Array]:
    return value_and_gradients(*make_inputs(case, dtype), backend="reference")


@pytest.mark.parametrize("backend", ["tiles", "ragged_dot"])
@pytest.mark.parametrize(("case", "dtype"), cases_and_dtypes())
def test_backend_matches_reference(case: str, dtype: str, backend: str) -> None:
    inputs = make_inputs(case, dtype)
    found = value_and_gradients(*inputs, backend=backend)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected(case, dtype))
    chex.assert_trees_all_close(found, expected(case, dtype), **TOLERANCE[dtype])
    used = int(inputs[-2].sum())
    for name in ("y", "dx"):
        np.testing.assert_array_equal(np.asarray(found[name])[used:], 0)


@pytest.mark.parametrize(("case", "dtype"), [param for param in cases_and_dtypes() if "float32" in param.values])
def test_reference_matches_numpy(case: str, dtype: str) -> None:
    x, w_gate, w_up, w_down, sizes, dy = (np.asarray(a, np.float64) for a in make_inputs(case, dtype))
    want = {"y": x, "dx": x, "dw_gate": w_gate, "dw_up": w_up, "dw_down": w_down}
    want = {name: np.zeros_like(array) for name, array in want.items()}
    row = 0
    for e, size in enumerate(sizes.astype(int)):
        for r in range(row, row + size):
            gate, up = x[r] @ w_gate[e], x[r] @ w_up[e]
            sigmoid = 1 / (1 + np.exp(-gate))
            want["y"][r] = (gate * sigmoid * up) @ w_down[e]
            dhidden = w_down[e] @ dy[r]
            dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
            dup = dhidden * gate * sigmoid
            want["dx"][r] = w_gate[e] @ dgate + w_up[e] @ dup
            want["dw_gate"][e] += np.outer(x[r], dgate)
            want["dw_up"][e] += np.outer(x[r], dup)
            want["dw_down"][e] += np.outer(gate * sigmoid * up, dy[r])
        row += size
    chex.assert_trees_all_close(expected(case, dtype), want, **TOLERANCE[dtype])


def layers_on_devices(ffn: Callable[..., jax.Array], *, check_vma: bool = True) -> tuple[Any, Any]:
    """Value and gradients of layers in a scan, computed again backwards: rows split over two devices, weights on each.

    Args:
      ffn: of x, weights and group sizes.
      check_vma: whether JAX checks what varies where.

    Returns:
      What `ffn` gives in `jax.shard_map`, and what the reference gives for one part after the other.
    """
    rng = np.random.default_rng(0)
    sizes_YE = np.array([[0, 0, 8], [1, 3, 4]], np.int32)
    x_RD, dy_RD = (rng.standard_normal((sizes_YE.sum(), 6)).astype(np.float32) for _ in range(2))
    shapes = (3, 6, 5), (3, 6, 5), (3, 5, 6)
    layers = [np.multiply.outer([1, 0.5, -1], rng.standard_normal(shape) / 2).astype(np.float32) for shape in shapes]
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def local(ffn: Callable[..., jax.Array], x_RD: jax.Array, layers: list[jax.Array], sizes_1E: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x_RD: jax.Array, weights: list[jax.Array]) -> tuple[jax.Array, None]:
            return x_RD + ffn(x_RD, *weights, sizes_1E[0]), None

        return jax.lax.scan(layer, x_RD, layers)[0]

    def in_parts(x_RD: jax.Array, layers: list[jax.Array], sizes_YE: np.ndarray) -> jax.Array:
        reference = functools.partial(local, functools.partial(expert_ffn, backend="reference"))
        parts = zip(jnp.split(x_RD, 2), np.split(sizes_YE, 2), strict=True)
        return jnp.concatenate([reference(x_RD, layers, sizes_1E) for x_RD, sizes_1E in parts])

    specs = {"in_specs": (P("expert"), P(), P("expert")), "out_specs": P("expert"), "check_vma": check_vma}
    sharded = jax.shard_map(functools.partial(local, ffn), mesh=mesh, **specs)

    def differentiated(forward: Callable[..., jax.Array]) -> Any:
        loss = jax.value_and_grad(lambda x_RD, layers: jnp.vdot(dy_RD, forward(x_RD, layers, sizes_YE)), argnums=(0, 1))
        return jax.jit(loss)(x_RD, layers)

    return differentiated(sharded), differentiated(in_parts)


@pytest.mark.parametrize("backend", ["tiles", "ragged_dot", "reference"])
def test_inside_shard_map_scan_and_checkpoint_weight_gradients_are_summed(backend: str) -> None:
    found, want = layers_on_devices(functools.partial(expert_ffn, backend=backend))
    chex.assert_trees_all_close(found, want, rtol=1e-5, atol=1e-4)


def test_tiles_never_touch_idle_experts() -> None:
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, dy_RD = make_inputs("some", "float32")
    idle_E11 = (np.asarray(group_sizes_E) == 0)[:, None, None]
    poisoned = (np.where(idle_E11, np.nan, w) for w in (w_gate_EDF, w_up_EDF, w_down_EFD))
    found = value_and_gradients(x_RD, *poisoned, group_sizes_E, dy_RD, backend="tiles")
    chex.assert_trees_all_close(found, expected("some", "float32"), **TOLERANCE["float32"])


def test_tiles_keep_activations_only_for_a_gradient() -> None:
    x_RD, *weights, group_sizes_E, dy_RD = make_inputs("some", "float32")
    stored = f"f32[{x_RD.shape[0]},{weights[0].shape[2]}]"

    def forward(*args: jax.Array) -> jax.Array:
        return expert_ffn(*args, group_sizes_E, backend="tiles")

    assert stored in str(jax.make_jaxpr(jax.grad(lambda *args: jnp.vdot(dy_RD, forward(*args))))(x_RD, *weights))
    assert stored not in jax.jit(forward).lower(x_RD, *weights).compile().as_text()


def test_auto_is_the_default_platform() -> None:
    chosen = choose_backend("auto", "float32")
    assert chosen == choose_backend("auto", "float32", jax.default_backend())
    inputs = make_inputs("some", "float32")[:-1]
    one, other = (str(jax.make_jaxpr(functools.partial(expert_ffn, backend=name))(*inputs)) for name in ("auto", chosen))
    assert one == other
    assert one != str(jax.make_jaxpr(functools.partial(expert_ffn, backend="reference"))(*inputs))


def test_a_backend_for_other_machines_says_so() -> None:
    with pytest.raises(ValueError, match="'pallas_tpu' runs on TPUs only"):
        expert_ffn(*make_inputs("some", "float32")[:-1], backend="pallas_tpu")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'tile'; choose one of auto, pallas_tpu"):
        expert_ffn(*make_inputs("some", "float32")[:-1], backend="tile")


@pytest.mark.parametrize(
    ("index", "replacement", "named"),
    [
        (0, jnp.ones((40, 12)), r"x float32\[40, 12\]"),
        (0, jnp.ones((0, 13)), r"x float32\[0, 13\]"),
        (0, jnp.ones((40,)), r"x float32\[40\]"),
        (0, jnp.ones((40, 13), jnp.bfloat16), r"x bfloat16\[40, 13\], w_gate float32"),
        (1, jnp.ones((13, 7)), r"w_gate float32\[13, 7\]"),
        (2, jnp.ones((6, 7, 13)), r"w_up float32\[6, 7, 13\]"),
        (3, jnp.ones((6, 13, 7)), r"w_down float32\[6, 13, 7\]"),
        (4, jnp.ones((5,), jnp.int32), r"group_sizes int32\[5\]"),
        (4, jnp.ones((6,), jnp.float32), r"group_sizes float32\[6\]"),
    ],
)
def test_ill_fitting_arrays_are_refused(index: int, replacement: jax.Array, named: str) -> None:
    inputs = list(make_inputs("some", "float32")[:-1])
    inputs[index] = replacement
    with pytest.raises(ValueError, match=named):
        expert_ffn(*inputs, backend="tiles")


def in_8_bits(shape: tuple[int, ...], seed: int) -> QuantizedArray:
    """Experts' weights of about unit scale a product, in blocks of 4 x 6."""
    rng = np.random.default_rng(seed)
    E, inputs, outputs = shape
    values = rng.standard_normal(shape).astype(jnp.float8_e4m3fn)
    scale_inv = rng.uniform(0.5, 1.5, (E, -(-inputs // 4), -(-outputs // 6))) * inputs**-0.5
    return QuantizedArray(jnp.asarray(values.view(np.uint8)), jnp.asarray(scale_inv, jnp.float32), (4, 6))


@pytest.mark.parametrize("backend", ["tiles", "ragged_dot", "reference"])
def test_weights_in_8_bits(backend: str) -> None:
    (_, D, F, E), _ = CASES["some"]
    x_RD, *_, sizes_E, _ = make_inputs("some", "float32")
    weights = in_8_bits((E, D, F), 0), in_8_bits((E, D, F), 1), in_8_bits((E, F, D), 2)

    @jax.jit
    def both(x_RD: jax.Array, weights: tuple[QuantizedArray, ...], sizes_E: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = (w.astype(jnp.float32) for w in weights)
        expected = expert_ffn(x_RD, *wide, sizes_E, backend="reference")
        return expert_ffn(x_RD, *weights, sizes_E, backend=backend), expected

    chex.assert_trees_all_close(*both(x_RD, weights, sizes_E), **TOLERANCE["float32"])


def test_tiles_widen_one_expert_at_a_time() -> None:
    """Nowhere in the compiled program are all experts wide, by whatever name of a float."""
    E, D, F = 6, 13, 7
    weights = in_8_bits((E, D, F), 0), in_8_bits((E, D, F), 1), in_8_bits((E, F, D), 2)
    x_RD, sizes_E = jnp.ones((40, D)), jnp.full(E, 5, jnp.int32)

    def floats_of_all(backend: str) -> set[str]:
        text = jax.jit(functools.partial(expert_ffn, backend=backend)).lower(x_RD, *weights, sizes_E).compile().as_text()
        return set(re.findall(rf"\b((?:bf|f)\w+)\[{E},(?:{D},{F}|{F},{D})\]", text))

    assert floats_of_all("tiles") == set()
    assert floats_of_all("reference") > set(), "the pattern finds them where they are"


def test_experts_in_8_bits_have_no_gradient() -> None:
    x_RD, *_, sizes_E, _ = make_inputs("some", "float32")
    weights = in_8_bits((6, 13, 7), 0), in_8_bits((6, 13, 7), 1), in_8_bits((6, 7, 13), 2)
    with pytest.raises(ValueError, match="in FP8 cannot be trained"):
        jax.grad(lambda x_RD: jnp.sum(expert_ffn(x_RD, *weights, sizes_E, backend="tiles")))(x_RD)
