"""The completions of a batch file: all lines at once to the engine, each written when it ends."""

from __future__ import annotations

import dataclasses
import difflib
import fcntl
import json
import pathlib
import sys
from collections.abc import Collection, Sequence
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsv3_jax.config.checks import check
from dsv3_jax.data.chat_template import ChatTemplate, Message, closing_tokens, encode_prompt
from dsv3_jax.data.sources import paired
from dsv3_jax.data.storage import digest
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.files import write_whole
from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.report import Speed
from dsv3_jax.infer.request import Completion, Prompt, Request
from dsv3_jax.infer.sampling import SamplingParams


def submit_lines(
    engine: Engine,
    lines: Sequence[PromptLine],
    defaults: SamplingParams,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
) -> dict[Request, PromptLine]:
    """Hands all lines to the engine, which begins with the first step.

    Raises:
      ValueError: naming the line, if the engine or the template refuses one.
    """
    submitted: dict[Request, PromptLine] = {}
    closing = () if template is None else closing_tokens(template, tokenizer, engine.config.vocab_size)
    for line in lines:
        prompt, params = line.encoded(template, tokenizer), line.params(defaults)
        try:
            submitted[engine.submit(prompt, params.ending_at(closing) if line.is_chat else params)] = line
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from error
    return submitted


def complete_lines(engine: Engine, submitted: dict[Request, PromptLine], completions: CompletionLines, speed: Speed) -> None:
    """Works until every request has ended, and writes each completion when it has."""
    left = dict(submitted)
    with BatchProgress(len(left), len(completions.done)) as progress:
        while left:
            for update in engine.step():
                speed.note(len(update.tokens))
                if update.request.finish_reason is not None:
                    completions.write(left.pop(update.request), update.request.completion)
                    progress.show(len(left), speed)


class BatchProgress:
    """A bar on a terminal; where stderr is no terminal, a line every tenth of the lines. A context manager."""

    def __init__(self, left: int, done: int) -> None:
        """Args: left: lines to complete; done: lines that an earlier start has completed."""
        self._total = left + done
        self._printed = self._tenths(done)
        self._console = Console(stderr=True)
        columns = BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("compiling", total=self._total, completed=done)

    def __enter__(self) -> BatchProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, left: int, speed: Speed) -> None:
        """Shows how many lines are left."""
        done = self._total - left
        self._progress.update(self._task, completed=done, description=f"lines, {speed.count} tokens")
        if not self._console.is_terminal and self._tenths(done) > self._printed:
            self._printed = self._tenths(done)
            print(f"{done} of {self._total} lines, {speed.count} tokens", file=sys.stderr, flush=True)

    def _tenths(self, done: int) -> int:
        return 10 * done // self._total


# ----------------------------------------------------------------------------------------------------------------------
# The prompts of a batch file: one JSON object a line, all of them checked before anything is generated.


SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
KEYS = ("prompt", "messages", "id", *SAMPLING)


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One line."""

    index: int
    """Number of the line, from 0."""
    where: str
    """Path and number of the line, from 1, for messages."""
    content: str | list[int] | list[Message]
    is_chat: bool
    """Whether `content` is messages."""
    id: str | int | None
    sampling: dict[str, Any]
    """What the line says of `SamplingParams`."""

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """How it is drawn. Its seed is its own, so that what is drawn depends on no other line."""
        seed = (defaults.seed + self.index) % 2**32
        return dataclasses.replace(defaults, **({"seed": seed} | self.sampling))

    def encoded(self, template: ChatTemplate | None, tokenizer: Tokenizer) -> Prompt:
        """The prompt as the engine takes it.

        Raises:
          ValueError: naming the line, if the template refuses the messages.
        """
        if not self.is_chat:
            return self.content  # type: ignore[return-value]
        assert template is not None
        try:
            return encode_prompt(template, tokenizer, self.content)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error


@dataclasses.dataclass(frozen=True)
class PromptLines:
    """All lines of a file."""

    lines: list[PromptLine]
    digest: str
    """Of the file's bytes."""

    @property
    def need_template(self) -> bool:
        """Whether one of them is messages."""
        return any(line.is_chat for line in self.lines)


