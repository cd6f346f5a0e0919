"""`dsv3_jax` beside transformers, live: the same random checkpoints, read by both from the same folder (`make parity`).

transformers is imported by a fixture and not above, for the default suite, which needs no torch, collects this file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsv3_jax import ModelConfig, load_hf, save_hf
from tests import reference_model
from tests.parity import cases, compare
from tests.parity.cases import Case
from tests.parity.fp8_checkpoints import write_fp8_checkpoint
from tests.parity.reference_checkpoints import random_tokens, write_checkpoint

pytestmark = pytest.mark.parity

# Closest that any choice of experts, or of a greedy token, may come to falling otherwise: far above float32 noise.
CHOICE_MARGIN = 1e-5
BATCH = 2


@dataclasses.dataclass(frozen=True)
class Subject:
    """One case, on disk and in both frameworks."""

    case: Case
    folder: Path
    tensors: dict[str, np.ndarray]
    theirs: Any
    config: ModelConfig
    variables: dict[str, Any]


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    return importlib.import_module("tests.parity.transformers_reference")


@pytest.fixture(scope="session")
def subjects(tmp_path_factory: pytest.TempPathFactory, transformers: ModuleType) -> Callable[[str], Subject]:
    """Each case by name, made once."""

    @functools.cache
    def make(name: str) -> Subject:
        (case,) = (case for case in cases.LIVE if case.name == name)
        folder = tmp_path_factory.mktemp(name)
        tensors = write_checkpoint(case, folder)
        return Subject(case, folder, tensors, transformers.load(folder), *load_hf(folder))

    return make


@pytest.fixture(params=[case.name for case in cases.LIVE])
def subject(request: pytest.FixtureRequest, subjects: Callable[[str], Subject]) -> Subject:
    return subjects(request.param)


def on(*names: str) -> pytest.MarkDecorator:
    """These cases only: a pairwise cover, together with what `tests/test_parity_fixtures.py` tries of the same choices."""
    return pytest.mark.parametrize("subject", names, indirect=True)


def on_each(name: str, **values: Any) -> pytest.MarkDecorator:
    """The same, with an argument of this name for each case."""
    return pytest.mark.parametrize(("subject", name), values.items(), indirect=["subject"])


def test_oracle_is_transformers(subject: Subject, transformers: ModuleType) -> None:
    """In float64 the numpy model and transformers are the same to 1e-9: the other tests may lean on the former."""
    case, tokens_BT = subject.case, random_tokens(subject.case, BATCH, 300)
    oracle = reference_model.forward(case.config, subject.tensors, tokens_BT)
    with transformers.float64_throughout():
        model = transformers.load(subject.folder, dtype=transformers.torch.float64)
        theirs = transformers.forward(model, tokens_BT)
        if oracle.mtp_logits:
            mtp_logits, _ = transformers.mtp_logits(model, case.config, subject.tensors, tokens_BT)
            assert compare.largest_difference(oracle.mtp_logits[0], mtp_logits) < 1e-9
    assert compare.largest_difference(oracle.logits_BTV, theirs["logits"]) < 1e-9
    assert compare.largest_difference(oracle.hidden_states, theirs["hidden_states"]) < 1e-9
    assert len(oracle.routings) == len(theirs["routes"]) == subject.config.num_moe_layers
    for routing, chosen_BTK in zip(oracle.routings, theirs["routes"], strict=True):
        np.testing.assert_array_equal(np.sort(routing.chosen_BTK, axis=-1), chosen_BTK)


def test_checkpoint_tests_what_it_should(subject: Subject) -> None:
    """No choice is a near tie, logits are as spread as the tolerance presumes, every expert has a bias of its own."""
    oracle = reference_model.forward(subject.case.config, subject.tensors, random_tokens(subject.case, BATCH, 300))
    assert oracle.margin > CHOICE_MARGIN
    assert 1.5 < oracle.logits_BTV.std() < 2.5
    biases = [tensor for name, tensor in subject.tensors.items() if name.endswith("e_score_correction_bias")]
    assert all(len(np.unique(bias)) == bias.size and bias.min() < -2 for bias in biases)


def test_forward(subject: Subject, transformers: ModuleType) -> None:
    check_forward(subject, transformers, max(cases.LENGTHS))


@on_each("length", all_biases_negative=1, moonlight=7, odd_dims=7, raw_gate=1)
def test_forward_short(subject: Subject, transformers: ModuleType, length: int) -> None:
    check_forward(subject, transformers, length)


def check_forward(subject: Subject, transformers: ModuleType, length: int) -> None:
    tokens_BT = random_tokens(subject.case, BATCH, length)
    theirs = transformers.forward(subject.theirs, tokens_BT)
    ours = compare.run(subject.config, subject.variables, tokens_BT)
    chex.assert_shape(ours.logits, (BATCH, length, subject.config.vocab_size))
    chex.assert_type([ours.logits, ours.hidden_states], jnp.float32)
    assert compare.largest_difference(ours.logits, theirs["logits"]) < compare.LOGITS
    assert compare.largest_difference(ours.hidden_states, theirs["hidden_states"]) < compare.HIDDEN_STATES
    if subject.config.num_moe_layers:
        np.testing.assert_array_equal(np.sort(ours.routes, axis=-1), theirs["routes"])


@on_each("absorbed", odd_dims=True, moonlight=False, raw_gate=True, two_mtp_depths=False)
def test_attention_in_chunks(subject: Subject, transformers: ModuleType, absorbed: bool) -> None:
    """Tiles that do not divide the sequence, in either form of attention."""
    tokens_BT = random_tokens(subject.case, BATCH, 300)
    theirs = transformers.forward(subject.theirs, tokens_BT)
    config = dataclasses.replace(subject.config, attention_chunk=64)
    ours = compare.run(config, subject.variables, tokens_BT, absorbed)
    assert compare.largest_difference(ours.logits, theirs["logits"]) < compare.LOGITS
    assert compare.largest_difference(ours.hidden_states, theirs["hidden_states"]) < compare.HIDDEN_STATES


@on("odd_dims", "raw_gate", "all_dense")
def test_cached(subject: Subject, transformers: ModuleType) -> None:
    """A prompt, then pieces of several tokens, then single ones, all upon the latent cache."""
    pieces = [7, 1, 1, 30, 1]
    tokens_BT = random_tokens(subject.case, BATCH, sum(pieces))
    theirs = transformers.forward(subject.theirs, tokens_BT)
    ours = compare.cached_logits(subject.config, subject.variables, tokens_BT, pieces)
    assert compare.largest_difference(ours, theirs["logits"]) < compare.LOGITS


@on_each("drafts", moonlight=0, odd_dims=3, raw_gate=1, two_mtp_depths=1, all_dense=None)
def test_greedy(subject: Subject, transformers: ModuleType, drafts: int | None) -> None:
    """By the default engine, or with so many drafts a step, in small chunks and pages."""
    prompts = [random_tokens(subject.case, 1, length)[0].tolist() for length in cases.LENGTHS]
    theirs = [transformers.greedy(subject.theirs, np.array(prompt), cases.GREEDY_TOKENS) for prompt in prompts]
    assert all(len(tokens) == cases.GREEDY_TOKENS for tokens in theirs), "an end-of-text token cut the reference short"
    options = {} if drafts is None else {"drafts": drafts, "chunk": 16, "page_size": 16}
    assert compare.greedy(subject.config, subject.variables, prompts, **options) == theirs


def test_mtp(subject: Subject, transformers: ModuleType) -> None:
    """Every depth against the numpy model; the first also against transformers' `MtpModel`, logits and greedy drafts."""
    check_mtp(subject, transformers, max(cases.LENGTHS))


