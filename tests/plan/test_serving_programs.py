"""Prefill and decode as they are handed to the compiler, and programs that do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel.devices import CHIPS
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.plan import serving
from dsv3_jax.plan.program import GIB, Compiled
from dsv3_jax.plan.serving import Serving, abstract_arguments, plan_part, plan_serving
from dsv3_jax.plan.topology import device_bytes, tpu_devices
from tests.plan.test_program import SMALL

MODEL = dataclasses.replace(SMALL.model, num_hidden_layers=2, remat="none", expert_exchange="ragged").with_dtype("bfloat16")
ASKED = Serving(batch=8, context=256, chunk=128, drafts=1)


def test_rows_of_an_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three fourths of two choices each: of the two sequences of a device with their drafts, or of a chunk."""
    rows: list[float] = []

    def compile_for(*_: Any, ragged_rows: float, **__: Any) -> Compiled:
        rows.append(ragged_rows)
        return Compiled(0, 0, 0, None, None, {}, 1.0)

    monkeypatch.setattr(serving, "compile_for", compile_for)
    plan_serving(MODEL, ASKED, make_mesh(MeshConfig(expert=4, tensor=2), jax.devices()), None)
    assert rows == [2 * 2 * 2 * 3 / 4, 128 * 2 * 3 / 4]


def test_weights_of_a_program_that_does_not_fit_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it does not take are held beside it, and no part of what its refusal is made of."""

    class Refused:
        def lower(self, *_: Any, **__: Any) -> Refused:
            return self

        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError(
                "Ran out of memory: the total memory required for HLO temporaries (49.00G) exceeds"
            )

    for program in ("decode", "prefill"):
        monkeypatch.setattr(serving, program, Refused())
    mesh = make_mesh(MeshConfig(expert=4, tensor=2), jax.devices())
    plan = plan_serving(MODEL, ASKED, mesh, CHIPS["v5e"])
    assert plan.parts["decode"].work.unused_bytes > 0
    for part in plan.parts.values():
        assert part.total_bytes == 49 * GIB + device_bytes(abstract_arguments(MODEL, ASKED, mesh))


@pytest.mark.slow
def test_what_a_ragged_exchange_of_decoding_sends(tpu_compiler: str) -> None:
    """Of two tokens a device, in one MoE layer: rows there, and their outputs back."""
    asked = dataclasses.replace(ASKED, drafts=0)
    model = dataclasses.replace(MODEL, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    mesh = make_mesh(MeshConfig(expert=4), tpu_devices("v5p:2x2x1"))
    compiled = plan_part("decode", model, asked, mesh, CHIPS["v5p"], abstract_arguments(model, asked, mesh)).compiled
    (exchange,) = (one for one in compiled.collectives or [] if one.kind == "ragged-all-to-all")
    assert (exchange.count, exchange.bytes) == (2, 2 * 3 * MODEL.hidden_size * 2)
