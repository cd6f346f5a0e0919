"""Overrides, `--help`, and the one line that a mistake gets."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
import sys
import typing

import pytest

from dsv3_jax.config import Config, ModelConfig, RopeScaling, TrainConfig
from dsv3_jax.config.cli import cli_main, load_config, parse_flags, parse_run, parse_with_config

CONFIG = """
from dsv3_jax.config import Config, ModelConfig, RopeScaling, TrainConfig

config = Config(
    model=ModelConfig(hidden_size=96, rope_scaling=RopeScaling(factor=4.0, beta_fast=16.0)),
    train=TrainConfig(steps=7, sequence_length=128),
)
"""


@pytest.fixture
def config_file(tmp_path: pathlib.Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(CONFIG)
    return str(file)


def leaves(cls: type, prefix: str = "") -> list[str]:
    """Dotted name of every field that is not a group, read from the dataclasses."""
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        groups = [arm for arm in (hint, *typing.get_args(hint)) if isinstance(arm, type) and dataclasses.is_dataclass(arm)]
        names += leaves(groups[0], f"{prefix}{name}.") if groups else [prefix + name]
    return names


def test_without_arguments_it_is_the_file(config_file: str):
    arguments = parse_run(["--config", config_file])
    assert arguments.config == load_config(config_file)
    assert arguments.config.model.hidden_size == 96
    assert (arguments.run_dir, arguments.resume) == ("runs/mine", False)


def test_the_default_file_is_tiny():
    arguments = parse_run([])
    assert (arguments.config, arguments.run_dir) == (load_config("configs/tiny.py"), "runs/tiny")


@pytest.mark.parametrize("run_dir", [["--run-dir", "a/b"], ["--run_dir=a/b"]])
def test_flags_beside_the_fields(config_file: str, run_dir: list[str]):
    arguments = parse_run(["--resume", "--config", config_file, *run_dir])
    assert (arguments.run_dir, arguments.resume, arguments.profile) == ("a/b", True, None)
    assert parse_run(["--config", config_file, "--profile", "10:13"]).profile == "10:13"


def test_fields_of_every_type(config_file: str):
    given = (
        "--train.steps 200 --mesh.expert=4 --mesh.fsdp -1 --optimizer.learning-rate 1e-3 --model.hidden_size 64 "
        "--model.norm_topk_prob False --model.q_lora_rank None --model.remat full --model.eos_token_id 3 5 "
        "--data.tokenizer t.json --infer.prompt=--x --train.steps 300"
    )
    config = parse_run(["--config", config_file, *given.split()]).config
    assert config.train == TrainConfig(steps=300, sequence_length=128)
    assert (config.mesh.expert, config.mesh.fsdp, config.optimizer.learning_rate) == (4, -1, 1e-3)
    assert config.model == dataclasses.replace(
        load_config(config_file).model,
        hidden_size=64, norm_topk_prob=False, q_lora_rank=None, remat="full", eos_token_id=(3, 5),
    )  # fmt: skip
    assert (config.model.eos_token_id, config.model.bos_token_id) == ((3, 5), 0)
    assert (config.data.tokenizer, config.infer.prompt) == ("t.json", "--x")


def test_a_mixture_is_sources_and_weights(config_file: str):
    given = ["--data.mixture", "a.jsonl", "0.7", "dir b", "3", "--data.fim-tokens", "<b>", "<h>", "<e>"]
    data = parse_run(["--config", config_file, *given]).config.data
    assert data.mixture == (("a.jsonl", 0.7), ("dir b", 3.0))
    assert data.fim_tokens == ("<b>", "<h>", "<e>")


def test_fields_that_contradict_each_other_one_at_a_time(config_file: str):
    """All changes of a group are made at once: with 8 groups of 256 experts, neither of these could come first."""
    given = ["--model.n_group", "3", "--model.n_routed_experts", "9", "--model.topk_group", "3"]
    model = parse_run(["--config", config_file, *given]).config.model
    assert (model.n_group, model.n_routed_experts) == (3, 9)


def test_rope_scaling_is_set_changed_and_removed(config_file: str):
    def rope_scaling(*given: str) -> RopeScaling | None:
        return parse_run(list(given)).config.model.rope_scaling

    assert rope_scaling("--config", config_file, "--model.rope_scaling.factor", "40") == RopeScaling(
        factor=40.0, beta_fast=16.0
    )
    assert rope_scaling("--config", config_file, "--model.rope_scaling", "None") is None
    assert rope_scaling("--model.rope_scaling.factor", "8") == RopeScaling(factor=8.0)
    assert rope_scaling("--model.rope_scaling.mscale", "None") == RopeScaling(mscale=None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--train.step 3", "--train.step does not exist; the nearest is --train.steps"),
        ("--steps 3", "--steps does not exist; the nearest is --train.steps"),
        ("--optimizer.batch-size 3", "--optimizer.batch_size does not exist; the nearest is --train.batch_size"),
        ("--resumed", "--resumed does not exist; the nearest is --resume"),
        ("--learning-rate 1", "--learning_rate does not exist; the nearest is --optimizer.learning_rate"),
        ("--model.num_layers 4", "--model.num_layers does not exist; the nearest is --model.num_hidden_layers"),
        ("--train.steps many", "--train.steps is 'many'; give an integer"),
        ("--train.steps 1.5", "--train.steps is '1.5'; give an integer"),
        ("--train.steps 1 2", "--train.steps is '1 2'; give an integer"),
        ("--train.steps", "--train.steps has no value; give an integer"),
        ("--optimizer.beta1 high", "--optimizer.beta1 is 'high'; give a number"),
        ("--model.eos_token_id 1 x", "--model.eos_token_id is '1 x'; give an integer or several integers or None"),
        ("--model.q_lora_rank no", "--model.q_lora_rank is 'no'; give an integer or None"),
        ("--data.mixture a.jsonl", "--data.mixture is 'a.jsonl'; give texts, each followed by a number"),
        ("--data.mixture a.jsonl many", "--data.mixture is 'a.jsonl many'; give texts, each followed by a number"),
        ("--data.mixture a 1 a 2", "data.mixture names a source twice: ['a', 'a']; add up its weights"),
        ("--data.fim-tokens a b", "--data.fim_tokens is 'a b'; give three texts"),
        ("--data.kind code", "--data.kind is 'code'; give text or chat"),
        ("--model.norm_topk_prob 1", "--model.norm_topk_prob is '1'; give True or False"),
        ("--model.remat ful", "--model.remat is 'ful'; give none or save_latents or full"),
        ("--model.rope_scaling yarn", "--model.rope_scaling is 'yarn'; give None"),
        (
            "--model.rope_scaling None --model.rope_scaling.factor 2",
            "--model.rope_scaling None contradicts --model.rope_scaling.factor; keep one of the two",
        ),
        ("stray --config configs/tiny.py", "'stray' belongs to no option"),
        ("--model.n_group 3", "n_routed_experts (256) is not a multiple of n_group (3)"),
        ("--train.sequence_length 5000", "train.sequence_length (5000) exceeds model.max_position_embeddings (4096)"),
        ("--config nothing.py", "config file 'nothing.py' does not exist"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    given: str, message: str, config_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("DSV3_JAX_TRACEBACK", raising=False)
    arguments = given.split() if "--config" in given else ["--config", config_file, *given.split()]
    with pytest.raises(SystemExit) as exit_info:
        cli_main(lambda: parse_run(arguments))()
    captured = capsys.readouterr()
    assert exit_info.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSV3_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="does not exist"):
        cli_main(lambda: parse_run(["--nothing"]))()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(28, "No space left on device", "x"), 2, "error: [Errno 28] No space left on device: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_the_machine_or_the_user_ends_gets_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def main() -> None:
        raise error

    monkeypatch.delenv("DSV3_JAX_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as exit_info:
        cli_main(main)()
    assert (exit_info.value.code, capsys.readouterr().err) == (code, line)
    monkeypatch.setenv("DSV3_JAX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli_main(main)()


def test_a_closed_pipe_ends_a_program_without_a_word():
    program = "from dsv3_jax.config.cli import cli_main\n@cli_main\ndef main():\n    for i in range(10**6): print(i)\nmain()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_other_exceptions_pass_through():
    with pytest.raises(ZeroDivisionError):
        cli_main(lambda: 1 / 0)()


def test_help_lists_every_field_with_docstring_and_default(config_file: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        parse_run(["--config", config_file, "--help"], "Trains the model.")
    text = re.sub(r"\s+", " ", re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out))
    assert exit_info.value.code == 0
    assert "Trains the model." in text
    for name in ("config", "run_dir", "resume", "profile", *leaves(Config)):
        assert f"--{name} " in text, name
    assert "--train.steps INT Optimizer steps of the whole run. (default: 7)" in text
    assert "--model.rope_scaling.beta_fast FLOAT" in text
    assert "(default: 16.0)" in text


def test_help_lists_rope_scaling_where_there_is_none(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_run(["--help"])
    text = capsys.readouterr().out
    assert "--model.rope_scaling.factor" in text
    assert "This config has no model.rope_scaling" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "exposes no `config`"),
        ("x = 1 / 0", r"mine.py' does not run \(ZeroDivisionError: division by zero\)"),
        ("x = (", r"mine.py' does not run \(SyntaxError: "),
        ("import nothing_of_that_name", r"does not run \(ModuleNotFoundError: No module named 'nothing_of_that_name'\)"),
        ("config = {}", "is a dict; it must be a dsv3_jax.config.Config"),
        (
            "from dsv3_jax.config import *\nconfig = ModelConfig(n_group=3)",
            r"mine.py': n_routed_experts \(256\) is not a multiple",
        ),
    ],
)
def test_config_files_that_are_refused(text: str, message: str, tmp_path: pathlib.Path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(str(file))


def test_the_config_of_a_run_is_one_too(config_file: str, tmp_path: pathlib.Path):
    file = tmp_path / "runs" / "a" / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text(load_config(config_file).to_json())
    assert load_config(str(file)) == load_config(config_file)
    arguments = parse_run(["--config", str(file), "--train.steps", "9"])
    assert (arguments.run_dir, arguments.config.train.steps) == (str(file.parent), 9)
    assert parse_run(["--config", str(file), "--run-dir", "b"]).run_dir == "b"


@pytest.mark.parametrize("text", ["{", "[1]", '{"model": 3}', '{"model_type": "deepseek_v3"}', '{"train": {"steps": -1}}'])
def test_json_that_is_no_config_of_a_run_is_refused(text: str, tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json' is not a run's config: "):
        load_config(str(tmp_path / "config.json"))


def test_a_missing_config_file_names_its_neighbours(config_file: str):
    with pytest.raises(ValueError, match=r"there are .*mine\.py"):
        load_config(str(pathlib.Path(config_file).with_name("other.py")))
    with pytest.raises(ValueError, match="does not exist"):
        load_config(str(pathlib.Path(config_file).parent))


@dataclasses.dataclass(frozen=True)
class SampleFlags:
    """Flags of a program that takes no run config."""

    checkpoint: str
    """Where the weights are."""
    max_tokens: int | None = None
    """Longest completion."""
    json: bool = False
    """Prints one object."""


def test_flags_of_another_program(capsys: pytest.CaptureFixture[str]):
    assert parse_flags(SampleFlags, ["--checkpoint", "x", "--max-tokens", "3", "--json"]) == SampleFlags("x", 3, True)
    with pytest.raises(ValueError, match="--checkpoint is missing"):
        parse_flags(SampleFlags, ["--json"])
    with pytest.raises(ValueError, match="--max_token does not exist; the nearest is --max_tokens"):
        parse_flags(SampleFlags, ["--max-token", "3"])
    with pytest.raises(SystemExit) as exit_info:
        parse_flags(SampleFlags, ["--help"], "Samples.")
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert all(part in text for part in ("Samples.", "--checkpoint STR", "Where the weights are. (required)", "--json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "def", "main"], "--checkpoint is 'def main'; put it in quotes: --checkpoint 'def main'"),
        (
            ["--checkpoint", "--foo"],
            "--foo does not exist; the nearest is --json (--help lists all); a value of --checkpoint that opens with dashes "
            "is written --checkpoint=--...",
        ),
        (["--json", "--foo"], "--foo does not exist; the nearest is --json (--help lists all)"),
        (["--checkpoint", "x", "--foo"], "--foo does not exist; the nearest is --json (--help lists all)"),
    ],
)
def test_text_that_the_shell_or_a_dash_takes_apart(arguments: list[str], message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_flags(SampleFlags, arguments)
    assert parse_flags(SampleFlags, ["--checkpoint=--foo"]).checkpoint == "--foo"


def test_flags_of_another_program_beside_a_config(config_file: str):
    @dataclasses.dataclass(frozen=True)
    class PlanFlags:
        config: str
        topology: str = "v5p:2x2x1"

    flags, config = parse_with_config(PlanFlags, ["--config", config_file, "--topology", "v6e:4x4", "--train.steps", "9"])
    assert (flags.topology, config.train.steps, config.model.hidden_size) == ("v6e:4x4", 9, 96)
    with pytest.raises(ValueError, match="--config is missing"):
        parse_with_config(PlanFlags, [])


def test_defaults_are_not_shared_with_the_class(config_file: str):
    parse_run(["--config", config_file, "--model.hidden_size", "64"])
    assert ModelConfig().hidden_size == 7168
