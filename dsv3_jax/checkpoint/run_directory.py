"""A run directory: the resolved config, the tokenizer, the metrics and the checkpoints of one run.

    config.json  text.digest  tokenizer.json  metrics.jsonl  tensorboard/  checkpoints/  report.png  summary.json

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
    "model": (
        "remat",
        "expert_backend",
        "expert_exchange",
        "receive_factor",
        "attention_backend",
        "cache_backend",
        "attention_chunk",
        "loss_chunk",
    ),
}


class RunDirectory:
    """The paths of a run; `create_or_resume` and `existing` are the two ways to get one."""

    def __init__(self, path: str) -> None:
        self.path = epath.Path(path)
        self.config_file = self.path / "config.json"
        self.text_digest_file = self.path / "text.digest"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.report_file = self.path / "report.png"
        self.summary_file = self.path / "summary.json"

    @classmethod
    def create_or_resume(cls, path: str, config: Config, *, resume: bool, text_digest: str | None = None) -> RunDirectory:
        """Opens `path` for training, writing its config.json.

        Args:
          path: the folder, new or (with `resume`) an earlier run's.
          config: the resolved config.
          resume: continue an earlier run if there is one.
          text_digest: of the training text and its tokenizer, which `data.source` alone does not tell; None for a run
            that has seen none yet.

        Raises:
          ValueError: if the folder holds a run and `resume` is off; if it holds a run of another config or text, or of more
            steps; if it holds other things than a run, or cannot be made or written. Nothing is written then.
        """
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise ValueError(f"run directory {path} is a file; name a folder")
        if run.config_file.exists():
            before = run.config()
            if not resume:
                raise ValueError(f"{path} already holds a run; continue it with --resume, or name another --run-dir")
            run._refuse_other_config(before, config)
            run._refuse_fewer_steps(config)
            run._refuse_other_text(text_digest)
        elif run.path.exists() and any(run.path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no run (no config.json); name another --run-dir")
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            write_whole(run.config_file, config.to_json())
            if text_digest is not None:
                write_whole(run.text_digest_file, text_digest + "\n")
        except OSError as error:
            raise ValueError(f"run directory {path} cannot be made or written ({error}); name another --run-dir") from error
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
        """Writes summary.json; of a run that was resumed, `seconds` count from the last start."""
        write_whole(self.summary_file, json.dumps(summary) + "\n")

    def _refuse_fewer_steps(self, now: Config) -> None:
        folders = self.checkpoints.iterdir() if self.checkpoints.exists() else ()
        taken = max((int(folder.name) for folder in folders if folder.name.isdigit()), default=0)
        if taken > now.train.steps:
            raise ValueError(
                f"{self.path} has taken {taken} steps, more than train.steps {now.train.steps}; raise train.steps, or name "
                "another --run-dir"
            )

    def _refuse_other_config(self, before: Config, now: Config) -> None:
        values = _binding(now)
        # A run that has seen no text yet, as dsv3_jax.convert leaves it, is bound by its model alone.
        is_new = not self.text_digest_file.exists()
        for name, value in _binding(before).items():
            if value != values[name] and (name.startswith("model.") or not is_new):
                raise ValueError(
                    f"{self.path} holds a run with {name} {value!r}, not {values[name]!r}; continue it with its own "
                    "value, or name another --run-dir"
                )

    def _refuse_other_text(self, text_digest: str | None) -> None:
        if self.text_digest_file.exists() and self.text_digest_file.read_text().strip() != text_digest:
            raise ValueError(
                f"{self.path} was trained on another text, or with another tokenizer, than data.source gives now; "
                "restore it, or name another --run-dir"
            )


def _binding(config: Config) -> dict[str, Any]:
    """The fields that a continued run must share, by dotted name."""
    flat: dict[str, Any] = {}
    for group, fields in dataclasses.asdict(config).items():
        if group in FREE_GROUPS:
            continue
        flat |= {f"{group}.{name}": value for name, value in fields.items() if name not in FREE_FIELDS.get(group, ())}
    return flat


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new, never a part."""
    if "://" in str(path):
        path.write_text(text)  # An object in a store is replaced whole by itself.
        return
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
