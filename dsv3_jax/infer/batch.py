"""Completion of a file of prompts (JSON lines): all are queued at once, each completion is written as soon as it ends."""

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
    engine: Engine, lines: Sequence[PromptLine], defaults: SamplingParams, template: ChatTemplate | None, tokenizer: Tokenizer
) -> dict[Request, PromptLine]:
    """Queue every line for the engine's `step`; return the line of each request. Chats also stop at the template's eos_token.

    Raises:
      ValueError: naming the first line that the engine or the template refuses; those before it stay queued.
    """
    submitted: dict[Request, PromptLine] = {}
    closing = () if template is None else closing_tokens(template, tokenizer, engine.config.vocab_size)
    for line in lines:
        try:
            prompt, params = line.encoded(template, tokenizer), line.params(defaults)
            submitted[engine.submit(prompt, params.ending_at(closing) if line.is_chat else params)] = line
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from error
    return submitted


def complete_lines(engine: Engine, submitted: dict[Request, PromptLine], completions: CompletionLines, speed: Speed) -> None:
    """Step the engine until all requests have ended; write each completion as soon as it ends, and count tokens in `speed`.

    stderr shows the progress: a bar if it is a terminal, else one line after every tenth of the batch.
    """
    left, done = dict(submitted), len(completions.done)
    total = done + len(left)
    console = Console(stderr=True)
    columns = BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("compiling", total=total, completed=done)
        while left:
            for update in engine.step():
                speed.note(len(update.tokens))
                if update.request.finish_reason is None:
                    continue
                completions.write(left.pop(update.request), update.request.completion)
                done += 1
                progress.update(bar, completed=done, description=f"lines, {speed.count} tokens")
                if not console.is_terminal and 10 * done // total > 10 * (done - 1) // total:
                    print(f"{done} of {total} lines, {speed.count} tokens", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts of a batch file: one JSON object a line, all of them checked before anything is generated.


SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
KEYS = ("prompt", "messages", "id", *SAMPLING)


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One line of a batch file: a prompt or chat messages, and the sampling parameters that it sets."""

    index: int
    """Number of the line in the file, from 0; empty lines count too."""
    where: str
    """<path>:<line number from 1>, the beginning of error messages."""
    content: str | list[int] | list[Message]
    is_chat: bool
    """True if `content` is a list of chat messages; False for text or token ids."""
    id: str | int | None
    sampling: dict[str, Any]
    """The `SamplingParams` fields that the line itself sets, by name."""

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """Return `defaults` with the line's own fields. Without a seed of its own it gets defaults.seed + index, mod 2^32."""
        seed = (defaults.seed + self.index) % 2**32
        return dataclasses.replace(defaults, **({"seed": seed} | self.sampling))

    def encoded(self, template: ChatTemplate | None, tokenizer: Tokenizer) -> Prompt:
        """Return text or token ids as they are, chat messages as token ids. Raises ValueError if the template refuses them."""
        if not self.is_chat:
            return self.content  # type: ignore[return-value]
        assert template is not None
        return encode_prompt(template, tokenizer, self.content)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class PromptLines:
    """All lines of a batch file but the empty ones."""

    lines: list[PromptLine]
    digest: str
    """Hexadecimal hash of the file's bytes."""

    @property
    def need_template(self) -> bool:
        """True if at least one line holds chat messages, which only a chat template can encode."""
        return any(line.is_chat for line in self.lines)


def read_prompt_lines(path: str) -> PromptLines:
    """Read a batch file and check the fields of every line; empty lines are skipped, but counted.

    Raises:
      ValueError: naming the first faulty line and its fault; or if the file does not exist or has no line.
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
    unknown = [key for key in values if key not in KEYS]
    if unknown:
        (nearest,) = difflib.get_close_matches(unknown[0], KEYS, n=1, cutoff=0)
        raise ValueError(f'{where} has the unknown key "{unknown[0]}"; the nearest is "{nearest}" (all: {", ".join(KEYS)})')
    kinds = [key for key in ("prompt", "messages") if key in values]
    check(len(kinds) == 1, f'{where} has {" and ".join(kinds) or "no prompt"}; give either "prompt" or "messages"')
    name = values.get("id")
    is_text = isinstance(name, str) and paired(name) == name
    is_integer = isinstance(name, int) and not isinstance(name, bool)
    check(name is None or is_text or is_integer, f"{where}: id is {name!r}; use an integer or valid Unicode text")
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
    """Return the `SamplingParams` fields among `values`, logit_bias with integer keys. Raises ValueError for a wrong value."""
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
# Completions of a batch file: one JSON object a line, in the order in which they end. A second start continues the file.


class CompletionLines:
    """Output file, locked from creation until the context exits. Each completion is flushed as soon as it is written."""

    def __init__(self, path: str, settings: dict[str, Any], indices: Collection[int]) -> None:
        """Open and lock the file; create it with <path>.settings.json, or check it and cut off an incomplete last line.

        Args:
          path: the file, which may hold completions of an earlier start.
          settings: JSON values that an existing file must have been made with, or that a new one is made with.
          indices: indices of all prompts of the batch; a line of the file with another index is an error.

        Raises:
          ValueError: if it has other settings or other lines, is locked by another process, or fails `check_place`.
        """
        self._path = pathlib.Path(path).expanduser()
        settings, settings_path = json.loads(json.dumps(settings)), pathlib.Path(f"{self._path}.settings.json")
        check_place(path)
        is_new = not self._path.exists() or not self._path.stat().st_size
        if not is_new:
            self._check_same_settings(settings, settings_path)
        self._file = self._path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_new:
                write_whole(epath.Path(settings_path), json.dumps(settings, indent=2) + "\n")
            self.done = self._read(indices)
            """Indices of the prompts completed by earlier starts; `write` adds none."""
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"{self._path} is being written by another process; wait until it has ended") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> CompletionLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: PromptLine, completion: Completion) -> None:
        """Append the completion of one prompt as a line of JSON, and flush it."""
        values: dict[str, Any] = {"index": line.index} | ({} if line.id is None else {"id": line.id})
        values |= {"text": completion.text, "tokens": completion.tokens, "finish_reason": completion.finish_reason}
        if completion.logprobs is not None:
            values["logprobs"] = [entry._asdict() for entry in completion.logprobs]
        self._file.write(json.dumps(values, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()

    def _check_same_settings(self, settings: dict[str, Any], path: pathlib.Path) -> None:
        remedy = f"name another file, or delete {self._path.name} to start over"
        try:
            before = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._path} exists, but the settings it was made with cannot be read ({error}); {remedy}"
            ) from error
        for name, value in settings.items():
            there = before.get(name) if isinstance(before, dict) else None
            check(there == value, f"{self._path} was made with {name} {there!r}, not {value!r}; {remedy}")

    def _read(self, indices: Collection[int]) -> set[int]:
        """Return the prompt indices in the file; cut off a last line without newline. Raises ValueError for a faulty line."""
        *lines, torn = self._path.read_bytes().split(b"\n")
        done: set[int] = set()
        for number, line in enumerate(lines, 1):
            try:
                index = json.loads(line)["index"]
            except (ValueError, TypeError, KeyError):
                index = None
            is_one = isinstance(index, int) and index in indices
            check(is_one, f"{self._path}:{number} is no completion of this batch; restore the file, or delete it to start over")
            done.add(index)
        self._file.truncate(self._path.stat().st_size - len(torn))
        return done


def check_place(path: str, prompts: str | None = None) -> None:
    """Raise ValueError if the folder of `path` is missing, or if `path` is itself a folder or the same file as `prompts`."""
    place = pathlib.Path(path).expanduser()
    check(place.parent.is_dir(), f"{place.parent} does not exist; make the folder for {place.name}")
    check(not place.is_dir(), f"{path} is a folder; name a file for the completions")
    is_same = prompts is not None and place.exists() and place.samefile(pathlib.Path(prompts).expanduser())
    check(not is_same, f"{path} holds the prompts; name another file for the completions")
