"""The completions of a batch file: one JSON object a line, in the order in which they end, and a start that goes on.

    {"index": 3, "id": "...", "text": "...", "tokens": [...], "finish_reason": "stop", "logprobs": [...]}

Beside OUT lies OUT.settings.json, written first: what the completions depend on. With other settings, or other prompts, a
start is refused, so that no file holds the completions of two.
"""

from __future__ import annotations

import fcntl
import json
import pathlib
from collections.abc import Collection
from typing import Any

from etils import epath

from dsv3_jax.config.checks import require
from dsv3_jax.files import write_whole
from dsv3_jax.infer.prompt_lines import PromptLine
from dsv3_jax.infer.request import Completion


class CompletionLines:
    """The file while it is written; a context manager. A line is on its way to the disk before the next one is begun."""

    def __init__(self, path: str, settings: dict[str, Any], indices: Collection[int]) -> None:
        """Opens the file, or makes it, and reads what has been done.

        A last line that was cut off, by a kill say, is taken away.

        Args:
          path: the file.
          settings: what the completions depend on, as JSON can say it.
          indices: those of the lines to complete, the only ones that may be in the file.

        Raises:
          ValueError: if it was made with other settings, holds something else, or another process writes to it.
        """
        self._path = pathlib.Path(path).expanduser()
        self._settings_path = pathlib.Path(f"{self._path}.settings.json")
        self._settings = json.loads(json.dumps(settings))
        require_place(path)
        is_new = not self._path.exists() or not self._path.stat().st_size
        if not is_new:
            self._require_same_settings()
        self._file = self._path.open("ab")
        try:
            self._lock()
            if is_new:
                write_whole(epath.Path(self._settings_path), json.dumps(self._settings, indent=2) + "\n")
            self.done = self._read(indices)
            """Indices of the lines that are there."""
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> CompletionLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: PromptLine, completion: Completion) -> None:
        """Appends the completion of a line."""
        told: dict[str, Any] = {"index": line.index}
        if line.id is not None:
            told["id"] = line.id
        told |= {"text": completion.text, "tokens": completion.tokens, "finish_reason": completion.finish_reason}
        if completion.logprobs is not None:
            told["logprobs"] = [entry._asdict() for entry in completion.logprobs]
        self._file.write(json.dumps(told, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()

    def _require_same_settings(self) -> None:
        remedy = f"name another file, or delete {self._path.name} to begin anew"
        try:
            before = json.loads(self._settings_path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._path} exists, but what it was made from cannot be read ({error}); {remedy}") from error
        for name, value in self._settings.items():
            there = before.get(name) if isinstance(before, dict) else None
            require(there == value, f"{self._path} was made with {name} {there!r}, not {value!r}; {remedy}")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self._path} is being written by another process; wait until it has ended") from error

    def _read(self, indices: Collection[int]) -> set[int]:
        done: set[int] = set()
        whole = 0
        lines = self._path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if number == len(lines) and not line.endswith(b"\n"):
                break
            done.add(self._index(line, number, indices))
            whole += len(line)
        self._file.truncate(whole)
        return done

    def _index(self, line: bytes, number: int, indices: Collection[int]) -> int:
        try:
            index = json.loads(line)["index"]
        except (ValueError, TypeError, KeyError):
            index = None
        is_one = isinstance(index, int) and index in indices
        require(is_one, f"{self._path}:{number} is no completion of this batch; restore the file, or delete it to begin anew")
        return index


def require_place(path: str, prompts: str | None = None) -> None:
    """Raises ValueError where no file of completions can be, or where the file of `prompts` is."""
    place = pathlib.Path(path).expanduser()
    require(place.parent.is_dir(), f"{place.parent} does not exist; make the folder for {place.name}")
    require(not place.is_dir(), f"{path} is a folder; name a file for the completions")
    is_same = prompts is not None and place.exists() and place.samefile(pathlib.Path(prompts).expanduser())
    require(not is_same, f"{path} holds the prompts; name another file for the completions")
