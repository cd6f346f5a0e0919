"""Files of the package that a batch crosses on a mesh, from the loop of train.py to the first product of the model."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import pytest

import dsv3_jax
import train
from dsv3_jax.parallel.mesh import make_mesh
from tests.cli.conftest import CONFIG, ROOT, in_this_process

PACKAGE = str(Path(dsv3_jax.__file__).parent)


class FirstProduct(Exception):
    """Raised in place of the first matrix product of the model."""


def test_a_batch_crosses_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crossed: set[str] = set()

    def record(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            crossed.add(frame.f_code.co_filename.removeprefix(PACKAGE + "/"))

    iterate = train.TrainBatches.iterate

    def watched(self: Any, first: int) -> Iterator[Any]:
        monkeypatch.setattr(jax.lax, "dot_general", stop)
        threading.setprofile(record)  # Batches are read ahead in threads.
        sys.setprofile(record)
        yield from iterate(self, first)

    def stop(*_: Any, **__: Any) -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        raise FirstProduct

    monkeypatch.setattr(train.TrainBatches, "iterate", watched)
    (tmp_path / "text").mkdir()
    for name in ("README.md", "CHANGELOG.md", "LICENSE"):
        (tmp_path / "text" / f"{name}.txt").write_text((ROOT / name).read_text())
    (tmp_path / "config.py").write_text(f"from dsv3_jax.config import *\n\nconfig = {CONFIG!r}\n")
    with in_this_process(tmp_path) as call:
        monkeypatch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:4]))
        with pytest.raises(FirstProduct):
            call(train.main, "--config", "config.py", "--run-dir", "run", "--mesh.fsdp", "2", "--mesh.expert", "2")
    assert {
        "data/batches.py",
        "data/rows.py",
        "train/step.py",
        "model/losses.py",
        "model/model.py",
        "model/layers.py",
    } <= crossed
    assert len(crossed) <= 25, sorted(crossed)
    print(f"{len(crossed)} files: {', '.join(sorted(crossed))}")
