"""`dsv3_jax` beside what transformers made of the committed checkpoints: exactness, in the default suite, without torch.

`tests/parity/make_fixtures.py` wrote them and `make parity` watches over them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dsv3_jax import ModelConfig, ModelOutput, load_hf
from tests import reference_model
from tests.parity import cases, compare
from tests.parity.cases import Case
from tests.parity.fp8_checkpoints import write_fp8_checkpoint
from tests.parity.reference_checkpoints import random_tokens

FIXTURES = Path(__file__).parent / "fixtures"


@dataclasses.dataclass(frozen=True)
class Fixture:
    """A committed checkpoint, loaded, and what transformers made of it."""

    case: Case
    tensors: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    config: ModelConfig
    variables: dict[str, Any]

    @property
    def tokens_BT(self) -> np.ndarray:
        return self.expected["tokens"].astype(np.int32)


@pytest.fixture(scope="module", params=[case.name for case in cases.COMMITTED])
def fixture(request: pytest.FixtureRequest) -> Fixture:
    (case,) = (case for case in cases.COMMITTED if case.name == request.param)
    folder = FIXTURES / case.name
    return Fixture(case, load_file(folder / "model.safetensors"), dict(np.load(folder / "expected.npz")), *load_hf(folder))


def on(*names: str) -> pytest.MarkDecorator:
    """Only these cases, where the others would compile much and show little; `make parity` tries others."""
    return pytest.mark.parametrize("fixture", names, indirect=True)


def whole(fixture: Fixture) -> ModelOutput:
    """The model over all tokens: of one case, like the published one but for its biases, absorbed and in tiles with a rest."""
    absorbed = fixture.case.name == "all_biases_negative"
    config = dataclasses.replace(fixture.config, attention_chunk=64) if absorbed else fixture.config
    return compare.run(config, fixture.variables, fixture.tokens_BT, absorbed)


def test_forward(fixture: Fixture) -> None:
    check_forward(fixture, whole(fixture))


@pytest.mark.parametrize("length", [1, pytest.param(7, marks=pytest.mark.nightly)])
@on("published")
def test_forward_short(fixture: Fixture, length: int) -> None:
    check_forward(fixture, compare.run(fixture.config, fixture.variables, fixture.tokens_BT[:, :length]))


def check_forward(fixture: Fixture, ours: ModelOutput) -> None:
    expected, length = fixture.expected, ours.logits.shape[1]
    chex.assert_shape(ours.logits, (1, length, fixture.config.vocab_size))
    chex.assert_type([ours.logits, ours.hidden_states], jnp.float32)
    assert compare.largest_difference(ours.logits, expected["logits"][:, :length]) < compare.LOGITS
    assert compare.largest_difference(ours.hidden_states, expected["hidden_states"][:, :, :length]) < compare.HIDDEN_STATES
    np.testing.assert_array_equal(np.sort(ours.routes, axis=-1), expected["routes"][:, :, :length])


def test_mtp(fixture: Fixture) -> None:
    """Depth 1 against transformers; every depth against the numpy model."""
    ours = whole(fixture).mtp_logits
    oracle = reference_model.forward(fixture.case.config, fixture.tensors, fixture.tokens_BT).mtp_logits
    assert len(ours) == len(oracle) == fixture.case.config["num_nextn_predict_layers"]
    for logits_BTV, reference_BTV in zip(ours, oracle, strict=True):
        assert compare.largest_difference(logits_BTV, reference_BTV) < compare.LOGITS
    if ours:
        assert compare.largest_difference(ours[0], fixture.expected["mtp_logits"]) < compare.LOGITS


@on("odd_dims_no_q_lora_one_group")
def test_cached(fixture: Fixture) -> None:
    pieces = [5, 1, 20, 1]
    ours = compare.cached_logits(fixture.config, fixture.variables, fixture.tokens_BT[:, : sum(pieces)], pieces)
    assert compare.largest_difference(ours, fixture.expected["logits"][:, : sum(pieces)]) < compare.LOGITS


@on("published")
def test_greedy(fixture: Fixture) -> None:
    prompts = [fixture.tokens_BT[0, :length].tolist() for length in cases.LENGTHS]
    ours = compare.greedy(fixture.config, fixture.variables, prompts)
    assert ours == fixture.expected["greedy"].tolist()


@on("published", "raw_gate_two_mtp_depths")
def test_loss_and_gradients(fixture: Fixture) -> None:
    loss, gradients = compare.loss_and_gradients(fixture.config, fixture.variables, fixture.tokens_BT)
    theirs = {name.removeprefix("gradient/"): g for name, g in fixture.expected.items() if name.startswith("gradient/")}
    errors = compare.gradient_errors({name: gradients[name] for name in theirs}, theirs)
    assert abs(loss - fixture.expected["loss"]) < compare.LOSS
    assert max(errors.values()) < compare.GRADIENT, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("eh_proj", [True, False], ids=["fp8_eh_proj", "plain_eh_proj"])
def test_fp8_with_partial_blocks(tmp_path: Path, eh_proj: bool) -> None:
    """Every element is its stored value times the scale of its block, and the model of them has the right logits."""
    meant = write_fp8_checkpoint(cases.FP8, tmp_path, eh_proj)
    config, variables = load_hf(tmp_path)
    ours = compare.published_tensors(config, variables)
    copies = {name for name in meant if name.endswith(("embed_tokens.weight", "shared_head.head.weight"))} - ours.keys()
    assert ours.keys() | copies == meant.keys()
    chex.assert_trees_all_equal(ours, {name: meant[name] for name in ours})
    tokens_BT = random_tokens(cases.FP8, 2, 20)
    oracle = reference_model.forward(cases.FP8.config, meant, tokens_BT)
    out = compare.run(config, variables, tokens_BT)
    assert compare.largest_difference(out.logits, oracle.logits_BTV) < compare.LOGITS
    assert compare.largest_difference(out.mtp_logits[0], oracle.mtp_logits[0]) < compare.LOGITS


# --- What the fixtures can tell apart: the numpy model with one of the well-known mistakes in it. ---------------------

Tensors = dict[str, np.ndarray]
Mistake = Callable[[pytest.MonkeyPatch, dict[str, Any], Tensors], None]


def rotary_halves(patch: pytest.MonkeyPatch, config: dict[str, Any], tensors: Tensors) -> None:
    def by_halves(x_BTNP: np.ndarray, angles: np.ndarray) -> np.ndarray:
        turned = np.array_split(x_BTNP, 2, axis=-1)
        turned = (turned[0] + 1j * turned[1]) * angles[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    patch.setattr(reference_model, "apply_rope", by_halves)


def no_softmax_temperature(patch: pytest.MonkeyPatch, config: dict[str, Any], tensors: Tensors) -> None:
    width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    patch.setattr(reference_model, "softmax_scale", lambda config: width**-0.5)


def no_yarn(patch: pytest.MonkeyPatch, config: dict[str, Any], tensors: Tensors) -> None:
    scale = reference_model.softmax_scale(config)
    patch.setattr(reference_model, "softmax_scale", lambda config: scale)
    config["rope_scaling"] = None


def group_scored_by_its_best(patch: pytest.MonkeyPatch, config: dict[str, Any], tensors: Tensors) -> None:
    patch.setattr(reference_model, "group_score", lambda choice_BTGe: choice_BTGe.max(-1))


def dropped_groups_score_zero(patch: pytest.MonkeyPatch, config: dict[str, Any], tensors: Tensors) -> None:
    patch.setattr(reference_model, "drop_groups", lambda choice, is_kept: np.where(is_kept[..., None], choice, 0))


def bias_ignored(patch: pytest.MonkeyPatch, config: dict[str, Any], tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
        tensors[name] = np.zeros_like(tensors[name])


def gate_normalised_regardless(patch: pytest.MonkeyPatch, config: dict[str, Any], tensors: Tensors) -> None:
    config["norm_topk_prob"] = True


def bias_in_weights(patch: pytest.MonkeyPatch, config: dict[str, Any], tensors: Tensors) -> None:
    right = reference_model.route

    def route(config: Any, layer: Any, x_BTD: np.ndarray) -> reference_model.Routing:
        routing = right(config | {"norm_topk_prob": False, "routed_scaling_factor": 1.0}, layer, x_BTD)
        weight_BTK = routing.weight_BTK + layer["mlp.gate.e_score_correction_bias"][routing.chosen_BTK]
        if config["norm_topk_prob"]:
            weight_BTK = weight_BTK / weight_BTK.sum(-1, keepdims=True)
        return routing._replace(weight_BTK=weight_BTK * config["routed_scaling_factor"])

    patch.setattr(reference_model, "route", route)


def eh_proj_halves_swapped(patch: pytest.MonkeyPatch, config: dict[str, Any], tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("eh_proj.weight")]:
        tensors[name] = np.roll(tensors[name], tensors[name].shape[0], axis=1)


def mtp_uses_the_final_norm(patch: pytest.MonkeyPatch, config: dict[str, Any], tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("shared_head.norm.weight")]:
        tensors[name] = tensors["model.norm.weight"]


@pytest.mark.parametrize(
    ("mistake", "case_name", "seen_in"),
    [
        (rotary_halves, "published", "logits"),
        (no_softmax_temperature, "published", "logits"),
        (no_yarn, "published", "logits"),
        (group_scored_by_its_best, "published", "logits"),
        (dropped_groups_score_zero, "all_biases_negative", "logits"),
        (bias_ignored, "published", "logits"),
        (bias_in_weights, "published", "logits"),
        (gate_normalised_regardless, "raw_gate_two_mtp_depths", "logits"),
        (eh_proj_halves_swapped, "published", "mtp_logits"),
        (mtp_uses_the_final_norm, "published", "mtp_logits"),
    ],
)
def test_fixtures_would_show(mistake: Mistake, case_name: str, seen_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake moves the expected numbers by a hundred tolerances; without it the numpy model gives them."""
    (case,) = (case for case in cases.COMMITTED if case.name == case_name)
    folder = FIXTURES / case.name
    tensors, expected = load_file(folder / "model.safetensors"), np.load(folder / "expected.npz")
    wanted = expected[seen_in]

    def error(config: dict[str, Any]) -> float:
        oracle = reference_model.forward(config, tensors, expected["tokens"].astype(np.int32))
        return compare.largest_difference(oracle.logits_BTV if seen_in == "logits" else oracle.mtp_logits[0], wanted)

    assert error(case.config) < compare.LOGITS / 5
    config = dict(case.config)
    mistake(monkeypatch, config, tensors)
    assert error(config) > 100 * compare.LOGITS
