"""A run directory: the resolved config, the tokenizer, the metrics and the checkpoints of one run.

    config.json  tokenizer.json  metrics.jsonl  tensorboard/  checkpoints/  report.png  summary.json

Opening one refuses, before anything is written, whatever would damage or silently change an earlier run. Paths go
through etils, so `gs://` works where its driver is installed.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from dsv3_jax.config import Config

# What may differ between a run and its continuation; everything else would change the losses.
FREE_GROUPS = "mesh", "checkpoint", "infer"
FREE_FIELDS = {
    "train": ("steps", "log_every", "eval_every", "eval_batches"),
    "data": ("cache_dir",),
    "model": ("remat", "expert_backend", "attention_chunk", "loss_chunk"),
}


class RunDirectory:
    """The paths of a run; `create_or_resume` and `existing` are the two ways to get one."""

    def __init__(self, path: str) -> None:
        self.path = epath.Path(path)
        self.config_file = self.path / "config.json"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.report_file = self.path / "report.png"
        self.summary_file = self.path / "summary.json"

    @classmethod
    def create_or_resume(cls, path: str, config: Config, *, resume: bool) -> RunDirectory:
        """Opens `path` for training, writing its config.json.

        Args:
          path: the folder, new or (with `resume`) an earlier run's.
          config: the resolved config.
          resume: continue an earlier run if there is one.

        Raises:
          ValueError: if the folder holds a run and `resume` is off; if it holds a run of another config; if it holds
            other things than a run. Nothing is written then.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise ValueError(f"run directory {path} is a file; name a folder")
        if run.config_file.exists():
            if not resume:
                raise ValueError(f"{path} already holds a run; continue it with --resume, or name another --run-dir")
            run._refuse_other_config(config)
        elif run.path.exists() and any(run.path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no run (no config.json); name another --run-dir")
        run.path.mkdir(parents=True, exist_ok=True)
        _write_whole(run.config_file, config.to_json())
        return run

    @classmethod
    def existing(cls, path: str) -> RunDirectory:
        """Opens a run to read it; ValueError if `path` holds none."""
        run = cls(path)
        if not run.config_file.exists():
            raise ValueError(f"{path} holds no run (no config.json); name the --run-dir of a training run")
        return run

    def config(self) -> Config:
        """The config the run was (last) started with."""
        try:
            return Config.from_json(self.config_file.read_text())
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.config_file} is not a run's config: {error}") from error

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        _write_whole(self.summary_file, json.dumps(summary) + "\n")

    def _refuse_other_config(self, config: Config) -> None:
        before, now = (_binding(c) for c in (self.config(), config))
        for name in before:
            if before[name] != now[name]:
                raise ValueError(
                    f"{self.path} holds a run with {name} {before[name]!r}, not {now[name]!r}; continue it with its own "
                    "value, or name another --run-dir"
                )


def _binding(config: Config) -> dict[str, Any]:
    """The fields that a continued run must share, by dotted name."""
    flat = {}
    for group, fields in dataclasses.asdict(config).items():
        if group in FREE_GROUPS:
            continue
        flat |= {f"{group}.{name}": value for name, value in fields.items() if name not in FREE_FIELDS.get(group, ())}
    return flat


def _write_whole(path: epath.Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
