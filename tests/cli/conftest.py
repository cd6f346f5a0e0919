"""A run of train.py that the tests of all three programs share, and two ways to start a program."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

import infer
import train
from dsv3_jax import evaluate
from dsv3_jax.config import CheckpointConfig, Config, DataConfig, InferConfig, ModelConfig, OptimizerConfig, TrainConfig
from dsv3_jax.parallel.mesh import make_mesh

ROOT = Path(__file__).parent.parent.parent
TEXTS = "bisect.py", "heapq.py", "shlex.py", "string.py", "textwrap.py", "this.py"

CONFIG = Config(
    model=ModelConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=1,
        first_k_dense_replace=0,
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
    optimizer=OptimizerConfig(learning_rate=5e-3, final_learning_rate=5e-4, warmup_steps=3),
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


def plain_environment(devices: int = 1) -> dict[str, str]:
    """The environment of a program that runs on plain devices, and is compiled as the tests are."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "DSV3_"))}
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


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
ENDLESS = "--train.steps", "100000", "--train.eval-every", "0", "--model.num-nextn-predict-layers", "0"


def started_for_long(folder: Path, run: str, *arguments: str) -> subprocess.Popen[str]:
    """A run of train.py without an end to wait for, once it has logged two steps; `run` is below runs/, or absolute.

    Without MTP and held-out losses, which take longer to compile than all the steps that are waited for.
    """
    path = folder / "runs" / run
    command = [sys.executable, *TRAIN, str(path), *ENDLESS, *arguments]
    child = subprocess.Popen(
        command, cwd=folder, env=plain_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline, file = time.monotonic() + 120, path / "metrics.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < 2:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return child


@contextlib.contextmanager
def in_this_process(folder: Path) -> Iterator[Callable[..., Done]]:
    """Calls a program's `main` as if it were started in `folder`, which saves the seconds of a start.

    JAX is at work already, with one cache for all that is compiled, and on the eight devices of the tests; train.py gets one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for program in (train, infer):
            patch.setattr(program, "join_processes", lambda flags: None)
        patch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
        for program in (train, infer, evaluate):
            patch.setattr(program, "cache_compilations", lambda folder: None)

        def call(main: Callable[[], None], *arguments: str) -> Done:
            patch.setattr(sys, "argv", ["program", *arguments])
            code, out, err = 0, io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main()
                except SystemExit as exit_:
                    code = int(exit_.code or 0)
            return Done(code, out.getvalue(), err.getvalue())

        yield call


@pytest.fixture(scope="session")
def straight(workplace: Path) -> tuple[Path, Done]:
    """The run directory of a run without interruption, and how it ended. Not to be written to."""
    with in_this_process(workplace) as call:
        done = call(train.main, *TRAIN[1:], "runs/straight")
    assert done.code == 0, done.stderr
    return workplace / "runs" / "straight", done


@pytest.fixture
def called(workplace: Path) -> Iterator[Callable[..., Done]]:
    """Calls a program's `main` in this process."""
    with in_this_process(workplace) as call:
        yield call
