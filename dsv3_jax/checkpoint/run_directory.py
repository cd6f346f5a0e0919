"""A run directory: the resolved config, the tokenizer, the metrics and the checkpoints of one run.

    config.json  text.digest  tokenizer.json  metrics.jsonl  expert_load.npz  tensorboard/  profile/  checkpoints/
    report.png  summary.json  run.lock

Opening one to train raises ValueError, before it writes, if it would damage or silently change an earlier run. Paths go
through etils, so `gs://` works where its driver is installed. Two simultaneous runs in one folder are refused as well, but not
on `gs://`, which has no locks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
import sys
import weakref
from collections.abc import Callable
from typing import Any

from etils import epath

from dsv3_jax.config import Config
from dsv3_jax.config.checks import check
from dsv3_jax.files import part_of, write_whole

# Fields that may differ between a run and its continuation; all others would change the losses.
FREE_GROUPS = "mesh", "checkpoint", "infer"
FREE_FIELDS = {
    "train": ("steps", "log_every", "eval_every", "eval_batches", "max_skipped", "micro_batch_size", "init_from"),
    "data": ("cache_dir", "tokenizer"),
    "model": (
        "remat", "expert_backend", "expert_exchange", "receive_factor", "attention_backend", "cache_backend",
        "attention_chunk", "loss_chunk",
    ),
}  # fmt: skip
# Errors of file systems without locks, such as Lustre without -o flock.
_NO_LOCKS = errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK


class RunDirectory:
    """The paths of a run's files, and its lock; made by `create_or_resume` (to train) and `existing` (to read)."""

    def __init__(self, path: str) -> None:
        self.path = epath.Path(path)
        self.config_file = self.path / "config.json"
        self.text_digest_file = self.path / "text.digest"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.expert_load_file = self.path / "expert_load.npz"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.checkpoints = self.path / "checkpoints"
        self.report_file = self.path / "report.png"
        self.summary_file = self.path / "summary.json"
        self.lock_file = self.path / "run.lock"
        self.unlock: Callable[[], Any] = lambda: None
        """Release the lock, so that another process may train in the folder; without effect when called again."""

    @classmethod
    def create_or_resume(cls, path: str, config: Config, *, resume: bool, text_digest: str | None = None) -> RunDirectory:
        """Make or open `path` for training, lock it, and write config.json and (if given) the text digest.

        A local folder, not gs://, is locked against others until `unlock`, or until the result is deleted or the process ends.

        Args:
          path: the folder, new or (with `resume`) an earlier run's.
          config: the resolved config.
          resume: continue an earlier run if there is one.
          text_digest: of the training text and its tokenizer, which may change under the same `data.source`; None for a run
            that has seen none yet.

        Raises:
          ValueError: if the folder holds a run and `resume` is off; if it holds a run of another config or text, or of more
            steps; if it holds other files, or cannot be made or written; if another process trains in it. Nothing is
            written then.
        """
        run = cls(path)
        run._check_existing(config, resume, text_digest)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            if "://" not in str(run.path):
                run._lock()
                run._check_existing(config, resume, text_digest)  # It may have changed before it was locked.
            write_whole(run.config_file, config.to_json())
            if text_digest is not None:
                write_whole(run.text_digest_file, text_digest + "\n")
        except OSError as error:
            raise ValueError(f"run directory {path} cannot be made or written ({error}); name another --run-dir") from error
        return run

    @classmethod
    def existing(cls, path: str) -> RunDirectory:
        """Return the run at `path`, to read it; raise ValueError if `path` has no config.json. Nothing is locked or written."""
        run = cls(path)
        has_config = run.config_file.exists()
        check(has_config, f"{path} holds no run (no config.json); name the --run-dir of a training run")
        return run

    def config(self) -> Config:
        """Return the config of the run's last start, from config.json; raise ValueError if that is no run's config."""
        try:
            return Config.from_json(self.config_file.read_text())
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.config_file} is not a run's config: {error}") from error

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary` to summary.json, atomically; in a resumed run, its `seconds` count from the last start."""
        write_whole(self.summary_file, json.dumps(summary) + "\n")

    @property
    def steps_saved(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        folders = self.checkpoints.iterdir() if self.checkpoints.exists() else ()
        return max((int(folder.name) for folder in folders if folder.name.isdigit()), default=None)

    def _check_existing(self, config: Config, resume: bool, text_digest: str | None) -> None:
        other = "name another --run-dir"
        check(not self.path.exists() or self.path.is_dir(), f"run directory {self.path} is a file; name a folder")
        if not self.config_file.exists():
            leftovers = {self.lock_file, part_of(self.config_file)}  # Of a start that was killed before it had a config.
            is_free = not self.path.exists() or leftovers.issuperset(self.path.iterdir())
            check(is_free, f"{self.path} is not empty and holds no run (no config.json); {other}")
            return
        before = self.config()
        check(resume, f"{self.path} already holds a run; continue it with --resume, or {other}")
        self._check_same_config(before, config)
        saved, steps = self.steps_saved or 0, config.train.steps
        check(
            saved <= steps, f"{self.path} has taken {saved} steps, more than train.steps {steps}; raise train.steps, or {other}"
        )
        check(
            not self.text_digest_file.exists() or self.text_digest_file.read_text().strip() == text_digest,
            f"{self.path} was trained on another text, or with another tokenizer, than data.source gives now; restore that, or "
            f"{other}",
        )

    def _check_same_config(self, before: Config, now: Config) -> None:
        # A run that has seen no text yet, as made by dsv3_jax.convert, need only keep its model.
        is_new = not self.text_digest_file.exists()
        sources = before.train.init_from, now.train.init_from
        check(
            is_new or self.steps_saved is not None or sources[0] == sources[1],
            f"{self.path} holds a run that starts from {sources[0]!r}, not {sources[1]!r}, and has saved nothing yet; name the "
            "same --init-from, or another --run-dir",
        )
        values = _fixed_fields(now)
        for name, value in _fixed_fields(before).items():
            check(
                value == values[name] or (is_new and not name.startswith("model.")),
                f"{self.path} holds a run with {name} {value!r}, not {values[name]!r}; continue it with its own value, or name "
                "another --run-dir",
            )

    def _lock(self) -> None:
        """Lock the folder until `unlock`, or until this object or the process ends; warn on stderr if its disk has no locks.

        The lock file stays: if it were removed, a third process could lock another file under its name. It names the process
        that holds the lock, or held it last.

        Raises:
          ValueError: if another process holds the lock, by its process id and host.
          OSError: if the file cannot be written.
        """
        handle = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with contextlib.ExitStack() as on_error:
            on_error.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "another process"
                remedy = "wait until it has ended, or name another --run-dir"
                raise ValueError(f"{self.path} is being trained in by {holder}; {remedy}") from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                print(f"warning: the disk of {self.path} cannot lock files; start no second run in it", file=sys.stderr)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            on_error.pop_all()
        self.unlock = weakref.finalize(self, os.close, handle)


def _fixed_fields(config: Config) -> dict[str, Any]:
    """Return dotted name -> value of the fields that a continued run must keep, such as `train.seed`."""
    return {
        f"{group}.{name}": value
        for group, fields in dataclasses.asdict(config).items()
        if group not in FREE_GROUPS
        for name, value in fields.items()
        if name not in FREE_FIELDS.get(group, ())
    }