def read_prompt_lines(path: str) -> PromptLines:
    """Reads and checks a file; empty lines are passed over, and counted.

    Raises:
      ValueError: naming the line and the key, at the first that is wrong; or if there is no such file, or no line in it.
    """
    file = epath.Path(path).expanduser()
    check(file.is_file(), f"--batch-file {path} does not exist; name a file with one JSON object a line")
    data = file.read_bytes()
    texts = enumerate(data.split(b"\n"))
    lines = [_line(index, f"{path}:{index + 1}", text) for index, text in texts if text.strip()]
    check(bool(lines), f'--batch-file {path} is empty; write one object a line, such as {{"prompt": "..."}}')
    return PromptLines(lines, digest(data))


def _line(index: int, where: str, text: bytes) -> PromptLine:
    try:
        values = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}); each line must be one object") from error
    check(isinstance(values, dict), f"{where} is {type(values).__name__}, not an object; each line must be one object")
    if (unknown := next((key for key in values if key not in KEYS), None)) is not None:
        nearest = max(KEYS, key=lambda key: difflib.SequenceMatcher(None, unknown, key).ratio())
        raise ValueError(f'{where} has the unknown key "{unknown}"; the nearest is "{nearest}" (all: {", ".join(KEYS)})')
    kinds = [key for key in ("prompt", "messages") if key in values]
    check(len(kinds) == 1, f'{where} has {" and ".join(kinds) or "no prompt"}; give either "prompt" or "messages"')
    name = values.get("id")
    is_text = isinstance(name, str) and paired(name) == name
    is_integer = isinstance(name, int) and not isinstance(name, bool)
    check(name is None or is_text or is_integer, f"{where}: id is {name!r}; use a text or an integer")
    content = _prompt(values["prompt"], where) if "prompt" in values else _messages(values["messages"], where)
    return PromptLine(index, where, content, kinds == ["messages"], name, _sampling(values, where))


def _prompt(prompt: Any, where: str) -> str | list[int]:
    is_ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    check(isinstance(prompt, str) or is_ids, f"{where}: prompt is {prompt!r:.100}; use a string or a list of token ids")
    return prompt


def _messages(messages: Any, where: str) -> list[Message]:
    is_list = isinstance(messages, list) and bool(messages)
    check(is_list, f'{where}: messages is {messages!r:.100}; use a list like [{{"role": "user", "content": "..."}}]')
    for number, message in enumerate(messages):
        is_message = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        check(is_message, f'{where}: messages[{number}] needs a "role" and a "content", both strings')
    return messages


def _sampling(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of `SamplingParams`; the values of each are checked by that class."""
    fields = {name: values[name] for name in SAMPLING if name in values}
    biases = fields.get("logit_bias")
    try:
        if isinstance(biases, dict):  # The keys of JSON are texts.
            fields["logit_bias"] = {int(key) if key.isdecimal() else key: bias for key, bias in biases.items()}
        SamplingParams(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return fields


# ----------------------------------------------------------------------------------------------------------------------
# The completions of a batch file: one JSON object a line, in the order in which they end, and a start that goes on.


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
        check_place(path)
        is_new = not self._path.exists() or not self._path.stat().st_size
        if not is_new:
            self._check_same_settings()
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

    def _check_same_settings(self) -> None:
        remedy = f"name another file, or delete {self._path.name} to begin anew"
        try:
            before = json.loads(self._settings_path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._path} exists, but what it was made from cannot be read ({error}); {remedy}") from error
        for name, value in self._settings.items():
            there = before.get(name) if isinstance(before, dict) else None
            check(there == value, f"{self._path} was made with {name} {there!r}, not {value!r}; {remedy}")

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
        check(is_one, f"{self._path}:{number} is no completion of this batch; restore the file, or delete it to begin anew")
        return index


def check_place(path: str, prompts: str | None = None) -> None:
    """Raises ValueError where no file of completions can be, or where the file of `prompts` is."""
    place = pathlib.Path(path).expanduser()
    check(place.parent.is_dir(), f"{place.parent} does not exist; make the folder for {place.name}")
    check(not place.is_dir(), f"{path} is a folder; name a file for the completions")
    is_same = prompts is not None and place.exists() and place.samefile(pathlib.Path(prompts).expanduser())
    check(not is_same, f"{path} holds the prompts; name another file for the completions")
