"""A run of train.py that the tests of all three programs share, and two ways to start a program."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

import infer
import train
from dsv3_jax.config import CheckpointConfig, Config, DataConfig, InferConfig, ModelConfig, OptimizerConfig, TrainConfig
from dsv3_jax.parallel.mesh import make_mesh

ROOT = Path(__file__).parent.parent.parent
TEXTS = "bisect.py", "heapq.py", "shlex.py", "string.py", "textwrap.py", "this.py"

CONFIG = Config(
    model=ModelConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
        num_attention_heads=2,
        q_lora_rank=12,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        max_position_embeddings=64,
        initializer_range=0.05,
        dtype="float32",
    ),
    data=DataConfig(source="text", cache_dir="cache", heldout_fraction=0.2),
    optimizer=OptimizerConfig(learning_rate=3e-3, final_learning_rate=3e-4, warmup_steps=3),
    train=TrainConfig(steps=12, batch_size=4, sequence_length=32, log_every=1, eval_every=6, eval_batches=1, seed=3),
    checkpoint=CheckpointConfig(every=6),
    infer=InferConfig(prompt="def f(", max_tokens=6),
)


@dataclasses.dataclass(frozen=True)
class Done:
    """How a program ended."""

    code: int
    stdout: str
    stderr: str

    def assert_refused(self, *fragments: str) -> None:
        """It ended with code 2, and with one line that says why."""
        assert (self.code, self.stdout) == (2, ""), self
        assert self.stderr.startswith("error: "), self
        assert self.stderr.count("\n") == 1, self
        assert self.stderr.endswith("\n"), self
        for fragment in fragments:
            assert fragment in self.stderr


def plain_environment() -> dict[str, str]:
    """The environment of a program that runs on one plain device."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "DSV3_"))}
    # Compiling is most of the time here, and half of that is spent on code that would run faster.
    return environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def started(folder: Path, *arguments: str) -> Done:
    """Starts a program as its user does, in `folder`, on one plain device."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=plain_environment(), capture_output=True, text=True, timeout=300
    )
    return Done(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its bytes (None for a folder)."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a little real text and the config of a tiny run."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "text").mkdir()
    for name in TEXTS:
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / name, folder / "text" / name)
    (folder / "config.py").write_text(f"from dsv3_jax.config import *\n\nconfig = {CONFIG!r}\n")
    return folder


TRAIN = str(ROOT / "train.py"), "--config", "config.py", "--run-dir"


def started_for_long(folder: Path, run: str, *arguments: str) -> subprocess.Popen[str]:
    """A run of train.py without an end to wait for, once it has logged two steps; `run` is below runs/, or absolute."""
    path = folder / "runs" / run
    command = [sys.executable, *TRAIN, str(path), "--train.steps", "100000", *arguments]
    child = subprocess.Popen(
        command, cwd=folder, env=plain_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline, file = time.monotonic() + 120, path / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < 2:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return child


@pytest.fixture(scope="session")
def straight(workplace: Path) -> tuple[Path, Done]:
    """The run directory of a run without interruption, and how it ended. Not to be written to."""
    done = started(workplace, *TRAIN, "runs/straight")
    assert done.code == 0, done.stderr
    return workplace / "runs" / "straight", done


@pytest.fixture
def called(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Calls a program's `main` in this process, on one device, which saves the seconds of a start."""
    monkeypatch.chdir(workplace)
    # JAX is at work here already, on the eight devices of the tests.
    for program in (train, infer):
        monkeypatch.setattr(program, "join_processes", lambda flags: None)
    monkeypatch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}

    def call(main: Callable[[], None], *arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call
