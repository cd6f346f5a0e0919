"""`python -m dsv3_jax.convert`, both ways, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from dsv3_jax import load_hf
from dsv3_jax.checkpoint.run import Checkpoints, load_run
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config.run import read_model
from dsv3_jax.convert import main
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.infer.load import load_model
from dsv3_jax.train.state import state_of
from tests.checkpoint import tiny

CONFIG = {**tiny.CONFIG, "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("source") / "hf", tiny.random_tensors(CONFIG, np.dtype(np.float32)), CONFIG)


@pytest.fixture(scope="module")
def run(source: Path) -> Path:
    path = source.parent / "run"
    main([str(source), str(path)])
    return path


def tensors(folder: Path) -> tiny.Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in tiny.load(file).items()}


def test_there_and_back_keeps_every_bit(source: Path, run: Path, tmp_path: Path):
    main([str(run), str(tmp_path / "back")])
    tiny.assert_identical(tensors(tmp_path / "back"), tensors(source))


def test_a_converted_run_can_be_trained_further(source: Path, run: Path):
    config, variables, step = load_run(str(run))
    assert step == 0
    _, expected = load_hf(source)
    chex.assert_trees_all_equal(variables, expected)
    fresh = state_of(config, expected).optimizer
    with Checkpoints(RunDirectory.existing(str(run))) as checkpoints:
        optimizer = checkpoints.restore(0, optimizer=fresh)["optimizer"]
    chex.assert_trees_all_equal(jax.tree.leaves(optimizer), jax.tree.leaves(fresh))


def test_a_run_is_there_whole_or_not_at_all(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half a run, with its config and no checkpoint, would be continued from random weights."""
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    seen: list[list[str]] = []

    def interrupted(checkpoints: Checkpoints, step: int, *items: Any) -> None:
        seen.append([path.name for path in tmp_path.iterdir() if not path.name.startswith(".")])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", interrupted)
        with pytest.raises(SystemExit):
            main([str(tmp_path / "hf"), str(tmp_path / "run")])
    assert seen == [["hf"]]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    main([str(tmp_path / "hf"), str(tmp_path / "run")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
    assert load_run(str(tmp_path / "run"))[0].data.tokenizer == str(tmp_path / "run" / "tokenizer.json")
    assert (tmp_path / "run" / "tokenizer.json").read_text() == "{}"


BESIDE = {
    "tokenizer_config.json": {"bos_token": "<bos>", "add_bos_token": False, "model_max_length": 64, "tokenizer_class": "X"},
    "special_tokens_map.json": {"eos_token": {"content": "<eos>"}, "pad_token": "<eos>"},
    "generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True},
}
"""Files beside a tokenizer; a turn ends at token 2, too."""
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<turn>{% endfor %}"


def write_beside(folder: Path, beside: dict[str, Any]) -> None:
    """Add a tokenizer with <bos>, <eos> and <turn> as 0, 1 and 2, a chat template and other files to a folder."""
    train_tokenizer(["ab"], 300, ["<bos>", "<eos>", "<turn>"]).save(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TURNS)
    for name, content in beside.items():
        (folder / name).write_text(json.dumps(content))


def test_what_lies_beside_the_tokenizer_is_there_again(source: Path, tmp_path: Path):
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    tiny.write(folder, tiny.random_tensors(config, np.dtype(np.float32)), config)
    write_beside(folder, BESIDE)
    main([str(folder), str(tmp_path / "run")])
    main([str(tmp_path / "run"), str(tmp_path / "back")])
    for name in ("tokenizer.json", "chat_template.jinja", *BESIDE):
        for copy in ("run", "back"):
            assert (tmp_path / copy / name).read_bytes() == (folder / name).read_bytes(), (copy, name)
    # Every token that ends a turn is known wherever the model is read, and config.json names them all.
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [1, 2]
    models = (
        load_hf(folder)[0],
        load_hf(tmp_path / "back")[0],
        load_run(str(tmp_path / "run"))[0].model,
        read_model(str(folder)),
    )
    assert [tuple(model.eos_token_ids) for model in models] == [(1, 2)] * 4


def test_files_of_a_tokenizer_that_is_not_read_here_travel_too(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As Kimi-K2's, which has no tokenizer.json."""
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    names = "tiktoken.model", "tokenization_kimi.py", "tokenizer_config.json", "chat_template.jinja"
    for name in names:
        (folder / name).write_text("{}")
    main([str(folder), str(tmp_path / "run")])
    main([str(tmp_path / "run"), str(tmp_path / "back")])
    assert capsys.readouterr().out.count("(no tokenizer.json)") == 2
    assert all((tmp_path / "back" / name).read_text() == "{}" for name in names)


@pytest.mark.parametrize("named", [None, 1, [1]])
def test_the_end_that_only_the_template_writes_is_named_by_an_export(source: Path, tmp_path: Path, named: Any):
    folder = Path(shutil.copytree(source, tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
    tiny.write(folder, tiny.random_tensors(config, np.dtype(np.float32)), config)
    write_beside(folder, {} if named is None else {"generation_config.json": {"eos_token_id": named, "top_p": 0.9}})
    main([str(folder), str(tmp_path / "run")])
    main([str(tmp_path / "run"), str(tmp_path / "back")])
    written = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert written == ({"bos_token_id": 0} if named is None else {"top_p": 0.9}) | {"eos_token_id": [1, 2]}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [1, 2]
    for path in (folder, tmp_path / "run", tmp_path / "back"):
        assert tuple(load_model(str(path)).config.eos_token_ids) == (1, 2)


def test_to_hugging_face_in_another_dtype(run: Path, tmp_path: Path):
    main([str(run), str(tmp_path / "half"), "--dtype", "bfloat16"])
    found = tensors(tmp_path / "half")
    assert {tensor.dtype for name, tensor in found.items() if tiny.BIAS not in name} == {tiny.BF16}
    assert {tensor.dtype for name, tensor in found.items() if tiny.BIAS in name} == {np.dtype(np.float32)}


def test_scales_are_powers_of_two_again(run: Path, tmp_path: Path):
    """Of a checkpoint whose config.json says so; its values survive, once its scales are such."""
    main([str(run), str(tmp_path / "0"), "--fp8"])
    file = tmp_path / "0" / "config.json"
    published = json.loads(file.read_text())
    published["quantization_config"]["scale_fmt"] = "ue8m0"
    file.write_text(json.dumps(published))
    for i in (1, 2):
        main([str(tmp_path / f"{i - 1}"), str(tmp_path / f"run_{i}")])
        main([str(tmp_path / f"run_{i}"), str(tmp_path / f"{i}"), "--fp8"])
        written = json.loads((tmp_path / f"{i}" / "config.json").read_text())
        assert written["quantization_config"] == published["quantization_config"]
        scales = [tensor for name, tensor in tensors(tmp_path / f"{i}").items() if name.endswith("_scale_inv")]
        assert all((np.frexp(scale)[0] == 0.5).all() for scale in scales)
    chex.assert_trees_all_equal(load_hf(tmp_path / "2")[1], load_hf(tmp_path / "1")[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere holds no config.json"),
        (["foreign", "out"], "neither a run's config nor a Hugging Face one"),
        (["{source}", "full"], "full"),
        (["{source}", "out", "--fp8"], "--fp8 is for writing Hugging Face folders"),
        (["{source}"], "target"),
        (["{source}", "out", "--dtype", "int3"], "--dtype: invalid choice: 'int3' (choose from"),
        (["{source}", "out", "--dtype", "float64"], "--dtype: invalid choice: 'float64' (choose from"),
    ],
)
def test_refuses_in_one_line(
    arguments: list[str],
    message: str,
    source: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    for name, content in {"foreign/config.json": "{}", "full/notes.txt": "mine"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content) if name.endswith("txt") else content)
    with pytest.raises(SystemExit) as exit_code:
        main([argument.format(source=source, run=run) for argument in arguments])
    assert exit_code.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
