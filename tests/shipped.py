"""The shipped configs; one that starts from a checkpoint gets the published model."""

from __future__ import annotations

import functools
import pathlib
import tempfile

from dsv3_jax.config import Config
from dsv3_jax.config.cli import load_config

ROOT = pathlib.Path(__file__).parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@functools.cache
def shipped(name: str) -> Config:
    """Return the config of this name."""
    with tempfile.TemporaryDirectory() as run:
        # The only file of a run that is read before its arrays.
        (pathlib.Path(run) / "config.json").write_text(load_config(str(ROOT / "configs/v3_671b.py")).to_json())
        return load_config(str(ROOT / "configs" / f"{name}.py"), run)
