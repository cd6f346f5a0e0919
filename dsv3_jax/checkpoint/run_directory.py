"""A run directory: the resolved config, the tokenizer, the metrics and the checkpoints of one run.

    config.json  text.digest  tokenizer.json  metrics.jsonl  expert_load.npz  tensorboard/  profile/  checkpoints/
    report.png  summary.json  run.lock

Opening one refuses, before anything is written, whatever would damage or silently change an earlier run. Paths go
through etils, so `gs://` works where its driver is installed. Two runs at once in one folder are refused as well, but not on
`gs://`, where nothing can be locked.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import socket
import sys
import weakref
from typing import Any

from etils import epath

from dsv3_jax.config import Config
from dsv3_jax.files import part_of, write_whole

# What may differ between a run and its continuation; everything else would change the losses.
FREE_GROUPS = "mesh", "checkpoint", "infer"
FREE_FIELDS = {
    "train": ("steps", "log_every", "eval_every", "eval_batches", "max_skipped", "micro_batch_size", "init_from"),
    "data": ("cache_dir", "tokenizer"),
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
        self.expert_load_file = self.path / "expert_load.npz"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.checkpoints = self.path / "checkpoints"
        self.report_file = self.path / "report.png"
        self.summary_file = self.path / "summary.json"
        self.lock_file = self.path / "run.lock"
        self._lock: FolderLock | None = None

    @classmethod
    def create_or_resume(cls, path: str, config: Config, *, resume: bool, text_digest: str | None = None) -> RunDirectory:
        """Opens `path` for training, writing its config.json.

        No other process can do so as long as this one lives and keeps the result, or until it calls `unlock`.

        Args:
          path: the folder, new or (with `resume`) an earlier run's.
          config: the resolved config.
          resume: continue an earlier run if there is one.
          text_digest: of the training text and its tokenizer, which `data.source` alone does not tell; None for a run
            that has seen none yet.

        Raises:
          ValueError: if the folder holds a run and `resume` is off; if it holds a run of another config or text, or of more
            steps; if it holds other things than a run, or cannot be made or written; if another process trains in it.
            Nothing is written then.
        """
        run = cls(path)
        run._check_existing(config, resume, text_digest)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            if "://" not in str(run.path):
                run._lock = FolderLock(run.path, run.lock_file)
                run._check_existing(config, resume, text_digest)  # It may have changed before it was locked.
            write_whole(run.config_file, config.to_json())
            if text_digest is not None:
                write_whole(run.text_digest_file, text_digest + "\n")
        except OSError as error:
            raise ValueError(f"run directory {path} cannot be made or written ({error}); name another --run-dir") from error
        return run

    def unlock(self) -> None:
        """Lets other processes train in the folder; this one has done with it."""
        if self._lock is not None:
            self._lock.release()

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

    def _check_existing(self, config: Config, resume: bool, text_digest: str | None) -> None:
        leftovers = {self.lock_file, part_of(self.config_file)}  # Of a start that was killed before it had a config.
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run directory {self.path} is a file; name a folder")
        if self.config_file.exists():
            before = self.config()
            if not resume:
                raise ValueError(f"{self.path} already holds a run; continue it with --resume, or name another --run-dir")
            self._check_same_config(before, config)
            self._check_num_steps(config)
            self._check_same_text(text_digest)
        elif self.path.exists() and not leftovers.issuperset(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no run (no config.json); name another --run-dir")

    @property
    def steps_saved(self) -> int | None:
        """Steps of the newest checkpoint that has been finished; None if there is none."""
        folders = self.checkpoints.iterdir() if self.checkpoints.exists() else ()
        return max((int(folder.name) for folder in folders if folder.name.isdigit()), default=None)

    def _check_num_steps(self, now: Config) -> None:
        taken = self.steps_saved or 0
        if taken > now.train.steps:
            raise ValueError(
                f"{self.path} has taken {taken} steps, more than train.steps {now.train.steps}; raise train.steps, or name "
                "another --run-dir"
            )

    def _check_same_config(self, before: Config, now: Config) -> None:
        values = _binding(now)
        # A run that has seen no text yet, as dsv3_jax.convert leaves it, is bound by its model alone.
        is_new = not self.text_digest_file.exists()
        if not is_new and self.steps_saved is None and before.train.init_from != now.train.init_from:
            raise ValueError(
                f"{self.path} holds a run that starts from {before.train.init_from!r}, not {now.train.init_from!r}, and has "
                "saved nothing yet; name the same --init-from, or another --run-dir"
            )
        for name, value in _binding(before).items():
            if value != values[name] and (name.startswith("model.") or not is_new):
                raise ValueError(
                    f"{self.path} holds a run with {name} {value!r}, not {values[name]!r}; continue it with its own "
                    "value, or name another --run-dir"
                )

    def _check_same_text(self, text_digest: str | None) -> None:
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


# ----------------------------------------------------------------------------------------------------------------------
# A lock on a run directory, so that two processes do not train in it at once.


_NO_LOCKS = errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK
"""What file systems say that know no such locks, as Lustre without -o flock."""


class FolderLock:
    """Held until it is released, forgotten, or the process is gone, however it ended: the kernel sees to that.

    The file stays; to remove it would let a third process lock another file under the same name. It says who holds the lock,
    or held it last.
    """

    def __init__(self, folder: epath.Path, file: epath.Path) -> None:
        """Locks `folder`, by `file` in it.

        Raises:
          ValueError: if another process holds the lock, by its process id and host.
          OSError: if the file cannot be written.
        """
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "another process"
                raise ValueError(
                    f"{folder} is being trained in by {holder}; wait until it has ended, or name another --run-dir"
                ) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                print(f"warning: {folder} is where files cannot be locked; start no second run in it", file=sys.stderr)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self.release = weakref.finalize(self, os.close, handle)
        """Gives the lock up; may be called again."""
