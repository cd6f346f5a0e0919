"""Checkpoints of a run: every bit comes back, the newest are kept, and what is no run is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.checkpoint.run import Checkpoints, load_run
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import CheckpointConfig, Config, OptimizerConfig, TrainConfig
from dsv3_jax.model.sharding import variable_shardings
from dsv3_jax.train.optimizer import make_optimizer
from tests.checkpoint.test_run_damage import assert_same_bits
from tests.checkpoint.tiny import make_mesh
from tests.model.tiny import MOE_ONLY as CONFIG
from tests.model.tiny import random_variables

RUN = Config(
    model=CONFIG,
    optimizer=OptimizerConfig(moment_dtype="bfloat16"),
    train=TrainConfig(steps=3, sequence_length=16),
    checkpoint=CheckpointConfig(every=1, keep=2),
)
Tree = Any


@functools.cache
def state(seed: int) -> tuple[dict[str, Any], Tree]:
    """Random variables, and an optimizer that has taken a step from them."""
    variables = jax.tree.map(jnp.asarray, random_variables(CONFIG, seed))
    return variables, _taken_step(variables["params"])


@jax.jit
def _taken_step(params: Tree) -> Tree:
    optimizer = make_optimizer(RUN.optimizer)
    return optimizer.update(params, optimizer.init(params), params)[1]


def cast(tree: Tree, dtype: str) -> Tree:
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), tree)


def like(tree: Tree) -> Tree:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1, 2 and 3 behind it."""
    path = tmp_path_factory.mktemp("run")
    run = RunDirectory.create_or_resume(str(path), RUN, resume=False)
    with Checkpoints(run, RUN.checkpoint) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 2, 3):
            checkpoints.save(step, *state(step))
    return path


@pytest.mark.parametrize("step", [2, 3])
def test_every_bit_comes_back_in_the_same_structure(saved: Path, step: int) -> None:
    variables, optimizer = state(step)
    with Checkpoints(RunDirectory.existing(str(saved)), RUN.checkpoint) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored = checkpoints.restore(step, variables=like(variables), optimizer=like(optimizer))
    assert_same_bits(restored, {"variables": variables, "optimizer": optimizer})
    assert any(isinstance(part, optax.ScaleByAdamState) for part in restored["optimizer"])
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(restored["optimizer"])}
    assert dtypes == {"int32", "bfloat16"}


def test_the_newest_are_kept(saved: Path) -> None:
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["2", "3"]


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    run = RunDirectory.create_or_resume(str(tmp_path), RUN, resume=False)
    tree = {"w": jnp.arange(6.0)}
    for steps in (range(1, 6), range(6, 10)):  # Across a restart, too.
        with Checkpoints(run, CheckpointConfig(every=1, keep=2, keep_every=3)) as checkpoints:
            for step in steps:
                checkpoints.save(step, tree, tree)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "6", "8", "9"]


def test_the_record_says_what_a_checkpoint_is_of(saved: Path, tmp_path: Path) -> None:
    run = RunDirectory.create_or_resume(str(tmp_path), RUN, resume=False)
    tree = {"w": jnp.arange(6.0)}
    with Checkpoints(run, RUN.checkpoint) as checkpoints:
        assert checkpoints.restore_newest(variables=tree) is None
        checkpoints.save(2, tree, tree, {"skipped": 3, "best": None})
        checkpoints.wait()
        restored = checkpoints.restore_newest(variables=tree)
    assert restored is not None
    assert restored.items.keys() == {"variables"}
    record = restored.record
    assert (record.step, record.tokens) == (2, 2 * RUN.train.batch_size * RUN.train.sequence_length)
    assert record.counters == {"skipped": 3, "best": None}
    assert Config.from_json(json.dumps(record.config)) == RUN
    assert record.arrays["variables"]["w"].shape == (6,)