@on("odd_dims")
def test_mtp_short(subject: Subject, transformers: ModuleType) -> None:
    check_mtp(subject, transformers, 7)


def check_mtp(subject: Subject, transformers: ModuleType, length: int) -> None:
    case, depths = subject.case, subject.case.config["num_nextn_predict_layers"]
    tokens_BT = random_tokens(case, BATCH, length)
    oracle = reference_model.forward(case.config, subject.tensors, tokens_BT)
    ours = compare.run(subject.config, subject.variables, tokens_BT)
    assert len(ours.mtp_logits) == len(oracle.mtp_logits) == depths
    for logits_BTV, reference_BTV in zip(ours.mtp_logits, oracle.mtp_logits, strict=True):
        assert compare.largest_difference(logits_BTV, reference_BTV) < compare.LOGITS
    if depths:
        theirs, draft_B = transformers.mtp_logits(subject.theirs, case.config, subject.tensors, tokens_BT)
        assert compare.largest_difference(ours.mtp_logits[0], theirs) < compare.LOGITS
        np.testing.assert_array_equal(np.argmax(ours.mtp_logits[0], -1), np.argmax(theirs, -1))
        np.testing.assert_array_equal(np.argmax(ours.mtp_logits[0][:, -1], -1), draft_B)


@on("moonlight", "odd_dims", "all_dense")
def test_loss_and_gradients(subject: Subject, transformers: ModuleType) -> None:
    tokens_BT = random_tokens(subject.case, BATCH, 100)
    their_loss, theirs = transformers.loss_and_gradients(subject.theirs, tokens_BT)
    loss, ours = compare.loss_and_gradients(subject.config, subject.variables, tokens_BT)
    mtp = tuple(f"model.layers.{subject.config.num_hidden_layers + k}." for k in range(2))
    assert all(not gradient.any() for name, gradient in ours.items() if name.startswith(mtp))
    errors = compare.gradient_errors({name: g for name, g in ours.items() if not name.startswith(mtp)}, theirs)
    assert abs(loss - their_loss) < compare.LOSS
    assert max(errors.values()) < compare.GRADIENT, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_round_trip(subject: Subject, transformers: ModuleType, tmp_path: Path, dtype: Any) -> None:
    """load_hf, save_hf: the same tensors to the bit, biases float32 all the while, and transformers none the wiser."""
    written, saved = tmp_path / "written", tmp_path / "saved"
    written.mkdir()
    config = subject.case.config | {"torch_dtype": np.dtype(dtype).name}
    (written / "config.json").write_text(json.dumps(config))
    tensors = {
        name: tensor if name.endswith("e_score_correction_bias") else tensor.astype(dtype)
        for name, tensor in subject.tensors.items()
    }
    save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
    loaded = load_hf(written, dtype=dtype)
    chex.assert_type(jax.tree.leaves(loaded[1]["params"]), dtype)
    chex.assert_type(jax.tree.leaves(loaded[1]["router"]), jnp.float32)
    save_hf(saved, *loaded)

    after = {name: tensor for file in saved.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
        assert after[name].tobytes() == tensor.tobytes(), name

    tokens_BT = random_tokens(subject.case, BATCH, 7)
    before, again = (transformers.forward(transformers.load(folder), tokens_BT) for folder in (written, saved))
    np.testing.assert_array_equal(before["logits"], again["logits"])
    np.testing.assert_array_equal(before["routes"], again["routes"])


def test_loads_what_transformers_saves(subject: Subject, tmp_path: Path) -> None:
    """Its newer spelling of config.json; it writes no MTP layer, and is told so, for its config claims one."""
    subject.theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= saved.keys()
    (tmp_path / "config.json").write_text(json.dumps(saved | {"num_nextn_predict_layers": 0}))
    config, variables = load_hf(tmp_path)
    without_mtp = dataclasses.replace(subject.config, num_nextn_predict_layers=0)
    assert dataclasses.replace(config, aux_loss_alpha=without_mtp.aux_loss_alpha) == without_mtp
    main = {
        collection: {name: leaf for name, leaf in tree.items() if not name.startswith("mtp_")}
        for collection, tree in subject.variables.items()
    }
    chex.assert_trees_all_equal(variables, main)


def test_fp8_with_partial_blocks(transformers: ModuleType, tmp_path: Path) -> None:
    """Our reading of FP8 blocks gives the logits that transformers has of the same weights spelled out in float32."""
    meant = write_fp8_checkpoint(cases.FP8, tmp_path / "fp8", eh_proj=True)
    (tmp_path / "float32").mkdir()
    (tmp_path / "float32" / "config.json").write_text(json.dumps(cases.FP8.config))
    save_file(meant, tmp_path / "float32" / "model.safetensors", metadata={"format": "pt"})
    tokens_BT = random_tokens(cases.FP8, BATCH, 60)
    theirs = transformers.forward(transformers.load(tmp_path / "float32"), tokens_BT)
    ours = compare.run(*load_hf(tmp_path / "fp8"), tokens_BT)
    assert compare.largest_difference(ours.logits, theirs["logits"]) < compare.LOGITS
    np.testing.assert_array_equal(np.sort(ours.routes, axis=-1), theirs["routes"])


@pytest.mark.parametrize("case", cases.COMMITTED, ids=lambda case: case.name)
def test_committed_fixtures_hold(case: Case, transformers: ModuleType) -> None:
    """What is committed is what transformers still says of the committed weights."""
    make_fixtures = importlib.import_module("tests.parity.make_fixtures")
    folder = make_fixtures.FIXTURES / case.name
    assert json.loads((folder / "config.json").read_text()) == case.config
    committed = dict(np.load(folder / "expected.npz"))
    fresh = make_fixtures.expectations(case, folder, load_file(folder / "model.safetensors"))
    assert committed.keys() == fresh.keys()
    for name in ("tokens", "routes", "greedy"):
        np.testing.assert_array_equal(committed[name], fresh[name])
    for name, tolerance in {"logits": 1e-4, "hidden_states": 1e-4, "mtp_logits": 1e-4, "loss": compare.LOSS}.items():
        if name in fresh:
            assert compare.largest_difference(committed[name], fresh[name]) < tolerance, name
    gradients = [{name: g for name, g in arrays.items() if name.startswith("gradient/")} for arrays in (fresh, committed)]
    assert max(compare.gradient_errors(*gradients).values()) < compare.GRADIENT