def test_one_item_is_read_without_the_other(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(saved, path)
    shutil.rmtree(path / "checkpoints" / "3" / "optimizer")
    _, variables, step = load_run(str(path))
    assert step == 3
    assert_same_bits(variables, state(3)[0])


def test_arrays_may_be_donated_as_soon_as_saving_has_begun(tmp_path: Path) -> None:
    run = RunDirectory.create_or_resume(str(tmp_path), RUN, resume=False)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    unsaved = {"params": jnp.zeros((2000, 1000)), "router": jnp.zeros(7)}
    overwrite(unsaved)
    assert unsaved["params"].is_deleted()  # JAX refuses to donate only what somebody still reads, as saving may.
    tree = {"params": jnp.zeros((2000, 1000)), "router": jnp.zeros(7)}
    with Checkpoints(run, RUN.checkpoint) as checkpoints:
        checkpoints.save(1, tree, {"count": jnp.zeros(())})
        for _ in range(3):
            tree = overwrite(tree)
    with Checkpoints(run, RUN.checkpoint) as checkpoints:
        restored = checkpoints.restore(1, variables=like(tree))["variables"]
    chex.assert_trees_all_equal(restored, jax.tree.map(jnp.zeros_like, tree))


def test_a_relative_path_will_do(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory.create_or_resume("runs/a", RUN, resume=False)
    variables, optimizer = state(1)
    with Checkpoints(run, RUN.checkpoint) as checkpoints:
        checkpoints.save(7, variables, optimizer)
    _, loaded, step = load_run("runs/a")
    assert step == 7
    assert_same_bits(loaded, variables)
    assert [path.name for path in (tmp_path / "runs" / "a" / "checkpoints").iterdir()] == ["7"]


def test_load_run_gives_the_newest_with_its_config(saved: Path) -> None:
    config, variables, step = load_run(str(saved))
    assert (config, step) == (RUN, 3)
    assert_same_bits(variables, state(3)[0])
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(variables)} == {jax.devices()[0]}


def test_load_run_casts_the_parameters_and_not_the_biases(saved: Path) -> None:
    config, variables, _ = load_run(str(saved), "bfloat16")
    expected, _ = state(3)
    assert config == dataclasses.replace(RUN, model=dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16"))
    assert_same_bits(variables["params"], cast(expected["params"], "bfloat16"))
    assert_same_bits(variables["router"], expected["router"])


def test_a_save_cut_short_is_not_a_checkpoint(saved: Path, tmp_path: Path) -> None:
    """Orbax writes under another name and renames at the end."""
    path = tmp_path / "run"
    shutil.copytree(saved, path)
    (path / "checkpoints" / "3").rename(path / "checkpoints" / "3.orbax-checkpoint-tmp")
    assert load_run(str(path))[2] == 2


def test_load_run_refuses_what_holds_no_checkpoint(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        load_run(str(tmp_path / "missing"))
    path = tmp_path / "run"
    RunDirectory.create_or_resume(str(path), RUN, resume=False)
    with pytest.raises(ValueError, match=r"holds no checkpoint yet; let the run reach its first \(checkpoint.every steps\)"):
        load_run(str(path))
    assert not (path / "checkpoints").exists()
    (path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no complete checkpoint yet"):
        load_run(str(path))


def copied(saved: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run to break, and its newest checkpoint."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run", tmp_path / "run" / "checkpoints" / "3"


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_run(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "difference"),
    [
        ("moe_intermediate_size", 9, r"params/.* is \[.*\] there and \[.*\] here"),
        ("num_nextn_predict_layers", 0, r"params/mtp_0/.* is \[.*\] there and nothing here"),
        ("num_nextn_predict_layers", 2, r"params/mtp_1/.* is nothing there and \[.*\] here"),
    ],
)
def test_load_run_refuses_weights_of_another_model(
    saved: Path, tmp_path: Path, field: str, value: int, difference: str
) -> None:
    path, checkpoint = copied(saved, tmp_path)
    other = dataclasses.replace(RUN, model=dataclasses.replace(CONFIG, **{field: value}))
    (path / "config.json").write_text(other.to_json())
    message = "variables holds another model than config.json describes: "
    refused(path, f"^{checkpoint}/{message}{difference}; restore the config.json of the run$")


def test_load_run_takes_the_newest_that_is_whole(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, checkpoint = copied(saved, tmp_path)
    shutil.rmtree(checkpoint / "variables")
    # The optimizer is not looked at.
    shutil.rmtree(path / "checkpoints" / "2" / "optimizer")
    _, variables, step = load_run(str(path), "bfloat16")
    expected, _ = state(2)
    assert step == 2
    assert_same_bits(variables["params"], cast(expected["params"], "bfloat16"))
    assert_same_bits(variables["router"], expected["router"])
    assert capsys.readouterr().err == f"warning: {checkpoint} is damaged (it lacks variables); step 2 is used instead\n"
    shutil.rmtree(path / "checkpoints" / "2" / "progress")
    refused(path, f"^no checkpoint is whole: {checkpoint} is damaged .it lacks variables.; .*2 is damaged .it lacks progress")


def test_load_run_lays_the_variables_out_over_a_mesh(saved: Path) -> None:
    mesh = make_mesh(data=4, fsdp=2)
    _, variables, _ = load_run(str(saved), "bfloat16", mesh)
    expected, _ = state(3)
    assert jax.tree.map(lambda leaf: leaf.sharding, variables) == variable_shardings(CONFIG, mesh)
    assert_same_bits(variables["params"], cast(expected["params"], "bfloat16"))
    assert_same_bits(variables["router"], expected["router"])


def test_arrays_come_back_on_the_mesh_that_is_asked_for(tmp_path: Path) -> None:
    """Written from two devices, read onto eight."""
    run = RunDirectory.create_or_resume(str(tmp_path), RUN, resume=False)
    values = {"w": np.arange(128, dtype=np.float32).reshape(16, 8)}
    places = [
        jax.sharding.NamedSharding(jax.make_mesh((count,), ("fsdp",), devices=jax.devices()[:count]), jax.P("fsdp"))
        for count in (2, 8)
    ]
    with Checkpoints(run, RUN.checkpoint) as checkpoints:
        checkpoints.save(1, jax.device_put(values, places[0]), {"count": jnp.zeros(())})
    with Checkpoints(run, RUN.checkpoint) as checkpoints:
        restored = checkpoints.restore(1, variables=jax.device_put(jax.tree.map(np.zeros_like, values), places[1]))
        assert restored["variables"]["w"].sharding == places[1]
        np.testing.assert_array_equal(restored["variables"]["w"], values["w"])
        wider = {"w": jax.device_put(np.zeros((16, 16), np.float32), places[1])}
        with pytest.raises(ValueError, match=r"w is \[16, 8\] there and \[16, 16\] here"):
            checkpoints.restore(1, variables=wider)
